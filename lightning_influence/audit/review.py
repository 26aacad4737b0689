"""What a person has decided about an audit's examples: a table of candidates that was edited, read back.

Spreadsheets write semicolons and commas, byte order marks, thousand separators and other encodings; rows and columns
move or go. A row is known by its index alone, and what else it says of the example has to be what the audit says.
"""

from __future__ import annotations

import csv
import io
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Subset

from lightning_influence.audit.acting import classes_of
from lightning_influence.audit.relabel import Relabelled, as_label
from lightning_influence.audit.store.atomic import replacing, whole
from lightning_influence.audit.store.tables import candidates_csv
from lightning_influence.audit.words import visible
from lightning_influence.core.errors import short
from lightning_influence.core.indices import integers
from lightning_influence.gradients.coverage import listed

if TYPE_CHECKING:
    from lightning_influence.audit.report import AuditReport

Row = Mapping[str, str]

DECISIONS = {
    "keep": ("keep", "kept", "ok", "okay", "correct", "right"),
    "relabel": ("relabel", "relabelled", "relabeled", "change", "changed", "wrong", "accept", "accepted"),
    "drop": ("drop", "dropped", "remove", "removed", "delete", "deleted"),
    "": ("", "?", "undecided", "unsure", "skip"),
}
"""What people write, by what it means; nothing is decided by the last ones."""

_MEANT = {word: decision for decision, words in DECISIONS.items() for word in words}
_ANSWERS = "decision", "new_label", "new_label_name"
_READ = "index", "label", "suggested", *_ANSWERS
_NO_LABELS = "the audit knows no labels; only keep and drop are possible."
_QUOTES = "'\"“”„’"  # the first keeps spreadsheets from running a text
_LISTED = 5  # rows that can't be applied
# No text: a zip archive (.xlsx, .ods), the older .xls, parquet.
_BINARY = b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1"
_DECIMALS = re.compile(r"(-?\d{1,18})(?:[.,]0+)?")
_THOUSANDS = re.compile(r"(-?\d{1,3}([.,'’\s])(?:\d{2,3}\2){0,5}\d{3})(?:[.,]0+)?")


class ReviewError(ValueError):
    """A review that can't be read, or is about another audit; the message names the rows and the way out."""


@dataclass(frozen=True, eq=False, repr=False)
class Review:
    """What a person has decided about examples of an audit.

    Attributes:
        report: The audit.
        labels: Dataset index to new label, of the labels that are to be replaced.
        confirmed: Those of them whose new label is the one that the audit suggests.
        kept: Examples whose given label was found to be right.
        dropped: Examples to leave out.
        undecided: Examples in the table about which nothing was decided.

    Example:
        >>> review = report.apply_review("candidates.csv")
        >>> trainer.fit(model, DataLoader(review.cleaned(dataset), shuffle=True))
    """

    report: AuditReport
    labels: Mapping[int, int]
    confirmed: tuple[int, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    undecided: tuple[int, ...]

    def relabelled(self, dataset: Dataset[Any]) -> Relabelled:
        """Return the data set with the new labels, all its examples in place; see ``AuditReport.relabelled``."""
        return self.report.relabelled(dataset, labels=self.labels)

    def cleaned(self, dataset: Dataset[Any]) -> Subset[Any]:
        """Return what to train on: the audited examples with the new labels, without those to leave out.

        Examples with a non-finite loss or gradient are left out anyway, as by ``AuditReport.clean_indices``.
        """
        dropped = set(self.dropped)
        kept = [index for index in self.report.clean_indices(0) if index not in dropped]
        return Subset(self.relabelled(dataset) if self.labels else dataset, kept)

    def clean_indices(self) -> list[int]:
        """Return the examples to train on where labels stay as they are: neither dropped nor with a new label."""
        left_out = {*self.dropped, *self.labels}
        return [index for index in self.report.clean_indices(0) if index not in left_out]

    def __len__(self) -> int:
        """Return the number of examples about which something was decided."""
        return len(self.labels) + len(self.kept) + len(self.dropped)

    def __repr__(self) -> str:
        as_suggested = f" ({len(self.confirmed):,} as suggested)" if self.labels else ""
        return (
            f"{len(self):,} reviewed: {len(self.labels):,} relabelled{as_suggested}, {len(self.kept):,} kept, "
            f"{len(self.dropped):,} dropped; {len(self.undecided):,} undecided"
        )


def write_review(report: AuditReport, path: str | os.PathLike[str], most: int) -> Path:
    """Write the table that a person fills in; see ``AuditReport.write_review``."""
    if isinstance(most, bool) or not hasattr(most, "__index__") or operator.index(most) < 1:
        raise ReviewError(
            f"most={short(most)}; expected how many examples to write, 1 or more (`health()` may say none)."
        )
    place = Path(path).expanduser()
    if place.exists():
        raise ReviewError(f"{place} is there already, and may hold what a person has decided; pass another path.")
    columns = {**report.columns, "candidate": report.columns["rank"] <= operator.index(most)}
    with replacing(place) as file:
        file.write(candidates_csv(columns, report.manifest.get("label_names")))
    return place


def read_review(report: AuditReport, source: Any) -> Review:
    """Return what was decided; see ``AuditReport.apply_review``."""
    title, rows = _opened(source, report.directory)
    reader, wrong = _Reader(report, [row for _, row in rows]), []
    for number, row in rows:
        try:
            reader.read(number, row)
        except ReviewError as error:
            wrong.append(f"row {number} (index {row['index'].strip() or 'missing'}): {error}")
    if wrong:
        told = f"{title}: {len(wrong)} of {len(rows)} rows can't be applied, so none was.\n  "
        raise ReviewError(told + listed(wrong, _LISTED, "\n  "))
    confirmed, kept, dropped, undecided = (tuple(sorted(found)) for found in reader.found.values())
    return Review(report, dict(sorted(reader.labels.items())), confirmed, kept, dropped, undecided)


class _Reader:
    """Rows of a table, one after the other, as decisions about an audit's examples."""

    def __init__(self, report: AuditReport, rows: Iterable[Row]) -> None:
        self.columns = report.columns
        self.places = {int(index): place for place, index in enumerate(self.columns["index"])}
        self.classes = classes_of(self.columns)
        # By spelling: as they are written, and as spreadsheets and people write them. The first that fits counts.
        self.names: dict[Callable[[str], str], dict[str, set[int]]] = {str.strip: {}, _bare: {}, _word: {}}
        known = enumerate(report.manifest.get("label_names") or ())
        for number, name in chain(known, _named(rows)):
            for spelt, classes in self.names.items():
                if number in self.classes and spelt(name):
                    classes.setdefault(spelt(name), set()).add(number)
        self.labels: dict[int, int] = {}
        self.found: dict[str, list[int]] = {"confirmed": [], "keep": [], "drop": [], "": []}
        self._seen: dict[int, int] = {}

    def read(self, number: int, row: Row) -> None:
        """File one row.

        Raises:
            ReviewError: If it can't be understood, or is about another audit.
        """
        index = self._index(row["index"])
        if self._seen.setdefault(index, number) != number:
            raise ReviewError(f"the index {index} is in row {self._seen[index]}, too; leave one of the two.")
        given, suggested = (self._of_audit(name, index, row) for name in ("label", "suggested"))
        decision, label = self._decision(row), self._new_label(row)
        told = _word(row.get("decision", ""))
        if told and decision != "relabel":
            if label not in (None, given):
                raise ReviewError(f"the decision is {told!r}, and there is a new label, {label}; empty one of the two.")
            label = None
        elif label is None and decision == "relabel":
            if not self.classes:
                raise ReviewError(f"{told!r}, but {_NO_LABELS}")
            if suggested < 0 or suggested == given:
                raise ReviewError(f"{told!r}, but the audit suggests no other label; write one into `new_label`.")
            label = suggested
        elif told and label == given:
            raise ReviewError(f"the decision is {told!r}, and the new label is the given one, {given}.")
        if label is None or label == given:
            self.found[decision if label is None else "keep"].append(index)
        elif given < 0:
            raise ReviewError("the audit knows no label of this example, so that none can be replaced.")
        else:
            self.labels[index] = label
            if label == suggested:
                self.found["confirmed"].append(index)

    def _index(self, text: str) -> int:
        read = _numbers(text)
        known = [index for index in read if index in self.places]
        if len(known) == 1:
            return known[0]
        if known:
            raise ReviewError(f"the index {text!r} can be {known[0]} or {known[1]}; write it without separators.")
        if read:
            raise ReviewError(f"the index {text!r} is not in the audit; is this the table of another one?")
        what = f"the index {text!r} is none" if text.strip() else "there is no index"
        raise ReviewError(f"{what}; expected the position in the data set, a whole number.")

    def _of_audit(self, name: str, index: int, row: Row) -> int:
        """Return a label of the audit, -1 for none, after a look at whether the table says the same."""
        if name not in self.columns:
            return -1
        own, text = int(self.columns[name][self.places[index]]), row.get(name, "").strip()
        if text and own not in _numbers(text):
            raise ReviewError(
                f"the `{name}` of the example {index} is {text!r} here and {own} in the audit: this is the table of "
                "another audit, or it was changed in place. New labels belong into `new_label`."
            )
        return own

    def _decision(self, row: Row) -> str:
        text = row.get("decision", "")
        decision = _MEANT.get(_word(text))
        if decision is None:
            raise ReviewError(
                f"the decision {text!r} is not known; expected keep, relabel (to `new_label`, or else as the audit "
                "suggests), drop, or nothing."
            )
        if self._classes_named(text):
            other = next((word for word in DECISIONS[decision] if not self._classes_named(word)), "")
            raise ReviewError(f"{text!r} is a decision and a class; write {other!r}, or the class into `new_label`.")
        return decision

    def _new_label(self, row: Row) -> int | None:
        text, name = (row.get(column, "").strip() for column in ("new_label", "new_label_name"))
        if not text and not name:
            return None
        if not self.classes:
            raise ReviewError(f"there is a new label, but {_NO_LABELS}")
        by_number, by_name = _numbers(text) & self.classes, self._classes_called(text)
        if name:
            # Of a class without a name, the page writes the number for one. Beside a name, a number is a number.
            called = self._classes_called(name) | (_numbers(name) & self.classes - self._named)
            meant = by_number & called or by_name & called if text else called
        else:
            meant = by_number | by_name
        if len(meant) == 1:
            return meant.pop()
        what = " and ".join(filter(None, (text, name)))
        if meant:
            raise ReviewError(
                f"the new label {what!r} can be any of the classes {sorted(meant)}, by number or by name; write the "
                "name into a column `new_label_name`."
            )
        names = self.names[str.strip]
        known = listed(sorted(self.classes), 20) + (f", or a name such as {min(names)!r}" if names else "")
        raise ReviewError(f"the new label {what!r} is no class of the audit; expected one of {known}.")

    def _classes_named(self, text: str) -> set[int]:
        found = (classes.get(spelt(text), set()) for spelt, classes in self.names.items())
        return next(filter(None, found), set())

    def _classes_called(self, text: str) -> set[int]:
        """Return the classes of a name, of one that a table has made a number with decimals of, too."""
        return self._classes_named(text).union(*(self._classes_named(str(number)) for number in _numbers(text)))

    @cached_property
    def _named(self) -> set[int]:
        """The classes that have names."""
        return set().union(*self.names[str.strip].values())


def _named(rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
    """Yield classes with their names, as far as a table holds both."""
    for row in rows:
        for name in ("label", "predicted", "suggested"):
            for number in _numbers(row.get(name, "")):
                yield number, row.get(f"{name}_name", "")


def _opened(source: Any, directory: Path | None) -> tuple[str, list[tuple[int, Row]]]:
    """Return what a review is called, and its rows: number in the spreadsheet, and cells by column."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if directory is not None and not path.exists() and (directory / path).exists():
            path = directory / path
        return str(path), _table(str(path), _text(path))
    if hasattr(source, "to_csv") and hasattr(source, "columns"):
        return "the data frame", _table("the data frame", source.to_csv(index="index" not in source.columns))
    if isinstance(source, Mapping):
        return "the mapping", list(_answers(source))
    raise ReviewError(
        f"the review is a {type(source).__name__}; expected the path of a CSV, a data frame, or a mapping such as "
        '{17: 3, 42: "drop"}.'
    )


def _answers(mapping: Mapping[Any, Any]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a mapping from index to a decision or a new label."""
    for number, (index, answer) in enumerate(zip(integers(list(mapping)), mapping.values(), strict=True), 1):
        label = as_label(answer)
        # Missing values of data frames differ from themselves.
        text = str(label) if label is not None else "" if answer is None or answer != answer else str(answer)
        yield number, {"index": str(index), "decision" if _word(text) in _MEANT else "new_label": text}


def _text(path: Path) -> str:
    """Return the text of a file, in whichever encoding a spreadsheet wrote it."""
    try:
        data = whole(path)
    except (OSError, ValueError) as error:
        raise ReviewError(f"{path} can't be read ({error}); pass the path of the edited table.") from error
    if data.startswith(_BINARY):
        raise ReviewError(f"{path} is no text: save it as CSV, or pass a data frame, as of `pandas.read_excel`.")
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ReviewError(f"{path} is neither UTF-8, UTF-16 nor Windows-1252; save it as CSV in UTF-8.")


def _table(title: str, text: str) -> list[tuple[int, Row]]:
    """Return the rows below the line that names the columns, without empty ones."""
    hint = re.match(r"sep=(.)\r?\n", text)  # for Excel, which shows no such row
    text = text[hint.end() :] if hint else text
    headers: list[list[str]] = []
    try:
        for delimiter in hint[1] if hint else ",;\t":
            first = next(_filled(text, delimiter, strict=False), (0, []))[1]
            headers.append([_word(name).replace(" ", "_") for name in first])
            if "index" in headers[-1]:
                # Strict: a quote that is not closed would make one cell of all that follows.
                return _by_name(title, headers[-1], list(_filled(text, delimiter, strict=True))[1:])
    except csv.Error as error:
        raise ReviewError(f"{title} is no table ({error}); expected the edited candidates, saved as CSV.") from error
    raise ReviewError(
        f"{title} has no column `index`, but {max(headers, key=len)}; name the one that holds the positions in the "
        "data set so, as in the candidates that the audit writes."
    )


def _filled(text: str, delimiter: str, *, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, with their numbers."""
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    yield from ((number, cells) for number, cells in enumerate(records, 1) if any(map(str.strip, cells)))


def _by_name(title: str, names: list[str], rows: Iterable[tuple[int, list[str]]]) -> list[tuple[int, Row]]:
    """Return the cells by the names of their columns; rows without index and decision are left out."""
    if repeated := [name for name in _READ if names.count(name) > 1]:
        raise ReviewError(f"{title} has several columns {repeated}; expected one of each.")
    if not set(_ANSWERS) & set(names):
        raise ReviewError(f"{title} has no column `decision` or `new_label`, but {names}; nothing can be told from it.")
    found: list[tuple[int, Row]] = []
    for number, cells in rows:
        if beyond := [cell for cell in cells[len(names) :] if cell.strip()]:
            raise ReviewError(
                f"{title}: row {number} has more cells than there are columns: {beyond[:3]}; quote commas."
            )
        row = dict(zip_longest(names, cells[: len(names)], fillvalue=""))
        if any(row.get(name, "").strip() for name in ("index", *_ANSWERS)):
            found.append((number, row))
    return found


def _numbers(text: str) -> set[int]:
    """Return the whole numbers that a cell can stand for: ``1.000`` is a thousand, or one with decimals."""
    text = _bare(text).replace("−", "-")
    plain, grouped = _DECIMALS.fullmatch(text), _THOUSANDS.fullmatch(text)
    found = {int(plain[1])} if plain else set()
    return found | ({int(re.sub(r"[^-\d]", "", grouped[1]))} if grouped else set())


def _word(text: str) -> str:
    """Return text without regard to case, spaces, quotes around it, and characters that can't be seen."""
    return visible(_bare(text).casefold())


def _bare(text: str) -> str:
    return text.strip().strip(_QUOTES).strip()
