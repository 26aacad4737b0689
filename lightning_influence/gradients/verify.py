"""A look at one batch before the work starts: are the per-example gradients right, and what will a pass cost?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.isolation import untouched
from lightning_influence.core.memory import available_bytes, let_go
from lightning_influence.core.precision import wide
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.attempts import Attempt
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.precision_watch import PrecisionWatch, lower_precision
from lightning_influence.layers import per_sample
from lightning_influence.layers.rows import some
from lightning_influence.objective.scale import LossScale
from lightning_influence.objective.standard_task import StandardTask, suggested

# Of sums over a batch, and of an example's own gradient in a batch and among copies of itself, by the lowest precision
# that takes part; the last below single precision.
_TOLERANCES = {torch.float64: (1e-8, 1e-8), torch.float32: (2e-3, 1e-4)}
_COARSE = (5e-2, 5e-2)
# Gradients below this share of the whole are rounding noise in a layer that hardly learns.
_NEGLIGIBLE = 1e-4
# The share of others below which an example's own gradient is rounding.
_SMALL_SHARE = 1e-2
# Directions of its activations in which such a gradient is looked at.
_DIRECTIONS = 64
# Examples compared so, chosen at random, besides the first and the last one.
_DRAWN = 2

# Captured tensors of a batch may take so many bytes: beyond, they fall out of the caches, every batch asks the system
# for fresh memory, and larger batches no longer pay.
_ROOM = 2**24
# Accelerators have no such caches: this share of their free memory.
_SHARE = 1 / 8
_LARGEST_BATCH = 512
# Of so many bytes a smaller batch is as fast, on a host: a few examples are work enough for a matrix product.
_ENOUGH = 2**28
# Training batches up to this size are looked at as a whole.
_SMALL_BATCH = 16


class VerificationError(RuntimeError):
    """Captured per-example gradients disagree with autograd; the message names the layers and the way out."""


@dataclass(frozen=True)
class Inspection:
    """What one batch tells about the passes to come.

    Attributes:
        positions: Layer name to the number of positions ``s``, in order of the forward pass.
        tapped: Whether known loss calls account for the whole loss.
        exact_draws: Backward passes of the exact Fisher (classes or outputs), None without a closed form.
        batch_bytes: Memory that the captured tensors of these examples take, the largest layer laid out included.
        largest_error: Largest relative difference to autograd over the layers; None if not verified.
        seconds: Wall time of their forward and backward pass (the first batch is slower than later ones).
        examples: Number of examples looked at.
        random: Whether the step draws random numbers of its own in eval mode.
        labels_of: The loss that tells the labels, if there are others that have other ones.
    """

    positions: dict[str, int]
    tapped: bool
    exact_draws: int | None
    batch_bytes: int
    largest_error: float | None
    seconds: float
    examples: int
    random: bool = False
    labels_of: str = ""


@dataclass(frozen=True, eq=False)
class _Look:
    """Per-example gradients of one batch, summed up."""

    inspection: Inspection
    sums: dict[str, Tensor]
    norms: dict[str, Tensor]
    values: Tensor | None
    finite: Tensor
    scale: LossScale
    tolerance: float
    own_tolerance: float
    kept: dict[str, Tensor]


def roomy_batch_size(inspection: Inspection, source: ExampleSource, device: torch.device) -> int:
    """Return the batch size for passes: at least what was looked at, larger where memory and caches allow it.

    Small batches cost more time in Python, and in launches, than in arithmetic. An accelerator takes at least the
    training batch: it has room for that, and what it has no room for after all comes again in halves. The host has no
    such second chance: large examples get half of the training batch there, as a pass holds output gradients beside
    activations, and fewer once they take 256 MB.
    """
    per_example = max(inspection.batch_bytes // inspection.examples, 1)
    least, room = inspection.examples, float(_ROOM)
    if device.type == "cpu":
        least = max(1, min(least, _ENOUGH // per_example))
    else:
        least, room = source.batch_size, (available_bytes(device) or 0) * _SHARE
    size = max(least, min(_LARGEST_BATCH, int(max(room, _ROOM)) // per_example))
    return size if source.room.most is None else min(size, source.room.most)


def looked_at(training_batch: int) -> int:
    """Return how many examples of a training batch a look takes: half of it, but all of a small one."""
    return max(min(training_batch, _SMALL_BATCH), training_batch // 2)


def inspect(gradients: ExampleGradients, indices: Sequence[int], *, verify: bool = True) -> Inspection:
    """Run one batch, and check its per-example gradients against autograd.

    Two checks: the summed per-example gradients equal ``.grad`` of the batch loss; and examples among copies of
    themselves have the loss and the gradient that they have in the batch, so that gradients are filed under the right
    example and no example's loss depends on its neighbours. Non-finite examples are left out of the checks.

    Args:
        gradients: The passes.
        indices: Dataset indices; the first of them are looked at, half a training batch (see ``looked_at``), a
            few where gradients are computed one example at a time.
        verify: Whether to check; without, the batch is only measured.

    Returns:
        What was seen.

    Raises:
        VerificationError: If a check fails.
        LayerError: If a layer is used in a way that is not understood.
    """
    source, attempt = gradients.source, Attempt()
    size = looked_at(source.batch_size)
    if gradients.coverage.one_by_one:  # every example's gradient is held whole, here and in all passes after it
        size = min(size, _SMALL_BATCH)
    while True:
        chosen = source.settled(list(indices)[:size])
        if not chosen:
            raise VerificationError("there is no training example to look at: the data set or the sampler is empty.")
        attempt.begin(len(chosen))
        with attempt:
            return _inspected(gradients, chosen, verify=verify)
        size = (len(chosen) + 1) // 2
        source.room.shrink(len(chosen), size)
        let_go()


def _inspected(gradients: ExampleGradients, indices: list[int], *, verify: bool) -> Inspection:
    """Run a batch of these examples and check it."""
    drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(len(indices)))[:_DRAWN].tolist()
    compared = list(dict.fromkeys((0, len(indices) - 1, *drawn))) if verify else []
    look = _look(gradients, indices, keep=compared, summed=verify)
    if not verify:
        return look.inspection
    if not bool(look.finite.all()):
        good = [index for index, finite in zip(indices, look.finite.tolist(), strict=True) if finite]
        if not good:
            return look.inspection
        checked = inspect(gradients, good)
        return replace(look.inspection, largest_error=checked.largest_error, random=checked.random)
    random = _draws_random_numbers(gradients, indices, look)
    if random and gradients.coverage.one_by_one:
        raise VerificationError(
            "the step draws random numbers of its own, other ones for one example than for a batch: gradients computed "
            f"one example at a time would not be those of training ({', '.join(sorted(gradients.coverage.one_by_one))}"
            '). Leave these layers out with `uncovered="report"`, or pass `task=` (`loss=` of `Influence`) without '
            "the randomness."
        )
    error = _compare(gradients, indices, look)
    look.sums.clear()  # as large as the model
    if len(indices) > 1:
        _compare_alone(gradients, indices, look, compared, random)
    return replace(look.inspection, largest_error=error, random=random)


def _look(
    gradients: ExampleGradients,
    indices: list[int],
    scale: LossScale | None = None,
    *,
    step_seed: int = 0,
    keep: Sequence[int] = (),
    summed: bool = False,
) -> _Look:
    """Run one batch; by default every term is scaled such that the batch loss is the mean over this very batch.

    Args:
        gradients: The passes.
        indices: The examples.
        scale: Of the loss.
        step_seed: Of what the step draws.
        keep: Positions of the examples whose gradients are kept, see ``_seen``.
        summed: Whether to sum up the gradients of all examples.
    """
    positions: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    largest = 0
    norms: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    start = time.perf_counter()
    watch = PrecisionWatch()
    run = (
        gradients.with_scale(scale).within(lambda: watch).run(indices, everywhere=True, whole=True, step_seed=step_seed)
    )
    with closing(run) as batches:
        item = next(batches)
        loss = item.loss
        for io in item.layers():
            positions[io.name] = io.x.shape[2]
            largest = max(largest, io.x.nbytes)  # as it is worked on, beside all that lies in the capture
            if summed:
                sums[io.name] = per_sample.summed_gradient(io.x, io.gs[0])
            norms[io.name] = wide(per_sample.squared_norms(io.x, io.gs[0]))
            if keep:
                these = torch.tensor(list(keep), device=io.x.device)
                kept[io.name] = per_sample.formed(_seen(some(io.x, these)), some(io.gs[0], these))
        dtype = reduce(lower_precision, (block.dtype for block in sums.values()), watch.lowest)
        inspection = Inspection(
            positions,
            loss.tapped,
            loss.exact_draws(),
            item.capture.held_bytes + largest,
            None,
            time.perf_counter() - start,
            len(indices),
            labels_of=loss.labels_of(),
        )
        return _Look(
            inspection,
            sums,
            norms,
            loss.values,
            item.finite,
            loss.scale,
            *_TOLERANCES.get(dtype, _COARSE),
            kept,
        )


def _seen(x: Tensor) -> Tensor:
    """Return activations ``[k, n, s, i]`` as seen from a few random directions, always the same ones.

    Lengths of gradients, and of their differences, stay about the same (Johnson & Lindenstrauss 1984): enough to tell
    rounding from another gradient, where a few whole ones would be a few times the model.
    """
    size = x.shape[-1]
    if size <= _DIRECTIONS:
        return x
    directions = torch.randn(size, _DIRECTIONS, generator=torch.Generator().manual_seed(size))
    return x @ directions.div_(math.sqrt(_DIRECTIONS)).to(x)


def _draws_random_numbers(gradients: ExampleGradients, indices: list[int], look: _Look) -> bool:
    """Tell whether the step draws random numbers: another seed gives other gradients."""
    again = _look(gradients, indices, step_seed=1)
    return any(
        not torch.allclose(norms, again.norms[name], rtol=look.tolerance, atol=_smallest(look, name))
        for name, norms in look.norms.items()
        if name in again.norms
    )


def batch_gradient(gradients: ExampleGradients, batch: Any, n: int) -> dict[str, Tensor]:
    """Return the gradient of the loss of a batch of ``n`` by plain autograd: ``[k, o, i]`` by block."""
    blocks = gradients.coverage.blocks
    owned = {name: p for block in blocks.values() for name, p in block.parameters.items()}
    with untouched(gradients.module, gradients.task):
        for tensor in owned.values():
            tensor.requires_grad_(True)
        loss = gradients.with_scale(None).forward(batch, n)
        found = torch.autograd.grad(loss.loss, list(owned.values()), materialize_grads=True)
    whole = {name: gradient.to_dense() for name, gradient in zip(owned, found, strict=True)}
    return {name: block.from_parameters(whole) for name, block in blocks.items()}


def _compare(gradients: ExampleGradients, indices: list[int], look: _Look) -> float:
    with isolated_rng():
        batch = gradients.source.one_batch(indices)
    expected = batch_gradient(gradients, batch, len(indices))
    whole = max((float(block.norm()) for block in expected.values()), default=0.0)
    errors: dict[str, float] = {}
    for name, block in expected.items():
        mean = look.sums[name] / len(indices) if name in look.sums else torch.zeros_like(block)
        floor = max(float(block.norm()), _NEGLIGIBLE * whole, torch.finfo(block.dtype).tiny)
        errors[name] = float((mean - block).norm()) / floor
    wrong = {name: e for name, e in errors.items() if not e <= look.tolerance}
    if wrong:
        listed = ", ".join(
            f"{name} ({_percent(e)} off)" for name, e in sorted(wrong.items(), key=lambda item: -item[1])[:8]
        )
        raise VerificationError(
            f"the per-example gradients do not add up to the gradient of the batch loss in: {listed}. Their parameters "
            "are used outside the layer's own forward (a functional call, a penalty on the weights in "
            "`training_step`), or the loss is not the mean over the batch. Freeze those layers, pass `task=` (`loss=` "
            "of `Influence`) with the plain loss, or accept the error with `verify=False`."
        )
    return max(errors.values(), default=0.0)


def _compare_alone(
    gradients: ExampleGradients, indices: list[int], look: _Look, compared: list[int], random: bool
) -> None:
    """Give a few examples copies of themselves for neighbours: nothing may change for them.

    In a batch of the same size, at the same place: a step that draws noise for each example then draws the same, and
    one that squeezes its batch or takes batch statistics can run. Without such draws, the size of the batch may not
    matter either (it does for an unknown sum).
    """
    n = len(indices)
    trials = [(k, position, n) for k, position in enumerate(compared)]
    if not random:
        trials.append((0, 0, _copies(n)))
    for k, position, size in trials:
        alone = _look(gradients, [indices[position]] * size, look.scale, keep=[position])
        own = float(torch.stack([wide(kept[k]).square().sum() for kept in look.kept.values()]).sum().sqrt())
        pairs: list[tuple[str, Tensor, Tensor, float]] = []
        if look.values is not None and alone.values is not None:
            pairs.append(("loss", look.values[position], alone.values[position], 1e-12))
        pairs += [
            (f"gradient in {name}", kept[k], alone.kept[name][0], _smallest_own(look, name, own))
            for name, kept in look.kept.items()
            if name in alone.kept
        ]
        for what, in_batch, by_itself, smallest in pairs:
            there, here = float(in_batch.norm()), float(by_itself.norm())
            error = float((in_batch - by_itself).norm()) / max(here, there, smallest)
            if not error <= look.own_tolerance:
                raise VerificationError(
                    f"example {indices[position]} has another {what} in a batch than alone ({error:.2g} off, sizes "
                    f"{there:.4g} and {here:.4g}): its loss depends on the other examples (a batch norm "
                    "without running statistics, mixup, a contrastive loss, a penalty on means over the batch), or the "
                    "batch is not the first dimension of "
                    "the layers' inputs and the logits, or the batch loss is not the mean of the losses of its "
                    "examples alone and no known loss call was seen that would tell each one's part. Influence of "
                    "single examples is not defined then; pass "
                    f"{_way_out(gradients, indices)}, or accept it with `verify=False`."
                )


def _way_out(gradients: ExampleGradients, indices: list[int]) -> str:
    """Return a task that is defined for every example alone, in the terms of the module and of the batch at hand."""
    task = "`task=` (`loss=` of `Influence`), a function (module, batch) -> one loss per example"
    if isinstance(gradients.task, StandardTask):
        return f"{task}, and mix examples in `training_step` rather than before it"
    with isolated_rng():
        batch = gradients.source.one_batch(indices)
    with untouched(gradients.module, gradients.task):
        line = gradients.applied(suggested, batch)
    return task if line is None else f"the loss of each example alone, {line} (else {task})"


def _smallest_own(look: _Look, name: str, own: float) -> float:
    """Return the norm below which an example's gradient in a block is compared with that of others, or all its own."""
    return max(_SMALL_SHARE * own, _SMALL_SHARE * float(look.norms[name].max().sqrt()), 1e-30)


def _smallest(look: _Look, name: str) -> float:
    """Return the squared norm below which a block's gradient is rounding noise."""
    whole = float(torch.stack(list(look.norms.values())).sum(0).max())
    return max(1e-6 * float(look.norms[name].max()), _NEGLIGIBLE**2 * whole)


def _percent(share: float) -> str:
    return f"{share:.1%}" if not share < 1e-3 else f"{100 * share:.1g}%"


def _copies(n: int) -> int:
    """Size of a small batch of copies: not one, and never that of the batch, whose sum would pass for its mean."""
    return 2 if n != 2 else 3
