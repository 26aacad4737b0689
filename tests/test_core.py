"""What everything else stands on: nested containers, weights for the time of a block, errors of memory."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_influence.core import snapshot, states
from lightning_influence.core.containers import leaves, map_tensors, tensors_in
from lightning_influence.core.errors import Forgiving, is_number
from lightning_influence.core.isolation import untouched
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.snapshot import StateError
from lightning_influence.core.weights import swapped

Pair = namedtuple("Pair", "x y")
ONE, TWO = torch.zeros(2), torch.ones(3)


@pytest.mark.parametrize(
    "node",
    [
        (ONE, [TWO, "text"]),
        {"a": ONE, "b": {"c": (None, TWO)}},
        Pair(ONE, Pair("text", TWO)),
        UserDict(a=ONE, b=OrderedDict(c=TWO)),
        torch.return_types.max((ONE, TWO)),
    ],
)
def test_tensors_are_found_and_replaced_in_the_same_order(node: Any) -> None:
    assert [id(tensor) for tensor in tensors_in(node)] == [id(ONE), id(TWO)]
    seen: list[int] = []
    mapped = map_tensors(lambda tensor: seen.append(id(tensor)) or tensor + 1, node)  # type: ignore[func-returns-value]
    assert seen == [id(ONE), id(TWO)]
    assert [tensor.tolist() for tensor in tensors_in(mapped)] == [[1, 1], [2, 2, 2]]
    assert type(mapped) is type(node)  # batches of transformers are asked by attributes


def test_leaves_have_paths_and_a_list_may_hold_itself() -> None:
    assert list(leaves({"a": [1, (2,)], 3: "text"})) == [(("a", 0), 1), (("a", 1, 0), 2), ((3,), "text")]
    loop: list[Any] = [1]
    loop.append(loop)
    assert [path for path, leaf in leaves(loop) if leaf == 1] == [(*[1] * depth, 0) for depth in range(16)]


@pytest.mark.parametrize("error", [None, KeyError])
def test_swapped_weights_are_back_bit_by_bit(error: type[Exception] | None) -> None:
    net = nn.Linear(2, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        with swapped(dict(net.named_parameters()), {"bias": torch.tensor([5.0], dtype=torch.float64)}):
            assert net.bias.tolist() == [5]
            assert torch.equal(net.weight, before["weight"])
            if error is not None:
                raise error
    except KeyError:
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.bias.grad_fn is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("the cache is out of memory slots"), False),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    with pytest.raises(type(error)) if expected else nullcontext(), Forgiving():
        raise error


def test_an_allocation_that_fails_on_the_host_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def holder(**values: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    for name, value in values.items():
        module.register_buffer(name, value) if isinstance(value, Tensor) else setattr(module, name, value)
    return module


def within_a_pass(module: nn.Module, change: Callable[[], Any]) -> None:
    with untouched(module):
        change()


@pytest.mark.parametrize("kind", ["coo", "csr", "quantized", "nested"])
def test_tensors_without_strides_are_put_back(kind: str) -> None:
    """An adjacency matrix among the buffers ended every fit before its first step."""
    dense = torch.eye(4)
    value: Any = {
        "coo": dense.to_sparse,
        "csr": dense.to_sparse_csr,
        "quantized": lambda: torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([dense, dense[:2]]),
    }[kind]()
    module = holder(adjacency=value)
    with untouched(module):
        assert (module.adjacency.dequantize() if kind == "quantized" else module.adjacency) is not None
        if kind in ("coo", "csr"):
            with torch.no_grad():
                module.adjacency.values().mul_(3) if kind == "csr" else module.adjacency.mul_(3)
    if kind in ("coo", "csr"):
        torch.testing.assert_close(module.adjacency.to_dense(), dense)


@pytest.mark.parametrize("write", ["data", "numpy", "counted"])
def test_large_tensors_are_watched(monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    """No version counts a write through `.data` or `.numpy()`."""
    monkeypatch.setattr(snapshot, "_HUGE", 8)
    module = holder(bank=torch.zeros(9))
    place = {"data": lambda: module.bank.data, "numpy": module.bank.numpy, "counted": lambda: module.bank}[write]
    with pytest.raises(StateError, match="bank"):
        within_a_pass(module, lambda: place().__iadd__(1))


def test_an_inference_tensor_that_is_large_stays_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_HUGE", 8)
    with torch.inference_mode():
        bank = torch.ones(9)
    with untouched(holder(bank=bank)):
        pass


def test_what_can_not_be_put_back_does_not_keep_others_from_it() -> None:
    array = np.zeros(3)
    view = array.view()
    view.flags.writeable = False
    module = holder(view=view)
    module.later = bank = [0]
    with pytest.raises(StateError, match="view"):
        within_a_pass(module, lambda: (array.__iadd__(1), bank.__setitem__(0, 5)))
    assert bank == [0]


def test_large_arrays_of_objects_are_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_LARGE_ARRAY", 8)
    with untouched(holder(names=np.array(["a", "b"], dtype=object))):
        pass


@pytest.mark.parametrize("value", [1, 0.5, np.int64(3), np.float32(0.1), 10**300])
def test_numbers(value: Any) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, 1j, torch.inf, float("nan"), np.float32("inf"), 10**400])
def test_what_is_no_finite_number(value: Any) -> None:
    """A whole number beyond all floats raised an ``OverflowError`` in place of the message of the argument."""
    assert not is_number(value)
