"""Which layers are understood, and what capture takes from them, against the dense reference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset
from tracing import covered

from lightning_influence import Influence
from lightning_influence.core.isolation import untouched
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.capture import Capture
from lightning_influence.gradients.coverage import Coverage, Layers
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import VerificationError, inspect
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import LayerError
from lightning_influence.objective.task import TaskError

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
EXAMPLES = 5
CLASSES = 3

# Of a layer with 4 input channels on 6 x 7 pixels; 4 output channels unless named.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "kernel of one": {"kernel_size": 1},
    "kernel of one, no bias": {"kernel_size": 1, "bias": False},
    "kernel of one, stride": {"kernel_size": 1, "stride": (2, 3)},
    "kernel of one, padding": {"kernel_size": 1, "padding": (1, 2)},
    "kernel of one, circular": {"kernel_size": 1, "padding": 1, "padding_mode": "circular"},
    "kernel of one, groups, stride": {"kernel_size": 1, "groups": 2, "stride": 2},
    "kernel of the whole image": {"kernel_size": (6, 7)},
    "oblong kernel": {"kernel_size": (2, 3), "padding": (1, 0)},
    "stride": {"kernel_size": 3, "stride": (2, 3), "padding": 1},
    "stride that leaves a rest": {"kernel_size": 2, "stride": 2},
    "dilation": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2)},
    "same, even kernel, circular": {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    "same, kernel of one": {"kernel_size": 1, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "circular, stride": {"kernel_size": (2, 3), "padding": (1, 2), "stride": 2, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 3), "padding_mode": "replicate", "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "groups": 2},
    "groups, no bias, stride": {"kernel_size": 3, "groups": 2, "bias": False, "stride": 2},
    "groups, more outputs": {"kernel_size": 2, "groups": 2, "out_channels": 6},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise, two outputs each": {"kernel_size": 2, "groups": 4, "out_channels": 8, "bias": False},
    "everything": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "padding_mode": "circular",
    },
}
LINEARS: dict[str, tuple[tuple[int, ...], bool]] = {
    "vector": ((), True),
    "vector, no bias": ((), False),
    "sequence": ((4,), True),
    "sequence, no bias": ((4,), False),
    "two leading dimensions": ((2, 3), True),
}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def task(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1])


def with_input(value: Tensor, module: Any, batch: Any) -> Tensor:
    return task(module, (value, batch[1]))


def about(name: str) -> Callable[[str], str]:
    """Put a name before the message of a failed comparison."""
    return lambda message: f"{name}: {message}"


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class SinglePrecisionNorm(nn.Module):
    """Normalises in float32, as language models do whatever the type of their weights."""

    def forward(self, value: Tensor) -> Tensor:
        single = value.float()
        return value * (single.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class Flat(nn.Module):
    """Brings whatever comes into three logits by fixed random weights: no further layer to tell apart."""

    def forward(self, value: Tensor) -> Tensor:
        flat = torch.tanh(value.flatten(1))
        weights = torch.linspace(-1, 2, flat.shape[1] * CLASSES, dtype=flat.dtype).reshape(-1, CLASSES)
        return flat @ torch.cos(7 * weights)


def data(shape: tuple[int, ...], n: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, *shape, generator=generator).double(), torch.arange(n) % CLASSES


def passes(
    net: nn.Module,
    inputs: Tensor | Dataset[Any],
    targets: Tensor | None = None,
    *,
    batch_size: int = 3,
    task: Callable[[Any, Any], Tensor] = task,
    layers: Layers = None,
    coverage: Coverage | None = None,
    **options: Any,
) -> ExampleGradients:
    dataset: Any = inputs
    if targets is not None:
        assert isinstance(inputs, Tensor)
        dataset = TensorDataset(inputs, targets)
    source = ExampleSource(dataset, batch_size=batch_size)
    coverage = coverage or discover(net, task, source, layers=layers, **options)
    return ExampleGradients(net, task, source, coverage, **options)


def captured(gradients: ExampleGradients, n: int = EXAMPLES) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `x` and `g` of every layer that took part, over all examples."""
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with closing(gradients.run(range(n))) as batches:
        for batch in batches:
            for io in batch.layers():
                (g,) = io.gs
                assert isinstance(g, Tensor)
                collected.setdefault(io.name, []).append((io.x, g))
    return {
        name: (torch.cat([x for x, _ in parts], 1), torch.cat([g for _, g in parts], 1))
        for name, parts in collected.items()
    }


def formed(x: Tensor, g: Tensor) -> Tensor:
    """Return the per-example gradients `[k, n, o, i]`."""
    return torch.einsum("knso,knsi->knoi", g, x)


def found_gradients(gradients: ExampleGradients, n: int = EXAMPLES) -> dict[str, Tensor]:
    """Return the per-example gradients of every parameter of every block that took part, by name."""
    collected: dict[str, list[Tensor]] = {}
    with closing(gradients.run(range(n))) as batches:
        for batch in batches:
            for io in batch.layers():
                blocks = torch.cat(list(per_sample.gradients(io.x, io.gs[0])), 1).transpose(0, 1)
                for name, value in gradients.coverage.blocks[io.name].to_parameters(blocks).items():
                    collected.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in collected.items()}


def assert_gradients(net: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> None:
    """Hold the gradients of every trainable parameter, of whatever kind, against the reference."""
    gradients = passes(net, inputs, targets, **options)
    assert gradients.coverage.share == 1.0
    found = found_gradients(gradients, len(inputs))
    expected = ref.per_example_gradients(net, cross_entropy, inputs, targets)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-3, name
        torch.testing.assert_close(found[name], gradient, **EXACT, msg=about(name))
    error = inspect(passes(net, inputs, targets, **options), range(len(inputs))).largest_error
    assert error is not None
    assert error < 1e-12


def reference_gradients(net: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the reference's per-example gradients of every supported layer, `[k, n, o, i]`, by layer."""
    gradients = ref.per_example_gradients(net, cross_entropy, inputs, targets)
    result = {}
    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f"{prefix}weight" in gradients:
            weight, bias = gradients[f"{prefix}weight"], gradients.get(f"{prefix}bias")
            result[name] = ref.gradient_matrix(module, weight, bias)
    return result


def assert_right(net: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> None:
    """Hold every layer's captured activations, output gradients and gradients against the reference."""
    found = captured(passes(net, inputs, targets, **options), len(inputs))
    expected = reference_gradients(net, inputs, targets)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        x, g = ref.layer_inputs_and_output_gradients(net, name, cross_entropy, inputs, targets)
        torch.testing.assert_close(found[name][0], x, **EXACT)
        torch.testing.assert_close(found[name][1], g, **EXACT)
        torch.testing.assert_close(formed(*found[name]), gradient, **EXACT)


class TestEveryVariant:
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolution(self, name: str) -> None:
        """As the first layer, where the graph starts, and as a later one."""
        options = {"out_channels": 4, **CONVOLUTIONS[name]}
        first = nn.Sequential(nn.Conv2d(4, **options), Flat()).double().eval()
        assert_right(first, *data((4, 6, 7)))
        later = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, **options), Flat()).double().eval()
        assert_right(later, *data((2, 6, 7)))

    @pytest.mark.parametrize("name", ["plain", "everything", "same, even kernel", "kernel of one, stride", "depthwise"])
    def test_convolution_in_other_memory_layouts(self, name: str) -> None:
        """Channels last, a window into a larger tensor, one image for all examples: patches are cut by strides."""
        options = {"out_channels": 4, **CONVOLUTIONS[name]}
        whole, targets = data((5, 8, 9))
        net = nn.Sequential(nn.Conv2d(4, **options), Flat()).double().eval()
        inputs = {
            "channels last": whole[:, :4, :6, :7].contiguous(memory_format=torch.channels_last),
            "window": whole[:, 1:, 1:7, 2:],
            "transposed": whole[:, :4, :7, :6].transpose(-1, -2),
            "expanded": whole[:1, :4, :6, :7].expand(EXAMPLES, -1, -1, -1),
            "expanded channels": whole[:, :1, :6, :7].expand(-1, 4, -1, -1),
        }
        for layout, value in inputs.items():
            # One batch that keeps the layout: a copy per example would bring it in order.
            options = {"task": partial(with_input, value), "coverage": covered(net, value)}
            gradients = passes(net, value, targets, batch_size=EXAMPLES, **options)
            found = captured(gradients)["0"]
            x, g = ref.layer_inputs_and_output_gradients(net, "0", cross_entropy, value, targets)
            torch.testing.assert_close(found[0], x, **EXACT, msg=about(layout))
            torch.testing.assert_close(found[1], g, **EXACT)
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        assert_right(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), *net).double(), *data((2, 6, 7)))

    @pytest.mark.parametrize("name", LINEARS)
    def test_linear(self, name: str) -> None:
        leading, bias = LINEARS[name]
        net = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias), Flat()).double().eval()
        assert_right(net, *data((*leading, 4)))

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    @pytest.mark.parametrize(
        "layer",
        [
            lambda: nn.Linear(4, 4),
            lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding=(2, 1), stride=(2, 1), padding_mode="circular"),
            lambda: nn.Conv2d(4, 4, (2, 3), padding="same", groups=4),
        ],
        ids=["linear", "convolution", "depthwise"],
    )
    def test_only_weight_or_bias_is_trained(self, layer: Callable[[], nn.Module], frozen: str) -> None:
        net = nn.Sequential(layer(), Flat()).double().eval()
        shape = (3, 4) if isinstance(net[0], nn.Linear) else (4, 6, 7)
        inputs, targets = data(shape)
        whole = reference_gradients(net, inputs, targets)["0"]
        expected = whole[..., :-1] if frozen == "bias" else whole[..., -1:]
        getattr(net[0], frozen).requires_grad_(False)
        trained = "weight" if frozen == "bias" else "bias"
        # A bias alone is no matrix, and has its own name.
        name = "0" if frozen == "bias" else "0.bias"
        gradients = passes(net, inputs, targets)
        found = formed(*captured(gradients)[name])
        block_shape = (1, 1, expected[:, 0].numel()) if frozen == "weight" else (len(expected), *expected.shape[2:])
        torch.testing.assert_close(
            found, expected.transpose(0, 1).reshape(found.shape) if frozen == "weight" else expected, **EXACT
        )
        coverage = gradients.coverage
        assert list(coverage.blocks) == [name]
        assert coverage.blocks[name].shape == block_shape
        assert coverage.share == 1.0
        assert {key: id(value) for key, value in coverage.blocks[name].parameters.items()} == {
            f"0.{trained}": id(getattr(net[0], trained))
        }

    @pytest.mark.parametrize("name", ["plain", "no bias", "groups", "depthwise, two outputs each"])
    def test_block_and_parameters_are_the_same_numbers(self, name: str) -> None:
        module = nn.Conv2d(4, **{"out_channels": 4, **CONVOLUTIONS[name]}).double()
        self.check_layout(module, "conv", module.bias is not None)
        module.requires_grad_(False)
        module.weight.requires_grad_(True)
        self.check_layout(module, "conv", False)

    def check_layout(self, module: nn.Conv2d, name: str, bias: bool) -> None:
        net = nn.Sequential(OrderedDict({name: module}))
        block = covered(net, torch.randn(4, 4, 6, 6).double()).blocks[name]
        own = {
            f"{name}.{key}": torch.randn(2, 3, *p.shape).double()
            for key, p in module.named_parameters()
            if p.requires_grad
        }
        assert (f"{name}.bias" in own) == bias
        matrix = ref.gradient_matrix(
            module,
            own[f"{name}.weight"].flatten(0, 1),
            own[f"{name}.bias"].flatten(0, 1) if bias else None,
        )
        expected = matrix.transpose(0, 1).reshape(2, 3, len(matrix), *matrix.shape[2:])
        assert expected.shape[2:] == block.shape
        back = block.to_parameters(expected)
        assert back.keys() == own.keys()
        for key, value in own.items():
            assert torch.equal(back[key], value)
        single = {key: value[1, 2] for key, value in own.items()}
        assert torch.equal(block.from_parameters(single), expected[1, 2])

    def test_lower_precision_is_laid_out_in_float32(self) -> None:
        net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, CLASSES)).eval()
        inputs, targets = data((4, 6, 7))
        found = captured(passes(net, inputs.float(), targets, forward_context=bfloat16))
        for name, expected in reference_gradients(net, inputs, targets).items():
            x, g = found[name]
            assert x.dtype == g.dtype == torch.float32
            assert (formed(x, g) - expected).norm() < 0.02 * expected.norm()


class Twice(nn.Module):
    """One layer called on inputs with different numbers of positions, the second time on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(value)).mean(1))))


class TwoNames(nn.Module):
    """The same convolution under two names, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.other = self.one
        self.flat = Flat()

    def forward(self, value: Tensor) -> Any:
        whole, part = torch.tanh(self.one(value)), torch.tanh(self.other(value[:, :, ::2, 1:]))
        return self.flat(whole) + self.flat(part)


class Siamese(nn.Module):
    """One encoder on two views, compared: each call has a root of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    def forward(self, value: Tensor) -> Any:
        return self.encoder(value[:, 0]) * self.encoder(value[:, 1])


class TwoTowers(nn.Module):
    """Two first layers of different kinds, joined by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(4, 2, 3)
        self.text = nn.Linear(7, 40)
        self.head = nn.Linear(40, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.head(torch.tanh(self.image(value)).flatten(1) * self.text(value[:, 0, 0]))


class Bottleneck(nn.Module):
    """A residual block as they are written: everything in place, a projection beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.skip = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, value: Tensor) -> Any:
        value = F.relu(self.norm(self.stem(value)), inplace=True)
        out = self.body(value)
        out += self.skip(value)
        return self.head(F.leaky_relu_(out, 0.2).mean((2, 3)))


class SomeWithoutGradients(nn.Module):
    """A layer called with and without gradients, and one that only sees what is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Any:
        with torch.no_grad():
            target = torch.tanh(self.first(2 * value))
        return self.last(torch.tanh(self.first(value)) * target) + self.last(target)


class Detached(nn.Module):
    """Nothing below the detached value gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.above = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.above(torch.tanh(self.below(value)).detach())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.last(input=torch.tanh(self.first(input=value)))


class Modifies(ByKeyword):
    """Changes the input of its last layer after the layer has used it."""

    def forward(self, value: Tensor) -> Any:
        hidden = self.first(value)
        out = self.last(hidden)
        hidden.mul_(2)
        return out + hidden[:, :CLASSES]


def in_place() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 2, groups=1),
        nn.SiLU(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.ELU(inplace=True),
        nn.Linear(6, CLASSES),
    )


def in_place_on_sequences() -> nn.Module:
    """What `nn.Linear` returns for sequences is a view, unless it has no bias."""
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 5, bias=False),
        nn.SiLU(inplace=True),
        nn.Linear(5, 5),
        nn.ELU(inplace=True),
        Flat(),
    )


class UsedThenOverwritten(nn.Module):
    """A sequence that is used before it is overwritten: part of its gradient comes from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, value: Tensor) -> Any:
        hidden = self.first(value)
        doubled = 2 * hidden
        hidden.sub_(0.3)
        return self.last(torch.tanh(doubled * hidden.flip(1))).mean(1)


class OverwrittenInParts(nn.Module):
    """Parameters that are added to and multiplied with a part of a tensor, in place and by way of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.shift, self.scale, self.whole = (nn.Parameter(torch.randn(5)) for _ in range(3))

    def forward(self, value: Tensor) -> Any:
        hidden = self.first(value)
        hidden += self.whole
        hidden[:, 0].add_(self.shift)
        hidden[:, 1:].mul_(self.scale)
        hidden.transpose(1, 2)[:, :2].mul_(3)
        return self.last(torch.tanh(hidden)).mean(1)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "called twice": (Twice, (3, 4)),
    "called under two names": (TwoNames, (4, 6, 7)),
    "two views, two roots": (Siamese, (2, 4)),
    "two towers": (TwoTowers, (4, 6, 7)),
    "in-place after every layer": (in_place, (4, 6, 7)),
    "in-place after every layer, sequences": (in_place_on_sequences, (2, 3, 4)),
    "used, then overwritten": (UsedThenOverwritten, (3, 4)),
    "overwritten in parts": (OverwrittenInParts, (3, 4)),
    "residual, in place": (Bottleneck, (4, 6, 7)),
    "calls without gradients": (SomeWithoutGradients, (4,)),
    "keyword argument": (ByKeyword, (4,)),
    # A weight of more than 1,024 entries has rows, and its bias rows of its own: together, the bias would be lost.
    "norm of whole images": (
        lambda: nn.Sequential(nn.LayerNorm((8, 12, 12)), nn.Flatten(), nn.Linear(8 * 144, CLASSES)),
        (8, 12, 12),
    ),
}


class TestStructure:
    @pytest.mark.parametrize("name", STRUCTURES)
    def test_equals_the_reference(self, name: str) -> None:
        make, shape = STRUCTURES[name]
        assert_gradients(make().double().eval(), *data(shape))

    def test_calls_lie_end_to_end(self) -> None:
        """Also as factors see them: three positions of the first call, one of the second."""
        net = Twice().double().eval()
        assert_right(net, *data((3, 4)))
        assert captured(passes(net, *data((3, 4))))["shared"][0].shape == (1, EXAMPLES, 4, 5)

    def test_no_gradient_means_not_there(self) -> None:
        net = Detached().double().eval()
        inputs, targets = data((4,))
        assert captured(passes(net, inputs, targets)).keys() == {"above"}
        expected = reference_gradients(net, inputs, targets)
        assert not expected["below"].any()
        error = inspect(passes(net, inputs, targets), range(3)).largest_error
        assert error is not None
        assert error < 1e-12

    def test_batch_norm_uses_its_running_statistics_and_keeps_them(self) -> None:
        """Even when the model is in training mode, as in the middle of `fit`."""
        net = Bottleneck().double()
        net(torch.randn(8, 4, 6, 7).double())
        statistics = [buffer.clone() for buffer in net.buffers()]
        found = found_gradients(passes(net, *data((4, 6, 7))))
        assert net.training
        assert net.norm.training
        assert all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))
        expected = ref.per_example_gradients(net.eval(), cross_entropy, *data((4, 6, 7)))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **EXACT)

    def test_batches_of_named_tensors(self) -> None:
        inputs, targets = data((4,))

        class Named(Dataset[Any]):
            def __len__(self) -> int:
                return EXAMPLES

            def __getitem__(self, index: int) -> Any:
                return {"pixels": {"raw": inputs[index]}, "name": f"example {index}", "label": targets[index]}

        def named(module: Any, batch: Any) -> Tensor:
            assert len(batch["name"]) == len(batch["label"])
            return cross_entropy(module(batch["pixels"]["raw"]), batch["label"])

        net = ByKeyword().double().eval()
        found = captured(passes(net, Named(), task=named))
        for layer, gradient in reference_gradients(net, inputs, targets).items():
            torch.testing.assert_close(formed(*found[layer]), gradient, **EXACT)

    def test_compiled_model(self) -> None:
        """A wrapped model has the names and the numbers of the eager one."""
        net: Any = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, CLASSES))).double().eval()
        inputs, targets = data((4,))
        expected = captured(passes(net, inputs, targets))
        net[1] = torch.compile(net[1])
        net = torch.compile(net)
        found = captured(passes(net, inputs, targets))
        assert found.keys() == expected.keys() == {"0", "1.1"}
        for layer, (x, g) in expected.items():
            torch.testing.assert_close(found[layer], (x, g), **EXACT)

    def test_inputs_that_require_a_gradient(self) -> None:
        """A gradient penalty or an adversarial step makes the input a leaf; layers behind it still count."""

        class Penalised(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last, self.beside = nn.Linear(4, 4), nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)
                self.with_a_root = True

            def forward(self, value: Tensor) -> Any:
                leaf = value.detach().requires_grad_()
                out = self.last(torch.tanh(self.first(leaf * 2)))
                return out + self.beside(value) if self.with_a_root else out + 0 * self.beside(leaf)

        net = Penalised().double().eval()
        for net.with_a_root in (True, False):
            assert_right(net, *data((4,)))

    def test_checkpointed_activations(self) -> None:
        """Layers inside a checkpointed segment are run again in backward; that run is not a further call."""

        class Segments(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, CLASSES)
                self.from_the_start = False

            def segment(self, value: Tensor) -> Tensor:
                return torch.tanh(self.middle(torch.tanh(value)))

            def whole(self, value: Tensor) -> Tensor:
                return self.segment(self.first(value))

            def forward(self, value: Tensor) -> Any:
                if self.from_the_start:
                    return self.last(checkpoint(self.whole, value, use_reentrant=False))
                return self.last(checkpoint(self.segment, self.first(value), use_reentrant=False))

        net = Segments().double().eval()
        inputs, targets = data((4,))
        expected = reference_gradients(net, inputs, targets)
        for net.from_the_start in (False, True):
            found = captured(passes(net, inputs, targets))
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(formed(*found[name]), gradient, **EXACT)


class Computed(TorchDispatchMode):
    """Notes the sizes of all tensors that are computed, except views of the model's parameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self._own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._own:
                self.shapes.add(tuple(sorted(tensor.shape)))
        return output


def every_kind() -> nn.Sequential:
    """A lookup, linear layers, a convolution and norms; no two parameters or activations have one shape."""
    return nn.Sequential(
        OrderedDict(
            words=nn.Embedding(7, 8),
            first=nn.Linear(8, 12),
            norm=nn.LayerNorm(12),
            tanh=nn.Tanh(),
            images=nn.Unflatten(1, (2, 2, 3)),
            convolution=nn.Conv2d(2, 9, 2),
            channels=nn.GroupNorm(3, 9),
            flat=nn.Flatten(),
            last=nn.Linear(18, CLASSES),
        )
    )


class TestCapture:
    def test_several_draws_share_one_forward_pass(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        inputs, _ = data((4,))
        per_class = ref.class_gradients(net, inputs, CLASSES)
        gradients = passes(net, *data((4,)), batch_size=EXAMPLES)
        assert gradients.scale is not None  # measured by a pass of its own
        calls = Mock()  # a list would be put back
        net[1].register_forward_hook(lambda *_: calls() and None)
        with closing(gradients.run(range(EXAMPLES), "exact")) as batches:
            for batch in batches:
                for io in batch.layers():
                    assert len(io.gs) == CLASSES
                    for c, g in enumerate(io.gs):
                        assert isinstance(g, Tensor)
                        weight, bias = (per_class[f"{io.name}.{p}"][:, c] for p in ("weight", "bias"))
                        expected = ref.gradient_matrix(net.get_submodule(io.name), weight, bias)
                        torch.testing.assert_close(formed(io.x, g), expected, **EXACT)
        assert calls.call_count == 1

    def test_draw_that_does_not_reach_a_layer_is_zero(self) -> None:
        """Two heads with a loss each: the labels of one say nothing about the other."""

        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

            def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
                hidden = torch.tanh(self.body(value))
                return self.one(hidden), self.two(hidden)

        def both(module: Any, batch: Any) -> Tensor:
            one, two = module(batch[0])
            return F.cross_entropy(one, batch[1] % 2) + F.cross_entropy(two, batch[1])

        net = Heads().double()
        with closing(passes(net, *data((4,)), task=both).run(range(EXAMPLES), "exact")) as batches:
            for batch in batches:
                reached = {io.name: [bool(torch.as_tensor(g).any()) for g in io.gs] for io in batch.layers()}
                assert reached == {"body": [True] * 5, "one": [True] * 2 + [False] * 3, "two": [False] * 2 + [True] * 3}

    def test_nothing_is_left_behind(self) -> None:
        """Nor by the trace."""
        net = in_place().double().train()
        net[2].requires_grad_(False)
        before = [(p, p.requires_grad, p.detach().clone()) for p in net.parameters()]
        gradients = passes(net, *data((4, 6, 7)))
        captured(gradients)
        run = gradients.run(range(EXAMPLES))
        next(run)
        run.close()

        def fails(module: Any, batch: Any) -> Tensor:
            module(batch[0])
            raise ZeroDivisionError("in the middle of a pass")

        with pytest.raises(LayerError, match="copies of an example .ZeroDivisionError: in the middle"):
            passes(net, *data((4, 6, 7)), task=fails)
        with pytest.raises(TaskError, match="ZeroDivisionError: in the middle"):
            captured(passes(net, *data((4, 6, 7)), task=fails, coverage=gradients.coverage))
        assert not [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert all(module.training for module in net.modules())
        assert not torch._C._len_torch_function_stack()
        for parameter, flag, value in before:
            assert parameter.requires_grad == flag
            assert parameter.grad is None
            assert torch.equal(parameter, value)

    def test_no_weight_gradient_is_computed(self) -> None:
        """That is a third of a training pass. What the backward pass computes has the shapes of activations only."""
        inputs, targets = torch.arange(EXAMPLES) % 7, data((4,))[1]
        net = every_kind().double()
        sizes = {tuple(sorted(p.shape)) for p in net.parameters()}
        with Computed(net) as training:
            task(net, (inputs, targets)).backward()
        assert training.shapes >= sizes
        net.zero_grad()
        coverage = passes(net, inputs, targets).coverage
        assert coverage.share == 1.0
        for draws in (1, 2):
            with untouched(net), Capture(coverage) as capture:
                with capture.forward():
                    loss = task(net, (inputs, targets))
                with Computed(net) as found:
                    for draw in range(draws):
                        capture.backward([loss], [torch.ones_like(loss)], last=draw == draws - 1)
                assert [io.name for io in capture.layers(EXAMPLES)] == list(coverage.blocks)
            assert found.shapes
            assert not found.shapes & sizes
            assert all(p.grad is None for p in net.parameters())

    def test_nothing_below_the_first_covered_layer_is_in_the_graph(self) -> None:
        """Parameters that are trained but not covered are frozen for the pass."""
        net = every_kind().double()
        gradients = passes(net, torch.arange(EXAMPLES) % 7, data((4,))[1], layers=["last"])
        saw = Mock()  # a dict would be put back
        for name, layer in net.named_children():
            layer.register_forward_pre_hook(lambda _, args, name=name: saw(name, args[0].requires_grad) and None)
            layer.register_forward_hook(lambda _, args, out, name=name: saw(f"{name}, out", out.requires_grad) and None)
        assert captured(gradients).keys() == {"last"}
        seen = dict(call.args for call in saw.mock_calls if len(call.args) == 2)
        assert [name for name, flag in seen.items() if flag] == ["last, out"]
        assert "last" in seen
        assert all(p.requires_grad for p in net.parameters())

    def test_modified_input(self) -> None:
        net = Modifies().double()
        with pytest.raises(LayerError, match=r"input of layer 'last' was modified in place .* out-of-place form"):
            captured(passes(net, *data((4,))))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            task(net, data((4,))).backward()

    def test_modified_input_that_no_gradient_needs(self) -> None:
        """Training works, as the gradient of a bias does not look at the input."""
        net = Modifies().double()
        net.last.weight.requires_grad_(False)
        inputs, targets = data((4,))
        task(net, (inputs, targets)).backward()
        assert_gradients(net, inputs, targets)

    @pytest.mark.parametrize("shape", [(4, 4), (2, 6, 4), (4,)])
    def test_input_without_the_batch(self, shape: tuple[int, ...]) -> None:
        """A grid of positions has rows that are not examples; equal numbers of both must not be taken for them."""

        class Grid(ByKeyword):
            def __init__(self) -> None:
                super().__init__()
                self.grid = nn.Buffer(torch.randn(shape))

            def forward(self, value: Tensor) -> Any:
                return self.last(torch.tanh(self.first(self.grid)).reshape(-1, 4).mean(0) * value)

        net = Grid().double()
        for batch_size in (3, 4):
            assert_gradients(net, *data((4,)), batch_size=batch_size)

    def test_image_without_the_batch(self) -> None:
        net = nn.Sequential(nn.Unflatten(0, (4, 1)), nn.Flatten(1, 2), nn.Conv2d(4, 4, 3), Flat())
        with pytest.raises(
            LayerError, match=r"run on two copies of an example \(.*sizes \[4, 1\] .*batches of any size"
        ):
            passes(net.double(), *data((6, 7), 4), batch_size=4, task=lambda m, b: m(b[0]).mean())

    def test_no_layer_is_called(self) -> None:
        net = nn.Sequential(nn.Linear(4, CLASSES)).double()
        leaf = torch.ones((), requires_grad=True)
        coverage = covered(net, data((4,))[0])
        gradients = passes(net, *data((4,)), task=lambda module, batch: leaf * batch[0].mean(), coverage=coverage)
        with pytest.raises(LayerError, match="no covered layer was called in the forward pass"):
            captured(gradients)

    def test_outside_of_a_pass_nothing_is_kept(self) -> None:
        net = nn.Sequential(nn.Linear(4, CLASSES))
        with Capture(covered(net, torch.randn(4, 4))) as capture:
            net(torch.randn(2, 4))
            assert [name for name, _ in capture._uses] == []
            with capture.forward():
                net(torch.randn(2, 4))
            assert [name for name, _ in capture._uses] == ["0"]
            features = capture.features(2)
            assert features is not None
            assert features.shape == (2, 4)
            capture.clear()
            assert [name for name, _ in capture._uses] == []
            assert capture.features(2) is None


class Own(nn.Linear):
    """Doubles its output: captured as a plain layer, its gradients would be half of the true ones."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes what its parent computes."""


PACKED = "used by gru on rows picked by their values, of which every example has a number of its own"


class Last(nn.GRU):
    """The last state of a recurrent layer on packed rows, of which nothing tells in which order the examples are."""

    def forward(self, input: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(input.unsqueeze(0), torch.ones(len(input)))
        return super().forward(packed)[1][0]


class Distances(nn.Linear):
    """Takes its weight for points and has no use for its bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cdist(input, self.weight)


class Tied(nn.Module):
    """A look-up, a layer under two names of its weight, and a head that is the table of the look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.other(torch.tanh(self.one(self.words(ids)))).mean(1)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Any:
        return self.head(self.attention(value, value, value)[0].mean(1))


class TestCoverage:
    def test_shares_and_reasons(self) -> None:
        net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), Renamed(4, 4), Last(4, 1), nn.Linear(1, 2).requires_grad_(False)
        )
        coverage = covered(net, torch.randn(4, 4))
        assert list(coverage.blocks) == ["0", "1", "2"]
        names = ["3.weight_ih_l0", "3.weight_hh_l0", "3.bias_ih_l0", "3.bias_hh_l0"]
        assert coverage.uncovered == dict.fromkeys(names, PACKED)
        assert (coverage.covered_parameters, coverage.total_parameters) == (48, 48 + 21)
        assert coverage.share == 48 / 69
        assert coverage.describe() == (
            "69.6% of 69 trainable parameters in 3 layers; not covered: "
            "3.weight_ih_l0, 3.weight_hh_l0, 3.bias_ih_l0, 3.bias_hh_l0"
        )

    def test_long_lists_are_cut(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), Last(2, 2), Last(2, 2))
        inputs = torch.randn(4, 2)
        assert covered(net, inputs).describe().endswith("2.weight_ih_l0, 2.weight_hh_l0 and 2 more")
        assert covered(net[:1], inputs).describe() == "100.0% of 6 trainable parameters in 1 layers"

    def test_what_is_found_to_be_used_counts(self) -> None:
        """A layer's type says nothing about what its subclass does with it; the trace does."""
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Renamed(4, 4), Own(4, 4), nn.Linear(4, CLASSES))
        assert_gradients(net.double().eval(), *data((4,)))
        net = nn.Sequential(nn.Linear(4, 4), Distances(4, 4), nn.Linear(4, CLASSES)).double()
        coverage = passes(net, *data((4,))).coverage
        assert list(coverage.blocks) == ["0", "1", "2"]
        assert coverage.uncovered == {"1.bias": "took no part in the first batch"}
        net[1].bias.requires_grad_(False)
        assert_gradients(net, *data((4,)))

    def test_shared_parameters(self) -> None:
        """The sum over both uses: rows of a look-up and of a linear layer in one block, named after the first."""
        net = Tied().double()
        inputs, targets = torch.arange(2 * EXAMPLES).reshape(EXAMPLES, 2) % CLASSES, data((4,))[1]
        assert_gradients(net, inputs, targets)
        coverage = passes(net, inputs, targets).coverage
        assert {name: list(block.parameters) for name, block in coverage.blocks.items()} == {
            "words": ["words.weight"],
            "one": ["one.weight", "one.bias"],
            "other.bias": ["other.bias"],
        }
        assert (coverage.covered_parameters, coverage.total_parameters) == (36, 36)

    def test_frozen_sharing_does_no_harm(self) -> None:
        net = Tied().double()
        net.one.weight.requires_grad_(False)
        net.words.weight.requires_grad_(False)
        inputs, targets = torch.arange(2 * EXAMPLES).reshape(EXAMPLES, 2) % CLASSES, data((4,))[1]
        assert_gradients(net, inputs, targets)
        coverage = passes(net, inputs, targets).coverage
        assert {name: list(block.parameters) for name, block in coverage.blocks.items()} == {
            "one.bias": ["one.bias"],
            "other.bias": ["other.bias"],
        }

    @pytest.mark.parametrize(
        "change",
        [
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.orthogonal,
            lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        ],
        ids=["weight_norm", "spectral_norm", "orthogonal", "prune"],
    )
    def test_reparametrised_layers(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """What is trained is not what meets the input."""
        net = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, CLASSES)).double().eval()
        inputs, targets = data((4,))
        with torch.no_grad():
            net(inputs)  # a pruned layer keeps the product of its last forward pass, which can be copied now
        assert_gradients(net, inputs, targets)

    def test_attention(self) -> None:
        """`MultiheadAttention` reads the weight of its output projection without calling the layer."""
        net = Attends().double()
        assert_gradients(net, *data((3, 4)))
        expected = {
            "attention.in_proj_weight": ["attention.in_proj_weight", "attention.in_proj_bias"],
            "attention.out_proj": ["attention.out_proj.weight", "attention.out_proj.bias"],
            "head": ["head.weight", "head.bias"],
        }
        coverage = passes(net, *data((3, 4))).coverage
        assert {name: list(block.parameters) for name, block in coverage.blocks.items()} == expected

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["body.0"], ["body.0"]),
            (["body.*"], ["body.0", "body.2", "body.3.0"]),
            (["*.0", "head"], ["body.0", "body.3.0", "head"]),
            (["body.[02]"], ["body.0", "body.2"]),
            (("head",), ["head"]),
            (iter(["head", "body.2"]), ["body.2", "head"]),
            ("head", ["head"]),
            ("body.?", ["body.0", "body.2"]),
        ],
    )
    def test_layers_by_name(self, patterns: Any, expected: list[str]) -> None:
        body = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        net = nn.Sequential(OrderedDict(body=body, head=nn.Linear(2, 2)))
        coverage = covered(net, torch.randn(4, 2), layers=patterns)
        assert list(coverage.blocks) == expected
        others = {name for name, _ in net.named_parameters() if name.rpartition(".")[0] not in expected}
        assert coverage.uncovered == dict.fromkeys(others, "left out by `layers=`")
        assert coverage.share == len(expected) / 4

    @pytest.mark.parametrize(
        ("patterns", "missing", "hint"),
        [
            (["typo"], ["typo"], "there are ['body.0', 'head']"),
            (["body.0", "typo"], ["typo"], "there are ['body.0', 'head']"),
            (["body.0", "typo", "body.1"], ["typo", "body.1"], "did you mean ['body.0']?"),
            ([Last, "head"], ["Last"], "there are ['body.0', 'head']"),
        ],
    )
    def test_pattern_without_a_layer(self, patterns: Any, missing: list[str], hint: str) -> None:
        """The message has to name what there is, not what the other patterns matched."""
        body = nn.Sequential(nn.Linear(2, 2), Last(2, 2))
        net = nn.Sequential(OrderedDict(body=body, head=nn.Linear(2, 2)))
        with pytest.raises(LayerError) as error:
            covered(net, torch.randn(4, 2), layers=patterns)
        assert f"`layers=` names {missing}, which match no supported layer; {hint}" in str(error.value)

    @pytest.mark.parametrize(
        ("net", "found"),
        [
            (Last(2, 2), PACKED),
            (nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), "no parameter requires a gradient"),
            (nn.Tanh(), "no parameter requires a gradient"),
        ],
    )
    def test_nothing_to_cover(self, net: nn.Module, found: str) -> None:
        with pytest.raises(LayerError, match=rf"no trainable parameter whose .* are understood\. Found: {found}\."):
            covered(net, torch.randn(4, 2))

    def test_layer_that_is_the_model(self) -> None:
        net = nn.Linear(4, CLASSES).double()
        assert list(covered(net, data((4,))[0]).blocks) == [""]
        assert_right(net, *data((4,)))

    def test_modes_of_coverage_do_not_touch_the_model(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        before: Mapping[str, Tensor] = {name: value.clone() for name, value in net.state_dict().items()}
        covered(net, torch.randn(4, 2))
        assert net.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(p.requires_grad for p in net.parameters())


class TestVerification:
    """Uses of a parameter that no call with an example shows must not go through unnoticed."""

    def gradients(self, change: Callable[[Any, Any], Tensor]) -> ExampleGradients:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        return passes(net, *data((4,)), task=change, batch_size=EXAMPLES)

    def penalty(self, module: Any, batch: Any, size: float = 1e-3) -> Any:
        return task(module, batch) + size * module[2].weight.square().sum()

    def test_penalty(self) -> None:
        with pytest.raises(VerificationError, match=r"do not add up .* in: 2 \(\d+\.\d% off\)\."):
            inspect(self.gradients(self.penalty), range(EXAMPLES))

    @pytest.mark.parametrize("frozen", [False, True])
    def test_parts_in_single_precision(self, frozen: bool) -> None:
        """T5 with weights in float64 normalises in float32: right gradients are 1e-6 % off, in batches of 3 or 7."""
        net = nn.Sequential(nn.Linear(4, 4), SinglePrecisionNorm(), nn.Linear(4, CLASSES)).double()
        net[0].requires_grad_(not frozen)
        for examples in (3, 7):
            gradients = passes(net, *data((4,), examples), batch_size=examples)
            error = inspect(gradients, range(examples)).largest_error
            assert error is not None
            assert error < 1e-5
            penalised = partial(self.penalty, size=0.1)
            gradients = passes(net, *data((4,), examples), batch_size=examples, task=penalised)
            with pytest.raises(VerificationError, match=r"in: 2 \(\d+\.\d% off\)\."):
                inspect(gradients, range(examples))

    def test_batches_in_single_precision_do_not_loosen_it(self) -> None:
        """They are exact in float64: a penalty that adds a millionth of the gradient is found."""

        def penalised(module: Any, batch: Any) -> Tensor:
            inputs = batch[0].flatten(1).double()
            return task(module, (inputs, batch[1])) + 1e-8 * module[2].weight.square().sum()

        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        inputs, targets = data((4,))
        with pytest.raises(VerificationError, match=r"in: 2 \(\de-\d\d% off\)\."):
            inspect(passes(net, inputs.float(), targets, batch_size=EXAMPLES, task=penalised), range(EXAMPLES))

    def test_functional_use(self) -> None:
        """The same numbers as with the layer itself, alone or beside it."""

        def functional(module: Any, batch: Any) -> Tensor:
            hidden = module[1](module[0](batch[0]))
            return cross_entropy(F.linear(hidden, module[2].weight, module[2].bias), batch[1])

        def twice(module: Any, batch: Any) -> Tensor:
            hidden = module[1](module[0](batch[0]))
            return cross_entropy(F.linear(hidden, module[2].weight) + 2 * module[2](hidden), batch[1])

        for change in (functional, twice):
            gradients = self.gradients(change)
            error = inspect(gradients, range(EXAMPLES)).largest_error
            assert error is not None
            assert error < 1e-12
            found = found_gradients(gradients)
            net, (inputs, targets) = gradients.module, data((4,))
            for n in range(EXAMPLES):
                loss = change(net, (inputs[n : n + 1], targets[n : n + 1]))
                expected = torch.autograd.grad(loss, list(net.parameters()))
                for (name, _), gradient in zip(net.named_parameters(), expected, strict=True):
                    torch.testing.assert_close(found[name][n], gradient, **EXACT)

    def test_batch_with_a_nan(self) -> None:
        """One bad example in the first batch is no reason not to look at the others."""
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        inputs, targets = data((4,))
        inputs[1, 2] = float("nan")
        error = inspect(passes(net, inputs, targets, batch_size=EXAMPLES), range(EXAMPLES)).largest_error
        assert error is not None
        assert error < 1e-12
        gradients = passes(net, inputs, targets, batch_size=EXAMPLES, task=self.penalty)
        with pytest.raises(VerificationError, match=r"do not add up .* in: 2 \("):
            inspect(gradients, range(EXAMPLES))

    def test_mixed_precision_is_no_fault(self) -> None:
        """bfloat16 keeps 8 bits: right gradients differ by 1 % from autograd's, which is rounded on the way."""
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU(), nn.Linear(64, CLASSES)
        )
        inputs, targets = data((3, 8, 8), 64)
        gradients = passes(net, inputs.float(), targets, batch_size=64, forward_context=bfloat16)
        error = inspect(gradients, range(64)).largest_error
        assert error is not None
        assert 1e-4 < error < 0.05


class Between(nn.Module):
    """A function of a parameter and the batch between two layers."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.p = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]).double())
        self.q = nn.Parameter(torch.linspace(-1, 1, 20).double().reshape(5, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.function(1.5 * self.inner(x), x, self))  # type: ignore[arg-type]
        return out


@pytest.mark.parametrize(
    "function",
    [
        lambda h, x, m: h.clamp_(min=m.p),
        lambda h, x, m: h.addmm_(x, m.q) * m.p,
        lambda h, x, m: h.addcdiv_(x[:, :4], m.p.exp() + 1.0),
        lambda h, x, m: h.atan2_(m.p),
        lambda h, x, m: h.masked_fill_(h > 0.5, m.p[0]),
        lambda h, x, m: h.lerp_(m.p, m.p * m.p),
        lambda h, x, m: (1.0 * h.sigmoid()).xlogy_(m.p.exp()),
        lambda h, x, m: h.to(m.p).type_as(m.outer.weight) + m.p,
        lambda h, x, m: h.where(h > 0.1, m.p),
        lambda h, x, m: torch.where(h > 0.1, 1.0, 0.5) * h + m.p,
        lambda h, x, m: h[:, torch.tensor([True, True, True, True])] * m.p,
    ],
)
def test_what_overwrites_its_input_or_masks_is_exact(function: Any) -> None:
    """Those without a reader ran on the user's own tensors; masks of nothing of the batch counted as picked rows."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5).double(), torch.arange(24) % 3)
    influence = Influence(Between(function), nn.CrossEntropyLoss(), data)
    assert not influence.coverage.uncovered.keys() - {"q"}  # which most of them have no use for
    assert influence.inspection.largest_error is not None
    assert influence.inspection.largest_error < 1e-8
