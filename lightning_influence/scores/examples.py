"""Scores of training examples: one pass that yields everything the final weights can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.core.precision import summed, wide_dtype, wide_zeros
from lightning_influence.curvature.curvature import Curvature, Scorer
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, ExampleScores, Visitor, loss_columns, visit
from lightning_influence.layers import per_sample
from lightning_influence.training.features import projected
from lightning_influence.training.step_sizes import StepSize, self_influence


def score_examples(
    gradients: ExampleGradients,
    indices: Sequence[int],
    *,
    curvature: Curvature | None = None,
    query: Mapping[str, Tensor] | None = None,
    step_sizes: Mapping[str, StepSize] | None = None,
    features: bool = False,
    title: str = "scores",
) -> ExampleScores:
    """Score examples in one pass over them.

    Args:
        gradients: The passes.
        indices: Dataset indices.
        curvature: For ``self_influence``, ``gᵀ (C + λ)⁻¹ g``.
        query: Preconditioned query gradient ``(C + λ)⁻¹ g_q`` by layer, ``[k, o, i]``, for ``harm`` =
            ``-g_qᵀ (C + λ)⁻¹ g_z``: positive where training on the example raises the query's loss.
        step_sizes: By layer, for ``tracin``, ``η gᵀ P g``, see ``step_sizes.block_step_sizes``.
        features: Whether to keep the inputs of the last layer.
        title: Text of the progress bar.

    Returns:
        Columns ``loss``, ``predicted``, ``label`` (if the loss was tapped), ``grad_norm_squared``, ``finite``, and
        those asked for.
    """
    scorer = ExampleScorer(gradients, indices, curvature, query, step_sizes, features=features)
    visit(gradients, indices, [scorer], title=title)
    return scorer.result()


class ExampleScorer(Visitor):
    """Scores every example of a pass by itself, see ``score_examples``.

    Attributes:
        examples: Number of examples that are scored, over all processes.
        self_influence: Of the last batch that is through, ``[n]``, for those who look at the batch next.
    """

    def __init__(
        self,
        gradients: ExampleGradients,
        indices: Sequence[int],
        curvature: Curvature | None = None,
        query: Mapping[str, Tensor] | None = None,
        step_sizes: Mapping[str, StepSize] | None = None,
        *,
        features: bool = False,
    ) -> None:
        self._curvature, self._query, self._step_sizes = curvature, query, step_sizes
        self._features = features
        self.examples = len(indices)
        self._columns = ExampleColumns(indices, gradients.device)
        self._scorer: Scorer | None = None
        self._last: Tensor | None = None
        self._parts: dict[str, list[Tensor]] = {}
        self._row: dict[str, Tensor] = {}
        self._indices: list[int] = []
        self.self_influence = torch.zeros(0)

    def begin(self, batch: BatchGradients) -> None:
        """Begin the sums over the layers."""
        n = batch.loss.n
        self._scorer = None if self._curvature is None else self._curvature.scorer(n)
        self._last = batch.capture.features(n, partial=batch.loss.partial) if self._features else None
        wanted = {"grad_norm_squared": True, "harm": self._query, "tracin": self._step_sizes}
        # By layer, ``[n]`` each, to be added up together: a device has much to launch as it is.
        self._parts = {name: [wide_zeros(n, batch.finite.device)] for name, of in wanted.items() if of is not None}

    def add(self, io: LayerIO) -> None:
        """Add a layer's part."""
        vector = None if self._query is None else self._query[io.name]
        sizes = None if self._step_sizes is None else self._step_sizes[io.name]
        if self._scorer is not None:
            norms, inner = self._scorer.add(io, vector)
        else:
            norms = per_sample.squared_norms(io.x, io.gs[0])
            inner = None if vector is None else per_sample.inner_products(io.x, io.gs[0], vector)
        self._parts["grad_norm_squared"].append(norms)
        if inner is not None:
            self._parts["harm"].append(inner)
        if sizes is not None:
            self._parts["tracin"].append(self_influence(io, norms, sizes))

    def end(self, batch: BatchGradients) -> None:
        """Put the batch's row together."""
        device, unknown = batch.finite.device, ~batch.finite
        row = {name: summed(parts) for name, parts in self._parts.items()}
        if "harm" in row:
            row["harm"] = -row["harm"]
        if self._scorer is not None:
            self.self_influence = self._scorer.self_influence().to(device, wide_dtype(device))
            row["self_influence"] = self.self_influence
        if self._last is not None:
            row["features"] = projected(self._last)
        row = {
            name: values.masked_fill(unknown.view(-1, *[1] * (values.ndim - 1)), torch.nan)
            for name, values in row.items()
        }
        self._row = row | {"finite": batch.finite} | loss_columns(batch.loss)
        self._indices, self._parts, self._scorer, self._last = batch.indices, {}, None, None

    def file(self) -> None:
        """File the batch."""
        self._columns.add(self._indices, self._row)
        self._row = {}

    def result(self) -> ExampleScores:
        """Return the scores, the same on every process."""
        order, columns = self._columns.gathered()
        features = columns.pop("features", None)
        return ExampleScores(order, columns, features)
