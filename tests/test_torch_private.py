"""Every private name of torch that the package relies on: which one is gone, and in which torch, these tests say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.core import torch_private


def gone(name: str) -> str:
    return f"torch {torch.__version__} has another {name}: mend lightning_influence/core/torch_private.py"


def rows() -> Tensor:
    return torch.arange(12.0).view(4, 3).requires_grad_() * 1


INDEX = torch.tensor([0, 2])
# Name of a node of the graph: what makes it, and what it has saved.
NODES: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
    "GatherBackward0": (lambda: rows().gather(1, INDEX[None]), {"dim": 1, "index": INDEX[None]}),
    "IndexSelectBackward0": (
        lambda: rows().index_select(0, INDEX),
        {"dim": 0, "index": INDEX},
    ),
    "IndexBackward0": (lambda: rows()[INDEX], {}),
    "MaskedSelectBackward0": (lambda: rows().masked_select(torch.eye(4, 3).bool()), {"mask": torch.eye(4, 3).bool()}),
    "PackPaddedSequenceBackward0": (
        lambda: pack_padded_sequence(rows()[None], [4], batch_first=True).data,
        {"batch_first": True, "result1": torch.ones(4).long()},
    ),
    "SelectBackward0": (lambda: rows().select(0, 1), {"dim": 0, "index": 1}),
    "SliceBackward0": (lambda: rows()[1:3], {"dim": 0, "start": 1, "end": 3, "step": 1}),
    "SplitBackward0": (lambda: rows().split(2)[0], {"dim": 0, "split_size": 2}),
    "PermuteBackward0": (lambda: rows().permute(1, 0), {"dims": (1, 0)}),
    "TransposeBackward0": (lambda: rows().transpose(0, 1), {"dim0": 0, "dim1": 1}),
    "TBackward0": (lambda: rows().t(), {}),
    "NllLossBackward0": (
        lambda: F.nll_loss(rows(), torch.tensor([0, 1, 2, 0]), reduction="sum"),
        {"ignore_index": -100, "reduction": 2, "target": torch.tensor([0, 1, 2, 0]), "weight": None},
    ),
    "AddmmBackward0": (lambda: F.linear(rows(), torch.ones(2, 3), torch.ones(2)), {}),
    "MmBackward0": (lambda: rows() @ torch.ones(3, 2), {}),
    "NativeLayerNormBackward0": (lambda: F.layer_norm(rows(), (3,)), {}),
    "MeanBackward0": (lambda: rows().mean(), {}),
    "SumBackward0": (lambda: rows().sum(), {}),
    "DivBackward0": (lambda: rows() / 2, {}),
    "MulBackward0": (lambda: rows() * 2, {}),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_of_the_graph(name: str) -> None:
    make, expected = NODES[name]
    node: Any = make().grad_fn
    assert node.name() == name, gone(f"autograd node {name}")
    assert torch_private.ahead_of(node), gone("Node.next_functions")
    for attribute, value in expected.items():
        assert hasattr(node, f"_saved_{attribute}"), gone(f"{name}._saved_{attribute}")
        found = torch_private.saved(node, attribute)
        same = torch.equal(found, value) if isinstance(value, Tensor) else found == value
        signed = isinstance(value, int) and isinstance(found, int) and found % 2**64 == value % 2**64
        assert same or signed, gone(f"{name}._saved_{attribute} ({found!r} for {value!r})")


def test_shapes_of_nodes() -> None:
    node: Any = rows().split([1, 3])[0].grad_fn
    leaf = torch.ones(2, 3).requires_grad_()
    assert torch_private.shape_of(*torch_private.ahead_of((leaf * 1).grad_fn)[0]) == (2, 3), gone("AccumulateGrad")
    assert (torch_private.shape_of(node), torch_private.shape_of(node, 1)) == ((1, 3), (3, 3)), gone(
        "Node._input_metadata"
    )


def test_what_is_saved_can_be_packed() -> None:
    def loss() -> Any:
        return F.nll_loss(rows(), INDEX.repeat(2)).grad_fn

    node = loss()
    assert hasattr(node._raw_saved_self, "unpack_hook"), gone("_raw_saved_self.unpack_hook")
    assert not torch_private.is_packed(node, "self")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert torch_private.is_packed(loss(), "self"), gone("_raw_saved_self.unpack_hook")


def test_attention_whose_calls_can_be_watched() -> None:
    parameters = inspect.signature(F.multi_head_attention_forward).parameters
    assert "has_torch_function" in F.multi_head_attention_forward.__globals__, gone("F.multi_head_attention_forward")
    assert inspect.signature(torch_private.visible_attention).parameters.keys() == parameters.keys()
    layer, value, seen = nn.MultiheadAttention(4, 2), torch.randn(3, 2, 4), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == F.multi_head_attention_forward:
                with self:
                    return torch_private.visible_attention(*args, **(kwargs or {}))
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        found = layer(value, value, value)[0]
    assert seen.count(F.linear) == 2, gone("F.multi_head_attention_forward.__code__")
    assert torch.equal(found, layer(value, value, value)[0])


def test_stack_of_function_modes() -> None:
    class Mode(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    first, second = Mode(), Mode()
    with first:
        second.__enter__()
        with Mode() as third:
            torch_private.leave_mode(second)
            torch.ones(1).add(1)
    what = "torch.overrides._pop_mode, _push_mode or torch._C._len_torch_function_stack"
    assert (first.calls > 0, second.calls, third.calls > 0) == (True, 0, True), gone(what)
    assert not torch._C._len_torch_function_stack()


def test_argument_that_no_mode_is_told() -> None:
    class Mode(TorchFunctionMode):
        found: Any = None

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.l1_loss:
                self.found = torch_private.argument_of_caller(F.l1_loss, "weight")
            return func(*args, **(kwargs or {}))

    weight = torch.tensor([1.0, 2.0])
    with Mode() as mode:
        F.l1_loss(torch.zeros(2), torch.ones(2), weight=weight)
    assert mode.found is weight, gone("F.l1_loss.__code__")
    assert torch_private.argument_of_caller(F.l1_loss, "weight") is None


def test_views_and_versions() -> None:
    tensor = torch.zeros(3)
    assert torch_private.base_of(tensor[1:]) is tensor, gone("Tensor._base")
    assert torch_private.base_of(tensor) is None
    assert [torch_private.is_view(t) for t in (tensor[1:], tensor)] == [True, False], gone("Tensor._is_view")
    first = torch_private.version(tensor)
    before = torch_private.versions([tensor])
    tensor.add_(1)
    assert torch_private.versions([tensor]) != before, gone("Tensor._version")
    assert torch_private.version(tensor) == first + 1, gone("Tensor._version")
    torch_private.set_version(tensor, *before)
    assert torch_private.versions([tensor]) == before, gone("torch._C._autograd._unsafe_set_version_counter")


def test_hooks_of_tensors() -> None:
    tensor = torch.zeros(3, requires_grad=True) * 1
    assert not torch_private.has_hooks(tensor), gone("Tensor._backward_hooks")
    tensor.register_hook(lambda gradient: None)
    assert torch_private.has_hooks(tensor), gone("Tensor._backward_hooks")


def test_rows_of_packed_sequences() -> None:
    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    value = torch.arange(6.0).reshape(2, 3)
    with Mode() as mode:
        packed = nn.utils.rnn.pack_padded_sequence(value, torch.tensor([1, 3]), True, False)
        filled, lengths = nn.utils.rnn.pad_packed_sequence(packed, True)
    assert torch_private.packed_rows in mode.seen, gone("torch._VF._pack_padded_sequence")
    assert torch_private.filled_rows in mode.seen, gone("torch._VF._pad_packed_sequence")
    assert Tensor.index_select in mode.seen, gone("the sorting of `enforce_sorted=False`")
    assert filled.tolist() == [[0, 0, 0], [3, 4, 5]]
    assert lengths.tolist() == [1, 3]


@pytest.mark.parametrize(
    "path", ["_orig_mod.body.0", "body._orig_mod.0", "body.0._orig_mod", "body._orig_mod._orig_mod.0", "body.0"]
)
def test_names_of_compiled_modules(path: str) -> None:
    assert torch_private.eager_name(path) == "body.0"
    assert torch_private.eager_name("_orig_mod") == ""


def test_compiled_modules_and_functions() -> None:
    layer = nn.Linear(2, 2)
    assert not torch_private.is_compiled(layer)
    wrapped = torch.compile(layer, backend="eager")
    assert torch_private.is_compiled(wrapped), gone("torch._dynamo.eval_frame.OptimizedModule")
    assert list(dict(wrapped.named_modules()))[1] == "_orig_mod", gone("name _orig_mod of compiled modules")
    assert torch_private.is_compiled(torch.compile(F.relu, backend="eager")), gone("_torchdynamo_orig_callable")
    layer.compile(backend="eager")
    assert torch_private.is_compiled(layer), gone("Module._compiled_call_impl")
    with torch_private.meets_compiled() as met:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert met.found, gone('stance "fail_on_recompile"')
    with torch_private.eagerly():
        assert wrapped(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loaders(workers: int) -> None:
    """These are used where batches are tagged, in ``data/tagging.py``."""
    loader: Any = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, num_workers=workers)
    assert hasattr(DataLoader, "_get_iterator"), gone("DataLoader._get_iterator")
    iterator = loader._get_iterator()
    assert hasattr(type(iterator), "_next_data"), gone(f"{type(iterator).__name__}._next_data")
    assert workers or hasattr(iterator._dataset_fetcher, "fetch"), gone("_SingleProcessDataLoaderIter._dataset_fetcher")
    assert torch.equal(iterator._next_data()[0], torch.tensor([0, 1])), gone("_next_data")
    kind: Any = torch.utils.data._DatasetKind
    assert isinstance(inspect.getattr_static(kind, "create_fetcher"), staticmethod), gone("_DatasetKind.create_fetcher")
    assert hasattr(torch.utils.data._utils.worker, "_worker_loop"), gone("_worker_loop")
