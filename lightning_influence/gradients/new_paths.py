"""Batches that take a path through the model, or have terms of the loss, that no batch before them had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_influence.gradients.discover import trace_model
from lightning_influence.layers.blocks import LayerError, NewPathError
from lightning_influence.objective.terms import BatchLoss

if TYPE_CHECKING:
    from lightning_influence.gradients.passes import ExampleGradients


def followed(gradients: ExampleGradients, indices: Sequence[int], evaluate: Callable[[], BatchLoss]) -> BatchLoss:
    """Return the loss of a batch; what is new in it is traced first.

    Args:
        gradients: The passes.
        indices: The examples of the batch.
        evaluate: Runs the batch.
    """
    for whole in (False, True):
        try:
            loss = evaluate()
        except NewPathError:
            # A few of the examples may take the same path as all of them, at a fraction of the memory.
            _trace(gradients, indices, whole)
        else:
            if not _met_new_terms(gradients, loss, indices):
                return loss
    return evaluate()


def _met_new_terms(gradients: ExampleGradients, loss: BatchLoss, indices: Sequence[int]) -> bool:
    """Trace a batch whose loss has terms that no traced batch had; tell whether that has told more of them."""
    trace = gradients.coverage.trace
    new = {term.key for term in loss.seen} - trace.forms.keys() - trace.formless
    if not new or trace.failure is not None or not trace.forms:
        return False
    _trace(gradients, indices, whole=True)
    trace.formless |= new - trace.forms.keys()
    return not new <= trace.formless


def _trace(gradients: ExampleGradients, indices: Sequence[int], whole: bool) -> None:
    coverage = gradients.coverage
    trace = trace_model(
        gradients.module,
        gradients.task,
        gradients.source,
        indices=indices,
        whole=whole,
        to_device=gradients.to_device,
        forward_context=gradients.forward_context,
    )
    for block in coverage.blocks.values():
        for name, parameter in block.parameters.items():
            for use in trace.uses(parameter):
                if use.kind == "unknown" and block.name not in coverage.one_by_one:
                    raise LayerError(
                        f"{name!r} is {use.reason}, in the batch of examples {indices[0]}, {indices[-1]} and those "
                        "between, though not in the first batch. Leave it out by `layers=`, or freeze it."
                    )
    coverage.trace.add(trace)
