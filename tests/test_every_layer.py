"""Per-example gradients of every kind of parameter against plain autograd, one example at a time, in float64."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from layer_cases import (
    CLASSES,
    COVERED,
    EXACT_ON_REQUEST,
    MISLEADING,
    Bare,
    Case,
    MultiHead,
    Read,
    Reading,
    build,
    classify,
    frozen,
    ids,
    next_token,
    numbers,
)
from torch import Tensor, nn

from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients import coverage
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import VerificationError, inspect
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import LayerError, ParameterBlock
from lightning_influence.objective.task import TaskError

TOLERANCE = 1e-9


@dataclass
class Found:
    """What the package says about each example, and the sums over them; by parameter name."""

    each: dict[str, Tensor]
    sums: dict[str, Tensor]
    norms: Tensor
    products: Tensor


class Problem:
    """A model, its examples and the reference's gradients of it."""

    def __init__(self, case: Case, *, n: int | None = None) -> None:
        self.case = case
        self.module = build(case)
        self.examples = list(case.data())[:n]
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.expected = ref.gradients_alone(
            self.module, case.task, [case.collate([example]) for example in self.examples]
        )
        self.largest = max(float(gradient.abs().max()) for gradient in self.expected.values())
        # Something to multiply with that is no gradient.
        generator = torch.Generator().manual_seed(7)
        self.vectors = {
            name: torch.randn(gradient.shape[1:], generator=generator, dtype=torch.float64)
            for name, gradient in self.expected.items()
        }

    def discover(self, **options: Any) -> Coverage:
        return discover(self.module, self.case.task, self.source(2), **options)

    def source(self, batch_size: int) -> ExampleSource:
        return ExampleSource(cast("Any", self.examples), batch_size=batch_size, collate_fn=self.case.collate)

    def passes(self, coverage: Coverage, batch_size: int) -> ExampleGradients:
        return ExampleGradients(self.module, self.case.task, self.source(batch_size), coverage)

    def covered(self, coverage: Coverage) -> list[str]:
        """Return the names of the covered parameters: each of them belongs to one block."""
        names = [
            self.names[id(parameter)] for block in coverage.blocks.values() for parameter in block.parameters.values()
        ]
        assert len(names) == len(set(names)), "a parameter in two blocks would count twice in every score"
        return names

    def run(self, coverage: Coverage, batch_size: int, finite: Sequence[bool] | None = None) -> Found:
        n = len(self.examples)
        finite = [True] * n if finite is None else finite
        names = self.covered(coverage)
        each = {name: torch.zeros_like(self.expected[name]) for name in names}
        sums = {name: torch.zeros_like(self.vectors[name]) for name in names}
        found = Found(each, sums, torch.zeros(n).double(), torch.zeros(n).double())
        with closing(self.passes(coverage, batch_size).run(range(n))) as batches:
            for batch in batches:
                assert batch.finite.tolist() == [finite[index] for index in batch.indices]
                for io in batch.layers():
                    self.add(found, coverage, io, batch.indices)
        return found

    def add(self, found: Found, coverage: Coverage, io: LayerIO, rows: list[int]) -> None:
        block, g = coverage.blocks[io.name], io.gs[0]
        assert all(name == self.names[id(parameter)] for name, parameter in block.parameters.items())
        each = torch.cat(list(per_sample.gradients(io.x, g)), 1)
        assert each.shape == (block.shape[0], len(rows), *block.shape[1:])
        for name, value in block.to_parameters(each.transpose(0, 1)).items():
            found.each[name][rows] += value
        for name, value in block.to_parameters(per_sample.summed_gradient(io.x, g)).items():
            found.sums[name] += value
        found.norms[rows] += per_sample.squared_norms(io.x, g)
        vector = block.from_parameters(self.vectors)
        assert vector.shape == block.shape
        found.products[rows] += per_sample.inner_products(io.x, g, vector)

    def close(self, found: Tensor, expected: Tensor, what: str, scale: float = 1.0) -> None:
        torch.testing.assert_close(
            found,
            expected,
            rtol=TOLERANCE,
            atol=TOLERANCE * scale * self.largest,
            msg=lambda message: f"{what}: {message}",
        )

    def check(self, coverage: Coverage) -> None:
        """Hold everything against the reference, in small batches with a lone last example and in one batch."""
        names = self.covered(coverage)
        before = copy.deepcopy(self.module.state_dict())
        for size in self.case.sizes:
            found = self.run(coverage, size)
            for name in names:
                self.close(found.each[name], self.expected[name], f"{name}, batches of {size}")
                self.close(found.sums[name], self.expected[name].sum(0), f"sum of {name}, batches of {size}")
            squares = [self.expected[name].reshape(len(self.examples), -1).square().sum(1) for name in names]
            self.close(found.norms, torch.stack(squares).sum(0), f"norms, batches of {size}", self.largest)
            products = [
                (self.expected[name] * self.vectors[name]).reshape(len(self.examples), -1).sum(1) for name in names
            ]
            self.close(found.products, torch.stack(products).sum(0), f"products, batches of {size}", 10)
        if self.case.verified:
            inspection = inspect(self.passes(coverage, len(self.examples)), range(len(self.examples)))
            assert inspection.largest_error is not None
            assert inspection.largest_error < 1e-8
        for name, value in self.module.state_dict().items():
            assert torch.equal(value, before[name]), f"a pass has changed {name}"
        assert all(parameter.grad is None for parameter in self.module.parameters())

    def check_the_reference(self) -> None:
        """Examples alone have, in sum, the gradient of their batch, and every parameter takes part."""
        for name, gradient in self.gradient_of_the_batch().items():
            self.close(self.expected[name].sum(0), gradient, f"the reference of {name}")
        for name, gradient in self.expected.items():
            if name in self.unused:
                assert not gradient.any()
            else:
                assert float(gradient.abs().max()) > 1e-4 * self.largest, f"{name} is not tested by this case"
                assert float((gradient - gradient.mean(0)).abs().max()) > 0, "all examples have the same gradient"

    @property
    def unused(self) -> list[str]:
        return matching(list(self.expected), self.case.unused)

    def gradient_of_the_batch(self) -> dict[str, Tensor]:
        """Return `n` times the gradient of the loss of all examples in one batch."""
        module = copy.deepcopy(self.module)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        loss = self.case.task(module, self.case.collate(self.examples))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else len(self.examples) * gradient.to_dense()
            for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        }


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


# ------------------------------------------------------------------------------------------------------- every layer


@pytest.mark.parametrize("name", COVERED)
def test_every_gradient_is_that_of_plain_autograd(name: str) -> None:
    problem = Problem(COVERED[name])
    problem.check_the_reference()
    trainable = sum(p.numel() for p in problem.module.parameters() if p.requires_grad)
    coverage = problem.discover()
    assert set(coverage.uncovered) <= set(problem.unused), coverage.uncovered
    if not problem.unused:
        assert coverage.share == 1.0
        assert coverage.covered_parameters == coverage.total_parameters == trainable
    problem.check(coverage)


@pytest.mark.parametrize("name", EXACT_ON_REQUEST)
def test_what_is_not_understood_is_named_with_a_reason(name: str) -> None:
    problem = Problem(EXACT_ON_REQUEST[name])
    problem.check_the_reference()
    reasons = problem.case.uncovered
    left_out = matching(list(problem.expected), list(reasons))
    assert left_out, "the case names parameters that it does not have"
    if len(left_out) == len(problem.expected):
        with pytest.raises(LayerError, match=next(iter(reasons.values()))):
            problem.discover()
        return
    coverage = problem.discover()
    assert set(coverage.uncovered) == set(left_out)
    for parameter, reason in coverage.uncovered.items():
        (expected,) = [why for pattern, why in reasons.items() if fnmatch.fnmatchcase(parameter, pattern)]
        assert re.search(expected, reason)
    scalars = {name: p.numel() for name, p in problem.module.named_parameters() if p.requires_grad}
    missing = sum(scalars[name] for name in left_out)
    assert coverage.share == pytest.approx(1 - missing / sum(scalars.values()))
    problem.check(coverage)


@pytest.mark.parametrize("name", EXACT_ON_REQUEST)
def test_what_is_not_understood_is_exact_on_request(name: str) -> None:
    problem = Problem(EXACT_ON_REQUEST[name])
    coverage = problem.discover(uncovered="exact")
    assert coverage.share == 1.0
    assert not coverage.uncovered
    problem.check(coverage)


@pytest.mark.parametrize("uncovered", ["report", "exact"])
@pytest.mark.parametrize("name", MISLEADING)
def test_rows_in_disorder_are_never_taken_for_examples(name: str, uncovered: str) -> None:
    """Left out, refused, or right: never filed under the wrong example without a word."""
    problem = Problem(MISLEADING[name])
    refused = None
    try:
        coverage = problem.discover(uncovered=uncovered)
        inspect(problem.passes(coverage, len(problem.examples)), range(len(problem.examples)))
        problem.check(coverage)
    except (LayerError, VerificationError) as error:
        refused = str(error)
    if refused is None:
        assert not name.endswith(("of all examples", "of the batch")), "influence of single examples is not defined"
    else:
        assert re.search("layer|experts|example", refused), "the message names what it is about"
        separate = ("some rows", "experts", "a loop over examples", "a loop over vectors")
        assert uncovered == "report" or name not in separate, "examples can be run one at a time here"


# ------------------------------------------------------------------------------------------------- choice of layers


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, ids: Tensor) -> Any:
        return self.head((self.scale * torch.tanh(self.encoder(self.embedding(ids)))).mean(1))


CHOSEN = Case(Chosen, ids(3))
LAYERS: dict[str, tuple[Any, list[str]]] = {
    "a name": (["head"], ["head.*"]),
    "a name alone": ("head", ["head.*"]),
    "names": (["embedding", "encoder.1"], ["embedding.weight", "encoder.1.*"]),
    "a glob": (["encoder.*"], ["encoder.*"]),
    "a glob and a name": (["enc*.[02]", "head"], ["encoder.0.*", "encoder.2.*", "head.*"]),
    "a type": ([nn.Linear], ["encoder.0.*", "encoder.2.*", "head.*"]),
    "a type alone": (nn.LayerNorm, ["encoder.1.*"]),
    "types": ([nn.Embedding, nn.LayerNorm], ["embedding.weight", "encoder.1.*"]),
    "a type and a name": ([nn.Embedding, "head"], ["embedding.weight", "head.*"]),
    "everything": (["*"], ["*"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_names_globs_and_types(name: str) -> None:
    layers, expected = LAYERS[name]
    problem = Problem(CHOSEN)
    coverage = problem.discover(layers=layers)
    names = matching(list(problem.expected), expected)
    assert sorted(problem.covered(coverage)) == sorted(names)
    assert set(coverage.uncovered) == set(problem.expected) - set(names)
    assert all("layers=" in reason for reason in coverage.uncovered.values())
    assert coverage.share == pytest.approx(
        sum(problem.vectors[name].numel() for name in names) / sum(v.numel() for v in problem.vectors.values())
    )
    problem.check(coverage)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["haed"], "haed.*head"),
        (["encoder.3"], r"encoder\.3.*encoder\.[012]"),
        (["head", "embeding"], "embeding.*embedding"),
        (["decoder.*"], r"decoder\.\*"),
        ([nn.Conv2d], "Conv2d"),
    ],
    ids=str,
)
def test_unknown_layers(layers: Any, message: str) -> None:
    """What was probably meant is in the message."""
    with pytest.raises(LayerError, match=f"(?s){message}"):
        Problem(CHOSEN).discover(layers=layers)


def test_frozen_parameters_are_no_business_of_ours() -> None:
    problem = Problem(Case(lambda: frozen(Chosen(), "embedding.weight", "encoder.1.weight", "scale"), ids(3)))
    coverage = problem.discover()
    assert coverage.share == 1.0
    assert "embedding.weight" not in problem.covered(coverage)
    problem.check(coverage)
    assert not problem.module.get_parameter("scale").requires_grad


def test_nothing_to_train() -> None:
    case = Case(lambda: Chosen().requires_grad_(False), ids(3))
    module = build(case)
    with pytest.raises((LayerError, TaskError), match="gradient|train"):
        discover(module, case.task, ExampleSource(cast("Any", case.data()), batch_size=2))


# ------------------------------------------------------------------------------------------- positions left out


IGNORED = -100


def masked_language_model(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    tokens, labels = batch
    return F.cross_entropy(module(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_examples_without_a_label_have_no_gradient(batch_size: int) -> None:
    """Each position counts the same, in whatever batch; the mean over none of them must not spread as NaN."""
    tokens = torch.stack([value for value, _ in ids(4)()])
    labels = tokens.flip(1).clone()
    labels[0, 1:], labels[1], labels[3, :2], labels[4] = IGNORED, IGNORED, IGNORED, IGNORED
    examples = list(zip(tokens, labels, strict=True))
    counts = (labels != IGNORED).sum(1)
    module = build(Case(lambda: nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)), ids()))

    def own(copied: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        logits = copied(batch[0]).flatten(0, 1)
        total = F.cross_entropy(logits, batch[1].flatten(), ignore_index=IGNORED, reduction="sum")
        return total / counts.double().mean()

    expected = ref.gradients_alone(module, own, [(t[None], y[None]) for t, y in examples])
    source = ExampleSource(cast("Any", examples), batch_size=batch_size)
    coverage = discover(module, masked_language_model, source)
    gradients = ExampleGradients(module, masked_language_model, source, coverage)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    with closing(gradients.run(range(5))) as batches:
        for batch in batches:
            assert batch.finite.tolist() == [True] * len(batch.indices)
            for io in batch.layers():
                each = torch.cat(list(per_sample.gradients(io.x, io.gs[0])), 1).transpose(0, 1)
                for name, value in coverage.blocks[io.name].to_parameters(each).items():
                    found[name][batch.indices] += value
    for name, value in expected.items():
        assert not value[[1, 4]].any()
        assert float((found[name] - value).abs().max()) < 1e-12, name


NAN = [
    "linear: sequence, later",
    "convolution: 2d, everything, later",
    "transposed convolution: 2d, everything, later",
    "norm: LayerNorm, later",
    "norm: BatchNorm2d, later",
    "elementwise: scale and shift, later",
    "elementwise: class token, later",
    "elementwise: long learned positions, later",
    "repeated: bilinear, later",
    "structure: time first with positions, later",
    "structure: relative bias, later",
    "structure: positions by ids, a long table, later",
    "attention: self, time first",
    "embedding: bag, weights, padding",
    "recurrent: LSTM, alone",
    "a weight and its transpose",
]


@pytest.mark.parametrize("name", NAN)
def test_an_example_that_is_not_finite_leaves_the_others_alone(name: str) -> None:
    case = (COVERED | EXACT_ON_REQUEST)[name]
    problem = Problem(case)
    coverage = problem.discover(uncovered="exact")
    *_, numbers, label = problem.examples[1]
    problem.examples[1] = (*problem.examples[1][:-2], torch.full_like(numbers, torch.nan), label)
    for gradient in problem.expected.values():
        gradient[1] = 0
    found = problem.run(coverage, 3, finite=[True, False, True, True, True])
    for parameter, gradient in problem.expected.items():
        problem.close(found.each[parameter], gradient, parameter)
        problem.close(found.sums[parameter], gradient.sum(0), f"sum of {parameter}")
    assert not found.norms[1]
    passes = problem.passes(coverage, 3)
    others = [0, 2, 3, 4]
    for name in ("ekfac", "kfac", "diagonal"):
        curvature, without = (
            fit(passes, cast("Any", name), indices, examples=FactorExamples(5, 5), labels=("true", "true"))
            for indices in (range(5), others)
        )
        for block, fitted in curvature.blocks.items():
            for key, value in fitted.tensors.items():
                if not key.endswith("basis"):  # unique only up to signs
                    torch.testing.assert_close(value, without.blocks[block].tensors[key], rtol=1e-6, atol=1e-12)


# --------------------------------------------------------------------------------------------------- what curvature


class Twin(nn.Module):
    """Multi-head self-attention written out, with its first projection as a layer of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        assert attention.in_proj_weight is not None
        self.projection = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)
        self.projection.weight = nn.Parameter(attention.in_proj_weight.detach().clone())
        self.projection.bias = nn.Parameter(attention.in_proj_bias.detach().clone())
        self.out = copy.deepcopy(attention.out_proj)
        self.read = Read()

    def forward(self, value: Tensor) -> Any:
        n, s, e = value.shape
        q, k, v = (part.view(n, s, self.heads, -1).transpose(1, 2) for part in self.projection(value).chunk(3, -1))
        weights = (q @ k.mT / (e // self.heads) ** 0.5).softmax(-1)
        return self.read(self.out((weights @ v).transpose(1, 2).reshape(n, s, e)))


class Spread(nn.Module):
    """What a transposed convolution does before it convolves: zeros between the pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, value: Tensor) -> Tensor:
        n, c, height, width = value.shape
        apart = value.new_zeros(n, c, (height - 1) * self.stride + 1, (width - 1) * self.stride + 1)
        apart[:, :, :: self.stride, :: self.stride] = value
        return apart


def as_convolution(layer: nn.ConvTranspose2d) -> nn.Sequential:
    """Return a model with a plain convolution for a model with a transposed one of one group."""
    kernel, pad = layer.kernel_size[0], layer.kernel_size[0] - 1 - int(layer.padding[0])
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, kernel, padding=pad).double()
    conv.weight = nn.Parameter(layer.weight.detach().transpose(0, 1).flip(2, 3).contiguous())
    assert layer.bias is not None
    conv.bias = nn.Parameter(layer.bias.detach().clone())
    return nn.Sequential(Spread(layer.stride[0]), conv, Read())


def factors(model: nn.Module, name: str, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the EK-FAC matrix `[K, O*I, O*I]` of a linear layer or convolution and its gradients `[K, N, O, I]`."""
    x, g = ref.layer_inputs_and_output_gradients(model, name, F.cross_entropy, inputs, targets)
    gradients = ref.per_example_gradients(model, F.cross_entropy, inputs, targets)
    layer = model.get_submodule(name)
    matrix = ref.gradient_matrix(layer, gradients[f"{name}.weight"], gradients.get(f"{name}.bias"))
    Q_A, Q_B = ref.eigenbasis(*ref.second_moments(x, g))
    return ref.ekfac_dense(Q_A, Q_B, ref.ekfac_eigenvalues(matrix, Q_A, Q_B)), matrix


def of_layer(name: str) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda module, inputs, targets: factors(module, name, inputs, targets)


def of_attention(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    attention = module.get_submodule("layer.attention")
    assert isinstance(attention, nn.MultiheadAttention)
    twin = Twin(attention)
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs), module(inputs))
    return factors(twin, "projection", inputs, targets)


def of_transposed(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    layer = module.get_submodule("layer")
    assert isinstance(layer, nn.ConvTranspose2d)
    twin = as_convolution(layer)
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs), module(inputs))
    return factors(twin, "1", inputs, targets)


def of_embedding(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    g = ref.embedding_output_gradients(module, "layer.0", F.cross_entropy, inputs, targets)
    gradients = ref.per_example_gradients(module, F.cross_entropy, inputs, targets)["layer.0.weight"]
    return ref.embedding_dense(gradients, g), gradients[None]


def of_vector(*names: str) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def joined(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        gradients = ref.per_example_gradients(module, F.cross_entropy, inputs, targets)
        vectors = ref.flatten_gradients(gradients, names)
        return ref.mean_outer_product(vectors)[None], vectors[None, :, None]

    return joined


def of_long_vector(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Longer than what has a dense curvature: the diagonal."""
    (vectors,) = ref.per_example_gradients(module, F.cross_entropy, inputs, targets).values()
    return torch.diag(vectors.square().mean(0))[None], vectors[None, :, None]


def of_long_table(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Like an embedding that looks up every row."""
    (gradients,) = ref.per_example_gradients(module, F.cross_entropy, inputs, targets).values()
    rows = gradients.flatten(1, 2)
    return ref.embedding_dense(rows, rows), rows[None]


# Case, the parameters of the block under test, and the reference's matrix and gradients.
CURVED: dict[str, tuple[Case, list[str], Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "linear": (Case(lambda: Reading(nn.Linear(4, 3)), numbers((3, 4), n=12)), ["layer.*"], of_layer("layer")),
    "conv1d": (Case(lambda: Reading(nn.Conv1d(4, 3, 2)), numbers((4, 7), n=12)), ["layer.*"], of_layer("layer")),
    "conv1d, groups": (
        Case(lambda: Reading(nn.Conv1d(4, 4, 2, groups=2)), numbers((4, 7), n=12)),
        ["layer.*"],
        of_layer("layer"),
    ),
    "conv3d": (
        Case(lambda: Reading(nn.Conv3d(2, 3, 2, padding=1, stride=2)), numbers((2, 3, 4, 3), n=12)),
        ["layer.*"],
        of_layer("layer"),
    ),
    "transposed convolution": (
        Case(lambda: Reading(nn.ConvTranspose2d(2, 3, 2)), numbers((2, 4, 3), n=12)),
        ["layer.*"],
        of_transposed,
    ),
    "transposed convolution, stride": (
        Case(lambda: Reading(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)), numbers((2, 3, 3), n=12)),
        ["layer.*"],
        of_transposed,
    ),
    "attention": (
        Case(lambda: Reading(MultiHead(need_weights=False)), numbers((3, 4), n=12)),
        ["layer.attention.in_proj_*"],
        of_attention,
    ),
    "attention, time first": (
        Case(lambda: Reading(MultiHead(need_weights=False, batch_first=False)), numbers((3, 4), n=12)),
        ["layer.attention.in_proj_*"],
        of_attention,
    ),
    "embedding": (
        Case(lambda: Reading(nn.Sequential(nn.Embedding(5, 4), nn.Tanh())), ids(3, size=5, n=12)),
        ["layer.0.weight"],
        of_embedding,
    ),
    "embedding, one id": (
        Case(lambda: Reading(nn.Sequential(nn.Embedding(5, 4), nn.Tanh())), ids(size=5, n=12)),
        ["layer.0.weight"],
        of_embedding,
    ),
    "norm": (
        Case(lambda: Reading(nn.LayerNorm(4)), numbers((3, 4), n=12)),
        ["layer.*"],
        of_vector("layer.weight", "layer.bias"),
    ),
    "norm, no bias": (
        Case(lambda: Reading(nn.LayerNorm(4, bias=False)), numbers((3, 4), n=12)),
        ["layer.*"],
        of_vector("layer.weight"),
    ),
    "long scale": (
        Case(lambda: Reading(Bare(lambda x, g: x.repeat(1, 275) * g, (1100,))), numbers((4,), n=12)),
        ["layer.a"],
        of_long_vector,
    ),
    "long learned positions": (
        Case(lambda: Reading(Bare(lambda x, p: x + p[:, :3], (1, 300, 4))), numbers((3, 4), n=12)),
        ["layer.a"],
        of_long_table,
    ),
    "norm of channels": (
        Case(lambda: Reading(nn.GroupNorm(2, 4)), numbers((4, 3), n=12)),
        ["layer.*"],
        of_vector("layer.weight", "layer.bias"),
    ),
}


def block_with(coverage: Coverage, names: Sequence[str]) -> ParameterBlock:
    """Return the block of these parameters, which has no others."""
    (block,) = (block for block in coverage.blocks.values() if block.parameters.keys() & set(names))
    assert block.parameters.keys() == set(names)
    return block


@pytest.mark.parametrize("name", CURVED)
def test_self_influence_with_ekfac(name: str) -> None:
    case, patterns, reference = CURVED[name]
    problem = Problem(case)
    n = len(problem.examples)
    inputs, targets = (torch.stack(parts) for parts in zip(*problem.examples, strict=True))
    C, gradients = reference(problem.module, inputs, targets)
    mean = float(C.diagonal(dim1=1, dim2=2).mean())
    expected = ref.quadratic_forms(C, gradients, 0.1 * mean)
    plain = gradients.square().sum((0, 2, 3))
    ratio = expected / plain
    assert ratio.max() > 1.05 * ratio.min(), "the identity gives one and the same ratio"

    coverage = problem.discover()
    names = matching(list(problem.expected), patterns)
    block = block_with(coverage, names)
    passes = problem.passes(coverage, 5)
    curvature = fit(passes, "ekfac", range(n), examples=FactorExamples(n, n), labels=("true", "true"))
    assert curvature.dampings[block.name] == pytest.approx(0.1 * mean, rel=1e-6)
    found: dict[str, Tensor] = {key: torch.zeros(n).double() for key in ("norms", "influence", "products")}
    vector = block.from_parameters(problem.vectors)
    with closing(passes.run(range(n))) as batches:
        for batch in batches:
            for io in batch.layers():
                if io.name == block.name:
                    parts = curvature.blocks[io.name].scores(io.x, io.gs[0], curvature.dampings[io.name], vector)
                    for key, part in zip(found, parts, strict=True):
                        assert part is not None
                        found[key][batch.indices] += part
    torch.testing.assert_close(found["norms"], plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["influence"], expected, rtol=1e-6, atol=0)
    products = sum((problem.expected[key] * problem.vectors[key]).flatten(1).sum(1) for key in names)
    torch.testing.assert_close(found["products"], products, rtol=1e-6, atol=1e-12)
    # A preconditioned gradient gives the same number once more: solving and scoring fit together.
    own = block.from_parameters({key: problem.expected[key][0] for key in names})
    solved = curvature.solve({block.name: own})[block.name]
    with closing(passes.run([0])) as batches:
        for batch in batches:
            (io,) = [io for io in batch.layers() if io.name == block.name]
            inner = per_sample.inner_products(io.x, io.gs[0], solved)
    torch.testing.assert_close(inner, expected[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", ["kfac", "diagonal", "identity"])
@pytest.mark.parametrize("name", ["embedding", "norm", "transposed convolution, stride"])
def test_self_influence_with_other_curvature(name: str, curvature: Any) -> None:
    """Every approximation takes every kind of block; the dense form of what was fitted gives the same numbers."""
    case, patterns, _ = CURVED[name]
    problem = Problem(case)
    n = len(problem.examples)
    coverage = problem.discover()
    block = block_with(coverage, matching(list(problem.expected), patterns))
    passes = problem.passes(coverage, 5)
    every = FactorExamples(n, n)
    fitted = fit(passes, curvature, range(n), examples=every, labels=("true", "true"), damping=0.01)
    rows = [block.from_parameters({key: problem.expected[key][i] for key in block.parameters}) for i in range(n)]
    gradients = torch.stack(rows, 1)
    C = fitted.blocks[block.name].to_dense().double()
    if curvature == "diagonal":
        squares = gradients.square().mean(1).flatten(1)
        torch.testing.assert_close(C, torch.diag_embed(squares), rtol=1e-6, atol=1e-12)
    expected = ref.quadratic_forms(C, gradients, 0.01)
    with closing(passes.run(range(n))) as batches:
        for batch in batches:
            (io,) = [io for io in batch.layers() if io.name == block.name]
            _, influence, _ = fitted.blocks[io.name].scores(io.x, io.gs[0], fitted.dampings[io.name])
            torch.testing.assert_close(influence, expected[batch.indices], rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", [None, 0])
def test_kfac_of_an_embedding(padding: int | None) -> None:
    """The one-hot side is diagonal: how often an id is looked up; padding never is."""
    embedding = nn.Embedding(5, 4, padding_idx=padding)
    problem = Problem(Case(lambda: Reading(nn.Sequential(embedding, nn.Tanh())), ids(3, size=5, n=12)))
    inputs, targets = (torch.stack(parts) for parts in zip(*problem.examples, strict=True))
    g = ref.embedding_output_gradients(problem.module, "layer.0", F.cross_entropy, inputs, targets)
    counts = torch.zeros(5).double()
    for n in range(12):
        for s in range(3):
            if inputs[n, s] == padding:
                g[n, s] = 0
            else:
                counts[inputs[n, s]] += 1
    C = torch.kron(torch.diag(counts / 36), ref.mean_outer_product(g.flatten(0, 1)) * 3)
    passes = problem.passes(problem.discover(), 5)
    fitted = fit(passes, "kfac", range(12), examples=FactorExamples(12, 12), labels=("true", "true"))
    (block,) = fitted.blocks.values()
    torch.testing.assert_close(block.to_dense()[0].double(), C, rtol=1e-6, atol=1e-12)


def test_tied_weights_have_one_block_with_both_uses() -> None:
    """Counted once: the squared norm of a sum is not the sum of squared norms."""
    problem = Problem(COVERED["tied: language model"])
    coverage = problem.discover()
    block = block_with(coverage, ["embedding.weight"])
    separate = Problem(COVERED["tied: not"])
    separate.module.load_state_dict(
        {
            **separate.module.state_dict(),
            **{name: value for name, value in problem.module.state_dict().items()},
            "output.bias": torch.zeros(6, dtype=torch.float64),
        }
    )
    halves = ref.gradients_alone(separate.module, next_token, [(value[None],) for (value,) in separate.examples])
    torch.testing.assert_close(
        problem.expected["embedding.weight"], halves["embedding.weight"] + halves["output.weight"]
    )
    apart = sum(halves[name].square().sum((1, 2)) for name in ("embedding.weight", "output.weight"))
    norms = torch.zeros(len(problem.examples)).double()
    with closing(problem.passes(coverage, 2).run(range(len(problem.examples)))) as batches:
        for batch in batches:
            for io in batch.layers():
                if io.name == block.name:
                    norms[batch.indices] += per_sample.squared_norms(io.x, io.gs[0])
    torch.testing.assert_close(norms, problem.expected["embedding.weight"].square().sum((1, 2)))
    assert ((norms - apart).abs() / norms).max() > 0.05


def test_a_plain_training_step_of_one_example() -> None:
    """The smallest data set there is."""
    problem = Problem(Case(lambda: Reading(nn.Linear(4, 3)), numbers((3, 4), n=1), classify))
    coverage = problem.discover()
    found = problem.run(coverage, 1)
    problem.close(found.each["layer.weight"], problem.expected["layer.weight"], "weight")


class _Sequences(nn.Module):
    """Layers that go over the same sequences, and a head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(2 * len(layers), 2)

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for layer in self.layers:
            if isinstance(layer, nn.GRUCell):
                state = x.new_zeros(len(x), 2)
                for step in x.unbind(1):
                    state = layer(step, state)
                ends.append(state)
            elif x.shape[1] % 2:
                packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), True, enforce_sorted=False)
                ends.append(nn.utils.rnn.pad_packed_sequence(layer(packed)[0], True)[0][:, -1, :2])
            else:
                ends.append(layer(x)[0][:, -1, :2])
        return self.head(torch.cat(ends, 1))


@pytest.mark.parametrize(("length", "left_out"), [(8, False), (9, True), (10, True)])
def test_recurrent_layers_of_very_many_steps_are_covered_on_request(
    length: int, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,024 steps, every pass took as long as 15 of training."""
    monkeypatch.setattr(coverage, "_MOST_STEPS_UNASKED", 16)
    model = _Sequences(nn.LSTM(1, 2, 2, batch_first=True), nn.GRU(1, 2, batch_first=True), nn.GRUCell(1, 2))
    data = torch.utils.data.TensorDataset(torch.randn(4, length, 1), torch.tensor([0, 1, 1, 0]))

    def task(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    def covered(**arguments: Any) -> tuple[set[str], dict[str, str]]:
        found = discover(model, task, ExampleSource(data, batch_size=2), **arguments)
        names = {name for block in found.blocks.values() for name in block.parameters}
        return {name.removeprefix("layers.").split(".")[0] for name in names}, found.uncovered

    names, reasons = covered()
    assert names == {"1", "2", "head"} | (set() if left_out else {"0"})  # two layers
    assert len(reasons) == (8 if left_out else 0)
    for reason in reasons.values():
        assert f"runs in {2 * length:,} steps" in reason
        assert "`layers=` that name it cover it" in reason
    assert covered(uncovered="exact")[0] == {"0", "1", "2", "head"}
    assert covered(layers=["layers.0", "head"])[0] == {"0", "head"}
    model.head.requires_grad_(False)
    model.layers[1:].requires_grad_(False)
    assert covered()[0] == {"0"}  # else there would be nothing
