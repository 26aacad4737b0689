"""What an example's neighbours say about its label."""

from __future__ import annotations

import torch
from torch import Tensor

# Neighbours are looked for among at most so many examples: the cost then grows with N, not with N².
_MAX_REFERENCES = 10_000
_CHUNK_ELEMENTS = 2**24


def disagreement(features: Tensor, labels: Tensor, *, neighbours: int = 20, seed: int = 0) -> Tensor:
    """Return the share of each example's nearest neighbours that carry another label.

    Distances are cosines between centred features; an example is not its own neighbour. Beyond 10,000 examples,
    neighbours are looked for in a random 10,000 of them.

    Args:
        features: ``[n, d]``, such as the inputs of the last layer.
        labels: ``[n]`` integers; negative ones are unknown, neither rated nor counted.
        neighbours: Number of neighbours.
        seed: Seed of the random reference set.

    Returns:
        ``[n]`` between 0 and 1; NaN for unknown labels and non-finite features.
    """
    usable = (labels >= 0) & torch.isfinite(features).all(1)
    result = torch.full((features.shape[0],), torch.nan, dtype=torch.float32, device=features.device)
    rows = usable.nonzero().squeeze(1)
    if len(rows) < 2:
        return result
    centred = features[rows].float()
    centred = centred - centred.mean(0)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    own = labels[rows]
    generator = torch.Generator().manual_seed(seed)
    references = torch.randperm(len(rows), generator=generator)[:_MAX_REFERENCES].sort().values.to(rows.device)
    among = unit[references]
    k = min(neighbours, len(references) - 1)
    shares = []
    step = max(1, _CHUNK_ELEMENTS // len(references))
    for start in range(0, len(rows), step):
        chunk = torch.arange(start, min(start + step, len(rows)), device=rows.device)
        cosines = unit[chunk] @ among.T
        place = torch.searchsorted(references, chunk).clamp_(max=len(references) - 1)
        itself = references[place] == chunk
        cosines[itself.nonzero().squeeze(1), place[itself]] = -torch.inf
        nearest = references[cosines.topk(k, 1).indices]
        shares.append((own[nearest] != own[chunk].unsqueeze(1)).float().mean(1))
    result[rows] = torch.cat(shares)
    return result
