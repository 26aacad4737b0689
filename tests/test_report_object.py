"""The report in a notebook or a script: one example, the health of the labels, a data frame, figures, HTML."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Classifier, loader, make_trainer, vectors

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.audit.columns import COLUMNS
from lightning_influence.audit.ranking import rank

SIZE = 40
HOSTILE = "<script>alert('x')</script> & \"quoted\" $x^2$ \u202e"


def report(manifest: dict[str, Any] | None = None, **changes: Any) -> AuditReport:
    """Examples 100, 102, ...; the first ten have the wrong label 0 for 1, the more suspicious the earlier."""
    label = np.repeat([0, 1, 2], [20, 10, 10])
    wrong = np.arange(SIZE) < 10
    columns: dict[str, Any] = {
        "index": 100 + 2 * np.arange(SIZE),
        "label": label,
        "suggested": np.where(wrong, 1, (label + 1) % 3),
        "prob_margin": np.linspace(-0.9, 0.9, SIZE),
        "wrong_probability": np.where(wrong, 0.8, 0.1),
        **changes,
    }
    ranked = rank({name: values for name, values in columns.items() if values is not None})
    return AuditReport({**ranked, "candidate": changes.get("candidate", wrong)}, manifest or {})


LABELS = {
    "verdict": "told",
    "reason": "",
    "noise_rate": 0.25,
    "noise_rate_low": 0.2,
    "noise_rate_high": 0.3,
    "classes": [0, 1, 2],
    "joint": [[11.5, 7.5, 1.0], [0.5, 9.5, 0.0], [0.0, 0.0, 10.0]],
}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> AuditReport:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    audit = InfluenceAudit(queries=loader(vectors()))
    trainer = make_trainer(folder, callbacks=[audit], max_epochs=2)
    trainer.fit(Classifier(), loader(vectors()))
    assert audit.has_report
    return AuditReport.load(audit.report.directory)  # type: ignore[arg-type]


class TestOneExample:
    def test_it_is_found_by_its_index_in_the_data_set(self) -> None:
        found = report()[104]
        assert found.index == found["index"] == 104
        assert (found.label, found.suggested, found.rank, found.wrong_probability) == (0, 1, 3, 0.8)
        assert report()[np.int64(104)].values == report()[torch.tensor(104)].values == found.values
        # 37 of the other 39 are less suspicious, by either column.
        assert found.percentiles["prob_margin"] == found.percentiles["suspicion"] == 37 / 39
        assert not {"index", "label", "rank"} & found.percentiles.keys()
        assert all(type(value) in (int, float, bool) for value in found.values.values())

    def test_it_says_what_its_columns_mean(self) -> None:
        lines = repr(report({"label_names": ["ant", "bee", HOSTILE]})[104]).splitlines()
        assert lines[:2] == [
            "Example 104, rank 3 of 40, a candidate",
            "  given ant, suggested bee; the label is wrong with a probability of 80%",
        ]
        line = next(line for line in lines if line.split()[0] == "prob_margin")
        assert line.split()[1:3] == ["-0.808", "94.9%"]
        assert line.endswith(COLUMNS["prob_margin"].description)
        assert "\u202e" not in repr(report({"label_names": ["ant", "bee", HOSTILE]})[178])

    def test_where_little_is_known(self) -> None:
        bare = AuditReport(rank({"index": np.arange(3), "loss": np.array([np.nan, 1.0, 2.0])}))[0]
        assert (bare.label, bare.suggested) == (-1, -1)
        assert np.isnan(bare.wrong_probability)
        assert str(bare).splitlines()[0] == "Example 0, rank 2 of 3"  # of an unknown loss: the mean
        assert "given" not in str(bare)

    def test_an_id_or_a_text_of_columns_that_hold_them(self) -> None:
        ids = np.array([f"scan {n}.png" for n in range(SIZE)], dtype=object)
        named = report(id=ids, text=np.array(["so\nso"] * SIZE, dtype=object))
        assert named["scan 2.png"].index == 104
        assert str(named[104]).startswith("Example 104 (scan 2.png), rank 3 of 40")
        assert str(named[104]).splitlines()[2] == "  so so"
        with pytest.raises(KeyError, match="no example with the id 'scan 2'"):
            named["scan 2"]

    @pytest.mark.parametrize(
        ("index", "error", "message"),
        [
            (101, KeyError, "the audit has no example 101; it holds 40 examples from 100 to 178"),
            (-1, KeyError, r"no example -1 \(a dataset index does not count from the end\)"),
            (slice(0, 5), TypeError, r"report\[slice\(0, 5, None\)\]: expected one dataset index, .*to_pandas\(\).loc"),
            ([104], TypeError, r"report\[\[104\]\]: expected one dataset index"),
            (104.0, TypeError, r"report\[104.0\]: expected one"),
            (True, TypeError, r"report\[True\]: expected one"),
            (np.True_, TypeError, r"expected one dataset index"),
            ("scan", TypeError, r"report\['scan'\]: expected one dataset index"),
        ],
    )
    def test_other_indices(self, index: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            report()[index]

    def test_a_report_is_no_sequence(self) -> None:
        """By ``__getitem__`` alone Python would count from 0 until an example is missing."""
        with pytest.raises(TypeError, match="not iterable"):
            iter(report())  # type: ignore[call-overload]

    def test_its_pairs(self, audited: AuditReport) -> None:
        assert audited.pairs is not None
        index = int(audited.pairs["index"][0])
        pairs = audited[index].pairs
        assert len(pairs) == int((audited.pairs["index"] == index).sum()) > 0
        assert all(pair["index"] == index for pair in pairs)
        first = pairs[0]
        told = f"  {first['kind']} {first['rank']} of query {first['number']}, example {first['query']} of set 0: "
        assert f"{told}{first['score']:+.3g}" in str(audited[index]).splitlines()


class TestHealth:
    def test_of_what_was_told(self) -> None:
        found = report({"labels": LABELS}).health()
        assert (found.verdict, found.noise_rate, found.noise_interval) == ("told", 0.25, (0.2, 0.3))
        assert found.classes == {
            0: {"examples": 20, "wrong": 8.5},
            1: {"examples": 10, "wrong": 0.5},
            2: {"examples": 10, "wrong": 0.0},
        }
        assert found.overlaps == {(0, 1): 8.0, (0, 2): 1.0}
        assert (found.inspect, found.expected) == (10, pytest.approx(8.0))
        assert str(found).splitlines() == [
            "Health of the labels of 40 examples",
            "  wrong       25.0% of the labels (20.0% to 30.0%), about 10, mistakes that the network shares not "
            "counted",
            "  inspect     the first 10 of the ranking; about 8 of them are wrong (80%)",
            "  by class    0 42.5% of 20, 1 5.0% of 10",
            "  overlap     labels that are one and may be the other: 0 and 1 8, 0 and 2 1",
        ]
        told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert told["classes"][0] == {"class": 0, "examples": 20, "wrong": 8.5}
        assert told["overlaps"][0] == {"classes": [0, 1], "labels": 8.0}

    def test_without_a_joint_the_examples_tell(self) -> None:
        """With many classes there is none."""
        found = report({"labels": {**LABELS, "joint": None}}).health()
        assert found.classes[0]["wrong"] == pytest.approx(10 * 0.8 + 10 * 0.1)
        assert found.overlaps == pytest.approx({(0, 1): 9.0, (0, 2): 1.0, (1, 2): 1.0})

    def test_what_can_not_be_told(self) -> None:
        refused = {**LABELS, "verdict": "cannot tell", "reason": "the classes overlap"}
        found = report({"labels": refused}).health()
        assert np.isnan(found.noise_rate)
        assert str(found).splitlines()[1:3] == [
            "  wrong       cannot tell: the classes overlap",
            "  inspect     the first 40 of the ranking; how many of them are wrong is not known; go on while many are",
        ]
        assert found.as_dict()["noise_rate"] is None
        assert json.dumps(found.as_dict(), allow_nan=False)

    def test_audits_that_have_no_estimate(self, audited: AuditReport) -> None:
        old = AuditReport({k: v for k, v in report().columns.items() if k != "wrong_probability"})
        assert "cannot tell: no estimate was made" in str(old.health())
        assert old.health().overlaps == {(0, 1): 10.0}
        bare = AuditReport(rank({"index": np.arange(3), "loss": np.array([np.nan, 1.0, 2.0])}))
        assert "cannot tell: an example has no single class" in str(bare.health())
        assert (bare.health().inspect, bare.health().classes) == (3, {})
        assert len(audited.health().classes) == len(set(audited.columns["label"]))

    def test_clean_labels_and_broken_examples(self) -> None:
        clean = report({"labels": {**LABELS, "noise_rate": 0.0, "joint": None}}, wrong_probability=np.full(SIZE, 0.02))
        assert "  inspect     nothing: no label is wrong with a probability of 25%" in str(clean.health()).splitlines()
        broken = report(finite=np.arange(SIZE) > 2)
        assert broken.health().nonfinite == 3
        assert "  non-finite  3 examples: look at their inputs first" in str(broken.health()).splitlines()


class TestDataFrame:
    def test_by_dataset_index(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = report().to_pandas()
        assert isinstance(frame, pandas.DataFrame)
        assert frame.index.name == "index"
        assert set(frame.columns) == set(report().columns) - {"index"}
        assert frame.loc[104, "wrong_probability"] == 0.8
        assert frame["label"].dtype == report().columns["label"].dtype

    def test_it_can_be_reviewed(self, tmp_path: Path) -> None:
        pytest.importorskip("pandas")
        frame = report().to_pandas().sort_values("rank").head(3)
        frame["decision"] = ["keep", "accept", None]
        frame.to_csv(tmp_path / "review.csv", sep=";", decimal=",")
        for source in (frame, tmp_path / "review.csv"):
            review = report().apply_review(source)
            assert (review.labels, review.kept, review.undecided) == ({102: 1}, (100,), (104,))


class Tags(HTMLParser):
    """Which tags there are, whether each is closed, and what can be read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestHTML:
    def test_it_stands_alone_and_everything_is_escaped(self) -> None:
        hostile = {
            "labels": {**LABELS, "verdict": "no", "reason": HOSTILE},
            "label_names": ["ant", HOSTILE, "cat"],
            "notes": [HOSTILE],
        }
        ids = np.array([HOSTILE] * SIZE, dtype=object)
        found = Tags(report(hostile, id=ids, text=ids)._repr_html_())
        assert found.open == []
        known = "div style b dl dt dd table thead tbody tr th td details summary pre"
        assert set(found.seen) <= set(known.split())
        assert {name for name, _ in found.attributes} <= {"class", "title"}
        assert found.text.count("<script>alert") >= 12  # ten candidates, the reason, the note: as text
        assert "url(" not in found.text

    def test_what_is_in_it(self, audited: AuditReport) -> None:
        found = Tags(report({"labels": LABELS})._repr_html_())
        assert found.seen.count("tr") == 11
        assert "wrong_probability" in found.text
        many = Tags(report(candidate=np.arange(SIZE) < 30)._repr_html_())
        assert "and 20 candidates more" in many.text
        assert "table" not in Tags(report(candidate=np.zeros(SIZE, dtype=bool))._repr_html_()).seen
        assert repr(audited) in Tags(audited._repr_html_()).text
        assert len(audited._repr_html_()) < 20_000


class TestFigures:
    @pytest.fixture(autouse=True)
    def _matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_suspicion_by_class(self) -> None:
        figure = report({"label_names": ["ant", "bee $", "cat"]}).plot()
        titles = [axis.get_title() for axis in figure.axes]
        assert titles == ["class ant: 10 of 20", "class bee $: 0 of 10", "class cat: 0 of 10"]
        drawn = [sum(patch.get_height() for patch in axis.patches) for axis in figure.axes]
        assert drawn == [20, 10, 10]
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert pickle.loads(pickle.dumps(figure)).axes[0].get_title() == titles[0]

    def test_many_classes_and_none(self) -> None:
        labels = np.arange(SIZE) % 20
        assert len(report(label=labels, suggested=labels).plot().axes) == 12
        bare = rank({"index": np.arange(3), "loss": np.array([np.nan, 1.0, 2.0])})
        bare["candidate"] = bare["rank"] == 1
        assert [axis.get_title() for axis in AuditReport(bare).plot().axes] == ["all examples: 1 of 3"]

    def test_classes(self) -> None:
        figure = report({"labels": LABELS}).plot("classes")
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[0, 7.5, 1], [0.5, 0, 0], [0, 0, 0]])
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
        several = np.arange(SIZE)
        other = report(label=several, suggested=(several + 1) % SIZE, candidate=several >= 0).plot("classes")
        assert other.axes[0].images[0].get_array().shape == (30, 30)

    def test_an_example(self) -> None:
        figure = report().plot(index=104)
        marked = {axis.get_title(): axis.lines[0].get_xdata()[0] for axis in figure.axes}
        assert marked["suspicion"] == report()[104]["suspicion"]
        assert marked["prob_margin (low = suspicious)"] == report()[104]["prob_margin"]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"what": "loss"},
                ValueError,
                r"plot\('loss'\): expected one of 'suspicion', 'classes', 'curves', or an index alone",
            ),
            ({"what": "classes", "index": 104}, ValueError, r"plot\('classes', index=104\): expected one of"),
            ({"index": 3}, KeyError, "no example 3"),
            ({"what": 104}, ValueError, r"plot\(104\): expected one of .* `plot\(index=17\)`"),
        ],
    )
    def test_other_plots(self, arguments: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            report().plot(**arguments)

    def test_nothing_to_be_seen(self) -> None:
        nothing = AuditReport(rank({"index": np.arange(3), "loss": np.full(3, np.nan)}))
        for arguments in ({}, {"what": "classes"}, {"index": 1}):
            with pytest.raises(ValueError, match="there is nothing to plot"):
                nothing.plot(**arguments)  # type: ignore[arg-type]

    def test_pyplot_is_left_alone(self) -> None:
        source = """
import sys, numpy as np
from lightning_influence import AuditReport
from lightning_influence.audit.ranking import rank
report = AuditReport(rank({"index": np.arange(3), "loss": np.arange(3.0)}))
report._repr_html_(), report.health(), report[1]
assert "matplotlib" not in sys.modules and "pandas" not in sys.modules
report.plot()._repr_png_()
assert "matplotlib.pyplot" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs pandas: `pip install pandas`. Without it, `report.columns` are the"):
        report().to_pandas()
    with pytest.raises(ImportError, match=r"needs matplotlib: `pip install matplotlib`. Without it, `report.to_pandas"):
        report().plot()
