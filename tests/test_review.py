"""What a person decides about candidates: tables that were edited in a spreadsheet, and labels by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_influence import AuditReport
from lightning_influence.audit.ranking import rank
from lightning_influence.audit.relabel import LabelError, Relabelled
from lightning_influence.audit.review import Review, ReviewError
from lightning_influence.audit.store.tables import candidates_csv
from lightning_influence.core.indices import integers

NAMES = ["ant", "Bee", "=cat"]
# Two of every 150 examples are candidates: indices with thousands among them.
SIZE, CANDIDATES = 3000, [1, 12, 1234, 2000, 2345, 2999]
GIVEN = np.arange(SIZE) % 3
WRONG = np.isin(np.arange(SIZE), CANDIDATES)
SUGGESTED = np.where(WRONG, (GIVEN + 1) % 3, GIVEN)


def report(directory: Path | None = None, **manifest: Any) -> AuditReport:
    columns = {
        "index": np.arange(SIZE),
        "label": GIVEN,
        "suggested": SUGGESTED,
        "prob_margin": np.where(WRONG, -0.5, 0.5) - np.arange(SIZE) / 1e5,
        "finite": np.arange(SIZE) != 7,
    }
    return AuditReport({**rank(columns), "candidate": WRONG}, {"dataset_size": SIZE, **manifest}, directory)


class Data(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < SIZE:
            raise IndexError(index)
        return torch.tensor([float(index)]), int(GIVEN[index])


Rows = list[list[str]]


def written() -> Rows:
    """The cells of the candidates as the audit writes them."""
    text = candidates_csv(report().columns, NAMES).decode("utf-8-sig")
    return list(csv.reader(io.StringIO(text, newline="")))


ANSWERS = {
    1: ("keep", ""),
    12: ("Relabel ", ""),
    1234: ("", "0"),
    2000: ("DROP", ""),
    2345: ("", ""),
    2999: ("wrong", "bee"),
}
# 1234 has label 1, suggested 2; 2999 label 2, suggested 0.
LABELS = {12: 1, 1234: 0, 2999: 1}


def answered() -> Rows:
    rows = written()
    header = rows[0]
    for row in rows[1:]:
        row[header.index("decision")], row[header.index("new_label")] = ANSWERS[int(row[header.index("index")])]
    return rows


def saved_as(rows: Rows, delimiter: str = ",", end: str = "\r\n", quoting: Any = csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


def with_column(rows: Rows, name: str, change: Callable[[str], str]) -> Rows:
    place = rows[0].index(name)
    return [rows[0], *([*row[:place], change(row[place]), *row[place + 1 :]] for row in rows[1:])]


def decimal_commas(rows: Rows) -> Rows:
    return [rows[0], *([cell.replace(".", ",") for cell in row] for row in rows[1:])]


def only(rows: Rows, names: list[str]) -> Rows:
    places = [rows[0].index(name) for name in names]
    return [[row[place] for place in places] for row in rows]


def grouped(separator: str) -> Callable[[str], str]:
    return lambda cell: f"{int(cell):,}".replace(",", separator)


SPREADSHEETS: dict[str, Callable[[Rows], str | bytes]] = {
    "as it was": saved_as,
    "byte order mark": lambda rows: saved_as(rows).encode("utf-8-sig"),
    "semicolons and decimal commas": lambda rows: saved_as(decimal_commas(rows), ";"),
    "tabs in UTF-16": lambda rows: saved_as(rows, "\t").encode("utf-16"),
    "UTF-16, big end first": lambda rows: b"\xfe\xff" + saved_as(rows, ";").encode("utf-16-be"),
    "Windows-1252": lambda rows: saved_as([[*rows[0], "notes"], *([*row, "schön"] for row in rows[1:])], ";").encode(
        "cp1252"
    ),
    "everything quoted": lambda rows: saved_as(rows, ";", quoting=csv.QUOTE_ALL),
    "a hint for Excel": lambda rows: "sep=;\r\n" + saved_as(rows, ";"),
    "line feeds": lambda rows: saved_as(rows, end="\n"),
    "carriage returns": lambda rows: saved_as(rows, end="\r"),
    "reordered rows": lambda rows: saved_as([rows[0], *rows[:0:-1]]),
    "reordered columns": lambda rows: saved_as([row[::-1] for row in rows]),
    "few columns": lambda rows: saved_as(only(rows, ["new_label", "index", "decision"])),
    "empty rows and columns": lambda rows: saved_as(
        [[""], *([*row, "", ""] for row in rows), *([[""] * (len(rows[0]) + 2)] * 3)]
    ),
    "other columns": lambda rows: saved_as([["my, notes", *rows[0]], *(['5" by\r\n7', *row] for row in rows[1:])]),
    "numbers with decimals": lambda rows: saved_as(
        with_column(with_column(rows, "index", "{}.0".format), "label", "{}.00".format)
    ),
    "thousands with commas": lambda rows: saved_as(with_column(rows, "index", grouped(","))),
    "thousands with points": lambda rows: saved_as(with_column(rows, "index", grouped(".")), ";"),
    "thousands with narrow spaces": lambda rows: saved_as(with_column(rows, "index", grouped("\u202f")), ";"),
    "thousands with apostrophes, and decimals": lambda rows: saved_as(
        with_column(rows, "index", lambda cell: grouped("’")(cell) + ".00")
    ),
    "headings in capitals": lambda rows: saved_as(
        [[f" {name.upper().replace('_', ' ')} " for name in rows[0]], *rows[1:]]
    ),
    "a line of remarks": lambda rows: saved_as([*rows, ["", "", "done by Ann"]]),
}


OTHER_TABLES = ["few columns", "a line of remarks", *(how for how in SPREADSHEETS if "thousand" in how)]


@pytest.mark.parametrize("how", SPREADSHEETS)
def test_a_table_that_a_spreadsheet_has_saved(how: str, tmp_path: Path) -> None:
    # "2,000" is a thousand times two, and can be two with decimals: both are in the audit.
    rows = [row for row in answered() if "thousand" not in how or "2000" not in row]
    content = SPREADSHEETS[how](rows)
    path = tmp_path / "edited.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = {"label_names": NAMES} if how == "few columns" else {}  # else the table tells
    review = report(**named).apply_review(path)
    assert review.labels == LABELS
    assert review.confirmed == (12,)
    assert (review.kept, review.undecided) == ((1,), (2345,))
    assert review.dropped == (() if "thousand" in how else (2000,))


def test_deleted_rows_are_not_even_undecided(tmp_path: Path) -> None:
    rows = [row for row in answered() if row[answered()[0].index("index")] not in ("1", "2345")]
    (tmp_path / "edited.csv").write_text(saved_as(rows))
    review = report().apply_review(tmp_path / "edited.csv")
    assert (review.labels, review.kept, review.undecided) == (LABELS, (), ())


def test_cells_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "edited.csv").write_text(
        'index,decision,new_label\n1,"""keep""",\n"""12""",“Relabel ”,\n2999,,"\'1\'"\n'
    )
    review = report().apply_review(tmp_path / "edited.csv")
    assert (review.kept, review.labels) == ((1,), {12: 1, 2999: 1})


def test_nothing_was_decided(tmp_path: Path) -> None:
    saved = report().save(tmp_path / "audit")
    review = saved.apply_review("candidates.csv")  # found in the directory of the audit
    assert repr(review) == "0 reviewed: 0 relabelled, 0 kept, 0 dropped; 6 undecided"
    assert review.clean_indices() == [n for n in range(SIZE) if n != 7]
    assert [y for _, y in review.cleaned(Data())] == [int(GIVEN[n]) for n in range(SIZE) if n != 7]


def test_what_to_do_with_a_review(tmp_path: Path) -> None:
    answers = {1: "keep", 12: "accept", 1234: 0, 2000: "drop", 2345: None, 2999: torch.tensor(1)}
    review = report().apply_review(answers)
    assert report().apply_review({**answers, 2345: float("nan")}).undecided == review.undecided == (2345,)
    assert isinstance(review, Review)
    assert repr(review) == "5 reviewed: 3 relabelled (1 as suggested), 1 kept, 1 dropped; 1 undecided"
    assert review.labels == LABELS
    data = review.relabelled(Data())
    assert {n: data[n][1] for n in range(SIZE) if data[n][1] != GIVEN[n]} == LABELS
    kept = [n for n in range(SIZE) if n not in (7, 2000)]
    expected = [LABELS.get(n, int(GIVEN[n])) for n in kept]
    assert torch.cat([y for _, y in DataLoader(review.cleaned(Data()), 500)]).tolist() == expected
    assert review.clean_indices() == [n for n in kept if n not in LABELS]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            (
                "index,decision\n12,maybe",
                r"row 2 \(index 12\): the decision 'maybe' is not known; expected keep, relabel \(to",
            ),
            (
                "index,decision\n12,keep\n12,drop",
                r"row 3 \(index 12\): the index 12 is in row 2, too; leave one of the two",
            ),
            ("index,decision\n3000,keep", "index '3000' is not in the audit; is this the table of another one"),
            ("index,decision\n-1,keep", "index '-1' is not in the audit"),
            ("index,decision\n1.5,keep", "index '1.5' is none; expected the position in the data set"),
            ("index,decision\n,keep", r"row 2 \(index missing\): there is no index; expected the position"),
            ("index;decision\n2.000;keep", "index '2.000' can be 2 or 2000; write it without separators|2000 or 2;"),
            ("index,label,decision\n12,1,keep", "`label` of the example 12 is '1' here and 0 in the audit: .* another"),
            ("index,suggested,decision\n12,2,accept", "`suggested` of the example 12 is '2' here and 1 in the audit"),
            ("index,decision\n5,accept", "'accept', but the audit suggests no other label; write one into"),
            ("index,decision,new_label\n12,keep,1", "the decision is 'keep', and there is a new label, 1; empty one"),
            ("index,decision,new_label\n12,?,1", "the decision is '\\?', and there is a new label, 1"),
            ("index,decision,new_label\n12,wrong,0", "the decision is 'wrong', and the new label is the given one, 0"),
            ("index,new_label\n12,3", "the new label '3' is no class of the audit; expected one of 0, 1, 2"),
            ("index,new_label\n12,dog", "the new label 'dog' is no class of the audit"),
            ("index,new_label\n12,1.5", "the new label '1.5' is no class"),
            ("idx,decision\n12,keep", r"has no column `index`, but \['idx', 'decision'\]; name the one that holds"),
            ("decision;x\nkeep;1", r"no column `index`, but \['decision', 'x'\]"),
            ("index,label\n12,0", r"no column `decision` or `new_label`, but \['index', 'label'\]"),
            ("index,decision,decision\n12,keep,drop", r"has several columns \['decision'\]"),
            ("index,decision\n12,keep,so, really", r"row 2 has more cells than there are columns: \['so', ' really'\]"),
            ('index,decision,notes\n12,keep,"so\n1,drop,\n', r"is no table \(unexpected end of data\)"),
            (
                f"index,decision\n12,{'x' * 200_000}",
                r"is no table \(field larger than field limit .*\); expected the ed",
            ),
            ("", r"has no column `index`, but \[\]"),
        ],
    )
    def test_tables(self, cells: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "edited.csv").write_text(cells)
        with pytest.raises(ReviewError, match=message):
            report().apply_review(tmp_path / "edited.csv")

    def test_all_rows_are_named_and_none_is_applied(self, tmp_path: Path) -> None:
        (tmp_path / "edited.csv").write_text("index,decision\n12,nope\n1,keep\n\n2,never\n3,ask Ann\n")
        with pytest.raises(ReviewError, match=r"3 of 4 rows can't .* none was\.\n  row 2 .*\n  row 5 .*\n  row 6 "):
            report().apply_review(tmp_path / "edited.csv")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"PK\x03\x04rest", r"is no text: save it as CSV, or pass a data frame, as of `pandas.read_excel`"),
            (b"\xd0\xcf\x11\xe0rest", "is no text: save it as CSV"),
            (b"\xff\xfeo", "neither UTF-8, UTF-16 nor Windows-1252"),
            (b"index,decision\n1,\x81\xff", "neither UTF-8, UTF-16 nor Windows-1252; save it as CSV in UTF-8"),
        ],
    )
    def test_files(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "edited.xlsx").write_bytes(content)
        with pytest.raises(ReviewError, match=message):
            report().apply_review(str(tmp_path / "edited.xlsx"))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("nowhere.csv", "nowhere.csv can't be read .*; pass the path of the edited table"),
            (".", "can't be read"),
            (
                17,
                r"the review is a int; expected the path of a CSV, a data frame, or a mapping such as {17: 3, 42: \"dr",
            ),
            ([17], "the review is a list"),
            ({"17": 3}, r"indices must be integers, got \['17'\]"),
            ({12: True}, "the new label 'True' is no class"),
            ({12: 2.5}, "the new label '2.5' is no class"),
        ],
    )
    def test_other_things(self, source: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            report().apply_review(source)

    def test_new_labels_where_there_are_none(self) -> None:
        """A regression: examples can be kept and dropped."""
        other = AuditReport(rank({"index": np.arange(5), "loss": np.arange(5.0)}))
        assert other.apply_review({1: "keep", 2: "drop"}).dropped == (2,)
        assert len(other.apply_review({2: "drop"}).cleaned(Data())) == 4
        for answer in (1, "1"):
            with pytest.raises(ReviewError, match="the audit knows no labels; only keep and drop are"):
                other.apply_review({1: answer})
        with pytest.raises(ReviewError, match="'wrong', but the audit knows no labels; only keep and drop"):
            other.apply_review({1: "wrong"})

    def test_examples_without_a_label(self) -> None:
        labels = GIVEN.copy()
        labels[12] = -1
        some = AuditReport(rank({**report().columns, "label": labels}))
        with pytest.raises(ReviewError, match="the audit knows no label of this example"):
            some.apply_review({12: 2})
        assert some.apply_review({12: "drop"}).dropped == (12,)


class TestClassNames:
    def test_of_the_manifest_or_the_table(self, tmp_path: Path) -> None:
        named = report(label_names=NAMES)
        for name, number in {"ant": 0, " BEE": 1, "=cat": 2, "'=cat": 2}.items():
            found = named.apply_review({1: name, 12: name, 1234: name, 2345: name})
            assert {found.labels.get(n, int(GIVEN[n])) for n in (1, 12, 1234, 2345)} == {number}
        (tmp_path / "t.csv").write_text("index,label,label_name,new_label\n12,0,ant,\n1,1,bee,\n2,2,,Ant")
        assert report().apply_review(tmp_path / "t.csv").labels == {2: 0}

    def test_a_class_that_is_called_like_a_number_or_a_decision(self, tmp_path: Path) -> None:
        """Folders 10, 2 and 3 are the classes 0, 1 and 2."""
        folders = report(label_names=["10", "2", "3"])
        assert folders.apply_review({12: "3"}).labels == {12: 2}
        with pytest.raises(ReviewError, match=r"'2' can be any of the classes \[1, 2\], by number or by name; write"):
            folders.apply_review({12: "2"})
        (tmp_path / "t.csv").write_text("index,new_label_name\n12,2")
        assert folders.apply_review(tmp_path / "t.csv").labels == {12: 1}
        turns = report(label_names=["left", "right", "on"])
        with pytest.raises(
            ReviewError, match="'right' is a decision and a class; write 'keep', or the class into `new"
        ):
            turns.apply_review({12: "right"})
        (tmp_path / "t.csv").write_text("index,new_label,decision\n12,right,\n1,,ok")
        assert turns.apply_review(tmp_path / "t.csv").labels == {12: 1}

    @pytest.mark.parametrize("names", [["a", "A", "b"], ["A", "a", "b"], ["=a", "=A", "b"]])
    def test_names_that_differ_by_case_only(self, names: list[str], tmp_path: Path) -> None:
        near = report(label_names=names)
        for number, name in enumerate(names[:2]):
            for written in (name, f"'{name}", f" {name} "):
                (tmp_path / "t.csv").write_text(f"index,new_label_name,new_label\n0,{written},\n2,,{written}")
                assert near.apply_review(tmp_path / "t.csv").labels == {n: number for n in (0, 2) if GIVEN[n] != number}
        assert near.apply_review({12: "B"}).labels == {12: 2}

    @pytest.mark.parametrize("how", [how for how in SPREADSHEETS if how not in OTHER_TABLES])
    @pytest.mark.parametrize(
        "names",
        [["2", "0", "1"], ["10", "2", "3"], ["a", "A", "2"], ["=1", "\u202e2", "é"], [], ["", "0", ""]],
        ids=str,
    )
    def test_the_table_of_the_page(self, names: list[str], how: str, tmp_path: Path) -> None:
        """It has the number of the new label, and its name: of a class without one, the number again."""
        decided = {12: 1, 1234: 0, 2999: 1, 5: 0}
        rows = [["decision", "new_label", "new_label_name", "index", "label", "suggested", "rank", "wrong_probability"]]
        for index, label in decided.items():
            name = (names[label] if names else "").replace("\u202e", "") or str(label)
            guarded = f"'{name}" if name.startswith("=") else name
            answers = ["relabel", str(label), guarded, str(index)]
            rows.append([*answers, str(GIVEN[index]), str(SUGGESTED[index]), "1", "0.75"])
        rows.append(["keep", "", "", "1", "1", "2", "2", "0.5"])
        content = SPREADSHEETS[how](rows)
        (tmp_path / "review.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        review = report(label_names=names or None).apply_review(tmp_path / "review.csv")
        assert (review.labels, review.kept) == (decided, (1,))

    def test_a_data_frame_has_made_numbers_of_names(self) -> None:
        """Where some cells of a column are empty, pandas reads 2 as 2.0: it is the name still."""
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"index": [12, 1], "new_label": [1.0, np.nan], "new_label_name": [2.0, np.nan]})
        assert report(label_names=["1", "2", "0"]).apply_review(frame).labels == {12: 1}
        with pytest.raises(ReviewError, match="can be any of the classes"):
            report(label_names=["1", "2", "0"]).apply_review(frame[["index", "new_label"]])


def test_a_table_of_more_than_the_candidates(tmp_path: Path) -> None:
    """Where an audit can't tell, there are no candidates, and people have to look all the more."""
    named = report(label_names=NAMES)
    path = named.write_review(tmp_path / "new" / "review.csv", 10)
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    assert [int(row["index"]) for row in rows] == named.ranking[:10].tolist()
    assert list(rows[0])[:2] == ["decision", "new_label"]
    assert {row["label_name"] for row in rows} <= {"ant", "Bee", "'=cat"}
    assert len(named.apply_review(path).undecided) == 10
    with pytest.raises(
        ReviewError, match="is there already, and may hold what a person has decided; pass another path"
    ):
        named.write_review(path)
    assert len(named.apply_review(named.write_review(tmp_path / "all.csv")).undecided) == named.health().inspect
    for most in (0, -1, 2.0, True):
        with pytest.raises(ReviewError, match="expected how many examples to write, 1 or more"):
            named.write_review(tmp_path / "x.csv", most)  # type: ignore[arg-type]


def test_a_data_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = answered()
    frame = pandas.DataFrame(rows[1:], columns=rows[0])
    assert report().apply_review(frame).labels == LABELS
    numbers = pandas.read_csv(io.StringIO(saved_as(rows)))  # new labels with missing ones are floats
    numbers["new_label"] = [float("nan"), 0.0, 1.0, None, None, None][: len(numbers)]
    numbers["decision"] = None
    by_index = numbers.set_index("index")
    assert report().apply_review(numbers).labels == report().apply_review(by_index).labels != {}


# ------------------------------------------------------------------------------------- labels and indices by hand


class TestLabels:
    def test_by_hand(self) -> None:
        data = report().relabelled(Data(), labels={17: 1, np.int64(3): 0, 20: 2, 30: 2.0})
        assert isinstance(data, Relabelled)
        assert data.labels == {17: 1, 30: 2}  # 3 and 20 have theirs
        assert (data[17][1], data[16][1]) == (1, 1)
        assert repr(data) == "Relabelled(Data, 3,000 examples, 2 with another label)"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"indices": {17: 3}},
                ValueError,
                r"indices is a mapping; new labels are passed as `labels={index: label}`",
            ),
            ({"indices": [17], "labels": {17: 1}}, ValueError, "pass it without indices="),
            ({"labels": [1, 2]}, ValueError, "labels is a list; expected a mapping from index to label, `{17: 3}`"),
            (
                {"labels": {17: 3}},
                LabelError,
                r"new labels {17: 3} are none that the audit has seen; .* classes 0, 1, 2",
            ),
            ({"labels": {17: -1}}, LabelError, r"new labels {17: -1} are none"),
            ({"labels": {17: True}}, LabelError, r"new labels {17: True} are none"),
            ({"labels": {17: "1"}}, LabelError, r"new labels {17: '1'} are none"),
            ({"labels": {SIZE: 1}}, ValueError, r"\[3000\] are not in the audit; expected distinct dataset indices of"),
            ({"labels": {-1: 1}}, ValueError, r"\[-1\] are not in the audit"),
            ({"labels": {1.0: 1}}, ValueError, r"indices must be integers, got \[1.0\]"),
        ],
    )
    def test_bad_ones(self, arguments: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            report().relabelled(Data(), **arguments)

    def test_audits_without_labels(self) -> None:
        with pytest.raises(LabelError, match="the audit knows no labels"):
            AuditReport(rank({"index": np.arange(5), "loss": np.arange(5.0)})).relabelled(Data(), labels={1: 1})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({17: 3}, r"indices={17: 3}: the values of a mapping would be ignored; pass its keys"),
        ({17, 3}, r"a set has no order; pass `sorted\(...\)` of it"),
        ("17", r"must be integers, got \['17'\]"),
        (b"17", r"must be integers, got \[b'17'\]"),
        ([1.0], r"got \[1.0\]"),
        (np.array([1.0]), r"got \[1.0\]"),
        (np.array([[1], [2]]), r"got \[\[1\], \[2\]\]"),
        ([np.True_], r"got \[True\]; a mask becomes indices by `np.flatnonzero\(mask\)`"),
        (np.ones(3, dtype=bool), r"got \[True, True, True\]; a mask becomes"),
        ([torch.tensor(True)], r"got \[True\]"),
        ([torch.tensor(1.5)], r"got \[1.5\]"),
        (np.array([True, False]).nonzero(), r"got \[\[0\]\]"),
        ([None], r"got \[None\]"),
    ],
)
def test_what_is_no_index(indices: Any, message: str) -> None:
    """A silent member of this kind takes keys for all there is, or truth values for 0 and 1."""
    with pytest.raises(ValueError, match=message):
        integers(indices)


def test_what_is_an_index() -> None:
    for indices in (
        5,
        np.int8(5),
        torch.tensor(5),
        [5],
        (5,),
        range(5, 6),
        np.array([5]),
        torch.tensor([5]),
        {5: 0}.keys(),
    ):
        assert integers(indices) == [5]
    assert integers(np.flatnonzero(torch.arange(4) > 1)) == [2, 3]
    assert integers(n for n in (2, 3)) == [2, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "drop", [[1, 2], {1}, {17: 3}, np.array([1, 2]), torch.tensor(0.05), torch.tensor(3), np.True_, "1"]
)
def test_what_is_no_share_or_number_to_drop(drop: Any) -> None:
    """``torch.tensor(0.05)`` was taken for a number of examples, so that nothing was left out."""
    with pytest.raises(ValueError, match=r"expected a share from 0 to below 1, .* of your choice: `sorted\(\{"):
        report().clean_indices(drop)
