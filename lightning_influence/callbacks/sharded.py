"""Strategies that split the model: which of them an audit can follow, and the way out of the others."""

from __future__ import annotations

from typing import Any, NoReturn

from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    package_of,
)
from lightning_influence.core.sharding import apart, is_split
from lightning_influence.gradients.coverage import listed
from lightning_influence.training.settings import TracIn

AFTERWARDS = (
    "audit a checkpoint afterwards on one device: `InfluenceAudit().audit(model, data, ckpt_path=...)`, see "
    "docs/processes.md"
)


def of_deepspeed(of: object, path: str) -> str:
    """Return what to do with a checkpoint of DeepSpeed, a directory, by the package of something of Lightning."""
    return (
        f"put the checkpoint's parts together by `from {package_of(of)}.utilities.deepspeed import "
        f"convert_zero_checkpoint_to_fp32_state_dict as whole; whole('{path}', '{path}/whole.ckpt')`"
    )


def check_split(strategy: Any) -> None:
    """Refuse strategies of which passes can't be made of the whole model.

    Raises:
        MisconfigurationException: For tensor parallelism, FSDP1, and DeepSpeed.
    """
    if is_a(strategy, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            "InfluenceAudit does not support DeepSpeedStrategy, which trains parameters of its own in place of the "
            "model's. Train with DDP or FSDP2, or train without the audit and make it afterwards on one device: "
            f"{of_deepspeed(strategy, '<checkpoint>')}, then `InfluenceAudit().audit(model, data, "
            'ckpt_path="<checkpoint>/whole.ckpt")`.'
        )
    if is_a(strategy, "FSDPStrategy"):
        raise MisconfigurationException(
            "InfluenceAudit does not support FSDPStrategy, which makes the parameters of layers anew in every pass. "
            "Train with FSDP2, `ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=...)` and "
            f"`fully_shard` in `configure_model`, or {AFTERWARDS}."
        )
    mesh = strategy.device_mesh
    parallel = mesh["tensor_parallel"].size() if "tensor_parallel" in (mesh.mesh_dim_names or ()) else 1
    if parallel > 1:
        raise MisconfigurationException(
            f"InfluenceAudit does not support {type(strategy).__name__}(tensor_parallel_size={parallel}), with which "
            "several processes see the same examples. Pass `tensor_parallel_size=1`, which leaves FSDP2, or "
            f"{AFTERWARDS}."
        )


def check_one_file(trainer: Trainer) -> None:
    """Refuse checkpoints that are spread over processes, where one is to be read.

    Raises:
        MisconfigurationException: If that is how the strategy saves them.
    """
    if is_a(trainer.strategy, "ModelParallelStrategy") and getattr(
        trainer.strategy, "_save_distributed_checkpoint", False
    ):
        raise MisconfigurationException(
            'InfluenceAudit(weights="best") reads a checkpoint, and this run spreads each over many files. Pass '
            "`ModelParallelStrategy(save_distributed_checkpoint=False)`, or leave `weights` out."
        )


def check_shards(trainer: Trainer, module: LightningModule, tracin: TracIn | None) -> None:
    """Refuse what can't be followed in a model that is split, once it is set up.

    Raises:
        MisconfigurationException: For parameters of which each process has its own, and TracIn in flight.
    """
    if not is_a(trainer.strategy, "ModelParallelStrategy"):
        return
    if trainer.world_size > 1 and (alone := apart(module)):
        raise MisconfigurationException(
            f"there is no one model to audit: each process has its own {listed(alone, 4)}, as no `fully_shard` covers "
            f"that. Call it in `configure_model` of {type(module).__name__} on what holds it, too, or freeze it, the "
            "same everywhere (`seed_everything`)."
        )
    if is_split(module) and tracin is not None and tracin.mode == "step":
        raise MisconfigurationException(
            'TracIn in flight does not know the parameters that FSDP2 gathers for each step. Pass `tracin="epoch"`.'
        )


def check_afterwards(trainer: Trainer) -> None:
    """Refuse to set a split model up anew.

    Raises:
        MisconfigurationException: If the trainer has a strategy that splits it.
    """
    if is_a(trainer.strategy, "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"audit(trainer=...) has a {type(trainer.strategy).__name__}, which would split the model once more. Leave "
            f"the trainer out, and in a process of its own {AFTERWARDS}."
        )


def refuse_later() -> NoReturn:
    """Refuse passes once training has ended, which one process would make without the others."""
    raise RuntimeError(f"after training with FSDP2 every process holds a part of the model. To ask more, {AFTERWARDS}.")
