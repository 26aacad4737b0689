"""What the elements of a loss were divided by, and where they were added up, as its graph tells."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_influence.core.torch_private import shape_of
from lightning_influence.objective.tap import edges_below


def divided(coefficient: Tensor, n: int) -> Tensor:
    """Return the one number that the elements that count were multiplied with; if they differ, that of a mean."""
    counted = coefficient[coefficient != 0]
    if not bool(torch.isfinite(coefficient).any()):
        return torch.tensor(math.inf)  # nothing counts: it was divided by zero
    alike = len(counted) > 0 and bool(counted.max() - counted.min() <= 1e-5 * counted.abs().max())
    return counted[0] if alike else torch.tensor(1 / n)


def reduction_of(loss: Tensor, target: Any) -> tuple[GradientEdge, int] | None:
    """Find the operation that made one number of a node's elements, if there is just one, and what it divides by."""
    users: dict[Any, list[tuple[Any, int]]] = defaultdict(list)
    for node, following, number in edges_below(loss, {target}):
        users[following].append((node, number))
    found: dict[Any, int] = {}
    above, met = [target], {target}
    while above:
        below = above.pop()
        for node, number in users[below]:
            if not shape_of(node):
                found[node] = math.prod(shape_of(below, number))
            elif node not in met:
                met.add(node)
                above.append(node)
    if len(found) != 1:
        return None
    ((node, count),) = found.items()
    return GradientEdge(node, 0), count if node.name().startswith("Mean") else 1
