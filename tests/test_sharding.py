"""Modules that ``fully_shard`` has split are whole for the time of extra passes; here over one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_callback_fsdp import Net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from which_lightning import MisconfigurationException, ModelParallelStrategy

from lightning_influence.callbacks import bridge
from lightning_influence.core import torch_private
from lightning_influence.core.isolation import changes_in, untouched
from lightning_influence.core.sharding import apart, gathered, is_shard, is_split, names_of, whole


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def split(module: Net) -> Net:
    mesh = init_device_mesh("cpu", (1,))
    fully_shard([module.again, module.once_more], mesh=mesh)
    for part in (module.steps, module.head, module):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(module, "logits")
    return module


@pytest.fixture
def pair() -> tuple[Net, Net]:
    """A split network, and the same one whole."""
    torch.manual_seed(0)
    plain = Net()
    return split(copy.deepcopy(plain)), plain


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(module(x).square().sum(), trained))


def test_within_it_is_the_plain_module(pair: tuple[Net, Net]) -> None:
    module, plain = pair
    x = torch.randn(4, 5)
    with whole(module):
        assert not any(map(is_shard, module.parameters()))
        assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert module.again.weight is module.once_more.weight
        assert all(p.is_leaf and type(p) is nn.Parameter for p in module.parameters())
        flags = [(p.requires_grad, p.shape) for p in module.parameters()]
        assert flags == [(p.requires_grad, p.shape) for p in plain.parameters()]
        assert torch.equal(module(x), plain(x))
        for found, expected in zip(gradients(module, x), gradients(plain, x), strict=True):
            assert torch.equal(found, expected)
        assert {name: value.shape for name, value in module.state_dict().items()} == {
            name: value.shape for name, value in plain.state_dict().items()
        }


def everything(module: nn.Module) -> list[Any]:
    """What a module holds, by identity, and the values of its shards."""
    tables = [
        (id(table), list(table.items()))
        for part in module.modules()
        for table in (part._parameters, part._buffers, part._forward_hooks, part._forward_pre_hooks)
    ]
    states = [sorted(vars(part._get_fsdp_state())) for part in torch_private.fsdp_modules(module)]
    steps: Any = module.steps
    lists = [(id(kept), [id(each) for each in kept]) for kept in (steps._flat_weights, steps._flat_weight_refs)]
    return [tables, states, lists, [gathered(p).tolist() for p in module.parameters()]]


def test_afterwards_all_is_as_it_was(pair: tuple[Net, Net]) -> None:
    module, _ = pair
    before = everything(module)

    def pass_that_fails() -> None:
        with whole(module), torch.no_grad():
            module(torch.randn(2, 5))
            for p in module.parameters():
                p.add_(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pass_that_fails()
    # Also of one process, whose shards hold all that there is.
    assert everything(module) == before


def test_one_that_is_still_gathered() -> None:
    """As the outermost one is after an evaluation."""
    plain, x = nn.Linear(5, 2), torch.randn(3, 5)
    module: Any = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        module(x)
    assert not is_shard(module.weight)
    with whole(module):
        kept = module.weight
        assert torch.equal(module(x), plain(x))
    with whole(module):
        assert module.weight is kept, "what is known of a parameter goes by identity"


def test_training_goes_on(pair: tuple[Net, Net]) -> None:
    module, plain = pair
    for net in (module, plain):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            with whole(net):
                gradients(net, torch.ones(2, 5))
            optimizer.zero_grad()
            net(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(gathered(one), other)


def test_outside_nothing_looks_like_a_number(pair: tuple[Net, Net]) -> None:
    module, _ = pair
    with whole(module), whole(module):
        kept = list(module.parameters())
    for parameter, shard in zip(kept, module.parameters(), strict=True):
        assert parameter.shape == shard.shape
        assert bool(parameter.isnan().all())
        assert parameter.untyped_storage().nbytes() <= 8


def test_names_are_those_of_shards_and_of_what_stands_for_them(pair: tuple[Net, Net]) -> None:
    module, _ = pair
    shards = {id(p): name for name, p in module.named_parameters()}
    with whole(module):
        parameters = {id(p): name for name, p in module.named_parameters()}
        assert names_of(module) == shards | parameters
    assert names_of(module) == shards | parameters


def test_what_no_group_holds_is_told(pair: tuple[Net, Net]) -> None:
    module, plain = pair
    assert (apart(module), is_split(module)) == ([], True)
    assert not is_split(plain)
    fully_shard(plain.head, mesh=init_device_mesh("cpu", (1,)))
    left = [name for name, p in plain.named_parameters() if p.requires_grad and not name.startswith("head")]
    assert apart(plain) == left


def test_shards_that_a_step_writes_to_are_put_back() -> None:
    """Those that a module keeps for itself, such as an average."""
    module, shard = nn.Linear(2, 2), fully_shard(nn.Linear(3, 3), mesh=init_device_mesh("cpu", (1,))).weight
    module.average = {"weight": shard.detach()}  # type: ignore[assignment]
    before = gathered(shard)
    with untouched(module), torch.no_grad():
        module.average["weight"].mul_(2)  # type: ignore[index, union-attr, operator]
    assert torch.equal(gathered(shard), before)
    assert changes_in(module) == ["average['weight']"]


def test_private_names() -> None:
    """Each with what it is needed for."""
    module = split(Net())
    state = module._get_fsdp_state()  # type: ignore[operator]
    gone = f"torch {torch.__version__} has another {{}}: mend lightning_influence/core/torch_private.py"
    for name in ("_pre_forward", "_post_forward"):
        assert callable(getattr(state, name, None)), gone.format(f"FSDPState.{name}")
    assert isinstance(module.first.weight._local_tensor, Tensor), gone.format("DTensor._local_tensor")
    with torch_private.without_fsdp(module):
        left = [
            hook
            for part in module.modules()
            for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        ]
    assert not left, gone.format("module of FSDP's hooks")
    for name in ("_init_flat_weights", "_flat_weights", "_flat_weight_refs"):
        assert hasattr(module.steps, name), gone.format(f"RNNBase.{name}")


@pytest.mark.parametrize(
    ("sizes", "told"), [((2, 1), None), ((1, 2), r"tensor_parallel_size=2\).*tensor_parallel_size=1.*ckpt_path=")]
)
def test_tensor_parallelism_is_refused(sizes: tuple[int, int], told: str | None) -> None:
    class Mesh:
        mesh_dim_names = ("data_parallel", "tensor_parallel")

        def __getitem__(self, name: str) -> Any:
            return SimpleNamespace(size=lambda: sizes[self.mesh_dim_names.index(name)])

    strategy = ModelParallelStrategy(*sizes)
    strategy._device_mesh = Mesh()
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=1)
    if told is None:
        bridge.check_strategy(trainer)
        return
    with pytest.raises(MisconfigurationException, match=told):
        bridge.check_strategy(trainer)
