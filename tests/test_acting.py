"""Acting on an audit: which examples to keep, the labels to train with, and removal straight from the callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Classifier, loader, make_trainer, vectors
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset
from which_lightning import TensorBoardLogger, pl

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.belief import LabelBeliefs
from lightning_influence.audit.ranking import judged
from lightning_influence.audit.relabel import LabelError
from lightning_influence.audit.unlearning import Unlearner

pytestmark = pytest.mark.usefixtures("unverified")

GIVEN = [0, 1, 2, 1, 0, 2, 1, 0]
REPAIRED = [0, 1, 0, 1, 2, 2, 1, 0]  # other than given for the examples 2 and 4
SUGGESTED = [1, 0, 0, 2, 2, 0, 0, 2]  # the best other class
MARGIN = [0.9, 0.8, -0.2, 0.7, -0.6, 0.5, 0.4, 0.3]
WRONG = [0.01, 0.02, 0.85, 0.03, 0.95, 0.05, 0.1, 0.2]
BELIEFS = LabelBeliefs("told", noise_rate=0.25, low=0.1, high=0.4)


def report(beliefs: LabelBeliefs = BELIEFS, **changes: Any) -> AuditReport:
    columns: dict[str, Any] = {
        "index": np.arange(8),
        "label": np.array(GIVEN),
        "suggested": np.array(SUGGESTED),
        "support": np.array(MARGIN),
        "wrong_probability": np.array(WRONG),
        **changes,
    }
    found, _ = judged({name: value for name, value in columns.items() if value is not None}, beliefs=beliefs)
    return AuditReport(found, {"labels": beliefs.described()})


class Listed(Dataset[Any]):
    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def pairs(labels: list[int] = GIVEN) -> Listed:
    return Listed([(torch.zeros(3) + n / 10, y) for n, y in enumerate(labels)])


class TestAdvice:
    def test_what_is_surer_than_a_level(self) -> None:
        """Candidates by falling probability, as many as are expected to be wrong to that share together."""
        advised = report().advice()
        assert advised.indices == [4, 2]
        assert advised.expected == pytest.approx(1.8)
        assert advised.classes == {0: (3, 1), 2: (2, 1)}
        assert str(advised) == (
            "2 labels are sure enough: about 2 of them are expected to be wrong (90%; asked for: 80%). By class: "
            "0: 1 of 3, 2: 1 of 2."
        )
        assert str(advised) in str(AuditReport(report().columns, report().manifest))
        assert report().advice(0.89).indices == [4, 2]  # .95 and .85
        assert report().advice(0.92).indices == [4]
        assert len(report().advice(1)) == 0
        three = LabelBeliefs("told", noise_rate=0.375, low=0.1, high=0.5)
        assert report(three).advice().indices == [4, 2], "2.0 of three is less than .8"
        assert report(three).advice(0.6).indices == [4, 2, 7]

    def test_by_itself_where_perhaps_no_label_is_wrong(self) -> None:
        """The share of wrong ones among several is a belief that no label may bear out."""
        perhaps = LabelBeliefs("told", noise_rate=0.25, low=0.0, high=0.4)
        assert report(perhaps).advice(0.9).indices == [4]
        assert report(perhaps).advice(0.8).indices == [4, 2]

    def test_no_class_goes_as_a_whole_however_many_labels_are_wrong(self) -> None:
        many = LabelBeliefs("told", noise_rate=0.7, low=0.6, high=0.8)
        advised = report(many, wrong_probability=np.where(np.array(GIVEN) == 1, 0.01, 0.95)).advice()
        assert (sorted(advised.indices), advised.spared) == ([4, 7], {2: 2})

    def test_a_level_of_any_library(self) -> None:
        assert report().advice(np.float32(0.8)).indices == report().advice(0.8).indices

    def test_a_class_of_which_most_would_be_gone_is_spared(self) -> None:
        wrong = np.array([0.9, 0.02, 0.85, 0.03, 0.95, 0.05, 0.1, 0.1])
        support = np.array([-0.5, *MARGIN[1:]])
        rate = LabelBeliefs("told", noise_rate=0.375, low=0.1, high=0.5)  # twice the rate is .75
        assert report(rate, wrong_probability=wrong, support=support).advice().indices == [4, 0, 2]
        rare = LabelBeliefs("told", noise_rate=0.32, low=0.1, high=0.5)  # at most .64; two of three zeros are more
        found = report(rare, wrong_probability=wrong, support=support)
        assert sorted(found.candidates.tolist()) == [0, 2, 4]
        advised = found.advice()
        assert (advised.indices, advised.spared) == ([2], {0: 2})
        assert "Left alone, as most of the class would be gone: 0 (2 examples)." in str(advised)
        assert found.clean_indices() == [0, 1, 3, 4, 5, 6, 7]
        alone = report(
            LabelBeliefs("told", noise_rate=0.25, low=0.1, high=0.5), wrong_probability=wrong, support=support
        )
        assert alone.advice().indices == []
        assert "nothing to act on: most of the classes " in str(alone.advice())

    @pytest.mark.parametrize(
        ("beliefs", "changes", "reason"),
        [
            (LabelBeliefs(reason="the classes overlap", noise_rate=0.1, low=0, high=0.3), {}, "the classes overlap"),
            (BELIEFS, {"wrong_probability": np.full(8, 0.3)}, "no label is sure enough to be wrong"),
            (BELIEFS, {"wrong_probability": np.full(8, np.nan)}, "no label is sure enough to be wrong"),
        ],
    )
    def test_nothing_is_done_and_said_so(self, beliefs: LabelBeliefs, changes: Any, reason: str) -> None:
        """A choice of one's own is done all the same."""
        found = report(beliefs, **changes)
        assert str(found.advice()) == f"nothing to act on: {reason}."
        with pytest.warns(UserWarning, match=f"the data stay as they are: {reason}. `drop=` and `indices=` act"):
            assert found.clean_indices() == list(range(8))
        with pytest.warns(UserWarning, match=f"the data stay as they are: {reason}"):
            assert found.relabelled(pairs()).labels == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert found.clean_indices(2) == [0, 1, 3, 5, 6, 7]
            assert found.relabelled(pairs(), [2, 3]).labels == {2: 0, 3: 2}

    @pytest.mark.parametrize("precision", [0, -0.1, 1.01, float("nan"), True, "0.8", None])
    def test_a_level_that_is_none(self, precision: Any) -> None:
        acting: list[Callable[[], Any]] = [
            lambda: report().advice(precision),
            lambda: report().clean_indices(precision=precision),
            lambda: report().relabelled(pairs(), precision=precision),
        ]
        for act in acting:
            with pytest.raises(ValueError, match=rf"precision={precision!r}; expected a share of right decisions"):
                act()


class TestCleanIndices:
    def test_without_the_candidates(self) -> None:
        assert report().candidates.tolist() == [4, 2]
        kept = report().clean_indices()
        assert kept == [0, 1, 3, 5, 6, 7]
        assert [y for _, y in Subset(pairs(), kept)] == [GIVEN[n] for n in kept]

    @pytest.mark.parametrize(
        ("drop", "left_out"),
        [(0, []), (1, [4]), (np.int64(3), [2, 4, 7]), (0.0, []), (0.25, [2, 4]), (0.3, [2, 4]), (0.5, [2, 4, 6, 7])],
    )
    def test_without_the_most_suspicious(self, drop: Any, left_out: list[int]) -> None:
        assert report().clean_indices(drop=drop) == [n for n in range(8) if n not in left_out]

    def test_a_sample_of_a_data_set(self) -> None:
        """Dataset indices, not rows of the table, which need not be sorted either."""
        sampled = report(index=np.array([70, 10, 20, 30, 40, 50, 60, 0]))
        assert sampled.clean_indices() == [0, 10, 30, 50, 60, 70]

    def test_non_finite_examples_are_never_kept(self) -> None:
        bad = report(finite=np.array([True, False] + [True] * 6))
        assert bad.clean_indices() == [0, 3, 5, 6, 7]
        assert bad.clean_indices(0) == [0, 2, 3, 4, 5, 6, 7]

    @pytest.mark.parametrize("drop", [-1, 8, 1.0, -0.1, float("nan"), True, "5%"])
    def test_out_of_range(self, drop: Any) -> None:
        with pytest.raises(ValueError, match=rf"drop={drop!r}; expected a share from 0 to below 1, a number of exam"):
            report().clean_indices(drop)


SHAPES = {
    "tuple": lambda x, y: (x, y),
    "tensors": lambda x, y: (x, torch.tensor(y)),
    "float targets": lambda x, y: (x, torch.tensor(float(y))),
    "mapping": lambda x, y: {"image": x, "label": y},
    "nested": lambda x, y: {"inputs": [x, 0.5], "meta": {"label": np.int64(y), "source": "scan"}},
}


def label_of(example: Any) -> int:
    while isinstance(example, (dict, tuple)):
        example = example[1] if isinstance(example, tuple) else example.get("meta", example.get("label"))
    return int(example)


class TestRelabelled:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_suggested_labels_on_the_candidates(self, shape: str) -> None:
        data = Listed([SHAPES[shape](x, y) for x, y in pairs().examples])
        repaired = report().relabelled(data)
        assert [label_of(repaired[n]) for n in range(8)] == REPAIRED
        assert [label_of(data[n]) for n in range(8)] == GIVEN
        assert repr(repaired[0]) == repr(data[0])
        loaded = next(iter(DataLoader(repaired, batch_size=8)))
        kept = next(iter(DataLoader(data, batch_size=8)))
        assert type(loaded) is type(kept)

    def test_some_of_them(self) -> None:
        assert report().relabelled(pairs(), [2, 3]).labels == {2: 0, 3: 2}
        assert report().relabelled(pairs(), precision=0.92).labels == {4: 2}
        with pytest.warns(UserWarning, match="the data stay as they are"):
            assert report().relabelled(pairs(), precision=0.97).labels == {}

    def test_random_streams_stay_where_they_are(self) -> None:
        class Augmented(Listed):
            def __getitem__(self, index: int) -> Any:
                x, y = self.examples[index]
                return x + torch.randn(3) + np.random.rand(), y

        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        report().relabelled(Augmented(pairs().examples))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()

    @pytest.mark.parametrize(
        ("data", "arguments", "error", "message"),
        [
            (
                pairs(),
                {"indices": [2, 8]},
                ValueError,
                r"\[8\] are not in the audit; expected distinct .* the 8 audited",
            ),
            (pairs(), {"indices": [2, 2]}, ValueError, "some are named twice"),
            (pairs(), {"indices": [2.5]}, ValueError, "indices must be integers"),
            (
                pairs(GIVEN[:6]),
                {},
                LabelError,
                "has 6 examples, and the audited data set had 8; pass the training data",
            ),
            (pairs(GIVEN[::-1]), {}, LabelError, "no place .*Or is this not the data set that was audited"),
            (
                Listed([(x, str(y)) for x, y in pairs().examples]),
                {},
                LabelError,
                "no place in the examples of Listed holds the known labels as a number",
            ),
        ],
    )
    def test_what_can_not_be_relabelled(self, data: Any, arguments: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            report().relabelled(data, **arguments)

    def test_a_longer_data_set_than_that_of_the_run(self) -> None:
        known = AuditReport(report().columns, report().manifest | {"dataset_size": 8})
        assert known.relabelled(pairs()).labels == {2: 0, 4: 2}
        with pytest.raises(LabelError, match="has 9 examples, and the audited data set had 8"):
            known.relabelled(pairs([*GIVEN, 1]))

    def test_labels_that_have_changed_since(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A few changed labels are beyond the examples that tell where labels lie; the candidates are all looked at."""
        monkeypatch.setattr("lightning_influence.audit.relabel._LOOKED_AT", 3)
        changed = [*GIVEN[:4], 1, *GIVEN[5:]]
        with pytest.raises(LabelError, match="example 4 holds the label 1, and it had 0 when it was audited"):
            report().relabelled(pairs(changed))

    def test_audits_without_suggestions(self) -> None:
        with pytest.raises(LabelError, match=r"the audit suggests no labels: .* with `clean_indices\(\)`"):
            report(suggested=None, label=None, wrong_probability=None).relabelled(pairs(), [2])
        unknown = report(suggested=np.array([-1, *SUGGESTED[1:]]))
        assert unknown.relabelled(pairs()).labels == {2: 0, 4: 2}
        with pytest.raises(LabelError, match=r"knows no label, or suggests none, for the examples \[0\]"):
            unknown.relabelled(pairs(), [0])


# --------------------------------------------------------------------------------------------------- real runs


class Reader(Classifier):
    """Reads digits from mappings, and writes to its logger itself."""

    def __init__(self) -> None:
        super().__init__(features=64, classes=10, optimizer=self._sgd)

    @staticmethod
    def _sgd(module: torch.nn.Module) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["x"]), batch["meta"]["label"])
        self.log("train_loss", loss)
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_scalar("by_hand", loss, self.global_step)
        return loss


@pytest.fixture(scope="module")
def digits() -> tuple[Listed, Tensor, list[int]]:
    """400 digits in nested mappings, their true labels, and which have been flipped."""
    pixels, labels = load_digits(return_X_y=True)
    x, true = torch.from_numpy(pixels[:400]).float() / 16, torch.from_numpy(labels[:400]).long()
    given = true.clone()
    flipped = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40]
    given[flipped] = (given[flipped] + 3) % 10
    examples = [
        {"x": image, "meta": {"label": int(label), "id": f"scan {n}"}}
        for n, (image, label) in enumerate(zip(x, given, strict=True))
    ]
    return Listed(examples), true, sorted(flipped.tolist())


def audited(directory: Path, data: Any, **arguments: Any) -> tuple[InfluenceAudit, Reader, pl.Trainer]:
    pl.seed_everything(0)
    audit, model = InfluenceAudit(tracin=None, **arguments), Reader()
    logger = TensorBoardLogger(directory)
    trainer = make_trainer(directory, callbacks=[audit], max_epochs=12, logger=logger)
    trainer.fit(model, DataLoader(data, batch_size=20, shuffle=True))
    return audit, model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> tuple[InfluenceAudit, Reader, pl.Trainer]:
    return audited(tmp_path_factory.mktemp("run"), digits[0])


def test_from_a_run_to_cleaner_data(run: Any, digits: Any) -> None:
    """Read back from disk; most flips are left out, most labels are repaired, and training goes on with both."""
    data, true, flipped = digits
    found = AuditReport.load(run[0].report.directory)
    kept = found.clean_indices()
    assert len(set(kept) & set(flipped)) <= 8
    assert len(kept) >= 340
    repaired = found.relabelled(data)
    right = sum(int(repaired[n]["meta"]["label"]) == int(true[n]) for n in range(400))
    assert right >= 370  # 360 as given; measured 374
    assert repaired[flipped[0]]["meta"]["id"] == f"scan {flipped[0]}"
    again = make_trainer(Path(run[2].default_root_dir), max_epochs=1)
    again.fit(Reader(), DataLoader(Subset(repaired, kept), batch_size=20))
    assert int(again.callback_metrics["train_loss"].isfinite())


class TestUnlearner:
    def test_removal_after_a_run(self, run: Any, digits: Any) -> None:
        """A removed wrong label is less believed; removing it again at the same weights says the same."""
        audit, model, trainer = run
        data, _, flipped = digits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        stream = torch.get_rng_state()
        unlearner = audit.unlearner()
        update = unlearner.newton_removal(flipped[:3], leverage=True)
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        batch = next(iter(DataLoader(Subset(data, flipped[:3]), batch_size=3)))

        @torch.no_grad()
        def loss(net: Reader) -> float:
            return float(F.cross_entropy(net(batch["x"]), batch["meta"]["label"]))

        assert loss(update.applied_to_copy(model)) > loss(model)
        once_more = unlearner.newton_removal(torch.tensor(flipped[:3]), leverage=True)
        torch.testing.assert_close(once_more.changes["net.1.weight"], update.changes["net.1.weight"])

    def test_it_has_the_plan_and_the_weight_decay_of_the_run(self, run: Any) -> None:
        audit, model, _ = run
        own, other = audit.unlearner("ekfac"), audit.unlearner()
        assert own.curvature.name == "ekfac"
        assert other.curvature.name == "ggn"
        steps = 12 * 20
        for damping in other.curvature.dampings.values():
            assert damping == pytest.approx(1 / (0.1 / (1 - 0.9) * steps) + 1e-3)
        assert own.weight_decay == dict.fromkeys((name for name, _ in model.named_parameters()), 1e-3)
        plain = Unlearner(own.gradients, own.curvature, own.examples)
        assert plain.newton_removal([3]).norm != own.newton_removal([3]).norm

    def test_all_else_is_an_influence(self, run: Any, digits: Any) -> None:
        """The same object as without a Trainer, of what the run knows: its scores, weight decay, labels."""
        audit, _, _ = run
        data, true, flipped = digits
        report, influence = audit.report, audit.influence("ekfac")
        own = influence.self_influence(report.columns["index"].tolist())
        np.testing.assert_allclose(own.numpy(), report.columns["self_influence"], rtol=1e-4)
        assert influence.labels == dict(zip(report.columns["index"], report.columns["label"], strict=True))
        assert influence.top(data, [0, 1], k=3).proponents.shape == (2, 3)
        unlearner = audit.unlearner("ekfac")
        for one, other in (
            (influence.remove(flipped[:3]), unlearner.newton_removal(flipped[:3])),
            (influence.repair(flipped[:3], true[flipped[:3]]), unlearner.label_repair(flipped[:3], true[flipped[:3]])),
        ):
            for name, change in one.changes.items():
                torch.testing.assert_close(change, other.changes[name])
        assert influence.remove([3], weight_decay=0.0).norm != influence.remove([3]).norm

    def test_repair_after_a_run(self, run: Any, digits: Any) -> None:
        audit, model, _ = run
        data, true, flipped = digits
        update = audit.unlearner().label_repair(flipped[:3], true[flipped[:3]])
        batch = next(iter(DataLoader(Subset(data, flipped[:3]), batch_size=3)))
        with torch.no_grad():
            before, after = (
                F.cross_entropy(net(batch["x"]), true[flipped[:3]]) for net in (model, update.applied_to_copy(model))
            )
        assert float(after) < float(before)

    def test_what_training_steps_log_goes_nowhere(self, run: Any) -> None:
        audit, _, trainer = run
        written = sum(len(path.read_bytes()) for path in Path(trainer.log_dir).glob("events*"))
        audit.unlearner().newton_removal([0])
        trainer.logger.experiment.flush()
        assert sum(len(path.read_bytes()) for path in Path(trainer.log_dir).glob("events*")) == written
        assert isinstance(trainer.logger, TensorBoardLogger)

    def test_weights_that_have_changed_since(self, run: Any) -> None:
        audit, model, _ = run
        unlearner = audit.unlearner()
        update = unlearner.newton_removal([0])
        with update.applied(model), pytest.raises(ValueError, match="weights have changed since the curvature was"):
            unlearner.newton_removal([1])
        unlearner.newton_removal([1])  # and are back

    @pytest.mark.parametrize(
        ("indices", "labels", "error", "message"),
        [
            (
                [400],
                [0],
                ValueError,
                r"\[400\] are not among the training examples; expected distinct indices of the 400",
            ),
            ([1, 1], [0, 0], ValueError, "some are named twice"),
            ([1.0], [0], ValueError, r"indices must be integers, got \[1.0\]"),
            (torch.ones(400, dtype=torch.bool), [0], ValueError, r"a mask becomes indices by `np.flatnonzero\(mask\)`"),
            ([1, 2], [0], ValueError, "there are 2 indices and 1 labels; expected a label for each"),
            ([1, 2], {1: 0, 2: 3}, ValueError, "labels is a dict; expected a sequence, a label for each index"),
            ({1: 0}, [0], ValueError, r"indices={1: 0}: the values of a mapping would be ignored"),
            ({1, 2}, [0, 3], ValueError, r"a set has no order; pass `sorted"),
            ([1], [10], LabelError, r"new labels {1: 10} are none that the training data have; expected classes among"),
            ([1], ["3"], LabelError, r"new labels {1: '3'} are none that the training data have"),
            ([1], [2.5], LabelError, r"new labels {1: 2.5} are none"),
            ([1], [3.0], LabelError, r"new labels must be integers, got {1: 3.0}"),
            ([1], torch.tensor([3.0]), LabelError, r"new labels must be integers, got {1: 3.0}"),
        ],
    )
    def test_bad_input(self, run: Any, indices: Any, labels: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            run[0].unlearner("identity").label_repair(indices, labels)

    def test_examples_that_were_not_trained_on(self, tmp_path: Path) -> None:
        audit = InfluenceAudit(curvature="identity", tracin=None)
        chosen = SubsetRandomSampler(range(5, 20))
        make_trainer(tmp_path, callbacks=[audit]).fit(Classifier(), DataLoader(vectors(), batch_size=5, sampler=chosen))
        with pytest.raises(ValueError, match=r"\[21, 3\] are not among the training examples"):
            audit.unlearner().newton_removal([21, 7, 3])

    def test_losses_without_classes(self, tmp_path: Path) -> None:
        audit = InfluenceAudit(curvature="identity", tracin=None)
        data = vectors().tensors
        squares = Classifier(loss=lambda outputs, batch: F.mse_loss(outputs[:, 0], batch[1]), classes=1)
        regression = TensorDataset(data[0], data[0][:, 0])
        make_trainer(tmp_path, callbacks=[audit]).fit(squares, loader(regression))
        assert audit.unlearner().newton_removal([0]).norm > 0
        with pytest.raises(LabelError, match="the given labels are not known"):
            audit.unlearner().label_repair([0], [1])

    def test_there_is_no_audit(self, run: Any) -> None:
        with pytest.raises(RuntimeError, match=r"no complete audit yet; let `trainer.fit` end first"):
            InfluenceAudit().unlearner()
        with pytest.raises(ValueError, match="curvature='newton'"):
            run[0].unlearner("newton")
