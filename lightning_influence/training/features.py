"""Penultimate features: what the last linear map of a network is given."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache

import torch
from torch import Tensor

from lightning_influence.core.meeting import together
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.capture import Capture
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import ExampleColumns, ExampleScores, loss_columns
from lightning_influence.objective.scale import NoLossError

# Features kept per example: 2 GB for a million examples.
_FEATURES = 512


def look_at_features(gradients: ExampleGradients, indices: Sequence[int], *, title: str = "features") -> ExampleScores:
    """Return the features of examples at the weights of the moment, from one forward pass over them.

    Args:
        gradients: The passes; the loss scale does not matter.
        indices: Dataset indices.
        title: Text of the progress bar.

    Returns:
        ``features`` ``[n, d]`` and the columns that a loss tells, ``label`` among them if it has classes.

    Raises:
        NoLossError: If none of the examples has a loss.
    """
    capture = Capture(gradients.coverage)
    columns = ExampleColumns(indices, gradients.device)
    passes = gradients.with_scale(None)
    attempt = Attempt()
    run = passes.losses(indices, title=title, watch=capture.forward, capture=capture, attempt=attempt)
    with closing(run) as losses:
        for chosen, loss in losses:
            with attempt:
                if loss.partial:
                    capture.backward(*loss.true_outputs())
                found = capture.features(loss.n, partial=loss.partial)
                row = {} if found is None else {"features": projected(found.detach())}
                columns.add(chosen, loss_columns(loss) | row)
            capture.clear()
    order, gathered = columns.gathered()
    return ExampleScores(order, gathered, gathered.pop("features", None))


def look_at_labels(
    gradients: ExampleGradients, indices: Sequence[int], *, title: str = "features"
) -> ExampleScores | None:
    """Return the same, or None if the first examples show that there are no classes, or no features."""
    try:
        with together():
            first = look_at_features(gradients, indices[:2], title="")
    except NoLossError:  # of these; others may have one
        first = None
    if first is not None and (first.features is None or "label" not in first.columns):
        return None
    return look_at_features(gradients, indices, title=title)


def projected(features: Tensor) -> Tensor:
    """Return features ``[n, d]``; more than 512 are projected at random, which nearly keeps cosines."""
    features = features.float()
    if features.shape[1] <= _FEATURES:
        return features
    return torch.mm(features, _projection(features.shape[1], features.device))


@lru_cache(maxsize=1)  # the same for all batches of a run: to draw it takes longer than many a batch
def _projection(size: int, device: torch.device) -> Tensor:
    drawn: Tensor = torch.randn(size, _FEATURES, generator=torch.Generator().manual_seed(0))
    scaled: Tensor = drawn / _FEATURES**0.5
    return scaled.to(device)
