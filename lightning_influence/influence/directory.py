"""A fitted curvature in a directory: that of ``Influence.save``, or of an audit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.store.store import AuditStore
from lightning_influence.curvature import Curvature
from lightning_influence.curvature.saved import restored
from lightning_influence.influence.examined import ExaminedModel


def stored_examples(directory: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Return the dataset indices of the training examples."""
    return AuditStore.open(directory).read_scores()["index"]


def stored_curvature(directory: str | os.PathLike[str], examined: ExaminedModel) -> Curvature:
    """Return the curvature.

    Raises:
        ValueError: If it belongs to another model, other layers, other weights or other data.
    """
    store = AuditStore.open(directory)
    manifest, weights = store.manifest, examined.checksum()
    if manifest.get("weights", weights) != weights:
        raise ValueError(f"{store.directory} was fitted at other weights: load the checkpoint of that training.")
    held = manifest.get("examples_hold")
    if held is not None and any(a and b and a != b for a, b in zip(held, _held(store, examined), strict=True)):
        raise ValueError(
            f"{store.directory} was fitted on other data: pass the training data of then, or fit the curvature again."
        )
    curvature = restored(store.factors(), examined.coverage)
    curvature.notes += manifest.get("notes", [])
    return curvature


def store_curvature(directory: str | os.PathLike[str], curvature: Curvature, examined: ExaminedModel) -> Path:
    """Write the curvature to a new directory.

    Raises:
        ValueError: If it is solved by products with the training data.
    """
    files = curvature.tensors()
    if any(about["kind"] != about["curvature"] for _, about in files.values()):
        raise ValueError(
            f"{curvature.name} is solved by products with the training data, nothing of it can be saved: fit it with "
            '`solver="dense"`, or again when it is needed.'
        )
    store = AuditStore.create(directory)
    store.write_scores({"index": np.array(examined.examples)})
    for name, (tensors, about) in files.items():
        store.write_factors(name, tensors, about)
    manifest = {"notes": curvature.notes, "weights": examined.checksum(), "examples_hold": _held(store, examined)}
    store.write_manifest({"status": "complete", **manifest})
    return store.directory


def _held(store: AuditStore, examined: ExaminedModel) -> list[str | None]:
    """Return what a few of the training examples of then hold now, in short."""
    examples = stored_examples(store.directory).tolist()
    return [None if one is None else one.hex() for one in examined.digests(examples)]
