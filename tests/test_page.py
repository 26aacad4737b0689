"""The documents that the page gets, the files that it is made of, and the page as one file."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_data import HOSTILE, picture, report_of

from lightning_influence.audit.curves import Curves
from lightning_influence.page import one_file, static_files
from lightning_influence.page.document import document, files, shown_indices
from lightning_influence.page.embedding import Embedded

TYPES = {"float": "<f4", "int": "<i4", "bool": "u1"}


def values_of(about: dict[str, Any]) -> np.ndarray[Any, Any]:
    if about["kind"] == "text":
        return np.asarray(about["data"])
    return np.frombuffer(base64.b64decode(about["data"]), TYPES[about["kind"]])


def read(report: Any, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files(report, **more)["audit.json"], parse_constant=pytest.fail)
    return found


# ------------------------------------------------------------------------------------------------ the documents


def test_columns_come_back_in_the_order_of_their_indices() -> None:
    report = report_of(50)
    mixed = np.random.default_rng(3).permutation(50)
    shuffled = replace(report, columns={name: values[mixed] for name, values in report.columns.items()})
    for each in (report, shuffled):
        found = {about["name"]: about for about in read(replace(each, curves=Curves()))["columns"]}
        assert list(found)[:2] == ["rank", "index"]
        assert found.keys() == report.columns.keys()
        for name, values in report.columns.items():
            np.testing.assert_array_equal(values_of(found[name]), values.astype(TYPES[found[name]["kind"]]))
        assert found["prob_margin"]["direction"] == "low"
        assert found["self_influence"]["meaning"].startswith("score on itself")


def test_numbers_that_are_none_and_large_ones() -> None:
    report = report_of(20)
    odd = np.arange(20, dtype=np.float64)
    odd[:4] = np.nan, np.inf, -np.inf, 1e300
    report = replace(report, columns={**report.columns, "odd": odd}, manifest={**report.manifest, "notes": [np.nan]})
    report = replace(report, manifest={**report.manifest, "labels": {"noise_rate": float("nan"), "joint": None}})
    found = read(report)
    assert found["labels"]["noise_rate"] is None
    odd = values_of(next(about for about in found["columns"] if about["name"] == "odd"))
    assert np.isnan(odd[0])
    assert np.isposinf(odd[1])
    assert np.isneginf(odd[2])
    assert odd[3] == np.finfo(np.float32).max


def test_ids_and_texts() -> None:
    report = report_of(12)
    text = np.array(["", HOSTILE, *[""] * 10], dtype=object)
    ids = np.array([f"a/{k}\ud800" for k in range(12)], dtype=object)  # a lone surrogate, as of a damaged file name
    found = read(replace(report, columns={**report.columns, "text": text, "id": ids}), texts={3: "another"})
    assert found["texts"] == {"1": HOSTILE, "3": "another"}
    assert "text" not in {about["name"] for about in found["columns"]}
    assert next(about for about in found["columns"] if about["name"] == "id")["data"][0] == "a/0?"


def test_ten_thousand_rows_are_less_than_two_megabytes() -> None:
    report = report_of(10_000)
    more = {f"column_{k}": np.random.default_rng(k).normal(size=10_000) for k in range(14)}
    many = Curves(range(12), {name: np.ones((10_000, 12), np.float32) for name in ("loss", "margin", "probability")})
    report = replace(report, columns={**report.columns, **more}, curves=many)
    content = files(report)["audit.json"]
    assert len(content) < 2_000_000
    rows = json.loads(content)["curves"]["rows"]
    assert set(np.flatnonzero(report.columns["candidate"])) <= set(rows)  # whose curves are left out: nobody's at hand
    assert rows == sorted(set(rows))
    wanted = np.flatnonzero(np.isin(report.columns["index"], report.pairs["index"]))
    assert set(wanted) <= set(rows)


def test_curves_and_their_histograms() -> None:
    report = report_of(40)
    found = read(report)
    assert found["curves"]["rows"] == "all"
    assert (found["curves"]["p_given"], found["curves"]["p_suggested"]) == ("probability", None)
    loss = np.frombuffer(base64.b64decode(found["curves"]["data"]["loss"]), "<f4").reshape(40, 5)
    np.testing.assert_array_equal(loss, report.curves["loss"])
    last = [each for each in found["histories"] if each["column"] == "loss"][-1]
    assert last["epoch"] == 4
    assert sum(last["counts"]) == 40
    assert sum(last["candidates"]) == 4


def test_the_curve_of_the_suggested_label() -> None:
    report = report_of(40)
    rival = report.columns["suggested"][:, None] + np.float32(0.25) * np.ones((40, 5), np.float32)
    rival[7] = np.where(report.columns["suggested"][7] == 0, 1.5, 0.5)  # another class was likelier there
    kept = {epoch: {"rival": torch.full((60,), torch.nan)} for epoch in range(5)}
    for epoch, curves in kept.items():
        curves["rival"][report.columns["index"]] = torch.from_numpy(rival[:, epoch]).float()
    curves = Curves.of(kept, report.columns)
    assert list(curves) == ["suggested_probability"]
    found = read(replace(report, curves=curves))["curves"]
    assert (found["p_given"], found["p_suggested"]) == (None, "suggested_probability")
    values = np.frombuffer(base64.b64decode(found["data"][found["p_suggested"]]), "<f4").reshape(40, 5)
    expected = np.full((40, 5), 0.25, np.float32)
    expected[7] = np.nan
    np.testing.assert_array_equal(values, expected)


def test_an_audit_without_candidates_pairs_and_curves() -> None:
    report = report_of(5, labelled=False)
    bare = {name: report.columns[name] for name in ("index", "rank", "candidate", "finite")}
    bare["candidate"] = np.zeros(5, dtype=bool)
    report = replace(report, columns=bare, pairs=None, curves=Curves(), manifest={"status": "recording"})
    found = read(report, epochs=(2, 8))
    assert (found["curves"], found["histories"], found["pairs"]) == (None, None, [])
    assert (found["status"], found["epochs_done"], found["epochs_planned"]) == ("recording", 2, 8)
    assert [card["title"] for card in found["cards"]] == ["examples"]


@pytest.mark.parametrize("status", ["recording", "interrupted"])
def test_candidates_are_not_counted_before_there_can_be_any(status: str) -> None:
    """It said 0, as of an audit that has found none."""
    cards = document(report_of(80, status=status))["cards"]
    assert "candidates" not in {card["title"] for card in cards}


def test_cards_say_what_is_known() -> None:
    manifest = {
        "labels": {"verdict": "cannot tell", "reason": "the run was too short"},
        "seconds": {"scores": 90.0, "factors": 4.0, "unknown": None},
        "damping_sweep": {"factors": [0.1, 10], "stability": [0.9, 0.7], "overlap": [1, 1], "examples": 64},
        "curvature": {"name": "ekfac"},
        "audited_weights": {"told": "the best checkpoint"},
        "step": 1200,
    }
    cards = {card["title"]: (card["value"], card["note"]) for card in document(report_of(100, **manifest))["cards"]}
    assert cards["wrong labels"] == ("can't tell", "the run was too short")
    assert cards["cost"] == ("1.6 min", "scores 1.5 min, factors 4.0 s")
    assert cards["damping stability"][0] == "0.700"
    assert cards["curvature"][0] == "EK-FAC"
    assert cards["weights audited"] == ("step 1,200", "the best checkpoint")
    manifest["audited_weights"] = {"told": "those at the end of training, step 1,200, averaged by EMA"}
    told = {card["title"]: card["note"] for card in document(report_of(100, **manifest))["cards"]}
    assert told["weights audited"] == "those at the end of training, averaged by EMA"


def test_pictures_are_found_where_the_document_says() -> None:
    report = report_of(60)
    pictures = {int(index): picture(index) * 30 for index in report.columns["index"]}  # PNG ignores what follows
    found = files(report, pictures=pictures, query_pictures={(0, 10): picture(10)})
    told = json.loads(found["audit.json"])
    chunks = [json.loads(found[f"pictures-{k}.json"]) for k in range(len(found) - 1)]
    assert len(chunks) > 1
    assert max(len(json.dumps(chunk)) for chunk in chunks) < 1_100_000
    for key, (chunk, place) in told["pictures"].items():
        kind, data = chunks[chunk][place].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == pictures[int(key)]
    assert told["query_pictures"].keys() == {"0/10"}
    with pytest.raises(ValueError, match="expected PNG, JPEG or WebP"):
        files(report, pictures={0: b"<svg onload=alert(1)>"})


def test_whose_pictures_are_worth_having() -> None:
    report = report_of(300)
    found = shown_indices(report, 100)
    assert len(found) == len(set(found)) == 100
    assert found[:30] == report.candidates.tolist()
    assert set(report.pairs["index"].tolist()) <= set(found)
    assert len(shown_indices(report_of(5), 100)) == 5


# ------------------------------------------------------------------------------------------ what it is made of


def scripts() -> dict[str, str]:
    return {name: content.decode() for name, (_, content) in static_files().items() if name.endswith(".js")}


def test_the_page_is_small() -> None:
    assert sum(len(content) for _, content in static_files().values()) < 300_000
    lines = {name: text.count("\n") for name, text in scripts().items()}
    assert {name: count for name, count in lines.items() if count >= 300} == {}
    assert lines["charts.js"] + lines["scatter.js"] < 400


@pytest.mark.parametrize("name", scripts())
def test_texts_never_become_markup_and_nothing_is_fetched_from_elsewhere(name: str) -> None:
    text = scripts()[name]
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|importScripts|createContextual"
    )
    assert re.findall(forbidden, text) == []
    assert re.findall(r"https?://[^\s'\"`]+", text) in ([], ["http://www.w3.org/2000/svg"])
    for target in re.findall(r"^(?:import|export|\})[^;]*\bfrom '([^']*)';$", text, re.MULTILINE):
        assert target.startswith("./")
        assert target.removeprefix("./") in static_files()


def test_no_scripts_or_handlers_in_the_page_itself() -> None:
    text = static_files()["index.html"][1].decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)", text) == []
    assert re.findall(r"\son\w+=", text) == []


def test_importing_the_page_and_the_server_is_light() -> None:
    source = (
        "import sys, lightning_influence.page, lightning_influence.view\n"
        "print([name for name in ('torch', 'lightning', 'numpy', 'tensorboard', 'pyarrow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_what_is_no_code_is_in_the_package_too() -> None:
    # Hatch takes what is in the package's folder and not ignored by git.
    folder = Path(sys.modules["lightning_influence.page"].__file__ or "").parent / "static"
    assert {"index.html", "index.js", "style.css", "icon.svg"} <= static_files().keys()
    assert {path.name for path in folder.iterdir()} == static_files().keys()


# ------------------------------------------------------------------------------------------------- one file


def test_one_file_holds_all_and_refers_to_nothing() -> None:
    report = report_of(30, label_names=["</script><script>alert(1)</script>", HOSTILE, "c", "d"])
    content = files(report, pictures={0: picture(0)}, texts={0: "</script>"})
    page = one_file([Embedded("</title><b>", content["audit.json"], [content["pictures-0.json"]])]).decode()
    assert page.count("<script") == page.count("</script>") == 5  # three documents, the map, the start
    assert "<img" not in page
    assert "<b>" not in page
    told = re.search(r'id="influence-audit-0">(.*?)</script>', page, re.DOTALL)
    assert told is not None
    assert json.loads(told[1]) == json.loads(content["audit.json"])
    imports = json.loads(re.search(r'type="importmap">(.*?)</script>', page)[1])["imports"]  # type: ignore[index]
    assert imports.keys() == {f"influence/{name}" for name in scripts()}
    for address in imports.values():
        source = base64.b64decode(address.partition("base64,")[2]).decode()
        targets = re.findall(r"^(?:import|export|\})[^;]*\bfrom '([^']*)';$", source, re.MULTILINE)
        assert set(targets) <= imports.keys()


def test_one_file_says_what_it_cannot_read() -> None:
    page = one_file([Embedded("fine", files(report_of(5))["audit.json"]), Embedded("damaged", b"{")]).decode()
    runs = json.loads(re.search(r'id="influence-runs">(.*?)</script>', page)[1])  # type: ignore[index]
    assert [run.get("error", "")[:17] for run in runs] == ["", "it can't be read:"]
