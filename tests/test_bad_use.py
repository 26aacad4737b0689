"""Models that use their layers in ways that need a word: each gets its message, or the right numbers."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import VerificationError, inspect
from lightning_influence.layers import per_sample
from lightning_influence.layers.blocks import LayerError

N = 5


def task(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 4, generator=generator).double(), torch.arange(N) % 3)


def passes(net: nn.Module, **options: Any) -> ExampleGradients:
    net = net.double()
    source = ExampleSource(data(), batch_size=3)
    return ExampleGradients(net, task, source, discover(net, task, source, **options))


def found(gradients: ExampleGradients) -> dict[str, Tensor]:
    """Return the captured gradient of every example, `[N, *shape]`, by parameter."""
    result: dict[str, list[Tensor]] = {}
    with closing(gradients.run(range(N))) as batches:
        for batch in batches:
            for io in batch.layers():
                each = torch.cat(list(per_sample.gradients(io.x, io.gs[0])), 1).transpose(0, 1)
                for name, value in gradients.coverage.blocks[io.name].to_parameters(each).items():
                    result.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in result.items()}


def alone(net: nn.Module) -> dict[str, Tensor]:
    """Return autograd's gradient of every example alone."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in net.named_parameters()}
    for x, y in zip(*data().tensors, strict=True):
        net.zero_grad()
        task(net, (x[None], y[None])).backward()
        for name, p in net.named_parameters():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    net.zero_grad()
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_exact(net: nn.Module, *, uncovered: tuple[str, ...] = (), batch_size: int = 3) -> Coverage:
    gradients = passes(net.eval())
    gradients.source.pass_batch_size = batch_size
    own, expected = found(gradients), alone(net)
    assert tuple(gradients.coverage.uncovered) == uncovered
    for name, value in expected.items():
        if name not in uncovered:
            torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-12)
    inspect(gradients, range(N))
    return gradients.coverage


class InTrainMode(nn.Module):
    """Forces its batch norm into train mode, whatever mode the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        output: Tensor = self.last(self.norm(self.first(x)))
        return output


@pytest.mark.parametrize(
    "net",
    [
        InTrainMode(),
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False), nn.Linear(6, 3)),
    ],
    ids=["forced into train mode", "without running statistics", "without parameters of its own"],
)
def test_statistics_of_the_batch(net: nn.Module) -> None:
    """Each example's loss would depend on its neighbours: there is no influence of its own."""
    gradients = passes(net.eval())
    with pytest.raises(VerificationError, match=r"than alone.*a batch norm without running statistics"):
        inspect(gradients, range(N))
    inspect(gradients, range(N), verify=False)


def test_frozen_batch_norm_in_train_mode_model_is_exact() -> None:
    """The model may be in train mode: extra passes are not, and put it back."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    net(data().tensors[0])  # running statistics that are not 0 and 1
    gradients = passes(net.train())
    own = found(gradients)
    assert all(module.training for module in net.modules())
    expected = alone(net.eval())
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-12)


class OutputInPlace(nn.Module):
    """Changes what its layers return, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = F.relu_(hidden)
        hidden = self.norm(hidden)
        hidden += self.shift
        hidden = hidden.tanh()
        hidden = hidden * 1
        hidden.mul_(self.scale)
        output: Tensor = self.last(hidden)
        output.add_(1).mul_(2)
        return output


def test_outputs_modified_in_place() -> None:
    """The gradient of the layer's own output counts, not that of what became of it."""
    assert_exact(OutputInPlace())


class InputInPlace(nn.Module):
    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first.weight.requires_grad_(trained)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = self.first(x)
        x.zero_()
        output: Tensor = self.last(hidden)
        return output


def test_inputs_modified_in_place() -> None:
    """The weight's gradient would be taken with the wrong input: zero, here."""
    gradients = passes(InputInPlace())
    with pytest.raises(LayerError, match=r"input of layer 'first' was modified in place.*out-of-place"):
        found(gradients)
    assert_exact_bias = passes(InputInPlace(trained=False))
    assert found(assert_exact_bias)["first.bias"].abs().sum() > 0  # a bias does not need the input


class PartlyWithoutGradients(nn.Module):
    """A layer that is used twice, once without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.silent, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = self.silent(self.shared(x))
        output: Tensor = self.last(self.shared(x).tanh() + before + self.shared(x.detach() * 2).detach())
        return output


def test_calls_without_gradients_do_not_count() -> None:
    """Nor do uses that are cut off by `detach`. A layer that only has such uses is named."""
    coverage = assert_exact(PartlyWithoutGradients(), uncovered=("silent.weight", "silent.bias"))
    assert coverage.uncovered["silent.weight"].startswith("used without gradients only")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, after_a_layer: bool = True) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.before = nn.Linear(4, 4) if after_a_layer else nn.Identity()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def segment(self, x: Tensor) -> Tensor:
        output: Tensor = torch.tanh(self.norm(self.first(x)) * self.scale)
        return output

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.segment, self.before(x.clone().requires_grad_()), use_reentrant=self.reentrant)
        output: Tensor = self.last(hidden)
        return output


def test_checkpointed_segment() -> None:
    """The segment runs again in the backward pass, and is counted once."""
    assert_exact(Checkpointed(reentrant=False))


def test_reentrant_checkpointing() -> None:
    """Its backward pass runs `backward` itself, which writes gradients instead of returning them."""
    gradients = passes(Checkpointed(reentrant=True))
    with pytest.raises(LayerError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        inspect(gradients, range(N))


def test_reentrant_checkpointing_below_everything_else() -> None:
    """No gradient that is asked for passes the segment: its layers are named as not covered, with the way out."""
    gradients = passes(Checkpointed(reentrant=True, after_a_layer=False).eval())
    assert list(gradients.coverage.blocks) == ["last"]
    assert set(gradients.coverage.uncovered) == {"scale", "first.weight", "first.bias", "norm.weight", "norm.bias"}
    assert all("use_reentrant=False" in reason for reason in gradients.coverage.uncovered.values())


class Outside(nn.Module):
    """Uses a parameter, or a whole layer, that no module knows of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.hidden: list[Any] = [nn.Parameter(torch.rand(3).double()) if kind == "parameter" else nn.Linear(3, 3)]
        if kind == "layer":
            self.hidden[0].double()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x).tanh())
        outside = self.hidden[0]
        result: Tensor = output * outside if self.kind == "parameter" else outside(output)
        return result


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("parameter", "a parameter of shape (3,) used by mul"),
        ("layer", "a parameter of shape (3, 3) used by linear"),
    ],
)
def test_parameters_outside_of_the_module_tree(kind: str, note: str) -> None:
    """An optimizer may train them and a checkpoint would lose them; they are named, the rest is exact."""
    net = Outside(kind).eval()
    gradients = passes(net)
    assert gradients.coverage.uncovered[note] == "registered in no module, so neither saved nor found; assign it to one"
    expected = alone(net)
    for name, value in found(gradients).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_a_hidden_teacher_without_gradients_is_nobodys_business() -> None:
    class Taught(Outside):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.last(self.first(x).tanh())
            with torch.no_grad():
                target: Tensor = self.hidden[0](output)
            return output * target

    assert passes(Taught("layer").eval()).coverage.uncovered == {}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["first", "lats"], r"names \['lats'\], which match no supported layer; did you mean \['last'\]"),
        ("zzz*", r"names \['zzz\*'\].*there are \['first', 'norm', 'last'\]"),
        (nn.Conv2d, r"names \['Conv2d'\]"),
    ],
    ids=["misspelt", "pattern", "type"],
)
def test_unknown_layers(layers: Any, message: str) -> None:
    net = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), norm=nn.LayerNorm(6), last=nn.Linear(6, 3)))
    with pytest.raises(LayerError, match=message):
        passes(net, layers=layers)


class Alternating(nn.Module):
    """Takes another path through its layers with every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) == float(data().tensors[0][3, 0]):  # the fourth example comes first
            output: Tensor = torch.einsum("ni,oi->no", self.first(x).tanh(), self.last.weight)
            return output
        output = self.last(self.first(x).tanh())
        return output


def test_another_path_than_in_the_first_batch() -> None:
    """A batch that takes another path through the model is traced, too, before its numbers are believed."""
    assert_exact(Alternating(), batch_size=1)


class LateSum(Alternating):
    """Sums over the batch, on its second path."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if float(x[0, 0]) == float(data().tensors[0][3, 0]):
            total: Tensor = torch.einsum("ni,oi->o", hidden, self.last.weight) + 0 * x.sum(1, keepdim=True)
            return total
        output: Tensor = self.last(hidden)
        return output


def test_a_path_that_is_not_understood() -> None:
    """Not guessed at: the batch and the parameter are named."""
    with pytest.raises(LayerError, match=r"'last.weight' is summed over the batch by einsum.*examples 3, 4.*not in"):
        found(passes(LateSum().eval()))


class PicksRows(nn.Module):
    """Runs its second layer on some of the rows only, picked by their values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).unsqueeze(1) * torch.tensor([1.0, -1.0, 0.5]).double().view(3, 1)  # [n, 3, 4]
        kept = hidden[:, :, 0] > 0
        if self.how == "mask":
            picked = self.second(hidden[kept])
        else:
            rows = kept.flatten().nonzero().squeeze(1)
            picked = self.second(hidden.flatten(0, 1)[rows])
        back = torch.zeros_like(hidden)
        back[kept] = picked.tanh()
        output: Tensor = self.last(back.sum(1))
        return output


@pytest.mark.parametrize("how", ["mask", "indices"])
def test_rows_picked_by_their_values(how: str) -> None:
    """Their number may be a multiple of the batch by chance: then equal shares would be the wrong examples'."""
    net = PicksRows(how).eval()
    gradients = passes(net)
    assert set(gradients.coverage.uncovered) == {"second.weight", "second.bias"}
    assert all("picked by their values" in reason for reason in gradients.coverage.uncovered.values())
    expected = alone(net)
    for options in ({}, {"uncovered": "exact"}):
        for name, value in found(passes(net, **options)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    assert passes(net, uncovered="exact").coverage.share == 1.0


class LoopsOverExamples(nn.Module):
    """A network that is called for every example alone, or whose outputs are gone through one by one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "layers":
            return torch.stack([self.body(each) for each in x])
        return torch.stack([each * 2 for each in self.body(x)])


def test_a_loop_over_the_outputs_of_examples_is_followed() -> None:
    """Other calls for another size of the batch, but with parameters the same ones."""
    coverage = assert_exact(LoopsOverExamples("outputs"))
    assert coverage.trace.failure is None
    assert not coverage.one_by_one


def test_a_model_that_cannot_be_traced_is_scored_one_example_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other calls with parameters for another size of the batch: right where that is affordable, else refused."""
    coverage = assert_exact(LoopsOverExamples("layers"))
    assert (
        coverage.one_by_one == coverage.blocks.keys() == {f"body.{k}.{p}" for k in (0, 2) for p in ("weight", "bias")}
    )
    assert coverage.describe().endswith(
        "traced: NotUnderstoodError: the model makes other calls for another size of the batch)"
    )
    monkeypatch.setattr("lightning_influence.gradients.coverage._LARGEST_UNASKED", 34)
    with pytest.raises(
        LayerError, match=r"its 35 trainable parameters .* one example at a time.* unasked for more than 34"
    ):
        passes(LoopsOverExamples("layers"))
    for options in ({"uncovered": "exact"}, {"layers": "body.2"}):
        net = LoopsOverExamples("layers")
        own, expected = found(passes(net, **options)), alone(net)
        assert own.keys() == {name for name in expected if name.startswith(options.get("layers", ""))}
        for name, value in own.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_a_size_of_the_batch_that_is_written_into_the_model_is_refused() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.view(3, 4))

    with pytest.raises(LayerError, match=r"can't be run on two copies .*'\[3, 4\]' is invalid.* batches of any size"):
        passes(Fixed(4, 3))
