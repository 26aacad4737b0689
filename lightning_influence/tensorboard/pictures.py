"""Pictures with captions on a sheet, for the Images dashboard."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TILE = 144
_LEAST_TILE = 96
_MOST_TILE = 192
_CAPTION_WIDTH = 128
_GAP = 12
_CAPTION_LINES = 5
_CLAUSE_LINES = 2
_FONT_SIZES = (20, 18, 16)
_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_TILE_EDGE = (218, 220, 224)


def candidate_grid(images: Tensor, captions: Sequence[str], columns: int = 8) -> Tensor:
    """Put images with captions under them on one sheet.

    Every image is stretched to its own full range (a constant one is mid-grey), because the inputs of a model are
    normalised in ways nobody knows here. Small images are enlarged by a whole factor without smoothing, very large ones
    are reduced. Captions are wrapped at double spaces, then before `→`, then between words; what still does not fit
    ends in an ellipsis. The font has ASCII letters only: accents are dropped, other letters become `?`.

    Args:
        images: `[n, C, H, W]`, any number type. 3 channels are colour; otherwise the mean over the channels is shown.
        captions: `n` captions.
        columns: images in a row.

    Returns:
        `[3, h, w]` uint8.

    Raises:
        ValueError: If `images` is not `[n, C, H, W]` or has no element, the number of captions differs, or
            `columns < 1`.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must be [n, C, H, W] without an empty dimension, got shape {list(images.shape)}")
    if len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} images, expected one each")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")

    pictures = [
        Picture(image, caption, *divmod(number, columns))
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    return sheet(pictures)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on a sheet.

    Attributes:
        image: ``[C, H, W]``, see `candidate_grid`.
        caption: The text under it, see `candidate_grid`.
        row: Its place.
        column: Its place.
    """

    image: Tensor
    caption: str
    row: int
    column: int


def sheet(pictures: Sequence[Picture], titles: Sequence[str] = ()) -> Tensor:
    """Put pictures at their places on one sheet.

    Args:
        pictures: at least one; places without one stay empty.
        titles: what stands above each column, one line.

    Returns:
        `[3, h, w]` uint8.
    """
    tiles = [_tile_size(*picture.image.shape[1:]) for picture in pictures]
    cell_width = max(_CAPTION_WIDTH, *(width for _, width in tiles))
    font, lines = lay_out_captions([picture.caption for picture in pictures], cell_width)
    line_height = math.ceil(font.size * 1.3)
    columns = 1 + max(picture.column for picture in pictures)
    # Every row is as high as its longest caption, so that one long class name does not tear the sheet apart.
    tops = [_GAP + (line_height + _GAP // 2 if titles else 0)]
    for row in range(1 + max(picture.row for picture in pictures)):
        inside = [number for number, picture in enumerate(pictures) if picture.row == row]
        image_height = max((tiles[number][0] for number in inside), default=0)
        caption_height = line_height * max((len(lines[number]) for number in inside), default=0)
        tops.append(tops[-1] + image_height + _GAP // 2 + caption_height + _GAP)
    paper = Image.new("RGB", (columns * (cell_width + _GAP) + _GAP, tops[-1]), color=_PAPER)
    draw = ImageDraw.Draw(paper)
    for column, title in enumerate(titles):
        _draw_line(draw, _GAP + column * (cell_width + _GAP), _GAP, _shorten(drawable(title), font, cell_width), font)
    for picture, (height, width), caption in zip(pictures, tiles, lines, strict=True):
        left = _GAP + picture.column * (cell_width + _GAP)
        top = tops[picture.row]
        left_of_image = left + (cell_width - width) // 2
        paper.paste(_to_picture(picture.image, height, width), (left_of_image, top))
        # An outline, or images with a white background run into the paper.
        draw.rectangle((left_of_image - 1, top - 1, left_of_image + width, top + height), outline=_TILE_EDGE)
        for number, line in enumerate(caption):
            _draw_line(draw, left, top + height + _GAP // 2 + number * line_height, line, font)
    return torch.from_numpy(np.array(paper)).permute(2, 0, 1).contiguous()


def _tile_size(height: int, width: int) -> tuple[int, int]:
    longest = max(height, width)
    if longest > _MOST_TILE:
        return max(1, round(height * _TILE / longest)), max(1, round(width * _TILE / longest))
    factor = max(math.ceil(_LEAST_TILE / longest), round(_TILE / longest))
    return height * factor, width * factor


def _to_picture(image: Tensor, height: int, width: int) -> Image.Image:
    pixels = image.detach().cpu().to(torch.float64).numpy()
    if len(pixels) != 3:
        pixels = pixels.mean(axis=0, keepdims=True).repeat(3, axis=0)
    finite = np.isfinite(pixels)
    low, high = (pixels[finite].min(), pixels[finite].max()) if finite.any() else (0.0, 0.0)
    # Halves, because the range of the largest float64 numbers overflows.
    span = high / 2 - low / 2
    clipped = np.clip(np.nan_to_num(pixels, nan=low, posinf=high, neginf=low), low, high)
    scaled = (clipped / 2 - low / 2) / span if span > 0 else np.full_like(pixels, 0.5)
    picture = Image.fromarray((scaled * 255).round().astype(np.uint8).transpose(1, 2, 0))
    enlarged = width >= picture.width and height >= picture.height
    return picture.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def lay_out_captions(captions: Sequence[str], width: int) -> tuple[ImageFont.FreeTypeFont, list[list[str]]]:
    """One font size for the sheet: the largest that fits all captions whole into three lines, else the smallest."""
    for size in _FONT_SIZES:
        font = _font(size)
        lines = [_wrap(drawable(caption), font, width) for caption in captions]
        if all(len(caption) <= 3 and not any(line.endswith("…") for line in caption) for caption in lines):
            break
    return font, lines


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("captions need a Pillow with FreeType support; reinstall Pillow from a wheel")
    return font


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    font = _font(_FONT_SIZES[0])
    nothing = "\U0010ffff"  # never assigned, so it is drawn as the font's "missing" box
    return bytes(font.getmask(character)) != bytes(font.getmask(nothing))


def drawable(caption: str) -> str:
    """The caption in characters that can be drawn; runs of several spaces stay, they mark where to break."""
    segments = (visible(segment) for segment in caption.replace("\n", "  ").split("  "))
    text = []
    for character in "  ".join(segment for segment in segments if segment):
        if character in " →" or _has_glyph(character):
            text.append(character)
        elif character in "–—‐‑−":
            text.append("-")
        else:
            plain = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
            text.extend(part if _has_glyph(part) else "?" for part in plain)
    return "".join(text)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines no wider than `width`, at least one and at most `_CAPTION_LINES`."""
    if text_width(text, font) <= width:
        return [text]
    lines: list[str] = []
    for segment in text.split("  "):
        if text_width(segment, font) <= width:
            lines.append(segment)
            continue
        for number, clause in enumerate(segment.split(" → ")):
            wrapped = [""]
            for word in (f"→ {clause}" if number else clause).split(" "):
                longer = f"{wrapped[-1]} {word}".lstrip()
                if wrapped[-1] and text_width(longer, font) > width:
                    wrapped.append(word)
                else:
                    wrapped[-1] = longer
            lines += _join_beyond(wrapped, _CLAUSE_LINES)
    return [_shorten(line, font, width) for line in _join_beyond(lines, _CAPTION_LINES)]


def _join_beyond(lines: list[str], limit: int) -> list[str]:
    """At most `limit` lines, the last one holding all the rest."""
    return lines if len(lines) <= limit else [*lines[: limit - 1], " ".join(lines[limit - 1 :])]


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if text_width(text, font) <= width:
        return text
    # Bisection: dropping one letter at a time takes seconds for a caption of a thousand letters.
    kept, too_many = 0, len(text)
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        if text_width(text[:middle] + "…", font) <= width:
            kept = middle
        else:
            too_many = middle
    return text[:kept].rstrip() + "…"


def text_width(text: str, font: ImageFont.FreeTypeFont) -> float:
    """Width in pixels; arrows are as wide as they are drawn."""
    return font.getlength(text.replace("→", "")) + text.count("→") * font.size


def _draw_line(draw: ImageDraw.ImageDraw, left: float, top: float, text: str, font: ImageFont.FreeTypeFont) -> None:
    """Draw one line of text; arrows as strokes, since Pillow's font has no arrow."""
    for number, part in enumerate(text.split("→")):
        if number:
            middle, tip, head = top + font.size * 0.62, left + font.size * 0.85, font.size * 0.25
            stroke = max(1, round(font.size / 9))
            draw.line((left + font.size * 0.1, middle, tip, middle), fill=_INK, width=stroke)
            draw.line((tip - head, middle - head, tip, middle, tip - head, middle + head), fill=_INK, width=stroke)
            left += font.size
        draw.text((left, top), part, font=font, fill=_INK)
        left += font.getlength(part)


def visible(text: str) -> str:
    """Collapse white space; drop control characters and those that reorder the text around them."""
    # Zero-width joiners (also category Cf) stay: emoji and several scripts need them.
    reordering = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    kept = (
        " " if character.isspace() else character
        for character in text
        if character.isspace()
        or not (unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in reordering)
    )
    return " ".join("".join(kept).split())
