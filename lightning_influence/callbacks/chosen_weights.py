"""Which weights an audit is about: those at the end of training, the best that were kept, or an average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_influence.callbacks.checkpoint_files import CheckpointFileError, TrainerCheckpoint, best_of, keepers_of
from lightning_influence.callbacks.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    is_a,
    rank_zero_warn,
)
from lightning_influence.callbacks.sharded import check_one_file
from lightning_influence.core import distributed
from lightning_influence.core.weights import places_of, swapped

Weights = Literal["last", "best", "averaged"]
"""Which weights an audit is about."""

Found = tuple[dict[str, Any], Mapping[str, Tensor]]
"""What some weights are, and those that differ from the model's own."""

_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


def averaging_of(trainer: Trainer) -> list[Any]:
    """Return the trainer's callbacks that put an average into the model once training has ended."""
    return [each for each in callbacks_of(trainer) if is_a(each, *_AVERAGING)]


def check_weights(trainer: Trainer, audit: Callback, weights: Weights) -> None:
    """Warn of weights that are replaced once they are audited.

    Raises:
        MisconfigurationException: For weights that this trainer will not have.
    """
    callbacks = callbacks_of(trainer)
    later = [each for each in averaging_of(trainer) if callbacks.index(each) > callbacks.index(audit)]
    if later and weights == "last":
        rank_zero_warn(
            f"{type(later[0]).__name__} comes after InfluenceAudit and replaces the weights once the audit is done: "
            'the audit describes the weights before. Pass `weights="averaged"` to audit the average.'
        )
    if weights == "averaged" and not averaging_of(trainer):
        raise MisconfigurationException(
            'InfluenceAudit(weights="averaged") is about the average that StochasticWeightAveraging, WeightAveraging '
            "or EMAWeightAveraging makes, and the Trainer has none of them among its callbacks. Add one, or leave "
            "`weights` out."
        )
    if weights != "best":
        return
    check_one_file(trainer)
    keepers = keepers_of(trainer)
    if keepers and keepers[0].monitor is not None and keepers[0].save_top_k:
        return
    if not keepers:
        lacking = "the Trainer has no ModelCheckpoint among its callbacks"
    elif keepers[0].monitor is None:
        lacking = "the Trainer's ModelCheckpoint monitors nothing, so that none of its checkpoints is the best"
    else:
        lacking = "the Trainer's ModelCheckpoint keeps none (save_top_k=0)"
    raise MisconfigurationException(
        f'InfluenceAudit(weights="best"): {lacking}. Add ModelCheckpoint(monitor="val_loss"), with what the model '
        "logs, or leave `weights` out."
    )


@contextmanager
def chosen(trainer: Trainer, module: LightningModule, weights: Weights) -> Iterator[dict[str, Any]]:
    """Put the weights that are to be audited into the module within a ``with`` block, afterwards its own back.

    Yields:
        What they are, in terms of JSON; ``told`` in words.
    """
    about, values = {"best": _best, "averaged": _averaged, "last": _last}[weights](trainer)
    places = places_of(module)
    with swapped(places, {name: value.detach() for name, value in values.items() if name in places}):
        yield about


def _last(trainer: Trainer) -> Found:
    # Callbacks that come before the audit have put their average into the model by now.
    callbacks = callbacks_of(trainer)
    audits = [place for place, each in enumerate(callbacks) if type(each).__module__.startswith("lightning_influence.")]
    before = [each for each in averaging_of(trainer) if callbacks.index(each) < min(audits, default=0)]
    average = f", averaged by {type(before[0]).__name__}" if before else ""
    told = f"those at the end of training, step {trainer.global_step:,}{average}"
    return {"which": "averaged" if before else "last", "step": trainer.global_step, "told": told}, {}


def _best(trainer: Trainer) -> Found:
    keeper = keepers_of(trainer)[0]
    path, files = best_of(keeper), list[TrainerCheckpoint]()

    def read() -> dict[str, Tensor]:  # by rank zero: other nodes may have no disk in common with it
        if not path:
            raise CheckpointFileError(f"none was kept ({keeper.monitor} may never have been logged)")
        files.append(TrainerCheckpoint.read(path, trainer.lightning_module))
        files[0].check_fits(trainer.lightning_module)
        return {name: value for name, value in files[0].by_name.items() if isinstance(value, Tensor)}

    try:
        ((_, weights),) = distributed.dealt([read], [1.0], torch.device("cpu"))
    except CheckpointFileError as error:  # what was trained is worth an audit all the same
        return _in_place_of("the best checkpoint", str(error), trainer)
    name, step = distributed.from_first(lambda: (files[0].name, files[0].step))
    score = None if keeper.best_model_score is None else float(keeper.best_model_score)
    told = f"the best by {keeper.monitor}{'' if score is None else f' ({score:.4g})'}: {name}, step {step:,}"
    about = {"which": "best", "step": step, "file": path, "monitor": keeper.monitor, "value": score, "told": told}
    return about, weights


def _in_place_of(missing: str, reason: str, trainer: Trainer) -> Found:
    about, _ = _last(trainer)
    rank_zero_warn(f"InfluenceAudit: {missing} can't be audited, {reason}; the weights at the end of training are.")
    return about | {"told": f"{about['told']}, in place of {missing} ({reason})"}, {}


def _averaged(trainer: Trainer) -> Found:
    callback = averaging_of(trainer)[0]
    about, _ = _last(trainer)
    if about["which"] == "averaged":
        return about, {}
    name, average = type(callback).__name__, callback._average_model
    count = getattr(average if isinstance(average, AveragedModel) else callback, "n_averaged", None)
    if average is None or count is None or not int(count):
        return _in_place_of("the average", f"{name} has averaged nothing", trainer)
    told = f"the average of {name} over {int(count):,} states, step {trainer.global_step:,}"
    # Stochastic averages leave the buffers to the model, as their callback does.
    values = places_of(average.module) if isinstance(average, AveragedModel) else dict(average.named_parameters())
    return {"which": "averaged", "step": trainer.global_step, "told": told}, values
