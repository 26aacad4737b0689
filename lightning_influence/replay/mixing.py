"""Whether a row of the loss is that of one example: mixed ones (mixup, CutMix, contrasts) are no example's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.core.containers import map_tensors
from lightning_influence.core.errors import Forgiving
from lightning_influence.core.precision import wide
from lightning_influence.core.weights import places_of, write
from lightning_influence.objective.task import Task
from lightning_influence.replay.record import ReplayError, StepInput
from lightning_influence.replay.rerun import Rerun, forward_context
from lightning_influence.replay.step import PRECISE
from lightning_influence.replay.weighting import Weighting


def check_rows(rerun: Rerun, way: Weighting, task: Task, step: StepInput) -> None:
    """Raise if the loss of some examples of a step depends on others; call within ``rerun.standing``.

    Half of the examples get the weight 0. The gradient may not change when these change places among themselves, nor
    may the loss depend on their inputs. Batch statistics are left out: they are the model's. What depends on the others
    as a whole, and by integers alone, is not noticed.

    Args:
        rerun: The run.
        way: How its loss is weighted.
        task: Its loss.
        step: One of its steps.
    """
    place = next((place for place, batch in enumerate(step.record.batches) if batch.loss is not None), None)
    if place is None or (n := len(step.record.batches[place].indices)) < 2 or not _leave_statistics(rerun.module):
        return
    # At random: pairs may be neighbours, or the halves of the batch.
    kept, others = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tensor_split([n // 2])
    exchanged = torch.arange(n).index_copy(0, others, others.roll(1))
    batch = step.batches[place]
    parameters = [p for p in rerun.module.parameters() if p.requires_grad]

    def differentiated(given: Any, by: Sequence[Tensor]) -> list[Tensor | None]:
        write(places_of(rerun.module), {**step.state.parameters, **step.state.buffers})
        rerun.stand(step, place)
        _leave_statistics(rerun.module)
        weights = torch.zeros(n).index_fill(0, kept, 1).to(parameters[0]).requires_grad_(True)
        with forward_context(rerun.record.recipe, rerun.module):
            loss, logits = way.loss(task, rerun.module, given, weights)
        return way.gradient(loss, logits, weights, by)

    def placed(rows: Tensor) -> Any:
        # A copy, for the step may write to it.
        return map_tensors(lambda t: t[rows.to(t.device)] if t.ndim and len(t) == n else t.clone(), batch)

    inputs = list[Tensor]()

    def followed(tensor: Tensor) -> Tensor:
        # One number per example is a weight or a mask, whose sum the loss may be divided by.
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != n:
            return tensor.clone()
        inputs.append(tensor.detach().clone().requires_grad_(True))
        return inputs[-1].clone()

    one, other = (differentiated(placed(rows), parameters) for rows in (torch.arange(n), exchanged))
    mixed = _differ(one, other, 1e-3 if rerun.record.recipe.precision in PRECISE else 5e-2)
    given = map_tensors(followed, batch)
    if not mixed and inputs:
        with Forgiving():  # a step that takes no inputs with gradients: nothing is told by it
            found = differentiated(given, inputs)
            mixed = any(part is not None and bool(part[others.to(part.device)].any()) for part in found)
    if mixed:
        raise ReplayError(
            f"at step {step.state.step} the loss of some examples depends on others of their batch (mixup, CutMix, "
            "pairs): a row of it is no example's own, and what leaving one out does is not to be had by weights. "
            "The influence at the end of training can be asked (`task=` of `InfluenceAudit`)."
        )


def _differ(one: Sequence[Tensor | None], other: Sequence[Tensor | None], share: float) -> bool:
    """Tell whether two gradients point elsewhere; their lengths go with the sum that a mean is divided by."""
    met = [(a.detach(), b.detach()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    pairs = [(wide(a), wide(b)) for a, b in met]
    length = sum(float(a.square().sum()) for a, _ in pairs)
    scale = sum(float((a * b).sum()) for a, b in pairs) / (length or 1)
    beside = sum(float((b - scale * a).square().sum()) for a, b in pairs)
    return beside > share**2 * sum(float(b.square().sum()) for _, b in pairs)


def _leave_statistics(module: nn.Module) -> bool:
    """Let normalisation layers use what they have; tell whether all of them can."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.running_mean is None:
                return False
            layer.training = False
    return True
