"""Curvature blocks and the scores made with them, against dense matrices; and where each approximation is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tracing import covered

from lightning_influence.curvature import (
    BLOCKS,
    Curvature,
    CurvatureBlock,
    EKFACBlock,
    FactorExamples,
    IdentityBlock,
    KFACBlock,
    KroneckerBlock,
    fit,
)
from lightning_influence.curvature.blocks import eigenvectors as decomposed
from lightning_influence.curvature.choices import choose_labels, factor_examples, random_subset
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import Rows
from lightning_influence.objective.task import TaskError
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import mean_gradient

EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-12}
N, CLASSES = 13, 3
EVERY = FactorExamples(10**9, 10**9)
LossFunction = Callable[[Tensor, Tensor], Tensor]


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ELU(), nn.Linear(4, CLASSES))
    return net, torch.randn(N, 4)


def tokens() -> tuple[nn.Module, Tensor]:
    """Positions that share the weights, their mean taken in the middle."""

    class Mean(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value.mean(1)

    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), Mean(), nn.Linear(5, CLASSES))
    return net, torch.randn(N, 3, 4)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )
    for name, buffer in net.named_buffers():
        if name.endswith("mean"):
            buffer.normal_()
        elif name.endswith("var"):
            buffer.uniform_(0.5, 2)
    return net, torch.randn(N, 2, 6, 6)


class Words(nn.Module):
    """A look-up, a bare parameter, norms, and a head that may be the table of the look-up."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES if tied else 6, 4)
        self.place = nn.Parameter(torch.randn(3, 4))
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)
        self.slope = nn.PReLU(4)
        self.head = nn.Linear(4, CLASSES)
        self.tied = tied
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.words(ids) + self.place)
        # The head at every position if it is tied, else at one.
        hidden = torch.tanh(self.inner(hidden))
        hidden = hidden if self.tied else self.slope(hidden.mean(1))
        logits: Tensor = self.head(hidden)
        return logits.mean(1) if self.tied else logits


def words() -> tuple[nn.Module, Tensor]:
    return Words(False), torch.randint(6, (N, 3))


def tied() -> tuple[nn.Module, Tensor]:
    net = Words(True)
    del net.slope
    return net, torch.randint(CLASSES, (N, 3))


NETS = {"mlp": mlp, "tokens": tokens, "cnn": cnn, "words": words, "tied": tied}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def of_class(c: int) -> LossFunction:
    """Return a loss whose gradient is class `c`'s part of the Fisher's square root."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.softmax(1)[0, c].detach().sqrt() * -outputs.log_softmax(1)[0, c]

    return loss


def squared_lengths(probabilities: Tensor) -> Tensor:
    """Squared lengths of `p - onehot(c)` for every class, `[n, c]`."""
    return (probabilities.unsqueeze(1) - torch.eye(probabilities.shape[1]).to(probabilities)).square().sum(2)


def of_drawn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of labels drawn by their part of the curvature, weighted back."""
    probabilities = outputs.softmax(1).detach()
    lengths = squared_lengths(probabilities)
    weights = (probabilities * lengths).sum(1) / lengths.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (weights.sqrt() * F.cross_entropy(outputs, targets, reduction="none")).mean()


class Problem:
    """A float64 net with data, its passes, and the reference's view of the same."""

    def __init__(self, net: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        module, inputs = NETS[net]()
        self.net = module.double().eval()
        self.inputs = inputs.double() if inputs.is_floating_point() else inputs
        self.targets = torch.randint(0, CLASSES, (N,))
        self.gradients = passes(self.net, self.inputs, self.targets)
        assert self.gradients.coverage.share == 1.0
        self.layers = list(self.gradients.coverage.blocks)
        self._known: dict[tuple[str, int], list[dict[str, Tensor]]] = {}

    def fit(self, name: Any, labels: Any = "true", **options: Any) -> Curvature:
        both: Any = (labels, labels) if isinstance(labels, str) else labels
        return fit(self.gradients, name, range(N), examples=EVERY, labels=both, **options)

    def draws(self, labels: str, draw: int = 1) -> list[tuple[LossFunction, Tensor]]:
        """Return losses and targets whose gradients' outer products add up to the curvature."""
        if labels == "exact":
            return [(of_class(c), self.targets) for c in range(CLASSES)]
        return [(cross_entropy, self.targets) if labels == "true" else (of_drawn, self.sampled(draw))]

    def sampled(self, draw: int) -> Tensor:
        """Read the sampled labels off the bias of the head, whose gradient is a multiple of `p - onehot(label)`."""
        labels = []
        *_, head = (name for name, _ in self.net.named_parameters() if name.endswith("bias"))
        with closing(self.gradients.run(range(N), "sampled", draw=draw)) as batches:
            for batch in batches:
                for io in batch.layers():
                    block = self.gradients.coverage.blocks[io.name]
                    if head in block.parameters:
                        formed = torch.cat(list(per_sample.gradients(io.x, io.gs[0])), 1).transpose(0, 1)
                        labels.append(block.to_parameters(formed)[head].abs().argmax(1))
        return torch.cat(labels)

    def rows(self, layer: str) -> tuple[Tensor, Rows]:
        """Return activations and output gradients of all examples, from the reference where it has them."""
        if self.kind(layer) == "matrix":
            return ref.layer_inputs_and_output_gradients(self.net, layer, cross_entropy, self.inputs, self.targets)
        with closing(self.gradients.run(range(N), whole=True)) as batches:
            (io,) = (io for io in next(batches).layers() if io.name == layer)
            return io.x, io.gs[0]

    def kind(self, layer: str) -> str:
        """Tell what a block is: a matrix, the table of a look-up, one that is the head, too, or a vector."""
        try:
            module = self.net.get_submodule(layer)
        except AttributeError:
            return "vector"
        if isinstance(module, nn.Embedding):
            return "tied" if getattr(self.net, "tied", False) else "table"
        return "matrix" if isinstance(module, (nn.Linear, nn.Conv2d)) else "vector"

    def matrix(self, layer: str, gradients: dict[str, Tensor]) -> Tensor:
        """Lay gradients `{name: [N, *shape]}` out as the block `[K, N, O, I]`."""
        if self.kind(layer) == "matrix":
            return matrix(self.net, layer, gradients)
        if self.kind(layer) == "vector":
            names = self.gradients.coverage.blocks[layer].parameters
            return torch.cat([gradients[name].flatten(1) for name in names], 1)[None, :, None]
        parts = [gradients["words.weight"]]
        if self.kind(layer) == "tied":
            parts.append(gradients["head.bias"][..., None])
        return torch.cat(parts, -1)[None]

    def cut(self, whole: Tensor, layer: str) -> Tensor:
        """Cut the block `[K, O*I, O*I]` out of a matrix over all parameters."""
        sizes = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        places = torch.arange(len(whole)).split([p.numel() for p in sizes.values()])
        index = self.matrix(
            layer, {name: place.view(1, *p.shape) for (name, p), place in zip(sizes.items(), places, strict=True)}
        )
        return torch.stack([whole[rows.reshape(-1)][:, rows.reshape(-1)] for rows in index])

    def per_example(self, layer: str, labels: str = "true", draw: int = 1) -> list[Tensor]:
        """Return one `[K, N, O, I]` for every draw."""
        if (labels, draw) not in self._known:
            self._known[labels, draw] = [
                ref.per_example_gradients(self.net, loss, self.inputs, targets)
                for loss, targets in self.draws(labels, draw)
            ]
        return [self.matrix(layer, gradients) for gradients in self._known[labels, draw]]

    def factors(self, layer: str, labels: str) -> list[tuple[Tensor, Tensor]]:
        """Return the two K-FAC factors, for every kind of use that the block has."""
        kind = self.kind(layer)
        if kind == "vector":
            outer = [ref.mean_outer_product(g[0, :, 0]) for g in self.per_example(layer, labels)]
            return [(torch.stack(outer).sum(0)[None], torch.ones(1, 1, 1).double())]
        found = []
        if kind != "matrix":
            found.append(self.factors_of_the_table(labels, kind == "tied"))
        if kind != "table":
            moments = [
                ref.second_moments(
                    *ref.layer_inputs_and_output_gradients(
                        self.net, "head" if kind == "tied" else layer, loss, self.inputs, targets
                    )
                )
                for loss, targets in self.draws(labels)
            ]
            found.append((moments[0][0], torch.stack([b for _, b in moments]).sum(0)))
        return found

    def factors_of_the_table(self, labels: str, bias: bool) -> tuple[Tensor, Tensor]:
        """Of a linear layer on one-hot rows, whose activations are the gradients of what was looked up."""
        looked_up = torch.zeros(4, 4).double()
        for loss, targets in self.draws(labels):
            for rows in ref.embedding_output_gradients(self.net, "words", loss, self.inputs, targets):
                looked_up += rows.T @ rows / N
        counts = F.one_hot(self.inputs).double().mean((0, 1))
        return F.pad(looked_up, (0, 1, 0, 1) if bias else (0, 0))[None], torch.diag(counts)[None]

    def dense(self, name: str, layer: str, block: CurvatureBlock, labels: tuple[str, str]) -> Tensor:
        """Return the block `[K, O*I, O*I]` that the reference makes of it."""
        k, o, i = block.shape
        if name == "identity":
            return torch.eye(o * i).double().expand(k, -1, -1)
        if name == "diagonal":
            squares = torch.stack([g.square().mean(1) for g in self.per_example(layer, labels[1], 1)]).sum(0)
            return torch.diag_embed(squares.flatten(1))
        if name == "block_ggn":
            rows = [g.flatten(2) for g in self.per_example(layer, labels[1], 1)]
            return torch.stack([g.transpose(1, 2) @ g / N for g in rows]).sum(0)
        assert isinstance(block, KroneckerBlock)
        if name == "kfac":
            factors = self.factors(layer, labels[0])
            total = torch.stack([ref.kfac_dense(A, B) for A, B in factors]).sum(0)
            if len(factors) == 1:
                return total
            # A sum of products has no Kronecker basis of its own: its diagonal in the block's.
            basis = kronecker(block)
            diagonal = (basis.mT @ total @ basis).diagonal(dim1=1, dim2=2)
            return basis @ torch.diag_embed(diagonal) @ basis.mT
        return ref.ekfac_dense(*bases(block), self.eigenvalues(layer, block, labels[1], 2))

    def eigenvalues(self, layer: str, block: KroneckerBlock, labels: str, draw: int) -> Tensor:
        """Return the EK-FAC eigenvalues in the block's own basis (it is not unique)."""
        gradients = self.per_example(layer, labels, draw)
        return torch.stack([ref.ekfac_eigenvalues(g, *bases(block)) for g in gradients]).sum(0)


def bases(block: KroneckerBlock) -> tuple[Tensor, Tensor]:
    """Return both bases, the identity written out."""
    k, o, i = block.shape
    of_x, of_g = block.basis
    eye_x, eye_g = (torch.eye(size).double().repeat(k, 1, 1) for size in (i, o))
    return eye_x if of_x is None else of_x.contiguous(), eye_g if of_g is None else of_g.contiguous()


def kronecker(block: KroneckerBlock) -> Tensor:
    return torch.stack([torch.kron(b, a) for a, b in zip(*bases(block), strict=True)])


def passes(
    net: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: LossFunction = cross_entropy,
    *,
    batch_size: int = 5,
    layers: Sequence[str] | None = None,
    coverage: Coverage | None = None,
) -> ExampleGradients:
    source = ExampleSource(TensorDataset(inputs, targets), batch_size=batch_size)

    def task(module: Any, batch: Any) -> Tensor:
        return loss(module(batch[0]), batch[1])

    if coverage is None:
        coverage = discover(net, task, source, layers=layers)
    return ExampleGradients(net, task, source, coverage)


def matrix(net: nn.Module, layer: str, gradients: dict[str, Tensor]) -> Tensor:
    prefix = f"{layer}." if layer else ""
    return ref.gradient_matrix(net.get_submodule(layer), gradients[f"{prefix}weight"], gradients.get(f"{prefix}bias"))


def far_from_a_multiple_of_the_identity(C: Tensor) -> bool:
    mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return bool((C - mean * torch.eye(C.shape[-1]).double()).norm() > 0.3 * C.norm())


@pytest.fixture(params=NETS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


class TestAgainstTheReference:
    @pytest.mark.parametrize("labels", ["true", "exact", "sampled"])
    def test_factors(self, problem: Problem, labels: str) -> None:
        """The sampled ones are those of the loss with the labels that were drawn."""
        blocks = problem.fit("ekfac", labels).blocks
        assert list(blocks) == problem.layers
        for layer, block in blocks.items():
            assert isinstance(block, EKFACBlock)
            factors = problem.factors(layer, labels)
            A, B = factors[0]
            if len(factors) > 1:
                # Two uses: each factor in proportion to the size of the other.
                A = torch.stack([b.diagonal(dim1=1, dim2=2).sum() * a for a, b in factors]).sum(0)
                B = torch.stack([a.diagonal(dim1=1, dim2=2).sum() * b for a, b in factors]).sum(0)
            of_x, of_g = block.basis
            # One-hot rows keep the identity, and only the diagonal.
            assert (of_g is None) == (problem.kind(layer) in ("table", "tied"))
            for factor, basis in ((A, of_x), (B, of_g)):
                if basis is None:
                    continue
                assert factor.shape[-1] < 4 or far_from_a_multiple_of_the_identity(factor)
                assert basis.shape == factor.shape
                eye = torch.eye(basis.shape[-1]).double().expand_as(basis)
                torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
                rotated = basis.mT @ factor @ basis
                diagonal = torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
                torch.testing.assert_close(rotated, diagonal, rtol=0, atol=1e-9 * float(factor.norm()))

    @pytest.mark.parametrize("labels", [("true", "true"), ("exact", "exact"), ("sampled", "exact")], ids="-".join)
    @pytest.mark.parametrize("name", BLOCKS)
    def test_block_and_self_influence(self, problem: Problem, name: str, labels: tuple[str, str]) -> None:
        curvature = problem.fit(name, labels)
        total = torch.zeros(N).double()
        for layer, block in curvature.blocks.items():
            C = problem.dense(name, layer, block, labels)
            k, o, i = block.shape
            assert name == "identity" or far_from_a_multiple_of_the_identity(C)
            # The identity has seen no data that would tell it a dtype.
            torch.testing.assert_close(block.to_dense().double(), C, **EXACT)
            torch.testing.assert_close(block.diagonal().flatten(1).double(), C.diagonal(dim1=1, dim2=2), **EXACT)
            if isinstance(block, KroneckerBlock):
                assert block.eigenvalues.min() >= 0
                spectrum = torch.linalg.eigvalsh(C)
                found = block.eigenvalues.flatten(1).sort().values
                torch.testing.assert_close(found, spectrum, rtol=1e-6, atol=1e-12 * float(spectrum.max()))

            damping = curvature.dampings[layer]
            mean = float(C.diagonal(dim1=1, dim2=2).mean())
            if name == "block_ggn":
                mean = float(C.square().sum() / C.diagonal(dim1=1, dim2=2).sum())  # weighted with itself
            assert damping == pytest.approx(0.0 if name == "identity" else 0.1 * mean, rel=1e-9)
            damping = damping or 0.3

            v = torch.randn(2, 2, k, o, i).double()
            flat = v.flatten(-2).unsqueeze(-1)
            torch.testing.assert_close(block.matvec(v), (C @ flat).reshape(v.shape), **EXACT)
            solution = torch.linalg.solve(C + damping * torch.eye(o * i).double(), flat).reshape(v.shape)
            torch.testing.assert_close(block.solve(v, damping), solution, **EXACT)

            (G,) = problem.per_example(layer)
            x, g = problem.rows(layer)
            expected = ref.quadratic_forms(C, G, damping)
            torch.testing.assert_close(block.self_influence(x, g, damping), expected, **EXACT)
            swept = torch.stack([ref.quadratic_forms(C, G, factor * damping) for factor in (0.1, 1.0, 20.0)], 1)
            found = block.self_influences(x, g, [0.1 * damping, damping, 20.0 * damping])
            torch.testing.assert_close(found, swept, **EXACT)
            total += ref.quadratic_forms(C, G, curvature.dampings[layer])
        scores = score_examples(problem.gradients, range(N), curvature=curvature).columns
        torch.testing.assert_close(scores["self_influence"], total, **EXACT)
        squares = [problem.per_example(layer)[0].square().sum((0, 2, 3)) for layer in problem.layers]
        norms = torch.stack(squares).sum(0)
        torch.testing.assert_close(scores["grad_norm_squared"], norms, **EXACT)
        if name != "identity":
            ratio = scores["self_influence"] / norms
            assert ratio.max() > 1.2 * ratio.min(), "the identity gives one and the same ratio"

    @pytest.mark.parametrize("name", BLOCKS)
    def test_harm(self, problem: Problem, name: str) -> None:
        """Minus the influence on the mean loss of the queries; of a query on itself it is minus self-influence."""
        curvature = problem.fit(name, "exact")
        queries = [1, 4, 5, 9]
        mean = mean_gradient(problem.gradients, queries)
        query = curvature.solve(mean)
        expected = torch.zeros(N).double()
        for layer, block in curvature.blocks.items():
            (G,) = problem.per_example(layer)
            torch.testing.assert_close(mean[layer], G[:, queries].mean(1), **EXACT)
            C = problem.dense(name, layer, block, ("exact", "exact"))
            expected -= ref.bilinear_forms(C, G[:, queries], G, curvature.dampings[layer]).mean(0)
        scores = score_examples(problem.gradients, range(N), curvature=curvature, query=query).columns
        torch.testing.assert_close(scores["harm"], expected, **EXACT)

        own = curvature.solve(mean_gradient(problem.gradients, [3]))
        scores = score_examples(problem.gradients, [3], curvature=curvature, query=own).columns
        torch.testing.assert_close(scores["harm"], -scores["self_influence"], **EXACT)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_absolute_damping(self, problem: Problem, name: str) -> None:
        """One number for all blocks, in every score alike."""
        curvature = problem.fit(name, "exact", damping=0.7)
        assert set(curvature.dampings.values()) == {0.7}
        expected = torch.zeros(N).double()
        for layer, block in curvature.blocks.items():
            C = problem.dense(name, layer, block, ("exact", "exact"))
            expected += ref.quadratic_forms(C, problem.per_example(layer)[0], 0.7)
        query = curvature.solve(mean_gradient(problem.gradients, [3]))
        scores = score_examples(problem.gradients, range(N), curvature=curvature, query=query).columns
        torch.testing.assert_close(scores["self_influence"], expected, **EXACT)
        torch.testing.assert_close(-scores["harm"][3], expected[3], **EXACT)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_float32(self, name: Any) -> None:
        problem = Problem("cnn")
        expected = score_examples(problem.gradients, range(N), curvature=problem.fit(name, "exact"))
        net = problem.net.float()
        gradients = passes(net, problem.inputs.float(), problem.targets)
        curvature = fit(gradients, name, range(N), examples=EVERY, labels=("exact", "exact"))
        found = score_examples(gradients, range(N), curvature=curvature)
        for block in curvature.blocks.values():
            assert all(tensor.dtype == torch.float32 for tensor in block.tensors.values())
            assert block.to_dense().dtype == torch.float32
        torch.testing.assert_close(
            found.columns["self_influence"], expected.columns["self_influence"], rtol=2e-4, atol=0
        )


class TestWhereTheApproximationIsExact:
    """Where the assumption behind it holds, an approximation must equal what it approximates, not resemble it."""

    def linear(self, *sizes: int) -> tuple[nn.Sequential, Tensor, Tensor]:
        net = nn.Sequential(
            *(nn.Linear(a, b, bias=k != 1) for k, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)))
        )
        return net.double(), torch.randn(N, sizes[0]).double(), torch.randn(N, sizes[-1]).double()

    @pytest.mark.parametrize("name", ["kfac", "ekfac"])
    @pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (3, 4, 5, 2)], ids=str)
    def test_linear_nets_with_squared_error(self, name: Any, sizes: tuple[int, ...]) -> None:
        """The output gradients of the GGN don't depend on the example: `G = B ⊗ A` (Bernacchia et al. 2018)."""
        net, inputs, targets = self.linear(*sizes)
        gradients = passes(net, inputs, targets, F.mse_loss)
        curvature = fit(gradients, name, range(N), examples=EVERY, labels=("exact", "exact"))
        # `F.mse_loss` also takes the mean over the outputs.
        ggn = ref.ggn_dense(net, inputs, "mse") / sizes[-1]
        for layer, block in curvature.blocks.items():
            expected = ref.layer_blocks(ggn, net, layer)
            assert far_from_a_multiple_of_the_identity(expected)
            torch.testing.assert_close(block.to_dense(), expected, rtol=1e-9, atol=1e-12)

    def test_kfac_of_nonlinear_nets_is_not(self) -> None:
        """The equality above says something: with a nonlinearity in between it is off by tens of percent."""
        problem = Problem("mlp")
        fisher = ref.layer_blocks(ref.exact_fisher(problem.net, problem.inputs, CLASSES), problem.net, "0")
        C = problem.fit("kfac", "exact").blocks["0"].to_dense()
        assert 0.1 < (C - fisher).norm() / fisher.norm() < 0.9

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_one_gradient(self, name: Any) -> None:
        """Of a single example the curvature is `g gᵀ`; both Kronecker forms hold that exactly."""
        problem = Problem("mlp")
        curvature = fit(problem.gradients, name, [7], examples=EVERY, labels=("true", "true"))
        for layer, block in curvature.blocks.items():
            g = problem.per_example(layer)[0][:, 7].flatten(1)
            outer = g[:, :, None] * g[:, None, :]
            expected = torch.diag_embed(g.square()) if name == "diagonal" else outer
            torch.testing.assert_close(block.to_dense(), expected, rtol=1e-9, atol=1e-12 * float(outer.max()))
            # One direction of curvature |g|²: the self-influence is |g|²/(|g|² + λ), λ = 0.1 |g|²/P.
            if name != "diagonal":
                x, grad = problem.rows(layer)
                found = block.self_influence(x, grad, block.damping())[7]
                assert float(found) == pytest.approx(1 / (1 + 0.1 / g.numel()), rel=1e-9)

    @pytest.mark.parametrize("labels", ["exact", ("sampled", "exact")])
    def test_ekfac_diagonal_in_its_basis(self, problem: Problem, labels: Any) -> None:
        """Whatever the basis, the diagonal of the Fisher in it is exact, so no diagonal is closer to the Fisher.

        Vectors (of norms, and bare parameters) have the Fisher itself, where both passes use the same labels.
        """
        fisher = ref.exact_fisher(problem.net, problem.inputs, CLASSES)
        ekfac, kfac = problem.fit("ekfac", labels), problem.fit("kfac", labels)
        ratios = []
        for layer, block in ekfac.blocks.items():
            assert isinstance(block, EKFACBlock)
            exact, basis = problem.cut(fisher, layer), kronecker(block)
            diagonal = (basis.mT @ exact @ basis).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(block.eigenvalues.flatten(1), diagonal, **EXACT)
            errors = [float((b.to_dense() - exact).norm()) for b in (block, kfac.blocks[layer])]
            if labels == "exact" and problem.kind(layer) == "vector":
                assert max(errors) < 1e-12 * float(exact.norm())
            else:
                ratios.append(errors[0] / errors[1])
        assert max(ratios) <= 1
        assert min(ratios) < 0.9

    def test_diagonal(self, problem: Problem) -> None:
        fisher = ref.exact_fisher(problem.net, problem.inputs, CLASSES)
        for layer, block in problem.fit("diagonal", "exact").blocks.items():
            exact = problem.cut(fisher, layer).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(block.diagonal().flatten(1), exact, **EXACT)

    @pytest.mark.parametrize("kind", ["cross_entropy", "bce", "mse"])
    def test_exact_labels_give_the_ggn(self, kind: Any) -> None:
        """For all three losses, whose batch loss is the mean over examples (and outputs, for the last two)."""
        problem = Problem("tokens")
        kinds: dict[str, tuple[Any, Tensor, int]] = {
            "cross_entropy": (F.cross_entropy, problem.targets, 1),
            "bce": (F.binary_cross_entropy_with_logits, torch.rand(N, CLASSES).double(), CLASSES),
            "mse": (F.mse_loss, torch.randn(N, CLASSES).double(), CLASSES),
        }
        loss, targets, outputs = kinds[kind]
        ggn = ref.ggn_dense(problem.net, problem.inputs, kind) / outputs
        gradients = passes(problem.net, problem.inputs, targets, loss)
        curvature = fit(gradients, "diagonal", range(N), examples=EVERY, labels=("exact", "exact"))
        for layer, block in curvature.blocks.items():
            exact = ref.layer_blocks(ggn, problem.net, layer).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(block.diagonal().flatten(1), exact, **EXACT)

    def test_eigenvalues_from_the_gradients_of_all_classes(self, problem: Problem) -> None:
        per_class = ref.class_gradients(problem.net, problem.inputs, CLASSES)
        for layer, block in problem.fit("ekfac", ("sampled", "exact")).blocks.items():
            assert isinstance(block, EKFACBlock)
            per_layer = [
                problem.matrix(layer, {name: value[:, c] for name, value in per_class.items()}) for c in range(CLASSES)
            ]
            expected = torch.stack([ref.ekfac_eigenvalues(G, *bases(block)) for G in per_layer]).sum(0)
            torch.testing.assert_close(block.eigenvalues, expected, **EXACT)


class TestEigenvectors:
    def test_rows_of_zeros_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pixels that are always black: 3 of 8 here, so that 5 rows are decomposed."""
        rows = torch.randn(2, 30, 8).double()
        rows[..., [1, 4, 7]] = 0
        moments = rows.transpose(1, 2) @ rows
        sizes: list[int] = []
        whole = decomposed.eigendecomposition

        def noted(matrices: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(matrices.shape[-1])
            return whole(matrices)

        monkeypatch.setattr(decomposed, "eigendecomposition", noted)
        found, vectors = decomposed.eigenvectors(moments)
        assert sizes == [5]
        torch.testing.assert_close(vectors.transpose(1, 2) @ vectors, torch.eye(8).double().expand(2, 8, 8), **EXACT)
        inside = vectors.transpose(1, 2) @ moments @ vectors
        values = inside.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-10)
        torch.testing.assert_close(values, whole(moments)[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(found, values, rtol=0, atol=1e-10)

    def test_nothing_but_zeros(self) -> None:
        values, vectors = decomposed.eigenvectors(torch.zeros(1, 3, 3))
        assert torch.equal(values, torch.zeros(1, 3))
        assert torch.equal(vectors, torch.eye(3).unsqueeze(0))


class TestSampledLabels:
    @pytest.mark.parametrize("kind", ["cross_entropy", "bce", "mse"])
    def test_mean_over_draws_is_the_exact_expectation(self, kind: str) -> None:
        """Unbiased, and the error falls with the square root of the draws: 320 times as many, 18 times less."""
        problem = Problem("tokens")
        kinds: dict[str, tuple[Any, Tensor]] = {
            "cross_entropy": (F.cross_entropy, problem.targets),
            "bce": (F.binary_cross_entropy_with_logits, torch.rand(N, CLASSES).double()),
            "mse": (F.mse_loss, torch.randn(N, CLASSES).double()),
        }
        loss, targets = kinds[kind]
        gradients = passes(problem.net, problem.inputs, targets, loss, batch_size=N)
        exact = self.squares(gradients, "exact", 0)
        assert list(exact) == problem.layers
        draws = [self.squares(gradients, "sampled", draw) for draw in range(320)]
        for layer, expected in exact.items():
            found = torch.stack([draw[layer] for draw in draws])
            single = (found - expected).flatten(1).norm(dim=1).square().mean().sqrt() / expected.norm()
            together = (found.mean(0) - expected).norm() / expected.norm()
            assert together < 0.04, layer
            assert single > 0.1, layer
            # Of a bias, nothing would average out; the root of the mean square of one draw is known well.
            assert 0.5 < together / (single / 320**0.5) < 1.7, layer

    def squares(self, gradients: ExampleGradients, labels: Any, draw: int) -> dict[str, Tensor]:
        with closing(gradients.run(range(N), labels, draw=draw)) as batches:
            return {io.name: per_sample.rotated_squares(io.xs, io.gs, None, None) for io in next(batches).layers()}

    def test_labels_follow_the_model(self) -> None:
        """Frequencies of the drawn labels against each class's part of the loss Hessian's trace, for every example."""
        problem = Problem("mlp")
        problem.gradients = passes(problem.net, problem.inputs, problem.targets, batch_size=N)
        with torch.no_grad():
            problem.net.get_parameter("4.weight").mul_(4)
        draws = F.one_hot(torch.stack([problem.sampled(draw) for draw in range(400)]), CLASSES).double().mean(0)
        predicted = problem.net(problem.inputs).softmax(1).detach()
        probabilities = predicted * squared_lengths(predicted)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
        # 39 means of 400: none should be off by four standard deviations; labels of the model itself would be.
        limits = 4 * (probabilities * (1 - probabilities) / 400).sqrt()
        assert ((draws - probabilities).abs() < limits).all()
        assert ((draws - predicted).abs() > limits).any()

    def test_seed_and_draw(self) -> None:
        problem = Problem("mlp")
        labels = {draw: problem.sampled(draw).tolist() for draw in range(4)}
        assert labels[1] == problem.sampled(1).tolist()
        assert len({tuple(value) for value in labels.values()}) == 4
        problem.gradients.seed = 1
        assert problem.sampled(1).tolist() not in labels.values()

    def test_eigenvalues_come_from_a_fresh_draw(self, problem: Problem) -> None:
        """Reused labels would be those of draw 1 again."""
        for layer, block in problem.fit("ekfac", "sampled").blocks.items():
            assert isinstance(block, EKFACBlock)
            fresh, reused = (problem.eigenvalues(layer, block, "sampled", draw) for draw in (2, 1))
            torch.testing.assert_close(block.eigenvalues, fresh, **EXACT)
            assert (block.eigenvalues - reused).norm() > 0.01 * reused.norm()

    def test_fresh_draw_is_unbiased(self) -> None:
        """A reused draw overrates the directions that the eigenvectors took from it, here by a fifth."""
        problem = Problem("mlp")
        problem.gradients = passes(problem.net, problem.inputs, problem.targets, batch_size=N)
        ratios: dict[str, list[Tensor]] = {"fresh": [], "reused": []}
        for seed in range(80):
            problem.gradients.seed = seed
            block = problem.fit("ekfac", "sampled").blocks["4"]
            assert isinstance(block, EKFACBlock)
            exact = self.top(problem, block, "exact", 0)
            ratios["fresh"].append(block.eigenvalues[0, -1].sum() / exact)
            ratios["reused"].append(self.top(problem, block, "sampled", 1) / exact)
        fresh, reused = (float(torch.stack(values).mean()) for values in ratios.values())
        assert abs(fresh - 1) < 0.06
        assert reused > 1.15

    def top(self, problem: Problem, block: KroneckerBlock, labels: Any, draw: int) -> Tensor:
        """Return the curvature along the leading eigenvector of the output gradients."""
        with closing(problem.gradients.run(range(N), labels, draw=draw)) as batches:
            *_, io = next(batches).layers()
            assert io.name == "4"
            return per_sample.rotated_squares(io.xs, io.gs, *block.basis)[0, -1].sum() / N

    def test_loss_without_known_labels(self) -> None:
        problem = Problem("mlp")
        gradients = passes(problem.net, problem.inputs, problem.targets, lambda o, t: (o.exp().sum(1) - o[:, 0]).mean())
        for labels in ("sampled", "exact"):
            with pytest.raises(TaskError, match=r"labels can't be sampled .* `fisher=\"empirical\"`"):
                fit(gradients, "kfac", range(N), examples=EVERY, labels=(labels, labels))
        assert fit(gradients, "kfac", range(N), examples=EVERY, labels=("true", "true")).labels == ("true",)

    def test_exact_labels_without_a_closed_form(self) -> None:
        net = nn.Linear(4, CLASSES).double()
        gradients = passes(net, torch.randn(N, 2, 4).double(), torch.zeros(N, 2).long(), self.per_token)
        with pytest.raises(TaskError, match=r"no closed form .* `fisher=\"sampled\"`"):
            fit(gradients, "kfac", range(N), examples=EVERY, labels=("exact", "exact"))

    def per_token(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class TestDamping:
    def collinear(self) -> ExampleGradients:
        """Two inputs are multiples of others: curvature is zero along some directions, up to rounding."""
        inputs = torch.randn(30, 3).double()
        inputs = torch.cat([inputs, inputs @ torch.randn(3, 2).double()], 1)
        return passes(nn.Linear(5, CLASSES).double(), inputs, torch.arange(30) % CLASSES)

    def undamped(self, gradients: ExampleGradients, name: Any) -> Tensor:
        curvature = fit(gradients, name, range(30), examples=EVERY, labels=("exact", "exact"), damping=0.0)
        return score_examples(gradients, range(30), curvature=curvature).columns["self_influence"]

    @pytest.mark.parametrize("name", ["kfac", "ekfac"])
    def test_singular_without_damping(self, name: Any) -> None:
        """Rounding leaves eigenvalues of 1e-33; divided by, they make up most of the score."""
        gradients = self.collinear()
        with pytest.raises(ValueError, match=r"damping 0\.0 leaves the curvature singular .* pass a damping > 0"):
            self.undamped(gradients, name)

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_constant_zero_input(self, name: Any) -> None:
        inputs = torch.cat([torch.randn(30, 3), torch.zeros(30, 1)], 1).double()
        gradients = passes(nn.Linear(4, CLASSES).double(), inputs, torch.arange(30) % CLASSES)
        with pytest.raises(ValueError, match=r"damping 0\.0 leaves the curvature singular"):
            self.undamped(gradients, name)

    def test_regular_without_damping(self) -> None:
        """Squared errors of one linear layer: the curvature has full rank, and no damping is needed."""
        net, inputs, targets = nn.Linear(3, 2).double(), torch.randn(30, 3).double(), torch.randn(30, 2).double()
        gradients = passes(net, inputs, targets, F.mse_loss)
        C = ref.layer_blocks(ref.ggn_dense(net, inputs, "mse") / 2, net, "")
        G = matrix(net, "", ref.per_example_gradients(net, F.mse_loss, inputs, targets))
        for name in ("kfac", "ekfac"):
            scores = self.undamped(gradients, name)
            torch.testing.assert_close(scores, ref.quadratic_forms(C, G, 0.0), **EXACT)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_impossible_damping(self, name: Any) -> None:
        """As `fit` documents: refused there, not after its passes when the first score is asked for."""
        for damping in (-1.0, -1e-3, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"damping {damping!r}"):
                Problem("mlp").fit(name, "true", damping=damping)

    @pytest.mark.parametrize("name", BLOCKS)
    @pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf, -math.inf])
    def test_blocks_refuse_it_too(self, name: Any, damping: float) -> None:
        problem = Problem("mlp")
        block = problem.fit(name, "true").blocks["0"]
        x, g = problem.rows("0")
        with pytest.raises(ValueError, match=rf"damping {damping!r} leaves .*; pass a damping > 0, or .*relative"):
            block.solve(torch.ones(block.shape).double(), damping)
        with pytest.raises(ValueError, match=rf"damping {damping!r} leaves"):
            block.self_influence(x, g, damping)

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_every_block_has_its_own(self, name: str) -> None:
        """The first block's damping on all blocks is one peer's mistake; here they differ ten times and more."""
        problem = Problem("cnn")
        curvature = problem.fit(name, "exact")
        for layer, block in curvature.blocks.items():
            trace = block.to_dense().diagonal(dim1=1, dim2=2).mean()
            assert curvature.dampings[layer] == pytest.approx(0.1 * float(trace), rel=1e-9)
            assert block.damping(0.5) == pytest.approx(5 * curvature.dampings[layer], rel=1e-9)
        assert max(curvature.dampings.values()) > 10 * min(curvature.dampings.values())

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_sweep(self, name: str) -> None:
        """Solved for many dampings, back and forth, each gets its own answer."""
        problem = Problem("mlp")
        block = problem.fit(name, "exact").blocks["0"]
        C, v = block.to_dense(), torch.ones(block.shape).double()
        x, g = problem.rows("0")
        (G,) = problem.per_example("0")
        for damping in (0.1, 2.0, 1e-3, 0.1):
            damped = C + damping * torch.eye(C.shape[-1]).double()
            solution = torch.linalg.solve(damped, v.reshape(1, -1, 1)).reshape(v.shape)
            torch.testing.assert_close(block.solve(v, damping), solution, **EXACT)
            expected = ref.quadratic_forms(C, G, damping)
            torch.testing.assert_close(block.self_influence(x, g, damping), expected, **EXACT)
            norms, influence, inner = block.scores(x, g, damping, v)
            torch.testing.assert_close(norms, G.square().sum((0, 2, 3)), **EXACT)
            torch.testing.assert_close(influence, expected, **EXACT)
            torch.testing.assert_close(inner, G.sum((0, 2, 3)), **EXACT)

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_large_damping_gives_the_identity(self, name: str) -> None:
        problem = Problem("cnn")
        scores = score_examples(problem.gradients, range(N), curvature=problem.fit(name, "exact", damping=1e8)).columns
        torch.testing.assert_close(1e8 * scores["self_influence"], scores["grad_norm_squared"], rtol=1e-4, atol=0)


class TestContract:
    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_unfitted(self, name: str) -> None:
        kind = BLOCKS[name]
        x, g = torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 3)
        for seen in range(len(kind.measures)):
            block = kind((1, 3, 4))
            for _ in range(seen):
                block.update(x, [g], 6)
                block.end_pass(6)
            uses: list[Callable[[CurvatureBlock], Any]] = [
                lambda b: b.matvec(torch.ones(1, 3, 4)),
                lambda b: b.solve(torch.ones(1, 3, 4), 0.1),
                lambda b: b.diagonal(),
                lambda b: b.self_influence(x, g, 0.1),
                lambda b: b.damping(),
                lambda b: b.to_dense(),
            ]
            message = (
                rf"{kind.__name__} needs {len(kind.measures)} passes over the data and has seen {seen}; call `update`"
            )
            for use in uses:
                with pytest.raises(RuntimeError, match=message):
                    use(block)

    def test_identity_needs_no_pass(self) -> None:
        block = IdentityBlock((2, 3, 4))
        assert block.measures == ()
        assert block.damping() == 0.0
        v = torch.randn(5, 2, 3, 4)
        assert torch.equal(block.matvec(v), v)
        assert torch.equal(block.solve(v, 1.0), v / 2)
        assert torch.equal(block.to_dense(), torch.eye(12).expand(2, -1, -1))

    def test_update_adds_up_over_batches(self) -> None:
        """Means over examples, not means of batch means (nor inverses summed, which one peer did)."""
        x, g = torch.randn(2, 9, 3, 4).double(), torch.randn(2, 9, 3, 5).double()
        whole, parts = EKFACBlock((2, 5, 4)), EKFACBlock((2, 5, 4))
        for _ in range(2):
            whole.update(x, [g], 9)
            whole.end_pass(9)
        for _ in range(2):
            for rows in (slice(0, 1), slice(1, 3), slice(3, 9)):
                parts.update(x[:, rows], [g[:, rows]], rows.stop - rows.start)
            parts.end_pass(9)
        torch.testing.assert_close(parts.to_dense(), whole.to_dense(), **EXACT)

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_no_example_counted(self, name: str) -> None:
        block = BLOCKS[name]((1, 3, 4))
        with pytest.raises(ValueError, match="no example was counted"):
            block.end_pass(0)
        block.update(torch.zeros(1, 2, 1, 4), [torch.zeros(1, 2, 1, 3)], 0)
        with pytest.raises(ValueError, match=r"no example was counted: all losses or gradients are non-finite"):
            block.end_pass(0)

    def test_eigenvalues_are_never_negative(self) -> None:
        """Of rank-deficient factors rounding leaves some at -1e-17; roots and inverses of those are NaN or huge."""
        x, g = torch.randn(1, 3, 1, 40), torch.randn(1, 3, 1, 30)
        block = KFACBlock((1, 30, 40))
        block.update(x, [g], 3)
        block.end_pass(3)
        for rows in (x[0, :, 0], g[0, :, 0]):
            assert torch.linalg.eigvalsh((rows.mT @ rows / 3).double()).min() < 0
        assert block.eigenvalues.min() == 0

    def test_eigendecomposition_that_does_not_converge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """LAPACK can fail on clustered eigenvalues; the matrix shifted a little has the same eigenvectors."""
        x, g = torch.randn(2, 30, 1, 4).double(), torch.randn(2, 30, 1, 3).double()
        expected, block = KFACBlock((2, 3, 4)), KFACBlock((2, 3, 4))
        for each in (expected, block):
            each.update(x, [g], 30)
        expected.end_pass(30)
        eigh, failures = torch.linalg.eigh, iter([True, False, True, False])

        def fails_first(matrices: Tensor) -> Any:
            if next(failures):
                raise torch.linalg.LinAlgError("did not converge")
            return eigh(matrices)

        monkeypatch.setattr(torch.linalg, "eigh", fails_first)
        block.end_pass(30)
        assert next(failures, None) is None
        torch.testing.assert_close(block.to_dense(), expected.to_dense(), rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(block.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-12)

    def test_factors_of_float32_are_decomposed_in_float64(self) -> None:
        """Orthonormal to float32 rounding; a float32 decomposition is off by ten times as much."""
        x = torch.randn(1, 900, 1, 300) * torch.logspace(0, -6, 300)
        block = KFACBlock((1, 1, 300))
        block.update(x, [torch.ones(1, 900, 1, 1)], 900)
        block.end_pass(900)
        basis = block.basis[0]
        assert basis is not None
        assert basis.dtype == torch.float32
        assert (basis.double().mT @ basis.double() - torch.eye(300).double()).abs().max() < 3e-7


class TestFit:
    def test_what_each_approximation_sees(self) -> None:
        problem = Problem("mlp")
        sizes = FactorExamples(6, 9)
        expected: dict[Any, Any] = {
            "ekfac": (("sampled", "exact"), (6, 9)),
            "kfac": (("sampled",), (6,)),
            "diagonal": (("exact",), (9,)),
            "identity": ((), ()),
        }
        for name, (labels, examples) in expected.items():
            curvature = fit(problem.gradients, name, range(N), examples=sizes, labels=("sampled", "exact"))
            assert (curvature.name, curvature.labels, curvature.examples) == (name, labels, examples)
            assert list(curvature.blocks) == list(curvature.dampings) == problem.layers

    def test_subset_is_random_and_its_factors_are_those_of_its_members(self) -> None:
        problem = Problem("cnn")
        subset = random_subset(range(N), 6, seed=0)
        assert subset == sorted(subset)
        assert len(set(subset)) == 6
        assert subset != list(range(6)), "the first six instead of a random six"
        assert random_subset(range(N), 6, seed=0) == subset
        assert len({tuple(random_subset(range(N), 6, seed=seed)) for seed in range(20)}) > 10
        curvature = fit(problem.gradients, "kfac", range(N), examples=FactorExamples(6, 6), labels=("true", "true"))
        whole = fit(problem.gradients, "kfac", subset, examples=EVERY, labels=("true", "true"))
        for layer, block in curvature.blocks.items():
            torch.testing.assert_close(block.to_dense(), whole.blocks[layer].to_dense(), **EXACT)

    def test_subset_of_everything(self) -> None:
        assert random_subset([4, 2, 9], 3, seed=0) == random_subset([4, 2, 9], 7, seed=1) == [4, 2, 9]

    def test_subset_does_not_depend_on_the_order(self) -> None:
        """Indices of a shuffling sampler name the same data set; its factors should be the same too."""
        shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1)).tolist()
        assert sorted(random_subset(shuffled, 10, seed=0)) == random_subset(range(50), 10, seed=0)

    def test_subset_sizes(self) -> None:
        """Two rows for every dimension of the widest factor, 512 or 1,024 examples, never more than there are."""
        net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(128 * 36, 2000), nn.Linear(2000, 10))
        inputs = torch.randn(4, 64, 8, 8)
        coverage, positions = covered(net, inputs), {"0": 36, "2": 1, "3": 1}
        assert factor_examples(coverage, positions, 10, 10**6) == FactorExamples(2 * 4609, 410 - 1, 8192)
        assert factor_examples(coverage, positions, 1, 10**6) == FactorExamples(2 * 4609, 512, 8192)
        assert factor_examples(coverage, positions, 1000, 10**6).eigenvalues == 256
        assert factor_examples(coverage, positions, 10, 300) == FactorExamples(300, 300, 300)
        small = covered(net, inputs, layers=["0"])
        assert factor_examples(small, positions, 10, 10**6).covariances == 512
        assert factor_examples(small, {"0": 1}, 10, 10**6).covariances == 2 * 577
        assert factor_examples(small, {"0": 2}, 1, 10**6) == FactorExamples(577, 512, 8192)
        assert factor_examples(covered(net, inputs, layers=["3"]), {"3": 1}, 1, 10**6) == FactorExamples(
            4002, 1024, 8192
        )

    def test_eigenvalues_are_measured_where_the_basis_is_known(self) -> None:
        """Rounding picks the eigenvectors of a null space, so no gradient may lie in it when eigenvalues are measured.

        With eigenvalues from 14 examples in the basis of 9, scores of the CNN in test_invariance differed by 8 % from
        one batch size to the next; the other way round by 3e-15.
        """
        net = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 200))
        coverage, positions = covered(net, torch.randn(4, 100)), {"0": 1, "1": 1}
        for draws in (1, 3, 20):
            for size in (100, 700, 10**6):
                chosen = factor_examples(coverage, positions, draws, size)
                assert chosen.covariances >= chosen.eigenvalues, (draws, size)
                small, large = (random_subset(range(size), n, seed=0) for n in (chosen.eigenvalues, chosen.covariances))
                assert set(small) <= set(large)

    @pytest.mark.parametrize(
        ("fisher", "tapped", "expected"),
        [
            ("auto", True, ("sampled", "sampled")),
            ("auto", False, ("true", "true")),
            ("sampled", True, ("sampled", "sampled")),
            ("exact", True, ("exact", "exact")),
            ("empirical", True, ("true", "true")),
        ],
    )
    def test_choice_of_labels(self, fisher: Any, tapped: bool, expected: tuple[str, str]) -> None:
        assert choose_labels(fisher, tapped) == expected

    def test_chosen_layers_only(self) -> None:
        """Blocks don't see each other: one layer's scores are its part of the whole."""
        problem = Problem("cnn")
        total = torch.zeros(N).double()
        for layer in problem.layers:
            gradients = passes(problem.net, problem.inputs, problem.targets, layers=[layer])
            curvature = fit(gradients, "ekfac", range(N), examples=EVERY, labels=("true", "true"))
            assert list(curvature.blocks) == [layer]
            total += score_examples(gradients, range(N), curvature=curvature).columns["self_influence"]
        whole = score_examples(problem.gradients, range(N), curvature=problem.fit("ekfac")).columns
        torch.testing.assert_close(whole["self_influence"], total, **EXACT)


class Spare(nn.Module):
    """Layers of every kind that the forward pass never calls, and one that is called but not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.ignored = nn.Linear(4, CLASSES), nn.Conv2d(2, 2, 3), nn.Linear(4, 2)
        self.table, self.norm = nn.Embedding(5, 3), nn.LayerNorm(4)
        self.tied_table, self.tied = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.tied.weight = self.tied_table.weight

    def forward(self, value: Tensor) -> Tensor:
        self.ignored(value)
        result: Tensor = self.used(value)
        return result


@pytest.mark.parametrize("name", BLOCKS)
class TestLayersWithoutGradients:
    def test_score_nothing(self, name: Any) -> None:
        """A trace leaves out what it has not seen; what no gradient reaches stays, with a gradient of zero."""
        net = Spare().double()
        inputs, targets = torch.randn(N, 4).double(), torch.arange(N) % CLASSES
        gradients = passes(net, inputs, targets)
        curvature = fit(gradients, name, range(N), examples=EVERY, labels=("exact", "exact"))
        assert list(curvature.blocks) == ["used", "ignored"]
        query = curvature.solve(mean_gradient(gradients, range(N)))
        scores = score_examples(gradients, range(N), curvature=curvature, query=query).columns
        alone = passes(net.used, inputs, targets)
        expected = score_examples(
            alone, range(N), curvature=fit(alone, name, range(N), examples=EVERY, labels=("exact", "exact"))
        ).columns
        torch.testing.assert_close(scores["self_influence"], expected["self_influence"], **EXACT)
        torch.testing.assert_close(scores["grad_norm_squared"], expected["grad_norm_squared"], **EXACT)
        assert torch.isfinite(scores["harm"]).all()
        assert not query["ignored"].any()
        if name != "identity":
            assert not curvature.blocks["ignored"].to_dense().any()
            assert curvature.dampings["ignored"] == 1.0


class Rooted(nn.Module):
    """The root of zero has an infinite slope: a finite loss with a NaN gradient, for inputs that are all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.last(self.first(value).abs().sqrt())


class TestNonFinite:
    """Left out, listed, and without any effect on the other examples, also in the same batch."""

    BAD = (0, 3, 4, 11)

    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(1)
        inputs = torch.randn(N, 4).double()
        inputs[0, 2] = math.nan
        inputs[3, 1] = math.inf
        inputs[4] = 0.0
        inputs[11] = -math.inf
        return Rooted().double(), inputs, torch.arange(N) % CLASSES

    @pytest.mark.parametrize("batch_size", [1, 5, N])
    @pytest.mark.parametrize("labels", [("true", "true"), ("sampled", "exact")], ids="-".join)
    @pytest.mark.parametrize("name", BLOCKS)
    def test_as_if_they_were_not_there(self, name: Any, labels: Any, batch_size: int) -> None:
        net, inputs, targets = self.problem()
        gradients = passes(net, inputs, targets, batch_size=batch_size)
        good = [n for n in range(N) if n not in self.BAD]
        found = fit(gradients, name, range(N), examples=EVERY, labels=labels)
        expected = fit(gradients, name, good, examples=EVERY, labels=labels)
        for layer, block in found.blocks.items():
            torch.testing.assert_close(block.to_dense(), expected.blocks[layer].to_dense(), **EXACT)
            assert found.dampings[layer] == pytest.approx(expected.dampings[layer], rel=1e-9)
        mean, mean_of_good = mean_gradient(gradients, range(N)), mean_gradient(gradients, good)
        for layer, value in mean.items():
            torch.testing.assert_close(value, mean_of_good[layer], **EXACT)
        scores = score_examples(gradients, range(N), curvature=found, query=found.solve(mean)).columns
        of_good = score_examples(gradients, good, curvature=expected, query=expected.solve(mean_of_good)).columns
        assert scores["finite"].tolist() == [n not in self.BAD for n in range(N)]
        for column in ("self_influence", "grad_norm_squared", "harm"):
            assert scores[column].isnan().nonzero()[:, 0].tolist() == list(self.BAD)
            torch.testing.assert_close(scores[column][good], of_good[column], **EXACT)
        torch.testing.assert_close(scores["loss"][good], of_good["loss"], **EXACT)

    @pytest.mark.parametrize("batch_size", [1, 5, N])
    def test_infinite_loss(self, batch_size: int) -> None:
        """A masked class with that label: the batch loss is infinite, not NaN, and each example's own is known."""

        def masked(outputs: Tensor, targets: Tensor) -> Tensor:
            closed = (targets == 2)[:, None] & (torch.arange(CLASSES) == 2)
            return F.cross_entropy(outputs.masked_fill(closed, -math.inf), targets)

        problem = Problem("mlp")
        problem.targets[:] = torch.arange(N) % 2
        problem.targets[[6, 12]] = 2
        good = [n for n in range(N) if n not in (6, 12)]
        gradients = passes(problem.net, problem.inputs, problem.targets, masked, batch_size=batch_size)
        found = fit(gradients, "ekfac", range(N), examples=EVERY, labels=("true", "true"))
        expected = fit(gradients, "ekfac", good, examples=EVERY, labels=("true", "true"))
        for layer, block in found.blocks.items():
            torch.testing.assert_close(block.to_dense(), expected.blocks[layer].to_dense(), **EXACT)
        scores = score_examples(gradients, range(N), curvature=found).columns
        assert scores["finite"].tolist() == [n in good for n in range(N)]
        assert scores["loss"].isinf().nonzero()[:, 0].tolist() == [6, 12]
        assert scores["self_influence"].isnan().nonzero()[:, 0].tolist() == [6, 12]
        of_good = score_examples(gradients, good, curvature=expected).columns
        torch.testing.assert_close(scores["self_influence"][good], of_good["self_influence"], **EXACT)

    @pytest.mark.parametrize("batch_size", [1, 5, N])
    def test_overflowing_loss(self, batch_size: int) -> None:
        """A target of 1e25 squared is infinite in float32, although its gradient is not."""
        net = nn.Linear(4, 1)
        inputs, targets = torch.randn(N, 4), torch.randn(N, 1)
        targets[2] = 1e25
        good = [n for n in range(N) if n != 2]
        gradients = passes(net, inputs, targets, F.mse_loss, batch_size=batch_size)
        found = fit(gradients, "kfac", range(N), examples=EVERY, labels=("true", "true"))
        expected = fit(gradients, "kfac", good, examples=EVERY, labels=("true", "true"))
        torch.testing.assert_close(found.blocks[""].to_dense(), expected.blocks[""].to_dense(), rtol=1e-4, atol=1e-6)
        scores = score_examples(gradients, range(N), curvature=found).columns
        assert scores["finite"].tolist() == [n != 2 for n in range(N)]
        assert scores["self_influence"].isnan().nonzero()[:, 0].tolist() == [2]

    @pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
    def test_none_is_finite(self, name: Any) -> None:
        net, inputs, targets = self.problem()
        gradients = passes(net, inputs * math.nan, targets)
        with pytest.raises(ValueError, match="no example was counted: all losses or gradients are non-finite"):
            fit(gradients, name, range(N), examples=EVERY, labels=("true", "true"))
        with pytest.raises(ValueError, match="no query has a finite gradient"):
            mean_gradient(gradients, range(N))
        assert score_examples(gradients, range(N)).columns["grad_norm_squared"].isnan().all()
