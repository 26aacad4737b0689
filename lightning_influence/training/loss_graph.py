"""The loss of a training batch, read off its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.torch_private import ahead_of, is_packed, name_of, saved
from lightning_influence.objective.losses import CrossEntropy, LossCall

_REDUCTIONS = ("none", "mean", "sum")


def call_in_graph(loss: Tensor) -> CrossEntropy | None:
    """Return the softmax cross-entropy (or ``nll_loss``) that a loss is a multiple of, as its graph tells it.

    Its ``input`` are the log-probabilities that the backward pass needs. None if the loss is anything else, has no hard
    labels, or its graph does not keep the tensors themselves (activation checkpointing, offloading): to ask for them
    would compute them.
    """
    node = _behind_factors(loss)
    if node is None or name_of(node) != "NllLossBackward0":
        return None
    try:
        packed = is_packed(node, "self")  # as its target is then
    except AttributeError:  # older versions of torch do not tell
        return None
    # Logits of lower precision are not what was rounded.
    if packed or (logits := saved(node, "self")).dtype not in (torch.float32, torch.float64):
        return None
    ignored = saved(node, "ignore_index")
    return CrossEntropy(
        loss,
        logits,
        saved(node, "target"),
        _REDUCTIONS[saved(node, "reduction")],
        class_weights=saved(node, "weight"),
        ignore_index=ignored - 2**64 if ignored >= 2**63 else ignored,  # nodes tell negative numbers wrapped around
        log_probabilities=True,
    )


def trained_elements(loss: Tensor, call: LossCall) -> LossCall:
    """Return a call whose elements are known not to count where the batch loss gives them no weight: a mask by hand.

    Only where the task has the elements in its hands (``reduction="none"``); what is run backward is the little that
    it did with them, long before training's own backward pass.
    """
    if call.reduction != "none" or call.output.ndim == 0 or _is_plain_mean(loss, call.output):
        return call
    (coefficient,) = torch.autograd.grad(loss, call.output, retain_graph=True, allow_unused=True)
    return call if coefficient is None else call.counting(coefficient.detach() != 0)


def _is_plain_mean(loss: Tensor, elements: Tensor) -> bool:
    """Tell whether a loss is a multiple of the mean or sum of elements, of which none can be left out then."""
    node = _behind_factors(loss)
    whole = node is not None and node.name() in ("MeanBackward0", "SumBackward0")
    return whole and ahead_of(node)[0][0] is elements.grad_fn


def _behind_factors(loss: Tensor) -> Any:
    """Return the node of what a loss is a multiple of: trainers divide it, or scale it."""
    node: Any = loss.grad_fn
    while node is not None and name_of(node) in ("DivBackward0", "MulBackward0"):
        factors = [following for following, _ in ahead_of(node) if following is not None]
        node = factors[0] if len(factors) == 1 else None
    return node
