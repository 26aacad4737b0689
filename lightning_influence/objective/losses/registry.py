"""The table of loss functions whose calls are understood; every loss enters itself, see ``reads``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from lightning_influence.objective.losses.base import LossCall

_Kind = TypeVar("_Kind", bound="type[LossCall]")
Reader: TypeAlias = "Callable[[Tensor, dict[str, Any]], LossCall | None]"

READERS: dict[Callable[..., Any], Reader] = {}
"""Loss function to what reads its calls: output and arguments by name, defaults included."""


def reads(function: Callable[..., Any], **settings: Any) -> Callable[[_Kind], _Kind]:
    """Enter a class into the table: its ``read`` understands calls of ``function``.

    Args:
        function: Takes part in torch's function overrides, as those of ``torch.nn.functional`` do.
        settings: Passed on to ``read``.
    """

    def enter(kind: _Kind) -> _Kind:
        READERS[function] = partial(kind.read, **settings)
        return kind

    return enter


def known_loss(function: Callable[..., Any]) -> bool:
    """Tell whether calls of ``function`` are understood."""
    return function in READERS


def known_losses() -> str:
    """Return the names of the functions that are understood, for messages."""
    return ", ".join(sorted(f"F.{function.__name__}" for function in READERS))


def read_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> LossCall | None:
    """Turn one call of a known loss function into a ``LossCall``.

    Args:
        function: A function for which ``known_loss`` is true.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output: What the call returned.

    Returns:
        The call, its logits still attached to the graph; None for a form that is not understood: predictions that
        broadcasting pairs with the targets of other examples, a divergence of what is no distribution.
    """
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return READERS[function](output, bound.arguments)


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
