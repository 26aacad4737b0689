"""Ground truth for attribution: many small networks trained at once, each on a random half of the data.

All models have a leading axis and take one step together, each on a batch of its own subset: 1,000 multilayer
perceptrons take seconds. Layer shapes and starting weights are those of ``torch.nn``.

Index legend: ``m`` models, ``b`` examples of a batch, ``q`` queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.metrics import linear_datamodeling_correlations

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum and L2 weight decay, a fixed number of epochs, no last odd batch."""

    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: int

    def steps(self, examples: int) -> int:
        """Return the number of optimizer steps ``K``."""
        return self.epochs * (examples // self.batch_size)

    def trainer_damping(self, examples: int) -> float:
        """Return ``1 / (η K / (1 - momentum))``."""
        return (1 - self.momentum) / (self.learning_rate * self.steps(examples))


def train(
    net: nn.Sequential,
    inputs: Tensor,
    labels: Tensor,
    subsets: Tensor,
    seeds: Sequence[int],
    recipe: Recipe,
    at_epoch: Callable[[int, dict[str, Tensor]], None] | None = None,
    *,
    weights: Tensor | None = None,
    order_seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Train one copy of ``net`` for every row of ``subsets``.

    Args:
        net: Linear and convolutional layers, GELU, ReLU, Flatten, Dropout. Its weights do not matter.
        inputs: ``[N, ...]``.
        labels: ``[N]``, or for each model its own ``[m, N]``.
        subsets: Indices of each model's training examples, ``[m, size]``.
        seeds: Of every model's start and order of batches.
        recipe: How to train.
        at_epoch: Called after each epoch with its number and the parameters.
        weights: ``[m, N]``; 0 leaves an example out of a model's batches, whose order then stays that of all examples.
        order_seeds: Of the order of batches alone.

    Returns:
        Parameter name to ``[m, *shape]``.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    parameters = {name: value.requires_grad_(True) for name, value in _starts(net, generators).items()}
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    if order_seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in order_seeds]
    models, size = subsets.shape
    labels = labels.expand(models, -1)
    weights = None if weights is None else weights.to(inputs.dtype)
    net.train()
    torch.manual_seed(seeds[0])  # of dropout
    for epoch in range(recipe.epochs):
        orders = torch.stack([torch.randperm(size, generator=generator) for generator in generators])
        shuffled = subsets.gather(1, orders)
        for start in range(0, size - recipe.batch_size + 1, recipe.batch_size):
            chosen = shuffled[:, start : start + recipe.batch_size]  # mb
            logits = forward(net, parameters, inputs[chosen])
            # A sum over models of means over their batches: no model's gradient knows of the others.
            targets = labels.gather(1, chosen).flatten()
            if weights is None:
                loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / recipe.batch_size
            else:
                each = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(models, -1)
                kept = weights.gather(1, chosen)  # mb
                loss = ((each * kept).sum(1) / kept.sum(1).clamp(min=1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if at_epoch is not None:
            at_epoch(epoch, {name: value.detach().clone() for name, value in parameters.items()})
    return {name: value.detach() for name, value in parameters.items()}


def forward(net: nn.Sequential, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Run ``m`` copies of ``net``, each on inputs of its own ``[m, b, ...]``."""
    m, b = inputs.shape[:2]
    hidden = inputs
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            hidden = torch.baddbmm(
                parameters[f"{name}.bias"].unsqueeze(1), hidden, parameters[f"{name}.weight"].transpose(1, 2)
            )
        elif isinstance(module, nn.Conv2d):
            patches = F.unfold(hidden.flatten(0, 1), module.kernel_size, module.dilation, module.padding, module.stride)
            rows = patches.view(m, b, *patches.shape[1:]).transpose(2, 3).flatten(1, 2)  # m, b·s, i
            weight = parameters[f"{name}.weight"].flatten(2).transpose(1, 2)
            found = torch.baddbmm(parameters[f"{name}.bias"].unsqueeze(1), rows, weight)
            height = (hidden.shape[3] + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
            hidden = found.view(m, b, height, -1, module.out_channels).permute(0, 1, 4, 2, 3)
        elif isinstance(module, nn.Flatten):
            hidden = hidden.flatten(2)
        else:
            hidden = module(hidden)
    return hidden


def margins(net: nn.Sequential, parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the log-odds of each query's label by every model, ``[m, q]``."""
    models = len(next(iter(parameters.values())))
    net.eval()
    with torch.no_grad():
        return log_odds(forward(net, parameters, inputs.expand(models, *inputs.shape)), labels)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-odds of labels ``[q]`` by logits ``[..., q, classes]``, in float64."""
    logits = logits.double()
    places = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    others = logits.scatter(-1, places, -math.inf).logsumexp(-1)
    return logits.gather(-1, places).squeeze(-1) - others


def losses(net: nn.Sequential, parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every model on every query, ``[m, q]``."""
    return F.softplus(-margins(net, parameters, inputs, labels))


def load(net: nn.Sequential, parameters: dict[str, Tensor], model: int) -> nn.Sequential:
    """Put one model's parameters into ``net``."""
    net.load_state_dict({name: value[model] for name, value in parameters.items()})
    return net.eval()


@dataclass(frozen=True)
class GroundTruth:
    """What retraining says.

    Attributes:
        members: ``[subsets, N]``, 1 where an example is in the subset.
        margins: Log-odds of the queries' labels ``[subsets, seeds, queries]``.
    """

    members: Tensor
    margins: Tensor

    @property
    def losses(self) -> Tensor:
        """``[subsets, seeds, queries]``; 0 where a probability rounds to 1."""
        return (1 + (-self.margins).exp()).log()

    @property
    def quality(self) -> Tensor:
        """Minus the loss, averaged over seeds, ``[subsets, queries]``: proponents raise it."""
        return -self.losses.mean(1)

    @property
    def confidence(self) -> Tensor:
        """The margin, averaged over seeds, ``[subsets, queries]``."""
        return self.margins.mean(1)

    @property
    def varies(self) -> Tensor:
        """Which queries have not the same loss after every training; only of these a correlation can be told."""
        return (self.quality != self.quality[0]).any(0)

    def ceiling(self, splits: int = 20) -> float:
        """Return the score that a perfect prediction would reach, as the seeds left are noise.

        Two halves of the seeds agree with a mean rank correlation ``r``; all seeds together have the reliability
        ``2 r / (1 + r)`` (Spearman-Brown), and what has no noise correlates with them by its root.
        """
        seeds = self.losses.shape[1]
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(splits):
            order = torch.randperm(seeds, generator=generator)
            halves = order[: seeds // 2], order[seeds // 2 : 2 * (seeds // 2)]
            first, second = (self.losses[:, half].mean(1)[:, self.varies] for half in halves)
            found.append(float(linear_datamodeling_correlations(first, second).nanmean()))
        r = sum(found) / splits
        return math.sqrt(2 * r / (1 + r))


def halves(count: int, subsets: int) -> Tensor:
    """Return random halves of the data, ``[subsets, count // 2]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(count, generator=generator)[: count // 2] for _ in range(subsets)])


def retrain(
    net: nn.Sequential,
    data: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    subsets: int,
    seeds: int,
    at_once: int,
    kept: Path,
    report: Callable[[str], None],
) -> GroundTruth:
    """Train ``subsets * seeds`` models on random halves of the data, but what is in the folder ``kept``."""
    count, every, found = len(data[1]), halves(len(data[1]), subsets), []
    for seed in range(seeds):
        path = kept / f"{subsets}-halves-seed-{seed}.pt"
        if not path.exists():
            parts = []
            for rows in torch.arange(subsets).split(at_once):
                parameters = train(net, *data, every[rows], [1000 + subsets * seed + int(row) for row in rows], recipe)
                parts.append(margins(net, parameters, *queries))
            keep(torch.cat(parts), path)
            report(f"trained {subsets * (seed + 1):,} of {subsets * seeds:,} models")
        found.append(torch.load(path))
    return GroundTruth(torch.zeros(subsets, count).scatter_(1, every, 1.0), torch.stack(found, 1))


def keep(found: object, path: Path) -> None:
    """Save something, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


@dataclass(frozen=True)
class Score:
    """A linear datamodeling score with its 95 % bootstrap interval over subsets and queries."""

    value: float
    low: float
    high: float


def datamodeling_score(scores: Tensor, truth: GroundTruth, quality: Tensor | None = None, draws: int = 200) -> Score:
    """Return the mean over queries of the rank correlation between predicted and true quality.

    Queries whose loss is the same after every training are left out; a prediction that is the same for every subset
    counts as 0.

    Args:
        scores: ``[queries, N]``, positive for proponents. A subset's prediction is the sum over its members.
        truth: What retraining says.
        quality: Of the queries ``[subsets, queries]``, by default the truth's.
        draws: Bootstrap samples.
    """
    varies = truth.varies
    predicted = truth.members.double() @ scores.double().T[:, varies]
    true = (truth.quality if quality is None else quality)[:, varies]
    value = float(linear_datamodeling_correlations(predicted, true).nan_to_num(0).mean())
    generator = torch.Generator().manual_seed(0)
    subsets, queries = predicted.shape
    found = []
    for _ in range(draws):  # a query may not vary over the subsets drawn
        rows = torch.randint(subsets, (subsets,), generator=generator).unique()
        columns = torch.randint(queries, (queries,), generator=generator)
        found.append(
            float(linear_datamodeling_correlations(predicted[rows][:, columns], true[rows][:, columns]).nanmean())
        )
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Score(value, low, high)


def _starts(net: nn.Sequential, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """Return starting weights as ``torch.nn`` draws them: uniform within one over the root of the fan-in."""
    return {name: torch.stack(rows) for name, rows in _rows(net, generators)}


def _rows(net: nn.Sequential, generators: Sequence[torch.Generator]) -> Iterator[tuple[str, list[Tensor]]]:
    for name, parameter in net.named_parameters():
        weight = net.get_parameter(name.rpartition(".")[0] + ".weight")
        bound = 1 / math.sqrt(weight[0].numel())
        yield name, [(torch.rand(parameter.shape, generator=each) * 2 - 1) * bound for each in generators]
