"""The collectives, in one process without a process group and in two real ones that talk through gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from own_processes import together
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.core import distributed, meeting
from lightning_influence.curvature import FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.losses import CrossEntropy
from lightning_influence.scores.pairs import pairwise_scores
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn

PATIENCE = timedelta(seconds=60)


# --- one process ---


def test_alone_without_a_process_group() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.share(range(3, 6)) == [3, 4, 5]
    assert distributed.any_process(True) is True
    assert distributed.any_process(False) is False


def test_sum_alone_is_the_tensor_itself() -> None:
    one, two = torch.randn(3, dtype=torch.float64), torch.arange(4)
    sums = distributed.sum_across_processes([one, two])
    assert sums[0] is one
    assert sums[1] is two


def test_gather_alone_sorts_and_drops_repeats() -> None:
    # The repeat of 4 carries another value: the first one counts.
    indices = torch.tensor([4, 1, 4, 9])
    values = {"loss": torch.tensor([0.4, 0.1, -1.0, float("nan")]), "label": torch.tensor([4, 1, -1, 9])}
    gathered, columns = distributed.gather_by_index(indices, values)
    assert gathered.tolist() == [1, 4, 9]
    assert columns["label"].tolist() == [1, 4, 9]
    torch.testing.assert_close(columns["loss"], torch.tensor([0.1, 0.4, float("nan")]), equal_nan=True)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 2, 4, dtype=torch.float64).transpose(1, 2),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.tensor([True, False, True]),
        torch.tensor([2**62, -1, 0]),
        torch.empty(3, 0),
        torch.randn(3, 2, requires_grad=True),
    ],
    ids=["float64, strided", "bfloat16", "bool", "int64", "no columns", "requires grad"],
)
def test_gather_keeps_dtype_and_shape(value: Tensor) -> None:
    indices, columns = distributed.gather_by_index(torch.tensor([2, 0, 1]), {"value": value})
    assert indices.tolist() == [0, 1, 2]
    torch.testing.assert_close(columns["value"], value.detach()[[1, 2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("rows", [0, 1])
def test_gather_of_hardly_anything(rows: int) -> None:
    # Rows of 8 + 12 bytes: strides of 20 bytes are no multiple of an index's 8, which 0 or 1 rows can hide.
    indices, columns = distributed.gather_by_index(torch.arange(rows), {"x": torch.ones(3, rows).t()})
    assert indices.shape == (rows,)
    assert torch.equal(columns["x"], torch.ones(rows, 3))


@pytest.mark.parametrize(
    ("backends", "device", "expected"),
    [
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo", "cuda:0", "cpu"),
    ],
)
def test_tensors_go_where_the_backend_can_send_them(
    monkeypatch: pytest.MonkeyPatch, backends: str, device: str, expected: str
) -> None:
    monkeypatch.setattr(meeting, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    assert meeting.device_for(torch.device(device)) == torch.device(expected)


# --- two processes: every function below runs on both, in this order; the tests look at what they returned ---


def place(rank: int) -> object:
    return distributed.rank(), distributed.world_size(), distributed.share(range(5))


def sums(rank: int) -> object:
    tensors = [
        torch.tensor([1e-12 + rank, 1.0], dtype=torch.float64),
        torch.tensor(2**60 + rank),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.full((2,), float("nan") if rank else 1.0),
        torch.empty(0, 3),
    ]
    before = [tensor.clone() for tensor in tensors]
    summed = distributed.sum_across_processes(tensors)
    untouched = all(torch.equal(a, b) for a, b in zip(before[:3], tensors[:3], strict=True))
    return summed, untouched


def sums_of_different_shapes(rank: int) -> object:
    return distributed.sum_across_processes([torch.zeros(2 + rank)])


def sums_missing_on_one_rank(rank: int) -> object:
    return distributed.sum_across_processes([] if rank else [torch.zeros(2)])


def gather_unequal(rank: int) -> object:
    # As a DistributedSampler deals 5 examples to 2 processes: rank 1 holds example 0 again, as padding.
    indices = torch.tensor([[4, 0, 2], [1, 3, 0]][rank] + [6] * rank)
    loss = indices.double() + 0.5
    loss[indices == 3] = float("nan")
    return distributed.gather_by_index(
        indices, {"rank": torch.full_like(indices, rank), "loss": loss, "flag": (indices > 2)[:, None]}
    )


def gather_none_on_one_rank(rank: int) -> object:
    n = [0, 3][rank]
    return distributed.gather_by_index(torch.arange(n).flip(0), {"x": torch.ones(n, 2, 2, dtype=torch.float16)})


def gather_none_anywhere(rank: int) -> object:
    return distributed.gather_by_index(torch.empty(0, dtype=torch.int64), {"x": torch.empty(0, 2)})


def gather_different_dtypes(rank: int) -> object:
    return distributed.gather_by_index(
        torch.tensor([rank]), {"x": torch.zeros(1, dtype=[torch.float32, torch.int32][rank])}
    )


def any_flags(rank: int) -> object:
    return [distributed.any_process(flag) for flag in (False, rank == 0, rank == 1, True)]


def collectives(run: Callable[[], object]) -> int:
    """Count what the processes wait for each other in."""
    counted = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counted[0] += 1
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast", "gather", "reduce"):
            patch.setattr(dist, name, counting(getattr(dist, name)))
        run()
    return counted[0]


def gather_together(rank: int) -> object:
    values = {f"column {k}": torch.zeros(3) for k in range(20)}
    return collectives(lambda: distributed.gather_by_index(torch.arange(3) + rank, values))


def epoch_end(rank: int) -> object:
    """A run of 8 examples, each process having trained on its own."""
    recording = Recording(8, nn.Linear(2, 3), TracIn("step"))
    logits = torch.arange(12.0).reshape(4, 3).sin().requires_grad_() * (1 + rank)
    labels = torch.tensor([0, 1, 2, 0])
    call = CrossEntropy(F.cross_entropy(logits, labels), logits, labels, "mean")
    own = tuple(range(4 * rank, 4 * rank + 4))
    assert recording.visits is not None
    for _ in range(2):
        batch = BatchRecord(own)
        recording.record_batch(batch, call.output, [call])
        recording.visits.add(batch, torch.full((4,), 0.5))
        recording.synchronise()
    columns = recording.columns(range(8))  # without a collective
    return {name: values.tolist() for name, values in columns.items()}


def pairs(rank: int, budget: int | None = None) -> object:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(22, 4), torch.randint(0, 3, (22,)))
    net, source = nn.Linear(4, 3), ExampleSource(data, batch_size=2)
    passes = ExampleGradients(net, _entropy, source, discover(net, _entropy, source))
    curvature = fit(passes, "identity", range(22), examples=FactorExamples(22, 22), labels=("true", "true"))
    found: list[Tensor] = []

    def run() -> None:
        found.append(pairwise_scores(passes, range(22), curvature, passes, [0, 5]).scores)

    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:
            patch.setattr(distributed, "_GATHER_BYTES", budget)
        count = collectives(run)
    return count, found[0]


def factors(rank: int) -> object:
    """Of two layers and of five: collectives, and what came out."""
    found = []
    for depth in (1, 4):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(22, 4).double(), torch.randint(0, 3, (22,)))
        layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
        net, source = nn.Sequential(*layers, nn.Linear(4, 3)).double(), ExampleSource(data, batch_size=4)
        passes = ExampleGradients(net, _entropy, source, discover(net, _entropy, source)).calibrate(range(22))
        fitted: list[Any] = []

        def run(passes: ExampleGradients = passes, fitted: list[Any] = fitted) -> None:
            fitted.append(fit(passes, "ekfac", range(22), examples=FactorExamples(22, 22), labels=("true", "true")))

        found.append((collectives(run), fitted[0].dampings))
    return found


def decompositions(rank: int) -> object:
    """By every kind that decomposes: sizes of what this process has decomposed, and what came out."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 10).double(), torch.randint(0, 3, (60,)))
    layers = [nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    net, source = nn.Sequential(*layers).double(), ExampleSource(data, batch_size=30)
    passes = ExampleGradients(net, _entropy, source, discover(net, _entropy, source)).calibrate(range(60))
    found, eigh = {}, torch.linalg.eigh
    for name in ("kfac", "ekfac", "block_ggn"):
        sizes: list[int] = []

        def counting(matrices: Tensor, sizes: list[int] = sizes) -> Any:
            sizes.append(matrices.shape[-1])
            return eigh(matrices)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", counting)
            fitted = fit(passes, name, range(60), examples=FactorExamples(60, 60), labels=("exact", "exact"))
        dense = {layer: block.to_dense() for layer, block in fitted.blocks.items()}
        found[name] = sizes, dense
    return found


def decomposition_that_fails_on_one_rank(rank: int) -> object:
    def work() -> dict[str, Tensor]:
        if distributed.rank() == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return {"x": torch.zeros(2)}

    try:
        return dict(distributed.dealt([work, work], [1.0, 1.0], torch.device("cpu")))
    except torch.linalg.LinAlgError as error:
        return str(error)


def failing_on_one_rank(rank: int) -> object:
    """One process fails where the other goes on to something else: sums, rows, or the end of the block."""

    def on_one(goes_on: Callable[[], object], failing: int) -> str:
        try:
            with meeting.together(), meeting.together():  # of which the outer one hears nothing new
                if rank == failing:
                    raise KeyError("out of memory, or whatever")
                goes_on()
        except Exception as error:
            return f"{type(error).__name__}: {error}; {error.__cause__}"
        return "nothing"

    def gather() -> object:
        return distributed.gather_by_index(torch.arange(3), {"x": torch.zeros(3)})

    going = (lambda: distributed.sum_across_processes([torch.ones(2)]), gather, lambda: None)
    said = [on_one(each, failing) for failing in (0, 1) for each in going]
    return said, distributed.gather_objects(rank)  # afterwards both are where they were


def from_the_first(rank: int) -> object:
    said = []
    for work in (lambda: f"from {rank}", lambda: 1 // rank):
        try:
            said.append(distributed.from_first(work))
        except ZeroDivisionError as error:
            said.append(str(error))
    return said


def gather_to_one_place(rank: int) -> object:
    """In rounds of two rows; rank 1 holds example 0 again, as padding."""
    indices = torch.tensor([[4, 0, 2], [1, 3, 0, 6]][rank])
    features = torch.stack([indices.float(), torch.full((len(indices),), float(rank))], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_PIECE_BYTES", 2 * 2 * 8)
        return distributed.gather_by_index(indices, {"features": features}, everywhere=False)


def factors_in_parts(rank: int) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_influence.curvature.blocks.block._TOGETHER", 1)
        patch.setattr(distributed, "_GATHER_BYTES", 1)
        return factors(rank)


def pairs_in_rounds(rank: int) -> object:
    return pairs(rank, 4 * 2 * 2 * 8)  # four rows of two queries a process: 4 + 4 + 3


def _entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


STEPS: tuple[Callable[[int], object], ...] = (
    place,
    gather_together,
    epoch_end,
    pairs,
    pairs_in_rounds,
    factors,
    factors_in_parts,
    decompositions,
    decomposition_that_fails_on_one_rank,
    failing_on_one_rank,
    from_the_first,
    gather_to_one_place,
    sums,
    sums_of_different_shapes,
    sums_missing_on_one_rank,
    gather_unequal,
    gather_none_on_one_rank,
    gather_none_anywhere,
    gather_different_dtypes,
    any_flags,
)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    results = {}
    try:
        for step in STEPS:
            try:
                results[step.__name__] = step(rank)
            except (TypeError, ValueError) as error:
                results[step.__name__] = f"{type(error).__name__}: {error}"
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each step returned on rank 0 and on rank 1; an error as its words."""
    folder: Path = tmp_path_factory.mktemp("two_processes")
    together(_process, str(folder), patience=2 * PATIENCE.total_seconds())
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_each_process_has_its_share(both: list[dict[str, Any]]) -> None:
    assert [rank["place"] for rank in both] == [(0, 2, [0, 2, 4]), (1, 2, [1, 3])]


def test_sums_of_two_processes(both: list[dict[str, Any]]) -> None:
    for summed, untouched in (rank["sums"] for rank in both):
        # In float32 the small term is lost; a count beyond 2**53 loses its last digit in float64.
        assert summed[0].tolist() == [1e-12 + (1e-12 + 1), 2.0]
        assert summed[1].item() == 2**61 + 1
        assert torch.equal(summed[2], 2 * torch.arange(6.0).reshape(2, 3).t())
        assert torch.isnan(summed[3]).all()
        assert summed[4].shape == (0, 3)
        assert untouched


@pytest.mark.parametrize("step", ["sums_of_different_shapes", "sums_missing_on_one_rank"])
def test_sums_that_do_not_match_are_refused_everywhere(both: list[dict[str, Any]], step: str) -> None:
    for rank, results in enumerate(both):
        assert "ValueError: sum_across_processes needs the same tensors" in results[step]
        assert f"rank {rank} has" in results[step]


def test_a_set_of_columns_takes_one_gather(both: list[dict[str, Any]]) -> None:
    # The indices, then the rows; before each all say that they have come there.
    assert [rank["gather_together"] for rank in both] == [4, 4]


def test_both_know_what_each_has_seen(both: list[dict[str, Any]]) -> None:
    first, second = (rank["epoch_end"] for rank in both)
    of_first = ("support", "suggested", "prob_margin")  # of mean probabilities, which take memory
    assert {**first, **dict.fromkeys(of_first)} == {**second, **dict.fromkeys(of_first)}
    columns = first
    assert columns["times_seen"] == [2] * 8
    assert columns["label"] == [0, 1, 2, 0] * 2
    assert columns["tracin"] == [1.0] * 8
    logits = torch.arange(12.0).reshape(4, 3).sin()
    labels = torch.tensor([0, 1, 2, 0])
    losses = torch.cat([F.cross_entropy(logits * scale, labels, reduction="none") for scale in (1, 2)])
    torch.testing.assert_close(torch.tensor(columns["loss_mean"]), losses)
    probabilities = torch.cat([(logits * scale).softmax(1) for scale in (1, 2)])
    own, rival = probabilities[range(8), columns["label"]], probabilities.clone()
    rival[range(8), columns["label"]] = 0
    torch.testing.assert_close(torch.tensor(columns["prob_margin"]).float(), own - rival.max(1).values)


def test_pairs_are_gathered_in_as_many_rounds_as_memory_asks_for(both: list[dict[str, Any]]) -> None:
    _, alone = pairs(0)
    for rank in both:
        (once, found), (often, in_rounds) = rank["pairs"], rank["pairs_in_rounds"]
        assert often - once == 2 * 4, "three rounds in place of one, four collectives each"
        assert once <= 7, "however many batches there are"
        assert torch.equal(in_rounds, found)
        torch.testing.assert_close(found, alone)


def test_gather_sorts_and_drops_padding(both: list[dict[str, Any]]) -> None:
    for indices, values in (rank["gather_unequal"] for rank in both):
        assert indices.tolist() == [0, 1, 2, 3, 4, 6]
        assert values["rank"].tolist() == [0, 1, 0, 1, 0, 1]
        assert values["loss"].dtype == torch.float64
        assert values["loss"].nan_to_num(-1).tolist() == [0.5, 1.5, 2.5, -1, 4.5, 6.5]
        assert values["flag"].tolist() == [[False], [False], [False], [True], [True], [True]]


def test_gather_with_nothing_on_one_rank(both: list[dict[str, Any]]) -> None:
    for indices, values in (rank["gather_none_on_one_rank"] for rank in both):
        assert indices.tolist() == [0, 1, 2]
        assert torch.equal(values["x"], torch.ones(3, 2, 2, dtype=torch.float16))


def test_gather_with_nothing_anywhere(both: list[dict[str, Any]]) -> None:
    for indices, values in (rank["gather_none_anywhere"] for rank in both):
        assert indices.shape == (0,)
        assert values["x"].shape == (0, 2)


def test_gather_that_does_not_match_is_refused_everywhere(both: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(both):
        error = results["gather_different_dtypes"]
        assert (
            f"ValueError: gather_by_index needs the same tensors (names, dtypes, shapes) on every rank; rank {rank}"
            in error
        )
        assert ["torch.float32", "torch.int32"][rank] in error


def test_any_process_answers_alike(both: list[dict[str, Any]]) -> None:
    assert [rank["any_flags"] for rank in both] == [[False, True, True, True]] * 2


def test_factors_of_all_layers_travel_together(both: list[dict[str, Any]]) -> None:
    """A handful of collectives, however many layers there are; the same numbers in small parts and alone."""
    (two, of_two), (five, of_five) = both[0]["factors"]
    assert two == five <= 20
    assert both[0]["factors"] == both[1]["factors"]
    (_, parts_of_two), (many, parts_of_five) = both[0]["factors_in_parts"]
    assert many > 3 * five
    alone = factors(0)
    assert isinstance(alone, list)
    for (_, expected), *others in zip(alone, (of_two, of_five), (parts_of_two, parts_of_five), strict=True):
        for other in others:
            assert other == pytest.approx(expected, rel=1e-9)


def test_decompositions_are_dealt_out(both: list[dict[str, Any]]) -> None:
    """Each is made once, the dearest by itself; the curvature is that of one process."""
    alone = decompositions(0)
    assert isinstance(alone, dict)
    for name, (sizes, expected) in alone.items():
        (first, of_first), (second, of_second) = (rank["decompositions"][name] for rank in both)
        assert sorted(first + second) == sorted(sizes), "each of them on one process"
        for layer, matrix in expected.items():
            assert torch.equal(of_first[layer], of_second[layer])
            torch.testing.assert_close(of_first[layer], matrix, rtol=1e-8, atol=1e-12)
    # 11³ is more than the cubes of all others together.
    assert [rank["decompositions"]["ekfac"][0] for rank in both] == [[11], [7, 7, 6, 6, 3]]


def test_a_decomposition_that_fails_fails_everywhere(both: list[dict[str, Any]]) -> None:
    assert [rank["decomposition_that_fails_on_one_rank"] for rank in both] == ["no convergence"] * 2


def test_processes_fail_together(both: list[dict[str, Any]]) -> None:
    own = "KeyError: 'out of memory, or whatever'"
    for rank, results in enumerate(both):
        said, after = results["failing_on_one_rank"]
        causes = [
            None if rank == failing else f"rank {failing} of 2 has failed, and this one with it." for failing in (0, 1)
        ]
        assert said == [f"{own}; {cause}" for cause in causes for _ in range(3)]
        assert after == [0, 1]


def test_what_rank_zero_does_for_all(both: list[dict[str, Any]]) -> None:
    assert [rank["from_the_first"] for rank in both] == [["from 0", "integer division or modulo by zero"]] * 2


def test_gather_to_one_place(both: list[dict[str, Any]]) -> None:
    (indices, of_first), (others, of_second) = (rank["gather_to_one_place"] for rank in both)
    assert indices.tolist() == others.tolist() == [0, 1, 2, 3, 4, 6]
    assert of_first["features"].tolist() == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0], [6, 1]]
    assert of_second["features"].shape == (0, 2)
