"""A fitted curvature in a directory: that of ``Influence.save``, or of an audit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.indexed import index_beside
from lightning_influence.audit.store.store import AuditStore
from lightning_influence.core import distributed
from lightning_influence.core.errors import check_path
from lightning_influence.core.meeting import together
from lightning_influence.curvature import Curvature
from lightning_influence.curvature.saved import restored
from lightning_influence.gradients.visitors import visit
from lightning_influence.index import ExampleIndex, Index, IndexWriter
from lightning_influence.index.settings import check_indexed
from lightning_influence.influence.examined import ExaminedModel
from lightning_influence.scores.examples import ExampleScorer


def stored_examples(directory: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Return the dataset indices of the training examples."""
    check_path("the directory", directory)
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
    now = [] if held is None else _held(examined, stored_examples(directory).tolist())
    if any(then and value and then != value for then, value in zip(held or (), now, strict=True)):
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
    check_path("the directory", directory)
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
    store.write_manifest({"status": "complete", "notes": curvature.notes, **fitted_on(examined)})
    return store.directory


def open_index(directory: str | os.PathLike[str]) -> ExampleIndex:
    """Return the index in a directory: of an audit with ``index=True``, or of ``Influence.index``.

    Example:
        >>> open_index("influence").ask(model, (images, labels), loss=F.cross_entropy)

    Raises:
        StoreError, ExampleIndexError: If there is none, or it can't be read.
    """
    check_path("the directory", directory)
    return index_beside(AuditStore.open(directory))


def write_index(
    directory: str | os.PathLike[str], curvature: Curvature, examined: ExaminedModel, settings: Index
) -> ExampleIndex:
    """Write the curvature and an index to a new directory, by one pass over the training data.

    Raises:
        ValueError: If the curvature has no index, or the disk no room.
    """
    check_indexed(curvature.name)
    path = distributed.from_first(lambda: store_curvature(directory, curvature, examined))
    training, examples = examined.training, examined.examples
    own = ExampleScorer(training, examples, curvature)
    writer: IndexWriter | None = None
    try:
        with together():
            writer = IndexWriter(training, examples, curvature, path, settings, own)
            visit(training, examples, [own, writer], title="index")
            writer.finish()
    except BaseException:
        if writer is not None:
            writer.give_up()
        raise
    return open_index(path)


def fitted_on(examined: ExaminedModel) -> dict[str, Any]:
    """Return what tells weights and data of a fit from others, for a manifest."""
    return {"weights": examined.checksum(), "examples_hold": _held(examined, examined.examples)}


def _held(examined: ExaminedModel, examples: Sequence[int]) -> list[str | None]:
    """Return what a few of some training examples hold, in short."""
    return [None if one is None else one.hex() for one in examined.digests(examples)]
