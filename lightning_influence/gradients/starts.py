"""Where backward passes begin: at every example's own loss, or at labels drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_influence.gradients.noise import ExampleNoise
from lightning_influence.gradients.plain_autograd import Start
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.task import TaskError
from lightning_influence.objective.terms import BatchLoss

if TYPE_CHECKING:
    from lightning_influence.gradients.passes import ExampleGradients, Labels

NO_EXACT_LABELS = (
    "the expectation over labels has no closed form for this loss (it makes several decisions per example); use "
    '`fisher="sampled"`.'
)


def starts(
    passes: ExampleGradients, loss: BatchLoss, labels: Labels, indices: Sequence[int], draw: int
) -> Iterator[Start]:
    """Yield tensors and gradients to run backward from, once per draw of labels."""
    if labels == "true":
        yield loss.true_outputs() if passes.quantity is None else passes.quantity.outputs(loss)
        return
    if not loss.terms:
        raise TaskError(
            f"labels can't be sampled from the model: no known loss call was seen ({known_losses()}). Use "
            '`fisher="empirical"`.'
        )
    if labels == "sampled":
        yield loss.sampled_outputs(ExampleNoise(passes.seed, draw, indices))
        return
    if loss.exact_draws() is None:
        raise TaskError(NO_EXACT_LABELS)
    yield from loss.exact_outputs()


def starts_of_copies(index: int, copies: int, passes: ExampleGradients, labels: Labels, draw: int) -> Sequence[Start]:
    """Return the same for a batch of copies of one example."""
    batch = passes.source.one_batch([index] * copies)
    return list(starts(passes, passes.forward(batch, copies), labels, [index] * copies, draw))
