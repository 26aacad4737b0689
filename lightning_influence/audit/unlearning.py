"""Parameters as if some training examples had been left out, or had carried other labels: one Newton step.

The mean loss over ``n`` examples has its minimum at ``θ``. Without the examples ``R`` it moves to about
``θ + 1/n (C + λ)⁻¹ Σ_R g_z`` (Koh & Liang 2017, 1703.04730); with other labels to
``θ - 1/n (C + λ)⁻¹ Σ_R (∇ℓ(z̃) - ∇ℓ(z))``. Both are as good as the curvature and the distance to a minimum allow; an
update says how large it is, and is tried on a copy first. After a run, ``InfluenceAudit.unlearner`` has all that it
takes.

Index legend: ``m`` removed examples, ``d`` draws of labels, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from lightning_influence.audit.indices import Indices, distinct
from lightning_influence.audit.relabel import LabelError, Relabelled, find_label
from lightning_influence.audit.update import ParameterUpdate
from lightning_influence.core import memory
from lightning_influence.core.precision import exact
from lightning_influence.curvature import BlockCoordinates, Curvature, IndefiniteError
from lightning_influence.curvature.coordinates import joined_gradients
from lightning_influence.curvature.saved import checksum
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.measurements import mean_gradient

WeightDecay = float | Mapping[str, float]

# The step assumes that the loss is quadratic between the two minima; beyond this share of the weights it hardly is.
_LARGE = 0.1
# The root of what must be left of the curvature in every direction that the removed examples take part in.
_LEAST_LEFT = 1e-4


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
        self._fitted_at = self._weights()

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
        chosen, examples = self._check(indices), len(self.examples)
        return newton_removal(
            self.gradients, self.curvature, chosen, examples, weight_decay=self.weight_decay, leverage=leverage
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
        chosen = self._check(indices)
        if len(chosen) != len(labels):
            raise ValueError(f"there are {len(chosen)} indices and {len(labels)} labels; expected a label for each.")
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        new = dict(zip(chosen, values, strict=True))
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

    def _check(self, indices: Indices) -> list[int]:
        chosen = _checked(indices, len(self.gradients.source))
        if strangers := sorted(set(chosen) - self.examples):
            raise ValueError(f"the model was not trained on the examples {strangers[:10]}: there is nothing to undo.")
        device, weights = self._weights()
        if device != self._fitted_at[0]:
            raise ValueError(
                f"the model has moved to {device} since the curvature was fitted; move it back, or make another "
                "Unlearner."
            )
        if weights != self._fitted_at[1]:
            raise ValueError(
                "the weights have changed since the curvature was fitted (an update applied, a checkpoint loaded, more "
                "training); make another Unlearner, and change all examples of a group at once."
            )
        return chosen

    def _weights(self) -> tuple[torch.device, dict[str, str]]:
        blocks = self.gradients.coverage.blocks
        return self.gradients.device, {name: checksum(block) for name, block in blocks.items()}


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


def _checked(indices: Indices, size: int) -> list[int]:
    chosen = distinct(indices, range(size), "out of range", f"indices from 0 to {size - 1}")
    if not chosen:
        raise ValueError("there is no example to remove or repair; pass at least one index.")
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
    """Return the gradient of the L2 term, by block."""
    named = weight_decay if isinstance(weight_decay, Mapping) else {}
    otherwise = 0.0 if isinstance(weight_decay, Mapping) else weight_decay
    return {
        name: block.from_parameters(
            {own: named.get(own, otherwise) * p.detach() for own, p in block.parameters.items()}
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
    factors = []
    with closing(gradients.run(removed, "exact", everywhere=True)) as batches:
        for batch in batches:
            draws = batch.loss.exact_draws() or 0
            needed = 4 * 8 * len(removed) * draws * coordinates.size
            if not memory.fits(needed, gradients.device):
                raise ValueError(
                    f"the leverage of {len(removed)} examples with {draws} outcomes each takes "
                    f"{memory.readable(needed)}; remove fewer at a time, or use `leverage=False`."
                )
            factors += [joined_gradients(batch, coordinates, draw) for draw in range(draws)]
    rows = torch.cat(factors)
    solved = exact(coordinates.join(curvature.solve(coordinates.split(rows)))) / examples
    a, rows = exact(coordinates.join(step)), exact(rows)
    small = torch.eye(len(rows), dtype=torch.float64, device=rows.device) - rows @ solved.T
    factor, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
    if int(failed) or float(factor.diagonal().min()) < _LEAST_LEFT:
        raise IndefiniteError(
            f"without these {len(removed)} examples the curvature is not positive definite: they alone determine some "
            "direction. Raise the damping, remove fewer at a time, or use `leverage=False`."
        )
    correction = solved.T @ torch.cholesky_solve((rows @ a).unsqueeze(1), factor).squeeze(1)
    return coordinates.split((a + correction).to(next(iter(step.values()))))


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
