"""Parameters in line: between tensors by name and one flat vector.

Index legend: ``q`` vectors, ``p`` parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
            ValueError: If a name is unknown, nothing is chosen, or a parameter is not of real numbers.
        """
        every = dict(module.named_parameters())
        if names is None:
            chosen = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
        else:
            wanted = set(names)
            if wanted - every.keys():
                raise ValueError(
                    f"{type(module).__name__} has no parameters {sorted(wanted - every.keys())}; expected names of "
                    f"`named_parameters()`: {', '.join(list(every)[:20])}."
                )
            chosen = {name: parameter for name, parameter in every.items() if name in wanted}
        if not chosen:
            raise ValueError(
                f"{type(module).__name__} has no trainable parameter to take the curvature of; set `requires_grad`, or "
                "name the `parameters`."
            )
        odd = {name: value.dtype for name, value in chosen.items() if not value.is_floating_point()}
        if odd:
            raise ValueError(f"curvature is defined for real parameters only, not for {odd}; leave them out.")
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
        """Cut ``[..., p]`` up into views ``[..., *parameter.shape]``, by name.

        Raises:
            ValueError: If the last dimension is not ``p``.
        """
        if vectors.ndim == 0 or vectors.shape[-1] != self.size:
            raise ValueError(f"vectors have the shape {tuple(vectors.shape)}; expected [..., {self.size}].")
        parts = vectors.split([parameter.numel() for parameter in self.parameters.values()], -1)
        return {
            name: part.unflatten(-1, parameter.shape) if parameter.ndim else part.squeeze(-1)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }
