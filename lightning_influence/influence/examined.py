"""A model and its training data, looked at once: traced, verified, and calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from lightning_influence.audit.unlearning import WeightDecay
from lightning_influence.core.errors import check_flag
from lightning_influence.core.memory import is_out_of_memory
from lightning_influence.core.progress import shown
from lightning_influence.core.weights import checksum, parameters_of
from lightning_influence.curvature import CurvatureName, Damping, Fisher, Solver
from lightning_influence.curvature.chain import Chain, curvature_chain
from lightning_influence.curvature.choices import check_labels
from lightning_influence.data.given import Data, Indices, positions, source_of
from lightning_influence.data.source import DataError
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.coverage import Coverage, Layers, Uncovered
from lightning_influence.gradients.discover import TraceError, discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection, VerificationError, inspect, roomy_batch_size
from lightning_influence.influence.inputs import (
    check_choice,
    check_curvature_choices,
    check_layers,
    check_weight_decay,
)
from lightning_influence.layers.blocks import LayerError
from lightning_influence.objective.given import Loss, check_model, task_of
from lightning_influence.objective.terms import TaskError
from lightning_influence.scores.plan import InfluencePlan
from lightning_influence.training.step_sizes import OptimizerHistory

Examined = TypeVar("Examined", bound="ExaminedModel")
Paired = tuple[ExampleGradients, list[int], ExampleGradients, list[int]]
"""Passes and indices of the training data, then of the queries."""


class ExaminedModel:
    """A trained model and its training data; arguments as for ``Influence``.

    Attributes:
        model: The model.
        examples: Dataset indices of the training examples, sorted.
        inspection: What one batch has shown.
    """

    _history: OptimizerHistory | None = None

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        train_set: Data,
        *,
        examples: Indices | None = None,
        batch_size: int | None = None,
        layers: Layers = None,
        uncovered: Uncovered = "report",
        verify: bool = True,
    ) -> None:
        check_model(model)
        check_choice("uncovered", uncovered, get_args(Uncovered))
        check_layers(layers)
        check_flag("verify", verify)
        task = task_of(model, loss)
        source, drawn = source_of(train_set, batch_size)
        chosen = sorted(set(positions(examples, drawn, "training set")))
        with _first_batch():
            coverage = discover(
                model,
                task,
                source,
                indices=chosen,
                layers=layers,
                uncovered=uncovered,
            )
            passes = ExampleGradients(model, task, source, coverage, progress=shown)
            inspection = inspect(passes, chosen, verify=verify)
        source.pass_batch_size = roomy_batch_size(inspection, source, passes.device)
        self.model, self.examples, self.inspection, self._passes = model, chosen, inspection, passes

    @classmethod
    def of(
        cls: type[Examined],
        passes: ExampleGradients,
        inspection: Inspection,
        examples: Sequence[int],
        *,
        history: OptimizerHistory | None = None,
        labels: Mapping[int, int] | None = None,
    ) -> Examined:
        """Put one together of what is known already, as at the end of a run.

        Args:
            passes: Passes over the training data.
            inspection: What one batch has shown.
            examples: Dataset indices of the training examples, sorted.
            history: What the optimizer did.
            labels: Dataset index to given label; by default as far as the loss tells.
        """
        made = cls.__new__(cls)
        made.model, made.examples, made.inspection = passes.module, list(examples), inspection
        made._passes, made._history = passes, history
        if labels is not None:
            made.labels = labels
        return made

    @property
    def coverage(self) -> Coverage:
        """Which of the trainable parameters are understood."""
        return self._passes.coverage

    @property
    def weight_decay(self) -> Mapping[str, float]:
        """Coefficient of the L2 term in the loss of the run that an audit has followed, by parameter name."""
        return {} if self._history is None else self._history.weight_decay

    def decay(self, given: WeightDecay | None) -> WeightDecay:
        """Return the coefficient that is given, or that of the run.

        Raises:
            ValueError: If it is none.
        """
        if given is None:
            return self.weight_decay
        check_weight_decay(given, parameters_of(self.model))
        return given

    @cached_property
    def training(self) -> ExampleGradients:
        """Passes over the training data, with the scale of their loss: to measure it may take a pass forward."""
        return self._passes.calibrate(self.examples, of_mean=not self.coverage.trace.sums)

    def chosen(self, indices: Indices | None) -> list[int]:
        """Return training examples by index, all by default."""
        return positions(indices, self.examples, "training set")

    def queries(self, test_set: Data, indices: Indices | None = None) -> tuple[ExampleGradients, list[int]]:
        """Return passes over a test set, weighed as the training data, and the examples that are meant."""
        source, drawn = source_of(test_set, collate_fn=self._passes.source.collate_fn)
        source.pass_batch_size = self._passes.source.pass_batch_size
        chosen = positions(indices, drawn, "test set")  # before anything is computed
        return self.training.on(source), chosen

    def paired(self, test_set: Data, indices: Indices | None = None) -> Paired:
        """Return what the functions of pairs take first."""
        queries, chosen = self.queries(test_set, indices)
        return self.training, self.examples, queries, chosen

    def plan(
        self,
        curvature: CurvatureName,
        *,
        fisher: Fisher = "auto",
        damping: Damping = "auto",
        solver: Solver = "auto",
        factor_examples: int | Literal["auto"] | None = "auto",
        history: OptimizerHistory | None = None,
    ) -> InfluencePlan:
        """Return how a curvature is fitted: labels, examples, damping; see ``InfluencePlan.make``."""
        check_curvature_choices(curvature, fisher, solver)
        seen, size = self.inspection, len(self.examples)
        check_labels(curvature, fisher, seen.tapped, seen.exact_draws)
        return InfluencePlan.make(
            self.coverage,
            seen,
            size,
            curvature=curvature,
            fisher=fisher,
            damping=damping,
            examples=factor_examples,
            history=history or self._history,
            solver=solver,
        )

    @cached_property
    def labels(self) -> Mapping[int, int]:
        """The given labels of the training examples, as far as the loss tells."""
        found: dict[int, int] = {}
        attempt = Attempt()
        run = self.training.losses(self.examples, title="labels", everywhere=True, attempt=attempt)
        with closing(run) as losses:
            for own, loss in losses:
                with attempt:
                    told = None if loss.primary is None else loss.primary.decided(loss.n).get("label")
                    found |= {} if told is None else dict(zip(own, map(int, told.tolist()), strict=True))
        return {index: label for index, label in found.items() if label >= 0}

    def chain(self) -> Chain:
        """Return what each approximation gives away, from the Hessian down to K-FAC; for small networks."""
        return curvature_chain(self.training, self.examples)

    def checksum(self) -> str:
        """Return what tells the weights that the model has now from others, on any device."""
        return checksum(value for value in self.model.state_dict().values() if isinstance(value, torch.Tensor))

    def digests(self, examples: Sequence[int]) -> list[bytes | None]:
        """Return what a few of some training examples hold, see ``ExampleSource.digests``."""
        return self._passes.source.digests(examples)

    def __repr__(self) -> str:
        return f"{type(self.model).__name__}, {len(self.examples):,} training examples, {self.coverage.describe()}"


@contextmanager
def _first_batch() -> Iterator[None]:
    """Say what was tried when a user's loss fails on the first batch."""
    try:
        yield
    # Anything can go wrong in a user's code that meets its first batch here.
    except Exception as error:
        known = isinstance(error, (DataError, LayerError, TaskError, VerificationError, ValueError))
        if is_out_of_memory(error) or (known and not isinstance(error, TraceError)):
            raise
        error = error.__cause__ if isinstance(error, TraceError) and isinstance(error.__cause__, Exception) else error
        raise TaskError(
            f"the loss can't be computed on a batch of the training data ({type(error).__name__}: {error}). A function "
            "is called with (model, batch), the batch as the data set's examples are collated; a loss of "
            "(outputs, targets) is passed as `nn.CrossEntropyLoss()` or another module."
        ) from error
