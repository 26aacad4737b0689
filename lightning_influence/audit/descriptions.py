"""What a person sees of an example: a text or an image, as the user describes it, or the image that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_influence.audit.words import cut, visible
from lightning_influence.core.containers import children
from lightning_influence.core.isolation import left_alone

Description = str | Tensor | None
"""A text, an image ``[c, h, w]``, or nothing that could be shown."""

_TEXT_LENGTH = 500
_MOST_TOKENS = 256
_ENTRIES = 64  # of a row
_LARGEST = 384  # pixels of an image's longer side, about
_NO_TOKENS = ("mask", "token_type_ids", "position_ids", "labels")


def description(describe: Any, example: Any) -> Description:
    """Return what is shown of an example.

    Args:
        describe: A function from an example to a text or an image, or a tokenizer with ``decode``.
        example: What the data set returns for an index.

    Raises:
        ValueError: If it is neither, or there are no tokens to decode.
    """
    tokenizer = callable(getattr(describe, "decode", None))
    found = _decoded(describe, example) if tokenizer else describe(example)
    if found is None or isinstance(found, str):
        return None if found is None else cut(visible(found), _TEXT_LENGTH)
    return _as_image(found)


def _as_image(value: Any) -> Tensor:
    """Return an image of whatever library, ``[1 or 3, h, w]``.

    Raises:
        ValueError: If it is none.
    """
    last = not isinstance(value, Tensor)
    if hasattr(value, "getbands"):  # Pillow
        value = value if len(value.getbands()) == 1 and value.mode != "P" else value.convert("RGB")
    if last:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it returned a {type(value).__name__}; expected a text, or an image as array or tensor")
        value = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    shape = tuple(value.shape)
    image = value.detach().float().cpu()
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    if image.ndim == 2:
        image, last = image[None], False
    channels = [place for place in ((2, 0) if last else (0, 2)) if image.ndim == 3 and image.shape[place] in (1, 3, 4)]
    if not channels or not image.numel():
        raise ValueError(
            f"it returned numbers of shape {shape}; expected a text, or an image [h, w], [c, h, w] or [h, w, c]"
        )
    image = image.movedim(channels[0], 0)
    # Photographs: of fifty, all that is kept until they are drawn is what can be seen on a sheet.
    height, width = image.shape[1:]
    factor = max(1, max(height, width) // _LARGEST)
    image = avg_pool2d(image, (min(factor, height), min(factor, width)))
    return image[:3] if len(image) == 4 else image


def guessed_images(dataset: Any, indices: Sequence[int]) -> Sequence[Tensor] | None:
    """Return the images of some examples, ``[c, h, w]``, or None if the examples hold no images of one size."""
    images: list[Tensor] = []
    with left_alone(dataset):
        for index in indices:
            image = _image_in(dataset[index])
            if image is None or (images and image.shape != images[0].shape):
                return None
            images.append(image)
    return images or None


def guessed(example: Any) -> Description:
    """Return what an example holds that a person can look at: an image, a text, or a row of a table."""
    image = _image_in(example)
    if image is not None:
        return image
    texts = [text for text in _texts_in(example) if text.strip()]
    row = _row_in(example)
    return cut(visible(" | ".join(texts) or row), _TEXT_LENGTH) or None


def _texts_in(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for _, item in children(node) or ():
        yield from _texts_in(item)


def _row_in(example: Any) -> str:
    """Return the numbers of an example that has names for them, else those of its first short vector."""
    if isinstance(example, Mapping):
        named = {key: value for key, value in example.items() if isinstance(value, (int, float, np.number, Tensor))}
        single = {key: float(value) for key, value in named.items() if np.ndim(value) == 0}
        if len(single) > 1:
            return ", ".join(f"{key} {value:.4g}" for key, value in list(single.items())[:_ENTRIES])
    for tensor in _tensors_in(example):
        if tensor.ndim == 1 and tensor.is_floating_point() and tensor.numel():
            return ", ".join(f"{value:.4g}" for value in tensor[:_ENTRIES].tolist())
    return ""


def _tensors_in(node: Any) -> Iterator[Tensor]:
    """Yield the tensors of an example, and what a collate function makes tensors of: arrays, images of Pillow."""
    if hasattr(node, "getbands"):
        node = np.asarray(node.convert("RGB") if node.mode in ("P", "CMYK") else node)
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, np.ndarray):
        if node.dtype.kind in "biuf":
            yield torch.from_numpy(node.astype(np.float32 if node.dtype.kind == "f" else np.int64))
    else:
        for _, item in children(node) or ():
            yield from _tensors_in(item)


def _image_in(example: Any) -> Tensor | None:
    """Find the first ``[c, h, w]``, ``[h, w, c]`` or ``[h, w]`` tensor of an example."""
    for tensor in _tensors_in(example):
        image = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor
        if image.ndim == 3 and image.shape[0] not in (1, 3, 4) and image.shape[2] in (1, 3, 4):
            image = image.movedim(2, 0)
        if image.ndim == 3 and image.shape[0] in (1, 3, 4) and min(image.shape[1:]) >= 4:
            return image.float().cpu()
    return None


def token_texts(tokenizer: Any, example: Any) -> list[str | None] | None:
    """Return the text of each token that an example holds, None for padding; None of several sequences.

    Raises:
        ValueError: If there are no tokens to decode.
    """
    tokens, keep = _tokens(tokenizer, example)
    if tokens.ndim != 1:
        return None
    shown = zip(tokens.tolist(), keep.tolist(), strict=True)
    return [_token_text(str(tokenizer.decode([token]))) if kept else None for token, kept in shown]


def _token_text(text: str) -> str:
    """Return what can be seen of a token, with the space on either side that tells where words begin."""
    before, after = (" " if end.isspace() else "" for end in (text[:1], text[-1:]))
    return f"{before}{found}{after}" if (found := visible(text)) else before


def _decoded(tokenizer: Any, example: Any) -> str:
    """Return the text of the tokens that an example holds, without padding and special tokens."""
    tokens, keep = _tokens(tokenizer, example)
    rows = zip(np.atleast_2d(tokens), np.atleast_2d(keep), strict=True)
    return " | ".join(_text_of(tokenizer, row[kept][:_MOST_TOKENS].tolist()) for row, kept in rows)


def _tokens(tokenizer: Any, example: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the tokens of an example, and which of them are no padding."""
    found = list(_integer_sequences(example))
    named = [tokens for name, tokens in found if name == "input_ids"]
    candidates = named or [tokens for name, tokens in found if not str(name).endswith(_NO_TOKENS)]
    if not candidates:
        raise ValueError("it holds no sequence of integers to decode; pass a function from an example to its text")
    tokens = candidates[0]
    mask = next((mask for name, mask in found if name == "attention_mask" and mask.shape == tokens.shape), None)
    keep = tokens >= 0 if mask is None else (tokens >= 0) & (mask != 0)
    padding = [getattr(tokenizer, name, None) for name in ("pad_token_id", "pad_id")]
    for token in (value for value in padding if isinstance(value, int)):
        keep &= tokens != token
    return tokens, keep


def _text_of(tokenizer: Any, tokens: list[int]) -> str:
    try:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))
    except TypeError:  # of a library that has no such argument
        return str(tokenizer.decode(tokens))


def _integer_sequences(node: Any, name: object = "") -> Iterator[tuple[object, NDArray[np.int64]]]:
    """Yield names and values of what may be tokens: integers ``[s]`` or, of several choices, ``[k, s]``."""
    if isinstance(node, Tensor):
        node = None if node.is_floating_point() or node.is_complex() else node.numpy(force=True)
    elif isinstance(node, (list, tuple)) and node and all(type(item) is int for item in node):
        node = np.asarray(node)
    if not isinstance(node, np.ndarray):
        for key, item in children(node) or ():
            yield from _integer_sequences(item, key)
    elif np.issubdtype(node.dtype, np.integer) and node.ndim in (1, 2) and node.size:
        yield name, node.astype(np.int64)
