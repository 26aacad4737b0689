"""Sub-networks of a model with dropout, and the ensemble of inner products over them (IP; 2405.17490).

In training every example gets a mask of its own. Here a mask belongs to the member of an ensemble: the same units are
off for all examples, so that a member is one network with fewer units, whose gradients go together. Masks depend on the
seed, the member, and which call of dropout it is, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.core.errors import check_count
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.pairs import PairSum, PairwiseScores

# Those that drop whole channels, which come second.
_BY_CHANNEL = (F.dropout1d, F.dropout2d, F.dropout3d)
_DROPOUTS = (F.dropout, torch.dropout, torch.dropout_, *_BY_CHANNEL)


class DropoutMasks:
    """A context for forward passes in which dropout switches off the same units for all examples, in eval mode, too.

    A unit is an entry of the last dimension of a tensor of up to three dimensions, and of the second one (a channel, an
    attention head) of a larger one or where the function drops channels: at all positions of an example it is on or
    off. What ``nn.MultiheadAttention``, recurrent layers and alpha dropout drop is left on.

    Args:
        seed: Of all members.
        member: Number of the sub-network.

    Attributes:
        calls: How many calls of dropout have been masked so far.

    Example:
        >>> passes = gradients.within(DropoutMasks(seed=0, member=3))
    """

    def __init__(self, seed: int = 0, member: int = 0) -> None:
        self.seed = seed
        self.member = member
        self.calls = 0

    def __call__(self) -> TorchFunctionMode:
        """Return the context of one forward pass."""
        return _Masked(self)

    def mask(self, number: int, size: int, p: float) -> Tensor:
        """Return which units stay on in a call of dropout, ``[size]`` bool.

        Args:
            number: Of the call in its forward pass.
            size: Number of units.
            p: Share of the units to switch off.
        """
        stream = np.random.Philox(key=[self.seed, self.member], counter=[0, 0, 0, number])
        return torch.from_numpy(np.random.Generator(stream).random(size) >= p)


class _Masked(TorchFunctionMode):
    def __init__(self, masks: DropoutMasks) -> None:
        super().__init__()
        self._masks = masks
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Mask the input of a dropout; run any other call unchanged."""
        if func not in _DROPOUTS:
            return func(*args, **(kwargs or {}))
        return self._dropped(func, *args, **(kwargs or {}))

    def _dropped(
        self,
        func: Callable[..., Any],
        input: Tensor,
        p: float = 0.5,
        training: bool = False,
        inplace: bool = False,
        train: bool = False,
    ) -> Tensor:
        if not p:
            return input
        if input.ndim < 2:
            raise ValueError(
                f"dropout of a tensor of the shape {list(input.shape)}: examples and units can't be told apart; "
                "expected at least two dimensions."
            )
        dim = 1 if func in _BY_CHANNEL or input.ndim > 3 else -1
        on = self._masks.mask(self._calls, input.shape[dim], p)
        self._calls += 1
        self._masks.calls += 1
        shape = [1] * input.ndim
        shape[dim] = -1
        scale = (on.double() / (1 - p) if p < 1 else on).to(input).view(shape)
        return input.mul_(scale) if inplace or func == torch.dropout_ else input * scale


def ip_ensemble(
    gradients: ExampleGradients,
    indices: Sequence[int],
    queries: ExampleGradients,
    query_indices: Sequence[int],
    *,
    masks: int = 10,
    seed: int = 0,
) -> PairwiseScores:
    """Return the mean over sub-networks of the inner products of gradients, ``g_qᵀ g_z``.

    Over models of several seeds, ``pairs.mean_scores`` does the same for scores of any kind.

    Args:
        gradients: Passes over the training data, through a model with dropout.
        indices: The training examples; one that is named twice counts once.
        queries: Passes over the queries' data, with the model and coverage of the training data.
        query_indices: The queries.
        masks: Number of sub-networks; each takes a pass over the training data.
        seed: Of the masks.

    Returns:
        All scores, on the host; the same on every process, for every batch size and number of workers.

    Raises:
        ValueError: If ``masks`` is less than 1, the model has no dropout that can be masked, or training data and
            queries do not go together.
        QueryError: If the training task can't be run on the queries.
    """
    check_count("masks", masks)
    check_count("seed", seed, least=0)
    member = DropoutMasks(seed)
    total = PairSum(gradients.within(member), indices, queries.within(member), query_indices)
    _check_dropout(total.gradients, member, indices[:2])
    for number in range(masks):
        member.member = number
        for rows, asked in total.prepared():
            total.add(rows, asked, 1 / masks)
    return total.result()


def _check_dropout(gradients: ExampleGradients, masks: DropoutMasks, indices: Sequence[int]) -> None:
    """Raise ``ValueError`` if no dropout is called with these examples."""
    with closing(gradients.run(indices, everywhere=True)) as batches:
        for _ in batches:
            pass
    if not masks.calls:
        raise ValueError(
            f"{type(gradients.module).__name__} calls no dropout with a rate above 0 that could be masked: all "
            'sub-networks are the model itself. Use `influence.fit("identity").pairs(...)`, or average the '
            "scores of models of several seeds with `mean_scores`."
        )
