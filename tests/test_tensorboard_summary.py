"""What arrives in real event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.tensorboard import SummaryWriter

from lightning_influence.audit.columns import COLUMNS, Column, candidate_rows
from lightning_influence.loggers.candidate_sheets import candidates, candidates_table
from lightning_influence.loggers.exhibits import Exhibit
from lightning_influence.loggers.numbers import _bin_edges, detection_curves, log_histogram
from lightning_influence.loggers.pictures import drawable, sheet
from lightning_influence.loggers.text import caption
from lightning_influence.loggers.writers import show

TILE, GAP, LINE = 192, 12, 23
STEP = 7


class TensorBoardLogger:
    """As far as this room knows it: by its name."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.experiment = writer


class Log:
    """A writer and, once asked for, what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = SummaryWriter(str(path))
        self.logger = TensorBoardLogger(self.writer)

    def show(self, exhibits: Iterable[Exhibit]) -> None:
        for exhibit in exhibits:
            show(self.logger, exhibit, STEP)

    def read(self) -> EventAccumulator:
        self.writer.close()
        reader = EventAccumulator(str(self.path), size_guidance={"images": 0, "tensors": 0, "histograms": 0})
        reader.Reload()
        return reader

    def tags(self) -> dict[str, Any]:
        return {kind: tags for kind, tags in self.read().Tags().items() if tags}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    log.writer.close()


def table(n: int = 40, candidates: int = 12) -> dict[str, np.ndarray]:
    """A scores table whose rank runs against the order of the rows."""
    rng = np.random.default_rng(0)
    rank = np.arange(n, 0, -1)
    return {
        "index": np.arange(n) + 1000,
        "label": np.arange(n) % 3,
        "predicted": np.arange(n) % 3,
        "suggested": np.where(np.arange(n) % 4 == 0, -1, (np.arange(n) + 1) % 3),
        "rank": rank,
        "candidate": rank <= candidates,
        "suspicion": 1.0 / rank,
        "self_influence": 10.0 ** rng.normal(size=n),
        "el2n": rng.normal(size=n),
    }


# ------------------------------------------------------------------------------------------------ histograms


def test_histogram_of_many_decades(log: Log) -> None:
    values = 10 ** np.random.default_rng(0).uniform(-12, 3, size=3000)
    log.show(log_histogram("influence/x", values)[0])
    reader = log.read()
    assert reader.Tags()["histograms"] == ["influence/x/log10"]
    assert reader.Tags()["scalars"] == []
    event = reader.Histograms("influence/x/log10")[0]
    histogram = event.histogram_value
    assert event.step == STEP
    assert histogram.num == 3000
    assert sum(histogram.bucket) == 3000
    assert histogram.min == pytest.approx(np.log10(values.min()))
    assert histogram.max == pytest.approx(np.log10(values.max()))
    # Uniform in the logarithm: level bars. Without it, all but a few values are in the first of them.
    full = np.array(histogram.bucket[2:-1])
    assert 25 <= len(full) <= 75
    assert full.min() > 0.4 * full.max()
    # The bars hold what their limits say.
    expected, _ = np.histogram(np.log10(values), bins=histogram.bucket_limit)
    assert histogram.bucket[1:] == expected.tolist()


def test_histogram_counts_what_has_no_logarithm(log: Log) -> None:
    values = np.array([0.0, 0.0, -1.0, np.nan, np.inf, -np.inf, 1.0, 10.0])
    log.show(log_histogram("x", values)[0])
    assert log_histogram("x", values)[1] == {"zero": 2, "negative": 1, "non-finite": 3}
    reader = log.read()
    assert reader.Tags()["scalars"] == []
    assert reader.Histograms("x/log10")[0].histogram_value.num == 2


@pytest.mark.parametrize("values", [[], [0.0], [np.nan, -3.0]])
def test_histogram_of_nothing(log: Log, values: Any) -> None:
    log.show(log_histogram("x", values)[0])
    assert "histograms" not in log.tags()


@pytest.mark.parametrize(
    "values",
    [[0.02] * 5, [1e-320, 1e308], [1.0, 1.0 + 1e-15], [3], [10, 100]],
)
def test_histogram_keeps_every_positive_value(log: Log, values: Any) -> None:
    """Also of values that sit exactly on an edge, and of equal ones."""
    log.show(log_histogram("x", values)[0])
    histogram = log.read().Histograms("x/log10")[0].histogram_value
    assert sum(histogram.bucket) == histogram.num == len(values)
    assert len(histogram.bucket) <= 102


def test_histograms_of_two_steps_share_their_edges() -> None:
    """Multiples of one round number: otherwise the bars of two epochs cannot be compared."""
    first = _bin_edges(np.linspace(-5.03, 1.41, 500))
    second = _bin_edges(np.linspace(-5.31, 1.17, 500))
    shared = np.intersect1d(first.round(9), second.round(9))
    assert len(shared) > 0.9 * len(first)


# ------------------------------------------------------------------------------------------------ pictures


def shown(image: torch.Tensor, text: str = "") -> torch.Tensor:
    """The tile of one picture alone on a sheet, ``[3, 192, 192]``."""
    return sheet([(image, text)], 1)[:, GAP : GAP + TILE, GAP : GAP + TILE]


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 28, 28), (168, 168)),
        ((3, 32, 32), (192, 192)),
        ((3, 96, 64), (192, 128)),
        ((3, 100, 64), (100, 64)),
        ((3, 300, 600), (96, 192)),
        ((1, 3, 40), (12, 160)),
        ((1, 1, 1), (192, 192)),
    ],
)
def test_small_images_are_enlarged_and_large_ones_reduced(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    grid = sheet([(torch.zeros(shape), "a\nb")] * 3, 2)
    assert grid.dtype == torch.uint8
    assert grid.is_contiguous()
    assert list(grid.shape) == [3, 2 * (TILE + GAP // 2 + 2 * LINE + GAP) + GAP, 2 * (TILE + GAP) + GAP]
    grey = (grid[:, GAP : GAP + TILE, GAP : GAP + TILE] == 128).all(0)  # a constant image
    height, width = tile
    assert int(grey.any(1).sum()) == height
    assert int(grey.any(0).sum()) == width


def test_pixels_are_shown_unsmoothed_in_their_own_range() -> None:
    image = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).reshape(1, 2, 2)
    for scaled in (image, image * 1e6 - 3):
        tile = shown(scaled)
        assert tile.unique().tolist() == [0, 64, 128, 255]
        assert (tile[:, :96, 96:] == 64).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_pixels_of_every_number_type(dtype: torch.dtype) -> None:
    assert shown(torch.tensor([0, 1, 1, 0]).reshape(1, 2, 2).to(dtype)).unique().tolist() == [0, 255]


def test_pixels_that_are_not_finite() -> None:
    image = torch.tensor([[np.nan, np.inf], [-1.0, 1.0]], dtype=torch.float64).reshape(1, 2, 2)
    assert shown(image)[0, ::96, ::96].tolist() == [[0, 255], [0, 255]]
    assert (shown(torch.full((3, 4, 4), torch.nan))[:, 20, 20] == 128).all()


def test_channels() -> None:
    colour = torch.tensor([1.0, 0.0, 0.5]).reshape(3, 1, 1).expand(3, 4, 4)
    assert shown(colour)[:, 50, 50].tolist() == [255, 0, 128]
    five = torch.zeros(5, 4, 4)
    five[2, :, 2:] = 1
    assert shown(five)[:, 50, 20].tolist() == [0, 0, 0]
    assert shown(five)[:, 50, 150].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "text",
    [
        "#12 given 3\nsuggests 8",
        "#12345678 given eight_with_a_rather_long_name\nsuggests nine_with_a_rather_long_name",
        "x" * 500,
        "W" * 40 + "\n" + "M" * 40,
        "猫" * 50,
        "",
        "a\x00b\nc\td‮e",
    ],
)
def test_text_stays_below_its_tile(text: str) -> None:
    """With the pictures painted over, whatever is dark is text, and none of it may reach the gaps between the tiles."""
    grid = sheet([(torch.ones(1, 28, 28), text)] * 2, 2)
    grid[:, : GAP + TILE + 2] = 255
    dark = (grid < 120).all(dim=0)
    assert not dark[:, : GAP - 1].any()
    assert not dark[:, GAP + TILE + 1 : 2 * GAP + TILE - 1].any()
    assert not dark[:, -GAP:].any()
    assert not dark[-4:].any()
    assert dark.any() == bool(text)
    assert torch.equal(dark[:, GAP : GAP + TILE], dark[:, TILE + 2 * GAP : 2 * (TILE + GAP)])


def test_text_that_is_cut_ends_in_an_ellipsis() -> None:
    image = torch.ones(1, 28, 28)
    cut, longer, whole = (sheet([(image, text)], 1) for text in ("word " * 50, "word " * 200, "word word"))
    assert torch.equal(cut, longer)
    assert not torch.equal(cut, whole)


def test_letters_that_the_font_lacks() -> None:
    """Pillow's font is ASCII only, and would draw a box for each of them."""
    assert drawable("Zoë, naïve…") == "Zoe, naive..."
    assert drawable("a猫b") == "a?b"
    names = ["Käse", "猫", "what?"]
    assert caption(7, 1, "suggests", 2, names) == "#7 given 1\nsuggests what?"
    assert caption(7, 0, "suggests", 1, names) == "#7 given Käse\nsuggests 1"


def test_captions() -> None:
    assert caption(12, 3, "suggests", 8, None) == "#12 given 3\nsuggests 8"
    assert caption(12, 3, "suggests", 3, None) == "#12 given 3"
    assert caption(12, 3, "suggests", -1, None) == "#12 given 3"
    assert caption(12, -1, "suggests", -1, None) == "#12"


# ------------------------------------------------------------------------------------------------ candidates


class Cells(HTMLParser):
    """Text of the cells of a table, row by row, and every tag that occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def rendered(markdown: str) -> Cells:
    """As the Text dashboard shows it."""
    cells = Cells()
    cells.feed(markdown_to_safe_html(markdown))
    return cells


def test_candidates_are_by_rank() -> None:
    columns = table()
    assert candidate_rows(columns).tolist() == list(range(39, 27, -1))
    assert candidate_rows(columns, 3).tolist() == [39, 38, 37]


def test_markdown_table(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = table(n=80, candidates=60)
    columns["el2n"][79] = np.nan
    columns["self_influence"][78] = 0.000123456
    columns["suggested"][78] = -1
    markdown = candidates_table(columns, ["cat", "dog", "owl"]).markdown()
    assert markdown.startswith("**60 candidates** among 80 training examples; the 50 most suspicious are shown.\n")
    cells = rendered(markdown)
    assert cells.rows[0] == ["rank", "index", "given", "suggested", "suspicion", "el2n", "self_influence"]
    assert cells.rows[1][:6] == ["1", "1079", "dog", "owl", "1", "–"]
    assert cells.rows[2][3:5] == ["–", "0.5"]
    assert cells.rows[2][6] == "0.000123"
    assert len(cells.rows) == 51
    monkeypatch.setitem(COLUMNS, "el2n", Column("el2n", "", "low", shown=("table",)))
    assert "High scores are suspicious; for el2n, low ones are." in candidates_table(columns, None).markdown()


def test_markdown_shows_only_present_columns() -> None:
    columns = {
        "rank": np.array([2, 1]), "index": np.array([5, 6]), "suspicion": np.array([0.0, np.inf]),
        "candidate": np.array([True, True]),
    }  # fmt: skip
    markdown = candidates_table(columns, None).markdown()
    assert markdown.startswith("**2 candidates** among 2 training examples, most suspicious first.")
    assert rendered(markdown).rows == [["rank", "index", "suspicion"], ["1", "6", "inf"], ["2", "5", "0"]]


def test_long_class_names_are_cut() -> None:
    shown = candidates_table(table(), ["w" * 100] * 3)
    assert shown.rows[0][2] == "w" * 23 + "…"
    # Too wide for a table without broken words.
    cells = rendered(shown.markdown())
    assert cells.rows == []
    assert cells.tags == {"p", "strong", "ul", "li"}


def test_markdown_without_candidates() -> None:
    assert candidates_table(table(candidates=0), None).markdown() == "**No candidates** among 40 training examples."
    empty = {name: column[:0] for name, column in table().items()}
    assert candidates_table(empty, None).markdown() == "**No candidates** among 0 training examples."


@pytest.mark.parametrize(
    "name",
    [
        "a | b",
        "a \\| b \\",
        "<script>x</script>",
        "<img src=x onerror=y>",
        "&lt;b&gt; & &#124;",
        "`code` ``` x",
        "*bold* _it_ ~~no~~",
        "[x](javascript:y)",
        "![x](http://a.b/c)",
        "# head",
        "- item",
        "1. one",
        "https://a.b",
        "$x^2$",
        "naïve 猫 👩\u200d🔬",
    ],
)
def test_class_names_are_only_text(name: str) -> None:
    """TensorBoard's own renderer must give back exactly the name, in its own cell, with no tag from it."""
    cells = rendered(candidates_table(table(), [name] * 3).markdown())
    assert {row[2] for row in cells.rows[1:]} == {name}
    assert {len(row) for row in cells.rows} == {7}
    assert cells.tags == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    source = candidates_table(table(), [name] * 3).markdown().split("---:", 1)[1].split("\n\n")[0]
    assert not re.search(r"[<>`*_\[\]\\]", source)
    assert {line.count("|") for line in source.splitlines()[1:]} == {8}


def test_class_names_on_several_lines() -> None:
    names = ["a\n\n| b\r\n# c", "x\x00\x1b\u2028y‮z", " \n\t"]
    cells = rendered(candidates_table(table(), names).markdown())
    assert {row[2] for row in cells.rows[1:]} == {"a | b # c", "x yz", "2"}
    assert len(cells.rows) == 13


def test_labels_outside_the_names() -> None:
    columns = {"rank": np.arange(1, 6), "index": np.arange(5), "candidate": np.ones(5, dtype=bool)}
    columns["label"] = np.array([0.0, 1.0, 2.5, np.nan, -1.0])
    cells = rendered(candidates_table(columns, ["zero"]).markdown())
    assert [row[2] for row in cells.rows[1:]] == ["zero", "1", "2.5", "–", "–"]


def test_candidates_in_the_event_file(log: Log) -> None:
    columns, names = table(), ["cat", "dog", "owl"]
    pixels = torch.rand(40, 1, 28, 28)
    asked: list[int] = []

    def images(indices: list[int]) -> torch.Tensor:
        asked.extend(indices)
        return pixels[torch.tensor(indices) - 1000]

    log.show(candidates(columns, images=images, label_names=names))
    assert asked == list(range(1039, 1027, -1))
    reader = log.read()
    assert reader.Tags()["images"] == ["influence/candidates", "influence/candidates/2"]
    assert reader.Tags()["tensors"] == ["influence/candidates/text_summary"]

    event = reader.Images("influence/candidates")[0]
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    texts = [
        caption(columns["index"][row], columns["label"][row], "suggests", columns["suggested"][row], names)
        for row in range(39, 30, -1)
    ]
    assert texts[0] == "#1039 given cat\nsuggests dog"
    expected = sheet([(pixels[row], text) for row, text in zip(range(39, 30, -1), texts, strict=True)], 3)
    assert event.step == STEP
    assert picture.size == (event.width, event.height) == (expected.shape[2], expected.shape[1])
    assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), expected)
    second = Image.open(io.BytesIO(reader.Images("influence/candidates/2")[0].encoded_image_string))
    assert second.size[0] == picture.size[0]
    assert second.size[1] < picture.size[1]

    text = reader.Tensors("influence/candidates/text_summary")[0]
    assert text.step == STEP
    assert text.tensor_proto.string_val[0].decode() == candidates_table(columns, names).markdown()


@pytest.mark.parametrize("count", [12, 0])
def test_candidates_without_images(log: Log, count: int) -> None:
    log.show(candidates(table(candidates=count), images=lambda indices: None))
    assert log.tags() == {"tensors": ["influence/candidates/text_summary"]}


def test_images_that_fail_come_after_the_table(log: Log) -> None:
    def images(indices: list[int]) -> torch.Tensor:
        raise OSError("the volume is gone")

    with pytest.raises(OSError, match="the volume is gone"):
        log.show(candidates(table(), images=images))
    assert log.tags() == {"tensors": ["influence/candidates/text_summary"]}


# ------------------------------------------------------------------------------------------------ detection


def noisy_table(n: int = 2000) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    is_mislabelled = rng.random(n) < 0.02
    columns = {
        "index": np.arange(n),
        "label": np.zeros(n, dtype=int),
        "suspicion": rng.normal(size=n) + 2 * is_mislabelled,
        "self_influence": 10 ** (4 * rng.normal(size=n) + 4 * is_mislabelled),
        "aum": rng.normal(size=n) - 3 * is_mislabelled,
        "prob_margin": rng.random(n) - is_mislabelled,
        "epochs_wrong": rng.integers(0, 3, size=n) + is_mislabelled,
    }
    return columns, is_mislabelled


def curve(reader: EventAccumulator, column: str) -> dict[str, np.ndarray]:
    proto = reader.Tensors(f"influence/detection/{column}")[0].tensor_proto
    values = np.array(proto.float_val).reshape([dim.size for dim in proto.tensor_shape.dim])
    return dict(zip(("tp", "fp", "tn", "fn", "precision", "recall"), values, strict=True))


def test_detection_in_the_event_file(log: Log) -> None:
    columns, is_mislabelled = noisy_table()
    columns["suspicion"][::10] = np.nan
    log.show(detection_curves(columns, is_mislabelled))
    scored = ["suspicion", "aum", "epochs_wrong", "prob_margin", "self_influence"]
    reader = log.read()
    assert set(reader.Tags()["tensors"]) == {f"influence/detection/{name}" for name in scored}
    for name in scored:
        scores = np.nan_to_num(columns[name].astype(float), nan=-1e9) * (-1 if name in ("aum", "prob_margin") else 1)
        # Every point of the curve is a true statement about the top of the ranking.
        points = curve(reader, name)
        assert (points["tp"] + points["fn"] == is_mislabelled.sum()).all()
        order = np.argsort(-scores, kind="stable")
        for hits, misses in zip(points["tp"], points["fp"], strict=True):
            inspected = int(hits + misses)
            assert hits == is_mislabelled[order[:inspected]].sum()
        assert points["recall"][0] == 1


def test_curve_is_fine_where_the_mislabelled_are(log: Log) -> None:
    """2 % label noise: evenly spaced ranks would spend 3 of the 127 thresholds on them, these spend 18."""
    n = 5000
    is_mislabelled = np.arange(n) < 100
    log.show(detection_curves({"suspicion": -np.arange(float(n))}, is_mislabelled))
    points = curve(log.read(), "suspicion")
    rising = np.unique(points["recall"][(points["recall"] > 0) & (points["recall"] < 1)])
    assert len(rising) >= 15
    assert (points["precision"][(points["recall"] > 0) & (points["recall"] < 1)] == 1).all()


def test_equal_scores_give_no_information(log: Log) -> None:
    is_mislabelled = np.arange(20) < 4
    log.show(detection_curves({"harm": np.full(20, 3.0)}, is_mislabelled))
    points = curve(log.read(), "harm")
    assert set(np.unique(points["tp"] + points["fp"])) <= {0, 20}


def test_column_without_a_number_is_left_out(log: Log) -> None:
    columns = {"loss": np.full(4, np.nan), "harm": np.arange(4.0)}
    log.show(detection_curves(columns, np.arange(4) == 3))
    assert log.tags()["tensors"] == ["influence/detection/harm"]
