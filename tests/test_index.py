"""An index for later questions: exact where all is kept, told how close where not, answered without training data."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Classifier, loader, make_trainer, vectors
from own_processes import together
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_influence import AuditReport, Index, Influence, InfluenceAudit, open_index
from lightning_influence.index import ExampleIndex, IndexWriter, coding, files, search
from lightning_influence.index.coding import projection
from lightning_influence.index.files import ExampleIndexError
from lightning_influence.scores.queries import QueryError

pytestmark = pytest.mark.usefixtures("unverified")

EVERYTHING = Index(numbers=10**9, precision="float32")
Case = tuple[nn.Module, TensorDataset, TensorDataset]


class Texts(nn.Module):
    """Embeddings that are used as the output layer, too."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 3),
    )


def case(name: str, n: int = 40) -> Case:
    torch.manual_seed(3)
    if name == "images":
        model, data = convolutions(), TensorDataset(torch.randn(n + 5, 2, 5, 5), torch.randint(3, (n + 5,)))
    elif name == "vectors":
        model, data = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), vectors(n + 5)
        data = TensorDataset(F.pad(data.tensors[0], (0, 8))[:, :8], data.tensors[1] % 3)
    else:
        data = TensorDataset(torch.randint(12, (n + 5, 4)), torch.randint(12, (n + 5,)))
        model = Texts(tied=name == "tied texts")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0][:n]), data.tensors[1][:n]).backward()
        optimizer.step()
    optimizer.zero_grad()
    train, new = (TensorDataset(*(t[part] for t in data.tensors)) for part in (slice(n), slice(n, None)))
    return model, train, new


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("name", ["images", "vectors", "texts", "tied texts"])
def test_all_of_a_gradient_gives_exact_scores(name: str, curvature: Any, tmp_path: Path) -> None:
    model, train, new = case(name)
    influence = Influence(model, F.cross_entropy, train).fit(curvature)
    index = influence.index(tmp_path / "index", EVERYTHING)
    exact = influence.pairs(new)
    found = index.scores(model, new, loss=F.cross_entropy)
    assert found.examples.tolist() == exact.examples.tolist()
    assert relative_error(found.scores, exact.scores) < 1e-5
    # Plain products of gradients are something else.
    plain = Influence(model, F.cross_entropy, train).fit("identity").pairs(new).scores
    scale = (plain * exact.scores).sum() / plain.square().sum()
    assert relative_error(scale * plain, exact.scores) > 0.05
    assert index.about["trust"]["relative_error"] < 1e-5
    for normalise in ("none", "relative"):
        top = influence.top(new, k=5, normalise=normalise)  # type: ignore[arg-type]
        asked = index.ask(model, new.tensors, 5, loss=F.cross_entropy, normalise=normalise)  # type: ignore[arg-type]
        torch.testing.assert_close(asked.proponent_scores, top.proponent_scores, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(asked.opponent_scores, top.opponent_scores, rtol=1e-3, atol=1e-5)


def test_layers_with_one_position_are_kept_whole_in_few_numbers(tmp_path: Path) -> None:
    model, train, new = case("vectors")
    influence = Influence(model, F.cross_entropy, train).fit()
    index = influence.index(tmp_path / "index", EVERYTHING)
    # (9 + 6) + (7 + 3) in place of 9 · 6 + 7 · 3
    assert index.layout.width == 25
    assert index.about["of"] == 75
    half = influence.index(tmp_path / "half", Index())
    exact = influence.pairs(new).scores
    assert relative_error(half.scores(model, new, loss=F.cross_entropy).scores, exact) < 2e-3


def test_what_is_kept_are_the_strongest_coordinates(tmp_path: Path) -> None:
    model, train, new = case("images")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    index = influence.index(tmp_path / "index", Index(100, "float32"))
    curvature = influence.curvature
    whole = set(index.layout.whole)
    shares = {
        name: (block.eigenvalues / (block.eigenvalues + curvature.dampings[name])).flatten()
        for name, block in curvature.blocks.items()  # type: ignore[attr-defined]
        if name not in whole
    }
    least = min(float(shares[name][flat].min()) for name, flat in index.layout.kept.items())
    left_out = [float(s[~torch.isin(torch.arange(len(s)), index.layout.kept[n])].max()) for n, s in shares.items()]
    assert max(left_out) <= least + 1e-6
    assert index.layout.width <= 100
    exact = influence.pairs(new).scores
    errors = []
    for number, numbers in enumerate((60, 100, 200, 260)):
        some = influence.index(tmp_path / f"{number}", Index(numbers, "float32"))
        errors.append(relative_error(some.scores(model, new, loss=F.cross_entropy).scores, exact))
        assert 0 < some.about["trust"]["relative_error"] < 1
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01 > errors[-1]


def test_half_precision_keeps_gradients_of_any_size(tmp_path: Path) -> None:
    model, train, new = case("images")

    def tiny(module: nn.Module, batch: Any) -> Tensor:
        return 1e-6 * F.cross_entropy(module(batch[0]), batch[1], reduction="none").mean()

    influence = Influence(model, tiny, train).fit("ekfac")
    index = influence.index(tmp_path / "index", Index(10**9))
    exact = influence.pairs(new).scores
    assert relative_error(index.scores(model, new, loss=tiny).scores, exact) < 2e-3


def test_the_projection_keeps_what_rows_have_in_common() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 5)).Q
    rows = torch.randn(30, 5) @ basis.T
    before = torch.get_rng_state()
    columns = projection(rows, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(columns.T @ columns, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close((rows @ columns) @ (rows @ columns).T, rows @ rows.T, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the search


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExampleIndex, nn.Module, TensorDataset, Influence]:
    model, train, new = case("images", 300)
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    return influence.index(tmp_path_factory.mktemp("asked") / "index", Index(200)), model, new, influence


def test_the_search_finds_what_all_rows_give(asked: Any) -> None:
    index, model, new, _ = asked
    # By chance it would be 128 of 300; the search looks at 25 numbers of each.
    for normalise in ("none", "relative"):
        every, found = (
            index.ask(model, new, 5, loss=F.cross_entropy, normalise=normalise, everything=everything)
            for everything in (True, False)
        )
        for side in ("proponents", "opponents"):
            a, b = (getattr(each, side).tolist() for each in (every, found))
            hits = sum(len(set(x) & set(y)) for x, y in zip(a, b, strict=True))
            assert hits >= 0.75 * 5 * len(a)
        assert relative_error(found.proponent_scores[:, 0], every.proponent_scores[:, 0]) < 1e-5


def test_parts_that_are_read_do_not_matter(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index, model, new, _ = asked
    ways = [(index.scores(model, new, loss=F.cross_entropy).scores, [])]
    for everything in (True, False):
        ways[0][1].append(index.ask(model, new, 7, loss=F.cross_entropy, everything=everything))
    # No more than three rows, or a hundred scores, are in memory at a time.
    monkeypatch.setattr(search, "_PART", 3 * index.layout.width)
    monkeypatch.setattr(search, "_SCORES", 100)
    monkeypatch.setattr(search, "_GATHERED", 1)
    monkeypatch.setattr(coding, "_CHUNK", 1)
    assert relative_error(index.scores(model, new, loss=F.cross_entropy).scores, ways[0][0]) < 1e-5
    for before, everything in zip(ways[0][1], (True, False), strict=True):
        now = index.ask(model, new, 7, loss=F.cross_entropy, everything=everything)
        assert torch.equal(now.proponents, before.proponents)
        assert torch.equal(now.opponents, before.opponents)


def test_for_one_query_the_search_is_read_in_parts_too(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was: a kilobyte an example."""
    index, model, new, influence = asked
    arguments = {"loss": influence.training.task, "everything": False, "indices": [1]}
    whole = index.ask(model, new, 5, **arguments)
    read: list[int] = []
    add = search.Best.add
    monkeypatch.setattr(search, "_PART", 4 * index._projection.shape[1])
    monkeypatch.setattr(
        search.Best, "add", lambda self, places, *a, **b: (read.append(len(places)), add(self, places, *a, **b))[1]
    )
    found = index.ask(model, new, 5, **arguments)
    assert torch.equal(found.proponents, whole.proponents)
    assert set(read[:-1]) == {4}
    assert len(read) == -(-len(index) // 4) + 1


def test_few_candidates_are_not_given_twice(asked: Any) -> None:
    index, model, new, _ = asked
    found = index.ask(model, new, 300, loss=F.cross_entropy, everything=False)
    for row in found.proponents.tolist():
        assert sorted(row) == list(range(300))


def test_what_is_told_of_its_trust(asked: Any) -> None:
    index, _, _, _ = asked
    trust = index.about["trust"]
    assert trust["queries"] == 8
    assert 0.5 < trust["correlation"] < 1
    assert 0 < trust["relative_error"] < 1
    assert 0 < trust["strongest_found"] <= 1
    assert "numbers of each example's" in str(index)


def test_examples_that_are_not_finite_are_no_answer(tmp_path: Path) -> None:
    model, train, new = case("images")
    train.tensors[0][7] = torch.nan
    new.tensors[0][1] = torch.inf
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    index = influence.index(tmp_path / "index")
    for everything in (True, False):
        found = index.ask(model, new, 40, loss=F.cross_entropy, everything=everything)
        assert 7 not in found.proponents.tolist()[0]
        assert set(found.proponents[1].tolist()) == {-1}
        assert any("not finite have no scores: 1" in note for note in found.notes)
    own = index.scores(model, new, loss=F.cross_entropy).scores.isnan()
    torch.testing.assert_close(own, influence.pairs(new).scores.isnan())


# ------------------------------------------------------------------------------------------------- who is asked


def test_terms_are_weighed_as_in_training(tmp_path: Path) -> None:
    model, train, new = case("images")
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))
    influence = Influence(model, loss, train).fit("ekfac")
    index = influence.index(tmp_path / "index", EVERYTHING)
    exact = influence.pairs(new).scores
    # A batch of one class would weigh itself otherwise.
    alone = [index.scores(model, new, loss=loss, indices=[place]).scores for place in range(5)]
    assert relative_error(torch.cat(alone), exact) < 1e-5
    # The lines of the loss have moved since.
    path = index.folder / "index.json"
    about = json.loads(path.read_text())
    about["scale"][0][1] = [["elsewhere.py", 1, 2]]
    path.write_text(json.dumps(about))
    again = open_index(index.folder.parent)
    assert relative_error(again.scores(model, new, loss=loss, indices=[2]).scores, exact[2:3]) < 1e-5
    with pytest.raises(ExampleIndexError, match="Pass the model and the loss of then"):
        again.scores(model, new, loss=lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], 3).float()))


def test_a_batch_of_one_and_of_mappings(tmp_path: Path) -> None:
    model, train, new = case("images")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    index = influence.index(tmp_path / "index", EVERYTHING)
    exact = influence.pairs(new).scores
    one = index.scores(model, [new.tensors[0][3:4], new.tensors[1][3:4]], loss=F.cross_entropy).scores
    assert relative_error(one, exact[3:4]) < 1e-5

    def of_mapping(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["y"])

    batch = {"x": new.tensors[0], "y": new.tensors[1], "names": list("abcde")}
    assert relative_error(index.scores(model, batch, loss=of_mapping).scores, exact) < 1e-5


def test_a_frozen_model_is_left_frozen(tmp_path: Path) -> None:
    model, train, new = case("images")
    index = Influence(model, F.cross_entropy, train).fit("ekfac").index(tmp_path / "index")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False).train()
    index.ask(model, new.tensors, 2, loss=F.cross_entropy)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- other orders


class Listed(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def test_examples_are_known_by_what_they_hold(tmp_path: Path) -> None:
    model, train, new = case("images")
    for tensor in train.tensors:
        tensor[9] = tensor[4]  # one that is there twice
    index = Influence(model, F.cross_entropy, train).fit("ekfac").index(tmp_path / "index")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    moved = Listed([train[place] for place in order])
    found = index.places_in(moved)
    by_index = dict(zip(index.examples.tolist(), found.tolist(), strict=True))
    assert sorted(by_index.values()) == list(range(40))
    assert all(order[by_index[k]] == k for k in range(40) if k not in (4, 9))
    assert by_index[4] < by_index[9]
    then, now = (
        index.ask(model, new, 3, loss=F.cross_entropy, within=within).proponents.tolist() for within in (None, moved)
    )
    assert now == [[by_index[k] for k in row] for row in then]
    less = index.places_in(Listed([train[place] for place in range(10, 40)]))
    assert int((less < 0).sum()) == 10
    with pytest.raises(ExampleIndexError, match="none of the 40 training examples is in `within`"):
        index.places_in(new)


def test_an_index_that_does_not_tell_examples(tmp_path: Path) -> None:
    model, train, _ = case("images")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    without = influence.index(tmp_path / "without", Index(hashes=False))
    with pytest.raises(ExampleIndexError, match="made with `Index\\(hashes=False\\)`"):
        without.places_in(train)


# ------------------------------------------------------------------------------------------------- refusals


def test_what_can_not_be_answered_is_refused(tmp_path: Path) -> None:
    model, train, new = case("images")
    index = Influence(model, F.cross_entropy, train).fit("ekfac").index(tmp_path / "index")

    def ask(of: nn.Module = model, batch: Any = new.tensors, k: int = 3, **arguments: Any) -> Any:
        return index.ask(of, batch, k, loss=F.cross_entropy, **arguments)

    with pytest.raises(ValueError, match="k=41; expected at most 40"):
        ask(k=41)
    with pytest.raises(ValueError, match="k=0"):
        ask(k=0)
    with pytest.raises(ValueError, match="normalise='cosine'"):
        ask(normalise="cosine")
    with pytest.raises(RuntimeError, match="holds no example"):
        ask(batch=[])
    with pytest.raises(RuntimeError, match="holds no example"):
        ask(batch=(torch.zeros(0, 2, 5, 5), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="has no example \\[7\\]"):
        ask(indices=[7])
    with pytest.raises(ValueError, match="fitted at other weights of '0'"):
        ask(convolutions())
    with pytest.raises(ValueError, match=r"has no \['2\.weight', '2\.bias', '5\.weight'\]"):
        ask(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)))
    wider = convolutions()
    wider[5] = nn.Linear(27, 4)
    with pytest.raises(ValueError, match=r"other layers than the index is about \(5: \[1, 3, 28\], now \[1, 4, 28\]"):
        ask(wider)
    with pytest.raises(QueryError, match="can't be run on them"):
        ask(batch=(torch.zeros(2, 7), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(TypeError, match="has no `training_step`"):
        index.ask(model, new)


@pytest.mark.parametrize("curvature", ["identity", "block_ggn", "ggn", "hessian"])
def test_curvatures_without_an_index_are_refused(curvature: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eigenbasis of 'diagonal', 'kfac', 'ekfac'"):
        InfluenceAudit(curvature=curvature, index=True)
    model, train, _ = case("vectors", 12)
    influence = Influence(model, F.cross_entropy, train).fit(curvature, damping=10.0)
    with pytest.raises(ValueError, match="an index can't be made with curvature="):
        influence.index(tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Index(numbers=0), "numbers=0"),
        (lambda: Index(precision="bfloat16"), "precision='bfloat16'"),  # type: ignore[arg-type]
        (lambda: Index(hashes=1), "hashes=1"),  # type: ignore[arg-type]
        (lambda: InfluenceAudit(index="yes"), "index='yes'; expected True, False, or Index"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_are_none(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_directory_without_an_index(tmp_path: Path) -> None:
    model, train, _ = case("vectors")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    path = influence.save(tmp_path / "saved")
    with pytest.raises(ExampleIndexError, match="holds no index: make the audit with `InfluenceAudit\\(index=True\\)`"):
        open_index(path)
    index = influence.index(tmp_path / "index")
    other = influence.index(tmp_path / "other", Index(20))
    (index.folder / "rows-0.npy").write_bytes((other.folder / "rows-0.npy").read_bytes())
    with pytest.raises(ExampleIndexError, match="do not belong together: make the index again"):
        open_index(index.folder.parent)
    for damaged in (b"nothing", b""):
        (index.folder / "rows-0.npy").write_bytes(damaged)
        with pytest.raises(ExampleIndexError, match="Make the index again"):
            open_index(index.folder.parent)


def test_a_disk_without_room_is_refused_before_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, _ = case("vectors")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExampleIndexError, match=r"an index takes .* kB on disk, and 1 kB are free"):
        influence.index(tmp_path / "index")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room can't be taken before it is written to")
def test_a_disk_that_fills_up_is_noticed_before_mapped_memory_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, train, _ = case("vectors")
    influence = Influence(model, F.cross_entropy, train).fit("ekfac")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExampleIndexError, match=r"No space left.*numbers="):
        influence.index(tmp_path / "index")
    assert not [path for path in (tmp_path / "index").iterdir() if "index" in path.name]


# ------------------------------------------------------------------------------------------------- in an audit


def test_an_audit_answers_in_another_process(tmp_path: Path) -> None:
    audit = InfluenceAudit(index=EVERYTHING, tracin=None, queries=loader(vectors(3, seed=9)))
    torch.manual_seed(0)
    model = Classifier()
    trainer = make_trainer(tmp_path, callbacks=[audit])
    trainer.fit(model, loader(vectors()))
    assert any(note.startswith("index: ") for note in audit.report.manifest["notes"])
    new = vectors(3, seed=9)
    loaded, other = AuditReport.load(audit.report.directory or ""), Classifier()
    other.load_state_dict(model.state_dict())
    found = loaded.ask(other, new.tensors, 22)
    assert torch.equal(found.proponents, audit.report.ask(model, loader(new), 22).proponents)
    # The lists of the audit itself.
    pairs = audit.report.pairs
    assert pairs is not None
    of_audit = {
        (int(q), int(i)): float(s) for q, i, s in zip(pairs["query"], pairs["index"], pairs["score"], strict=True)
    }
    scores = loaded.index.scores(other, new.tensors).scores
    for (query, index), score in of_audit.items():
        assert float(scores[query, index]) == pytest.approx(score, rel=1e-4, abs=1e-6)


def test_answers_are_kept_among_the_queries(tmp_path: Path) -> None:
    audit = InfluenceAudit(index=EVERYTHING, queries=loader(vectors(3, seed=9)))
    model, new = Classifier(), vectors(4, seed=8)
    make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(vectors()))
    report = audit.report
    assert report.directory is not None
    found = report.ask(model, new.tensors, 5, keep=True)
    assert found.told["label"].tolist() == new.tensors[1].tolist()
    report.ask(model, new.tensors, 5, normalise="relative", indices=[2], keep=True)
    before, after = report.pairs, AuditReport.load(report.directory).pairs
    assert before is not None
    assert after is not None
    assert before.keys() == after.keys()
    rows = len(before["index"])
    for name in before:
        np.testing.assert_array_equal(after[name][:rows], before[name])
    own = {name: values[rows:] for name, values in after.items()}
    first = (own["query_set"] == 1) & (own["query"] == 0) & (own["kind"] == "proponent")
    positive = int((found.proponent_scores[0] > 0).sum())
    assert own["index"][first].tolist() == found.proponents[0, :positive].tolist()
    assert own["score"][first].tolist() == pytest.approx(found.proponent_scores[0, :positive].tolist())
    assert set(own["list"][own["query_set"] == 2]) == {"specific"}
    # Specific scores are kept as scores, what they are ordered by beside them.
    specific = (own["query_set"] == 2) & (own["kind"] == "proponent")
    assert (np.diff(own["relative"][specific]) <= 1e-9).all()
    page = json.loads((report.directory / "audit.json").read_text())
    assert len(page["pairs"]) == len(after["index"])
    assert [row["index"] for row in page["pairs"]] == after["index"].tolist()
    assert page["query_texts"]["1/3"] == "asked later: example 3 of its batch"


def test_the_page_tells_how_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = InfluenceAudit(index=EVERYTHING)
    model, new = Classifier(), vectors(4, seed=8)
    make_trainer(tmp_path, callbacks=[audit]).fit(model, loader(vectors()))
    directory = audit.report.directory
    assert directory is not None
    lines = json.loads((directory / "audit.json").read_text())["ask"]
    assert len(lines.splitlines()) == 3
    capsys.readouterr()
    exec(lines, {"model": model, "batch": new.tensors})  # as somebody does who has copied them
    assert capsys.readouterr().out.strip() == str(audit.report.ask(model, new.tensors, k=10))


def test_an_index_changes_no_number_of_the_audit(tmp_path: Path) -> None:
    reports = []
    for index in (False, True):
        torch.manual_seed(0)
        audit, model = InfluenceAudit(index=index), Classifier()
        make_trainer(tmp_path / str(index), callbacks=[audit]).fit(model, loader(vectors(), shuffle=True))
        reports.append((audit.report, model.state_dict(), audit.state_key))
    (a, before, key), (b, after, same) = reports
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert a.columns.keys() == b.columns.keys()
    for name in a.columns:
        np.testing.assert_array_equal(a.columns[name], b.columns[name])
    assert key == same
    with pytest.raises(ExampleIndexError, match="holds no index"):
        a.ask(Classifier(), vectors().tensors)


def test_an_audit_is_not_lost_to_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: IndexWriter) -> dict[str, Any]:
        raise OSError("the disk is full")

    monkeypatch.setattr(IndexWriter, "finish", full)
    audit = InfluenceAudit(index=True)
    with pytest.warns(UserWarning, match="no index: OSError: the disk is full"):
        make_trainer(tmp_path, callbacks=[audit]).fit(Classifier(), loader(vectors()))
    assert audit.report.status == "complete"
    assert "no index: OSError: the disk is full" in audit.report.manifest["notes"]
    assert audit.report.directory is not None
    assert not [path for path in audit.report.directory.iterdir() if "index" in path.name]


# ------------------------------------------------------------------------------------------------- two processes


def _write(rank: int, port: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model, train, _ = case("images", 41)
    Influence(model, F.cross_entropy, train).fit("ekfac").index(f"{folder}/two", Index(200, "float32"))
    dist.destroy_process_group()


def test_two_processes_write_the_index_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(_write, port, str(tmp_path))
    model, train, new = case("images", 41)
    one = Influence(model, F.cross_entropy, train).fit("ekfac").index(tmp_path / "one", Index(200, "float32"))
    two = open_index(tmp_path / "two")
    assert two.about["sizes"] == [21, 20]
    a, b = (each.scores(model, new, loss=F.cross_entropy).scores for each in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for everything in (True, False):
        found = two.ask(model, new, 4, loss=F.cross_entropy, everything=everything)
        assert torch.equal(found.proponents, one.ask(model, new, 4, loss=F.cross_entropy).proponents)
    order = torch.arange(40, -1, -1)
    assert torch.equal(two.places_in(TensorDataset(*(t[order] for t in train.tensors))), 40 - two.examples)
