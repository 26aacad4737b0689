"""One call of a torch function, as its readers see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NotUnderstoodError(RuntimeError):
    """A function uses a parameter in a way that has no rows; the message says which."""


class NotSeparableError(NotUnderstoodError):
    """A function treats an example according to others in the batch; the message says how."""


@dataclass(frozen=True, eq=False)
class Site:
    """A call of a torch function, as it was made.

    Attributes:
        function: The function.
        args: Its positional arguments; where it overwrote the first, a copy from before.
        kwargs: Its keyword arguments.
        parameters: The parameters among them, views of parameters and tensors made from them alone.
        output: What it returned.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    parameters: Sequence[Tensor]
    output: Tensor

    def is_parameter(self, value: Any) -> bool:
        """Tell whether an argument is one of the parameters."""
        return any(value is parameter for parameter in self.parameters)

    def bind(self, names: str) -> dict[str, Any]:
        """Match the arguments to names; missing ones are None."""
        listed = names.split()
        return {**dict.fromkeys(listed), **dict(zip(listed, self.args, strict=False)), **self.kwargs}

    def roles(self, bound: Mapping[str, Any], name: str, **roles: str) -> dict[str, Tensor]:
        """Return role to parameter.

        Args:
            bound: See ``bind``.
            name: Of the function, for messages.
            **roles: Role to the name of the argument.

        Raises:
            NotUnderstoodError: If a parameter is passed as another argument.
        """
        for argument, value in bound.items():
            if argument not in roles.values() and self.is_parameter(value):
                raise NotUnderstoodError(f"as the argument `{argument}` of {name}")
        return {role: bound[argument] for role, argument in roles.items() if self.is_parameter(bound.get(argument))}
