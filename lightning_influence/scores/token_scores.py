"""What the score of a pair is made of, by the tokens of the training example.

The gradient of an example is a sum over layers and positions, ``Σ_s g_s x_sᵀ``, and so is its score with a query,
``Σ_s g_sᵀ v x_s``. Where a layer has a position for each token, each gets its part. What layers with other positions
contribute (norms, a head on pooled features) is the rest: the sum of all is the score.

Index legend: ``q`` queries, ``n`` training examples, ``s`` positions.
"""

from __future__ import annotations

import re
from collections.abc import Set

from torch import Tensor

from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients
from lightning_influence.gradients.visitors import Visitor
from lightning_influence.scores.queries import PreparedQueries

# The states of these are used from the last step to the first.
_BACKWARDS = re.compile(r"weight_hh_l\d+_reverse$")


class TokenScores(Visitor):
    """Takes the scores of prepared queries and examples apart, of examples with the same number of tokens.

    Args:
        prepared: The queries.
        length: Number of tokens of each example. A layer with as many positions is taken to have one for each, in
            their order.
        fixed: Rows of layers that have as many by chance, see ``positions``.

    Attributes:
        positions: Layers, which of their kinds of rows, and how many positions these have: that tell of tokens only if
            texts of other lengths have other numbers.
        found: Index of a training example to its scores by token, and what is no token's, ``[q, length + 1]``; NaN
            without a finite gradient.
        told: Whether any layer had a position for each token.
    """

    def __init__(self, prepared: PreparedQueries, length: int, fixed: Set[tuple[str, int, int]] = frozenset()) -> None:
        self._prepared, self._length, self._fixed = prepared, length, fixed
        self.positions: set[tuple[str, int, int]] = set()
        self.found: dict[int, Tensor] = {}
        self.told = False

    def begin(self, batch: BatchGradients) -> None:
        """Make room for a batch."""
        of_queries = self._prepared.self_influence
        self._scores = of_queries.new_zeros((batch.loss.n, len(of_queries), self._length + 1))

    def add(self, io: LayerIO) -> None:
        """Add a layer's part, position by position."""
        for kind, part in enumerate(self._prepared.by_position(io)):
            part, here = part.to(self._scores), (io.name, kind, part.shape[2])
            self.positions.add(here)
            if part.shape[2] == self._length and here not in self._fixed:
                self._scores[..., :-1] += part.flip(2) if _BACKWARDS.search(io.name) else part
                self.told = True
            else:
                self._scores[..., -1] += part.sum(2)

    def end(self, batch: BatchGradients) -> None:
        """Leave out what is not finite."""
        self._scores[~batch.finite] = float("nan")
        self._indices = batch.indices

    def file(self) -> None:
        """Keep the batch's scores, on the host."""
        self.found |= dict(zip(self._indices, self._scores.cpu(), strict=True))
