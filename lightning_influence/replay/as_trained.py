"""A module that is asked for its trainer as if it were still training, at the step that is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_influence.replay.record import ReplayError


class _Silent:
    """A logger that swallows all that is written to it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


class _Then:
    """Stands in for the trainer of a module.

    Args:
        real: The trainer, if the module has one.
        at: Epoch and step of the moment.
    """

    def __init__(self, real: Any, at: Callable[[], tuple[int, int]]) -> None:
        self._real, self._at = real, at
        self.logger, self.loggers = _Silent(), [_Silent()]
        self.training, self.sanity_checking = True, False
        self.validating = self.testing = self.predicting = self.evaluating = False

    @property
    def current_epoch(self) -> int:
        return self._at()[0]

    @property
    def global_step(self) -> int:
        return self._at()[1]

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            raise ReplayError(
                f"the training step asks for `trainer.{name}`, and the model has no trainer by now. What it needs of "
                "the trainer has to be an attribute of the model, or a buffer."
            )
        return getattr(self._real, name)


@contextmanager
def as_trained(module: nn.Module, at: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Let ``self.trainer``, ``self.current_epoch`` and ``self.global_step`` be those of the run, logging nothing.

    Args:
        module: The model; of modules that know no trainer, nothing is changed.
        at: Returns epoch and step of the moment.
    """
    asked = [each for each in module.modules() if "_trainer" in each.__dict__]
    before = [each.__dict__["_trainer"] for each in asked]
    try:
        for each, real in zip(asked, before, strict=True):
            each.__dict__["_trainer"] = _Then(real, at)
        yield
    finally:
        for each, real in zip(asked, before, strict=True):
            each.__dict__["_trainer"] = real
