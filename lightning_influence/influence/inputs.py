"""What a user hands in, as the engine takes it: a loss, data, indices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn import UninitializedParameter

from lightning_influence.core.errors import check_count, is_number, short
from lightning_influence.curvature import LADDER, SOLVERS, CurvatureName, Fisher, Solver
from lightning_influence.curvature.choices import check_solver
from lightning_influence.gradients.verify import Inspection
from lightning_influence.gradients.visitors import ExampleScores, in_order
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.objective.terms import TaskError

Loss: TypeAlias = "Task | nn.Module | Callable[..., Tensor]"

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


def check_model(model: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless this is a module whose parameters have values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch module.")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise TypeError(
            f"the model, {type(model).__name__}, has no parameters; expected the trained model first, then the loss, "
            "then the training data."
        )
    if empty := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise ValueError(
            f"the parameters {empty[:3]} of {type(model).__name__} are on the meta device, without values: "
            '`model.to_empty(device="cpu")`, then load the trained weights.'
        )
    trained = {
        name: p for name, p in parameters.items() if p.requires_grad and not isinstance(p, UninitializedParameter)
    }
    if odd := [name for name, parameter in trained.items() if not bool(parameter.detach().isfinite().all())]:
        raise ValueError(
            f"the parameters {odd[:3]} of {type(model).__name__} hold numbers that are not finite: training has "
            "diverged. Pass the model with the weights of a checkpoint from before."
        )


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


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ``ValueError`` for an argument that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={short(value)}; expected one of {', '.join(map(repr, choices))}.")


def notes_of(inspection: Inspection) -> list[str]:
    """Return what a reader of the scores should know of the loss."""
    notes = []
    if not inspection.tapped:
        notes.append(
            "no known loss call accounts for the whole loss: the Fisher is empirical, and no predictions, margins or "
            f"suggested labels come from it ({known_losses()} are known)"
        )
    if inspection.labels_of:
        notes.append(
            "several losses of a step have labels: `label`, predictions and margins are those of "
            f"{inspection.labels_of}, which comes first in it"
        )
    if inspection.random:
        notes.append("the loss draws random numbers in eval mode: scores hold for one draw, and depend on batches")
    return notes


def check_curvature_choices(curvature: CurvatureName, fisher: Fisher, solver: Solver) -> None:
    """Raise ``ValueError`` for a curvature, labels or a solver that there are none of, or not together."""
    check_choice("curvature", curvature, tuple(dict.fromkeys((*get_args(CurvatureName), *LADDER))))
    check_choice("fisher", fisher, get_args(Fisher))
    check_choice("solver", solver, ("auto", "dense", *SOLVERS))
    check_solver(curvature, solver)


def check_weight_decay(value: object, known: Collection[str]) -> None:
    """Raise ``ValueError`` unless this is a coefficient, or some by parameter name."""
    by_name = value if isinstance(value, Mapping) else {}
    if strangers := [name for name in by_name if name not in known]:
        raise ValueError(
            f"weight_decay names {strangers[:5]}; expected parameters of the model, such as {list(known)[:3]}."
        )
    odd = [each for each in (by_name.values() if isinstance(value, Mapping) else [value]) if not _is_coefficient(each)]
    if odd:
        raise ValueError(f"weight_decay={odd[0]!r}; expected a finite number >= 0, or one by parameter name.")


def _is_coefficient(value: Any) -> bool:
    return is_number(value) and float(value) >= 0


def check_factor_examples(value: object) -> None:
    """Raise ``ValueError`` for a number of examples to fit a curvature on that is none."""
    if value is not None and value != "auto":
        check_count("factor_examples", value, '"auto", None for all examples')


def check_layers(layers: Any) -> None:
    """Raise ``ValueError`` unless ``layers`` is None, or one or several names or types of modules."""
    entries = [] if layers is None else [layers] if isinstance(layers, (str, type)) else layers
    ok = isinstance(entries, Iterable) and (layers is None or len(entries := list(entries)) > 0)
    if not ok or not all(isinstance(e, str) or (isinstance(e, type) and issubclass(e, nn.Module)) for e in entries):
        raise ValueError(
            f"layers={layers!r}; expected None for everything, or names, glob patterns or types of modules, such as "
            '["encoder.*", torch.nn.Linear].'
        )


def aligned(scores: ExampleScores, column: str, indices: Sequence[int]) -> Tensor:
    """Return a column in the order of some indices, ``[n]`` on the host; NaN for examples that no batch held."""
    return in_order(indices, scores.indices, scores.columns[column]).cpu()


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
