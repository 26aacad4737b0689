"""A look at one batch before the work starts: are the per-example gradients right, and what will a pass cost?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence import per_sample
from lightning_influence.passes import ExampleGradients

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
# Gradients below this share of the whole are rounding noise in a layer that hardly learns.
_NEGLIGIBLE = 1e-4


class VerificationError(RuntimeError):
    """Captured per-example gradients disagree with autograd; the message names the layers and the way out."""


@dataclass(frozen=True)
class Inspection:
    """What one batch tells about the passes to come.

    Attributes:
        positions: Layer name to the number of positions ``s``, in order of the forward pass.
        tapped: Whether known loss calls account for the whole loss.
        classes: Draws of the exact Fisher, None without a closed form.
        batch_bytes: Memory that the captured tensors of a batch take, the largest layer's patches included.
        largest_error: Largest relative difference to autograd over the layers; None if not verified.
        seconds: Wall time of the batch's forward and backward pass (the first batch is slower than later ones).
        examples: Number of examples in the batch.
    """

    positions: dict[str, int]
    tapped: bool
    classes: int | None
    batch_bytes: int
    largest_error: float | None
    seconds: float
    examples: int


# Captured tensors of a batch may take so many bytes: beyond, they fall out of the caches, every batch asks the system
# for fresh memory, and larger batches no longer pay.
_ROOM = 2**24
_LARGEST_BATCH = 512


def roomy_batch_size(inspection: Inspection) -> int:
    """Return the batch size for passes: at least that of training, larger where a few megabytes allow it.

    Small batches cost more time in Python than in arithmetic; without optimizer state and weight gradients there is
    room for more than a training batch.
    """
    per_example = max(inspection.batch_bytes // inspection.examples, 1)
    return max(inspection.examples, min(_LARGEST_BATCH, _ROOM // per_example))


def inspect(gradients: ExampleGradients, indices: Sequence[int], *, verify: bool = True) -> Inspection:
    """Run one batch, and check its per-example gradients against autograd.

    Two checks: the summed per-example gradients equal ``.grad`` of the batch loss; and examples run alone have the
    loss and the gradient norm that they have in the batch, so that gradients are filed under the right example and no
    example's loss depends on its neighbours.

    Args:
        gradients: The passes.
        indices: Dataset indices of one batch.
        verify: Whether to check; without, the batch is only measured.

    Returns:
        What was seen.

    Raises:
        VerificationError: If a check fails.
    """
    indices = list(indices)[: gradients.source.batch_size]
    ((_, batch),) = list(gradients.source.batches(indices)) or [([], None)]
    positions: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    largest = total = 0
    norms = torch.zeros(len(indices), device=gradients.device, dtype=torch.float64)
    start = time.perf_counter()
    with closing(gradients.run(indices, everywhere=True)) as batches:
        for item in batches:
            loss = item.loss
            tapped, classes, values, finite = loss.tapped, loss.exact_draws(), loss.values, item.finite
            mean = float(loss.loss.detach())
            for io in item.layers():
                positions[io.name] = io.x.shape[2]
                size = io.x.numel() * io.x.element_size()
                largest, total = max(largest, size), total + size
                sums[io.name] = per_sample.summed_gradient(io.x, io.gs[0])
                norms += per_sample.squared_norms(io.x, io.gs[0]).double()
    seconds = time.perf_counter() - start
    error: float | None = None
    if verify and bool(finite.all()):
        error = _compare(gradients, batch, sums, len(indices))
        _compare_alone(gradients, indices, norms, values, mean)
    return Inspection(positions, tapped, classes, total + largest, error, seconds, len(indices))


def _compare(gradients: ExampleGradients, batch: object, sums: dict[str, Tensor], n: int) -> float:
    autograd = gradients.verification_gradients(batch, n)
    operations = gradients.coverage.operations
    expected = {name: operations[name].from_parameters(tensors) for name, tensors in autograd.items()}
    whole = max((float(block.norm()) for block in expected.values()), default=0.0)
    errors: dict[str, float] = {}
    for name, block in expected.items():
        mean = sums[name] / n if name in sums else torch.zeros_like(block)
        floor = max(float(block.norm()), _NEGLIGIBLE * whole, torch.finfo(block.dtype).tiny)
        errors[name] = float((mean - block).norm()) / floor
    dtype = next(iter(expected.values())).dtype
    wrong = {name: e for name, e in errors.items() if not e <= _TOLERANCE.get(dtype, 5e-2)}
    if wrong:
        listed = ", ".join(f"{name} ({e:.1%} off)" for name, e in sorted(wrong.items(), key=lambda item: -item[1])[:8])
        raise VerificationError(
            f"the per-example gradients do not add up to the gradient of the batch loss in: {listed}. Their "
            "parameters are used outside the layer's own forward (a functional call, a penalty on the weights in "
            "`training_step`), or the loss is not the mean over the batch. Freeze those layers, pass `task=` with the "
            "plain loss, or accept the error with `verify=False`."
        )
    return max(errors.values(), default=0.0)


def _compare_alone(
    gradients: ExampleGradients, indices: list[int], norms: Tensor, values: Tensor | None, mean: float
) -> None:
    """Run a few examples alone; with untapped losses this also tells a mean from a sum."""
    if len(indices) < 2:
        return
    dtype = next(p.dtype for p in gradients.module.parameters() if p.is_floating_point())
    tolerance = 5 * _TOLERANCE.get(dtype, 5e-2)
    alone: list[float] = []
    # Without per-example losses every example of the batch is needed to tell what the batch loss is the mean of.
    positions = [0, len(indices) - 1] if values is not None else range(len(indices))
    scale = float(norms.max())
    for position in positions:
        with closing(gradients.run([indices[position]], everywhere=True)) as batches:
            for item in batches:
                alone.append(float(item.loss.loss.detach()))
                weights = [(term.call.batch_reference(1), term.correction(len(indices))) for term in item.loss.terms]
                norm = sum(float(per_sample.squared_norms(io.x, io.gs[0]).sum()) for io in item.layers())
        if values is None or any(reference != 1.0 for reference, _ in weights):
            continue  # weighted examples have another scale alone
        there = float(norms[position])
        if abs(norm - there) > tolerance * max(norm, there) + 1e-9 * scale:
            raise VerificationError(
                f"example {indices[position]} has another gradient in a batch than alone (squared norm {there:.4g} and "
                f"{norm:.4g}): its loss depends on the other examples (batch statistics, mixup, a contrastive loss), "
                "or the batch is not the first dimension of a layer's input. Influence of single examples is not "
                "defined then; pass `task=` with a loss per example, or accept it with `verify=False`."
            )
    expected = sum(alone) / len(alone)
    if values is None and not abs(expected - mean) <= tolerance * max(abs(mean), 1e-6):
        raise VerificationError(
            f"the batch loss ({mean:.6g}) is not the mean of the losses of its examples alone ({expected:.6g}), "
            "and no known loss call was seen that would tell each example's part. Return the mean from "
            "`training_step`, or pass `task=`, a function (module, batch) -> one loss per example."
        )
