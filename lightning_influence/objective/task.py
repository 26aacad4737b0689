"""What training minimises, read off the user's own code.

A task runs the loss of one batch. ``TrainingStepTask`` is the user's ``training_step`` itself; anything callable
as ``task(module, batch) -> loss`` can take its place. While it runs, a tap watches for known loss calls, so that
per-example losses, predictions and Fisher labels need no code from the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_influence.objective.scale import NoLossError, TaskError
from lightning_influence.objective.tap import Heard, LossTap


class Task(Protocol):
    """The loss of one batch, for models whose ``training_step`` can't serve (manual optimisation, exotic losses).

    Any function with this signature will do. The batch has been moved to the module's device. Each example's loss
    must depend on that example only.

    Example:
        >>> def task(module, batch):
        ...     images, labels = batch
        ...     return torch.nn.functional.cross_entropy(module(images), labels)
    """

    def __call__(self, module: Any, batch: Any, /) -> Tensor:
        """Return the mean loss of the batch (scalar) or one loss per example (``[n]``)."""
        ...


class TrainingStepTask:
    """The user's own ``training_step`` as the task, with its logging muted.

    Metrics, buffers, modes and random streams are the business of ``isolation.untouched``, which every extra pass
    runs under.

    Args:
        batch_idx: The number that every batch is said to have.
    """

    def __init__(self, batch_idx: int = 0) -> None:
        self.batch_idx = batch_idx

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Run ``module.training_step(batch, batch_idx)`` and return its loss.

        Raises:
            TaskError: If there is no ``training_step`` that takes a batch, or it returns no loss.
        """
        step = getattr(module, "training_step", None)
        if step is None:
            raise TaskError(
                f"{type(module).__name__} has no `training_step` to take the loss from; pass `task=` (`loss=` of "
                "`Influence`), a function (module, batch) -> loss."
            )
        signature = inspect.getfullargspec(step)
        if "dataloader_iter" in signature.args:
            raise TaskError(
                "`training_step(dataloader_iter)` fetches its own batches, so a given batch can't be run again; "
                "pass `task=` (`loss=` of `Influence`), a function (module, batch) -> loss."
            )
        # The trainer's own rule: a batch index is passed, by position, where a second positional argument can take it.
        own = signature.args[1:] if inspect.ismethod(step) else signature.args
        takes_index = len(own) >= 2 or signature.varargs is not None
        with _muted(module):
            result = step(batch, self.batch_idx) if takes_index else step(batch)
        if isinstance(result, Mapping):
            result = result.get("loss")
        if not isinstance(result, Tensor):
            raise (NoLossError if result is None else TaskError)(
                f"`training_step` returned {type(result).__name__} instead of a loss tensor (or a dict with the key "
                "'loss'); return the loss, or pass `task=` (`loss=` of `Influence`), a function (module, batch) -> "
                "loss."
            )
        return result


def run_tapped(task: Task, module: nn.Module, batch: Any, tap: LossTap | None = None) -> tuple[Tensor, Heard]:
    """Run ``task`` on one batch and return what it returned, and the known loss calls it made."""
    with tap or LossTap(protect=True) as tap:
        loss = task(module, batch)
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        what = f"a tensor of {loss.dtype}" if isinstance(loss, Tensor) else loss and type(loss).__name__
        raise (NoLossError if loss is None else TaskError)(
            f"the task returned {what} instead of a loss tensor: one floating-point number for the batch, or one for "
            "each of its examples."
        )
    return loss, tap.calls


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """Replace ``log`` and ``log_dict`` on the instance: Lightning refuses them outside its own loops."""
    names = ("log", "log_dict")
    own = {name: module.__dict__[name] for name in names if name in module.__dict__}
    try:
        for name in names:
            module.__dict__[name] = _ignore
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(own)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None
