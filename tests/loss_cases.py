"""Losses of sequences of different lengths, wherever their examples are and whoever divides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_influence.core.layout import BatchLayout
from lightning_influence.objective.scale import LossScale, TermKey
from lightning_influence.objective.task import Task, run_tapped
from lightning_influence.objective.terms import BatchLoss, TermForm, understand

N, S, E, C = 12, 5, 4, 3
PAD = -100
Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
# Their stubs do not have the argument `weight` yet.
mse_loss: Callable[..., Tensor] = F.mse_loss
l1_loss: Callable[..., Tensor] = F.l1_loss


def evaluate(
    task: Task,
    module: nn.Module,
    batch: Any,
    n: int,
    scale: LossScale | None = None,
    forms: Mapping[TermKey, TermForm] | None = None,
) -> BatchLoss:
    """Run a task on one batch of `n` examples under the tap, and tell what its loss is made of."""
    return understand(*run_tapped(task, module, batch), n, scale, forms)


def sequences(n: int = N, steps: int = S) -> Batch:
    """Sequences of 1 to `steps` tokens, no two alike, and what is asked about them."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, steps + 1, (n,), generator=generator)
    lengths[0], lengths[1:2] = steps, min(2, steps)
    real = torch.arange(steps) < lengths.unsqueeze(1)
    y = torch.randint(0, C, (n, steps), generator=generator)
    return {
        "x": torch.randn(n, steps, E, generator=generator, dtype=torch.float64),
        "y": y.masked_fill(~real, PAD),
        "real": real,
        "lengths": lengths,
        "last": lengths - 1,
        "t": torch.randn(n, steps, C, generator=generator, dtype=torch.float64),
        "weight": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5,
    }


def taken(batch: Batch, rows: Sequence[int]) -> Batch:
    return {name: value[list(rows)] for name, value in batch.items()}


class Tagger(nn.Module):
    """Logits `[n, s, c]` of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden = nn.Linear(E, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, C)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.features(x)))
        return logits


def token_losses(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every token `[n, s]`, 0 for padding."""
    known = y.clamp(min=0)
    return (y != PAD) * (z.logsumexp(-1) - z.gather(-1, known.unsqueeze(-1)).squeeze(-1))


def _minor(values: Tensor) -> Tensor:
    """`[n, s, ...] -> [s·n, ...]`: one row of each example in turn."""
    return values.transpose(0, 1).flatten(0, 1)


LAYOUTS: dict[str, tuple[Loss, BatchLayout]] = {
    "rows": (lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten()), BatchLayout(0, "major")),
    "viewed": (lambda m, b: F.cross_entropy(m(b["x"]).view(-1, C), b["y"].view(-1)), BatchLayout(0, "major")),
    "positions last": (
        lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"]),
        BatchLayout(0, "major"),
    ),
    "flat inputs": (lambda m, b: F.cross_entropy(m(b["x"].flatten(0, 1)), b["y"].flatten()), BatchLayout(0, "major")),
    "time-major, flat": (lambda m, b: F.cross_entropy(_minor(m(b["x"])), _minor(b["y"])), BatchLayout(0, "minor")),
    "time-major, flat inputs": (
        lambda m, b: F.cross_entropy(m(_minor(b["x"])), _minor(b["y"])),
        BatchLayout(0, "minor"),
    ),
    "time-major": (
        lambda m, b: F.cross_entropy(m(b["x"].transpose(0, 1)).transpose(1, 2), b["y"].T),
        BatchLayout(1, "major"),
    ),
    "examples last": (
        lambda m, b: F.cross_entropy(m(b["x"]).permute(1, 2, 0), b["y"].T),
        BatchLayout(1, "major"),
    ),
}


def _packed(values: Tensor, lengths: Tensor) -> Tensor:
    return pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False).data


def head_of_picked(m: Tagger, b: Batch) -> Tensor:
    return F.cross_entropy(m.head(m.norm(F.gelu(m.features(b["x"])[b["real"]]))), b["y"][b["real"]])


PICKED: dict[str, Loss] = {
    "mask": lambda m, b: F.cross_entropy(m(b["x"])[b["real"]], b["y"][b["real"]]),
    "mask of flat rows": lambda m, b: F.cross_entropy(
        m(b["x"]).view(-1, C)[b["real"].view(-1)], b["y"].view(-1)[b["real"].view(-1)]
    ),
    "numbers of flat rows": lambda m, b: F.cross_entropy(
        m(b["x"]).flatten(0, 1)[b["real"].flatten().nonzero().squeeze(1)], b["y"][b["real"]]
    ),
    "index_select": lambda m, b: F.cross_entropy(
        m(b["x"]).flatten(0, 1).index_select(0, b["real"].flatten().nonzero().squeeze(1)), b["y"][b["real"]]
    ),
    "pairs of numbers": lambda m, b: F.cross_entropy(
        m(b["x"])[b["real"].nonzero(as_tuple=True)], b["y"][b["real"].nonzero(as_tuple=True)]
    ),
    "time-major mask": lambda m, b: F.cross_entropy(m(b["x"]).transpose(0, 1)[b["real"].T], b["y"].T[b["real"].T]),
    "time-major outputs, mask": lambda m, b: F.cross_entropy(
        m(b["x"].transpose(0, 1))[b["real"].T], b["y"].T[b["real"].T]
    ),
    "packed": lambda m, b: F.cross_entropy(_packed(m(b["x"]), b["lengths"]), _packed(b["y"], b["lengths"])),
    "packed, time-major": lambda m, b: F.cross_entropy(
        pack_padded_sequence(m(b["x"].transpose(0, 1)), b["lengths"], enforce_sorted=False).data,
        _packed(b["y"], b["lengths"]),
    ),
    "half precision in between": lambda m, b: F.cross_entropy(
        m(b["x"])[b["real"]].float().double().div(2.0).mul(2.0), b["y"][b["real"]]
    ),
    "log-probabilities": lambda m, b: F.nll_loss(m(b["x"]).log_softmax(-1)[b["real"]], b["y"][b["real"]]),
    "none": lambda m, b: F.cross_entropy(m(b["x"])[b["real"]], b["y"][b["real"]], reduction="none").mean(),
    "sliced, then picked": lambda m, b: F.cross_entropy(
        torch.cat([m(b["x"]), m(b["x"])], 1)[:, :S][b["real"]], b["y"][b["real"]]
    ),
    "positions first, then back": lambda m, b: F.cross_entropy(
        m(b["x"])[b["real"]].T.contiguous().t().unsqueeze(0).squeeze(0), b["y"][b["real"]]
    ),
}


def masked_mean(losses: Tensor, real: Tensor) -> Tensor:
    return (losses * real).sum() / real.sum()


def _huggingface(m: Any, b: Batch, **settings: Any) -> Tensor:
    """As the causal language models of transformers: logits in float32, labels shifted by one, positions flattened."""
    logits = m(b["x"]).float()
    labels = F.pad(b["y"], (0, 1), value=PAD)[..., 1:].contiguous()
    count = (labels != PAD).sum()
    loss: Tensor = F.cross_entropy(logits.view(-1, C), labels.view(-1), ignore_index=PAD, **settings)
    if settings:
        loss = loss / count
    return loss


def _shifted(m: Any, b: Batch) -> Tensor:
    logits, labels = m(b["x"])[..., :-1, :].contiguous(), b["y"][..., 1:].contiguous()
    loss: Tensor = nn.CrossEntropyLoss()(logits.view(-1, C), labels.view(-1))
    return loss


def _next_tokens(z: Tensor, b: Batch) -> Tensor:
    return token_losses(z[:, :-1], b["y"][:, 1:]).sum(1)


def token_sums(z: Tensor, b: Batch) -> Tensor:
    return token_losses(z, b["y"]).sum(1)


def tokens_per_example(b: Batch) -> float:
    return float(b["real"].sum()) / len(b["real"])


def _of_next(b: Batch) -> float:
    return float(b["real"][:, 1:].sum()) / len(b["real"])


BATCH_SIZE = 4
SCALES: dict[str, tuple[Loss, Callable[[Tensor, Batch], Tensor], Callable[[Batch], float]]] = {
    # name: the loss of the batch; every example's sum; what that is divided by in the mean over all data
    "tokens": (
        lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten()),
        token_sums,
        tokens_per_example,
    ),
    "mean by hand": (
        lambda m, b: masked_mean(F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"], reduction="none"), b["real"]),
        token_sums,
        tokens_per_example,
    ),
    "sum over tokens": (
        lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="sum") / int(b["real"].sum()),
        token_sums,
        tokens_per_example,
    ),
    "sum times one over tokens": (
        lambda m, b: (
            F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="sum") * (1 / b["real"].sum().double())
        ),
        token_sums,
        tokens_per_example,
    ),
    "sum over examples": (
        lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="sum") / len(b["x"]),
        token_sums,
        lambda b: 1.0,
    ),
    "sum": (
        lambda m, b: F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="sum"),
        token_sums,
        lambda b: 1.0,
    ),
    "sum by hand": (
        lambda m, b: 0.3 * F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"], reduction="none").sum(),
        lambda z, b: 0.3 * token_sums(z, b),
        lambda b: 1.0,
    ),
    "mean of means": (
        lambda m, b: (
            F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"], reduction="none").sum(1) / b["real"].sum(1)
        ).mean(),
        lambda z, b: token_sums(z, b) / b["lengths"],
        lambda b: 1.0,
    ),
    "weights of examples": (
        lambda m, b: (F.cross_entropy(m(b["x"])[:, 0], b["y"][:, 0], reduction="none") * b["weight"]).mean(),
        lambda z, b: b["weight"] * F.cross_entropy(z[:, 0], b["y"][:, 0], reduction="none"),
        lambda b: 1.0,
    ),
    "weighted mean over examples": (
        lambda m, b: (
            (F.cross_entropy(m(b["x"])[:, 0], b["y"][:, 0], reduction="none") * b["weight"]).sum() / b["weight"].sum()
        ),
        lambda z, b: b["weight"] * F.cross_entropy(z[:, 0], b["y"][:, 0], reduction="none"),
        lambda b: float(b["weight"].mean()),
    ),
    "huggingface": (_huggingface, _next_tokens, _of_next),
    "huggingface, number of tokens given": (
        lambda m, b: _huggingface(m, b, reduction="sum"),
        _next_tokens,
        _of_next,
    ),
    "shifted": (_shifted, _next_tokens, _of_next),
    "picked": (PICKED["mask"], token_sums, tokens_per_example),
    "dot product": (
        lambda m, b: (
            F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="none").dot(
                b["real"].flatten().double()
            )
            / b["real"].sum()
        ),
        token_sums,
        tokens_per_example,
    ),
    "squares of padded steps": (
        lambda m, b: (
            (F.mse_loss(m(b["x"]), b["t"], reduction="none") * b["real"].unsqueeze(-1)).sum() / b["real"].sum() / C
        ),
        lambda z, b: ((z - b["t"]).square() * b["real"].unsqueeze(-1)).sum((1, 2)) / C,
        tokens_per_example,
    ),
    "squares, weighted": (
        lambda m, b: mse_loss(m(b["x"]), b["t"], weight=b["real"].unsqueeze(-1).expand(-1, -1, C).double()),
        lambda z, b: ((z - b["t"]).square() * b["real"].unsqueeze(-1)).sum((1, 2)) / C,
        tokens_per_example,
    ),
}
