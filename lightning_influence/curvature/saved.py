"""Fitted curvature put away and taken up again: tensors and text for a store, and a curvature equal to the last bit.

What is put away comes from ``Curvature.tensors``: file name -> tensors and text about them, a file for each block, or
one for a dense matrix. The files themselves are the store's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.core.precision import working_dtype
from lightning_influence.core.weights import checksum
from lightning_influence.curvature.blocks.block import CurvatureBlock
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.dense import DenseCurvature
from lightning_influence.curvature.products.flat import FlatParameters
from lightning_influence.curvature.registry import LADDER
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.layers.blocks import ParameterBlock

Saved = Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]
"""File name to tensors and text."""

_TEXT = ("curvature", "kind", "dampings", "weights", "labels", "examples")
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
    told = [{key: json.loads(about[key]) for key in _TEXT[2:]} for _, about in files.values()]
    labels, examples = told[0]["labels"], told[0]["examples"]
    weights: dict[str, str] = {layer: value for each in told for layer, value in each["weights"].items()}
    layers = coverage.blocks
    if weights.keys() != layers.keys():
        raise ValueError(
            f"the factors are those of {sorted(weights)[:20]}, the covered layers are {sorted(layers)[:20]}: pass the "
            f"model and the `layers=` that the curvature was fitted with, or {_AGAIN}."
        )
    every = {layer: value for each in told for layer, value in each["dampings"].items()}
    dampings = {layer: every[layer] for layer in layers}
    curvature: Curvature
    if LADDER[name].product is None:
        blocks = _restored_blocks(LADDER[name].block, layers, files)
        curvature = BlockCurvature(name, blocks, dampings, labels, examples)
    else:
        # In the order of then: a class that defines its layers in another one has the same layers and weights.
        coordinates = BlockCoordinates({layer: layers[layer] for layer in every})
        if (then := files[name][1].get("coordinates")) != repr(coordinates.shapes):
            raise ValueError(f"the matrix is over {then}, this model has {coordinates.shapes}: {_AGAIN}.")
        flat = FlatParameters({key: value for block in layers.values() for key, value in block.parameters.items()})
        shapes = {"matrix": (coordinates.size, coordinates.size)}
        matrix = _checked(name, files[name][0], shapes, flat.dtype)["matrix"].to(flat.device)
        curvature = DenseCurvature(name, matrix, coordinates, every, labels, examples)
    for layer, block in layers.items():
        if weights[layer] != (now := checksum(block.parameters.values())):
            raise ValueError(
                f"the curvature was fitted at other weights of {layer!r} (their checksum was "
                f"{weights[layer] or 'not noted'}, now it is {now}): load the checkpoint of that training, or {_AGAIN}."
            )
    curvature.weights = weights
    return curvature


def _restored_blocks(
    kind: type[CurvatureBlock], layers: Mapping[str, ParameterBlock], files: Saved
) -> dict[str, CurvatureBlock]:
    result = {}
    moved: dict[int, Tensor] = {}  # what blocks share, they share on the device, too
    for name, block in layers.items():
        tensors, about = files[name]
        shared = {
            key: files[other][0][key]
            for key, other in json.loads(about.get("shared", "{}")).items()
            if other in files and key in files[other][0]
        }
        like, shapes = next(iter(block.parameters.values())), kind.fitted_shapes(block.shape, block.dense)
        found = _checked(name, {**tensors, **shared}, shapes, working_dtype(like.dtype))
        result[name] = kind(block.shape, block.dense)
        result[name].restore({key: moved.setdefault(id(each), each.to(like.device)) for key, each in found.items()})
    return result


def _checked(
    name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Mapping[str, Tensor]:
    """Return tensors, if they are those that are needed."""
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    expected = {key: (shape, dtype) for key, shape in shapes.items()}
    if found != expected:
        raise ValueError(
            f"the factors of {name!r} are {found}; this model needs {expected}: pass the model that the curvature was "
            f"fitted with, in its precision, or {_AGAIN}."
        )
    return tensors
