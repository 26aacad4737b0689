"""Checkpoint files of trainers: found, read without running anything that lies in them, and put into a model."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_influence.callbacks.lightning import LightningModule, Trainer, callbacks_of, is_a, of_package, package_of
from lightning_influence.callbacks.sharded import of_deepspeed
from lightning_influence.core.errors import short
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.torch_private import eager_name
from lightning_influence.core.weights import places_of, swapped
from lightning_influence.gradients.coverage import listed

StrPath = str | os.PathLike[str]

_NAMED = 3
_WHICH = ("best", "last")


class CheckpointFileError(ValueError):
    """A checkpoint that can't be found or read, or that is of another model; the message says which and the way out."""


@dataclass(frozen=True, eq=False)
class TrainerCheckpoint:
    """What a file holds: all that ``trainer.save_checkpoint`` writes, or a model's ``state_dict()`` alone.

    Attributes:
        path: Of the file.
        content: Of the file; with ``state_dict`` in any case.
    """

    path: str
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str, module: LightningModule) -> TrainerCheckpoint:
        """Read a file, tensors on the host, as Lightning reads what it has saved.

        Args:
            path: Of the file, or its address.
            module: A module of the package of Lightning to read it with.

        Raises:
            CheckpointFileError: If there is none, or it is no checkpoint.
        """
        if _is_distributed(path):
            package = package_of(module)
            fabric = {"lightning.pytorch": "lightning.fabric"}.get(package, "lightning_fabric")
            raise CheckpointFileError(
                f"{path} is a distributed checkpoint, a part from each process. Put it together by `python -m {fabric}."
                f"utilities.consolidate_checkpoint {path}` ({package}.utilities for one of FSDPStrategy) and pass "
                f"{path}.consolidated, or train with `ModelParallelStrategy(save_distributed_checkpoint=False)`."
            )
        if _is_of_deepspeed(path):
            raise CheckpointFileError(
                f"{path} is a checkpoint of DeepSpeed, of which each process has written a part. "
                f"P{of_deepspeed(module, path)[1:]}, and pass {path}/whole.ckpt."
            )
        try:
            content = of_package(module, "core.saving", "pl_load")(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointFileError(f"there is no checkpoint {path}{_beside(path)}.") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            told = " ".join(str(error).split())
            if object_found := re.search(r"Unsupported global: GLOBAL (\S+)", told):
                raise CheckpointFileError(
                    f"{path} holds objects other than tensors and plain values, a {object_found[1]}, which may run "
                    "code when they are read. If you trust it, allow that by `torch.serialization.add_safe_globals("
                    f"[{object_found[1]}])`, or load the model yourself and audit it without `ckpt_path`."
                ) from error
            raise CheckpointFileError(
                f"{path} can't be read as a checkpoint ({type(error).__name__}: {short(told)}): it may be cut off, or "
                "another kind of file. Expected what `trainer.save_checkpoint` or `torch.save(model.state_dict())` "
                "writes."
            ) from error
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            return cls(path, content)
        if isinstance(content, Mapping) and content and any(isinstance(v, Tensor) for v in content.values()):
            return cls(path, {"state_dict": content})
        found = (
            f"the keys {listed(list(content), 5)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        )
        raise CheckpointFileError(
            f"{path} holds {found}; expected a checkpoint of a Trainer, or a model's `state_dict()` (save that alone)."
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps by then; 0 if that is not known."""
        return int(self.content.get("global_step", 0))

    @property
    def epochs(self) -> int:
        """Number of epochs that had begun by then, 0 if that is not known."""
        progress = self.content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
        begun = progress.get("ready", self.content.get("epoch", -1) + 1)
        return max(int(begun), 0)

    @property
    def batches(self) -> float:
        """Number of batches of an epoch, infinite if that is not known."""
        progress = self.content.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        return float(progress["current"]["ready"]) if progress.get("is_last_batch") else math.inf

    @property
    def scheduled_by_step(self) -> bool:
        """Whether learning rates may have been others at every step."""
        return any(state.get("last_epoch", 0) > self.epochs for state in self.content.get("lr_schedulers", ()))

    @property
    def name(self) -> str:
        """Name of the file."""
        return os.path.basename(self.path)

    @property
    def averaged(self) -> bool:
        """Whether the weights are those of an averaging callback, beside those that the optimizer had reached."""
        return "current_model_state" in self.content

    @property
    def weights(self) -> Mapping[str, Any]:
        """The weights by name: those that Lightning evaluates."""
        state: Mapping[str, Any] = self.content["state_dict"]
        return state

    @property
    def optimizer_states(self) -> list[dict[str, Any]]:
        """The optimizers' states; those of a distributed checkpoint have names for parameters in place of numbers."""
        apart = (self.content.get(f"optimizer_{number}") for number in itertools.count())
        return list(self.content.get("optimizer_states") or itertools.takewhile(lambda state: state is not None, apart))

    @property
    def by_name(self) -> dict[str, Any]:
        """The same, by names that do not tell what was compiled."""
        return _by_name(self.weights)

    def check_fits(self, module: LightningModule) -> None:
        """Raise ``CheckpointFileError``, with the first parameters that differ, if it is of another model."""
        kind, own, held = type(module).__name__, _by_name(module.state_dict()), self.by_name
        differ = [
            f"{name!r} has the shape {list(value.shape)} there and {list(own[name].shape)} in {kind}"
            for name, value in held.items()
            if isinstance(value, Tensor)
            and isinstance(own.get(name), Tensor)
            and not is_lazy(own[name])
            and own[name].shape != value.shape
        ]
        if module.strict_loading:
            differ += [f"it lacks {name!r} of {kind}" for name in own if name not in held]
            differ += [f"it holds {name!r}, which {kind} has not" for name in held if name not in own]
        if not differ:
            return
        more = f"; and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
        raise CheckpointFileError(
            f"{self.path} is a checkpoint of another model: {'; '.join(differ[:_NAMED])}{more}. Build the model as it "
            f"was trained{self._made_with(module)}."
        )

    def _made_with(self, module: LightningModule) -> str:
        """Return which hyperparameters were others, as far as both tell."""
        then, now = self.content.get("hyper_parameters") or {}, module.hparams
        other = [
            f"{name}={short(value)}" for name, value in then.items() if name in now and short(now[name]) != short(value)
        ]
        return f", with {', '.join(other)}" if other else ""

    def load_into(self, module: LightningModule) -> None:
        """Load the weights for good, as a Trainer does.

        Raises:
            CheckpointFileError: If it is of another model.
        """
        content = dict(self.content)
        module.on_load_checkpoint(content)  # which may rename or drop what it has saved
        file = TrainerCheckpoint(self.path, content)
        file.check_fits(module)
        names = {eager_name(name): name for name in module.state_dict()}
        weights = {names.get(eager_name(name), name): value for name, value in file.weights.items()}
        module.load_state_dict(weights, strict=module.strict_loading)

    @contextmanager
    def loaded(self, module: LightningModule, *, trained: bool = False) -> Iterator[None]:
        """Put the weights into the module within a ``with`` block; afterwards every bit is as it was.

        Args:
            module: The module.
            trained: Those that the optimizer had reached, where the file holds an average beside them.

        Raises:
            CheckpointFileError: If it is of another model.
        """
        self.check_fits(module)
        places = places_of(module)
        held = _by_name(self.content.get("current_model_state", self.weights) if trained else self.weights)
        with swapped(places, {name: value for name, value in held.items() if name in places}):
            yield


def found(ckpt_path: StrPath | None, trainer: Trainer | None) -> str | None:
    """Return the path of a checkpoint: a path, that in a directory, or that which a Trainer calls best or last.

    Raises:
        CheckpointFileError: If there is none, or several.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in _WHICH:
        return _of_trainer(str(ckpt_path), trainer)
    if not isinstance(ckpt_path, (str, os.PathLike)):
        raise CheckpointFileError(f'ckpt_path={short(ckpt_path)}; expected a path, "best", "last" or None.')
    path = os.path.expanduser(os.fspath(ckpt_path))
    if not os.path.isdir(path) or _is_distributed(path) or _is_of_deepspeed(path):
        return path
    files = sorted(file for pattern in ("*.ckpt", "checkpoints/*.ckpt") for file in Path(path).glob(pattern))
    if len(files) == 1:
        return str(files[0])
    held = f"holds {listed([str(file.relative_to(path)) for file in files], 8)}" if files else "holds no *.ckpt"
    raise CheckpointFileError(f"{path} {held}; pass the path of one checkpoint.")


def _is_distributed(path: str) -> bool:
    """Tell whether a directory is one checkpoint, with a file for each process."""
    return os.path.isfile(os.path.join(path, ".metadata"))


def _is_of_deepspeed(path: str) -> bool:
    return os.path.isdir(path) and any(Path(path).glob("*/*model_states.pt"))


def _of_trainer(which: str, trainer: Trainer | None) -> str:
    if trainer is None:
        raise CheckpointFileError(
            f"ckpt_path={which!r} is what a Trainer knows of its own run; pass that one as `trainer=`, or the path of "
            "a checkpoint."
        )
    keepers = keepers_of(trainer)
    for keeper in keepers:
        if path := best_of(keeper) if which == "best" else last_of(keeper):
            return path
    without = "has no ModelCheckpoint" if not keepers else "has saved none yet (in this process)"
    raise CheckpointFileError(f"ckpt_path={which!r}: the Trainer {without}; pass the path of a checkpoint.")


def keepers_of(trainer: Trainer) -> Sequence[Any]:
    """Return the trainer's ``ModelCheckpoint`` callbacks, those that monitor something first."""
    keepers = [each for each in callbacks_of(trainer) if is_a(each, "ModelCheckpoint")]
    return sorted(keepers, key=lambda keeper: keeper.monitor is None)


def best_of(keeper: Any) -> str:
    """Return the path of the best checkpoint that a ``ModelCheckpoint`` has kept; empty for none."""
    return str(keeper.best_model_path)


def last_of(keeper: Any) -> str:
    """Return the path of the last checkpoint that a ``ModelCheckpoint`` has kept; empty for none."""
    path = str(keeper.last_model_path or getattr(keeper, "_last_checkpoint_saved", ""))
    return path if os.path.exists(path) else ""


def folder_of_run(path: str) -> str | None:
    """Return the directory of the run that a checkpoint is of, if it lies on this machine."""
    if "://" in path:
        return None
    folder = Path(path).resolve().parent
    return str(folder.parent if folder.name == "checkpoints" else folder)


def _by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    return {eager_name(name): value for name, value in state.items()}


def _beside(path: str) -> str:
    folder = Path(path).parent
    near = sorted(file.name for file in folder.glob("*.ckpt")) if "://" not in path and folder.is_dir() else []
    return f"; {folder} holds {listed(near, 5)}" if near else ""


def precision_of(weights: Mapping[str, Any]) -> str:
    """Return the ``precision=`` of a Trainer in which weights stay as they are."""
    kinds = {str(value.dtype) for value in weights.values() if isinstance(value, Tensor) and value.is_floating_point()}
    names = {"torch.float64": "64-true", "torch.bfloat16": "bf16-true", "torch.float16": "16-true"}
    return names.get(kinds.pop(), "32-true") if len(kinds) == 1 else "32-true"
