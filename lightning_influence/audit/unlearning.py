"""Parameters as if some training examples had been left out, or had carried other labels: one Newton step.

The mean loss over ``n`` examples has its minimum at ``θ``. Without the examples ``R`` it moves to about
``θ + 1/n (C + λ)⁻¹ Σ_R g_z`` (Koh & Liang 2017, 1703.04730); with other labels to
``θ - 1/n (C + λ)⁻¹ Σ_R (∇ℓ(z̃) - ∇ℓ(z))``. Both are as good as the curvature and the distance to a minimum allow; an
update says how large it is, and is tried on a copy first. After a run, ``InfluenceAudit.unlearner`` has all that it
takes.

Index legend: ``m`` removed examples, ``d`` draws of labels, ``k, o, i`` a block's groups, outputs, inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from lightning_influence.audit.relabel import LabelError, Relabelled, find_label
from lightning_influence.audit.update import ParameterUpdate
from lightning_influence.core import distributed, memory
from lightning_influence.core.indices import Indices, distinct
from lightning_influence.core.precision import exact
from lightning_influence.core.weights import checksum
from lightning_influence.curvature import BlockCoordinates, Curvature, IndefiniteError
from lightning_influence.curvature.coordinates import joined_gradients
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.measurements import mean_gradient

WeightDecay = float | Mapping[str, float]

# The step assumes that the loss is quadratic between the two minima; beyond this share of the weights it hardly is.
_LARGE = 0.1
# The root of what must be left of the curvature in every direction that the removed examples take part in.
_LEAST_LEFT = 1e-4


class Unlearner:
    """Removal and repair for one trained model.

    Args:
        gradients: Passes over the training data, at the trained weights.
        curvature: Fitted on them; any of the ladder.
        examples: Dataset indices of the ``n`` examples that the model was trained on: the loss was their mean.
        labels: Dataset index to given label, of examples of several classes: they tell where in an example the label
            lies. Without them labels can't be repaired.
        weight_decay: Coefficient of an L2 term ``½ wd ‖θ‖²`` in the loss, which does not shrink with the data; one for
            all parameters, or by name. The damping of the curvature should hold it.
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
        """Return the change of the parameters that leaving out some examples makes, to first order.

        Args:
            indices: Dataset indices of the examples.
            leverage: Whether to take them out of the curvature, too: without it a group moves less than it should, the
                more the larger its share. One solve for each removed example and class.

        Returns:
            The change. Removing all of a group at once is the sum of its members' changes only without ``leverage``.

        Raises:
            ValueError: If an index is named twice or none of the training examples', nothing or everything is removed,
                a gradient is not finite, the memory does not suffice, or the weights have changed.
            TaskError: If ``leverage`` is asked for and the loss has no exact expectation over labels.
            IndefiniteError: If the rest of the data does not determine the parameters with this damping.
            SolverError: If an iterative solver did not reach its tolerance.
        """
        chosen, examples = self._check(indices), len(self.examples)
        if len(chosen) == examples:
            raise ValueError(f"all {examples} examples are to be removed; expected some to be left.")
        total = _summed(self.gradients, chosen)
        for name, decayed in self._decayed().items():
            total[name] += len(chosen) * decayed
        step = {name: value / examples for name, value in self.curvature.solve(total).items()}
        if leverage:
            step = self._corrected(chosen, step)
        return self._update(step, f"removal of {len(chosen)} of {examples} examples")

    def label_repair(self, indices: Indices, labels: Indices) -> ParameterUpdate:
        """Return the change of the parameters that training with other labels makes, to first order.

        Args:
            indices: Dataset indices of the examples.
            labels: A new label for each of them.

        Raises:
            LabelError: If a label is not among those of the training data, or can't be found or replaced there.
            ValueError: If there are not as many labels as indices; and as ``newton_removal``.
            SolverError: As ``newton_removal``.
        """
        chosen = self._check(indices)
        if isinstance(labels, (Mapping, set)):  # of which the keys would be the labels, and any order
            raise ValueError(f"labels is a {type(labels).__name__}; expected a sequence, a label for each index.")
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
        source = self.gradients.source
        other = ExampleSource(
            Relabelled(source.dataset, new, find_label(source.dataset, self.labels)),
            batch_size=source.batch_size,
            collate_fn=source.collate_fn,
            worker_init_fn=source.worker_init_fn,
        )
        before, after = _summed(self.gradients, chosen), _summed(self.gradients.on(other), chosen)
        change = {name: (before[name] - after[name]) / len(self.examples) for name in before}
        return self._update(self.curvature.solve(change), f"repair of {len(chosen)} labels")

    def _check(self, indices: Indices) -> list[int]:
        known = f"indices of the {len(self.examples)} examples that the model was trained on"
        chosen = distinct(indices, self.examples, "not among the training examples", known)
        if not chosen:
            raise ValueError("there is no example to remove or repair; pass at least one index.")
        if self._weights() != self._fitted_at:
            raise ValueError(
                "the model has moved to another device, or its weights have changed since the curvature was fitted (an "
                "update applied, a checkpoint loaded, more training); make another Unlearner, and change all examples "
                "of a group at once."
            )
        return chosen

    def _weights(self) -> tuple[torch.device, dict[str, str]]:
        blocks = self.gradients.coverage.blocks
        return self.gradients.device, {name: checksum(block.parameters.values()) for name, block in blocks.items()}

    def _decayed(self) -> dict[str, Tensor]:
        """Return the gradient of the L2 term, by block."""
        decay = self.weight_decay
        by_name: Callable[[str], float] = (
            (lambda name: decay.get(name, 0.0)) if isinstance(decay, Mapping) else lambda _: decay
        )
        return {
            name: block.from_parameters({own: by_name(own) * p.detach() for own, p in block.parameters.items()})
            for name, block in self.gradients.coverage.blocks.items()
        }

    def _corrected(self, removed: list[int], step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the removed examples' own curvature ``V Vᵀ`` out of the solution (Woodbury).

        ``(A - V Vᵀ)⁻¹ b = a + W (I - Vᵀ W)⁻¹ Vᵀ a`` with ``A = n (C + λ)``, ``a = A⁻¹ b``, ``W = A⁻¹ V``,
        ``V: [m·d, p]``.
        """
        coordinates = BlockCoordinates(self.gradients.coverage.blocks)
        factors = []
        with closing(self.gradients.run(removed, "exact", everywhere=True)) as batches:
            for batch in batches:
                draws = batch.loss.exact_draws() or 0
                needed = 4 * 8 * len(removed) * draws * coordinates.size
                if distributed.any_process(not memory.fits(needed, self.gradients.device)):
                    raise ValueError(
                        f"the leverage of {len(removed)} examples with {draws} outcomes each takes "
                        f"{memory.readable(needed)}; remove fewer at a time, or use `leverage=False`."
                    )
                with batch.attempt:
                    factors += [joined_gradients(batch, coordinates, draw) for draw in range(draws)]
        rows = torch.cat(factors)
        solved = exact(coordinates.join(self.curvature.solve(coordinates.split(rows)))) / len(self.examples)
        a, rows = exact(coordinates.join(step)), exact(rows)
        small = torch.eye(len(rows), dtype=torch.float64, device=rows.device) - rows @ solved.T
        factor, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
        if int(failed) or float(factor.diagonal().min()) < _LEAST_LEFT:
            raise IndefiniteError(
                f"without these {len(removed)} examples the curvature is not positive definite: they alone determine "
                "some direction. Raise the damping, remove fewer at a time, or use `leverage=False`."
            )
        correction = solved.T @ torch.cholesky_solve((rows @ a).unsqueeze(1), factor).squeeze(1)
        return coordinates.split((a + correction).to(next(iter(step.values()))))

    def _update(self, step: Mapping[str, Tensor], title: str) -> ParameterUpdate:
        coverage = self.gradients.coverage
        blocks = coverage.blocks
        changes = {name: value for block in blocks for name, value in blocks[block].to_parameters(step[block]).items()}
        update = ParameterUpdate(changes, title)
        relative = update.relative_norm(self.gradients.module)
        if relative > _LARGE:
            update.notes.append(
                f"it moves the parameters by {relative:.0%} of their length: one Newton step is not to be trusted that "
                "far; change fewer examples, or retrain."
            )
        if coverage.uncovered:
            update.notes.append(f"{len(coverage.uncovered)} parameters are not covered and stay as they are.")
        return update


def _summed(gradients: ExampleGradients, indices: list[int]) -> dict[str, Tensor]:
    """Return the sum of the examples' gradients, by block, ``[k, o, i]``."""
    bad = []
    with closing(gradients.run(indices, everywhere=True)) as batches:
        for batch in batches:
            bad += [index for index, finite in zip(batch.indices, batch.finite.tolist(), strict=True) if not finite]
    if bad:
        raise ValueError(f"the examples {bad[:10]} have non-finite losses or gradients; leave them out.")
    return {name: mean * len(indices) for name, mean in mean_gradient(gradients, indices, title="").items()}
