"""Runs whose steps went along the gradient, for methods that follow them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_influence.training.checkpoints import Checkpoint, CheckpointError


def plain_steps(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints of a run that stand for steps, after a look at whether they were steps along the gradient.

    Raises:
        CheckpointError: If the steps do not rise, are unknown, or were not multiples of the gradient.
    """
    if any(b.step <= a.step for a, b in zip(checkpoints, checkpoints[1:], strict=False)):
        raise CheckpointError(
            f"the checkpoints are of the steps {[c.step for c in checkpoints]}; expected those of one run, in the "
            "order of training, each once."
        )
    moved = [c for c in checkpoints if c.steps and any(c.step_sizes.values())]
    if adaptive := [c.step for c in moved if c.preconditioner]:
        raise CheckpointError(
            f"the checkpoints of the steps {adaptive[:5]} are of an adaptive optimizer, whose steps are not multiples "
            "of the gradient; this method is for SGD. Use TracIn, or leave out `preconditioner` to treat the steps as "
            "plain ones."
        )
    if not moved:
        raise CheckpointError(
            f"none of {len(checkpoints)} checkpoints knows the steps it stands for; take them with `step_sizes=` and "
            "`steps=`, see `StepSizes`."
        )
    return moved
