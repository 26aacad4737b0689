"""What everything else stands on: nested containers, weights for the time of a block, errors of memory."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.core.containers import leaves, map_tensors, tensors_in
from lightning_influence.core.memory import is_out_of_memory
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
    assert type(mapped) is (dict if isinstance(node, UserDict) else type(node))


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


def test_an_allocation_that_fails_on_the_host_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
