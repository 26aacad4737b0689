"""Which layers are understood, and what capture takes from them, against the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from lightning_influence.capture import Capture
from lightning_influence.layers import LayerError, LayerOperation, cover
from lightning_influence.passes import ExampleGradients
from lightning_influence.source import ExampleSource
from lightning_influence.verify import VerificationError, inspect

EXACT = {"rtol": 1e-9, "atol": 1e-11}
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


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


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
    **options: Any,
) -> ExampleGradients:
    dataset = inputs if targets is None else TensorDataset(inputs, targets)
    return ExampleGradients(net, task, ExampleSource(dataset, batch_size=batch_size), cover(net), **options)


def captured(gradients: ExampleGradients, n: int = EXAMPLES) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `x` and `g` of every layer that took part, over all examples."""
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with closing(gradients.run(range(n))) as batches:
        for batch in batches:
            for io in batch.layers():
                assert len(io.gs) == 1
                collected.setdefault(io.name, []).append((io.x, io.gs[0]))
    return {name: tuple(torch.cat(part, 1) for part in zip(*parts, strict=True)) for name, parts in collected.items()}


def formed(x: Tensor, g: Tensor) -> Tensor:
    """Return the per-example gradients `[k, n, o, i]`."""
    return torch.einsum("knso,knsi->knoi", g, x)


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
            gradients = passes(net, value, targets, batch_size=EXAMPLES, task=lambda m, b, v=value: task(m, (v, b[1])))
            found = captured(gradients)["0"]
            x, g = ref.layer_inputs_and_output_gradients(net, "0", cross_entropy, value, targets)
            torch.testing.assert_close(found[0], x, **EXACT, msg=lambda m, layout=layout: f"{layout}: {m}")
            torch.testing.assert_close(found[1], g, **EXACT)
        net = net.to(memory_format=torch.channels_last)
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
        found = captured(passes(net, inputs, targets))
        torch.testing.assert_close(formed(*found["0"]), expected, **EXACT)
        coverage = cover(net)
        assert coverage.operations["0"].shape == (expected.shape[0], *expected.shape[2:])
        assert coverage.share == 1.0
        assert coverage.operations["0"].parameter_names == (("weight",) if frozen == "bias" else ("bias",))

    @pytest.mark.parametrize("name", ["plain", "no bias", "groups", "depthwise, two outputs each"])
    def test_block_and_parameters_are_the_same_numbers(self, name: str) -> None:
        module = nn.Conv2d(4, **{"out_channels": 4, **CONVOLUTIONS[name]}).double()
        self.check_layout(cover(module).operations[""])
        module.weight.requires_grad_(False)
        if module.bias is not None:
            self.check_layout(cover(module).operations[""])

    def check_layout(self, operation: LayerOperation) -> None:
        module = operation.module
        own = {name: torch.randn(2, 3, *getattr(module, name).shape).double() for name in operation.parameter_names}
        whole = {name: own.get(name, torch.zeros(2, 3, *p.shape).double()) for name, p in module.named_parameters()}
        matrix = ref.gradient_matrix(
            module,
            whole["weight"].flatten(0, 1),
            whole["bias"].flatten(0, 1) if "bias" in own else None,
        )
        block = matrix.transpose(0, 1).reshape(2, 3, *matrix.shape[::2][:1], *matrix.shape[2:])
        block = block if "weight" in own else block[..., -1:]
        assert block.shape[2:] == operation.shape
        back = operation.to_parameters(block)
        assert back.keys() == own.keys()
        for name, value in own.items():
            assert torch.equal(back[name], value)
        single = {name: value[1, 2] for name, value in own.items()}
        assert torch.equal(operation.from_parameters(single), block[1, 2])

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

    def forward(self, value: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(value)).mean(1))))


class TwoNames(nn.Module):
    """The same convolution under two names, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.other = self.one
        self.flat = Flat()

    def forward(self, value: Tensor) -> Tensor:
        whole, part = torch.tanh(self.one(value)), torch.tanh(self.other(value[:, :, ::2, 1:]))
        return self.flat(whole) + self.flat(part)


class Siamese(nn.Module):
    """One encoder on two views, compared: each call has a root of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    def forward(self, value: Tensor) -> Tensor:
        return self.encoder(value[:, 0]) * self.encoder(value[:, 1])


class TwoTowers(nn.Module):
    """Two first layers of different kinds, joined by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(4, 2, 3)
        self.text = nn.Linear(7, 40)
        self.head = nn.Linear(40, CLASSES)

    def forward(self, value: Tensor) -> Tensor:
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

    def forward(self, value: Tensor) -> Tensor:
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

    def forward(self, value: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(self.first(2 * value))
        return self.last(torch.tanh(self.first(value)) * target) + self.last(target)


class Detached(nn.Module):
    """Nothing below the detached value gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.above = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Tensor:
        return self.above(torch.tanh(self.below(value)).detach())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(input=torch.tanh(self.first(input=value)))


class Modifies(ByKeyword):
    """Changes the input of its last layer after the layer has used it."""

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value)
        out = self.last(hidden)
        hidden.mul_(2)
        return out + hidden[:, :CLASSES]


def in_place() -> nn.Module:
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
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5, bias=False), nn.SiLU(inplace=True), Flat()
    )


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "called twice": (Twice, (3, 4)),
    "called under two names": (TwoNames, (4, 6, 7)),
    "two views, two roots": (Siamese, (2, 4)),
    "two towers": (TwoTowers, (4, 6, 7)),
    "in-place after every layer": (in_place, (4, 6, 7)),
    "in-place after every layer, sequences": (in_place_on_sequences, (2, 3, 4)),
    "residual, in place": (Bottleneck, (4, 6, 7)),
    "calls without gradients": (SomeWithoutGradients, (4,)),
    "keyword argument": (ByKeyword, (4,)),
}


class TestStructure:
    @pytest.mark.parametrize("name", STRUCTURES)
    def test_equals_the_reference(self, name: str) -> None:
        make, shape = STRUCTURES[name]
        net = make().double().eval()
        inputs, targets = data(shape)
        found = captured(passes(net, inputs, targets))
        expected = reference_gradients(net, inputs, targets)
        assert found.keys() == expected.keys()
        for layer, gradient in expected.items():
            assert gradient.norm() > 1e-3
            torch.testing.assert_close(formed(*found[layer]), gradient, **EXACT)
        assert inspect(passes(net, inputs, targets), range(EXAMPLES)).largest_error < 1e-12

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
        assert inspect(passes(net, inputs, targets), range(3)).largest_error < 1e-12

    def test_batch_norm_uses_its_running_statistics_and_keeps_them(self) -> None:
        """Even when the model is in training mode, as in the middle of `fit`."""
        net = Bottleneck().double()
        net(torch.randn(8, 4, 6, 7).double())
        statistics = [buffer.clone() for buffer in net.buffers()]
        found = captured(passes(net, *data((4, 6, 7))))
        assert net.training
        assert net.norm.training
        assert all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))
        for layer, gradient in reference_gradients(net.eval(), *data((4, 6, 7))).items():
            torch.testing.assert_close(formed(*found[layer]), gradient, **EXACT)

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
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, CLASSES))).double().eval()
        inputs, targets = data((4,))
        expected = captured(passes(net, inputs, targets))
        net[1] = torch.compile(net[1])
        found = captured(passes(torch.compile(net), inputs, targets))
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

            def forward(self, value: Tensor) -> Tensor:
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

            def forward(self, value: Tensor) -> Tensor:
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


class TestCapture:
    def test_several_draws_share_one_forward_pass(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        inputs, _ = data((4,))
        per_class = ref.class_gradients(net, inputs, CLASSES)
        calls: list[int] = []
        net[1].register_forward_hook(lambda *_: calls.append(1))
        with closing(passes(net, *data((4,)), batch_size=EXAMPLES).run(range(EXAMPLES), "exact")) as batches:
            for batch in batches:
                for io in batch.layers():
                    assert len(io.gs) == CLASSES
                    for c, g in enumerate(io.gs):
                        weight, bias = (per_class[f"{io.name}.{p}"][:, c] for p in ("weight", "bias"))
                        expected = ref.gradient_matrix(net.get_submodule(io.name), weight, bias)
                        torch.testing.assert_close(formed(io.x, g), expected, **EXACT)
        assert len(calls) == 1

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
                reached = {io.name: [bool(g.any()) for g in io.gs] for io in batch.layers()}
                assert reached == {"body": [True] * 5, "one": [True] * 2 + [False] * 3, "two": [False] * 2 + [True] * 3}

    def test_nothing_is_left_behind(self) -> None:
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

        with pytest.raises(ZeroDivisionError, match="in the middle"):
            captured(passes(net, *data((4, 6, 7)), task=fails))
        assert not [module for module in net.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert all(module.training for module in net.modules())
        for parameter, flag, value in before:
            assert parameter.requires_grad == flag
            assert parameter.grad is None
            assert torch.equal(parameter, value)

    def test_no_weight_gradient_is_computed(self) -> None:
        """That is a third of a training pass: everything trainable is frozen, whatever it is."""
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)).double()
        seen: list[bool] = []
        net[3].register_forward_pre_hook(lambda module, args: seen.append(module.weight.requires_grad))
        net[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
        captured(passes(net, torch.arange(EXAMPLES) % 5, data((4,))[1]))
        assert set(seen) == {False}

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
        gradients = ref.per_example_gradients(net, cross_entropy, inputs, targets)
        found = captured(passes(net, inputs, targets))
        torch.testing.assert_close(formed(*found["last"])[0, ..., 0], gradients["last.bias"], **EXACT)

    @pytest.mark.parametrize("shape", [(4, 4), (2, 6, 4), (4,)])
    def test_input_without_the_batch(self, shape: tuple[int, ...]) -> None:
        """A grid of positions has rows that are not examples; equal numbers of both must not go through."""

        class Grid(ByKeyword):
            def __init__(self) -> None:
                super().__init__()
                self.grid = nn.Buffer(torch.randn(shape))

            def forward(self, value: Tensor) -> Tensor:
                return self.last(torch.tanh(self.first(self.grid)).reshape(-1, 4).mean(0) * value)

        net = Grid().double()
        for batch_size in (3, 4):
            gradients = passes(net, *data((4,)), batch_size=batch_size)
            with pytest.raises(
                LayerError, match=r"'first' got an input of shape \(.*\) for a batch of \d examples; .*by"
            ):
                captured(gradients)

    def test_image_without_the_batch(self) -> None:
        net = nn.Sequential(nn.Unflatten(0, (4, 1)), nn.Flatten(1, 2), nn.Conv2d(4, 4, 3), Flat())
        with pytest.raises(LayerError, match=r"'2' got an input of shape \(4, 6, 7\) for a batch of 4 examples"):
            captured(passes(net.double(), *data((6, 7), 4), batch_size=4, task=lambda m, b: m(b[0]).mean()), 4)

    def test_no_layer_is_called(self) -> None:
        net = nn.Sequential(nn.Linear(4, CLASSES)).double()
        leaf = torch.ones((), requires_grad=True)
        gradients = passes(net, *data((4,)), task=lambda module, batch: leaf * batch[0].mean())
        with pytest.raises(LayerError, match="no covered layer was called in the forward pass"):
            captured(gradients)

    def test_outside_of_a_pass_nothing_is_kept(self) -> None:
        net = nn.Sequential(nn.Linear(4, CLASSES))
        with Capture(cover(net)) as capture:
            net(torch.randn(2, 4))
            assert capture.order == []
            with capture.forward():
                net(torch.randn(2, 4))
            assert capture.order == ["0"]
            assert capture.activations("0", 2).shape == (1, 2, 1, 5)
            capture.clear()
            assert capture.order == []


class Own(nn.Linear):
    """Doubles its output: captured as a plain layer, its gradients would be half of the true ones."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes what its parent computes."""


class TestCoverage:
    def test_shares_and_reasons(self) -> None:
        net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), Renamed(4, 4), Own(4, 4), nn.Conv1d(1, 1, 3), nn.Linear(4, 2)
        )
        net[5].requires_grad_(False)
        coverage = cover(net)
        assert list(coverage.operations) == ["0", "2"]
        assert coverage.uncovered == {
            "1.weight": "BatchNorm1d is not supported",
            "1.bias": "BatchNorm1d is not supported",
            "3.weight": "Own has a forward of its own",
            "3.bias": "Own has a forward of its own",
            "4.weight": "Conv1d is not supported",
            "4.bias": "Conv1d is not supported",
        }
        assert (coverage.covered_parameters, coverage.total_parameters) == (40, 40 + 8 + 20 + 4)
        assert coverage.share == 40 / 72
        assert coverage.describe() == (
            "55.6% of 72 trainable parameters in 2 layers; not covered: "
            "1.weight, 1.bias, 3.weight, 3.bias, 4.weight, 4.bias"
        )

    def test_long_lists_are_cut(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), *(nn.LayerNorm(2) for _ in range(5)))
        assert cover(net).describe().endswith("3.weight, 3.bias and 4 more")
        assert cover(net[:1]).describe() == "100.0% of 6 trainable parameters in 1 layers"

    def test_shared_parameters(self) -> None:
        """The sum over both uses is not of the form that either layer has alone."""
        net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
        net["b"].weight = net["a"].weight
        coverage = cover(net)
        assert list(coverage.operations) == ["c"]
        assert coverage.uncovered == dict.fromkeys(["a.weight", "a.bias", "b.bias"], "shared by a and b")
        assert (coverage.covered_parameters, coverage.total_parameters) == (12, 12 + 9 + 3 + 3)

    def test_head_tied_to_an_embedding(self) -> None:
        net = nn.ModuleDict({"words": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
        net["head"].weight = net["words"].weight
        coverage = cover(net)
        assert list(coverage.operations) == ["body"]
        assert coverage.uncovered == {"words.weight": "shared by words and head"}
        assert coverage.share == 12 / 27

    def test_frozen_sharing_does_no_harm(self) -> None:
        net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        net["b"].weight = net["a"].weight
        net["a"].weight.requires_grad_(False)
        coverage = cover(net)
        assert {name: operation.parameter_names for name, operation in coverage.operations.items()} == {
            "a": ("bias",),
            "b": ("bias",),
        }
        assert coverage.share == 1.0

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (parametrizations.weight_norm, r"ParametrizedLinear is parametrised \(no own weight\)"),
            (parametrizations.spectral_norm, r"ParametrizedLinear is parametrised \(no own weight\)"),
            (lambda layer: prune.random_unstructured(layer, "weight", 0.5), r"Linear is parametrised \(weight_orig\)"),
        ],
        ids=["weight_norm", "spectral_norm", "prune"],
    )
    def test_reparametrised_layers(self, change: Callable[[nn.Module], nn.Module], reason: str) -> None:
        net = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 2))
        coverage = cover(net)
        assert list(coverage.operations) == ["1"]
        assert torch.tensor(coverage.share) < 0.4
        reasons = set(coverage.uncovered.values())
        assert {next(r for r in reasons if "parametrised" in r)} == {reason.replace("\\", "")}

    def test_attention(self) -> None:
        """`MultiheadAttention` reads the weight of its output projection without calling the layer."""
        net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
        coverage = cover(net)
        assert list(coverage.operations) == ["head"]
        assert set(coverage.uncovered) == {f"attention.{name}" for name, _ in net["attention"].named_parameters()}

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
        net = nn.ModuleDict({"body": body, "head": nn.Linear(2, 2)})
        coverage = cover(net, patterns)
        assert list(coverage.operations) == expected
        others = {name for name, _ in net.named_parameters() if name.rpartition(".")[0] not in expected}
        assert coverage.uncovered == dict.fromkeys(others, "left out by `layers=`")
        assert coverage.share == len(expected) / 4

    @pytest.mark.parametrize("patterns", [["typo"], ["body.0", "typo"], ["body.0", "typo", "body.1"]])
    def test_pattern_without_a_layer(self, patterns: list[str]) -> None:
        """The message has to name what there is, not what the other patterns matched."""
        net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": nn.Linear(2, 2)})
        missing = [pattern for pattern in patterns if pattern != "body.0"]
        with pytest.raises(LayerError) as error:
            cover(net, patterns)
        assert f"`layers=` names {missing}, which match no supported layer" in str(error.value)
        assert "supported are ['body.0', 'head']" in str(error.value)

    @pytest.mark.parametrize(
        ("net", "found"),
        [
            (nn.Sequential(nn.LayerNorm(3), nn.Conv1d(1, 1, 1)), "Conv1d is not supported; LayerNorm is not supported"),
            (nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), "no parameter requires a gradient"),
            (nn.Tanh(), "no parameter requires a gradient"),
        ],
    )
    def test_nothing_to_cover(self, net: nn.Module, found: str) -> None:
        with pytest.raises(LayerError, match=rf"no supported layer.*supported are Conv2d, Linear\. Found: {found}\."):
            cover(net)

    def test_layer_that_is_the_model(self) -> None:
        net = nn.Linear(4, CLASSES).double()
        assert list(cover(net).operations) == [""]
        assert_right(net, *data((4,)))

    def test_modes_of_coverage_do_not_touch_the_model(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        before: Mapping[str, Tensor] = {name: value.clone() for name, value in net.state_dict().items()}
        cover(net)
        assert net.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert all(p.requires_grad for p in net.parameters())


class TestVerification:
    """Uses of a layer that hooks can't see must not go through unnoticed."""

    def gradients(self, change: Callable[[Any, Any], Tensor]) -> ExampleGradients:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        return passes(net, *data((4,)), task=change, batch_size=EXAMPLES)

    def functional(self, module: Any, batch: Any) -> Tensor:
        hidden = module[1](module[0](batch[0]))
        return cross_entropy(F.linear(hidden, module[2].weight, module[2].bias), batch[1])

    def test_functional_use_and_penalty(self) -> None:
        def penalty(module: Any, batch: Any) -> Tensor:
            return task(module, batch) + 1e-3 * module[0].weight.square().sum()

        with pytest.raises(VerificationError, match=r"do not add up .* in: 2 \(100\.0% off\)"):
            inspect(self.gradients(self.functional), range(EXAMPLES))
        with pytest.raises(VerificationError, match=r"do not add up .* in: 0 \("):
            inspect(self.gradients(penalty), range(EXAMPLES))

    def test_batch_with_a_nan(self) -> None:
        """One bad example in the first batch is no reason not to look at the others."""
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        inputs, targets = data((4,))
        inputs[1, 2] = float("nan")
        error = inspect(passes(net, inputs, targets, batch_size=EXAMPLES), range(EXAMPLES)).largest_error
        assert error is not None
        assert error < 1e-12
        gradients = passes(net, inputs, targets, batch_size=EXAMPLES, task=self.functional)
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
