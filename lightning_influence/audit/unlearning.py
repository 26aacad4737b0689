"""Parameters as if some training examples had been left out, or had carried other labels: one Newton step.

The mean loss over ``n`` examples has its minimum at ``θ``. Without the examples ``R`` it moves to about
``θ + 1/n (C + λ)⁻¹ Σ_R g_z`` (Koh & Liang 2017, 1703.04730); with other labels to
``θ - 1/n (C + λ)⁻¹ Σ_R (∇ℓ(z̃) - ∇ℓ(z))``. Both are as good as the curvature and the distance to a minimum allow; an
update says how large it is, and is tried on a copy first. After a run,
``InfluenceAudit.unlearner`` has all that it takes.

Index legend: ``m`` removed examples, ``d`` draws of labels, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_influence.audit.relabel import LabelError, Relabelled, find_label
from lightning_influence.core import memory
from lightning_influence.core.precision import exact, wide
from lightning_influence.curvature import BlockCoordinates, Curvature, IndefiniteError
from lightning_influence.curvature.coordinates import joined_gradients
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.examples import mean_gradient
from lightning_influence.scores.plan import InfluencePlan

_Module = TypeVar("_Module", bound=nn.Module)
WeightDecay = float | Mapping[str, float]
Indices = Sequence[int] | Tensor | NDArray[Any]

# The step assumes that the loss is quadratic between the two minima; beyond this share of the weights it hardly is.
_LARGE = 0.1
# The root of what must be left of the curvature in every direction that the removed examples take part in.
_LEAST_LEFT = 1e-4


@dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """A change of parameters, to look at, to try on a copy, and to apply for good.

    Attributes:
        changes: Parameter name, as in ``named_parameters()``, to what is added to it.
        title: What it is.
        notes: What its user should know.
    """

    changes: Mapping[str, Tensor]
    title: str
    notes: list[str] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """Euclidean length of the change."""
        return _length(self.changes.values())

    def relative_norm(self, module: nn.Module) -> float:
        """Return the length of the change over that of the parameters it changes."""
        return self.norm / _length(self._parameters(module).values())

    def applied_to_copy(self, module: _Module) -> _Module:
        """Return a copy of the module with the change made; the module stays as it is."""
        changed = copy.deepcopy(module)
        self.apply(changed)
        return changed

    def apply(self, module: nn.Module) -> None:
        """Make the change, for good; ``applied`` undoes it.

        Raises:
            ValueError: If the module has no such parameters.
        """
        with torch.no_grad():
            for name, parameter in self._parameters(module).items():
                parameter.add_(self.changes[name].to(parameter))

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Make the change within a ``with`` block; afterwards every bit is as it was."""
        parameters = self._parameters(module)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self.apply(module)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    def __repr__(self) -> str:
        lines = [f"{self.title}: {len(self.changes)} parameters move by {self.norm:.3g}"]
        return "\n".join(lines + [f"  note  {note}" for note in self.notes])

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        every = dict(module.named_parameters())
        wrong = [name for name, value in self.changes.items() if name not in every or every[name].shape != value.shape]
        if wrong:
            raise ValueError(f"{type(module).__name__} has no parameters {wrong} of the right shape; pass the model.")
        return {name: every[name] for name in self.changes}


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(wide(tensor.detach()).square().sum()) for tensor in tensors))


class Unlearner:
    """Removal and repair for one trained model: what ``newton_removal`` and ``label_repair`` take, put together once.

    Args:
        gradients: Passes over the training data, at the trained weights.
        curvature: Fitted on them; any of the ladder.
        examples: Dataset indices of the examples that the model was trained on.
        labels: Dataset index to given label, see ``label_repair``; without them labels can't be repaired.
        weight_decay: Coefficient of the L2 term in the loss, see ``newton_removal``.
    """

    def __init__(
        self,
        gradients: ExampleGradients,
        curvature: Curvature,
        examples: Iterable[int],
        *,
        labels: Mapping[int, int] | None = None,
        weight_decay: WeightDecay = 0.0,
    ) -> None:
        self.gradients = gradients
        self.curvature = curvature
        self.examples = frozenset(examples)
        self.labels = dict(labels or {})
        self.weight_decay = weight_decay
        # The gradients are taken when asked for; those of other weights would not go with the curvature.
        self._weights = {name: p.detach().clone() for name, p in _covered(gradients).items()}

    @classmethod
    def fitted(
        cls,
        gradients: ExampleGradients,
        plan: InfluencePlan,
        examples: Sequence[int],
        *,
        labels: Mapping[int, int] | None = None,
        weight_decay: WeightDecay = 0.0,
    ) -> Unlearner:
        """Fit the curvature of a plan at the weights that the model has now.

        Raises:
            ValueError: If no example has finite gradients, or the memory does not suffice.
            IndefiniteError: If the curvature with its damping is not positive definite.
        """
        gradients = gradients.calibrate(examples)
        return cls(gradients, plan.fit(gradients, examples), examples, labels=labels, weight_decay=weight_decay)

    def newton_removal(self, indices: Indices, *, leverage: bool = False) -> ParameterUpdate:
        """Return the change of the parameters that leaving out some examples makes; see the function of that name.

        Args:
            indices: Dataset indices of the examples.
            leverage: Whether to take them out of the curvature, too: what a group needs.

        Raises:
            ValueError: If the model was not trained on an example, or its weights have changed since; and as the
                function.
            IndefiniteError, SolverError, TaskError: As the function.
        """
        self._check(indices)
        return newton_removal(
            self.gradients,
            self.curvature,
            indices,
            len(self.examples),
            weight_decay=self.weight_decay,
            leverage=leverage,
        )

    def label_repair(self, indices: Indices, labels: Indices) -> ParameterUpdate:
        """Return the change of the parameters that training with other labels makes; see the function of that name.

        Args:
            indices: Dataset indices of the examples.
            labels: A new label for each of them.

        Raises:
            LabelError: If a label is not among those of the training data; and as the function.
            ValueError: If there are not as many labels as indices; and as ``newton_removal``.
            SolverError: As the function.
        """
        self._check(indices)
        if len(indices) != len(labels):
            raise ValueError(f"there are {len(indices)} indices and {len(labels)} labels; expected a label for each.")
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        new = dict(zip(_checked(indices, len(self.gradients.source)), values, strict=True))
        classes = set(self.labels.values())
        unknown = {index: label for index, label in new.items() if label not in classes}
        if unknown:
            raise LabelError(
                f"new labels {dict(list(unknown.items())[:5])} are none that the training data have; expected classes "
                f"among {sorted(classes)[:20]}."
                if classes
                else "the given labels are not known, so there is nothing that tells where the data hold them."
            )
        return label_repair(self.gradients, self.curvature, new, len(self.examples), self.labels)

    def _check(self, indices: Indices) -> None:
        strangers = sorted(set(_checked(indices, len(self.gradients.source))) - self.examples)
        if strangers:
            raise ValueError(f"the model was not trained on the examples {strangers[:10]}: there is nothing to undo.")
        now = _covered(self.gradients)
        if any(p.device != self._weights[name].device for name, p in now.items()):
            raise ValueError(
                f"the model has moved to {self.gradients.device} since the curvature was fitted; move it back, or make "
                "another Unlearner."
            )
        if not all(torch.equal(p, self._weights[name]) for name, p in now.items()):
            raise ValueError(
                "the weights have changed since the curvature was fitted (an update applied, a checkpoint loaded, more "
                "training); make another Unlearner, and change all examples of a group at once."
            )


def newton_removal(
    gradients: ExampleGradients,
    curvature: Curvature,
    removed: Indices,
    examples: int,
    *,
    weight_decay: WeightDecay = 0.0,
    leverage: bool = False,
) -> ParameterUpdate:
    """Return the change of the parameters that leaving out some training examples makes, to first order.

    Args:
        gradients: Passes over the training data, at the trained weights.
        curvature: Fitted on them; any of the ladder.
        removed: Dataset indices.
        examples: Number of training examples ``n`` that the loss was the mean of, the removed ones included.
        weight_decay: Coefficient of an L2 term ``½ wd ‖θ‖²`` in the loss, which does not shrink with the data; one for
            all parameters, or by name. The damping of the curvature should hold it.
        leverage: Whether to take the removed examples out of the curvature, too: without it a group moves less than it
            should, the more the larger its share. One solve for each removed example and class.

    Returns:
        The change. Removing all of a group at once is not the sum of its members' changes only with ``leverage``.

    Raises:
        ValueError: If an index is out of range or named twice, nothing or everything is removed, a gradient is not
            finite, or the memory does not suffice.
        TaskError: If ``leverage`` is asked for and the loss has no exact expectation over labels.
        IndefiniteError: If the rest of the data does not determine the parameters with this damping.
        SolverError: If an iterative solver did not reach its tolerance.
    """
    chosen = _checked(removed, len(gradients.source))
    if len(chosen) >= examples:
        raise ValueError(f"{len(chosen)} of {examples} examples are to be removed; expected some to be left.")
    total = _summed(gradients, chosen)
    for name, decayed in _decayed(gradients, weight_decay).items():
        total[name] += len(chosen) * decayed
    step = {name: value / examples for name, value in curvature.solve(total).items()}
    if leverage:
        step = _corrected(gradients, curvature, chosen, examples, step)
    return _update(gradients, step, f"removal of {len(chosen)} of {examples} examples")


def label_repair(
    gradients: ExampleGradients,
    curvature: Curvature,
    labels: Mapping[int, int],
    examples: int,
    known: Mapping[int, int],
) -> ParameterUpdate:
    """Return the change of the parameters that training with other labels makes, to first order.

    Args:
        gradients: Passes over the training data, at the trained weights.
        curvature: Fitted on them; any of the ladder.
        labels: Dataset index to the new label.
        examples: Number of training examples.
        known: Dataset index to given label, of examples of several classes (an audit's ``label`` column): they tell
            where in an example the label lies.

    Raises:
        LabelError: If the label can't be found or replaced.
        ValueError: As ``newton_removal``.
    """
    chosen = _checked(list(labels), len(gradients.source))
    source = gradients.source
    path = find_label(source.dataset, known)
    other = ExampleSource(
        Relabelled(source.dataset, labels, path),
        batch_size=source.batch_size,
        collate_fn=source.collate_fn,
        worker_init_fn=source.worker_init_fn,
    )
    repaired = gradients.on(other)
    before, after = _summed(gradients, chosen), _summed(repaired, chosen)
    change = {name: (before[name] - after[name]) / examples for name in before}
    return _update(gradients, curvature.solve(change), f"repair of {len(chosen)} labels")


def _covered(gradients: ExampleGradients) -> dict[str, nn.Parameter]:
    return {name: p for block in gradients.coverage.blocks.values() for name, p in block.parameters.items()}


def _checked(indices: Indices, size: int) -> list[int]:
    values = indices.tolist() if isinstance(indices, (Tensor, np.ndarray)) else list(indices)
    odd = [value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
    if odd:
        raise ValueError(f"indices must be integers, got {odd[:5]}; a mask becomes indices by `mask.nonzero()`.")
    chosen = [operator.index(value) for value in values]
    if not chosen:
        raise ValueError("there is no example to remove or repair; pass at least one index.")
    outside = [index for index in chosen if not 0 <= index < size]
    if outside or len(set(chosen)) != len(chosen):
        what = f"{outside[:10]} are out of range" if outside else "some are named twice"
        raise ValueError(f"{what}; expected distinct indices from 0 to {size - 1}.")
    return chosen


def _summed(gradients: ExampleGradients, indices: list[int]) -> dict[str, Tensor]:
    """Return the sum of the examples' gradients, by block, ``[k, o, i]``."""
    bad = []
    with closing(gradients.run(indices, everywhere=True)) as batches:
        for batch in batches:
            bad += [index for index, finite in zip(batch.indices, batch.finite.tolist(), strict=True) if not finite]
    if bad:
        raise ValueError(f"the examples {bad[:10]} have non-finite losses or gradients; leave them out.")
    return {name: mean * len(indices) for name, mean in mean_gradient(gradients, indices, title="").items()}


def _decayed(gradients: ExampleGradients, weight_decay: WeightDecay) -> dict[str, Tensor]:
    """Return the gradient of the L2 term, by block; nothing if there is none."""
    if not isinstance(weight_decay, Mapping):
        weight_decay = dict.fromkeys(_covered(gradients), weight_decay)
    if not any(weight_decay.values()):
        return {}
    return {
        name: block.from_parameters(
            {own: weight_decay.get(own, 0.0) * p.detach() for own, p in block.parameters.items()}
        )
        for name, block in gradients.coverage.blocks.items()
    }


def _corrected(
    gradients: ExampleGradients,
    curvature: Curvature,
    removed: list[int],
    examples: int,
    step: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Take the removed examples' own curvature ``V Vᵀ`` out of the solution (Woodbury).

    ``(A - V Vᵀ)⁻¹ b = a + W (I - Vᵀ W)⁻¹ Vᵀ a`` with ``A = n (C + λ)``, ``a = A⁻¹ b``, ``W = A⁻¹ V``, ``V: [m·d, p]``.
    """
    coordinates = BlockCoordinates(gradients.coverage.blocks)
    rows = torch.cat(list(_factors(gradients, coordinates, removed)))
    solved = coordinates.join(curvature.solve(coordinates.split(rows))) / examples
    a = exact(coordinates.join(step))
    rows, solved = exact(rows), exact(solved)
    small = torch.eye(len(rows), dtype=torch.float64, device=rows.device) - rows @ solved.T
    factor, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
    if int(failed) or float(factor.diagonal().min()) < _LEAST_LEFT:
        raise IndefiniteError(
            f"without these {len(removed)} examples the curvature is not positive definite: they alone determine some "
            "direction. Raise the damping, remove fewer at a time, or use `leverage=False`."
        )
    correction = solved.T @ torch.cholesky_solve((rows @ a).unsqueeze(1), factor).squeeze(1)
    like = next(iter(step.values()))
    return coordinates.split((a + correction).to(like))


def _factors(
    gradients: ExampleGradients, coordinates: BlockCoordinates, indices: list[int]
) -> Generator[Tensor, None, None]:
    """Yield vectors ``[n, p]`` whose outer products add up to the curvature of the examples' losses."""
    with closing(gradients.run(indices, "exact", everywhere=True)) as batches:
        for batch in batches:
            draws = batch.loss.exact_draws() or 0
            needed = 4 * 8 * len(indices) * draws * coordinates.size
            if not memory.fits(needed, gradients.device):
                raise ValueError(
                    f"the leverage of {len(indices)} examples with {draws} outcomes each takes "
                    f"{memory.readable(needed)}; remove fewer at a time, or use `leverage=False`."
                )
            for draw in range(draws):
                yield joined_gradients(batch, coordinates, draw)


def _update(gradients: ExampleGradients, step: Mapping[str, Tensor], title: str) -> ParameterUpdate:
    blocks = gradients.coverage.blocks
    changes = {name: value for block in blocks for name, value in blocks[block].to_parameters(step[block]).items()}
    update = ParameterUpdate(changes, title)
    relative = update.relative_norm(gradients.module)
    if relative > _LARGE:
        update.notes.append(
            f"it moves the parameters by {relative:.0%} of their length: one Newton step is not to be trusted that "
            "far; change fewer examples, or retrain."
        )
    if gradients.coverage.uncovered:
        update.notes.append(f"{len(gradients.coverage.uncovered)} parameters are not covered and stay as they are.")
    return update
