"""An extra pass leaves no trace: whatever a model can do to itself inside `untouched` is undone."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import random
import subprocess
import sys
from array import array
from collections import Counter, OrderedDict, UserList, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
)

from lightning_influence.core import reachable, snapshot
from lightning_influence.core.isolation import changes_in, hidden_parameters, rewind, untouched
from lightning_influence.core.snapshot import StateError


class Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


class Holder(nn.Module):
    """A module with plain attributes, as many LightningModules have them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


def _pass(model: nn.Module, use: Callable[[], Any], error: type[BaseException] | None = None) -> None:
    """Run `use` in an extra pass that ends normally or by an error."""

    def run() -> None:
        with untouched(model):
            use()
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()


# ---------------------------------------------------------------------------------------------- random streams


def _draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.randn(3).tolist()]


def _draw_a_lot() -> None:
    for _ in range(7):
        _draws()


def _seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.mark.parametrize("use", [_draw_a_lot, _seed_everything])
@pytest.mark.parametrize("error", [None, ValueError, Stop])
def test_random_streams_go_on_as_if_nothing_had_been_drawn(
    use: Callable[[], None], error: type[BaseException] | None
) -> None:
    model = nn.Linear(1, 1)
    # One number of a normal pair is kept for the next call: that is part of the state.
    random.gauss(0, 1)
    np.random.randn()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = _draws()
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    _pass(model, use, error)
    assert _draws() == expected


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        pytest.param(
            lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(4, generator=g).tolist(), id="torch"
        ),
        pytest.param(lambda: np.random.default_rng(3), lambda g: g.random(4).tolist(), id="numpy"),
        pytest.param(lambda: np.random.RandomState(3), lambda g: g.rand(4).tolist(), id="numpy, legacy"),
        pytest.param(lambda: random.Random(3), lambda g: [g.random() for _ in range(4)], id="python"),
    ],
)
def test_a_generator_of_the_model_is_not_advanced(make: Callable[[], Any], draw: Callable[[Any], list[float]]) -> None:
    """Noise that `training_step` draws from its own generator would otherwise be other noise after an audit."""
    generator = make()
    model = Holder(generator=generator, generators={"noise": generator})
    with untouched(model):
        inside = draw(model.generator)
        draw(model.generators["noise"])
    assert inside == draw(make()), "the pass sees the stream where training left it"
    assert model.generator is generator
    assert model.generators["noise"] is generator
    assert draw(generator) == draw(make())


# ------------------------------------------------------------------------------------- modes, flags, gradients


class OverridesTrain(nn.Module):
    """`train()` with a side effect, such as unfreezing or resetting something."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()
        self.calls = 0

    def train(self, mode: bool = True) -> OverridesTrain:
        self.calls += 1
        return super().train(mode)


@pytest.mark.parametrize("error", [None, ValueError, Stop])
def test_every_submodule_gets_its_own_mode_back(error: type[BaseException] | None) -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), OverridesTrain(), nn.BatchNorm1d(2)
    )
    model[1][0].eval()  # a batch norm that the user froze
    model[2].inner.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}

    def use() -> None:
        assert not any(module.training for module in model.modules())
        assert model[2].calls == 0
        model.train()  # user code may also switch

    _pass(model, use, error)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model[2].calls == 0


@pytest.mark.parametrize("error", [None, ValueError])
def test_requires_grad_and_grad_are_left_alone(error: type[Exception] | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model(torch.randn(4, 3)).sum().backward()
    model[0].bias.grad = None
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: None if g is None else g.clone() for name, g in grads.items()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def use() -> None:
        assert not any(p.requires_grad for p in model.parameters())
        x = torch.randn(4, 3, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        model[1].requires_grad_(True)

    _pass(model, use, error)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, copies[name])
        assert torch.equal(parameter, values[name])


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_enabled_inside_whatever_is_outside(outside: Callable[[], Any]) -> None:
    model = nn.Linear(2, 1)
    with outside():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with untouched(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            x = torch.ones(1, 2, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
            assert torch.equal(gradient, model.weight)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_a_compiled_model_runs_eagerly_inside() -> None:
    """Hooks and taps see nothing in a compiled graph."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append("compiled")
        return graph.forward

    compiled = torch.compile(nn.Linear(2, 2), backend=backend)
    with untouched(compiled):
        compiled(torch.ones(1, 2))
        assert seen == []
    compiled(torch.ones(1, 2))
    assert seen == ["compiled"]


def test_the_compiler_is_not_imported_for_it() -> None:
    """It takes seconds, and a model that was compiled has it imported."""
    code = """if True:
        import sys
        from torch import nn
        from lightning_influence.core.isolation import untouched
        with untouched(nn.Linear(2, 2)):
            pass
        print("torch._dynamo" in sys.modules)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# ----------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("error", [None, ValueError, Stop])
def test_buffers_are_the_same_objects_with_the_same_values(error: type[BaseException] | None) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("scratch", torch.zeros(2), persistent=False)
            self.register_buffer("nothing", None)
            self.register_buffer("shared", self.norm.running_mean)

    model = Buffers()
    model.norm(torch.randn(8, 3))
    before = dict(model.named_buffers(remove_duplicate=False))
    values = {name: buffer.clone() for name, buffer in before.items()}
    versions = {name: buffer._version for name, buffer in before.items()}

    def use() -> None:
        model.norm.train()
        model.norm(torch.randn(8, 3) + 5)
        assert not torch.equal(model.norm.running_mean, values["norm.running_mean"])
        assert model.shared is model.norm.running_mean, "aliases are aliases inside, too"
        model.scratch.fill_(torch.nan)
        model.scratch = torch.ones(5)
        model.nothing = torch.ones(1)

    _pass(model, use, error)
    after = dict(model.named_buffers(remove_duplicate=False))
    assert list(after) == list(before)
    for name, buffer in after.items():
        assert buffer is before[name]
        assert torch.equal(buffer, values[name])
        assert buffer._version == versions[name], f"{name} was written to and back"
    assert model.nothing is None


def test_a_buffer_that_forward_registers_is_gone_again() -> None:
    """A lazily made cache would be a key in the state_dict that the run without an audit does not have."""
    model = Holder()
    keys, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    with untouched(model):
        model.register_buffer("cache", torch.ones(2))
        model.layer.register_buffer("unsaved", torch.ones(2), persistent=False)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == buffers
    model.layer.register_buffer("unsaved", torch.ones(2))
    assert "layer.unsaved" in model.state_dict(), "remembered as a buffer that is not saved"


def test_a_buffer_that_forward_deletes_is_back_in_its_place() -> None:
    model = nn.BatchNorm1d(2)
    keys = list(model.state_dict())
    with untouched(model):
        del model.running_mean
    assert list(model.state_dict()) == keys


def test_parameters_and_submodules_that_forward_adds_are_gone_again() -> None:
    model = Holder()
    keys = list(model.state_dict())
    with untouched(model):
        model.lazily = nn.Linear(2, 2)
        model.layer.scale = nn.Parameter(torch.ones(1))
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == ["", "layer"]


# ---------------------------------------------------------------------------------------------------- metrics


def _batch(classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(16, classes).softmax(1), torch.randint(0, classes, (16,))


def _collection() -> MetricCollection:
    # Accuracy and precision share their states (a compute group); the others have states of their own.
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(3),
            "precision": MulticlassPrecision(3),
            "confusion": MulticlassConfusionMatrix(3),
            "auroc": MulticlassAUROC(3),
        }
    )


def _metric_states(metric: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{state}": getattr(member, state)
        for name, member in metric.named_modules()
        if isinstance(member, Metric)
        for state in (*member._defaults, "_update_count", "_computed")
    }


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        pytest.param(MeanMetric, lambda: (torch.rand(4),), id="mean"),
        pytest.param(CatMetric, lambda: (torch.rand(4),), id="list state"),
        pytest.param(lambda: MulticlassAUROC(3), _batch, id="two list states"),
        pytest.param(_collection, _batch, id="collection"),
        pytest.param(lambda: nn.ModuleDict({"fit": _collection()}), None, id="nested"),
    ],
)
@pytest.mark.parametrize("updates_before", [0, 1, 3])
def test_metrics_are_as_before(
    make: Callable[[], Any], draw: Callable[[], tuple[Tensor, ...]] | None, updates_before: int
) -> None:
    holder = Holder(metric=make())
    metric = holder.metric["fit"] if draw is None else holder.metric
    draw = draw or _batch
    for _ in range(updates_before):
        metric.update(*draw())
    control = copy.deepcopy(metric)
    states = _metric_states(metric)

    with untouched(holder):
        metric(*draw())  # forward updates, too
        metric.update(*draw())
        metric.compute()
        metric.reset()
        metric.update(*draw())

    after = _metric_states(metric)
    assert after.keys() == states.keys()
    for name, state in after.items():
        assert state is states[name], name
    batch = draw()
    for one in (metric, control):
        one.update(*batch)
    result, expected = metric.compute(), control.compute()
    if isinstance(result, Tensor):
        result, expected = {"": result}, {"": expected}
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=0)


def test_states_that_metrics_share_are_still_shared() -> None:
    holder = Holder(metrics=_collection())
    holder.metrics.update(*_batch())
    holder.metrics.update(*_batch())
    # By attribute: `metrics["accuracy"]` makes the states separate copies.
    accuracy, precision = holder.metrics.accuracy, holder.metrics.precision
    assert accuracy.tp is precision.tp
    with untouched(holder):
        assert accuracy.tp is precision.tp
        holder.metrics.update(*_batch())
        accuracy.tp += 100
    assert accuracy.tp is precision.tp
    assert holder.metrics.compute_groups == {0: ["accuracy", "precision"], 1: ["auroc"], 2: ["confusion"]}


def test_groups_formed_inside_are_forgotten() -> None:
    """The groups are found at the first update; they must not be taken for found from a first update in a pass."""
    holder = Holder(metrics=_collection())
    with untouched(holder):
        holder.metrics.update(*_batch())
        assert len(holder.metrics.compute_groups) == 3
    assert len(holder.metrics.compute_groups) == 4
    holder.metrics.update(*_batch())
    assert len(holder.metrics.compute_groups) == 3


@pytest.mark.parametrize("wrap", [lambda m: [m], lambda m: {"metric": m}], ids=["list", "dict"])
def test_a_metric_in_a_plain_container_is_as_before(wrap: Callable[[Metric], Any]) -> None:
    """Metrics in a plain list or dict are no submodules, but users keep them there."""
    metric = MeanMetric()
    holder = Holder(metrics=wrap(metric))
    metric.update(1.0)
    with untouched(holder):
        inside = next(iter(holder.metrics.values() if isinstance(holder.metrics, dict) else holder.metrics))
        inside.update(101.0)
    assert float(metric.compute()) == 1.0


def test_a_module_hidden_in_a_list_is_as_before() -> None:
    """`self._teacher = [teacher]` keeps a teacher out of the state_dict; its batch norm has running statistics."""
    teacher = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    holder = Holder(teacher=[teacher])
    with untouched(holder):
        holder.teacher[0](torch.randn(4, 2) + 3)
    assert torch.equal(teacher[0].running_mean, torch.zeros(2))
    assert all(module.training for module in teacher.modules())


def test_parameters_that_the_model_does_not_register() -> None:
    """Trained they may be, saved they are not; frozen ones (a teacher's) are nobody's concern."""
    student, teacher, known = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    holder = Holder(hidden=[student, {"deep": (teacher,)}], known=known, again=[known])
    assert {id(p) for p in hidden_parameters(holder)} == {id(p) for p in student.parameters()}
    assert hidden_parameters(known) == []


# -------------------------------------------------------------------------------------------- plain attributes


def _append(model: Any) -> None:
    model.value.append(torch.ones(3))


def _clear(model: Any) -> None:
    model.value.clear()


CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "list": (lambda: [1, 2], _append),
    "list, cleared": (lambda: [1, 2], _clear),
    "list of lists": (lambda: [[1], [2]], lambda m: m.value[0].append(9)),
    "long list": (lambda: list(range(20_000)), _append),
    "dict": (lambda: {"a": 1}, lambda m: m.value.update(b=2, a=3)),
    "dict of lists": (lambda: {"train": [1.0], "val": []}, lambda m: m.value["val"].append(2.0)),
    "dict in a list in a dict": (lambda: {"a": [{"b": 1}]}, lambda m: m.value["a"][0].pop("b")),
    "deque": (lambda: deque([1, 2, 3], maxlen=3), _append),
    "long deque": (lambda: deque(range(20_000), maxlen=20_000), _append),
    "set": (lambda: {1, 2}, lambda m: m.value.add(3)),
    "tuple of lists": (lambda: ([1], [2]), lambda m: m.value[1].append(3)),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda m: m.value["b"].append(2)),
    "Counter": (lambda: Counter("aab"), lambda m: m.value.update("abc")),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda m: m.value.move_to_end("a")),
    "number": (lambda: 3, lambda m: setattr(m, "value", m.value + 1)),
    "numpy array": (lambda: np.zeros(3), lambda m: m.value.__iadd__(1)),
    "numpy array in a dict": (lambda: {"seen": np.zeros(3)}, lambda m: m.value["seen"].__setitem__(1, 4)),
}


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_plain_attribute_is_as_before(name: str, error: type[Exception] | None) -> None:
    make, change = CONTAINERS[name]
    value = make()
    model = nn.Sequential(Holder(value=value))

    def use() -> None:
        assert type(model[0].value) is type(value)
        change(model[0])

    _pass(model, use, error)
    assert model[0].value is value
    if name == "OrderedDict":
        assert list(value) == list(make())
    if isinstance(value, deque):
        assert value.maxlen == make().maxlen
    assert np.array_equal(value, make()) if isinstance(value, np.ndarray) else _plain(value) == _plain(make())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_the_deque_keeps_its_bound_inside() -> None:
    model = Holder(recent=deque([1, 2, 3], maxlen=3))
    with untouched(model):
        model.recent.append(4)
        assert list(model.recent) == [2, 3, 4]


def test_tensors_in_attributes_and_containers_are_as_before() -> None:
    mean, nested = torch.zeros(2), torch.zeros(2)
    model = Holder(mean=mean, history={"sums": [nested]})
    with untouched(model):
        model.mean += 1
        model.history["sums"][0].mul_(0).add_(5)
    assert model.mean is mean
    assert model.history["sums"][0] is nested
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(nested, torch.zeros(2))


def test_a_tensor_with_a_graph_keeps_it() -> None:
    """`self.last_loss = loss`, kept by training_step and used after the audit."""
    weight = torch.ones(2, requires_grad=True)
    kept = (weight * 3).sum()
    model = Holder(kept=kept)
    with untouched(model):
        model.kept = model.kept * 0
    assert model.kept is kept
    model.kept.backward()
    assert torch.equal(weight.grad, torch.full((2,), 3.0))


def test_aliases_are_aliases_inside_and_afterwards() -> None:
    values = [1]
    model = nn.Sequential(Holder(values=values, also={"values": values}), Holder(values=values))
    with untouched(model):
        model[0].values.append(2)
        assert model[0].also["values"] == [1, 2]
        assert model[1].values == [1, 2]
    assert values == [1]
    assert model[0].values is model[1].values is model[0].also["values"] is values


def test_a_container_may_contain_itself() -> None:
    tree: dict[str, Any] = {"children": []}
    tree["children"].append({"parent": tree})
    model = Holder(tree=tree)
    with untouched(model):
        assert model.tree["children"][0]["parent"] is model.tree
        model.tree["children"].clear()
    assert model.tree is tree
    assert len(tree["children"]) == 1


def test_attributes_that_are_set_or_deleted_are_put_back() -> None:
    model = nn.Sequential(Holder(kept=[1]))
    names = set(model[0].__dict__)
    with untouched(model):
        model[0].new = [1]
        model.new = torch.ones(1)
        del model[0].kept
        model[0].forward = lambda x: x
    assert set(model[0].__dict__) == names
    assert not hasattr(model, "new")
    assert model[0].kept == [1]


def test_nested_passes() -> None:
    model = Holder(values=[1])
    with untouched(model):
        model.values.append(2)
        with untouched(model):
            model.values.append(3)
        assert model.values == [1, 2]
        assert not model.training
    assert model.values == [1]
    assert model.training


# ------------------------------------------------------------------------- weights, objects, functions, classes


def _scaled(model: nn.Module) -> None:
    model.layer.weight.data *= 2


def _replaced(model: nn.Module) -> None:
    model.layer.weight.data = model.layer.weight.data[:1].double() * 2


def _copied(model: nn.Module) -> None:
    model.layer.load_state_dict({name: value + 1 for name, value in model.layer.state_dict().items()})


def _through_numpy(model: nn.Module) -> None:
    model.layer.weight.detach().numpy()[:] = 3


def _through_a_view(model: nn.Module) -> None:
    model.layer.weight[0].fill_(torch.nan)


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("change", [_scaled, _replaced, _copied, _through_numpy, _through_a_view])
def test_weights_that_a_step_writes_are_as_before(
    change: Callable[[nn.Module], None], error: type[Exception] | None
) -> None:
    model = Holder()
    weight, memory, version = model.layer.weight, model.layer.weight.data_ptr(), model.layer.weight._version
    values = weight.detach().clone()

    def use() -> None:
        with torch.no_grad():
            change(model)
        assert not torch.equal(weight.double(), values.double())

    _pass(model, use, error)
    assert model.layer.weight is weight
    assert weight.data_ptr() == memory
    assert weight._version == version
    assert weight.dtype == torch.float32
    assert torch.equal(weight, values)
    assert weight.requires_grad
    assert changes_in(model)[0] == "layer.weight"


class Plain:
    kind = [0]

    def __init__(self) -> None:
        self.n, self.seen = 0, {"a": [1]}

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a user's comparison is not asked")

    __hash__ = None  # type: ignore[assignment]


class Slotted:
    __slots__ = ("never", "rows", "sometimes")

    def __init__(self) -> None:
        self.rows, self.sometimes = torch.zeros(2), 1


def _closure() -> Callable[[], None]:
    n, rows = 0, [1]

    def count(step: int = 1, *, into: list[int] = []) -> None:  # noqa: B006
        nonlocal n
        n += step
        rows.append(n)
        into.append(n)

    count.told = lambda: (n, list(rows), list(count.__kwdefaults__["into"]))  # type: ignore[attr-defined]
    return count


def _change_slots(value: Slotted) -> None:
    value.rows += 1
    value.never = 3
    del value.sometimes


def _change_class(value: Plain) -> None:
    Plain.kind.append(1)
    Plain.kind = [2]
    Plain.new = 3  # type: ignore[attr-defined]


OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "attributes": (Plain, lambda v: v.__dict__.update(n=5, new=1), lambda v: dict(v.__dict__)),
    "what attributes hold": (Plain, lambda v: v.seen["a"].append(2), lambda v: copy.deepcopy(v.seen)),
    "slots": (Slotted, _change_slots, lambda v: (v.rows.tolist(), getattr(v, "sometimes", None), hasattr(v, "never"))),
    "class": (Plain, _change_class, lambda v: (list(Plain.kind), hasattr(Plain, "new"))),
    "closure": (_closure, lambda v: v(), lambda v: v.told()),
    "partial": (lambda: functools.partial(_closure(), 2), lambda v: v(), lambda v: v.func.told()),
    "bytes": (lambda: bytearray(b"ab"), lambda v: v.extend(b"c"), bytes),
    "array": (lambda: array("i", [1, 2]), lambda v: v.append(3), list),
    "shared number": (lambda: multiprocessing.Value("d", 1.0), lambda v: setattr(v, "value", 2.0), lambda v: v.value),
    "namespace": (lambda: SimpleNamespace(a=[1]), lambda v: v.a.append(2), lambda v: list(v.a)),
    "user list": (lambda: UserList([1]), lambda v: v.append(2), list),
}


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("name", OBJECTS)
def test_what_an_object_holds_is_as_before(name: str, error: type[Exception] | None) -> None:
    make, change, tell = OBJECTS[name]
    value = make()
    model = Holder(held=[{"deep": value}])
    before = tell(value)

    def use() -> None:
        change(value)
        assert tell(value) != before

    _pass(model, use, error)
    assert tell(value) == before
    assert model.held[0]["deep"] is value
    assert len(changes_in(model)) >= 1


def test_slots_that_a_subclass_covers_are_not_asked_for() -> None:
    class Covered(Slotted):
        __slots__ = ("never",)
        rows = property(lambda self: 1 / 0, lambda self, value: 1 / 0)  # type: ignore[assignment]

        def __init__(self) -> None:
            self.never = self.sometimes = 1

    value = Covered()
    with untouched(Holder(held=[value])):
        value.never = value.sometimes = 2
    assert (value.never, value.sometimes) == (1, 1)


def test_what_a_hook_has_gathered_is_as_before() -> None:
    model, gathered = Holder(), [torch.zeros(1, 2)]
    model.layer.register_forward_hook(lambda module, inputs, output: gathered.append(output))
    with untouched(model):
        model.layer(torch.ones(1, 2))
        assert len(gathered) == 2
    assert len(gathered) == 1


def test_more_than_can_be_looked_after_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachable, "_MOST_VISITS", 1_000)
    model = Holder(tree=[[[n] for n in range(60)] for _ in range(20)])
    with pytest.warns(UserWarning, match="more than 1,000 objects"), untouched(model):
        pass


def test_an_iterator_goes_on_where_training_was() -> None:
    numbers, letters = itertools.count(3), iter("abc")
    model = Holder(numbers=numbers, held=[letters], again=numbers)
    with untouched(model):
        assert [next(model.numbers), next(model.again)] == [3, 4]
        next(model.held[0])
    assert model.numbers is numbers
    assert [next(numbers), "".join(letters)] == [3, "abc"]


def test_a_sum_that_joins_a_graph_is_a_leaf_again() -> None:
    """`self.total += loss`, undetached: put back by its values alone, it would hold the graph of the pass."""
    model = Holder(total=torch.zeros(()))
    total = model.total
    with untouched(model):
        model.total += model.layer(torch.ones(1, 2, requires_grad=True)).sum()
        assert total.requires_grad
    assert model.total is total
    assert total.grad_fn is None
    assert not total.requires_grad
    assert float(total) == 0


def test_every_batch_starts_where_training_stands() -> None:
    model = Holder(n=0, rows=torch.zeros(2), numbers=itertools.count())
    found = []
    with untouched(model):
        for _ in range(4):
            rewind()
            model.n += 1
            model.rows += 1
            with torch.no_grad():
                model.layer.weight.mul_(2)
            found.append((model.n, model.rows.tolist(), model.layer.weight.sum().item(), next(model.numbers)))
    assert found == [found[0]] * 4
    assert sorted(changes_in(model)) == ["layer.weight", "n", "rows"]


def test_what_the_pass_thaws_stays_thawed_between_batches() -> None:
    model = Holder()
    with untouched(model):
        model.layer.weight.requires_grad_(True)
        for _ in range(3):
            rewind()
        assert model.layer.weight.requires_grad
    assert changes_in(model) == []


def test_metrics_are_no_news() -> None:
    """That a metric is updated by the step is what it is there for; the list beside it is the user's own."""
    model = Holder(metric=MeanMetric(), losses=[])
    with untouched(model):
        model.metric.update(1.0)
        model.losses.append(1.0)
    assert changes_in(model) == ["losses"]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.fill_(2),
        lambda t: t.data.mul_(0),
        lambda t: t.__setitem__(slice(0, 3), 7),
        lambda t: t.view(-1, 2)[:, 1].add_(1),
        lambda t: torch.mul(t, 2, out=t),
        lambda t: torch._foreach_add_([t], 1),
        lambda t: setattr(t, "data", torch.zeros(3)),
        lambda t: t.numpy().__setitem__(slice(0, 3), 7),
    ],
)
def test_a_large_tensor_is_put_back(change: Callable[[Tensor], Any]) -> None:
    """The queue of a memory bank."""
    model = Holder()
    model.register_buffer("queue", torch.arange(2.0**19))
    with untouched(model):
        for _ in range(3):
            rewind()
            assert torch.equal(model.queue, torch.arange(2.0**19))
            change(model.queue)
    assert torch.equal(model.queue, torch.arange(2.0**19))
    assert changes_in(model) == ["queue"]


def test_what_can_not_be_put_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large to be copied for every pass."""
    monkeypatch.setattr(snapshot, "_HUGE", 100)
    model = Holder()
    model.register_buffer("table", torch.zeros(101))
    with untouched(model):
        _ = model.table + 1
    with (
        pytest.raises(StateError, match=r"has changed table, and it can't be put back .*Pass `task=`"),
        untouched(model),
    ):
        model.table[3] += 1


# ------------------------------------------------------------------------------------------------- all of it


class Everything(nn.Module):
    """A training step with all the usual side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.metrics = _collection()
        self.losses: list[Tensor] = []
        self.average = torch.zeros(())

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x + 0.1 * torch.randn_like(x) * random.random())
        loss = F.cross_entropy(logits, y)
        self.metrics.update(logits.detach(), y)
        self.losses.append(loss.detach())
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        return loss


def _train(passes: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    random.seed(1)
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(6):
        rows = torch.randperm(40)[:16]
        optimizer.zero_grad()
        model.training_step(x[rows], y[rows]).backward()
        if passes and step % 2 == 0:  # with gradients waiting to be used
            with untouched(model):
                for part in (slice(0, 16), slice(16, 40)):
                    x_part = x[part].clone().requires_grad_()
                    torch.autograd.grad(model.training_step(x_part, y[part]), x_part)
        optimizer.step()
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "metrics": model.metrics.compute(),
        "losses": model.losses,
        "average": model.average,
        "random": (torch.get_rng_state(), random.random()),
    }


def test_training_is_bitwise_the_same_with_extra_passes() -> None:
    without, with_passes = _train(passes=False), _train(passes=True)
    torch.testing.assert_close(with_passes, without, rtol=0, atol=0, check_dtype=True)
