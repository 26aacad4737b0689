"""Pictures on a sheet, with some text under each, and diagrams for loggers that have nothing but pictures."""

from __future__ import annotations

import io
import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# The dashboard shrinks a sheet to a card some 350 pixels wide: of three columns, text stays readable.
_TILE = 192
_GAP = 12
_FONT_SIZE = 18
_LINE = 23
_INK = (32, 33, 36)
_EDGE = (218, 220, 224)
_DIAGRAM = 640, 400
_THUMBNAIL = 96
_LOSSLESS = 64  # pixels of a side, up to which a picture is kept as it is

_NOT_DRAWN = "(letters that this font has not: see the text)"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet(
    pictures: Sequence[tuple[Tensor | str, str] | None], columns: int, titles: Sequence[str] = (), heading: str = ""
) -> Tensor:
    """Put pictures on one sheet, with the lines of a text under each.

    Every image is stretched to its own full range (a constant one is mid-grey), because the inputs of a model are
    normalised in ways nobody knows here; small ones are enlarged by a whole factor without smoothing. What does not fit
    into a line ends in an ellipsis. The font has ASCII letters only, see `drawable`.

    Args:
        pictures: Image ``[C, H, W]`` (3 channels are colour, of others the mean is shown), or a text in its place, and
            what stands below it, row by row; None for an empty place.
        columns: Pictures in a row.
        titles: What stands above, each over its share of the width.
        heading: What stands above these, over all of it.

    Returns:
        ``[3, h, w]`` uint8.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    lines = 1 + max(picture[1].count("\n") for picture in pictures if picture is not None)
    row_height = _TILE + _GAP // 2 + lines * _LINE + _GAP
    above = _GAP + (_LINE + _GAP // 2 if heading else 0)
    head = above + (_LINE + _GAP // 2 if titles else 0)
    width = columns * (_TILE + _GAP) + _GAP
    paper = Image.new("RGB", (width, head + math.ceil(len(pictures) / columns) * row_height), "white")
    draw = ImageDraw.Draw(paper)

    def write(text: str, left: int, top: int, room: int) -> None:
        draw.text((left, top), _cut(drawable(text), font, room), font=font, fill=_INK)

    write(heading, _GAP, _GAP, width - 2 * _GAP)
    for number, title in enumerate(titles):
        share = (width - _GAP) // len(titles)
        write(title, _GAP + number * share, above, share - _GAP)
    for place, picture in enumerate(pictures):
        if picture is None:
            continue
        row, column = divmod(place, columns)
        left, top = _GAP + column * (_TILE + _GAP), head + row * row_height
        tile = _tile(picture[0], font)
        x, y = left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2
        paper.paste(tile, (x, y))
        # An outline, or images with a white background run into the paper.
        draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=_EDGE)
        for number, line in enumerate(picture[1].split("\n")):
            write(line, left, top + _TILE + _GAP // 2 + number * _LINE, _TILE)
    return _as_tensor(paper)


def diagram(x: NDArray[Any], y: NDArray[Any], *, title: str, top: float | None = None) -> Tensor:
    """Draw a line through points, in a frame that says how far both axes go; the second one starts at 0.

    Args:
        x: ``[n]``, rising.
        y: ``[n]``, from 0.
        title: What stands above.
        top: Where the second axis ends; None for the largest ``y``.

    Returns:
        ``[3, h, w]`` uint8.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width, height = _DIAGRAM
    left, upper, right, lower = _LINE * 3, _LINE * 2, width - _LINE, height - 2 * _LINE
    paper = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(paper)
    low, high, most = float(x.min()), float(x.max()), float(y.max() if top is None else top)
    across = left + (x - low) / ((high - low) or 1.0) * (right - left)
    up = lower - y / (most or 1.0) * (lower - upper)
    draw.rectangle((left, upper, right, lower), outline=_EDGE)
    draw.line(list(zip(across.tolist(), up.tolist(), strict=True)), fill=_INK, width=2)
    draw.text((_GAP, _GAP), _cut(drawable(title), font, width - 2 * _GAP), font=font, fill=_INK)
    for value, place, anchor in (
        (low, (left, lower + _GAP // 2), "lt"),
        (high, (right, lower + _GAP // 2), "rt"),
        (0.0, (left - _GAP // 2, lower), "rs"),
        (most, (left - _GAP // 2, upper), "rt"),
    ):
        draw.text(place, f"{value:.4g}", font=font, fill=_INK, anchor=anchor)
    return _as_tensor(paper)


def _as_tensor(paper: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(paper)).permute(2, 0, 1).contiguous()


def drawable(text: str) -> str:
    """Return text in the letters that Pillow's font has: without accents, others as ``?``."""
    plain = "".join(part for part in unicodedata.normalize("NFKD", text) if not unicodedata.combining(part))
    return plain.encode("ascii", "replace").decode()


def _tile(image: Tensor | str, font: Font) -> Image.Image:
    if isinstance(image, str):
        drawn = drawable(image)
        foreign = drawn.count("?") - image.count("?") > len(image) // 4
        return _page(_NOT_DRAWN if foreign else drawn, font)
    picture = _stretched(image).convert("RGB")
    if (factor := _TILE // max(picture.size)) > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return picture


def thumbnail(image: Tensor) -> bytes:
    """Return a small picture for a page: PNG, or JPEG of what has more than 64 pixels on a side.

    Args:
        image: ``[C, H, W]``, stretched as on a sheet.
    """
    picture, encoded = _stretched(image), io.BytesIO()
    if max(picture.size) <= _LOSSLESS:
        picture.save(encoded, "PNG")  # `optimize=True` takes a third longer for half a percent
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        picture.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def _stretched(image: Tensor) -> Image.Image:
    """Return an image over its own full range: three channels in colour, the mean of others in grey."""
    pixels = image.detach().cpu().double().numpy()
    if len(pixels) != 3:
        pixels = pixels.mean(axis=0, keepdims=True)
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    clipped = np.clip(np.nan_to_num(pixels, nan=low, posinf=high, neginf=low), low, high)
    scaled = (clipped - low) / (high - low) if high > low else np.full_like(pixels, 0.5)
    drawn = (scaled * 255).round().astype(np.uint8)
    return Image.fromarray(drawn.transpose(1, 2, 0) if len(drawn) == 3 else drawn[0])


def _page(text: str, font: Font) -> Image.Image:
    """Return as much of a text as a picture has room for, in lines that break at spaces where they can."""
    page = Image.new("RGB", (_TILE, _TILE), "white")
    draw, room, last = ImageDraw.Draw(page), _TILE - _GAP, (_TILE - _GAP) // _LINE - 1
    lines: list[str] = []
    while text and len(lines) < last:
        line = text[: len(_cut(text, font, room)) - 1] if font.getlength(text) > room else text
        if len(line) < len(text) and " " in line.strip() and text[len(line)] != " ":
            line = line[: line.rindex(" ")]
        lines.append(line)
        text = text[len(line) :].lstrip()
    for number, line in enumerate([*lines, _cut(text, font, room)]):
        draw.text((_GAP // 2, _GAP // 2 + number * _LINE), line, font=font, fill=_INK)
    return page


def _cut(text: str, font: Font, room: int) -> str:
    """Return as much of a text as is no wider than ``room`` pixels."""
    if font.getlength(text) <= room:
        return text
    # No letter is narrower than a pixel. Measuring a text takes a while: halved, not one letter after the other.
    fits = bisect(range(1, min(len(text), room) + 1), float(room), key=lambda size: font.getlength(f"{text[:size]}…"))
    return f"{text[:fits].rstrip()}…"
