"""Audits in memory, of pictures, of texts and of table rows, as the page gets them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_influence.audit.curves import Curves
from lightning_influence.audit.report import AuditReport
from lightning_influence.page.document import files

HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


def report_of(size: int, *, classes: int = 4, labelled: bool = True, seed: int = 0, **manifest: Any) -> AuditReport:
    """Return an audit whose first tenth by suspicion are candidates; of every third one the index is left out."""
    generator = np.random.default_rng(seed)
    index = np.arange(size) * 3 // 2
    suspicion = generator.normal(size=size)
    rank = np.argsort(np.argsort(-suspicion)) + 1
    columns: dict[str, NDArray[Any]] = {
        "index": index,
        "suspicion": suspicion,
        "rank": rank,
        "candidate": rank <= max(1, size // 10),
        "finite": np.ones(size, dtype=bool),
        "loss_mean": generator.exponential(size=size),
        "self_influence": generator.lognormal(5, 3, size),
        "harm": generator.normal(size=size),
    }
    if labelled:
        label = generator.integers(0, classes, size)
        columns |= {
            "label": label,
            "suggested": (label + generator.integers(1, classes, size)) % classes,
            "prob_margin": np.tanh(-suspicion),
            "neighbour_disagreement": generator.uniform(size=size),
            "wrong_probability": 1 / (1 + np.exp(-3 * suspicion)),
        }
    epochs = 5
    loss = (columns["loss_mean"][:, None] * np.linspace(1.5, 0.5, epochs)).astype(np.float32)
    curves = Curves(range(epochs), {"loss": loss, "margin": -loss, "probability": np.exp(-loss)})
    about = {"created": "2026-01-02T03:04:05", "status": "complete", **manifest}
    return AuditReport(columns, about, None, pairs_of(columns, generator), curves)


def pairs_of(columns: dict[str, NDArray[Any]], generator: np.random.Generator) -> dict[str, NDArray[Any]]:
    rows = []
    for number in range(3):
        for kind, sign in (("proponent", 1), ("opponent", -1)):
            for rank in range(4):
                index = int(columns["index"][generator.integers(len(columns["index"]))])
                rows.append((number + 1, 0, 10 * number, kind, "strongest", rank + 1, index, sign * (9.0 - rank)))
    names = "number", "query_set", "query", "kind", "list", "rank", "index", "score"
    table = {name: np.array([row[place] for row in rows]) for place, name in enumerate(names)}
    size = len(rows)
    table |= {"kind": table["kind"].astype(object), "list": table["list"].astype(object)}
    table |= {
        "query_label": np.ones(size, dtype=int),
        "query_predicted": np.full(size, 2),
        "query_loss": np.full(size, 4.5),
    }
    return table | {name: np.zeros(size) for name in ("measured", "relative", "label", "predicted", "loss")}


def picture(number: int) -> bytes:
    """Return a small image that tells numbers apart."""
    generator = np.random.default_rng(number)
    pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_audit(directory: Path, report: AuditReport, **more: Any) -> Path:
    """Write what the page needs of an audit, and the audit itself."""
    saved = report.save(directory)
    assert saved.directory is not None
    for name, content in files(report, name=directory.parent.name, **more).items():
        (saved.directory / name).write_bytes(content)
    return saved.directory


def add_tokens(directory: Path, index: int) -> None:
    """Tell the document what the scores of the first query's pairs are made of, and of one example what was likely."""
    path = directory / "audit.json"
    document = json.loads(path.read_text())
    for pair in document["pairs"]:
        if pair["number"] == 1:
            sign = 1 if pair["kind"] == "proponent" else -1
            pair["tokens"] = [["it", 0.0], [HOSTILE, 3.0 * sign], ["was", None], ["long", -1.5 * sign]]
            pair["tokens_rest"] = 0.25
    row = [column for column in document["columns"] if column["name"] == "index"]
    places = np.frombuffer(base64.b64decode(row[0]["data"]), "<i4")
    table = np.full((len(places), len(document["curves"]["epochs"])), np.nan, dtype="<f4")
    table[places == index] = [np.nan, 0.25, 0.5, np.nan, 0.75]
    document["curves"]["names"].append("suggested_probability")
    document["curves"] |= {"p_given": "probability", "p_suggested": "suggested_probability"}
    document["curves"]["data"]["suggested_probability"] = base64.b64encode(table.tobytes()).decode()
    path.write_text(json.dumps(document))


def write_several(root: Path) -> dict[str, Path]:
    """Write an audit of each kind."""
    found = {}
    digits = report_of(400, label_names=None, labels={"verdict": "told", "noise_rate": 0.1})
    shown = [int(index) for index in digits.candidates]
    pictures = {index: picture(index) for index in shown}
    queries = {(0, query): picture(query) for query in (0, 10, 20)}
    found["pictures"] = write_audit(root / "digits" / "influence", digits, pictures=pictures, query_pictures=queries)
    again = report_of(400, seed=1, created="2026-01-01")
    found["again"] = write_audit(root / "digits_again" / "influence", again, pictures=pictures)
    texts = report_of(90, classes=3, label_names=["good", HOSTILE, "bad"], created="2025-12-31")
    told = {int(index): f"review number {index}: it was long" for index in texts.columns["index"]}
    told[int(texts.candidates[0])] = HOSTILE
    found["texts"] = write_audit(
        root / "texts" / "influence", texts, texts=told, query_texts={(0, query): HOSTILE for query in (0, 10, 20)}
    )
    rows = report_of(60, labelled=False, created="2025-12-30")
    values = {int(index): f"age {index} · income {7 * index}" for index in rows.columns["index"]}
    found["table"] = write_audit(root / "table" / "influence", rows, texts=values)
    return found
