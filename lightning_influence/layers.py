"""Which layers are understood, and how each becomes activations and output gradients.

Everything layer-specific ends here. An operation turns a layer's raw input and raw output gradient into the
canonical layout

    activations       ``x: [k, n, s, i]``
    output gradients  ``g: [k, n, s, o]``

``k`` independent groups (1 except for grouped convolutions, whose weight is block-diagonal), ``n`` examples,
``s`` positions that share the weights, ``i`` inputs of a group plus a last column of ones for the bias, ``o`` outputs
of a group. The gradient of example ``n`` for group ``k`` is ``Σ_s g_s x_sᵀ``, ``[o, i]``, row-major like the weight.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerError(RuntimeError):
    """A layer was used in a way that would give wrong numbers; the message names it and the way out."""


class LayerOperation(ABC):
    """One layer whose per-example gradients have the form ``Σ_s g_s x_sᵀ``.

    Args:
        name: Path of the module, as in ``named_modules()``.
        module: The layer.
    """

    batched_ndim: ClassVar[int]
    """Number of dimensions of an input with a batch."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.has_weight = _trainable(module, "weight")
        self.has_bias = _trainable(module, "bias")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(k, o, i)`` of the parameter block, the bias column included."""

    @abstractmethod
    def activations(self, raw: Tensor, n: int) -> Tensor:
        """Turn the layer's input into ``[k, n, s, i]``."""

    @abstractmethod
    def output_gradients(self, raw: Tensor, n: int) -> Tensor:
        """Turn the gradient of the layer's output into ``[k, n, s, o]``."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the covered parameters within the module: weight first."""
        return tuple(name for name, has in (("weight", self.has_weight), ("bias", self.has_bias)) if has)

    def to_parameters(self, block: Tensor) -> dict[str, Tensor]:
        """Split a block ``[..., k, o, i]`` into tensors shaped like the parameters (leading dimensions kept)."""
        lead = block.shape[:-3]
        result: dict[str, Tensor] = {}
        if self.has_weight:
            weight = block[..., :-1] if self.has_bias else block
            result["weight"] = weight.reshape(*lead, *self.module.get_parameter("weight").shape)
        if self.has_bias:
            result["bias"] = block[..., -1].reshape(*lead, *self.module.get_parameter("bias").shape)
        return result

    def from_parameters(self, tensors: dict[str, Tensor]) -> Tensor:
        """Join tensors shaped like the parameters into one block ``[k, o, i]``."""
        k, o, i = self.shape
        parts = []
        if self.has_weight:
            parts.append(tensors["weight"].reshape(k, o, i - self.has_bias))
        if self.has_bias:
            parts.append(tensors["bias"].reshape(k, o, 1))
        return torch.cat(parts, -1)

    def check_batch(self, raw: Tensor, n: int) -> None:
        """Raise ``LayerError`` unless the first dimension of the layer's input is the batch."""
        if raw.ndim < self.batched_ndim or raw.shape[0] != n:
            raise LayerError(
                f"layer {self.name!r} got an input of shape {tuple(raw.shape)} for a batch of {n} examples; the first "
                "dimension has to be the batch for its gradients to be told apart by example. Keep the batch "
                "dimension first, or leave the layer out by freezing it (requires_grad=False)."
            )


class LinearOperation(LayerOperation):
    """``nn.Linear`` with any number of dimensions between batch and features."""

    module: nn.Linear
    batched_ndim = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(1, out_features, in_features + bias)``."""
        return 1, self.module.out_features, self.module.in_features * self.has_weight + self.has_bias

    def activations(self, raw: Tensor, n: int) -> Tensor:
        """``[n, ..., i] -> [1, n, s, i]``."""
        self.check_batch(raw, n)
        rows = raw.reshape(1, n, -1, raw.shape[-1])
        if not self.has_bias:
            return rows
        if not self.has_weight:
            return rows.new_ones((1, n, rows.shape[2], 1))
        return F.pad(rows, (0, 1), value=1.0)

    def output_gradients(self, raw: Tensor, n: int) -> Tensor:
        """``[n, ..., o] -> [1, n, s, o]``."""
        return raw.reshape(1, n, -1, raw.shape[-1])


class Conv2dOperation(LayerOperation):
    """``nn.Conv2d`` with every stride, padding (mode), dilation and number of groups."""

    module: nn.Conv2d
    batched_ndim = 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, out_channels / groups, in_channels / groups * kernel + bias)``."""
        conv = self.module
        inputs = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
        return conv.groups, conv.out_channels // conv.groups, inputs * self.has_weight + self.has_bias

    def activations(self, raw: Tensor, n: int) -> Tensor:
        """``[n, c, h, w] -> [groups, n, s, i]``: one row per output position."""
        self.check_batch(raw, n)
        conv = self.module
        k, _, i = self.shape
        # torch keeps the per-side amounts here, of 'same' (which may be uneven) and of every mode.
        sides = list(conv._reversed_padding_repeated_twice)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(raw, sides, mode=mode) if any(sides) else raw
        height, width = (
            (size - conv.dilation[d] * (conv.kernel_size[d] - 1) - 1) // conv.stride[d] + 1
            for d, size in enumerate(padded.shape[-2:])
        )
        rows = raw.new_empty((n, k, i, height * width))
        if self.has_weight:
            # All patches as one strided view, copied straight beside the bias: F.unfold and a concatenation take 3 to
            # 20 times as long. Channels are the slow index, so a group's inputs are contiguous.
            of_n, of_c, of_h, of_w = padded.stride()
            channels = conv.in_channels // k
            patches = padded.as_strided(
                (n, k, channels, *conv.kernel_size, height, width),
                (
                    of_n,
                    of_c * channels,
                    of_c,
                    of_h * conv.dilation[0],
                    of_w * conv.dilation[1],
                    of_h * conv.stride[0],
                    of_w * conv.stride[1],
                ),
                padded.storage_offset(),
            )
            rows[:, :, : i - self.has_bias].view(patches.shape).copy_(patches)
        if self.has_bias:
            rows[:, :, -1] = 1
        return rows.permute(1, 0, 3, 2)

    def output_gradients(self, raw: Tensor, n: int) -> Tensor:
        """``[n, c, h, w] -> [groups, n, s, o]``."""
        grouped = raw.reshape(n, self.module.groups, -1, raw.shape[-2] * raw.shape[-1])
        return grouped.permute(1, 0, 3, 2)


_OPERATIONS: dict[type[nn.Module], type[LayerOperation]] = {
    nn.Linear: LinearOperation,
    nn.Conv2d: Conv2dOperation,
}


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters are understood.

    Attributes:
        operations: Block name (module path) to operation.
        uncovered: Name of every trainable parameter that is left out, to the reason.
        covered_parameters: Number of scalars covered.
        total_parameters: Number of trainable scalars.
    """

    operations: dict[str, LayerOperation]
    uncovered: dict[str, str] = field(default_factory=dict)
    covered_parameters: int = 0
    total_parameters: int = 0

    @property
    def share(self) -> float:
        """Share of the trainable scalars that is covered, 0 to 1."""
        return self.covered_parameters / self.total_parameters if self.total_parameters else 0.0

    def describe(self) -> str:
        """Return one line for logs: the share covered and what is left out."""
        line = f"{self.share:.1%} of {self.total_parameters:,} trainable parameters in {len(self.operations)} layers"
        if not self.uncovered:
            return line
        names = list(self.uncovered)
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return f"{line}; not covered: {listed}"


def cover(module: nn.Module, layers: Iterable[str] | None = None) -> Coverage:
    """Find the layers whose per-example gradients are understood.

    Args:
        module: The model. Only parameters that require a gradient count.
        layers: Module names or glob patterns to keep; None keeps all.

    Returns:
        Operations by module name, and the reason for each trainable parameter that is not covered.

    Raises:
        LayerError: If nothing is covered, or a pattern matches no layer.
    """
    users: dict[int, list[str]] = {}
    for name, submodule in module.named_modules():
        for parameter in submodule.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    operations: dict[str, LayerOperation] = {}
    reasons: dict[int, str] = {}
    covered: set[int] = set()
    patterns = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    matched: set[str] = set()
    supported: list[str] = []
    bypassed = {
        id(child): f"used by {type(parent).__name__} without being called"
        for parent in module.modules()
        if isinstance(parent, nn.MultiheadAttention)
        for child in parent.children()
    }
    for path, submodule in module.named_modules():
        own = [p for p in submodule.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        name = _clean(path)
        reason = bypassed.get(id(submodule)) or _why_not(submodule, own, users)
        if reason is None:
            supported.append(name)
        if patterns is not None and reason is None:
            hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
            matched.update(hits)
            reason = None if hits else "left out by `layers=`"
        kind = _kind(submodule)
        if reason is None and kind is not None:
            operations[name] = _OPERATIONS[kind](name, submodule)
            covered.update(id(p) for p in own)
        else:
            reasons.update({id(p): str(reason) for p in own})
    trainable = {_clean(name): p for name, p in module.named_parameters() if p.requires_grad}
    if patterns is not None and (missing := [pattern for pattern in patterns if pattern not in matched]):
        raise LayerError(
            f"`layers=` names {missing}, which match no supported layer; supported are {supported or 'none'}."
        )
    if not operations:
        kinds = sorted({r for r in reasons.values()}) or ["no parameter requires a gradient"]
        raise LayerError(
            "the model has no supported layer with trainable parameters; supported are "
            f"{', '.join(sorted(kind.__name__ for kind in _OPERATIONS))}. Found: {'; '.join(kinds)}."
        )
    return Coverage(
        operations,
        {name: reasons[id(p)] for name, p in trainable.items() if id(p) not in covered},
        sum(p.numel() for p in trainable.values() if id(p) in covered),
        sum(p.numel() for p in trainable.values()),
    )


def _why_not(module: nn.Module, own: list[nn.Parameter], users: dict[int, list[str]]) -> str | None:
    kind = _kind(module)
    if kind is None:
        return f"{type(module).__name__} is not supported"
    if type(module).forward is not kind.forward:
        return f"{type(module).__name__} has a forward of its own"
    extra = set(dict(module.named_parameters(recurse=False))) - {"weight", "bias"}
    if extra or "weight" not in module._parameters:
        return f"{type(module).__name__} is parametrised ({', '.join(sorted(extra)) or 'no own weight'})"
    for parameter in own:
        if len(users[id(parameter)]) > 1:
            return f"shared by {' and '.join(map(_clean, users[id(parameter)]))}"
    return None


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _OPERATIONS if isinstance(module, kind)), None)


def _trainable(module: nn.Module, name: str) -> bool:
    parameter = module._parameters[name]
    return parameter is not None and parameter.requires_grad


def _clean(path: str) -> str:
    """Drop what ``torch.compile`` puts into module paths, so that names are those of the eager model."""
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod")
