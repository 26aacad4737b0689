"""Whether a row of the loss is that of one example: mixed ones (mixup, CutMix, contrasts) are no example's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.containers import map_tensors
from lightning_influence.core.weights import places_of, write
from lightning_influence.objective.task import Task
from lightning_influence.replay.record import ReplayError, StepInput
from lightning_influence.replay.rerun import Rerun, forward_context
from lightning_influence.replay.weighting import Weighting


def check_rows(rerun: Rerun, way: Weighting, task: Task, step: StepInput) -> None:
    """Raise if the loss of some examples of a step depends on the inputs of others; call within ``rerun.standing``.

    Batch statistics are left out: they are the model's. Where inputs are no floating-point numbers, or the loss is
    written by hand, nothing can be told.

    Args:
        rerun: The run.
        way: How its loss is weighted.
        task: Its loss.
        step: One of its steps.
    """
    if way.by_hand is not None:
        return
    places = [place for place, batch in enumerate(step.record.batches) if batch.loss is not None]
    for place in places[:1]:
        batch, n = step.batches[place], len(step.record.batches[place].indices)
        inputs = list[Tensor]()

        def followed(tensor: Tensor, n: int = n, inputs: list[Tensor] = inputs) -> Tensor:
            if not tensor.is_floating_point() or tensor.ndim == 0 or len(tensor) != n:
                return tensor.clone()
            inputs.append(tensor.detach().clone().requires_grad_(True))
            return inputs[-1].clone()  # the step may write to it

        given = map_tensors(followed, batch)
        if n < 2 or not inputs:
            continue
        write(places_of(rerun.module), {**step.state.parameters, **step.state.buffers})
        rerun.stand(step, place)
        if _leave_statistics(rerun.module) and _others_matter(rerun, way, task, given, n, inputs):
            raise ReplayError(
                f"at step {step.state.step} the loss of some examples depends on others of their batch (mixup, CutMix, "
                "pairs): a row of it is no example's own, and what leaving one out does is not to be had by weights. "
                "The influence at the end of training can be asked (`task=` of `InfluenceAudit`)."
            )


def _others_matter(rerun: Rerun, way: Weighting, task: Task, given: Any, n: int, inputs: list[Tensor]) -> bool:
    like = next(p for p in rerun.module.parameters() if p.is_floating_point())
    weights = torch.zeros(n, dtype=like.dtype, device=like.device)
    weights[: n // 2] = 1
    try:
        with forward_context(rerun.record.recipe, rerun.module):
            loss, _ = way.loss(task, rerun.module, given, weights.requires_grad_(True))
        parts = torch.autograd.grad(loss, inputs, allow_unused=True)
    except Exception:  # a step that takes no inputs with gradients: nothing is told by it
        return False
    return any(part is not None and bool(part[n // 2 :].any()) for part in parts)


def _leave_statistics(module: nn.Module) -> bool:
    """Let normalisation layers use what they have; tell whether all of them can."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.running_mean is None:
                return False
            layer.training = False
    return True
