"""A fit that trains nothing: everything that Lightning sets up for training, and something else in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.checkpoint_files import TrainerCheckpoint
from lightning_influence.callbacks.lightning import (
    LightningModule,
    Trainer,
    dummy_logger,
    of_package,
    overrides,
    rank_zero_warn,
)
from lightning_influence.core.containers import leaves
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.core.sharding import names_of
from lightning_influence.core.torch_private import eager_name
from lightning_influence.gradients.coverage import listed
from lightning_influence.training.step_sizes import StepSizes

_KEPT = (
    "fit_loop",
    "callbacks",
    "loggers",
    "num_sanity_val_steps",
    "limit_train_batches",
    "overfit_batches",
    "datamodule",
)
# What Lightning says of a fit, and nobody who does not train can heed.
_BESIDE_THE_POINT = (
    ".*configure_optimizers` returned `None`",
    ".*is smaller than the logging interval",
    ".*You defined a `validation_step` but have no",
)


def evaluating_trainer(module: LightningModule, precision: str) -> Trainer:
    """Return a Trainer on one device that logs and keeps nothing."""
    trainer: Trainer = of_package(module, "trainer.trainer", "Trainer")(
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer


def fit_in_name(trainer: Any, module: LightningModule, work: Callable[[], None], **data: Any) -> None:
    """Call ``trainer.fit``, with a loop that does some work in place of training.

    The trainer's own callbacks have no part in it, but for its progress bar; loops and optimizers, which a trainer that
    has trained before may go on with, are put back afterwards.

    Args:
        trainer: A trainer.
        module: The model, whose ``configure_optimizers`` may fail.
        work: What to do once model, device and data hooks are set up; ``set_up_data`` loads the data.
        data: For ``fit``.
    """
    kept, strategy = {name: getattr(trainer, name) for name in _KEPT}, trainer.strategy
    optimizers, schedulers = strategy.optimizers, strategy.lr_scheduler_configs
    epochs = 1000 if trainer.max_epochs is None else trainer.max_epochs  # as Lightning has it
    loop = of_package(trainer, "loops.fit_loop", "_FitLoop")(trainer, min_epochs=0, max_epochs=epochs)
    loop.epoch_loop.max_steps = trainer.max_steps
    loop.run = work
    trainer.fit_loop, trainer.num_sanity_val_steps = loop, 0
    trainer.callbacks = [each for each in trainer.callbacks if each is trainer.progress_bar_callback]
    trainer.datamodule = None  # the last fit's, which need not be that of these data
    trainer.limit_train_batches = trainer.limit_train_batches or 1.0
    trainer.loggers = trainer.loggers or [dummy_logger(trainer)]  # which steps write to
    try:
        with _steps_for_nobody(module), warnings.catch_warnings(), isolated_rng():
            for message in _BESIDE_THE_POINT:
                warnings.filterwarnings("ignore", message)
            trainer.fit(module, **data)
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        strategy.optimizers, strategy.lr_scheduler_configs = optimizers, schedulers


@contextmanager
def _steps_for_nobody(module: LightningModule) -> Iterator[None]:
    """Let the model have optimizers if it can make them: they tell what is trained, and hold what checkpoints say."""
    make = module.configure_optimizers if overrides("configure_optimizers", module) else None

    def tolerant() -> Sequence[Optimizer] | None:
        try:
            made = None if make is None else make()
        except Exception as error:  # of a schedule that needs a real fit, or whatever else was there at that time
            rank_zero_warn(
                f"{type(module).__name__}.configure_optimizers fails outside of its training ({error!r}): every "
                "parameter that requires a gradient counts as trained, and no learning rate is known."
            )
            return None
        found = [value for _, value in leaves(made) if isinstance(value, Optimizer)]
        return list(dict.fromkeys(found)) or None

    hooks: dict[str, Callable[[], Any]] = {"configure_optimizers": tolerant, "configure_callbacks": list}
    before = {name: vars(module)[name] for name in hooks if name in vars(module)}
    vars(module).update(hooks)
    try:
        yield
    finally:
        for name in hooks:
            del vars(module)[name]
        vars(module).update(before)


def call_hooks(trainer: Any, module: LightningModule) -> None:
    """Call what the model may set up for its steps at the start of training; it may fail, and need not matter then."""
    call = of_package(trainer, "trainer.call", "_call_lightning_module_hook")
    for hook in ("on_train_start", "on_train_epoch_start"):
        if overrides(hook, module):
            try:
                with bridge.aside(trainer):
                    call(trainer, hook)
            except Exception as error:
                rank_zero_warn(f"{type(module).__name__}.{hook} fails outside of its training: {error!r}")


def set_up_data(trainer: Any) -> None:
    """Load training and validation data, as a fit does before its first step."""
    with isolated_rng():
        trainer.fit_loop.setup_data()
    bridge.set_up_validation(trainer)


def go_to(trainer: Any, epochs: int, steps: int) -> None:
    """Let a trainer stand where training has stood after some epochs and optimizer steps."""
    loop = trainer.fit_loop
    loop.epoch_progress.current.processed = loop.epoch_progress.current.completed = epochs
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = steps


def restore_optimizers(trainer: Any, file: TrainerCheckpoint) -> str:
    """Load the optimizers' state, and return why that can't be, if so: then none are known that fit the checkpoint."""
    states, names = file.optimizer_states, names_of(trainer.lightning_module)
    if not states:
        return f"{file.name} holds no optimizer state"
    try:
        for optimizer, state in zip(trainer.optimizers, states, strict=True):
            optimizer.load_state_dict(_in_order(state, optimizer, names))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Other groups, such as those that a callback adds during training
        trainer.strategy.optimizers = []
        return f"the optimizer state of {file.name} is not one of configure_optimizers ({error})"
    return ""


def taken_as_plain(taken: StepSizes, reason: str) -> list[str]:
    """Return a note on steps whose scale TracIn does not know, as the optimizers could not be restored for a reason."""
    scaled = sorted(taken.optimizers - {"SGD"}) if reason and taken.steps else []
    return [f"tracin takes the last {taken.steps:,} steps of {listed(scaled)} for plain ones: {reason}"] * bool(scaled)


def _in_order(state: dict[str, Any], optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters in the optimizer's order, where it tells them by name."""
    groups = []
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        told = {eager_name(name): name for name in saved["params"] if isinstance(name, str)}
        own = [names.get(id(parameter), "") for parameter in group["params"]]
        if told and set(told) != set(own):
            raise ValueError(f"it is of the parameters {listed(list(told), 4)}")
        groups.append({**saved, "params": [told[name] for name in own]} if told else saved)
    return {**state, "param_groups": groups}
