"""What a user hands in, as the engine takes it: a loss, data, indices."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from lightning_influence.core.errors import check_count, is_number, short
from lightning_influence.curvature import LADDER, SOLVERS, CurvatureName, Fisher, Solver
from lightning_influence.curvature.choices import check_solver
from lightning_influence.gradients.verify import Inspection
from lightning_influence.gradients.visitors import ExampleScores, in_order
from lightning_influence.objective.losses import known_losses


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
