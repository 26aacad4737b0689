"""Per-example gradient algebra against formed gradients, every form forced, and what it must not allocate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset
from tracing import covered

from lightning_influence.curvature import BLOCKS, CurvatureBlock, FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.layers.per_sample import forming, norms
from lightning_influence.layers.rows import Joined, OneHot, Rows, compact, join, rotate, second_moment
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.pairs import pairwise_scores

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}

# (k, n, s, i, o)
SHAPES = {
    "one position": (1, 6, 1, 4, 3),
    "one position, groups": (3, 6, 1, 4, 2),
    "one of everything": (1, 1, 1, 1, 1),
    "few positions": (1, 6, 2, 5, 4),
    "few positions, groups": (2, 6, 2, 5, 4),
    "many positions": (1, 5, 40, 3, 2),
    "many positions, groups": (4, 5, 40, 3, 2),
    "depthwise": (5, 6, 9, 4, 1),
    "one output": (1, 6, 3, 7, 1),
    "one input": (1, 6, 3, 1, 7),
    "one example": (2, 1, 3, 4, 5),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda rows: rows,
    # Patches come from `F.unfold` with the positions innermost.
    "patches": lambda rows: rows.transpose(-1, -2).contiguous().transpose(-1, -2),
    # Groups lie inside the examples: `[n, k, i, s]` in memory.
    "grouped patches": lambda rows: rows.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    # The gradient of a mean is one number, expanded.
    "expanded": lambda rows: rows[:, :1, :1, :1].expand(rows.shape),
}


CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS]


@pytest.fixture(params=[None, 1, 37], ids=["all at once", "one at a time", "a few at a time"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(forming, "_CHUNK_ELEMENTS", request.param)
        monkeypatch.setattr(forming, "_CACHED_ELEMENTS", request.param)


def io(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor] = LAYOUTS["rows"], draws: int = 1
) -> tuple[Tensor, list[Tensor]]:
    k, n, s, i, o = shape
    x = layout(torch.randn(k, n, s, i).double())
    return x, [layout(torch.randn(k, n, s, o).double()) for _ in range(draws)]


def cases(draws: int = 1) -> Iterator[tuple[Tensor, list[Tensor], tuple[int, ...], str]]:
    for name, layout in CASES:
        x, gs = io(SHAPES[name], LAYOUTS[layout], draws)
        yield x, gs, SHAPES[name], f"{name}, {layout}"


def close(found: Tensor, expected: Tensor, case: str) -> None:
    torch.testing.assert_close(found, expected, **EXACT, msg=lambda message: f"{case}: {message}")


def dense(x: Tensor, g: Tensor) -> Tensor:
    """Return the gradients `[k, n, o, i]`, one outer product at a time."""
    gradients = x.new_zeros(*x.shape[:2], g.shape[3], x.shape[3])
    for s in range(x.shape[2]):
        gradients += g[:, :, s, :, None] * x[:, :, s, None, :]
    return gradients


def rotated(x: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("kop,knoi,kij->knpj", b, dense(x, g), a)


def basis(k: int, m: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(k, m, m).double()).Q
    return q


@pytest.mark.usefixtures("_chunks")
class TestAgainstFormedGradients:
    def test_formed(self) -> None:
        for x, (g,), _, case in cases():
            found = per_sample.formed(x, g)
            close(found, dense(x, g).transpose(0, 1), case)
            assert found.is_contiguous(), case

    def test_rows_of_rotated_gradients(self) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            a, b = basis(k, i), basis(k, o)
            for of_x, of_g in ((a, b), (None, b), (a, None), (None, None)):
                x_, g_ = per_sample.rotated_rows(x, g, of_x, of_g)
                assert isinstance(g_, Tensor)
                eye_x, eye_g = torch.eye(i).double().expand(k, i, i), torch.eye(o).double().expand(k, o, o)
                expected = rotated(x, g, eye_x if of_x is None else of_x, eye_g if of_g is None else of_g)
                close(dense(x_, g_), expected, case)

    @pytest.mark.parametrize("form", ["auto", "gram", "form"])
    def test_squared_norms(self, form: Any) -> None:
        for x, (g,), _, case in cases():
            close(per_sample.squared_norms(x, g, form=form), dense(x, g).square().sum((0, 2, 3)), case)

    def test_gradients(self) -> None:
        for x, (g,), _, case in cases():
            chunks = list(per_sample.gradients(x, g))
            close(torch.cat(chunks, 1), dense(x, g), case)
            limit = max(forming._CHUNK_ELEMENTS, chunks[0][:, :1].numel())
            assert all(0 < chunk.numel() <= limit for chunk in chunks), case

    def test_summed_gradient(self) -> None:
        for x, (g,), _, case in cases():
            close(per_sample.summed_gradient(x, g), dense(x, g).sum(1), case)

    @pytest.mark.parametrize("draws", [1, 3])
    def test_summed_squares(self, draws: int) -> None:
        for x, gs, _, case in cases(draws):
            expected = torch.stack([dense(x, g).square().sum(1) for g in gs]).sum(0)
            close(per_sample.rotated_squares(x, gs, None, None), expected, case)

    def test_weighted_squares(self) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            weights = torch.rand(k, o, i).double()
            expected = torch.einsum("knoi,koi->n", dense(x, g).square(), weights)
            close(per_sample.weighted_squares(x, g, weights), expected, case)

    def test_inner_products(self) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            matrix = torch.randn(k, o, i).double()
            expected = torch.einsum("knoi,koi->n", dense(x, g), matrix)
            close(per_sample.inner_products(x, g, matrix), expected, case)

    def test_products(self) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            vectors = torch.randn(7, k, o, i).double()
            expected = torch.einsum("knoi,qkoi->nq", dense(x, g), vectors)
            close(per_sample.products(x, g, vectors), expected, case)

    @pytest.mark.parametrize("form", ["auto", "rotate_first", "form_first"])
    @pytest.mark.parametrize("draws", [1, 3])
    def test_rotated_squares(self, form: Any, draws: int) -> None:
        for x, gs, (k, _, _, i, o), case in cases(draws):
            a, b = basis(k, i), basis(k, o)
            expected = torch.stack([rotated(x, g, a, b).square().sum(1) for g in gs]).sum(0)
            close(per_sample.rotated_squares(x, gs, a, b, form=form), expected, case)

    @pytest.mark.parametrize("form", ["auto", "rotate_first", "form_first"])
    def test_weighted_rotated_squares(self, form: Any) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            a, b, weights = basis(k, i), basis(k, o), torch.rand(k, o, i).double()
            kept = weights.clone()
            expected = torch.einsum("knoi,koi->n", rotated(x, g, a, b).square(), weights)
            close(per_sample.weighted_rotated_squares(x, g, a, b, weights, form=form), expected, case)
            assert torch.equal(weights, kept), "modified in place, although it is used for every batch"

    @pytest.mark.parametrize("with_vector", [True, False])
    def test_rotated_scores(self, with_vector: bool) -> None:
        for x, (g,), (k, _, _, i, o), case in cases():
            a, b, weights = basis(k, i), basis(k, o), torch.rand(k, o, i).double()
            vector = torch.randn(k, o, i).double() if with_vector else None
            kept = weights.clone()
            norms, weighted, inner = per_sample.rotated_scores(x, g, a, b, weights, vector)
            close(norms, dense(x, g).square().sum((0, 2, 3)), case)
            close(weighted, torch.einsum("knoi,koi->n", rotated(x, g, a, b).square(), weights), case)
            assert torch.equal(weights, kept)
            if vector is None:
                assert inner is None
            else:
                assert inner is not None
                close(inner, torch.einsum("knoi,koi->n", dense(x, g), vector), case)


class TestRows:
    def test_second_moment(self) -> None:
        for x, _, _, case in cases():
            rows = x.flatten(1, 2).unbind(1)
            expected = torch.stack([row[..., :, None] * row[..., None, :] for row in rows]).sum(0)
            close(second_moment(x), expected, case)
            close(second_moment(x, diagonal=True), expected.diagonal(dim1=-2, dim2=-1), case)

    def test_rotate(self) -> None:
        for x, _, (k, _, _, i, _), case in cases():
            matrix = torch.randn(k, i, 3).double()
            close(rotate(x, matrix), torch.stack([x[group] @ matrix[group] for group in range(k)]), case)
            assert rotate(x, None) is x, "the identity costs nothing"

    def test_inputs_are_left_alone(self) -> None:
        """They are the captured tensors, which further blocks and columns read."""
        for x, gs, (k, _, _, i, o), case in cases(2):
            copies = [tensor.clone() for tensor in (x, *gs)]
            a, b, weights = basis(k, i), basis(k, o), torch.ones(k, o, i).double()
            per_sample.squared_norms(x, gs[0])
            per_sample.rotated_squares(x, gs, None, None)
            per_sample.weighted_squares(x, gs[0], weights)
            for form in ("rotate_first", "form_first"):
                per_sample.rotated_squares(x, gs, a, b, form=form)
                per_sample.weighted_rotated_squares(x, gs[0], a, b, weights, form=form)
            per_sample.rotated_scores(x, gs[0], a, b, weights, weights)
            assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, *gs), copies, strict=True)), case


# Of five examples and rows of size 7: positions, how many indices there are to choose from, whether some are padding,
# and the number of dense positions that follow.
ONE_HOT: dict[str, tuple[int, int, bool, int]] = {
    "one position": (1, 7, False, 0),
    "few of the same": (6, 2, False, 0),
    "all different": (6, 7, False, 0),
    "padding": (6, 3, True, 0),
    "one position, padding": (1, 7, True, 0),
    "joined": (6, 3, False, 4),
    "joined, padding": (6, 3, True, 1),
    "joined, many dense ones": (1, 7, False, 40),
}


def one_hot_rows(name: str, inputs: int = 4, draws: int = 1) -> tuple[list[Tensor], list[Rows]]:
    """Return activations and rows by draw; the indices are the same in all."""
    positions, choice, padding, dense_positions = ONE_HOT[name]
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(choice, (5, positions), generator=generator)
    if name == "all different":
        indices = torch.stack([torch.randperm(7, generator=generator)[:positions] for _ in range(5)])
    kept = torch.rand(5, positions, generator=generator) < 0.6 if padding else None
    onehot = OneHot(indices, 7, name == "all different", kept)
    xs: list[Tensor] = []
    gs: list[Rows] = []
    for _ in range(draws):
        x = torch.randn(1, 5, positions + dense_positions, inputs, generator=generator).double()
        if kept is not None:
            x[:, :, :positions][0, ~kept] = 0
        xs.append(x)
        dense_rows = torch.randn(1, 5, dense_positions, 7, generator=generator).double()
        gs.append(Joined(onehot, dense_rows) if dense_positions else onehot)
    return xs, gs


def opened(g: Rows) -> Tensor:
    """Write rows out with their zeros."""
    if isinstance(g, Tensor):
        return g
    if isinstance(g, Joined):
        return torch.cat([opened(g.onehot), g.dense], 2)
    rows = F.one_hot(g.indices, g.size).double()
    return (rows if g.kept is None else rows * g.kept.unsqueeze(2)).unsqueeze(0)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", ONE_HOT)
class TestOneHotRows:
    """The same numbers as for rows that are written out."""

    def test_gradients_and_norms(self, name: str) -> None:
        (x,), (g,) = one_hot_rows(name)
        expected = dense(x, opened(g))
        assert g.shape == opened(g).shape
        close(torch.cat(list(per_sample.gradients(x, g)), 1), expected, name)
        close(per_sample.summed_gradient(x, g), expected.sum(1), name)
        close(per_sample.squared_norms(x, g), expected.square().sum((0, 2, 3)), name)
        close(second_moment(g), second_moment(opened(g)).to(second_moment(g).dtype), name)
        close(second_moment(g, diagonal=True), second_moment(opened(g), diagonal=True).to(second_moment(g).dtype), name)

    @pytest.mark.parametrize("turned", [True, False])
    def test_products_and_squares(self, name: str, turned: bool) -> None:
        (x,), (g,) = one_hot_rows(name)
        expected, weights, vector = dense(x, opened(g)), torch.rand(1, 7, 4).double(), torch.randn(1, 7, 4).double()
        a = basis(1, 4) if turned else None
        squares = (expected if a is None else expected @ a).square()
        weighted, inner = torch.einsum("knoi,koi->n", squares, weights), torch.einsum("knoi,koi->n", expected, vector)
        close(per_sample.inner_products(x, g, vector), inner, name)
        close(per_sample.weighted_rotated_squares(x, g, a, None, weights), weighted, name)
        for found, right in zip(
            per_sample.rotated_scores(x, g, a, None, weights, vector),
            (expected.square().sum((0, 2, 3)), weighted, inner),
            strict=True,
        ):
            assert found is not None
            close(found, right, name)
        assert per_sample.rotated_scores(x, g, a, None, weights)[2] is None
        if not turned:
            close(per_sample.weighted_squares(x, g, weights), weighted, name)

    @pytest.mark.parametrize("turned", [True, False])
    @pytest.mark.parametrize("draws", [1, 3])
    def test_squares_of_several_draws(self, name: str, draws: int, turned: bool) -> None:
        """The looked-up vectors get other gradients for other labels; the rows of a look-up stay."""
        xs, gs = one_hot_rows(name, draws=draws)
        a = basis(1, 4) if turned else None
        each = [dense(x, opened(g)) for x, g in zip(xs, gs, strict=True)]
        expected = torch.stack([(d if a is None else d @ a).square().sum(1) for d in each]).sum(0)
        close(per_sample.rotated_squares(xs, gs, a, None), expected, name)
        if isinstance(gs[0], OneHot):
            close(per_sample.rotated_squares(xs, gs[:1], a, None), expected, name)

    def test_examples_are_left_out(self, name: str) -> None:
        (x,), (g,) = one_hot_rows(name)
        keep = torch.tensor([True, False, True, True, False])
        onehot = g.onehot if isinstance(g, Joined) else g
        assert isinstance(onehot, OneHot)
        expected = opened(onehot) * keep.view(1, -1, 1, 1)
        assert torch.equal(opened(onehot.keep(keep)), expected)
        close(second_moment(onehot.keep(keep)), second_moment(expected).float(), name)

    def test_no_two_rows_touch_the_same_numbers_when_compact(self, name: str) -> None:
        (x,), (g,) = one_hot_rows(name)
        onehot = g.onehot if isinstance(g, Joined) else g
        assert isinstance(onehot, OneHot)
        x = x[:, :, : onehot.shape[2]]
        together = compact(x, onehot)
        close(dense(together, opened(OneHot(onehot.indices, 7))), dense(x, opened(onehot)), name)
        for example in range(5):
            places = onehot.indices[example][together[0, example].any(1)]
            assert len(places.unique()) == len(places)

    def test_joined_in_parts(self, name: str) -> None:
        """Several uses of a table, then several of the same parameter as a linear layer."""
        (x,), (g,) = one_hot_rows(name)
        onehot = g.onehot if isinstance(g, Joined) else g
        assert isinstance(onehot, OneHot)
        others = [OneHot(onehot.indices.flip(0), 7), onehot]
        tail = [torch.randn(1, 5, size, 7).double() for size in (2, 1)]
        cases: list[Sequence[Tensor | OneHot]] = [
            others,
            others[:1],
            [*others, *tail],
            [onehot, tail[0]],
            tail,
            tail[:1],
        ]
        for parts in cases:
            joined = join(parts)
            assert torch.equal(opened(joined), torch.cat([opened(part) for part in parts], 2))


class _Sizes(TorchDispatchMode):
    """Notes the largest tensor, in float32 numbers, that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            # The storage, as the entries of an expanded view take no memory.
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // 4)
        return result


@contextmanager
def largest_below(limit: int) -> Iterator[_Sizes]:
    with _Sizes() as sizes:
        yield sizes
    assert sizes.largest < limit, f"a tensor of {sizes.largest} numbers; the limit is {limit}"


# The dense block is made of formed gradients, and of their outer products: it has no place here.
STRUCTURED = [name for name in BLOCKS if name != "block_ggn"]


class TestCost:
    N, I, O = 64, 40, 30  # noqa: E741  (the letters of the index legend)

    def test_the_probe_sees_formed_gradients(self) -> None:
        x, g = torch.randn(1, self.N, 1, self.I), torch.randn(1, self.N, 1, self.O)
        with _Sizes() as sizes:
            torch.cat(list(per_sample.gradients(x, g)), 1)
        assert sizes.largest == self.N * self.I * self.O
        with _Sizes() as sizes:
            torch.einsum("knso,knsi->noi", g, x).square().sum((1, 2))
        assert sizes.largest == self.N * self.I * self.O

    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("name", STRUCTURED)
    def test_one_position_never_forms_gradients(self, name: str, k: int) -> None:
        """Nothing of the size `[n, o, i]`: only rows of the batch and the factors themselves."""
        x = torch.randn(k, self.N, 1, self.I)
        gs = [torch.randn(k, self.N, 1, self.O) for _ in range(4)]
        block: CurvatureBlock = BLOCKS[name]((k, self.O, self.I))
        limit = k * max(len(gs) * self.N * self.O, self.N * self.I, self.I**2, self.O * self.I) + 1
        assert limit < k * self.N * self.O * self.I / 8
        with largest_below(limit):
            for _ in block.measures:
                block.update(x, gs, self.N)
                block.end_pass(self.N)
            block.self_influence(x, gs[0], 0.1)
            block.scores(x, gs[0], 0.1, torch.ones(k, self.O, self.I))
            per_sample.squared_norms(x, gs[0])
            per_sample.inner_products(x, gs[0], torch.ones(k, self.O, self.I))
            per_sample.products(x, gs[0], torch.ones(3, k, self.O, self.I))
            block.self_influences(x, gs[0], [0.1, 1.0])
            per_sample.summed_gradient(x, gs[0])

    @pytest.mark.parametrize("name", STRUCTURED)
    def test_a_look_up_costs_the_vectors_that_were_looked_up(self, name: str) -> None:
        """64 examples of 6 words each out of 3,000: their gradients would take 64 tables. One in float64 is enough."""
        words, size = 3000, 16
        onehot = OneHot(torch.randint(words, (self.N, 6)), words)
        xs = [torch.randn(1, self.N, 6, size) for _ in range(4)]
        block: CurvatureBlock = BLOCKS[name]((1, words, size), (False, True))
        with largest_below(2 * words * size + 1):
            for _ in block.measures:
                block.update(xs, [onehot], self.N)
                block.end_pass(self.N)
            block.self_influence(xs[0], onehot, 0.1)
            block.scores(xs[0], onehot, 0.1, torch.ones(1, words, size))
            block.solve(torch.ones(1, words, size), 0.1)
            per_sample.squared_norms(xs[0], onehot)
            per_sample.summed_gradient(xs[0], onehot)

    @pytest.mark.parametrize("name", STRUCTURED)
    def test_whole_audit_of_an_mlp_never_forms_gradients(self, name: Any) -> None:
        """Capture, fit and scores together; the limit is what the gradients of the smallest layer would take."""
        net = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 5))
        dataset = TensorDataset(torch.randn(400, 60), torch.arange(400) % 5)
        source = ExampleSource(dataset, batch_size=400)
        gradients = ExampleGradients(
            net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), source, covered(net, dataset.tensors[0])
        )
        with largest_below(400 * 5 * 51):
            curvature = fit(gradients, name, range(400), examples=FactorExamples(400, 400), labels=("sampled", "exact"))
            query = {layer: torch.ones(block.shape) for layer, block in curvature.blocks.items()}
            scores = score_examples(gradients, range(400), curvature=curvature, query=query, features=True)
            pairwise_scores(gradients, range(400), curvature, gradients, range(3))
        assert scores.columns["self_influence"].min() > 0

    @pytest.mark.parametrize(
        ("s", "i", "o", "formed"),
        [(2, 30, 20, False), (11, 30, 20, False), (12, 30, 20, True), (12, 30, 21, False), (400, 30, 20, True)],
    )
    def test_norms_take_the_cheaper_form(
        self, monkeypatch: pytest.MonkeyPatch, s: int, i: int, o: int, formed: bool
    ) -> None:
        """Gram costs `s²(i + o)`, forming `s·i·o`: at 30 inputs and 20 outputs they meet at 12 positions."""
        calls: list[int] = []
        gradients = norms.gradients
        monkeypatch.setattr(norms, "gradients", lambda *args: calls.append(1) or gradients(*args))
        per_sample.squared_norms(torch.randn(1, 3, s, i), torch.randn(1, 3, s, o))
        assert bool(calls) == formed == (s**2 * (i + o) >= s * i * o)

    @pytest.mark.parametrize(
        ("s", "i", "o", "draws", "sides"),
        [
            (2, 30, 20, 1, "xg"),
            (20, 30, 20, 1, "xg"),
            (21, 30, 20, 1, "g"),
            (21, 30, 20, 9, "xggggggggg"),
            (31, 30, 40, 1, "x"),
            (400, 9, 4, 1, ""),
        ],
    )
    def test_rotations_take_the_cheaper_form(
        self, monkeypatch: pytest.MonkeyPatch, s: int, i: int, o: int, draws: int, sides: str
    ) -> None:
        """Inputs cost `s·i²` or `d·o·i²`, outputs `d·s·o²` or `d·i·o²`: nine labels make nine gradients."""
        x, gs = io((1, 3, s, i, o), LAYOUTS["rows"], draws)
        a, b = basis(1, i), basis(1, o)
        rotated = []

        def noted(rows: Tensor, basis: Tensor | None) -> Tensor:
            rotated.append("x" if rows is x else "g")
            return rotate(rows, basis)

        monkeypatch.setattr("lightning_influence.layers.per_sample.rotated.rotate", noted)
        per_sample.rotated_squares(x, gs, a, b)
        assert "".join(rotated) == sides
        assert ("x" in sides, "g" in sides) == (s * i**2 <= draws * o * i**2, s * o**2 <= i * o**2)

    def test_formed_gradients_are_held_a_few_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """1,000 examples of 12,000 scalars: 48 MB at once, and every example more would add to it."""
        monkeypatch.setattr(forming, "_CHUNK_ELEMENTS", 50_000)
        monkeypatch.setattr(forming, "_CACHED_ELEMENTS", 50_000)
        x, g = torch.randn(1, 1000, 20, 120), torch.randn(1, 1000, 20, 100)
        a, b = basis(1, 120).float(), basis(1, 100).float()
        with largest_below(x.numel() + 1):
            per_sample.squared_norms(x, g, form="form")
            per_sample.weighted_squares(x, g, torch.ones(1, 100, 120))
            for form in ("form_first", "rotate_first"):
                per_sample.weighted_rotated_squares(x, g, a, b, torch.ones(1, 100, 120), form=form)
            per_sample.rotated_scores(x, g, a, b, torch.ones(1, 100, 120), torch.ones(1, 100, 120))
