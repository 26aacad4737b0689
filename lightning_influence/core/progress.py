"""A progress bar for passes that take long, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds that are waited without a word.
_DELAY = 2.0


def is_terminal() -> bool:
    """Tell whether what is printed goes to a screen."""
    return sys.stderr is not None and sys.stderr.isatty()


def is_watched() -> bool:
    """Tell whether what is printed goes to a screen or a notebook."""
    return "ipykernel" in sys.modules or is_terminal()


def say(words: str) -> None:
    """Print a line, where somebody watches."""
    if is_watched():
        print(words, file=sys.stderr)


@contextmanager
def shown(title: str, examples: int, unit: str = "example") -> Iterator[Callable[[int], None]]:
    """Show a pass over some examples while it runs."""
    if not is_watched():
        yield lambda done: None
        return
    from tqdm.auto import tqdm  # looks for a notebook when it is imported

    with tqdm(total=examples, desc=title, unit=unit, leave=False, delay=_DELAY, dynamic_ncols=True) as bar:
        yield lambda done: None if bar.update(done) else None
