"""Scores of training examples: one pass that yields everything the final weights can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import wide, wide_dtype, wide_zeros, working_dtype
from lightning_influence.curvature.curvature import Curvature
from lightning_influence.gradients.example_scores import ExampleScores
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.layers import per_sample
from lightning_influence.objective.losses import LossCall
from lightning_influence.training import step_sizes as tracin

# Features kept per example: 2 GB for a million examples.
_FEATURES = 512
_PART = "self_influence/"


def score_examples(
    gradients: ExampleGradients,
    indices: Sequence[int],
    *,
    curvature: Curvature | None = None,
    query: Mapping[str, Tensor] | None = None,
    step_sizes: Mapping[str, tracin.StepSize] | None = None,
    features: bool = False,
    parts: bool = False,
    title: str = "scores",
) -> ExampleScores:
    """Score examples in one pass over them.

    Args:
        gradients: The passes.
        indices: Dataset indices.
        curvature: For ``self_influence``, ``gᵀ (C + λ)⁻¹ g``.
        query: Preconditioned query gradient ``(C + λ)⁻¹ g_q`` by layer, ``[k, o, i]``, for ``harm`` =
            ``-g_qᵀ (C + λ)⁻¹ g_z``: positive where training on the example raises the query's loss.
        step_sizes: By layer, for ``tracin``, ``η gᵀ P g``, see ``tracin.block_step_sizes``.
        features: Whether to keep the inputs of the last layer.
        parts: Whether to give self-influence by layer, too, in columns ``self_influence/<layer>`` (not for GGN and
            Hessian, where it is no sum over layers).
        title: Text of the progress bar.

    Returns:
        Columns ``loss``, ``predicted``, ``label`` (if the loss was tapped), ``grad_norm_squared``, ``finite``, and
        those asked for.
    """
    # Room for all from the start: a few numbers of each batch, kept between the large tensors that come and go with it,
    # would break the heap into pieces that never return to the system (2.9 GB for 50,000 examples of a CNN).
    size = len(distributed.share(indices))
    merged: dict[str, Tensor] = {}
    kept: list[int] = []
    blocks = gradients.coverage.blocks
    with closing(gradients.run(indices, title=title)) as batches:
        for batch in batches:
            n = batch.loss.n
            device = batch.finite.device
            row: dict[str, Tensor] = {"grad_norm_squared": wide_zeros(n, device)}
            scorer = None if curvature is None else curvature.scorer(n)
            for name, wanted in (("harm", query), ("tracin", step_sizes)):
                if wanted is not None:
                    row[name] = wide_zeros(n, device)
            last = batch.capture.features(n) if features else None
            for io in batch.drained():
                vector = None if query is None else query[io.name]
                sizes = None if step_sizes is None else step_sizes[io.name]
                bias = blocks[io.name].bias_columns
                if scorer is not None:
                    norms, inner = scorer.add(io, vector)
                else:
                    # Laid out if others need it, too: that is kept.
                    in_rows = vector is not None or not (sizes is None or tracin.is_one_rate(sizes, bias))
                    norms = per_sample.squared_norms(io.x if in_rows else io.activations[0], io.gs[0])
                    inner = None if vector is None else per_sample.inner_products(io.x, io.gs[0], vector)
                row["grad_norm_squared"] += norms
                if inner is not None:
                    row["harm"] -= inner
                if sizes is not None:
                    row["tracin"] += tracin.self_influence(io, norms, bias, sizes)
            if scorer is not None:
                row["self_influence"] = scorer.self_influence().to(device, wide_dtype(device))
                row |= {f"{_PART}{name}": wide(part) for name, part in scorer.parts().items()} if parts else {}
            for name, values in row.items():
                row[name] = values.masked_fill(~batch.finite, torch.nan)
            row["finite"] = batch.finite
            row |= _from_loss(batch.loss.values, batch.loss.primary, n)
            if last is not None:
                row["features"] = _projected(last).masked_fill(~batch.finite.unsqueeze(1), torch.nan)
            for name, values in row.items():
                if name not in merged:
                    merged[name] = _unknown(values, size)
                merged[name][len(kept) : len(kept) + n] = values
            kept.extend(batch.indices)
    merged = {name: values[: len(kept)] for name, values in merged.items()}  # collate functions leave examples out
    order, columns = distributed.gather_by_index(torch.tensor(kept, dtype=torch.long, device=gradients.device), merged)
    kept_features = columns.pop("features", None)
    return ExampleScores(order, columns, kept_features)


def mean_gradient(gradients: ExampleGradients, indices: Sequence[int], *, title: str = "queries") -> dict[str, Tensor]:
    """Return the mean gradient of the examples' losses, by layer, ``[k, o, i]``; non-finite examples are left out.

    Raises:
        ValueError: If no example has a finite gradient.
    """
    like = next(p for p in gradients.module.parameters() if p.is_floating_point())
    dtype = working_dtype(like.dtype)
    sums = {
        name: torch.zeros(block.shape, dtype=dtype, device=like.device)
        for name, block in gradients.coverage.blocks.items()
    }
    count = wide_zeros((), like.device)
    with closing(gradients.run(indices, title=title)) as batches:
        for batch in batches:
            count += batch.counted
            for io in batch.drained():
                sums[io.name] += per_sample.summed_gradient(io.x, io.gs[0])
    *reduced, total = distributed.sum_across_processes([*sums.values(), count])
    if not float(total):
        raise ValueError("no query has a finite gradient.")
    return {name: (value / total).to(dtype) for name, value in zip(sums, reduced, strict=True)}


def _from_loss(values: Tensor | None, primary: LossCall | None, n: int) -> dict[str, Tensor]:
    row = {} if values is None else {"loss": wide(values)}
    if primary is not None:
        statistics = primary.statistics(n)
        row |= {name: statistics[name] for name in ("predicted", "label") if name in statistics}
    return row


def _unknown(values: Tensor, size: int) -> Tensor:
    """Return a column like a batch's, with nothing known of any example: NaN, False or -1."""
    fill = torch.nan if values.is_floating_point() else False if values.dtype == torch.bool else -1
    return values.new_full((size, *values.shape[1:]), fill)


def _projected(features: Tensor) -> Tensor:
    """Return features ``[n, d]``; more than ``_FEATURES`` are projected at random, which nearly keeps cosines."""
    features = features.float()
    if features.shape[1] <= _FEATURES:
        return features
    generator = torch.Generator().manual_seed(0)
    projection: Tensor = torch.randn(features.shape[1], _FEATURES, generator=generator) / _FEATURES**0.5
    return torch.mm(features, projection.to(features.device))
