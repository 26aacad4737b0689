"""Batches that take a path through the model, or have terms of the loss, that no batch before them had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.trace import Trace
from lightning_influence.layers.blocks import LayerError, NewPathError
from lightning_influence.objective.terms import BatchLoss


class _Retrace(Protocol):
    def __call__(self, *, whole: bool) -> Trace: ...


class NewUseError(LayerError):
    """A parameter that was understood is used in another way.

    Attributes:
        trace: Of the batch in question.
    """

    def __init__(self, words: str, trace: Trace) -> None:
        super().__init__(words)
        self.trace = trace


def followed(
    coverage: Coverage, evaluate: Callable[[], BatchLoss], retrace: _Retrace, indices: Sequence[int]
) -> BatchLoss:
    """Return the loss of a batch; what is new in it is traced first.

    Args:
        coverage: How parameters are used, so far.
        evaluate: Runs the batch.
        retrace: Traces a few of its examples, or all of them as one batch.
        indices: Those examples.
    """
    trace = coverage.trace
    for whole in (False, True):
        try:
            loss = evaluate()
        except NewPathError:
            # A few of the examples may take the same path as all of them, at a fraction of the memory.
            _add(coverage, retrace(whole=whole), indices)
            continue
        new = {term.key for term in loss.seen} - trace.forms.keys() - trace.formless
        if not new or trace.failure is not None or not trace.forms:
            return loss
        _add(coverage, retrace(whole=True), indices)
        trace.formless |= new - trace.forms.keys()
        if new <= trace.formless:
            return loss
    return evaluate()


def _add(coverage: Coverage, trace: Trace, indices: Sequence[int]) -> None:
    for block in coverage.blocks.values():
        for name, parameter in block.parameters.items():
            for use in trace.uses(parameter):
                if use.kind == "unknown" and block.name not in coverage.one_by_one:
                    raise NewUseError(
                        f"{name!r} is {use.reason}, in the batch of examples {indices[0]}, {indices[-1]} and those "
                        "between, though not in the batches before. Of a step that picks some of its rows "
                        "(`net(x[mask])`), run it on all rows and weigh what it gives by the mask, or pass such a "
                        "`task=`; or leave it out by `layers=`.",
                        trace,
                    )
    coverage.trace.add(trace)
