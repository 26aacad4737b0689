"""Calls that torch differentiates once, or not at all: running statistics, cuDNN's recurrent layers, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_influence.core.precision import working
from lightning_influence.core.torch_private import eager_name
from lightning_influence.replay.record import ReplayError

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_NORMS = {F.batch_norm: False, torch.batch_norm: False, F.instance_norm: True, torch.instance_norm: True}
_SHORT = (torch.batch_norm, torch.instance_norm)
_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NAMES_OF_SHORT = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_DEFAULTS = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5}


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that normalisation layers keep running statistics in, by name.

    Raises:
        ReplayError: If some are shared between processes.
    """
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm):
            raise ReplayError(
                f"{name or type(module).__name__} is a SyncBatchNorm, whose statistics are those of several "
                "processes; a replay is one of a training on one device: train with `sync_batchnorm=False`."
            )
        for own, buffer in layer.named_buffers(name, recurse=False):
            if own.rpartition(".")[2] in ("running_mean", "running_var"):
                found[eager_name(own)] = buffer
    return found


class DifferentiableCalls(TorchFunctionMode):
    """A context for forward passes that are to be differentiated twice, and by running statistics.

    Args:
        statistics: Running statistics by name, see ``statistics_of``.

    Attributes:
        leaves: Name to what the statistics were, in the graph.
        now: Name to what they have become, in the graph; their buffers hold the same numbers.
    """

    def __init__(self, statistics: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(buffer): name for name, buffer in statistics.items()}
        self.leaves = {name: buffer.detach().clone().requires_grad_(True) for name, buffer in statistics.items()}
        self.now: dict[str, Tensor] = dict(self.leaves)
        # The fused kinds of attention have no second derivative.
        self._attention: AbstractContextManager[Any] | None = None

    def __enter__(self) -> DifferentiableCalls:
        self._attention = sdpa_kernel(SDPBackend.MATH)
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._attention is not None
        self._attention.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, or one like it that has the derivatives."""
        kwargs = kwargs or {}
        if func in _NORMS and self._names:
            given = dict(zip(_NAMES_OF_SHORT if func in _SHORT else _NAMES, args, strict=False))
            given = {**_DEFAULTS, **given, **kwargs}
            of_batch = given.pop("training", None)
            if of_batch is None:
                of_batch = given.pop("use_input_stats", _NORMS[func])
            if id(given["running_mean"]) in self._names:
                return self._normalised(F.instance_norm if _NORMS[func] else F.batch_norm, bool(of_batch), given)
        if func in _RECURRENT:
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **kwargs)
        if func is F.embedding and kwargs.get("sparse"):
            kwargs = {**kwargs, "sparse": False}
        return func(*args, **kwargs)

    def _normalised(self, norm: Callable[..., Tensor], of_batch: bool, given: Mapping[str, Any]) -> Tensor:
        x, momentum, buffers = given["input"], given["momentum"], (given["running_mean"], given["running_var"])
        names = [self._names[id(buffer)] for buffer in buffers]
        weight, bias, eps = given["weight"], given["bias"], given["eps"]
        if not of_batch:
            mean, var = (self.now[name] for name in names)
            shape = (1, -1, *[1] * (x.ndim - 2))
            scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
            shift = -mean * scale if bias is None else bias - mean * scale
            found: Tensor = working(x) * scale.view(shape) + shift.view(shape)
            return found.to(x.dtype)
        single = norm is F.instance_norm
        dims = [dim for dim in range(x.ndim) if dim != 1 and not (single and dim == 0)]
        var, mean = torch.var_mean(working(x), dims, correction=1)
        if single:
            var, mean = var.mean(0), mean.mean(0)
        for name, buffer, found in zip(names, buffers, (mean, var), strict=True):
            self.now[name] = (1 - momentum) * self.now[name] + momentum * found.to(buffer.dtype)
            with torch.no_grad():
                buffer.copy_(self.now[name])
        return norm(x, None, None, weight, bias, True, 0.0, eps)
