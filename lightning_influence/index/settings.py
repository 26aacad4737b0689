"""How large an index is, and which curvatures have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_influence.core.errors import check_count, check_flag, short
from lightning_influence.curvature import LADDER
from lightning_influence.curvature.blocks.kronecker import KroneckerBlock

Precision = Literal["float16", "float32"]

# Without a wish: so many numbers an example, and so much less than its gradient has.
_NUMBERS, _FEWER, _LEAST = 4096, 12, 64
_SEARCHED, _SHARE = 256, 8


@dataclass(frozen=True)
class Index:
    """Settings of an index, for questions that come after the audit: ``report.ask(model, batch)``.

    Args:
        numbers: What is kept of each training example's gradient; more are closer to exact scores. By default 4,096, or
            a twelfth of the covered parameters if that is less (64 at least): of models of more than a few thousand
            parameters, an example's part of the index is at least 20 times smaller than its gradient.
        precision: Of these numbers.
        hashes: Whether to keep what each example holds in short, by which a data set in another order is known again.
            It takes reading the data set once.

    Raises:
        ValueError: If an argument is out of range.
    """

    numbers: int | None = None
    precision: Precision = "float16"
    hashes: bool = True

    def __post_init__(self) -> None:
        if self.numbers is not None:
            object.__setattr__(self, "numbers", check_count("index: numbers", self.numbers, "None for the default"))
        if self.precision not in get_args(Precision):
            raise ValueError(f'index: precision={short(self.precision)}; expected "float16" or "float32".')
        check_flag("index: hashes", self.hashes)

    def width(self, parameters: int) -> int:
        """Return how many numbers there are of each example of a model with so many covered parameters."""
        return min(parameters, self.numbers or max(_LEAST, min(_NUMBERS, parameters // _FEWER)))

    @staticmethod
    def searched(width: int) -> int:
        """Return how many numbers the search looks at first."""
        return max(1, min(_SEARCHED, width // _SHARE))


def check_indexed(curvature: str) -> None:
    """Raise ``ValueError`` for a curvature whose scores are no sum over coordinates, some of which could be kept."""
    known = [name for name, rung in LADDER.items() if rung.product is None and issubclass(rung.block, KroneckerBlock)]
    if curvature not in known:
        raise ValueError(
            f"an index can't be made with curvature={curvature!r}: it keeps the coordinates of each layer's gradient "
            f"that count most, in the eigenbasis of {', '.join(map(repr, known))}. Take one of these."
        )
