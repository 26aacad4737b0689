"""The dense reference against things that it does not compute itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jvp

EXACT = {"rtol": 1e-10, "atol": 1e-12}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "kernel of one": {"kernel_size": 1},
    "oblong kernel": {"kernel_size": (2, 3), "padding": (1, 0)},
    "stride": {"kernel_size": 3, "stride": (2, 3), "padding": 1},
    "stride that leaves a rest": {"kernel_size": 2, "stride": 2},
    "dilation": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2)},
    "same, even kernel, circular": {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 3), "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "groups": 2},
    "groups, no bias, stride": {"kernel_size": 3, "groups": 2, "bias": False, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise, two outputs each": {"kernel_size": 2, "groups": 4, "out_channels": 8},
    "everything": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "padding_mode": "circular",
    },
}
LINEARS: dict[str, tuple[tuple[int, ...], bool]] = {
    "vector": ((), True),
    "vector, no bias": ((), False),
    "sequence": ((4,), True),
    "two leading dimensions": ((2, 3), False),
}


def _cases() -> list[Any]:
    convolutions = [
        pytest.param(
            lambda options=options: nn.Conv2d(4, **{"out_channels": 4, **options}),
            (4, 6, 7),
            id=f"conv: {name}",
        )
        for name, options in CONVOLUTIONS.items()
    ]
    linears = [
        pytest.param(lambda bias=bias: nn.Linear(5, 3, bias=bias), (*leading, 5), id=f"linear: {name}")
        for name, (leading, bias) in LINEARS.items()
    ]
    return convolutions + linears


def _randomise(model: nn.Module) -> nn.Module:
    """Give every parameter, also those that start at zero or one, a random value of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def _classifier() -> nn.Module:
    return _randomise(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


def _bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def _weight_matrix(module: nn.Module) -> Tensor:
    """Return the layer's own parameters, `[K, O, I]`."""
    bias = None if module.bias is None else module.bias.detach().double()[None]
    return reference.gradient_matrix(module, module.weight.detach().double()[None], bias)[:, 0]


def _outputs_of_vector(model: nn.Module, inputs: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the outputs of the whole batch as a function of the flat parameter vector, and that vector."""
    model = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    values = [value.detach() for value in model.parameters()]

    def outputs(vector: Tensor) -> Tensor:
        pieces = vector.split([value.numel() for value in values])
        parameters = {
            name: piece.reshape(value.shape) for name, piece, value in zip(names, pieces, values, strict=True)
        }
        return functional_call(model, parameters, (inputs.double(),))

    return outputs, torch.cat([value.reshape(-1) for value in values])


class _TwoCalls(nn.Module):
    """One layer called twice, on inputs with different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(value)).mean(dim=1))


class _Frames(nn.Module):
    """A convolution over the frames of a film: the first without a batch dimension, the others as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2, groups=2)

    def forward(self, films: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.conv(film[0])) + self.conv(film[1:]).sum(0) for film in films])


class _OneOfTwo(nn.Module):
    """Two layers, of which the forward pass calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, value: Tensor) -> Tensor:
        return self.used(value)


class _Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(value)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("make", "shape"), _cases())
def test_per_example_gradients_add_up_to_the_gradient_of_the_batch(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, inputs = _randomise(make()), torch.randn(3, *shape)
    targets = torch.randn_like(module(inputs))

    gradients = reference.per_example_gradients(module, _squared_error, inputs, targets)

    batched = copy.deepcopy(module).double()
    _squared_error(batched(inputs.double()), targets.double()).backward()
    assert set(gradients) == {name for name, _ in batched.named_parameters()}
    for name, parameter in batched.named_parameters():
        assert gradients[name].shape == (3, *parameter.shape)
        torch.testing.assert_close(gradients[name].sum(0), parameter.grad, **EXACT)
        assert not torch.allclose(gradients[name][0], gradients[name][1])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("make", "shape"), _cases())
def test_layer_inputs_reproduce_the_forward_pass_and_the_gradient(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    # The layer after it makes every position's output gradient a different one.
    module, inputs = _randomise(make()), torch.randn(3, *shape)
    model = nn.Sequential(module, nn.Tanh())
    targets = torch.randn_like(model(inputs))
    matrix = _weight_matrix(module)
    groups, per_group, columns = matrix.shape

    x, g = reference.layer_inputs_and_output_gradients(model, "0", _squared_error, inputs, targets)

    outputs = copy.deepcopy(module).double()(inputs.double())
    channels_last = outputs.movedim(1, -1) if isinstance(module, nn.Conv2d) else outputs
    by_position = channels_last.reshape(3, -1, groups, per_group).permute(2, 0, 1, 3)
    positions = by_position.shape[2]
    assert x.shape == (groups, 3, positions, columns)
    assert g.shape == (groups, 3, positions, per_group)
    torch.testing.assert_close(torch.einsum("knsi,koi->knso", x, matrix), by_position, **EXACT)

    gradients = reference.per_example_gradients(model, _squared_error, inputs, targets)
    expected = reference.gradient_matrix(module, gradients["0.weight"], gradients.get("0.bias"))
    torch.testing.assert_close(torch.einsum("knso,knsi->knoi", g, x), expected, **EXACT)


def test_output_gradients_of_an_elementwise_loss_are_known() -> None:
    torch.manual_seed(2)
    module, inputs = _randomise(nn.Conv2d(2, 4, 2, groups=2)), torch.randn(2, 2, 3, 4)
    targets = torch.randn(2, 4, 2, 3)
    _, g = reference.layer_inputs_and_output_gradients(module, "", _squared_error, inputs, targets)
    expected = 2 * (copy.deepcopy(module).double()(inputs.double()) - targets.double())
    assert g.shape == (2, 2, 6, 2)
    torch.testing.assert_close(g[1, 0, 4], expected[0, 2:, 1, 1].detach(), **EXACT)
    torch.testing.assert_close(g[0, 1, 2], expected[1, :2, 0, 2].detach(), **EXACT)


def test_a_layer_called_twice_has_the_positions_of_both_calls() -> None:
    torch.manual_seed(3)
    model, inputs, targets = _randomise(_TwoCalls()), torch.randn(4, 5, 3), torch.randn(4, 3)
    x, g = reference.layer_inputs_and_output_gradients(model, "shared", _squared_error, inputs, targets)
    assert x.shape == (1, 4, 6, 4)
    torch.testing.assert_close(x[0, :, :5, :3], inputs.double(), **EXACT)

    batched = copy.deepcopy(model).double()
    _squared_error(batched(inputs.double()), targets.double()).backward()
    total = torch.einsum("knso,knsi->koi", g, x)[0]
    torch.testing.assert_close(total[:, :3], batched.shared.weight.grad, **EXACT)
    torch.testing.assert_close(total[:, 3], batched.shared.bias.grad, **EXACT)


def test_convolved_frames_are_positions_of_their_film() -> None:
    torch.manual_seed(18)
    model, inputs, targets = _randomise(_Frames()), torch.randn(2, 3, 2, 3, 4), torch.randn(2, 4, 2, 3)
    x, g = reference.layer_inputs_and_output_gradients(model, "conv", _squared_error, inputs, targets)
    assert x.shape == (2, 2, 18, 5)
    assert g.shape == (2, 2, 18, 2)
    gradients = reference.per_example_gradients(model, _squared_error, inputs, targets)
    expected = reference.gradient_matrix(model.conv, gradients["conv.weight"], gradients["conv.bias"])
    torch.testing.assert_close(torch.einsum("knso,knsi->knoi", g, x), expected, **EXACT)


def test_a_tied_weight_gets_the_sum_over_its_layers() -> None:
    torch.manual_seed(4)
    model, inputs, targets = _randomise(_Tied()), torch.randn(4, 3), torch.randn(4, 3)
    gradients = reference.per_example_gradients(model, _squared_error, inputs, targets)
    assert list(gradients) == ["first.weight", "first.bias"]
    batched = copy.deepcopy(model).double()
    _squared_error(batched(inputs.double()), targets.double()).backward()
    torch.testing.assert_close(gradients["first.weight"].sum(0), batched.first.weight.grad, **EXACT)

    by_layer = []
    for name in ("first", "second"):
        x, g = reference.layer_inputs_and_output_gradients(model, name, _squared_error, inputs, targets)
        by_layer.append(torch.einsum("knso,knsi->noi", g, x)[..., :3])
    torch.testing.assert_close(sum(by_layer), gradients["first.weight"], **EXACT)
    assert not torch.allclose(by_layer[0], gradients["first.weight"])


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(5)
    model = _randomise(nn.Sequential(nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)))
    inputs, targets = torch.randn(2, 1, 2, 2), torch.tensor([0, 2])
    gradients = reference.per_example_gradients(model, _cross_entropy, inputs, targets)
    outputs, vector = _outputs_of_vector(model, inputs)

    def losses(vector: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(vector), targets, reduction="none")

    steps = 1e-5 * torch.eye(len(vector), dtype=torch.float64)
    differences = torch.stack([(losses(vector + step) - losses(vector - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(reference.flatten_gradients(gradients), differences.T.contiguous(), rtol=1e-7, atol=1e-9)


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero() -> None:
    model = _OneOfTwo()
    model.used.bias.requires_grad_(False)
    inputs, targets = torch.ones(3, 2), torch.zeros(3, 2)
    gradients = reference.per_example_gradients(model, _squared_error, inputs, targets)
    assert list(gradients) == ["used.weight", "unused.weight", "unused.bias"]
    assert gradients["used.weight"].any()
    torch.testing.assert_close(gradients["unused.weight"], torch.zeros(3, 2, 2, dtype=torch.float64))


def test_the_model_is_left_as_it_was() -> None:
    model, inputs, labels = _classifier(), torch.randn(3, 3), torch.tensor([0, 1, 2])
    model.eval()
    before = copy.deepcopy(model.state_dict())
    reference.per_example_gradients(model, _cross_entropy, inputs, labels)
    reference.layer_inputs_and_output_gradients(model, "0", _cross_entropy, inputs, labels)
    reference.class_gradients(model, inputs, 3)
    reference.ggn_dense(model, inputs, "bce")
    reference.hessian_dense(model, _cross_entropy, inputs, labels)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    assert "forward" not in vars(model[0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_matrix_by_hand() -> None:
    module = nn.Conv2d(4, 4, (1, 2), groups=2)
    weight = torch.arange(16.0).reshape(1, 4, 2, 1, 2)
    bias = torch.tensor([[-1.0, -2.0, -3.0, -4.0]])
    expected = torch.tensor(
        [
            [[0.0, 1.0, 2.0, 3.0, -1.0], [4.0, 5.0, 6.0, 7.0, -2.0]],
            [[8.0, 9.0, 10.0, 11.0, -3.0], [12.0, 13.0, 14.0, 15.0, -4.0]],
        ]
    )
    torch.testing.assert_close(reference.gradient_matrix(module, weight, bias)[:, 0], expected)
    torch.testing.assert_close(reference.gradient_matrix(module, weight, None)[:, 0], expected[..., :4])


def test_second_moments_by_hand() -> None:
    # One group, two examples, two positions: sums over positions in A, means over both in B.
    x = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]])
    g = torch.tensor([[[[1.0], [2.0]], [[3.0], [0.0]]]])
    A, B = reference.second_moments(x, g)
    torch.testing.assert_close(A, torch.tensor([[[1.0, 0.5], [0.5, 2.5]]]))
    torch.testing.assert_close(B, torch.tensor([[[14.0 / 4.0]]]))
    A, B = reference.second_moments(x[:, :, :1], g[:, :, :1])
    torch.testing.assert_close(A, torch.tensor([[[1.0, 0.5], [0.5, 0.5]]]))
    torch.testing.assert_close(B, torch.tensor([[[5.0]]]))


def test_kfac_of_one_example_is_its_outer_product() -> None:
    # G = g xᵀ with g = (1, 2, 3), x = (5, 7), row by row: 5, 7, 10, 14, 15, 21.
    x, g = torch.tensor([[[[5.0, 7.0]]]]), torch.tensor([[[[1.0, 2.0, 3.0]]]])
    row_by_row = torch.tensor([5.0, 7.0, 10.0, 14.0, 15.0, 21.0])
    dense = reference.kfac_dense(*reference.second_moments(x, g))
    torch.testing.assert_close(dense[0], torch.outer(row_by_row, row_by_row))


def test_kfac_dense_by_hand() -> None:
    A = torch.tensor([[[1.0, 2.0], [2.0, 5.0]]])
    B = torch.tensor([[[3.0, -1.0], [-1.0, 4.0]]])
    expected = torch.tensor(
        [[3.0, 6.0, -1.0, -2.0], [6.0, 15.0, -2.0, -5.0], [-1.0, -2.0, 4.0, 8.0], [-2.0, -5.0, 8.0, 20.0]]
    )
    torch.testing.assert_close(reference.kfac_dense(A, B), expected[None])
    # The other order is a different matrix: a reference with the factors exchanged fails here.
    assert not torch.allclose(reference.kfac_dense(B, A), expected[None])


def test_eigenbasis_diagonalises_both_factors() -> None:
    torch.manual_seed(7)
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    g = torch.randn(2, 9, 3, 3, dtype=torch.float64)
    A, B = reference.second_moments(x, g)
    for factor, basis in zip((A, B), reference.eigenbasis(A, B), strict=True):
        diagonal = basis.mT @ factor @ basis
        torch.testing.assert_close(diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), **EXACT)
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis[0])).double().expand_as(basis), **EXACT)


def test_ekfac_eigenvalues_by_hand() -> None:
    # A quarter turn on the outputs: (Q_Bᵀ G) has the rows (G_1, -G_0).
    gradients = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]]])
    Q_B = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    Q_A = torch.eye(2)[None]
    lam = reference.ekfac_eigenvalues(gradients, Q_A, Q_B)
    torch.testing.assert_close(lam, torch.tensor([[[4.5, 10.0], [1.0, 2.0]]]))
    dense = reference.ekfac_dense(Q_A, Q_B, lam)
    torch.testing.assert_close(dense, torch.diag(torch.tensor([1.0, 2.0, 4.5, 10.0]))[None])


def test_ekfac_is_the_best_diagonal_in_its_basis() -> None:
    torch.manual_seed(8)
    x = torch.randn(2, 20, 1, 3, dtype=torch.float64)
    g = torch.randn(2, 20, 1, 4, dtype=torch.float64) * x.sum(-1, keepdim=True)
    gradients = torch.einsum("knso,knsi->knoi", g, x)
    Q_A, Q_B = reference.eigenbasis(*reference.second_moments(x, g))
    lam = reference.ekfac_eigenvalues(gradients, Q_A, Q_B)
    torch.testing.assert_close(lam, ((Q_B.mT[:, None] @ gradients @ Q_A[:, None]) ** 2).mean(1), **EXACT)

    vectors = gradients.flatten(2)
    fisher = vectors.mT @ vectors / 20
    dense = reference.ekfac_dense(Q_A, Q_B, lam)
    error = torch.linalg.matrix_norm(fisher - dense)
    kfac = reference.kfac_dense(*reference.second_moments(x, g))
    assert (error < torch.linalg.matrix_norm(fisher - kfac)).all()
    # The same eigenvalues in the transposed basis, a known mistake of others, are a worse approximation.
    transposed = reference.ekfac_dense(Q_A.mT, Q_B.mT, lam)
    assert (error < torch.linalg.matrix_norm(fisher - transposed)).all()


def test_quadratic_and_bilinear_forms_by_hand() -> None:
    # Two groups with damping of their own: (2, 4) + 1 and (1, 0) + 3.
    C = torch.stack([torch.diag(torch.tensor([2.0, 4.0])), torch.diag(torch.tensor([1.0, 0.0]))])
    damping = torch.tensor([1.0, 3.0])
    right = torch.tensor([[[[3.0, 5.0]], [[0.0, 1.0]]], [[[2.0, 3.0]], [[4.0, 0.0]]]])
    left = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 6.0]]]])
    expected = torch.tensor([9 / 3 + 25 / 5 + 4 / 4 + 9 / 3, 1 / 5 + 16 / 4])
    torch.testing.assert_close(reference.quadratic_forms(C, right, damping), expected)
    expected = torch.tensor([[3 / 3 + 5 / 5 + 18 / 3, 1 / 5]])
    torch.testing.assert_close(reference.bilinear_forms(C, left, right, damping), expected)


def test_forms_agree_with_the_explicit_inverse() -> None:
    torch.manual_seed(9)
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    C = root @ root.mT
    left = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    right = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    inverse = torch.linalg.inv(C + 0.1 * torch.eye(6, dtype=torch.float64))
    expected = torch.einsum("kmp,kpq,knq->mn", left.flatten(2), inverse, right.flatten(2))
    torch.testing.assert_close(reference.bilinear_forms(C, left, right, 0.1), expected)
    pairs = reference.bilinear_forms(C, right, right, 0.1)
    torch.testing.assert_close(reference.quadratic_forms(C, right, 0.1), pairs.diagonal())


def test_class_gradients_are_the_scaled_gradients_of_each_label() -> None:
    torch.manual_seed(10)
    model, inputs = _classifier(), torch.randn(4, 3)
    scaled = reference.class_gradients(model, inputs, 3)
    plain = reference.class_gradients(model, inputs, 3, weight_fn=torch.ones_like)
    probabilities = torch.softmax(copy.deepcopy(model).double()(inputs.double()), dim=1).detach()
    for c in range(3):
        labels = torch.full((4,), c)
        expected = reference.per_example_gradients(model, _cross_entropy, inputs, labels)
        for name, gradient in expected.items():
            torch.testing.assert_close(plain[name][:, c], gradient, **EXACT)
            scale = probabilities[:, c].sqrt().reshape(4, *[1] * (gradient.ndim - 1))
            torch.testing.assert_close(scaled[name][:, c], scale * gradient, **EXACT)


def test_the_fisher_of_class_gradients_is_the_ggn() -> None:
    torch.manual_seed(11)
    model, inputs = _classifier(), torch.randn(5, 3)
    fisher = reference.exact_fisher(model, inputs, 3)
    torch.testing.assert_close(fisher, reference.ggn_dense(model, inputs, "cross_entropy"), **EXACT)
    vectors = torch.cat([v.flatten(2) for v in reference.class_gradients(model, inputs, 3).values()], dim=2)
    torch.testing.assert_close(torch.einsum("ncp,ncq->pq", vectors, vectors) / 5, fisher, **EXACT)


# torch.func.jvp itself calls torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "loss_fn", "targets"),
    [
        ("cross_entropy", _cross_entropy, torch.tensor([0, 2, 1, 1])),
        ("bce", _bce, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]]).double()),
        ("mse", _squared_error, torch.linspace(-1, 1, 12).reshape(4, 3).double()),
    ],
)
def test_the_ggn_is_the_hessian_of_the_linearised_model(
    kind: str, loss_fn: Callable[[Tensor, Tensor], Tensor], targets: Tensor
) -> None:
    torch.manual_seed(12)
    model, inputs = _classifier(), torch.randn(4, 3)
    outputs, vector = _outputs_of_vector(model, inputs)

    def linearised(moved: Tensor) -> Tensor:
        value, change = jvp(outputs, (vector,), (moved - vector,))
        return loss_fn(value + change, targets) / 4

    expected = hessian(linearised)(vector)
    ggn = reference.ggn_dense(model, inputs, kind)
    torch.testing.assert_close(ggn, expected, **EXACT)

    full = reference.hessian_dense(model, loss_fn, inputs, targets)
    expected = hessian(lambda moved: loss_fn(outputs(moved), targets) / 4)(vector)
    torch.testing.assert_close(full, expected, **EXACT)
    # The two differ for this net, and agree in the last layer, which enters the outputs linearly.
    assert (full - ggn).norm() > 0.05 * full.norm()
    last = [reference.layer_blocks(matrix, model, "2") for matrix in (full, ggn)]
    torch.testing.assert_close(*last, **EXACT)


def test_the_hessian_agrees_with_finite_differences_of_the_loss() -> None:
    torch.manual_seed(13)
    model = _randomise(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    inputs, labels = torch.randn(3, 2), torch.tensor([0, 1, 1])
    outputs, vector = _outputs_of_vector(model, inputs)

    def loss(vector: Tensor) -> Tensor:
        return _cross_entropy(outputs(vector), labels) / 3

    steps = 1e-3 * torch.eye(len(vector), dtype=torch.float64)
    differences = torch.tensor(
        [
            [loss(vector + a + b) - loss(vector + a - b) - loss(vector - a + b) + loss(vector - a - b) for a in steps]
            for b in steps
        ],
        dtype=torch.float64,
    ) / (4e-6)
    full = reference.hessian_dense(model, _cross_entropy, inputs, labels)
    torch.testing.assert_close(full, differences, rtol=1e-4, atol=1e-5)


def test_the_hessian_of_a_linear_loss_is_zero() -> None:
    full = reference.hessian_dense(nn.Linear(2, 1), lambda out, _: out.sum(), torch.ones(2, 2), torch.ones(2))
    assert full.shape == (3, 3)
    assert not full.any()


def test_params_choose_and_order_the_parameters() -> None:
    torch.manual_seed(14)
    model, inputs, labels = _classifier(), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    params = ["2.bias", "0.weight"]
    # 0.weight 12, 0.bias 4, 2.weight 12, 2.bias 3
    index = torch.cat([torch.arange(28, 31), torch.arange(0, 12)])
    for make in (
        lambda names: reference.ggn_dense(model, inputs, "cross_entropy", names),
        lambda names: reference.exact_fisher(model, inputs, 3, names),
        lambda names: reference.hessian_dense(model, _cross_entropy, inputs, labels, names),
    ):
        torch.testing.assert_close(make(params), make(None)[index][:, index], **EXACT)
    gradients = reference.per_example_gradients(model, _cross_entropy, inputs, labels)
    flat = reference.flatten_gradients(gradients)
    torch.testing.assert_close(reference.flatten_gradients(gradients, params), flat[:, index], **EXACT)


def test_layer_blocks_have_the_layout_of_the_layer_gradients() -> None:
    torch.manual_seed(15)
    model = _randomise(nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    inputs, labels = torch.randn(5, 4, 2, 2), torch.tensor([0, 1, 2, 2, 1])
    gradients = reference.per_example_gradients(model, _cross_entropy, inputs, labels)
    flat = reference.flatten_gradients(gradients)
    blocks = reference.layer_blocks(flat.T @ flat, model, "0")
    layer = reference.gradient_matrix(model[0], gradients["0.weight"], gradients["0.bias"]).flatten(2)
    assert blocks.shape == (2, 18, 18)
    torch.testing.assert_close(blocks, layer.mT @ layer, **EXACT)


def _pseudo_kfac(model: nn.Module, name: str, inputs: Tensor, outputs: int) -> Tensor:
    """K-FAC of the sum of squared errors with `B` the exact expectation: square roots of `2 I` as targets."""
    factors = []
    for c in range(outputs):
        root = torch.zeros(len(inputs), outputs)
        root[:, c] = 1
        x, g = reference.layer_inputs_and_output_gradients(
            model, name, lambda out, direction: 2**0.5 * (out * direction).sum(), inputs, root
        )
        factors.append(reference.second_moments(x, g))
    return reference.kfac_dense(factors[0][0], sum(B for _, B in factors))


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_kfac_is_the_ggn_of_a_deep_linear_net_with_squared_error(name: str) -> None:
    torch.manual_seed(16)
    inputs = torch.randn(6, 4)
    linear = _randomise(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)))
    exact = reference.layer_blocks(reference.ggn_dense(linear, inputs, "mse"), linear, name)
    torch.testing.assert_close(_pseudo_kfac(linear, name, inputs, 2), exact, **EXACT)


def test_kfac_is_not_the_ggn_of_a_net_with_nonlinearities() -> None:
    torch.manual_seed(17)
    inputs = torch.randn(6, 4)
    net = _randomise(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    exact = reference.layer_blocks(reference.ggn_dense(net, inputs, "mse"), net, "0")
    error = (_pseudo_kfac(net, "0", inputs, 2) - exact).norm() / exact.norm()
    assert error > 0.02


def test_tracin_self_by_hand() -> None:
    first = {"a": torch.tensor([[1.0, 2.0], [0.0, 3.0]]), "b": torch.tensor([[1.0], [2.0]])}
    second = {"a": torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([[0.0], [1.0]])}
    one_rate = reference.tracin_self([first, second], [0.5, 2.0])
    torch.testing.assert_close(one_rate, torch.tensor([3.0 + 4.0, 6.5 + 2.0]).double())
    by_parameter = reference.tracin_self([first, second], [{"a": 1.0, "b": 10.0}, 2.0])
    torch.testing.assert_close(by_parameter, torch.tensor([5.0 + 10.0 + 4.0, 9.0 + 40.0 + 2.0]).double())


def test_what_the_reference_refuses() -> None:
    model, inputs, labels = _OneOfTwo(), torch.ones(3, 2), torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="never calls 'unused'"):
        reference.layer_inputs_and_output_gradients(model, "unused", _squared_error, inputs, labels)
    with pytest.raises(TypeError, match="_OneOfTwo has no reference; expected nn.Linear or a convolution"):
        reference.layer_inputs_and_output_gradients(model, "", _squared_error, inputs, labels)
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for one example; expected one number"):
        reference.per_example_gradients(model, lambda out, _: out, inputs, labels)
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        reference.per_example_gradients(model, _squared_error, inputs, labels[:2])
    with pytest.raises(ValueError, match="has 2 outputs, not num_classes=5"):
        reference.class_gradients(model, inputs, 5)
    with pytest.raises(ValueError, match="kind is 'hinge'; expected"):
        reference.ggn_dense(model, inputs, "hinge")
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2\); expected logits"):
        reference.ggn_dense(model, torch.ones(3, 4, 2), "cross_entropy")
