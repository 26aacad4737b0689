"""Influence of training examples on a trained model: everything that takes no Trainer, behind one object."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor, nn

from lightning_influence.audit.unlearning import ParameterUpdate, Unlearner, WeightDecay
from lightning_influence.core.errors import check_count, check_flag
from lightning_influence.core.indices import integers
from lightning_influence.curvature import BlockCurvature, Curvature, CurvatureName, Damping, Fisher, Solver
from lightning_influence.curvature.choices import random_subset
from lightning_influence.curvature.sweep import DampingSweep, damping_sweep
from lightning_influence.data.given import Data, Indices
from lightning_influence.gradients.coverage import LEFT_OUT, Coverage, listed_reasons
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.index import ExampleIndex, Index
from lightning_influence.influence.along import AlongRecord, AlongTraining
from lightning_influence.influence.directory import store_curvature, stored_curvature, stored_examples, write_index
from lightning_influence.influence.examined import ExaminedModel
from lightning_influence.influence.inputs import aligned, check_factor_examples, notes_of
from lightning_influence.objective.given import Loss
from lightning_influence.replay.record import TrainingRecord
from lightning_influence.scores.along.dropout_masks import ip_ensemble
from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.measurements import (
    AnyMeasurement,
    MeasurementScores,
    measurement_gradient,
    measurement_scores,
    measurement_value,
)
from lightning_influence.scores.pairs import Normalisation, PairwiseScores, TopScores, pairwise_scores, top_scores
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.step_sizes import OptimizerHistory

Asked = tuple[ExampleGradients, list[int], Curvature, ExampleGradients, list[int]]
"""Passes and indices of the training data, the curvature, then passes and indices of the queries."""

_INDEX = Index()
# Examples that tell how much the damping matters.
_SWEPT = 256


class Influence(ExaminedModel):
    """What training examples do to a trained model.

    The model is traced, and its per-example gradients are checked against autograd, on a few examples when the object
    is made. Nothing in it changes afterwards: ``fit`` returns another one, with a curvature. Model, data and random
    streams are left as they are; the model is looked at in evaluation mode, at the weights that it has now.

    Wherever data are asked for, that is a map-style data set or a ``DataLoader`` over one; indices are one index of the
    data set, or many.

    Args:
        model: The trained model.
        loss: What it was trained on: a function ``(model, batch) -> loss``; a loss of torch (``nn.CrossEntropyLoss()``,
            ``F.cross_entropy``, any module), for batches ``(inputs, targets)``; or None for the ``training_step`` of a
            ``LightningModule``.
        train_set: The training data. Of a loader, batch size, collate function and workers are taken. Batches are moved
            to the model's device.
        examples: Indices of the examples that the model was trained on; by default all that there are, or that the
            loader draws from.
        batch_size: Of training, by default that of the loader, else 32. It matters for losses that are not plain means.
        layers: What to look at: names of layers or parameters, glob patterns, or types of modules; all by default.
        uncovered: ``"report"`` leaves out parameters whose per-example gradients have no closed form (see
            ``coverage.uncovered``), ``"exact"`` computes them one example at a time.
        verify: Whether to check the gradients.

    Raises:
        TypeError, DataError, ValueError: For a loss, data or indices that are none.
        TaskError, LayerError: If the loss can't be computed on the training data, or no parameter is covered.
        VerificationError: If gradients disagree with autograd, or an example's loss depends on others.

    Example:
        >>> influence = Influence(model, F.cross_entropy, train_set).fit("ekfac")
        >>> print(influence.top(test_set, [3, 14, 15]))
    """

    _curvature: Curvature | None = None
    _weights = ""

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: nn.Module, loss: Loss | None, train_set: Data, **settings: Any
    ) -> Influence:
        """Read back a fitted curvature that was saved, or that of an audit, ``<log_dir>/influence``.

        All but ``directory`` is as for the constructor, the model with the weights that the curvature was fitted at;
        ``examples`` are those that were.

        Raises:
            StoreError: If there is none, or it is damaged.
            ValueError: If it belongs to another model, other layers, other weights or other data.
        """
        settings.setdefault("examples", stored_examples(directory))
        loaded = cls(model, loss, train_set, **settings)
        return loaded._with(stored_curvature(directory, loaded))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the fitted curvature to a new directory and return its path, with a version suffix if it was taken.

        With several processes, call it on one.

        Raises:
            ValueError: If it is solved by products with the training data: there is nothing to keep.
        """
        return store_curvature(directory, self.curvature, self)

    @property
    def curvature(self) -> Curvature:
        """The fitted curvature.

        Raises:
            RuntimeError: Before ``fit``, or if the model has other weights by now.
        """
        if self._curvature is None:
            raise RuntimeError(
                'there is no curvature yet; `influence = influence.fit("ekfac")` returns an object that has one '
                '("identity" for plain products of gradients).'
            )
        if self.checksum() != self._weights:
            raise RuntimeError(
                "the model's weights have changed since the curvature was fitted (more training, a checkpoint loaded, "
                "an update applied): fit it again, or load the weights that are meant."
            )
        return self._curvature

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores should know."""
        notes = [*(() if self._curvature is None else self._curvature.notes), *notes_of(self.inspection)]
        return notes + _left_out(self.coverage)

    def fit(
        self,
        curvature: CurvatureName = "ekfac",
        *,
        fisher: Fisher = "auto",
        damping: Damping = "auto",
        solver: Solver = "auto",
        factor_examples: int | Literal["auto"] | None = "auto",
        history: OptimizerHistory | None = None,
    ) -> Influence:
        """Return the same with a curvature, fitted at the weights that the model has now.

        Args:
            curvature: ``"ekfac"``, ``"kfac"``, ``"diagonal"``, ``"identity"``, ``"block_ggn"``, ``"ggn"`` or
                ``"hessian"``.
            fisher: Labels for it: ``"sampled"`` from the model, ``"exact"`` (their expectation), ``"empirical"``;
                ``"auto"`` samples if the loss is known.
            damping: A number λ, ``"relative"`` (0.1 of each block's mean eigenvalue), ``"trainer"`` (what the training
                implies, which takes ``history``), or ``"auto"``: that of the curvature, see ``curvature.damping``.
            solver: Of GGN and Hessian: ``"dense"``, ``"cg"``, ``"nystrom"``, ``"pcg"``, ``"lissa"``, ``"woodbury"``.
            factor_examples: Number of random examples to fit on; ``"auto"``: enough for every factor; None: all.
            history: What the optimizer did, see ``StepSizes.history``; by default as far as an audit has followed it.

        Raises:
            TypeError, ValueError, TaskError, IndefiniteError: If the curvature can't be had; with the way out.
        """
        _check_fit(factor_examples, history)
        plan = self.plan(
            curvature, fisher=fisher, damping=damping, solver=solver, factor_examples=factor_examples, history=history
        )
        fitted = plan.fit(self.training, self.examples)
        fitted.notes[:0] = plan.damping.notes
        return self._with(fitted, history)

    def scores(self, indices: Indices | None = None, *, validation: Data | None = None) -> ExampleScores:
        """Return everything that the weights tell of training examples (all by default), in one pass.

        Columns ``loss``, ``predicted``, ``label``, ``grad_norm_squared``, ``finite``; once fitted ``self_influence``,
        and with ``validation`` data ``harm``: removing the example changes the mean loss on them by about ``-harm/N``.
        """
        chosen, query = sorted(set(self.chosen(indices))), None
        curvature = None if self._curvature is None and validation is None else self.curvature
        if validation is not None and curvature is not None:
            passes, every = self.queries(validation)
            query = curvature.solve(measurement_gradient(passes, every, "loss"))
        return score_examples(self.training, chosen, curvature=curvature, query=query)

    def self_influence(self, indices: Indices | None = None) -> Tensor:
        """Return ``∇ℓᵀ (C + λ)⁻¹ ∇ℓ`` of training examples, ``[n]`` in the order of the indices (all by default)."""
        _ = self._curvature or self.curvature  # raises, with the way out
        return aligned(self.scores(indices), "self_influence", self.chosen(indices))

    def top(
        self, test_set: Data, indices: Indices | None = None, k: int = 10, *, normalise: Normalisation = "none"
    ) -> TopScores:
        """Return the ``k`` strongest proponents and opponents of each query; arguments as for ``pairs``."""
        check_count("k", k)
        return top_scores(*self._asked(test_set, indices), k, normalise=normalise)

    def pairs(
        self,
        test_set: Data,
        indices: Indices | None = None,
        *,
        normalise: Normalisation = "none",
        by_layer: bool = False,
        path: str | os.PathLike[str] | None = None,
    ) -> PairwiseScores:
        """Return the scores of all pairs, ``∇ℓ(q)ᵀ (C + λ)⁻¹ ∇ℓ(z)``, ``[q, n]``; positive for proponents.

        Args:
            test_set: Data of the queries.
            indices: Which of them; all by default.
            normalise: ``"relative"`` divides by the root of the training example's self-influence, ``"cosine"`` by the
                query's, too; ``"leverage"`` by one minus the example's leverage.
            by_layer: Whether to give each layer's part.
            path: An ``.npy`` file to put scores into that are too many for memory.
        """
        return pairwise_scores(*self._asked(test_set, indices), normalise=normalise, by_layer=by_layer, path=path)

    def index(self, directory: str | os.PathLike[str], settings: Index = _INDEX) -> ExampleIndex:
        """Keep the curvature (as ``save``) and every example's gradient, compressed, for later questions: one pass."""
        return write_index(directory, self.curvature, self, settings)

    def dropout_ensemble(
        self, test_set: Data, indices: Indices | None = None, *, masks: int = 10, seed: int = 0
    ) -> PairwiseScores:
        """Return inner products of gradients, the mean over ``masks`` sub-networks of a model with dropout."""
        return ip_ensemble(*self.paired(test_set, indices), masks=masks, seed=seed)

    @overload
    def along(self, run: TrainingRecord) -> AlongRecord: ...
    @overload
    def along(self, run: Sequence[Checkpoint]) -> AlongTraining: ...
    def along(self, run: Sequence[Checkpoint] | TrainingRecord) -> AlongTraining | AlongRecord:
        """Return scores along a run, from checkpoints (``report.checkpoints()``) or, by replay, its record."""
        return AlongRecord(self, run) if isinstance(run, TrainingRecord) else AlongTraining(self, run)

    def measure(
        self, test_set: Data, measurement: AnyMeasurement = "loss", indices: Indices | None = None
    ) -> MeasurementScores:
        """Return what is measured on a set, and the influence of every training example on it.

        Args:
            test_set: The set.
            measurement: ``"loss"``, ``"margin"``, a gap, an attack's loss, or a function ``(model, batch) -> number``.
            indices: Which of its examples; all by default.
        """
        return measurement_scores(*self._asked(test_set, indices), measurement)

    def value(self, test_set: Data, measurement: AnyMeasurement = "loss", indices: Indices | None = None) -> float:
        """Return what is measured on a set, by forward passes only; see ``measure``."""
        return measurement_value(*self.queries(test_set, indices), measurement)

    def remove(
        self, indices: Indices, *, leverage: bool = False, weight_decay: WeightDecay | None = None
    ) -> ParameterUpdate:
        """Return the change of the parameters that training without some examples makes, by one Newton step.

        Args:
            indices: The examples.
            leverage: Whether to take them out of the curvature, too: what a group needs.
            weight_decay: Coefficient of an L2 term in the loss, for all parameters or by name; by default that of the
                run that an audit has followed, or of ``history``, else none.
        """
        check_flag("leverage", leverage)
        curvature, chosen, decay = self.curvature, self.chosen(indices), self.decay(weight_decay)
        unlearner = Unlearner(self.training, curvature, self.examples, weight_decay=decay)
        return unlearner.newton_removal(chosen, leverage=leverage)

    def repair(self, indices: Indices, labels: Indices) -> ParameterUpdate:
        """Return the change of the parameters that training with other labels makes, by one Newton step.

        Args:
            indices: The examples.
            labels: A new label for each of them.
        """
        curvature, chosen = self.curvature, self.chosen(indices)
        new, unlearner = integers(labels), Unlearner(self.training, curvature, self.examples, labels=self.labels)
        return unlearner.label_repair(chosen, new)

    def damping_sweep(self) -> DampingSweep:
        """Return how much self-influence depends on the damping, from a few hundred examples."""
        blocks = _damped_blocks(self.curvature)
        return damping_sweep(self.training, random_subset(self.examples, _SWEPT, 0), blocks)

    def _asked(self, test_set: Data, indices: Indices | None) -> Asked:
        curvature = self.curvature  # before anything is computed
        training, examples, queries, chosen = self.paired(test_set, indices)
        return training, examples, curvature, queries, chosen

    def _with(self, curvature: Curvature, history: OptimizerHistory | None = None) -> Influence:
        other = copy.copy(self)
        other._curvature, other._weights = curvature, self.checksum()
        other._history = history or self._history
        return other

    def __repr__(self) -> str:
        fitted = "not fitted" if self._curvature is None else repr(self._curvature)
        return f"Influence({super().__repr__()}; {fitted})"


def _left_out(coverage: Coverage) -> list[str]:
    """Return what to say of parameters that are not covered, unless that was asked for."""
    left = {name: why for name, why in coverage.uncovered.items() if why != LEFT_OUT}
    told = f"scores leave out {len(left)} trainable parameters, {listed_reasons(left, 3)}; "
    return [told + '`uncovered="exact"` covers them, one example at a time'] if left else []


def _check_fit(factor_examples: object, history: object) -> None:
    check_factor_examples(factor_examples)
    if not isinstance(history, (OptimizerHistory, type(None))):
        raise TypeError(f"history is a {type(history).__name__}; expected `StepSizes.history()` of the training.")


def _damped_blocks(curvature: Curvature) -> BlockCurvature:
    if curvature.name == "identity":
        raise ValueError('the identity has no damping; fit a curvature that has, such as `influence.fit("ekfac")`.')
    if curvature.blockwise is None:
        raise ValueError(f"{curvature.name} would have to be factorised anew for every damping.")
    return curvature.blockwise
