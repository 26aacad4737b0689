"""What is shown while an audit works and once it is done: nothing here may end the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import WeakSet

from lightning_influence.callbacks.lightning import Trainer, is_a, rank_zero_warn
from lightning_influence.core.progress import is_watched
from lightning_influence.gradients.passes import Progress

_Result = TypeVar("_Result")
Advance = Callable[[int], Any]
"""Called with a number of examples that are done."""

# Bars of trainers whose display has failed: it stays off, or every batch would fail again.
_BROKEN: WeakSet[Any] = WeakSet()


@contextmanager
def tolerated(what: str, said: set[str]) -> Iterator[None]:
    """Go on after an error, and say it once.

    Args:
        what: What may fail.
        said: What has been said to have failed.
    """
    try:
        yield
    except Exception as error:
        if what not in said:
            said.add(what)
            rank_zero_warn(f"influence audit: {what} failed, all else goes on ({type(error).__name__}: {error})")


def progress_of(trainer: Trainer) -> Progress | None:
    """Return how to show passes beside the trainer's own bar; None if nobody watches."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", False) or bar in _BROKEN:
        return None
    rich = is_a(bar, "RichProgressBar")

    def tried(action: Callable[[], _Result]) -> _Result | None:
        try:
            return action()
        except Exception:
            _BROKEN.add(bar)
            return None

    @contextmanager
    def shown(title: str, examples: int) -> Iterator[Advance]:
        make = _in_rich if rich else _in_tqdm
        display = None if bar in _BROKEN else tried(lambda: make(bar, f"influence: {title}", examples))
        advance, close = display or (lambda done: None, lambda: None)
        try:
            yield lambda done: None if bar in _BROKEN else tried(lambda: advance(done))
        finally:
            tried(close)

    return shown


def _in_tqdm(bar: Any, title: str, examples: int) -> tuple[Advance, Callable[[], Any]] | None:
    """Return a bar's ways to advance and to close; None if its output goes to no screen."""
    if not is_watched():
        return None
    from tqdm.auto import tqdm  # looks for a notebook when it is imported

    shown = tqdm(total=examples, desc=title, unit="example", leave=False, dynamic_ncols=True)
    return shown.update, shown.close


def _in_rich(bar: Any, title: str, examples: int) -> tuple[Advance, Callable[[], Any]] | None:
    """As ``_in_tqdm``, in the trainer's own display while it is there: two of them redirect each other's output."""
    from rich.console import Console
    from rich.progress import Progress as Display

    display, own = getattr(bar, "progress", None), False
    console: Console | None = getattr(bar, "_console", None) if display is None else display.console
    if console is None or not (console.is_terminal or console.is_jupyter):
        return None
    if display is None or not display.live.is_started:
        display, own = Display(console=console, transient=True), True
        display.start()
    row = display.add_task(title, total=examples)

    def close() -> None:
        with suppress(KeyError):
            display.update(row, visible=False)  # to remove it would shift the rows that the trainer counts on
        if own:
            display.stop()

    return lambda done: display.update(row, advance=done), close
