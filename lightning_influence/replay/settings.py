"""How a run is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import default_collate

from lightning_influence.core.errors import Forgiving, check_count, is_number, short
from lightning_influence.core.isolation import left_alone
from lightning_influence.core.random_streams import seed_everything
from lightning_influence.data.collation import is_plain
from lightning_influence.data.contents import digest
from lightning_influence.data.repeatable import is_deterministic

# Examples that are fetched twice: augmentation may be rare.
_TRIED = 16


@dataclass(frozen=True)
class Record:
    """Settings of a recording, for replay: the training run again, bit for bit, and its derivative by every example.

    Per step, the indices of its examples, random states as far as they have changed, learning rates, a checksum and the
    loss are noted; about √K times in K steps, weights and the optimizer's state.

    Args:
        keep_batches: Whether to keep the batches themselves, where they can't be fetched again: random ones that
            workers make, or a data set with a random generator of its own. ``"auto"`` fetches some examples twice to
            find out.
        max_bytes: That a record may take. What needs more is recorded with fewer states; if that does not do,
            recording ends, and training goes on.
        max_cost: Seconds that the column ``harm_exact`` may take at the end of training, if there are validation data:
            what each example did to their mean loss, by replay. 0 for none of it, None for no limit.

    Raises:
        ValueError: If an argument is out of range.
    """

    keep_batches: bool | Literal["auto"] = "auto"
    max_bytes: int = 2**31
    max_cost: float | None = 60.0

    def __post_init__(self) -> None:
        check_count("max_bytes", self.max_bytes)
        if self.max_cost is not None and (not is_number(self.max_cost) or self.max_cost < 0):
            raise ValueError(f"max_cost={short(self.max_cost)}; expected a number of seconds >= 0, or None.")
        if self.keep_batches not in (True, False, "auto"):
            raise ValueError(f'keep_batches={short(self.keep_batches)}; expected True, False or "auto".')


def can_be_fetched_again(
    dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, indices: Sequence[int], workers: int
) -> bool:
    """Tell whether batches are a function of their examples and of the random streams of this process.

    Args:
        dataset: The data set; it is left as it was.
        collate_fn: Of the loader.
        indices: Some of these examples are fetched twice.
        workers: Of the loader: their random streams are others.
    """
    if is_deterministic(dataset) and is_plain(collate_fn):
        return True
    tried, twice = list(indices)[:_TRIED], []
    with left_alone(*(each for each in (dataset, collate_fn) if each is not None)):
        for seed in (0, 1 if workers else 0):
            seed_everything(seed)
            with Forgiving():  # whatever it makes of them, this is no place to fail
                examples = [dataset[index] for index in tried]
                twice.append([*map(digest, examples), digest((collate_fn or default_collate)(examples))])
    return len(twice) == 2 and twice[0] == twice[1]
