"""Following parameters, and what is made from them without the batch, to where they meet it.

Tracing and capture both do: one to find out how a model uses its parameters, the other to read every batch. Every call
of a torch function is seen, from the outside and from within attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.containers import tensors_in
from lightning_influence.core.torch_private import visible_attention
from lightning_influence.gradients.block_rows import Source
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.recurrent import Recurrent
from lightning_influence.layers.registry import overwrites, read_call
from lightning_influence.layers.site import NotUnderstoodError, Site
from lightning_influence.objective.losses import all_arguments

Owners: TypeAlias = Mapping[str, Tensor]
"""Full name to parameter."""
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# They take the shape, dtype or device of their second argument, not its values.
_LIKE = (Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as)


class Follower(TorchFunctionMode, ABC):
    """Follows parameters through a forward pass, and changes nothing in it.

    Args:
        parameters: Full name to parameter.

    Attributes:
        sources: By id, the parameters and what was made from them alone (kept alive, or ids could be reused).
    """

    def __init__(self, parameters: Owners) -> None:
        super().__init__()
        self.sources = {
            id(parameter): Source(parameter, ((name, parameter),)) for name, parameter in parameters.items()
        }
        self._recurrent = Recurrent()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call unchanged and look at it."""
        kwargs = all_arguments(func, kwargs or {})
        if func == F.multi_head_attention_forward:
            # Its linear maps are the layers. This copy does not ask the mode again, so the mode can see what it calls.
            with self:
                return visible_attention(*args, **kwargs)
        stepped = self._recurrent.in_steps(func, args, kwargs, lambda: self)
        if stepped is not None:
            # Parameters were seen in the steps. Rows that were packed, and what is the batch's own, are so still.
            self.after(func, (args[:1], {}), list(tensors_in(stepped)), args)
            return stepped
        before = args
        if overwrites(func) and any(id(tensor) in self.sources for tensor in tensors_in((args, kwargs))):
            before = (args[0].detach().clone(), *args[1:])
        output = func(*args, **kwargs)
        self._recurrent.note(func, args, output)
        made = [args[0]] if func == Tensor.__setitem__ else list(tensors_in(output))
        if made:
            self.after(func, (args, kwargs), made, before)
        return output

    def after(
        self, func: Callable[..., Any], arguments: Arguments, made: Sequence[Tensor], before: tuple[Any, ...]
    ) -> None:
        """Look at a finished call that takes what is followed; without gradients it adds nothing to theirs in training.

        Args:
            func: The function.
            arguments: Its positional and keyword arguments.
            made: The tensors that it made or changed.
            before: The positional arguments, with a copy of what the call has overwritten.
        """
        taken = arguments[0][:1] if func in _LIKE else arguments
        passed = [tensor for tensor in tensors_in(taken) if id(tensor) in self.sources]
        made = [tensor for tensor in made if tensor.requires_grad]
        if not passed or not made or not torch.is_grad_enabled():
            return
        owners = dict(pair for tensor in passed for pair in self.sources[id(tensor)].parameters)
        site = Site(func, before, arguments[1], passed, made[0])
        if self.meets_batch(site, owners):
            return
        indices = _looked_up(site, owners) if len(made) == 1 else None
        self.sources.update((id(tensor), Source(tensor, tuple(owners.items()), indices)) for tensor in made)

    @abstractmethod
    def meets_batch(self, site: Site, owners: Owners) -> bool:
        """Look at a call; tell whether the batch takes part, or else what it made is to be followed as well.

        Args:
            site: The call, its output the first that requires a gradient.
            owners: The parameters that what is followed in it was made from.
        """


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that a torch function goes by in messages."""
    return getattr(function, "__name__", repr(function))


def _looked_up(site: Site, owners: Owners) -> Tensor | None:
    """Return the indices of rows that were looked up in a parameter without the batch (position embeddings)."""
    if len(site.parameters) != 1 or all(site.parameters[0] is not parameter for parameter in owners.values()):
        return None
    try:
        call = read_call(site)
    except NotUnderstoodError:
        return None
    return call.input if type(call) is EmbeddingCall and call.padding_idx is None else None
