"""Following parameters, and what is made from them without the batch, to where they meet it.

Tracing and capture both do: one to find out how a model uses its parameters, the other to read every batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.containers import tensors_in
from lightning_influence.gradients.block_rows import Source
from lightning_influence.gradients.watch import FunctionWatch, outputs_of
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.registry import read_call
from lightning_influence.layers.site import NotUnderstoodError, Site

Owners: TypeAlias = Mapping[str, Tensor]
"""Full name to parameter."""


class Follower(FunctionWatch):
    """Follows parameters through a forward pass.

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

    @property
    def followed(self) -> Container[int]:
        """Ids of the parameters, and of what was made from them alone."""
        return self.sources

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        before: tuple[Any, ...] | None,
    ) -> None:
        """Look at a call that takes what is followed; without gradients it adds nothing to theirs in training."""
        if not torch.is_grad_enabled() or not any(id(t) in self.sources for t in tensors_in((args, kwargs))):
            return
        made = [tensor for tensor in outputs_of(func, args, output) if tensor.requires_grad]
        if not made:
            return
        passed = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self.sources]
        owners = dict(pair for tensor in passed for pair in self.sources[id(tensor)].parameters)
        site = Site(func, args if before is None else before, kwargs, passed, made[0])
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


def _looked_up(site: Site, owners: Owners) -> Tensor | None:
    """Return the indices of rows that were looked up in a parameter without the batch (position embeddings)."""
    if len(site.parameters) != 1 or all(site.parameters[0] is not parameter for parameter in owners.values()):
        return None
    try:
        call = read_call(site)
    except NotUnderstoodError:
        return None
    return call.input if type(call) is EmbeddingCall and call.padding_idx is None else None
