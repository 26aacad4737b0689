"""What an audit shows in the loggers of its run, on rank zero: a logger that fails costs what it would have shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.display import tolerated
from lightning_influence.callbacks.lightning import Trainer, rank_zero_info
from lightning_influence.loggers.exhibits import Exhibit
from lightning_influence.loggers.writers import show, shows

SHARE = 0.01
"""Of the time since training began, for what is written so that somebody can watch."""
# What the first of it is expected to take: a page of a few thousand examples.
_FIRST = 0.25


class Watched:
    """Keeps what is written for who watches a training within ``SHARE`` of its time so far.

    What is left out comes later. Nobody watches a training of seconds: the first page comes after half a minute.
    """

    def __init__(self) -> None:
        self._began, self._spent, self._last = time.perf_counter(), 0.0, _FIRST

    @property
    def first(self) -> bool:
        """Whether nothing has been written yet."""
        return not self._spent

    @property
    def due(self) -> bool:
        """Whether there is time for it now, if it takes as long as the last one did."""
        return self._spent + self._last <= SHARE * (time.perf_counter() - self._began)

    @contextmanager
    def taking(self, *, whole: bool) -> Iterator[None]:
        """Note how long it takes; if not the whole of it is written, that tells nothing of the next time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self._spent += took
            self._last = took if whole else self._last


class Showing:
    """Hands numbers and exhibits to every logger.

    Args:
        said: What has been said to have failed.
    """

    def __init__(self, said: set[str]) -> None:
        self._said = said

    def numbers(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        """Log finite numbers, by name."""
        finite = {f"influence/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}
        for name, logger in self._loggers(trainer):
            with tolerated(f"logging to {name}", self._said):
                logger.log_metrics(finite, step=trainer.global_step)

    def show(self, trainer: Trainer, what: str, made: Callable[[], Iterable[Exhibit]]) -> None:
        """Show some things, as far as they can be made.

        Args:
            trainer: The trainer.
            what: What they are.
            made: Returns them; not called where nobody would see them.
        """
        showing = [(name, logger) for name, logger in self._loggers(trainer) if shows(logger)]
        with tolerated(what, self._said):
            for exhibit in made() if showing else ():
                for name, logger in showing:
                    failing = f"showing {type(exhibit).__name__.lower()}s in {name}"
                    if failing not in self._said:  # a server that is gone may let each of them wait for minutes
                        with tolerated(failing, self._said):
                            show(logger, exhibit, trainer.global_step)

    def tell_lacking(self, trainer: Trainer) -> None:
        """Say once which loggers show numbers only."""
        lacking = dict.fromkeys(name for name, logger in self._loggers(trainer) if not shows(logger))
        if lacking:
            rank_zero_info(
                f"influence audit: {', '.join(lacking)} can't show pictures, tables and histograms; `report` has the "
                "tables, and another logger beside it would show them all."
            )

    def _loggers(self, trainer: Trainer) -> list[tuple[str, Any]]:
        """Return those that write something, with their names."""
        return [(type(each).__name__, each) for each in bridge.real_loggers(trainer) if trainer.is_global_zero]
