"""Fitted curvature put away and taken up again: tensors and text for a store, and a curvature equal to the last bit.

What is put away comes from ``Curvature.tensors``: file name -> tensors and text about them, a file for each block, or
one for a dense matrix. The files themselves are the store's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from zlib import crc32

import torch
from torch import Tensor

from lightning_influence.core.precision import working_dtype
from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.full import DenseCurvature
from lightning_influence.curvature.registry import LADDER
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.layers.blocks import ParameterBlock

Saved = Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]
"""File name to tensors and text."""

_TEXT = ("curvature", "kind", "damping", "weights", "labels", "examples")
_AGAIN = "fit the curvature again"


def restored(files: Saved, coverage: Coverage) -> Curvature:
    """Return the curvature that was put away, on the device of the parameters.

    Its solutions and scores are those of the original, bit for bit. GGN and Hessian come back if their matrix was
    formed; of those that were solved by products nothing is kept.

    Args:
        files: What ``Curvature.tensors`` gave.
        coverage: The layers of the model, with the weights that the curvature was fitted at.

    Raises:
        ValueError: If there are none, they belong to another model, other layers or other weights, or can't be made
            a curvature of; with the way out.
    """
    if not files:
        raise ValueError(f"there are no factors, expected some for {list(coverage.blocks)[:5]}: {_AGAIN}.")
    for file, (_, about) in files.items():
        if missing := [key for key in _TEXT if key not in about]:
            raise ValueError(f"the factors of {file!r} say nothing of {missing}, as in earlier versions: {_AGAIN}.")
    kinds = {(about["curvature"], about["kind"]) for _, about in files.values()}
    (name, kind), *others = sorted(kinds)
    if others or kind not in LADDER:
        raise ValueError(f"the factors are of {sorted(kinds)}; expected one of {', '.join(LADDER)}: {_AGAIN}.")
    if name != kind:
        raise ValueError(
            f"curvature={name!r} was solved by products with the training data: nothing of it is stored but the "
            f'{kind} for self-influence. Fit it again; `solver="dense"` would have stored the matrix.'
        )
    return _blockwise(name, files, coverage) if LADDER[name].product is None else _dense(name, files, coverage)


def checksum(block: ParameterBlock) -> str:
    """Return what tells the weights of a block from others, on any device."""
    result = 0
    for parameter in block.parameters.values():
        result = crc32(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, result)
    return f"{result:08x}"


def _blockwise(name: str, files: Saved, coverage: Coverage) -> BlockCurvature:
    blocks: dict[str, CurvatureBlock] = {}
    kind = LADDER[name].block
    _check_names(list(files), list(coverage.blocks))
    for layer, block in coverage.blocks.items():
        tensors, about = files[layer]
        shapes = kind.fitted_shapes(block.shape, block.dense)
        _check_tensors(layer, tensors, shapes, block)
        _check_weights(layer, about["weights"], checksum(block))
        blocks[layer] = kind(block.shape, block.dense)
        blocks[layer].restore(_moved(tensors, block))
    first = next(iter(files.values()))[1]
    dampings = {layer: float(files[layer][1]["damping"]) for layer in blocks}
    curvature = BlockCurvature(name, blocks, dampings, json.loads(first["labels"]), json.loads(first["examples"]))
    curvature.weights = {layer: files[layer][1]["weights"] for layer in blocks}
    return curvature


def _dense(name: str, files: Saved, coverage: Coverage) -> DenseCurvature:
    _check_names(list(files), [name])
    tensors, about = files[name]
    coordinates = BlockCoordinates(coverage.blocks)
    dampings, weights = json.loads(about["damping"]), json.loads(about["weights"])
    _check_names(list(dampings), list(coverage.blocks))
    block = next(iter(coverage.blocks.values()))
    _check_tensors(name, tensors, {"matrix": (coordinates.size, coordinates.size)}, block)
    for layer, own in coverage.blocks.items():
        _check_weights(layer, weights[layer], checksum(own))
    matrix = _moved(tensors, block)["matrix"]
    labels, examples = json.loads(about["labels"]), json.loads(about["examples"])
    curvature = DenseCurvature(name, matrix, coordinates, dampings, labels, examples)
    curvature.weights = weights
    return curvature


def _moved(tensors: Mapping[str, Tensor], block: ParameterBlock) -> dict[str, Tensor]:
    device = next(iter(block.parameters.values())).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _check_names(found: list[str], expected: list[str]) -> None:
    if sorted(found) != sorted(expected):
        raise ValueError(
            f"the factors are those of {sorted(found)[:20]}, the covered layers are {sorted(expected)[:20]}: pass the "
            f"model and the `layers=` that the curvature was fitted with, or {_AGAIN}."
        )


def _check_tensors(
    layer: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], block: ParameterBlock
) -> None:
    dtype = working_dtype(next(iter(block.parameters.values())).dtype)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    expected = {key: (shape, dtype) for key, shape in shapes.items()}
    if found != expected:
        raise ValueError(
            f"the factors of {layer!r} are {found}; this model needs {expected}: pass the model that the curvature was "
            f"fitted with, in its precision, or {_AGAIN}."
        )


def _check_weights(layer: str, fitted: str, now: str) -> None:
    if fitted != now:
        raise ValueError(
            f"the curvature was fitted at other weights of {layer!r} (their checksum was {fitted or 'not noted'}, now "
            f"it is {now}): load the checkpoint of that training, or {_AGAIN}."
        )
