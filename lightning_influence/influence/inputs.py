"""What a user hands in, as the engine takes it: a loss, data, indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, get_args

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from lightning_influence.audit.indices import Indices as Many
from lightning_influence.audit.indices import integers
from lightning_influence.curvature import SOLVERS, CurvatureName, Fisher, Solver, check_solver
from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.gradients.verify import Inspection
from lightning_influence.gradients.visitors import ExampleScores, in_order
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.objective.terms import TaskError

Loss: TypeAlias = "Task | nn.Module | Callable[..., Tensor]"
Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | Sequence[Any]"
Indices: TypeAlias = "int | Many"

LOSSES = (
    "a function (model, batch) -> loss, a torch loss such as `nn.CrossEntropyLoss()` or `F.cross_entropy` for batches "
    "(inputs, targets), or None for the model's own `training_step`"
)


@dataclass(frozen=True)
class LossOfOutputs:
    """``loss(model(inputs), targets)`` of batches ``(inputs, targets)``, as a task."""

    loss: Callable[..., Tensor]

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            what = type(batch).__name__ + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
            raise TaskError(
                f"{_name(self.loss)} is applied to batches (inputs, targets), and this one is a {what}; pass a "
                "function (model, batch) -> loss instead."
            )
        return self.loss(module(batch[0]), batch[1])


def task_of(model: nn.Module, loss: Loss | None) -> Task:
    """Return the task that a loss stands for.

    Raises:
        TypeError: If it is none, or there is none.
    """
    if loss is None and not callable(getattr(model, "training_step", None)):
        raise TypeError(f"{type(model).__name__} has no `training_step` to take the loss from; pass {LOSSES}.")
    if loss is None:
        return TrainingStepTask()
    if isinstance(loss, type) or not callable(loss):
        told = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"the loss is {told}; expected {LOSSES}.")
    inner = loss.func if isinstance(loss, partial) else loss
    if isinstance(loss, nn.Module) or getattr(inner, "__module__", "") == "torch.nn.functional":
        return LossOfOutputs(loss)
    return loss


def source_of(data: Data, batch_size: int | None = None) -> tuple[ExampleSource, Sequence[int]]:
    """Return the examples of a data set or of a loader, and the indices of those that it draws from.

    Raises:
        DataError: If they have no index.
    """
    if isinstance(data, DataLoader):
        sampler = getattr(data.batch_sampler, "sampler", None)
        source = ExampleSource.from_loader(data, batch_size)
        if isinstance(sampler, SubsetRandomSampler):
            return source, sorted({int(index) for index in sampler.indices})
    elif all(isinstance(item, Tensor) for item in (data if type(data) is tuple else [data])):
        raise DataError(
            f"the data are a {type(data).__name__}; expected a data set or a DataLoader: tensors become one by "
            "`TensorDataset(inputs, targets)`."
        )
    else:
        source = ExampleSource(data, batch_size=batch_size or 32)  # type: ignore[arg-type]
    if not len(source):
        raise DataError(f"{type(source.dataset).__name__} is empty; expected some examples.")
    return source, range(len(source))


def positions(indices: Indices | None, known: Sequence[int], what: str) -> list[int]:
    """Return dataset indices as a list; all that are known by default.

    Args:
        indices: One index or many.
        known: The indices that there are.
        what: What they are of, for errors.

    Raises:
        ValueError: If there is none, or one is no integer or unknown.
    """
    if indices is None:
        return list(known)
    chosen = integers(indices)
    if not chosen:
        raise ValueError(f"there is no index of the {what}; pass at least one, or None for all.")
    every = known if isinstance(known, range) else set(known)
    if outside := [index for index in chosen if index not in every]:
        raise ValueError(
            f"the {what} has no example {outside[:10]}; expected indices among {len(every):,} from {min(every)} to "
            f"{max(every)}."
        )
    return chosen


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ``ValueError`` for an argument that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}.")


def notes_of(inspection: Inspection) -> list[str]:
    """Return what a reader of the scores should know of the loss."""
    notes = []
    if not inspection.tapped:
        notes.append(
            "no known loss call accounts for the whole loss: the Fisher is empirical, and no predictions, margins or "
            f"suggested labels come from it ({known_losses()} are known)"
        )
    if inspection.random:
        notes.append("the loss draws random numbers in eval mode: scores hold for one draw, and depend on batches")
    return notes


def check_curvature_choices(curvature: CurvatureName, fisher: Fisher, solver: Solver) -> None:
    """Raise ``ValueError`` for a curvature, labels or a solver that there are none of, or not together."""
    check_choice("curvature", curvature, get_args(CurvatureName))
    check_choice("fisher", fisher, get_args(Fisher))
    check_choice("solver", solver, ("auto", "dense", *SOLVERS))
    check_solver(curvature, solver)


def aligned(scores: ExampleScores, column: str, indices: Sequence[int]) -> Tensor:
    """Return a column in the order of some indices, ``[n]`` on the host; NaN for examples that no batch held."""
    return in_order(indices, scores.indices, scores.columns[column]).cpu()


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
