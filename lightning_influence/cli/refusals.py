"""What jsonargparse refuses, in one sentence: it tells every alternative of a type on a line of its own."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# Lines about the types that a value is tried as, not about what is wrong with it.
_AROUND = (
    *("Does not validate", "Subtypes", "Errors", "Given value", "Parser key", "Problem with given", "Not a valid"),
    *("Subclass types expect", "a class path", "a dict", "Expected a <class 'NoneType'>"),
)


class UsageError(ValueError):
    """A configuration that names an argument or a value that there is none of."""


def raising(cli: Any) -> Any:
    """Return a LightningCLI whose parser raises, where it would print its usage and exit."""

    class Raising(cli):  # type: ignore[misc]
        def init_parser(self, **arguments: Any) -> Any:
            return super().init_parser(**{**arguments, "exit_on_error": False})

    return Raising


@contextmanager
def in_one_sentence(config: str) -> Iterator[None]:
    """Raise ``UsageError`` for what jsonargparse refuses.

    Args:
        config: Path of the configuration.
    """
    try:
        yield
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        if not isinstance(error, argparse.ArgumentError) and "Does not validate" not in str(error):
            raise
        raise UsageError(f"{config}: {sentence(str(error))}") from error


def sentence(told: str) -> str:
    """Return the argument, its value and what was expected, from the lines of an error of jsonargparse."""
    name = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', told)))
    about = f"{name}: " if name else ""
    lines = [line.strip(" -") for line in told.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_AROUND)]
    if of_argument := next((line for line in lines if not line.startswith("Expected a ")), ""):
        return f"{about}{of_argument.rstrip('.')}{_arguments_of(told) if 'not accepted' in of_argument else ''}."
    for line in lines:  # the type of an argument of a class tells more than that of the class
        if found := re.fullmatch(r"Expected an? (.*?)\. Got value: (.*)", line):
            return f"{name}={found[2]}; expected {_plain(found[1])}."
    value = next(iter(re.findall(r"Given value: (.*)", told)), "")
    expected = " or ".join(_plain(re.sub(r"^Expected an? ", "", line)) for line in lines)
    return f"{name}={value}; expected {expected}." if expected else " ".join(told.split())


def _plain(kind: str) -> str:
    kind = re.sub(r"<class '([^']*)'>", r"\1", kind)
    return re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"one of \1", kind)


def _arguments_of(told: str) -> str:
    """Return what the class takes that the error is about, as far as that can be told."""
    paths = re.findall(r"Problem with given class_path '([\w.]+)\.(\w+)'", told)
    try:
        module, kind = paths[-1]
        takes = list(inspect.signature(getattr(import_module(module), kind)).parameters)
    except (IndexError, ImportError, AttributeError, ValueError):
        return ""
    return f"; {kind} takes {', '.join(takes) or 'no arguments'}"
