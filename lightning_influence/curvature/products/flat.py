"""Parameters in line: between tensors by name and one flat vector.

Index legend: ``q`` vectors, ``p`` parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_influence.core.weights import parameters_of


@dataclass(frozen=True, eq=False)
class FlatParameters:
    """Parameters as one vector, in the order of ``named_parameters()``; a tied parameter is in it once.

    Attributes:
        parameters: Name to parameter.
    """

    parameters: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, module: nn.Module, names: Iterable[str] | None = None) -> FlatParameters:
        """Choose parameters of a module.

        Args:
            module: The module.
            names: Names as in ``named_parameters()``, in any order; by default all that are trainable.

        Raises:
            ValueError: If a name is unknown, a parameter is complex, or nothing is chosen.
        """
        every = parameters_of(module)
        wanted = {name for name, p in every.items() if p.requires_grad} if names is None else set(names)
        if unknown := sorted(wanted - every.keys()):
            raise ValueError(
                f"{type(module).__name__} has no parameters {unknown[:5]}; expected names as in `named_parameters()` "
                "(a tied parameter has its first)."
            )
        chosen = {name: parameter for name, parameter in every.items() if name in wanted}
        if odd := [name for name, parameter in chosen.items() if not parameter.is_floating_point()]:
            raise ValueError(f"curvature is defined for real parameters only, not for {odd[:5]}; leave them out.")
        if not chosen:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter to take the curvature of; set `requires_grad`, or "
                "name the `parameters`."
            )
        return cls(chosen)

    @property
    def size(self) -> int:
        """Number of scalars ``p``."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vector: float64 if a parameter is, else float32."""
        every = {parameter.dtype for parameter in self.parameters.values()}
        return torch.float64 if torch.float64 in every else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the flat vector."""
        return next(iter(self.parameters.values())).device

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Cut ``[..., p]`` up into views ``[..., *parameter.shape]``, by name."""
        parts = vectors.split([parameter.numel() for parameter in self.parameters.values()], -1)
        return {
            name: part.unflatten(-1, parameter.shape) if parameter.ndim else part.squeeze(-1)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }
