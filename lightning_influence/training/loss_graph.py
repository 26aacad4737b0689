"""The loss of a training batch, read off its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.objective.losses import CrossEntropy
from lightning_influence.training.dynamics import _FACTORS, _PICKING, _REDUCTIONS, _ROWS_IN


def call_in_graph(loss: Tensor) -> CrossEntropy | None:
    """Return the softmax cross-entropy (or ``nll_loss``) that a loss is a multiple of, as its graph tells it.

    For training steps that nothing watches. Its ``input`` are the log-probabilities that the backward pass needs.

    Args:
        loss: The batch loss, before its backward pass.

    Returns:
        None if the loss is anything else, has no hard labels, or its graph does not keep the tensors themselves
        (activation checkpointing, offloading): to ask for them would compute them.
    """
    node: Any = loss.grad_fn
    while node is not None and node.name() in _FACTORS:
        factors = [following for following, _ in node.next_functions if following is not None]
        node = factors[0] if len(factors) == 1 else None
    if node is None or node.name() != "NllLossBackward0":
        return None
    try:
        packed = node._raw_saved_self.unpack_hook is not None or node._raw_saved_target.unpack_hook is not None
    except AttributeError:  # older versions of torch do not tell
        return None
    if packed:
        return None
    log_probabilities, target = node._saved_self, node._saved_target
    if log_probabilities.dtype not in (torch.float32, torch.float64):
        return None  # logits of lower precision are not what was rounded
    ignored = node._saved_ignore_index
    ignored -= 2**64 if ignored >= 2**63 else 0  # nodes tell negative numbers wrapped around
    return CrossEntropy(
        loss,
        log_probabilities,
        target,
        _REDUCTIONS[node._saved_reduction],
        class_weights=node._saved_weight,
        ignore_index=ignored,
        log_probabilities=True,
    )


@dataclass(frozen=True)
class History:
    """How a tensor came from the data along one single way, on which no rows were picked.

    As long as the kinds of its operations stay the same, so does the way, and the search for picked rows
    (``LossCall.picking``) finds none.

    Attributes:
        kinds: Of the operations, the last one first, each with its number of inputs and the one that has the rows.
    """

    kinds: tuple[tuple[type, int, int], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> History | None:
        """Follow a tensor back to the data, None if there is more than one way or rows were picked."""
        kinds: list[tuple[type, int, int]] = []
        node: Any = tensor.grad_fn
        while node is not None:
            name, inputs = node.name(), node.next_functions
            place = _ROWS_IN.get(name, 0)
            if name in _PICKING or (len(inputs) > 1 and name not in _ROWS_IN):
                return None
            kinds.append((type(node), len(inputs), place))
            node = inputs[place][0] if inputs else None
        return cls(tuple(kinds))

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has this history."""
        node: Any = tensor.grad_fn
        for kind, count, place in self.kinds:
            inputs = getattr(node, "next_functions", ())  # None at the end of a shorter way
            if type(node) is not kind or len(inputs) != count:
                return False
            node = inputs[place][0] if inputs else None
        return node is None
