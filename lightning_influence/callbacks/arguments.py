"""The callback's arguments, checked: each error names the value and what is allowed."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_influence.audit.naming import Ids, check_naming
from lightning_influence.audit.queries import Queries
from lightning_influence.callbacks.chosen_weights import Weights
from lightning_influence.callbacks.loaders import LoaderName, check_loader
from lightning_influence.callbacks.query_report import described
from lightning_influence.core.errors import is_number, short
from lightning_influence.core.indices import Indices, integers
from lightning_influence.curvature import CurvatureName, Damping, Fisher, Solver
from lightning_influence.data.ids import SampleId, check_sample_id
from lightning_influence.gradients.coverage import Layers, Uncovered, listed_layers
from lightning_influence.index.settings import Index, check_indexed
from lightning_influence.influence.inputs import (
    check_choice,
    check_curvature_choices,
    check_factor_examples,
    check_layers,
)
from lightning_influence.objective.task import Task
from lightning_influence.replay.settings import Record
from lightning_influence.training.settings import Mode, TracIn, check_overhead


@dataclass(frozen=True, eq=False)
class Arguments:
    """Those of ``InfluenceAudit``.

    Raises:
        ValueError: If one is out of range.
    """

    curvature: CurvatureName
    fisher: Fisher
    damping: Damping
    solver: Solver
    factor_examples: int | Literal["auto"] | None
    tracin: TracIn | None
    layers: Layers
    uncovered: Uncovered
    task: Task | None
    queries: Queries | None
    known_noise: Tensor | None
    trusted: Tensor | None
    dirpath: str | os.PathLike[str] | None
    verify: bool
    ids: Ids = None
    describe: Any = None
    weights: Weights = "last"
    sample_id: SampleId | None = None
    loader: LoaderName = None
    record: Record | None = None
    index: Index | None = None

    def __post_init__(self) -> None:
        check_curvature_choices(self.curvature, self.fisher, self.solver)
        check_choice("uncovered", self.uncovered, get_args(Uncovered))
        check_layers(self.layers)
        check_choice("weights", self.weights, get_args(Weights))
        _check_damping(self.damping)
        if self.index is not None:
            check_indexed(self.curvature)
        check_factor_examples(self.factor_examples)
        check_naming(self.ids, self.describe)
        check_sample_id(self.sample_id)
        check_loader(self.loader)
        if self.trusted is not None and self.known_noise is not None:
            both = self.trusted[torch.isin(self.trusted, self.known_noise)].tolist()
            if both:
                raise ValueError(
                    f"the examples {both[:10]} are in trusted and in known_noise; expected one or the other."
                )
        if self.queries is not None and self.queries.method == "replay":
            if self.record is not None and self.record.max_cost == 0:
                raise ValueError(
                    'Queries(method="replay") takes time, which Record(max_cost=0) does not allow; expected a number '
                    "of seconds > 0, or None for no limit."
                )
            object.__setattr__(self, "record", self.record or Record())
        if self.task is not None and not callable(self.task):
            raise ValueError(f"task={short(self.task)} is not callable; expected a function (module, batch) -> loss.")

    @property
    def fitting(self) -> dict[str, Any]:
        """Those that say how a curvature is fitted, for ``Influence.fit``."""
        return {name: getattr(self, name) for name in ("curvature", "fisher", "damping", "solver", "factor_examples")}

    def described(self) -> dict[str, Any]:
        """Return them in terms of JSON."""
        layers, task = self.layers, self.task
        # Numbers of numpy would make the Trainer's checkpoint unreadable with `weights_only`.
        numbers = {"damping": float, "factor_examples": int}
        plain = {
            name: value if value is None or isinstance(value, str) else numbers[name](value)
            for name, value in self.fitting.items()
        }
        return plain | {
            "tracin": None if self.tracin is None else self.tracin.described(),
            "layers": None if layers is None else [getattr(each, "__name__", each) for each in listed_layers(layers)],
            "uncovered": self.uncovered,
            "queries": described(self.queries),
            "task": None if task is None else getattr(task, "__name__", type(task).__name__),
            "verify": self.verify,
            "weights": self.weights,
            **({} if self.loader is None else {"loader": self.loader}),
            **({} if self.index is None else {"index": asdict(self.index)}),
        }


def checked_tracin(value: object, overhead: float | None) -> TracIn | None:
    """Return the settings that a word stands for, within a budget; raise ``ValueError`` for anything else."""
    check_overhead(overhead)
    if value is None:
        return None
    if isinstance(value, TracIn):
        own = value.overhead
        more = value.mode == "auto" if own is None else overhead is not None and own > overhead
        return replace(value, overhead=overhead) if more else value
    if value not in get_args(Mode):
        raise ValueError(
            f'tracin={short(value)}; expected "auto" (passes at epoch ends, within `overhead`), "epoch" (at all of '
            'them), "step" (in flight), None, or TracIn(...).'
        )
    return checked_tracin(TracIn(mode=value), overhead)  # type: ignore[arg-type]


def checked_indices(name: str, indices: Indices | None) -> Tensor | None:
    """Return distinct dataset indices as a tensor; raise ``ValueError`` for anything else."""
    if indices is None:
        return None
    try:
        chosen = integers(indices) if hasattr(indices, "__len__") else []
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not chosen:
        raise ValueError(f"{name}={indices!r} holds no indices; expected a list of dataset indices, one at least.")
    if min(chosen) < 0 or len(set(chosen)) != len(chosen):
        raise ValueError(f"{name} holds negative or repeated indices; expected distinct dataset indices >= 0.")
    return torch.tensor(chosen)


def _check_damping(damping: Any) -> None:
    """Raise ``ValueError`` unless the damping is a finite number > 0 or a rule."""
    if isinstance(damping, str) and damping in ("auto", "relative", "trainer"):
        return
    if not is_number(damping, above=0):
        raise ValueError(
            f'damping={short(damping)}; expected a number > 0, "relative" (0.1 times the mean eigenvalue), "trainer" '
            '(1 / sum of step sizes) or "auto".'
        )
