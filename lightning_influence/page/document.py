"""An audit as the page reads it: one document for everything but the pictures, and pictures in chunks."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.asked import PAGE_FIELDS
from lightning_influence.audit.columns import COLUMNS, INFLUENCE_ON, Columns, candidate_rows, column_of
from lightning_influence.audit.curves import SUGGESTED
from lightning_influence.index.files import has_index
from lightning_influence.page.cards import cards

if TYPE_CHECKING:
    from lightning_influence.audit.report import AuditReport

FORMAT = 1
AUDIT = "audit.json"

_CHUNK = 1_000_000  # characters of pictures that come with one request
# Of columns and curves together, before they are written as text; curves have a part of it in any case.
_BYTES, _CURVES = 1_400_000, 100_000
_TOKENS = 1_000_000  # characters of tokens and their scores
_BINS = 40


def files(
    report: AuditReport,
    *,
    name: str = "",
    texts: Mapping[int, str] | None = None,
    query_texts: Mapping[tuple[int, int], str] | None = None,
    pictures: Mapping[int, bytes] | None = None,
    query_pictures: Mapping[tuple[int, int], bytes] | None = None,
    epochs: tuple[int | None, int | None] = (None, None),
) -> dict[str, bytes]:
    """Return what the page asks for, by file name: ``audit.json`` and ``pictures-<chunk>.json``.

    Args:
        report: The audit; of an unfinished one, what there is so far.
        name: What the audit is called where there are several.
        texts: Of training examples, by dataset index, besides those in the report's column ``text``.
        query_texts: Of queries, by number of their set and position in it.
        pictures: Of training examples: encoded images, PNG, WebP or JPEG.
        query_pictures: Of queries.
        epochs: How many are done, and how many are planned.
    """
    chunks: list[list[str]] = []
    places = _placed({str(index): image for index, image in (pictures or {}).items()}, chunks)
    of_queries = _placed({f"{a}/{b}": image for (a, b), image in (query_pictures or {}).items()}, chunks)
    found = document(report, name=name, texts=texts, query_texts=query_texts, epochs=epochs)
    # Each chunk ends with what the document says of them: a page that is open when another audit takes the place of
    # this one shows none of that one's pictures.
    whose = sha256("".join(chain.from_iterable(chunks)).encode()).hexdigest()[:16]
    for chunk in chunks:
        chunk.append(whose)
    found |= {"pictures": places, "query_pictures": of_queries, "pictures_of": whose}
    result = {AUDIT: as_json(found)}
    return result | {f"pictures-{number}.json": as_json(chunk) for number, chunk in enumerate(chunks)}


def document(
    report: AuditReport,
    *,
    name: str = "",
    texts: Mapping[int, str] | None = None,
    query_texts: Mapping[tuple[int, int], str] | None = None,
    epochs: tuple[int | None, int | None] = (None, None),
) -> dict[str, Any]:
    """Return the document of an audit, without pictures; see ``files``."""
    columns, manifest = report.columns, report.manifest
    order = np.argsort(columns["index"], kind="stable")
    columns = {name: np.asarray(values) for name, values in columns.items()}
    if not np.array_equal(order, np.arange(len(order))):  # as it is, but for what somebody else has put together
        columns = {name: values[order] for name, values in columns.items()}
    curves = getattr(report, "curves", None) or {}
    rows = _curve_rows(columns, report.pairs, curves)
    told = {int(i): str(text) for i, text in zip(columns["index"], columns.get("text", ()), strict=False) if text}
    told |= texts or {}
    return {
        "format": FORMAT,
        "name": name or (report.directory.name if report.directory else "audit"),
        "status": report.status,
        "created": str(manifest.get("created", "")),
        "epochs_done": epochs[0],
        "epochs_planned": epochs[1],
        "cards": cards(report),
        "notes": [str(note) for note in manifest.get("notes", ())],
        "label_names": manifest.get("label_names"),
        "labels": manifest.get("labels"),
        "examples": len(order),
        "columns": [_column(each, columns[each]) for each in _listed(columns)],
        "curves": _curves(curves, order, rows),
        "histories": _histories(curves, order, columns["candidate"].astype(bool)),
        "pairs": _pairs(report.pairs),
        "ask": _asking(report),
        "texts": {str(index): text for index, text in told.items()},
        "query_texts": {f"{a}/{b}": text for (a, b), text in (query_texts or {}).items()},
        "pictures": {},
        "query_pictures": {},
    }


def as_json(value: Any) -> bytes:
    """Return JSON; numbers that are not finite become null."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_Packed.text)
    told = io.BytesIO()
    for piece in encoder.iterencode(_finite(value)):  # all at once, the columns would be held four more times
        told.write(piece.encode(errors="replace"))
    return told.getvalue()


@dataclass(frozen=True, eq=False)
class _Packed:
    """Numbers that become a text, of more bytes than they have, when it is its turn to be written."""

    values: NDArray[Any]
    kind: str

    def text(self) -> str:
        values = _float32(self.values) if self.kind == "<f4" else self.values.astype(self.kind)
        return base64.b64encode(values.tobytes()).decode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, _Packed)) else str(value)


def _listed(columns: Columns) -> list[str]:
    """Return the names of the columns in the order of the glossary; texts are told apart from them."""
    names = [name for name in COLUMNS if name in columns]
    return [name for name in dict.fromkeys((*names, *columns)) if name != "text"]


def _column(name: str, values: NDArray[Any]) -> dict[str, Any]:
    about = column_of(name)
    meaning = about.meaning
    if not meaning and name.startswith(INFLUENCE_ON):
        meaning = f"influence on the {name.removeprefix(INFLUENCE_ON)} of the queries; positive lowers it"
    kind, data = _encoded(values)
    return {"name": name, "meaning": meaning, "direction": about.direction, "kind": kind, "data": data}


def _encoded(values: NDArray[Any]) -> tuple[str, Any]:
    if values.dtype.kind == "b":
        return "bool", _Packed(values, "u1")
    if values.dtype.kind in "iu" and (not len(values) or np.abs(values).max() < 2**31):
        return "int", _Packed(values, "<i4")
    if values.dtype.kind in "iuf":
        return "float", _Packed(values, "<f4")
    return "text", [str(value) for value in values]


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values in little-endian float32; what is too large for it is its largest number."""
    with np.errstate(over="ignore"):
        limit = np.finfo(np.float32).max
        finite = np.isfinite(values)
        return np.where(finite, np.clip(values, -limit, limit), values).astype("<f4")


def _curve_rows(columns: Columns, pairs: Columns | None, curves: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Return the rows whose curves fit, ascending: all, or those that somebody will look at."""
    size = len(columns["index"])
    epochs = sum(table.shape[1] for table in curves.values())
    room = max(_CURVES, _BYTES - 4 * size * len(columns))
    most = room // (4 * epochs) if epochs else size
    if size <= most:
        return np.arange(size)
    first = candidate_rows(columns)
    asked = np.flatnonzero(np.isin(columns["index"], pairs["index"])) if pairs is not None else first[:0]
    ranked = np.argsort(columns["rank"], kind="stable")
    every = np.concatenate([first, asked, ranked])
    _, places = np.unique(every, return_index=True)
    return np.sort(every[np.sort(places)][:most])


def _curves(
    curves: Mapping[str, NDArray[Any]], order: NDArray[np.int64], rows: NDArray[np.int64]
) -> dict[str, Any] | None:
    if not curves:
        return None
    return {
        "epochs": [int(epoch) for epoch in getattr(curves, "epochs", ())],
        "names": list(curves),
        # Which of them, if any, is the probability of the given label, and of the suggested one.
        "p_given": "probability" if "probability" in curves else None,
        "p_suggested": SUGGESTED if SUGGESTED in curves else None,
        "rows": "all" if len(rows) == len(order) else rows.tolist(),
        "data": {name: _Packed(table[order[rows]], "<f4") for name, table in curves.items()},
    }


def _histories(
    curves: Mapping[str, NDArray[Any]], order: NDArray[np.int64], candidate: NDArray[np.bool_]
) -> list[dict[str, Any]] | None:
    """Return a histogram of each curve at each epoch, over the same bins, and that of the candidates."""
    found = []
    for name, table in curves.items():
        finite = np.isfinite(table)
        low = float(table.min(where=finite, initial=np.inf))
        high = float(table.max(where=finite, initial=-np.inf))
        if low > high:
            continue
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        for column, epoch in enumerate(getattr(curves, "epochs", ())):
            own = table[order, column].astype(np.float64)
            entry = {"column": name, "epoch": int(epoch), "edges": edges.tolist()}
            for key, some in (("counts", np.ones_like(candidate)), ("candidates", candidate)):
                entry[key] = np.histogram(own[some & np.isfinite(own)], edges)[0].tolist()
            found.append(entry)
    return found or None


def _asking(report: AuditReport) -> str | None:
    """Return the lines that ask a new question, of an audit with an index: the page can't run the model."""
    if report.directory is None or not has_index(folder := report.directory.resolve()):
        return None
    return (
        "from lightning_influence import AuditReport\n"
        f"report = AuditReport.load({str(folder)!r})\n"
        "print(report.ask(model, batch, k=10))  # with the audited weights; keep=True adds the answers to this page"
    )


def _pairs(pairs: Columns | None) -> list[dict[str, Any]]:
    if pairs is None:
        return []
    lists = {name: np.asarray(pairs[source]).tolist() for name, source in PAGE_FIELDS.items() if source in pairs}
    lists.setdefault("list", ["strongest"] * len(lists["index"]))
    if "tokens" in pairs:
        lists |= {"tokens": _tokens(pairs), "tokens_rest": np.asarray(pairs["tokens_rest"]).tolist()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _tokens(pairs: Columns) -> list[list[tuple[str, float]] | None]:
    """Return text and score of each token by pair, as many as fit, those first that are first in their lists."""
    found: list[list[tuple[str, float]] | None] = [None] * len(pairs["index"])
    room = _TOKENS
    for row in np.argsort(pairs["rank"], kind="stable").tolist():
        if (text := str(pairs["tokens"][row])) and len(text) <= room:
            room -= len(text)
            found[row] = [(str(token), float(f"{float(score):.4g}")) for token, score in json.loads(text)]
    return found


def _placed(pictures: Mapping[str, bytes], chunks: list[list[str]]) -> dict[str, tuple[int, int]]:
    """File pictures in chunks, and return where each of them is."""
    places = {}
    room = 0
    for key, image in pictures.items():
        text = f"data:{_kind(image)};base64,{base64.b64encode(image).decode('ascii')}"
        if not chunks or room < len(text):
            chunks.append([])
            room = _CHUNK
        room -= len(text)
        places[key] = (len(chunks) - 1, len(chunks[-1]))
        chunks[-1].append(text)
    return places


def _kind(image: bytes) -> str:
    """Return the media type of an encoded image.

    Raises:
        ValueError: If it is none that browsers know.
    """
    for start, kind in ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp")):
        if image.startswith(start):
            return kind
    raise ValueError(f"a picture begins with {image[:8]!r}; expected PNG, JPEG or WebP.")


def shown_indices(report: AuditReport, most: int = 2000) -> list[int]:
    """Return whose pictures and texts are worth having, the most needed first, as dataset indices.

    Args:
        report: The audit.
        most: How many at most: candidates and the first of the ranking, the training examples of the queries' lists,
            those that the first candidates are beside, and those that the model rests on most.
    """
    columns = report.columns
    parts: list[Iterable[int]] = [report.candidates[: most // 2]]
    if report.pairs is not None:
        parts.append(report.pairs["index"])
    if "nearest" in columns:
        nearest = columns["nearest"][candidate_rows(columns)[: most // 4]]
        parts.append(nearest[np.isin(nearest, columns["index"])])
    if "self_influence" in columns:
        parts.append(columns["index"][np.argsort(-np.nan_to_num(columns["self_influence"]), kind="stable")[:200]])
    parts += [report.candidates[most // 2 :], report.ranking]
    found: Sequence[int] = list(dict.fromkeys(int(index) for part in parts for index in part))
    return list(found[:most])
