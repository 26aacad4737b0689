"""Networks of the sizes that people train on GPUs, with random weights and data: ResNet-50, BERT-base, GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Bottleneck(nn.Module):
    """Three convolutions, each with a batch norm, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        sizes = (inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w] -> [n, 4 width, h / stride, w / stride]``."""
        out = x
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            out = norm(convolution(out if number == 0 else F.relu(out)))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


def resnet50(width: int = 64, classes: int = 1_000, depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """25.6 million parameters."""
    inputs, stages = width, list[nn.Module]()
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stages.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not number else 1))
            inputs = 4 * width * 2**stage
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Block(nn.Module):
    """A transformer block: norms before (GPT-2) or after (BERT)."""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def attended(self, x: Tensor) -> Tensor:
        """Multi-head attention, ``[n, s, d] -> [n, s, d]``."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """``[n, s, d] -> [n, s, d]``."""
        if self.causal:
            x = x + self.attended(self.first(x))
            return x + self.down(F.gelu(self.up(self.second(x))))
        x = self.first(x + self.attended(x))
        result: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return result


class Transformer(nn.Module):
    """Tokens to the logits of the next one (``causal``) or of a class of the text."""

    def __init__(
        self, words: int, dim: int, layers: int, positions: int, *, causal: bool, classes: int = 2, heads: int = 12
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, dim), nn.Embedding(positions, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, causal=causal) for _ in range(layers)))
        self.norm, self.causal = nn.LayerNorm(dim), causal
        self.head = nn.Linear(dim, words if causal else classes, bias=not causal)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        if causal:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``[n, s] -> [n, s, words]`` or ``[n, classes]``."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.norm(self.blocks(x))
        result: Tensor = self.head(x if self.causal else x[:, 0])
        return result


def bert(words: int = 30_522, dim: int = 768, layers: int = 12, heads: int = 12) -> nn.Module:
    """110 million parameters."""
    return Transformer(words, dim, layers, 512, causal=False, heads=heads)


def gpt2(words: int = 50_257, dim: int = 768, layers: int = 12, heads: int = 12) -> nn.Module:
    """124 million parameters, the head tied to the embedding."""
    return Transformer(words, dim, layers, 1_024, causal=True, heads=heads)


@dataclass(frozen=True)
class Network:
    """A network, its data, and the batches it is trained with.

    Attributes:
        make: Makes it, given whether it is to be small.
        data: Makes so many examples, given the same.
        batch_size: Of training.
    """

    make: Callable[[bool], nn.Module]
    data: Callable[[int, bool], TensorDataset]
    batch_size: int


def _images(count: int, small: bool) -> TensorDataset:
    side, classes = (32, 10) if small else (224, 1_000)
    return TensorDataset(torch.randn(count, 3, side, side), torch.randint(classes, (count,)))


def _texts(count: int, small: bool) -> TensorDataset:
    words, length = (101, 16) if small else (30_522, 128)
    return TensorDataset(torch.randint(words, (count, length)), torch.randint(2, (count,)))


def _next_tokens(count: int, small: bool) -> TensorDataset:
    words, length = (101, 16) if small else (50_257, 128)
    tokens = torch.randint(words, (count, length + 1))
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


NETWORKS = {
    "ResNet-50": Network(lambda small: resnet50(8, 10) if small else resnet50(), _images, 32),
    "BERT-base": Network(lambda small: bert(101, 32, heads=4) if small else bert(), _texts, 16),
    "GPT-2": Network(lambda small: gpt2(101, 32, heads=4) if small else gpt2(), _next_tokens, 8),
}


def task(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy, of classes or of next tokens."""
    logits = module(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
