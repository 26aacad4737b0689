"""What users' own code raises, told apart from what this package says, and arguments that are none."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from lightning_influence.core.memory import is_out_of_memory

_Settings = TypeVar("_Settings")

_OWN = __name__.partition(".")[0]
_NAMED = 10
_SHORT = 160
_WORDS = reprlib.Repr()
_WORDS.maxstring = _WORDS.maxother = _SHORT


@contextmanager
def told(tell: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what ``tell`` makes of an error in a user's own code, given its kind and first words.

    What this package raises says enough, and memory that runs out is nobody's mistake: they pass.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] == _OWN or is_out_of_memory(error):
            raise
        # Workers of a loader send their whole traceback as text.
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        words = lines[-1 if lines[0].startswith("Caught ") else 0] if lines else ""
        name = type(error).__name__
        raise tell(words if words.startswith(name) else f"{name}: {words}") from error


class Forgiving:
    """Goes on where somebody's own code raises in the block, but for memory that runs out: that tells nothing of it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, Exception) and not is_out_of_memory(error)


def examples(indices: Sequence[int]) -> str:
    """Return examples by index, as messages name them."""
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return f"example{'s' * (len(indices) != 1)} {', '.join(map(str, indices[:_NAMED]))}{more}"


def short(value: object) -> str:
    """Return a value as messages name it: a data set handed in by mistake does not fill the screen."""
    words = " ".join(_WORDS.repr(value).split())
    return words if len(words) <= _SHORT else words[: _SHORT - 3] + "..."


def check_count(name: str, value: Any, otherwise: str = "", *, least: int = 1) -> int:
    """Return an integer >= ``least``; raise ``ValueError`` for anything else, naming what else would do."""
    try:
        if not isinstance(value, (bool, np.bool_)) and operator.index(value) >= least:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={short(value)}; expected an integer >= {least}{otherwise and f', or {otherwise}'}.")


def check_flag(name: str, value: object) -> None:
    """Raise ``ValueError`` for what is neither True nor False: any other object would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={short(value)}; expected True or False.")


def settings(name: str, value: object, kind: type[_Settings]) -> _Settings | None:
    """Return the settings that an argument stands for: its own, the default ones of True, none of False and None.

    Raises:
        ValueError: For anything else.
    """
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, kind):
        raise ValueError(f"{name}={short(value)}; expected True, False, or {kind.__name__}(...).")
    return kind() if value is True else value


def check_path(name: str, value: object) -> None:
    """Raise ``ValueError`` for what can't be a path."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name} is {value!r}; expected a path.")


def is_number(value: Any, *, above: float = -math.inf) -> bool:
    """Tell whether something is one finite real number, and larger than ``above``."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    with suppress(OverflowError):  # of a whole number beyond all floats
        return number and math.isfinite(value) and bool(value > above)
    return False
