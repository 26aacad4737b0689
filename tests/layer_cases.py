"""Small models with every kind of layer, for the tests that hold their per-example gradients against autograd.

A case makes a module, examples for it and a loss. Most modules map one tensor to another, and ``Read`` makes logits of
whatever comes out without parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from lightning_influence.objective.task import Task

N, CLASSES = 5, 3
Make = Callable[[], nn.Module]


def classify(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The last part of a batch are labels, all others are inputs."""
    *inputs, labels = batch
    return F.cross_entropy(module(*inputs), labels)


@dataclass(frozen=True)
class Case:
    """One model, its examples and what of it is understood.

    Attributes:
        make: Makes the module; it is brought to float64 and eval mode, and its parameters away from ones and zeros.
        data: Makes the examples, a tuple of tensors each.
        task: The loss of a batch.
        collate: Makes a batch of examples.
        uncovered: Name (or glob) of the parameters that are only exact with ``uncovered="exact"``, to a part of the
            reason given.
        unused: Names (or globs) of parameters that get no gradient in this case.
        sizes: Batch sizes to run it with; with 2 the last batch has one example.
        verified: Whether to run the package's own verification as well.
    """

    make: Make
    data: Callable[[], Sequence[tuple[Tensor, ...]]]
    task: Task = classify
    collate: Callable[[list[Any]], Any] = default_collate
    uncovered: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (2, N)
    verified: bool = True


def build(case: Case) -> nn.Module:
    module = case.make().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Fresh norms have ones, fresh biases and gates zeros: mix-ups would not show.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


class Read(nn.Module):
    """Logits of any tensor by fixed weights: no further layer to tell apart, and each entry counts differently."""

    def forward(self, value: Tensor) -> Tensor:
        flat = torch.tanh(value.flatten(1))
        weights = torch.linspace(-1, 2, flat.shape[1] * CLASSES, dtype=flat.dtype).reshape(-1, CLASSES)
        return flat @ torch.cos(7 * weights)


class Reading(nn.Module):
    """The module under test, and its output read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.read = Read()

    def forward(self, *inputs: Tensor) -> Any:
        return self.read(self.layer(*inputs))


def numbers(*shapes: tuple[int, ...], n: int = N) -> Callable[[], Sequence[tuple[Tensor, ...]]]:
    """Make ``n`` examples of normal numbers, one tensor for each shape, and a label."""

    def make() -> Sequence[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(3)
        inputs = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return list(zip(*inputs, torch.arange(n) % CLASSES, strict=True))

    return make


def ids(*shape: int, size: int = 6, n: int = N) -> Callable[[], Sequence[tuple[Tensor, ...]]]:
    """Make ``n`` examples of ids below ``size``, with repetitions within an example, and a label."""

    def make() -> Sequence[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(4)
        values = torch.randint(size, (n, *shape), generator=generator)
        if values.ndim > 1:
            values.view(n, -1)[:, -1] = values.view(n, -1)[:, 0]
        return list(zip(values, torch.arange(n) % CLASSES, strict=True))

    return make


def first(layer: Make, *shape: int) -> Case:
    """The layer stands where the graph starts: its inputs need no gradient."""
    return Case(lambda: Reading(layer()), numbers(shape), sizes=(N,), verified=False)


def later(layer: Make, *shape: int) -> Case:
    """The layer stands behind another one, which can only be right if gradients pass through."""
    return Case(
        lambda: Reading(nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), layer())),
        numbers(shape),
        sizes=(2,),
    )


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


# ------------------------------------------------------------------------------------------ layers of nn, on numbers


class CallsSuper(nn.Linear):
    """A subclass that calls the forward of its base on what it has changed."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input.sin())


class CallsFunction(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).tanh()


class ByHand(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class TwiceInForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(input)))


class Conv1D(nn.Module):
    """The layer of GPT-2 in transformers: a linear layer with its weight transposed, by `torch.addmm` on flat rows."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, value: Tensor) -> Tensor:
        shape = (*value.shape[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, value.view(-1, value.shape[-1]), self.weight).view(shape)


class RMSNormByHand(nn.Module):
    """As Llama has it; with ``offset``, as Gemma has it."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.offset = offset

    def forward(self, value: Tensor) -> Tensor:
        normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * normed if self.offset else self.weight * normed


class LayerNormChannelsFirst(nn.Module):
    """As ConvNeXt has it, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor) -> Tensor:
        centred = value - value.mean(1, keepdim=True)
        value = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * value + self.bias[:, None, None]


class OutputSize(nn.ConvTranspose2d):
    """A transposed convolution that is told how large its output shall be."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size=[8, 10])


def with_statistics(norm: nn.Module) -> nn.Module:
    """Running statistics that are not zeros and ones."""
    for name, buffer in norm.named_buffers():
        if name == "running_mean":
            buffer.normal_()
        elif name == "running_var":
            buffer.uniform_(0.5, 2.0)
    return norm


LINEARS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "vector": (lambda: nn.Linear(4, 5), (4,)),
    "vector, no bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "sequence": (lambda: nn.Linear(4, 5), (3, 4)),
    "sequence as long as the batch": (lambda: nn.Linear(4, 4), (N, 4)),
    "sequence, no bias": (lambda: nn.Linear(4, 5, bias=False), (3, 4)),
    "two leading dimensions": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "one feature": (lambda: nn.Linear(1, 1), (3, 1)),
    "weight frozen": (lambda: frozen(nn.Linear(4, 5), "weight"), (3, 4)),
    "bias frozen": (lambda: frozen(nn.Linear(4, 5), "bias"), (3, 4)),
    "subclass that calls super": (lambda: CallsSuper(4, 5), (3, 4)),
    "subclass that calls F.linear": (lambda: CallsFunction(4, 5), (3, 4)),
    "subclass by hand": (lambda: ByHand(4, 5), (3, 4)),
    "subclass that calls super twice": (lambda: TwiceInForward(4, 4), (3, 4)),
    "transformers' Conv1D": (lambda: Conv1D(5, 4), (3, 4)),
    "transformers' Conv1D on vectors": (lambda: Conv1D(5, 4), (4,)),
}

# By number of dimensions: on four channels and these pixels, four output channels unless named.
PIXELS = {1: (7,), 2: (5, 6), 3: (3, 4, 3)}
_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 2, "bias": False},
    "kernel of one": {"kernel_size": 1},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": 2, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 2, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "groups": {"kernel_size": 2, "groups": 2, "out_channels": 6},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False},
    "depthwise, two outputs each": {"kernel_size": 2, "groups": 4, "out_channels": 8},
    "everything": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "padding_mode": "circular"},
}
_TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 2, "bias": False},
    "kernel of one": {"kernel_size": 1},
    "stride": {"kernel_size": 2, "stride": 2},
    "padding": {"kernel_size": 3, "padding": 1},
    "stride larger than the kernel": {"kernel_size": 2, "stride": 3},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "groups": {"kernel_size": 2, "groups": 2, "out_channels": 6},
    "depthwise": {"kernel_size": 2, "groups": 4, "bias": False},
    "everything": {
        "kernel_size": 2,
        "stride": 2,
        "padding": 1,
        "output_padding": 1,
        "dilation": 2,
        "groups": 2,
        "out_channels": 2,
    },
}


def _convolutions(kinds: Mapping[int, Any], table: Mapping[str, dict[str, Any]]) -> dict[str, tuple[Make, Any]]:
    def make(kind: Any, options: dict[str, Any]) -> Make:
        return lambda: kind(4, **{"out_channels": 4, **options})

    return {
        f"{d}d, {name}": (make(kind, options), (4, *PIXELS[d]))
        for d, kind in kinds.items()
        for name, options in table.items()
    }


CONVOLUTIONS = _convolutions({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, _CONVOLUTIONS)
CONVOLUTIONS |= _convolutions({1: nn.Conv1d, 2: nn.Conv2d}, {"bias frozen": {"kernel_size": 2}})
CONVOLUTIONS["2d, oblong"] = (lambda: nn.Conv2d(4, 3, (2, 3), (1, 2), (1, 0), (2, 1)), (4, 5, 6))
CONVOLUTIONS["2d, weight frozen"] = (lambda: frozen(nn.Conv2d(4, 4, 2, groups=2), "weight"), (4, 5, 6))
CONVOLUTIONS["2d, bias frozen"] = (lambda: frozen(nn.Conv2d(4, 4, 2, groups=2), "bias"), (4, 5, 6))
del CONVOLUTIONS["1d, bias frozen"]

TRANSPOSED = _convolutions(
    {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d},
    _TRANSPOSED,
)
TRANSPOSED["2d, oblong"] = (lambda: nn.ConvTranspose2d(4, 3, (2, 3), (1, 2), (1, 0), (0, 1)), (4, 4, 3))
TRANSPOSED["2d, output size"] = (lambda: OutputSize(4, 3, 3, stride=2), (4, 3, 4))
TRANSPOSED["2d, weight frozen"] = (lambda: frozen(nn.ConvTranspose2d(4, 4, 2), "weight"), (4, 4, 3))
TRANSPOSED["2d, bias frozen"] = (lambda: frozen(nn.ConvTranspose2d(4, 4, 2, groups=2), "bias"), (4, 4, 3))

NORMS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "LayerNorm on vectors": (lambda: nn.LayerNorm(4), (4,)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "LayerNorm over two of three dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "LayerNorm, weight frozen": (lambda: frozen(nn.LayerNorm(4), "weight"), (3, 4)),
    "LayerNorm, bias frozen": (lambda: frozen(nn.LayerNorm(4), "bias"), (3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "RMSNorm over two dimensions": (lambda: nn.RMSNorm((3, 4)), (3, 4)),
    "RMSNorm by hand": (lambda: RMSNormByHand(4), (3, 4)),
    "RMSNorm by hand, one plus the weight": (lambda: RMSNormByHand(4, 1.0), (3, 4)),
    "LayerNorm by hand, channels first": (lambda: LayerNormChannelsFirst(4), (4, 2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 2, 3)),
    "GroupNorm on vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 2, 3)),
    "InstanceNorm1d, running statistics": (
        lambda: with_statistics(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        (4, 3),
    ),
    "InstanceNorm2d, running statistics": (
        lambda: with_statistics(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        (4, 2, 3),
    ),
    "BatchNorm1d on vectors": (lambda: with_statistics(nn.BatchNorm1d(4)), (4,)),
    "BatchNorm1d": (lambda: with_statistics(nn.BatchNorm1d(4)), (4, 3)),
    "BatchNorm2d": (lambda: with_statistics(nn.BatchNorm2d(4)), (4, 2, 3)),
    "BatchNorm3d": (lambda: with_statistics(nn.BatchNorm3d(4)), (4, 2, 3, 2)),
    "BatchNorm2d, weight frozen": (lambda: frozen(with_statistics(nn.BatchNorm2d(4)), "weight"), (4, 2, 3)),
    "BatchNorm2d, bias frozen": (lambda: frozen(with_statistics(nn.BatchNorm2d(4)), "bias"), (4, 2, 3)),
}


# ------------------------------------------------------------------------------------------------- bare parameters


class Bare(nn.Module):
    """Parameters ``a``, ``b``, ... of the given shapes, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip("abc", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(1.5 + torch.randn(shape).tanh()))

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value, *self.parameters())


def bare(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Make:
    return lambda: Bare(function, *shapes)


def added_in_place(x: Tensor, b: Tensor) -> Tensor:
    x = 2 * x
    x += b
    return x


def scaled_in_place(x: Tensor, g: Tensor) -> Tensor:
    return (2 * x).mul_(g)


def with_token(x: Tensor, cls: Tensor) -> Tensor:
    return torch.cat([cls.expand(len(x), -1, -1), x], 1)


def mixed_layers(x: Tensor, w: Tensor) -> Tensor:
    """As ELMo mixes the layers of an encoder: a softmax of scalars."""
    weights = w.softmax(0)
    return weights[0] * x + weights[1] * x.sin() + weights[2] * x.square()


def token_where(x: Tensor, token: Tensor) -> Tensor:
    return torch.where(x[..., :1] > 0, token, x)


def token_in_place(x: Tensor, token: Tensor) -> Tensor:
    x = x.clone()
    x[x[..., 0] > 0] = token
    return x


ELEMENTWISE: dict[str, tuple[Make, tuple[int, ...]]] = {
    "bias": (bare(lambda x, b: x + b, (4,)), (3, 4)),
    "bias on vectors": (bare(lambda x, b: x + b, (4,)), (4,)),
    "bias from the left": (bare(lambda x, b: b + x, (4,)), (3, 4)),
    "bias, a whole example": (bare(lambda x, b: x + b, (3, 4)), (3, 4)),
    "bias, one number": (bare(lambda x, b: x + b, ()), (3, 4)),
    "bias in place": (bare(added_in_place, (4,)), (3, 4)),
    "bias times two by torch.add": (bare(lambda x, b: torch.add(x, b, alpha=2), (4,)), (3, 4)),
    "bias on an expanded view": (bare(lambda x, b: x + b.expand(len(x), 3, 4), (4,)), (3, 4)),
    "minus a bias": (bare(lambda x, b: x - b, (4,)), (3, 4)),
    "a bias minus the input": (bare(lambda x, b: b - x, (4,)), (3, 4)),
    "scale": (bare(lambda x, g: x * g, (4,)), (3, 4)),
    "scale on vectors": (bare(lambda x, g: x * g, (4,)), (4,)),
    "scale from the left": (bare(lambda x, g: g * x, (4,)), (3, 4)),
    "scale in place": (bare(scaled_in_place, (4,)), (3, 4)),
    "scale of rows": (bare(lambda x, g: x * g, (3, 1)), (3, 4)),
    "division": (bare(lambda x, g: x / g, (4,)), (3, 4)),
    "division by torch.div": (bare(lambda x, g: torch.div(x, g), (4,)), (3, 4)),
    "a scale over the input": (bare(lambda x, g: g / (1 + x.square()), (4,)), (3, 4)),
    "scale and shift": (bare(lambda x, g, b: g * x + b, (4,), (4,)), (3, 4)),
    "scale of channels": (bare(lambda x, g: g.view(1, -1, 1, 1) * x, (4,)), (4, 2, 3)),
    "layer scale of ConvNeXt": (bare(lambda x, g: x + g * x.tanh(), (4, 1, 1)), (4, 2, 3)),
    "one plus the scale": (bare(lambda x, g: x * (1 + g), (4,)), (3, 4)),
    "gate": (bare(lambda x, g: torch.sigmoid(g) * x, (4,)), (3, 4)),
    "gate of one number": (bare(lambda x, g: x + g.tanh() * x.sin(), (1,)), (3, 4)),
    "temperature": (bare(lambda x, t: x / t, ()), (3, 4)),
    "temperature of one entry": (bare(lambda x, t: x / t, (1,)), (4,)),
    "exponential scale of CLIP": (bare(lambda x, t: t.exp() * x, ()), (4,)),
    "softmax of scalars": (bare(mixed_layers, (3,)), (3, 4)),
    "one parameter twice": (bare(lambda x, g: (x * g).tanh() * g + g, (4,)), (3, 4)),
    "product of two": (bare(lambda x, a, b: x * (a * b), (4,), (4,)), (3, 4)),
    "PReLU": (lambda: nn.PReLU(), (4, 3)),
    "PReLU per channel": (lambda: nn.PReLU(4), (4, 3)),
    "F.prelu": (bare(lambda x, a: F.prelu(x, a), (4,)), (4,)),
    "learned positions": (bare(lambda x, p: x + p[:, : x.shape[1]], (1, 6, 4)), (3, 4)),
    "learned positions, as many as examples": (bare(lambda x, p: x + p[:, : x.shape[1]], (1, 6, 4)), (N, 4)),
    "learned positions without the one": (bare(lambda x, p: x + p[: x.shape[1]], (6, 4)), (3, 4)),
    "learned positions, expanded": (bare(lambda x, p: x + p.expand(len(x), -1, -1), (1, 3, 4)), (3, 4)),
    "learned positions, repeated": (bare(lambda x, p: x + p.repeat(len(x), 1, 1), (1, 3, 4)), (3, 4)),
    "learned positions, resized": (
        bare(lambda x, p: x + F.interpolate(p.transpose(1, 2), size=3).transpose(1, 2), (1, 6, 4)),
        (3, 4),
    ),
    "class token": (bare(with_token, (1, 1, 4)), (3, 4)),
    "class token and positions": (bare(lambda x, c, p: with_token(x, c) + p, (1, 1, 4), (1, 4, 4)), (3, 4)),
    "class token, repeated": (bare(lambda x, c: torch.cat([c.repeat(len(x), 1, 1), x], 1), (1, 1, 4)), (3, 4)),
    "queries, expanded": (bare(lambda x, q: (q.expand(len(x), -1, -1) @ x.mT).softmax(-1) @ x, (2, 4)), (3, 4)),
    "cumulated scale": (bare(lambda x, w: x * w.cumsum(0), (4,)), (3, 4)),
    "mask token": (bare(token_where, (4,)), (3, 4)),
    # Longer than what has a dense curvature.
    "long scale": (bare(lambda x, g: x.repeat(1, 275) * g, (1100,)), (4,)),
    "long learned positions": (bare(lambda x, p: x + p[:, : x.shape[1]], (1, 300, 4)), (3, 4)),
    "long learned positions, as many as examples": (bare(lambda x, p: x + p[:N], (300, 4)), (N, 4)),
    "long bias, a whole example": (bare(lambda x, b: x + b, (30, 40)), (30, 40)),
    "long class tokens": (bare(with_token, (1, 30, 40)), (2, 40)),
}

FUNCTIONAL: dict[str, tuple[Make, tuple[int, ...]]] = {
    "F.linear": (bare(lambda x, w, b: F.linear(x, w, b), (5, 4), (5,)), (3, 4)),
    "F.linear, no bias": (bare(lambda x, w: F.linear(x, w), (5, 4)), (4,)),
    "F.linear by keywords": (bare(lambda x, w, b: F.linear(input=x, weight=w, bias=b), (5, 4), (5,)), (3, 4)),
    "@": (bare(lambda x, w: x @ w, (4, 5)), (4,)),
    "@ on sequences": (bare(lambda x, w: x @ w, (4, 5)), (3, 4)),
    "@ transposed": (bare(lambda x, w: x @ w.T, (5, 4)), (3, 4)),
    "torch.matmul": (bare(lambda x, w: torch.matmul(x, w), (4, 5)), (3, 4)),
    "torch.mm": (bare(lambda x, w: torch.mm(x, w), (4, 5)), (4,)),
    "torch.mm on flat rows": (bare(lambda x, w: torch.mm(x.reshape(-1, 4), w).view(len(x), -1), (4, 5)), (3, 4)),
    "torch.addmm": (bare(lambda x, w, b: torch.addmm(b, x, w), (4, 5), (5,)), (4,)),
    "F.conv1d": (bare(lambda x, w, b: F.conv1d(x, w, b, padding=1), (5, 4, 3), (5,)), (4, 7)),
    "F.conv2d": (bare(lambda x, w: F.conv2d(x, w), (5, 4, 2, 2)), (4, 5, 6)),
    "F.conv2d with all arguments": (
        bare(lambda x, w, b: F.conv2d(x, w, b, 2, "valid", (1, 2), 2), (4, 2, 2, 2), (4,)),
        (4, 5, 6),
    ),
    "F.conv_transpose2d": (bare(lambda x, w, b: F.conv_transpose2d(x, w, b, 2), (4, 3, 2, 2), (3,)), (4, 3, 3)),
    "F.layer_norm": (bare(lambda x, w, b: F.layer_norm(x, (4,), w, b), (4,), (4,)), (3, 4)),
    "F.group_norm": (bare(lambda x, w, b: F.group_norm(x, 2, w, b), (4,), (4,)), (4, 3)),
    "F.linear with parts of weight and bias": (
        bare(lambda x, w, b: F.linear(x, w[:3], b[:3]) * F.linear(x, w[3:], b[3:]), (6, 4), (6,)),
        (3, 4),
    ),
    "F.linear with and without its bias": (
        bare(lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w), (4, 4), (4,)),
        (3, 4),
    ),
    "F.linear with a view of a kernel": (bare(lambda x, w: F.linear(x, w.view(5, 4)), (5, 4, 1, 1)), (3, 4)),
    "two weights with one bias": (
        bare(lambda x, w, v, b: F.linear(x, w, b).tanh() * F.linear(x, v, b), (5, 4), (5, 4), (5,)),
        (3, 4),
    ),
    "a weight and its row as a scale": (bare(lambda x, w: F.linear(x, w) * w[0], (4, 4)), (3, 4)),
    "a weight and its sum as a scale": (bare(lambda x, w: F.linear(x, w) * w.sum(0), (4, 4)), (3, 4)),
    "F.linear with a part of a weight": (bare(lambda x, w: F.linear(x, w[:3]) * F.linear(x, w[3:]), (6, 4)), (3, 4)),
}


# ---------------------------------------------------------------------------------------------------------- structures


class Tied(nn.Module):
    """A language model: the embedding is the last layer, too."""

    def __init__(self, *, bias: bool = False, untied: bool = False, ids: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ids, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, ids, bias=bias)
        if not untied:
            self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Any:
        return self.output(torch.tanh(self.middle(self.embedding(ids))))


class TiedBackwards(nn.Module):
    """The same weight first as a linear layer, then as an embedding, with a bias at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.start = nn.Embedding(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        likely = self.linear(torch.tanh(self.start(ids))).softmax(-1)
        return torch.cat([likely, F.embedding(ids.flip(1), self.linear.weight)], -1)


class SharedWeight(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, value: Tensor) -> Any:
        return self.other(torch.tanh(self.one(value)))


class SharedTransposed(nn.Module):
    """An autoencoder whose decoder is its encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, value: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(value)), self.encoder.weight.t(), self.bias)


class Repeated(nn.Module):
    """One layer called several times on its own output."""

    def __init__(self, layer: nn.Module, times: int = 2) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, value: Tensor) -> Tensor:
        for _ in range(self.times):
            value = torch.tanh(self.layer(value))
        return value


class OtherPositions(nn.Module):
    """One layer called on inputs with different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        return self.layer(torch.tanh(self.layer(value)).mean(1))


class TwoNames(nn.Module):
    """One convolution under two names, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.other = self.one

    def forward(self, value: Tensor) -> Tensor:
        whole, part = torch.tanh(self.one(value)), torch.tanh(self.other(value[:, :, ::2, 1:]))
        return torch.cat([whole.flatten(1), part.flatten(1)], 1)


class Inside(nn.Module):
    """Brings its input into another layout, runs layers there and brings the result back."""

    def __init__(
        self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor, int], Tensor], *layers: nn.Module
    ) -> None:
        super().__init__()
        self.there, self.back = there, back
        self.layers = nn.Sequential(*layers)

    def forward(self, value: Tensor) -> Tensor:
        return self.back(self.layers(self.there(value)), len(value))


def mlp(size: int = 4) -> list[nn.Module]:
    return [nn.Linear(size, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, size, bias=False), Bare(torch.add, (size,))]


class Positions(nn.Module):
    """Position embeddings by ids that are the same for all examples."""

    def __init__(self, ids: Callable[[Tensor], Tensor], size: int = 6) -> None:
        super().__init__()
        self.ids = ids
        self.embedding = nn.Embedding(size, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, value: Tensor) -> Any:
        return self.norm(value + self.embedding(self.ids(value)))


class PositionsThroughLayers(nn.Module):
    """Position embeddings that run through layers of their own before they meet the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, value: Tensor) -> Any:
        return value * self.norm(torch.tanh(self.layer(self.embedding(torch.arange(value.shape[1])))))


class SharedAndNot(nn.Module):
    """One layer called on the examples and on what is the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        positions = torch.tanh(self.layer(self.embedding(torch.arange(value.shape[1]))))
        return self.layer(value * positions)


class Attention(nn.Module):
    """Self-attention with scores changed by a relative bias as T5 has it, `[S, S, H] -> [1, H, S, S]`."""

    def __init__(self, heads: int = 2, buckets: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(4, 12, bias=False)
        self.bias = nn.Embedding(buckets, heads)
        self.out = nn.Linear(4, 4, bias=False)

    def forward(self, value: Tensor) -> Any:
        n, s, e = value.shape
        q, k, v = (part.view(n, s, self.heads, -1).transpose(1, 2) for part in self.qkv(value).chunk(3, -1))
        steps = torch.arange(s)
        buckets = (steps[None] - steps[:, None]).clamp(-2, 2) + 2
        scores = q @ k.mT + self.bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, s, e))


class WindowBias(nn.Module):
    """Swin: windows beside the batch, and a bias for each pair of positions looked up by indexing a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.table = nn.Parameter(torch.zeros(5, 2))

    def forward(self, value: Tensor) -> Any:
        n = len(value)
        windows = value.view(n * 2, 3, 4)
        q, k, v = (part.view(n * 2, 3, 2, 2).transpose(1, 2) for part in self.qkv(windows).chunk(3, -1))
        steps = torch.arange(3)
        index = (steps[None] - steps[:, None] + 2).view(-1)
        bias = self.table[index].view(3, 3, 2).permute(2, 0, 1).contiguous()
        attended = (q @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v
        return attended.transpose(1, 2).reshape(n, 6, 4)


class Hyper(nn.Module):
    """A layer makes the weight of another from a vector that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(3))
        self.maker = nn.Linear(3, 20)

    def forward(self, value: Tensor) -> Tensor:
        return F.linear(value, self.maker(self.code).view(5, 4))


class Checkpointed(nn.Module):
    """Keeps no activations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Any:
        return checkpoint(self.inner, value, use_reentrant=False)


class Recommender(nn.Module):
    """Two embeddings, two biases by id and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.user_bias, self.item_bias = nn.Embedding(6, 1), nn.Embedding(6, 1)
        self.mean = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Any:
        user, item = ids.unbind(1)
        bias = (self.user_bias(user) + self.item_bias(item)).squeeze(-1)
        return (self.user(user) * self.item(item)).sum(-1) + bias + self.mean


class Fourier(nn.Module):
    """A Fourier layer: numbers are complex inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.filter = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, value: Tensor) -> Any:
        frequencies = torch.fft.rfft(self.layer(value), dim=1)
        return torch.fft.irfft(frequencies * torch.view_as_complex(self.filter), n=value.shape[1], dim=1)


class LoRA(nn.Module):
    """A frozen layer with a trained update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Linear(2, 5, bias=False)

    def forward(self, value: Tensor) -> Any:
        return self.base(value) + 2.0 * self.up(self.down(value))


class LoRAParameters(nn.Module):
    """The same with bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(5, 2))

    def forward(self, value: Tensor) -> Any:
        return self.base(value) + value @ self.down.T @ self.up.T


class InPlace(nn.Module):
    """Everything in place, and a projection beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = with_statistics(nn.BatchNorm2d(4))
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.skip = nn.Conv2d(4, 6, 1)

    def forward(self, value: Tensor) -> Tensor:
        value = F.relu(self.norm(self.stem(value)), inplace=True)
        out = self.body(value)
        out += self.skip(value)
        return F.leaky_relu_(out, 0.2)


class SomeWithoutGradients(nn.Module):
    """Layers called with and without gradients, and on what is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        with torch.no_grad():
            target = self.norm(torch.tanh(self.first(2 * value)))
        return self.last(self.norm(self.first(value)) * target) + self.last(self.norm(target).detach())


class Unused(nn.Module):
    """A layer that is never called and a parameter that the loss does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alone = nn.Parameter(torch.zeros(3))

    def forward(self, value: Tensor) -> Any:
        self.alone.sin()
        return self.used(value)


class Dropped(nn.Module):
    """A layer that is called, but whose result the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dropped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        self.dropped(value)
        return self.used(value)


class Transposed(nn.Module):
    """Time first inside, as recurrent models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.positions = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.zeros(6, 1, 4))

    def forward(self, value: Tensor) -> Tensor:
        value = value.transpose(0, 1)
        value = self.norm(self.layer(value + self.positions[: len(value)]))
        return value.transpose(0, 1)


class StepByStep(nn.Module):
    """A recurrent cell by hand: the same layers at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        state = torch.zeros_like(value[:, 0])
        for step in value.unbind(1):
            state = torch.tanh(self.inputs(step) + self.hidden(state))
        return state


STRUCTURES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "two linear layers with one weight": (SharedWeight, (3, 4)),
    "a linear layer twice": (lambda: Repeated(nn.Linear(4, 4)), (3, 4)),
    "a convolution three times": (lambda: Repeated(nn.Conv2d(4, 4, 3, padding=1), 3), (4, 3, 3)),
    "a transposed convolution twice": (lambda: Repeated(nn.ConvTranspose1d(4, 4, 2)), (4, 5)),
    "a norm twice": (lambda: Repeated(nn.LayerNorm(4)), (3, 4)),
    "a transformer's layer twice": (
        lambda: Repeated(nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True)),
        (3, 4),
    ),
    "a layer on other positions": (OtherPositions, (3, 4)),
    "a convolution under two names": (TwoNames, (4, 6, 7)),
    "flat rows": (
        lambda: Inside(lambda x: x.reshape(-1, 4), lambda y, n: y.view(n, -1, 4), *mlp()),
        (3, 4),
    ),
    "flat rows, two dimensions": (
        lambda: Inside(lambda x: x.flatten(0, 2), lambda y, n: y.view(n, -1, 4), *mlp()),
        (2, 3, 4),
    ),
    "flat rows, time first": (
        lambda: Inside(
            lambda x: x.transpose(0, 1).reshape(-1, 4), lambda y, n: y.view(-1, n, 4).transpose(0, 1), *mlp()
        ),
        (3, 4),
    ),
    "time first": (lambda: Inside(lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1), *mlp()), (3, 4)),
    "time first, as many steps as examples": (
        lambda: Inside(lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1), *mlp()),
        (N, 4),
    ),
    "time first, two steps": (
        lambda: Inside(lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1), *mlp()),
        (2, 4),
    ),
    "time first, three steps": (
        lambda: Inside(lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1), *mlp()),
        (3, 4),
    ),
    "the batch in the middle": (
        lambda: Inside(lambda x: x.permute(1, 0, 2, 3), lambda y, n: y.transpose(0, 1), *mlp()),
        (2, 3, 4),
    ),
    "time first with positions": (Transposed, (3, 4)),
    "windows": (
        lambda: Inside(lambda x: x.view(-1, 2, 4), lambda y, n: y.reshape(n, -1, 4), *mlp()),
        (6, 4),
    ),
    "windows with a table of biases": (WindowBias, (6, 4)),
    "frames of a film": (
        lambda: Inside(
            lambda x: x.flatten(0, 1),
            lambda y, n: y.view(n, -1, *y.shape[1:]),
            nn.Conv2d(2, 3, 2),
            with_statistics(nn.BatchNorm2d(3)),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2, groups=1),
        ),
        (3, 2, 4, 3),
    ),
    "pixels as rows": (
        lambda: Inside(lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4), lambda y, n: y.view(n, -1, 4), *mlp()),
        (4, 2, 3),
    ),
    "two views below each other": (
        lambda: Inside(
            lambda x: torch.cat([x, x.sin()]), lambda y, n: torch.cat([y[:n], y[n:]], -1), nn.Linear(4, 5), nn.Tanh()
        ),
        (4,),
    ),
    "heads beside the batch": (
        lambda: Inside(
            lambda x: x.view(len(x), 3, 2, 4).transpose(1, 2).reshape(-1, 3, 4),
            lambda y, n: y.reshape(n, 2, 3, 4),
            *mlp(),
        ),
        (3, 8),
    ),
    "positions by ids [S]": (lambda: Positions(lambda x: torch.arange(x.shape[1])), (3, 4)),
    "positions by ids [S], as many as examples": (lambda: Positions(lambda x: torch.arange(x.shape[1])), (N, 4)),
    "positions by ids [S], two": (lambda: Positions(lambda x: torch.arange(x.shape[1])), (2, 4)),
    "positions by ids [1, S]": (lambda: Positions(lambda x: torch.arange(x.shape[1])[None]), (3, 4)),
    "positions by ids [N, S]": (lambda: Positions(lambda x: torch.arange(x.shape[1]).expand(len(x), -1)), (3, 4)),
    "positions by ids [S, 1]": (lambda: Positions(lambda x: torch.arange(x.shape[1])[:, None].mT), (3, 4)),
    "positions by ids, a long table": (lambda: Positions(lambda x: torch.arange(x.shape[1]) + 200, 300), (3, 4)),
    "positions by ids, a long table, some twice": (
        lambda: Positions(lambda x: torch.arange(x.shape[1])[None] // 2, 300),
        (4, 4),
    ),
    "positions by ids, a long table, as many as examples": (
        lambda: Positions(lambda x: torch.arange(x.shape[1])[None], 300),
        (N, 4),
    ),
    "positions through layers": (PositionsThroughLayers, (3, 4)),
    "positions through layers, as many as examples": (PositionsThroughLayers, (N, 4)),
    "a layer on positions and examples": (SharedAndNot, (3, 4)),
    "a layer on as many positions as examples": (SharedAndNot, (N, 4)),
    "relative bias": (Attention, (3, 4)),
    "relative bias, as many positions as examples": (Attention, (N, 4)),
    "relative bias, a long table": (lambda: Attention(buckets=600), (3, 4)),
    "a weight made by a layer": (Hyper, (3, 4)),
    "recomputed in the backward pass": (
        lambda: nn.Sequential(nn.Linear(4, 4), Checkpointed(nn.Sequential(*mlp()))),
        (3, 4),
    ),
    "attention recomputed in the backward pass": (
        lambda: nn.Sequential(nn.Linear(4, 4), Checkpointed(encoder_layer(dropout=0))),
        (3, 4),
    ),
    "low-rank update": (LoRA, (3, 4)),
    "low-rank update by parameters": (LoRAParameters, (3, 4)),
    "in place": (InPlace, (4, 3, 3)),
    "some without gradients": (SomeWithoutGradients, (3, 4)),
    "complex numbers": (Fourier, (4, 4)),
    "steps of a cell": (StepByStep, (3, 4)),
}


# ------------------------------------------------------------------------------------------------- attention of nn


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` on one tensor, the second part of it as keys and values if ``cross``."""

    def __init__(self, *, cross: bool = False, values: bool = False, **options: Any) -> None:
        super().__init__()
        self.cross, self.values = cross, values
        self.call = {name: options.pop(name) for name in ("need_weights", "average_attn_weights") if name in options}
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})

    def forward(self, value: Tensor) -> Any:
        query, key = (value[:, :2], value[:, 2:]) if self.cross else (value, value)
        content = key.sin() if self.values else key
        if self.attention.kdim != 4:
            key = torch.cat([key, key.square()], -1)[..., : self.attention.kdim]
        if self.attention.vdim != 4:
            content = content[..., : self.attention.vdim]
        if not self.attention.batch_first:
            # The same tensor three times stays one: attention then projects it once.
            swapped = {id(part): part.transpose(0, 1) for part in (query, key, content)}
            query, key, content = (swapped[id(part)] for part in (query, key, content))
        out, weights = self.attention(query, key, content, **self.call)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out.flatten(1) if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)


class Decoder(nn.Module):
    """A module of two inputs on the two parts of one."""

    def __init__(self, layer: nn.Module, *, batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.batch_first = layer, batch_first

    def forward(self, value: Tensor) -> Any:
        one, other = value[:, :2], value[:, 2:]
        if self.batch_first:
            return self.layer(one, other)
        return self.layer(one.transpose(0, 1), other.transpose(0, 1)).transpose(0, 1)


class Swapped(nn.Module):
    """A time-first module on batch-first data."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Any:
        return self.layer(value.transpose(0, 1)).transpose(0, 1)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, **options})


ATTENTION: dict[str, tuple[Make, tuple[int, ...]]] = {
    "self": (lambda: MultiHead(), (3, 4)),
    "self, as many positions as examples": (lambda: MultiHead(), (N, 4)),
    "self, time first": (lambda: MultiHead(batch_first=False), (3, 4)),
    "self, time first, as many positions as examples": (lambda: MultiHead(batch_first=False), (N, 4)),
    "self, no weights": (lambda: MultiHead(need_weights=False), (3, 4)),
    "self, weights of every head": (lambda: MultiHead(average_attn_weights=False), (3, 4)),
    "self, no bias": (lambda: MultiHead(bias=False), (3, 4)),
    "self, other values": (lambda: MultiHead(values=True), (3, 4)),
    "self, bias for keys and values": (lambda: MultiHead(add_bias_kv=True), (3, 4)),
    "self, zero attention": (lambda: MultiHead(add_zero_attn=True), (3, 4)),
    "cross": (lambda: MultiHead(cross=True), (5, 4)),
    "cross, time first": (lambda: MultiHead(cross=True, batch_first=False), (5, 4)),
    "cross, other values": (lambda: MultiHead(cross=True, values=True), (5, 4)),
    "cross, own sizes": (lambda: MultiHead(cross=True, kdim=5, vdim=3), (5, 4)),
    "cross, own sizes, time first": (lambda: MultiHead(cross=True, kdim=5, vdim=3, batch_first=False), (5, 4)),
    "cross, own sizes, no bias": (lambda: MultiHead(cross=True, kdim=5, vdim=3, bias=False), (5, 4)),
    "encoder layer": (lambda: encoder_layer(), (3, 4)),
    "encoder layer, norm first": (lambda: encoder_layer(norm_first=True, activation="gelu"), (3, 4)),
    "encoder layer, time first": (lambda: Swapped(encoder_layer(batch_first=False)), (3, 4)),
    "encoder layer, no bias": (lambda: encoder_layer(bias=False), (3, 4)),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2, norm=nn.LayerNorm(4)), (3, 4)),
    "encoder, norm first": (
        lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2, enable_nested_tensor=False),
        (3, 4),
    ),
    "decoder layer": (lambda: Decoder(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)), (5, 4)),
    "decoder layer, norm first, time first": (
        lambda: Decoder(nn.TransformerDecoderLayer(4, 2, 6, norm_first=True), batch_first=False),
        (5, 4),
    ),
    "transformer": (lambda: Decoder(nn.Transformer(4, 2, 1, 1, 6, batch_first=True)), (5, 4)),
    "transformer, time first": (lambda: Decoder(nn.Transformer(4, 2, 1, 1, 6), batch_first=False), (5, 4)),
}


def padded() -> Sequence[tuple[Tensor, ...]]:
    """Sequences of four positions, some of them padding, with the mask of the padding."""
    lengths = torch.tensor([4, 2, 3, 1, 4])
    return [
        (value, torch.arange(4) >= length, label)
        for (value, label), length in zip(numbers((4, 4))(), lengths, strict=True)
    ]


class MaskedEncoder(nn.Module):
    """An encoder with a mask of the padding; what stands in the padding is not read."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        nested = options.pop("nested", False)
        self.encoder = nn.TransformerEncoder(encoder_layer(**options), 2, enable_nested_tensor=nested)
        self.batch_first = options.get("batch_first", True)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        if not self.batch_first:
            value = value.transpose(0, 1)
        value = self.encoder(value, src_key_padding_mask=mask)
        if not self.batch_first:
            value = value.transpose(0, 1)
        return value.masked_fill(mask.unsqueeze(-1), 0.0)


class CausalDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder_layer(norm_first=True)

    def forward(self, value: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(value.shape[1], dtype=value.dtype)
        return self.layer(value, src_mask=mask, is_causal=True)


# ------------------------------------------------------------------------------------------------------ embeddings


class Bag(nn.Module):
    """An ``nn.EmbeddingBag``, with weights for its entries where it is given any."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, **options)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Any:
        return self.bag(ids, per_sample_weights=weights)


class BagOfOffsets(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, **options)

    def forward(self, ids: Tensor, offsets: Tensor) -> Any:
        return self.bag(ids, offsets)


def weighted_ids() -> Sequence[tuple[Tensor, ...]]:
    weights = numbers((3,))()
    return [(value, weight, label) for (value, label), (weight, _) in zip(ids(3)(), weights, strict=True)]


def ragged_ids() -> Sequence[tuple[Tensor, ...]]:
    return [(value[:length], label) for (value, label), length in zip(ids(4)(), [4, 1, 3, 2, 3], strict=True)]


def one_after_another(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of all examples in one row and where each starts."""
    lengths = torch.tensor([0] + [len(value) for value, _ in examples[:-1]])
    return torch.cat([value for value, _ in examples]), lengths.cumsum(0), torch.stack([y for _, y in examples])


EMBEDDINGS: dict[str, tuple[Make, Callable[[], Sequence[tuple[Tensor, ...]]]]] = {
    "one id": (lambda: nn.Embedding(6, 4), ids()),
    "ids": (lambda: nn.Embedding(6, 4), ids(3)),
    "as many ids as examples": (lambda: nn.Embedding(6, 4), ids(N)),
    "two dimensions": (lambda: nn.Embedding(6, 4), ids(2, 3)),
    "padding": (lambda: nn.Embedding(6, 4, padding_idx=0), ids(3)),
    "padding counted from the end": (lambda: nn.Embedding(6, 4, padding_idx=-1), ids(3)),
    "sparse": (lambda: nn.Embedding(6, 4, sparse=True), ids(3)),
    "bag, mean": (lambda: Bag(), ids(3)),
    "bag, sum": (lambda: Bag(mode="sum"), ids(3)),
    "bag, padding": (lambda: Bag(mode="mean", padding_idx=0), ids(3)),
    "bag, sum, padding": (lambda: Bag(mode="sum", padding_idx=2), ids(3)),
    "bag, sparse": (lambda: Bag(mode="sum", sparse=True), ids(3)),
    "bag, weights": (lambda: Bag(mode="sum"), weighted_ids),
    "bag, weights, padding": (lambda: Bag(mode="sum", padding_idx=2), weighted_ids),
    "F.embedding": (bare(lambda x, w: F.embedding(x, w), (6, 4)), ids(3)),
    "F.embedding, padding": (bare(lambda x, w: F.embedding(x, w, 1), (6, 4)), ids(3)),
    "rows by index": (bare(lambda x, w: w[x], (6, 4)), ids(3)),
    "numbers by index": (bare(lambda x, w: w[x], (6,)), ids(3)),
    "columns by index": (bare(lambda x, w: w[:, x].transpose(0, 1), (4, 6)), ids(3)),
    "entries by two indices": (bare(lambda x, w: w[x, x.flip(1)], (6, 6)), ids(3)),
    "index_select": (bare(lambda x, w: w.index_select(0, x.flatten()).view(len(x), -1), (6, 4)), ids(3)),
    "gather": (bare(lambda x, w: w.expand(len(x), -1).gather(1, x), (1, 6)), ids(3)),
    "F.one_hot @": (bare(lambda x, w: F.one_hot(x, 6).to(w.dtype) @ w, (6, 4)), ids(3)),
    "scaled": (bare(lambda x, w: F.embedding(x, w) * 2.0, (6, 4)), ids(3)),
    "twice": (bare(lambda x, w: F.embedding(x, w) + F.embedding(x.flip(1), w).tanh(), (6, 4)), ids(3)),
}


# ------------------------------------------------------------------------------------- language models, masked losses


def next_token(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Every position predicts the next one; logits as rows, the way most training steps have it."""
    (tokens,) = batch
    logits = module(tokens)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def tokens() -> Sequence[tuple[Tensor, ...]]:
    return [(value,) for value, _ in ids(5)()]


def squared_error(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """No labels: the module reconstructs its input."""
    return F.mse_loss(module(batch[0]), batch[0])


def yes_or_no(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]), (batch[1] > 0).double())


def unknown_loss(module: nn.Module, batch: Sequence[Tensor]) -> Any:
    """A loss that is written out."""
    return (module(batch[0]).square().sum(1) + module(batch[0]).sin().sum(1)).mean()


class Relu3(torch.autograd.Function):
    """A cube of the positive part times a parameter, with its own backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(value, weight)
        return weight * value.clamp(min=0) ** 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        value, weight = ctx.saved_tensors
        positive = value.clamp(min=0)
        per_weight = (grads[0] * positive**3).reshape(-1, len(weight)).sum(0)
        return grads[0] * 3 * positive**2 * weight, per_weight


class Recurrent(nn.Module):
    """A recurrent layer of nn and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.recurrent = layer
        self.head = nn.Linear(4 * (2 if getattr(layer, "bidirectional", False) else 1), 4)

    def forward(self, value: Tensor) -> Any:
        states, _ = self.recurrent(value)
        return self.head(states)


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, value: Tensor) -> Any:
        state: Any = None
        for step in value.unbind(1):
            state = self.cell(step) if state is None else self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Packed(nn.Module):
    """Sequences of different lengths, packed: torch sorts them, and puts them back."""

    def __init__(self, layer: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.recurrent, self.last = layer, last
        self.head = nn.Linear(4 * (2 if getattr(layer, "bidirectional", False) else 1), 4)

    def forward(self, value: Tensor, mask: Tensor) -> Any:
        first = getattr(self.recurrent, "batch_first", False)
        lengths = (~mask).sum(1).cpu()
        value = value if first else value.transpose(0, 1)
        packed = nn.utils.rnn.pack_padded_sequence(value, lengths, batch_first=first, enforce_sorted=False)
        states, final = self.recurrent(packed)
        if self.last:
            return self.head((final[0] if isinstance(final, tuple) else final)[-1])
        filled, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=mask.shape[1])
        return self.head(filled).masked_fill(mask.unsqueeze(-1), 0.0)


class TwoSided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, value: Tensor) -> Any:
        return self.bilinear(value, value.sin())


class Scripted(nn.Module):
    """Part of the model is compiled: its functions can't be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(4, 4)
        self.inner = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))

    def forward(self, value: Tensor) -> Any:
        return self.outer(torch.tanh(self.inner(value)))


class Mapped(nn.Module):
    """A layer that is called for each example by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        return self.outer(torch.tanh(torch.vmap(self.inner)(value)))


class Experts(nn.Module):
    """The weight of the expert that an example asks for: a weight made of parameters by the example."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, value: Tensor) -> Tensor:
        share = torch.sigmoid(value.sum((1, 2)))
        weight = share[:, None, None] * self.experts[0] + (1 - share[:, None, None]) * self.experts[1]
        return torch.bmm(value, weight.mT)


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 4))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv1d(3, 4, 2)), nn.Tanh(), nn.Linear(3, 4))


def _alone(make: Make, data: Any, uncovered: Mapping[str, str]) -> Case:
    data = numbers(data) if isinstance(data, tuple) else data
    return Case(lambda: Reading(make()), data, uncovered={f"layer.{name}": why for name, why in uncovered.items()})


# Functions that no formula is known for here, but that treat each example alone.
REPEATED: dict[str, tuple[Make, tuple[int, ...]]] = {
    "RNN cell": (lambda: Cells(nn.RNNCell(4, 4)), (3, 4)),
    "bilinear": (TwoSided, (4,)),
    "einsum": (bare(lambda x, w: torch.einsum("nsi,oi->nso", x, w), (5, 4)), (3, 4)),
    "a weight for every example": (Experts, (3, 4)),
    "scaled weight": (bare(lambda x, w: F.linear(x, w * 0.5), (5, 4)), (3, 4)),
    "normalised weight": (bare(lambda x, w: F.linear(x, F.normalize(w, dim=1)), (5, 4)), (3, 4)),
    "weight norm": (_weight_norm, (3, 4)),
    "spectral norm": (_spectral_norm, (3, 4)),
    "@ a vector": (bare(lambda x, w: x @ w, (4,)), (3, 4)),
    "@ from the left": (bare(lambda x, w: w @ x, (5, 3)), (3, 4)),
    "queries": (bare(lambda x, q: (q @ x.mT).softmax(-1) @ x, (2, 4)), (3, 4)),
    "queries, time first": (
        bare(lambda x, q: torch.einsum("snk,k->sn", x.transpose(0, 1), q).softmax(0).T, (4,)),
        (3, 4),
    ),
    "torch.addmm with factors": (
        bare(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), (4, 5), (5,)),
        (4,),
    ),
    "torch.addcmul with two": (bare(lambda x, g, b: torch.addcmul(b, x, g), (4,), (4,)), (3, 4)),
    "torch.baddbmm": (
        bare(lambda x, w, b: torch.baddbmm(b.expand(len(x), 1, -1), x, w.expand(len(x), -1, -1)), (4, 5), (5,)),
        (3, 4),
    ),
    "a weight for every head": (bare(lambda x, w: torch.matmul(x, w), (2, 4, 3)), (2, 3, 4)),
    "torch.cdist": (bare(lambda x, p: torch.cdist(x, p), (3, 4)), (4,)),
    "F.cosine_similarity": (
        bare(lambda x, p: F.cosine_similarity(x[:, None], p[None], dim=-1), (3, 4)),
        (4,),
    ),
    "a number in place of others": (bare(lambda x, v: x.masked_fill(x > 0, v), ()), (3, 4)),
    "torch.maximum": (bare(lambda x, a: torch.maximum(x, a), (4,)), (3, 4)),
    "Tensor.clamp": (bare(lambda x, a: x.clamp(max=a), (4,)), (3, 4)),
    "Tensor.pow": (bare(lambda x, a: (x.abs() + 1) ** a, (4,)), (3, 4)),
    "torch.lerp": (bare(lambda x, a: torch.lerp(x, x.sin(), a), (4,)), (3, 4)),
    "torch.tensordot": (bare(lambda x, w: torch.tensordot(x, w, dims=([2], [0])), (4, 5)), (3, 4)),
    "attention with a bias": (
        bare(lambda x, b: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], b[None]), (1, 3, 3)),
        (3, 4),
    ),
}
RECURRENT: dict[str, tuple[Make, tuple[int, ...]]] = {
    "RNN": (lambda: Recurrent(nn.RNN(4, 4, batch_first=True)), (3, 4)),
    "RNN of relu, without biases": (lambda: Recurrent(nn.RNN(4, 4, 1, "relu", False, batch_first=True)), (3, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM(4, 4, batch_first=True)), (3, 4)),
    "LSTM, projected": (lambda: Recurrent(nn.LSTM(4, 6, 2, batch_first=True, proj_size=4)), (3, 4)),
    "LSTM, two layers, both directions": (
        lambda: Recurrent(nn.LSTM(4, 4, 2, batch_first=True, bidirectional=True)),
        (3, 4),
    ),
    "LSTM, time first": (
        lambda: Inside(lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1), Recurrent(nn.LSTM(4, 4))),
        (3, 4),
    ),
    "GRU, two layers": (lambda: Recurrent(nn.GRU(4, 4, 2, batch_first=True)), (3, 4)),
    "LSTM cell": (lambda: Cells(nn.LSTMCell(4, 4)), (3, 4)),
    "GRU cell": (lambda: Cells(nn.GRUCell(4, 4)), (3, 4)),
    "RNN cell": (lambda: Cells(nn.RNNCell(4, 4)), (3, 4)),
}
# Exact only with `uncovered="exact"`. The names are globs, without the leading "layer.".
UNCOVERED: dict[str, tuple[Make, Any, dict[str, str]]] = {
    "own autograd function": (bare(lambda x, w: Relu3.apply(x, w), (4,)), (3, 4), {"a": "."}),
    "token in place": (bare(token_in_place, (4,)), (3, 4), {"a": "__setitem__"}),
    "traced by jit": (Scripted, (4,), {"inner.*": "."}),
    "torch.vmap": (Mapped, (4,), {"inner.*": "."}),
    "a weight and its transpose": (SharedTransposed, (4,), {"encoder.weight": "both as linear and as transposed"}),
    "largest norm": (lambda: nn.Embedding(6, 4, max_norm=1.0), ids(3), {"weight": "max_norm"}),
}


def _read(table: Mapping[str, tuple[Make, tuple[int, ...]]], kind: str, *, alone: bool = True) -> dict[str, Case]:
    cases = {}
    for name, (make, shape) in table.items():
        one_and_three = name.startswith(("1d", "3d"))
        if alone or one_and_three:
            cases[f"{kind}: {name}"] = first(make, *shape)
        if not one_and_three:
            cases[f"{kind}: {name}, later"] = later(make, *shape)
    return cases


def _bag_of_offsets(**options: Any) -> Case:
    return Case(lambda: Reading(BagOfOffsets(**options)), ragged_ids, collate=one_after_another)


COVERED: dict[str, Case] = {
    **_read(LINEARS, "linear"),
    **_read(CONVOLUTIONS, "convolution"),
    **_read(TRANSPOSED, "transposed convolution"),
    **_read(NORMS, "norm", alone=False),
    **_read(ELEMENTWISE, "elementwise", alone=False),
    **_read(FUNCTIONAL, "functional", alone=False),
    **_read(STRUCTURES, "structure", alone=False),
    **_read(ATTENTION, "attention"),
    **_read(REPEATED, "repeated", alone=False),
    **{
        f"embedding: {name}": Case(lambda make=make: Reading(make()), data)  # type: ignore[misc]
        for name, (make, data) in EMBEDDINGS.items()
    },
    "embedding: bag of offsets": _bag_of_offsets(),
    "embedding: bag of offsets, sum, padding": _bag_of_offsets(mode="sum", padding_idx=1),
    "embedding: largest of a bag": Case(lambda: Reading(Bag(mode="max")), ids(3)),
    "embedding: before attention": Case(lambda: Reading(nn.Sequential(nn.Embedding(6, 4), encoder_layer())), ids(3)),
    "attention: padding": Case(lambda: Reading(MaskedEncoder()), padded),
    "attention: padding, nested": Case(lambda: Reading(MaskedEncoder(nested=True)), padded),
    "attention: padding, norm first": Case(lambda: Reading(MaskedEncoder(norm_first=True)), padded),
    "attention: padding, time first": Case(lambda: Reading(MaskedEncoder(batch_first=False)), padded),
    **_read(RECURRENT, "recurrent", alone=False),
    "recurrent: LSTM, alone": Case(lambda: Reading(RECURRENT["LSTM"][0]()), numbers((3, 4))),
    "recurrent: packed LSTM": Case(lambda: Reading(Packed(nn.LSTM(4, 4, batch_first=True))), padded),
    "recurrent: packed LSTM, both directions, time first": Case(
        lambda: Reading(Packed(nn.LSTM(4, 4, 2, bidirectional=True))), padded
    ),
    "recurrent: packed GRU, last state": Case(
        lambda: Reading(Packed(nn.GRU(4, 4, batch_first=True), last=True)), padded
    ),
    "attention: causal": Case(lambda: Reading(CausalDecoder()), numbers((3, 4))),
    "tied: language model": Case(Tied, tokens, next_token),
    "tied: language model with a bias": Case(lambda: Tied(bias=True), tokens, next_token),
    "tied: not": Case(lambda: Tied(bias=True, untied=True), tokens, next_token),
    "tied: as many ids as features": Case(lambda: Tied(ids=6), tokens, next_token),
    "tied: linear first": Case(lambda: Reading(TiedBackwards()), ids(3)),
    "loss: squared error": Case(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), numbers((4,)), squared_error
    ),
    "loss: binary": Case(Recommender, ids(2), yes_or_no),
    "loss: unknown": Case(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), numbers((4,)), unknown_loss
    ),
    "unused: a layer never called": Case(
        lambda: Reading(Unused()), numbers((3, 4)), unused=("layer.idle.*", "layer.alone")
    ),
    "unused: a layer whose output is dropped": Case(
        lambda: Reading(Dropped()), numbers((3, 4)), unused=("layer.dropped.*",)
    ),
}

EXACT_ON_REQUEST: dict[str, Case] = {
    name: _alone(make, data, uncovered) for name, (make, data, uncovered) in UNCOVERED.items()
}


# ------------------------------------------------------------- rows that belong to no example, or not in their order


class Selected(nn.Module):
    """Only some rows of a batch, different numbers of each example: what a masked language model does in its head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        chosen = value[..., 0] > 0
        out = torch.zeros_like(value)
        out[chosen] = torch.tanh(self.layer(value[chosen]))
        return out


class Sorted(nn.Module):
    """Examples in another order inside, as recurrent models sort by length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        order = value[:, 0].argsort()
        return self.layer(value[order])[order.argsort()]


class Expert(nn.Module):
    """A mixture of experts: every row goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, value: Tensor) -> Tensor:
        rows = value.reshape(-1, 4)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = ((rows[:, 0] > 0) == bool(number)).nonzero().squeeze(1)
            out.index_add_(0, chosen, expert(rows[chosen]))
        return out.view(value.shape)


class Centred(nn.Module):
    """Every example depends on all others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Any:
        return self.layer(value - value.mean(0))


class Loop(nn.Module):
    """One call for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in value])


MISLEADING: dict[str, Case] = {
    "a loop over examples": Case(lambda: Reading(Loop()), numbers((3, 4))),
    "a loop over vectors": Case(lambda: Reading(Loop()), numbers((4,))),
    "some rows": Case(lambda: Reading(Selected()), numbers((3, 4))),
    "experts": Case(lambda: Reading(Expert()), numbers((3, 4))),
    "sorted": Case(lambda: Reading(Sorted()), numbers((4,))),
    "scaled by frequency": Case(lambda: Reading(nn.Embedding(6, 4, scale_grad_by_freq=True)), ids(3)),
    "statistics of the batch": Case(
        lambda: Reading(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=False))),
        numbers((4, 3)),
    ),
    "rows of all examples": Case(lambda: Reading(Centred()), numbers((4,))),
}

assert math.prod(PIXELS[2]) > N  # else pixels and examples could be mixed up without being seen
