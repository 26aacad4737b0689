"""How each logger writes what is shown.

Loggers are told by the names of their classes, in either package of Lightning or beside it. Of what they need, nothing
is imported that a user of theirs has not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from lightning_influence.core.torch_private import event_writer
from lightning_influence.loggers.exhibits import Curve, Exhibit, Histogram, Page, Picture, Table

Write: TypeAlias = Callable[[Any, Any, int], object]
"""Called with a logger, what it is to show, and the global step."""


def shows(logger: Any) -> bool:
    """Tell whether a logger is known to show more than numbers."""
    return bool(_writers_of(logger))


def show(logger: Any, exhibit: Exhibit, step: int) -> None:
    """Write something to a logger, if it can show it; histograms and curves are drawn where there are only pictures."""
    own = _writers_of(logger)
    if isinstance(exhibit, (Histogram, Curve)) and type(exhibit) not in own:
        exhibit = exhibit.picture()
    if write := own.get(type(exhibit)):
        write(logger, exhibit, step)


def _writers_of(logger: Any) -> Mapping[type[Exhibit], Write]:
    return next((WRITERS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in WRITERS), {})


def _file(tag: str, step: int, ending: str) -> str:
    """Return where a file belongs in a folder of files: what is of one step is side by side."""
    room, _, name = tag.partition("/")
    return f"{room}/step_{step}/{name.replace('/', '_')}.{ending}"


# ------------------------------------------------------------------------------------------------- TensorBoard


def _tensorboard_page(logger: Any, page: Page, step: int) -> None:
    proto = import_module("tensorboard.compat.proto.summary_pb2")
    tensor = import_module("tensorboard.compat.proto.tensor_pb2").TensorProto(string_val=page.blobs)
    tensor.dtype = import_module("tensorboard.compat.proto.types_pb2").DT_STRING
    tensor.tensor_shape.dim.add().size = len(page.blobs)
    about = proto.SummaryMetadata(
        plugin_data=proto.SummaryMetadata.PluginData(plugin_name="influence"),
        data_class=proto.DATA_CLASS_BLOB_SEQUENCE,  # without it, the series is dropped
    )
    summary = proto.Summary(value=[proto.Summary.Value(tag=page.tag, metadata=about, tensor=tensor)])
    event_writer(logger.experiment).add_summary(summary, step)
    logger.experiment.flush()  # who looks while training goes on would wait two minutes


# ------------------------------------------------------------------------- Weights & Biases, and what copies it


def _as_metrics(package: str) -> dict[type[Exhibit], Write]:
    """Return how a package writes whose pictures, tables and histograms are logged as numbers are."""

    def picture(logger: Any, one: Picture, step: int) -> None:
        logger.log_metrics({one.tag: import_module(package).Image(one.pixels())}, step)

    def table(logger: Any, one: Table, step: int) -> None:
        rows = [list(row) for row in one.rows]
        # A tag of its own: of two things under one, only the last is shown.
        logger.log_metrics({f"{one.tag}/table": import_module(package).Table(list(one.names), rows)}, step)

    def histogram(logger: Any, one: Histogram, step: int) -> None:
        bins = one.counts(), one.edges
        logger.log_metrics({one.tag: import_module(package).Histogram(np_histogram=bins)}, step)

    return {Picture: picture, Table: table, Histogram: histogram}


def _wandb_curve(logger: Any, curve: Curve, step: int) -> None:
    wandb = import_module("wandb")
    points = wandb.Table(["recall", "precision"], np.stack(curve.points(), axis=1).tolist())
    logger.log_metrics({curve.tag: wandb.plot.line(points, "recall", "precision", title=curve.tag)}, step)


# ------------------------------------------------------------------------------------------------------ MLflow


def _mlflow_picture(logger: Any, picture: Picture, step: int) -> None:
    logger.experiment.log_image(logger.run_id, picture.pixels(), artifact_file=_file(picture.tag, step, "png"))


def _mlflow_table(logger: Any, table: Table, step: int) -> None:
    if find_spec("pandas") is None:  # which its tables need, but its small package does not bring
        logger.experiment.log_text(logger.run_id, table.csv(), _file(table.tag, step, "csv"))
    else:
        logger.experiment.log_table(logger.run_id, table.columns(), _file(table.tag, step, "json"))


# ------------------------------------------------------------------------------------------------------- Comet


def _comet_curve(logger: Any, curve: Curve, step: int) -> None:
    recall, precision = (values.tolist() for values in curve.points())
    logger.experiment.log_curve(curve.tag, recall, precision, step=step)


# --------------------------------------------------------------------------------------------------- LitLogger


def _lit_file(logger: Any, name: str) -> Path:
    path = Path(logger.log_dir, str(logger.version), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _lit_picture(logger: Any, picture: Picture, step: int) -> None:
    path = _lit_file(logger, _file(picture.tag, step, "png"))
    Image.fromarray(picture.pixels()).save(path)
    logger.log_file(str(path))


def _lit_table(logger: Any, table: Table, step: int) -> None:
    path = _lit_file(logger, _file(table.tag, step, "csv"))
    path.write_text(table.csv(), encoding="utf-8")
    logger.log_file(str(path))


WRITERS: dict[str, Mapping[type[Exhibit], Write]] = {
    "TensorBoardLogger": {
        Picture: lambda logger, one, step: logger.experiment.add_image(one.tag, one.image, step),
        Table: lambda logger, one, step: logger.experiment.add_text(one.tag, one.markdown(), step),
        Histogram: lambda logger, one, step: logger.experiment.add_histogram(one.tag, one.values, step, one.edges),
        Curve: lambda logger, one, step: logger.experiment.add_pr_curve(one.tag, one.wanted, one.scores, step),
        Page: _tensorboard_page,
    },
    "WandbLogger": {**_as_metrics("wandb"), Curve: _wandb_curve},
    "TrackioLogger": _as_metrics("trackio"),
    "MLFlowLogger": {Picture: _mlflow_picture, Table: _mlflow_table},
    "CometLogger": {
        Picture: lambda logger, one, step: logger.experiment.log_image(one.pixels(), name=one.tag, step=step),
        Table: lambda logger, one, step: logger.experiment.log_table(
            _file(one.tag, step, "csv"), [list(row) for row in one.rows], list(one.names)
        ),
        Histogram: lambda logger, one, step: logger.experiment.log_histogram_3d(one.values, name=one.tag, step=step),
        Curve: _comet_curve,
    },
    "LitLogger": {Picture: _lit_picture, Table: _lit_table},
}
"""By name of a logger's class: how it writes each kind of thing. An entry makes another logger known."""
