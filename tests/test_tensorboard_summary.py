"""What arrives in real event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.tensorboard import SummaryWriter

from lightning_influence.tensorboard import pictures, summary
from lightning_influence.tensorboard.summary import (
    candidate_grid,
    candidates_markdown,
    top_candidates,
    write_candidates,
    write_detection,
    write_histogram,
    write_scalars,
)

STEP = 7


class Log:
    """A writer and, once asked for, what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = SummaryWriter(str(path))

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
        "aum": rng.normal(size=n),
    }


# ------------------------------------------------------------------------------------------------ scalars, histograms


def test_scalars_leave_out_what_cannot_be_drawn(log: Log) -> None:
    values = {"a": 1.5, "b": None, "c": float("nan"), "d": float("inf"), "e": torch.tensor(2), "f": np.float32(3)}
    assert write_scalars(log.writer, values, STEP) == ["b", "c", "d"]
    assert write_scalars(log.writer, {}, STEP) == []
    reader = log.read()
    read = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert read == {"influence/a": [(STEP, 1.5)], "influence/e": [(STEP, 2.0)], "influence/f": [(STEP, 3.0)]}


@pytest.mark.parametrize("as_tensor", [False, True])
def test_histogram_of_many_decades(log: Log, as_tensor: bool) -> None:
    values = 10 ** np.random.default_rng(0).uniform(-12, 3, size=3000)
    write_histogram(log.writer, "influence/x", torch.from_numpy(values) if as_tensor else values, STEP)
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
    values = [0.0, 0.0, -1.0, np.nan, np.inf, -np.inf, 1.0, 10.0]
    write_histogram(log.writer, "x", values, STEP)
    reader = log.read()
    assert {tag: reader.Scalars(tag)[0].value for tag in reader.Tags()["scalars"]} == {
        "x/zero": 2,
        "x/negative": 1,
        "x/non_finite": 3,
    }
    assert reader.Histograms("x/log10")[0].histogram_value.num == 2


@pytest.mark.parametrize("values", [[], [0.0], [np.nan, -3.0], torch.zeros(0, 5)])
def test_histogram_of_nothing(log: Log, values: Any) -> None:
    write_histogram(log.writer, "x", values, STEP)
    assert "histograms" not in log.tags()


@pytest.mark.parametrize(
    "values",
    [[0.02] * 5, [1e-320, 1e308], [1.0, 1.0 + 1e-15], torch.tensor([1e-3, 2e-3], dtype=torch.bfloat16), [3], [10, 100]],
)
def test_histogram_keeps_every_positive_value(log: Log, values: Any) -> None:
    """Also of values that sit exactly on an edge, and of equal ones."""
    write_histogram(log.writer, "x", values, STEP)
    histogram = log.read().Histograms("x/log10")[0].histogram_value
    assert sum(histogram.bucket) == histogram.num == len(values)
    assert len(histogram.bucket) <= 102


def test_histograms_of_two_steps_share_their_edges() -> None:
    """Multiples of one round number: otherwise the bars of two epochs cannot be compared."""
    first = summary._bin_edges(np.linspace(-5.03, 1.41, 500))
    second = summary._bin_edges(np.linspace(-5.31, 1.17, 500))
    shared = np.intersect1d(first.round(9), second.round(9))
    assert len(shared) > 0.9 * len(first)


# ------------------------------------------------------------------------------------------------ pictures


def ink(grid: torch.Tensor) -> torch.Tensor:
    """Where something dark is drawn."""
    return (grid < 120).all(dim=0)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 28, 28), (140, 140)),
        ((3, 32, 32), (128, 128)),
        ((1, 8, 8), (144, 144)),
        ((3, 96, 96), (192, 192)),
        ((3, 100, 64), (100, 64)),
        ((1, 94, 94), (188, 188)),
        ((3, 300, 600), (72, 144)),
        ((1, 3, 40), (12, 160)),
        ((1, 1, 1), (144, 144)),
    ],
)
def test_grid_enlarges_small_and_reduces_large_images(shape: tuple[int, ...], tile: tuple[int, int]) -> None:
    grid = candidate_grid(torch.rand(3, *shape), ["a", "b", "c"], columns=2)
    assert grid.dtype == torch.uint8
    assert grid.is_contiguous()
    assert grid.ndim == 3
    assert grid.shape[0] == 3
    height, width = tile
    assert grid.shape[2] == 2 * max(width, 128) + 3 * 12
    assert grid.shape[1] == 2 * (height + 6 + 26 + 12) + 12


def test_grid_shows_the_pixels_unsmoothed() -> None:
    images = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).reshape(1, 1, 2, 2)
    grid = candidate_grid(images, ["x"])
    shown = grid[:, 12 : 12 + 144, 12 : 12 + 144]
    assert shown.unique().tolist() == [0, 64, 128, 255]
    assert (shown[:, :72, 72:] == 64).all()


def test_grid_stretches_every_image_to_its_own_range() -> None:
    images = torch.stack([torch.linspace(-3, -1, 64), torch.linspace(0, 1e6, 64), torch.full((64,), 0.2)])
    grid = candidate_grid(images.reshape(3, 1, 8, 8), ["", "", ""])
    tiles = [grid[:, 12:156, left : left + 144] for left in (12, 168, 324)]
    assert [(int(tile.min()), int(tile.max())) for tile in tiles] == [(0, 255), (0, 255), (128, 128)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_grid_takes_every_number_type(dtype: torch.dtype) -> None:
    images = torch.tensor([0, 1, 1, 0]).reshape(1, 1, 2, 2).to(dtype)
    assert candidate_grid(images, ["x"])[:, 12:156, 12:156].unique().tolist() == [0, 255]


def test_grid_survives_non_finite_and_extreme_pixels() -> None:
    images = torch.tensor([[np.nan, np.inf], [-1e308, 1e308]], dtype=torch.float64).reshape(1, 1, 2, 2)
    shown = candidate_grid(images, ["x"])[0, 12:156, 12:156]
    assert shown[::72, ::72].tolist() == [[0, 255], [0, 255]]
    assert (candidate_grid(torch.full((1, 3, 4, 4), torch.nan), ["x"])[:, 20, 20] == 128).all()


def test_grid_channels() -> None:
    colour = torch.tensor([1.0, 0.0, 0.5]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert candidate_grid(colour, ["x"])[:, 50, 50].tolist() == [255, 0, 128]
    five = torch.zeros(1, 5, 4, 4)
    five[:, 2, :, 2:] = 1
    shown = candidate_grid(five, ["x"])[:, 50]
    assert shown[:, 20].tolist() == [0, 0, 0]
    assert shown[:, 140].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "caption",
    [
        "#12  given 3 → suggests 8",
        "#12345678  given eight_with_a_rather_long_name → suggests nine_with_a_rather_long_name",
        "x" * 500,
        "word " * 200,
        "W" * 40 + " → " + "M" * 40,
        "猫" * 50,
        "",
        "→ → →",
        "a\x00b\nc\td‮e",
    ],
)
def test_captions_stay_below_their_tile(caption: str) -> None:
    """With the pictures painted over, whatever is dark is text, and none of it may reach the gaps between the tiles."""
    images = torch.ones(4, 1, 28, 28)
    grid = candidate_grid(images, [caption] * 4, columns=2)
    grid[:, 12:152] = 255
    dark = ink(grid)
    assert not dark[:, :11].any()
    assert not dark[:, 153:163].any()
    assert not dark[:, -12:].any()
    assert not dark[-8:].any()
    assert dark.any() == bool(caption)


def test_captions_differ() -> None:
    images = torch.zeros(1, 1, 28, 28)
    grids = [candidate_grid(images, [text]) for text in ("given 3 → suggests 8", "given 3   suggests 8", "given 8 3")]
    assert not torch.equal(grids[0], grids[1])
    assert not torch.equal(grids[1], grids[2])


def test_one_long_caption_only_makes_its_own_row_higher() -> None:
    images = torch.zeros(2, 1, 28, 28)
    short = candidate_grid(images, ["a", "a"], columns=1).shape[1]
    one = candidate_grid(images, ["a", "given a long name → suggests another quite long name"], columns=1).shape[1]
    both = candidate_grid(images, ["given a long name → suggests another quite long name"] * 2, columns=1).shape[1]
    assert short < one < both


def test_wrapping_keeps_both_labels() -> None:
    """The given name must not push the suggested one off the end."""
    font, (lines,) = pictures.lay_out_captions(["#5  given the nine of hearts, lucky → suggests six of clubs"], 140)
    assert lines[0] == "#5"
    assert lines[1].startswith("given the nine")
    assert [line for line in lines if line.startswith("→ suggests")]
    assert len(lines) <= 5
    assert all(pictures.text_width(line, font) <= 140 for line in lines)

    _, (lines,) = pictures.lay_out_captions(["#12  given 3 → suggests 8"], 140)
    assert lines == ["#12", "given 3", "→ suggests 8"]
    _, (lines,) = pictures.lay_out_captions(["#12  given 3 → suggests 8"], 400)
    assert lines == ["#12  given 3 → suggests 8"]


def test_letters_that_the_font_lacks() -> None:
    """Pillow's font is ASCII only, and would draw a box for each of them."""
    assert pictures.drawable("Zoë – naïve → 3") == "Zoe - naive → 3"
    assert pictures.drawable("a猫b") == "a?b"
    columns = table()
    names = ["Käse", "猫", "what?"]
    assert summary._caption(columns, 1, names) == "#1001  given 1 → suggests what?"
    assert summary._caption(columns, 3, names) == "#1003  given Käse → suggests 1"


def test_caption_without_another_label() -> None:
    columns = table()
    assert summary._caption(columns, 0, None) == "#1000  given 0"
    columns["suggested"] = columns["label"]
    assert summary._caption(columns, 1, None) == "#1001  given 1"
    assert summary._caption({"index": np.array([4]), "rank": np.array([1])}, 0, None) == "#4"


@pytest.mark.parametrize(
    ("shape", "captions", "columns", "message"),
    [
        ((0, 1, 28, 28), 0, 8, r"got shape \[0, 1, 28, 28\]"),
        ((2, 28, 28), 2, 8, r"must be \[n, C, H, W\]"),
        ((2, 0, 28, 28), 2, 8, "without an empty dimension"),
        ((2, 1, 28, 28), 1, 8, "got 1 captions for 2 images"),
        ((2, 1, 28, 28), 2, 0, "columns must be at least 1, got 0"),
    ],
)
def test_grid_errors(shape: tuple[int, ...], captions: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidate_grid(torch.zeros(shape), ["x"] * captions, columns=columns)


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


def test_top_candidates_are_by_rank() -> None:
    columns = table()
    assert top_candidates(columns).tolist() == list(range(39, 27, -1))
    assert top_candidates(columns, 3).tolist() == [39, 38, 37]
    del columns["candidate"]
    assert len(top_candidates(columns)) == 40
    assert top_candidates({"rank": np.array([], dtype=int)}).tolist() == []


def test_top_candidates_errors() -> None:
    with pytest.raises(ValueError, match=r"needs a 'rank' column, got \['suspicion'\]"):
        top_candidates({"suspicion": np.ones(3)})
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        top_candidates(table(), 0)
    with pytest.raises(ValueError, match="must have one length, got .*'rank': 3.*'index': 2"):
        top_candidates({"rank": np.arange(3), "index": np.arange(2)})


def test_markdown_table() -> None:
    columns = table()
    columns["aum"][39] = np.nan
    columns["self_influence"][38] = 0.000123456
    columns["suggested"][38] = -1
    markdown = candidates_markdown(columns, label_names=["cat", "dog", "owl"], limit=2)
    assert markdown.startswith("**12 candidates** among 40 training examples; the 2 most suspicious are shown.")
    assert "for aum, low ones are" in markdown
    cells = rendered(markdown)
    assert cells.rows[0] == ["rank", "index", "given", "suggested", "suspicion", "self_influence", "aum"]
    assert cells.rows[1][:5] == ["1", "1039", "cat", "dog", "1"]
    assert cells.rows[1][6] == "–"
    assert cells.rows[2][3:6] == ["–", "0.5", "0.000123"]
    assert len(cells.rows) == 3


def test_markdown_shows_only_present_columns() -> None:
    columns = {"rank": np.array([2, 1]), "index": np.array([5, 6]), "suspicion": np.array([0.0, np.inf])}
    markdown = candidates_markdown(columns, label_names=None)
    assert markdown.startswith("**2 candidates** among 2 training examples, most suspicious first.")
    assert rendered(markdown).rows == [["rank", "index", "suspicion"], ["1", "6", "inf"], ["2", "5", "0"]]


def test_markdown_drops_scores_beside_long_class_names() -> None:
    """The dashboard breaks "1291" into "129" and "1" once a table is too wide."""
    columns = table() | {name: np.ones(40) for name in summary.SCORE_COLUMNS}
    short = rendered(candidates_markdown(columns, label_names=None)).rows[0]
    long = rendered(candidates_markdown(columns, label_names=["w" * 100] * 3)).rows
    assert short[4:8] == ["suspicion", "self_influence", "harm", "loss_mean"]
    assert long[0] == ["rank", "index", "given", "suggested", "suspicion", "self_influence"]
    assert long[1][2] == "w" * 27 + "…"


def test_markdown_without_candidates() -> None:
    assert candidates_markdown(table(candidates=0), label_names=None) == "**No candidates** among 40 training examples."
    empty = {name: column[:0] for name, column in table().items()}
    assert candidates_markdown(empty, label_names=None) == "**No candidates** among 0 training examples."


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
    cells = rendered(candidates_markdown(table(), label_names=[name] * 3))
    assert {row[2] for row in cells.rows[1:]} == {name}
    assert {len(row) for row in cells.rows} == {7}
    assert cells.tags == {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    source = candidates_markdown(table(), label_names=[name] * 3).split("---:", 1)[1]
    assert not re.search(r"[<>`*_\[\]\\]", source)
    assert {line.count("|") for line in source.splitlines()[1:]} == {8}


def test_class_names_on_several_lines() -> None:
    names = ["a\n\n| b\r\n# c", "x\x00\x1b\u2028y‮z", " \n\t"]
    cells = rendered(candidates_markdown(table(), label_names=names))
    assert {row[2] for row in cells.rows[1:]} == {"a | b # c", "x yz", "2"}
    assert len(cells.rows) == 13


def test_labels_outside_the_names() -> None:
    columns = {"rank": np.arange(1, 6), "label": np.array([0.0, 1.0, 2.5, np.nan, -1.0])}
    cells = rendered(candidates_markdown(columns, label_names=["zero"]))
    assert [row[1] for row in cells.rows[1:]] == ["zero", "1", "2.5", "–", "–"]


def test_candidates_in_the_event_file(log: Log) -> None:
    columns = table()
    images = torch.rand(12, 1, 28, 28)
    write_candidates(log.writer, columns, images=images, label_names=["cat", "dog", "owl"], step=STEP)
    reader = log.read()
    assert reader.Tags()["images"] == ["influence/candidates", "influence/candidates/2"]
    assert reader.Tags()["tensors"] == ["influence/candidates/text_summary"]

    event = reader.Images("influence/candidates")[0]
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    captions = [summary._caption(columns, row, ["cat", "dog", "owl"]) for row in range(39, 30, -1)]
    assert captions[0] == "#1039  given cat → suggests dog"
    expected = candidate_grid(images[:9], captions, columns=3)
    assert event.step == STEP
    assert picture.size == (event.width, event.height) == (expected.shape[2], expected.shape[1])
    assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), expected)
    second = Image.open(io.BytesIO(reader.Images("influence/candidates/2")[0].encoded_image_string))
    assert second.size == (3 * 140 + 4 * 12, second.height)

    text = reader.Tensors("influence/candidates/text_summary")[0]
    assert text.step == STEP
    written = text.tensor_proto.string_val[0].decode()
    assert written == candidates_markdown(columns, label_names=["cat", "dog", "owl"])


def test_candidates_without_images(log: Log) -> None:
    write_candidates(log.writer, table(), images=None, step=STEP)
    assert log.tags() == {"tensors": ["influence/candidates/text_summary"]}


def test_no_candidates(log: Log) -> None:
    write_candidates(log.writer, table(candidates=0), images=torch.zeros(0, 1, 28, 28), step=STEP)
    assert log.tags() == {"tensors": ["influence/candidates/text_summary"]}


def test_images_of_other_rows_are_refused(log: Log) -> None:
    with pytest.raises(ValueError, match=r"got 13 images for 12 candidates.*top_candidates"):
        write_candidates(log.writer, table(), images=torch.rand(13, 1, 8, 8), step=STEP)
    assert log.tags() == {}


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
    aurocs = write_detection(log.writer, columns, torch.from_numpy(is_mislabelled), STEP)
    scored = ["suspicion", "aum", "epochs_wrong", "prob_margin", "self_influence"]
    assert list(aurocs) == scored
    reader = log.read()
    assert set(reader.Tags()["tensors"]) == {f"influence/detection/{name}" for name in scored}
    assert set(reader.Tags()["scalars"]) == {f"influence/detection/{name}_auroc" for name in scored}
    for name in scored:
        scores = np.nan_to_num(columns[name].astype(float), nan=-1e9) * (-1 if name in ("aum", "prob_margin") else 1)
        expected = roc_auc_score(is_mislabelled, scores)
        assert expected > 0.7
        assert aurocs[name] == pytest.approx(expected, abs=1e-12)
        assert reader.Scalars(f"influence/detection/{name}_auroc")[0].value == pytest.approx(expected, abs=1e-6)

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
    write_detection(log.writer, {"suspicion": -np.arange(float(n))}, is_mislabelled, STEP)
    points = curve(log.read(), "suspicion")
    rising = np.unique(points["recall"][(points["recall"] > 0) & (points["recall"] < 1)])
    assert len(rising) >= 15
    assert (points["precision"][(points["recall"] > 0) & (points["recall"] < 1)] == 1).all()


def test_equal_scores_give_no_information(log: Log) -> None:
    is_mislabelled = np.arange(20) < 4
    assert write_detection(log.writer, {"harm": np.full(20, 3.0)}, is_mislabelled, STEP) == {"harm": 0.5}
    points = curve(log.read(), "harm")
    assert set(np.unique(points["tp"] + points["fp"])) <= {0, 20}


def test_column_without_a_number_is_left_out(log: Log) -> None:
    columns = {"loss": np.full(4, np.nan), "harm": np.arange(4.0)}
    assert write_detection(log.writer, columns, [False, False, False, True], STEP) == {"harm": 1.0}
    assert log.tags()["tensors"] == ["influence/detection/harm"]


@pytest.mark.parametrize("value", [False, True])
def test_nothing_to_detect(log: Log, value: bool) -> None:
    with pytest.warns(UserWarning, match="of 3 examples are mislabelled: there is nothing to detect"):
        assert write_detection(log.writer, {"harm": np.arange(3.0)}, np.full(3, value), STEP) == {}
    assert log.tags() == {}


def test_detection_of_an_empty_table(log: Log) -> None:
    with pytest.warns(UserWarning, match="0 of 0 examples"):
        assert write_detection(log.writer, {"harm": np.zeros(0)}, np.zeros(0, dtype=bool), STEP) == {}


def test_detection_needs_the_rows_of_the_table(log: Log) -> None:
    with pytest.raises(ValueError, match=r"each of the 3 rows .* got shape \[2\]"):
        write_detection(log.writer, {"harm": np.arange(3.0)}, [True, False], STEP)
