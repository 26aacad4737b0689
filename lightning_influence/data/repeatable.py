"""Examples that are a function of their index: a random stream each, and data sets whose own state stands still."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

from torch.utils.data import Dataset, Subset, TensorDataset, get_worker_info

from lightning_influence.core.isolation import LONGEST_OF_DATA, unchanged
from lightning_influence.core.random_streams import GENERATORS, Stream, isolated_rng, seed_everything, stream_of
from lightning_influence.core.reachable import Walk
from lightning_influence.core.snapshot import Snapshot
from lightning_influence.data.collation import DataError
from lightning_influence.data.contents import copied, digest


class _Rewinding:
    """What is put back before every call, in the process that makes it: a worker has copies of its own of all of it.

    For one pass: where it begins, there it is put back to.
    """

    def __init__(self, owner: object, *, everything: bool = False) -> None:
        self._owner = owner
        self._everything = everything
        self._state: Snapshot | None = None
        self.streams: list[Stream] = []

    def __call__(self) -> Snapshot:
        """Put it back."""
        if self._state is None:
            reached = list(Walk([("", self._owner)], LONGEST_OF_DATA))
            self.streams = [stream_of(found.value) for found in reached if isinstance(found.value, GENERATORS)]
            self._state = Snapshot(reached, data=True)
        self._state.rewind(numbers=not self._everything)
        return self._state


class Repeatable(Dataset[Any]):
    """Gives every example a random stream of its own, so that its augmentation does not depend on its neighbours.

    Args:
        dataset: The data set.
        everything: Whether to put back all of the data set's own state before every example, not only its numbers.
    """

    def __init__(self, dataset: Dataset[Any], *, everything: bool = False) -> None:
        self.dataset = dataset
        self._rewind = _Rewinding(dataset, everything=everything)

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getitem__(self, index: int) -> Any:
        state = self._rewind()
        seed_everything(index)
        for stream in self._rewind.streams:
            stream.seed(index)
        example = self.dataset[index]
        # It may be a view of what is about to be put back.
        return copied(example) if state.moves_memory else example


class WorkerStart:
    """A ``worker_init_fn`` after which a worker finds the user's own data set where it asks for it, as in training."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        """Do so in a worker, and what the user does in one."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, Repeatable):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it is frozen
        if self._init is not None:
            self._init(worker)


class RepeatableCollate:
    """Collation that does not depend on how many batches it has made."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn
        self._rewind = _Rewinding(collate_fn)

    def __call__(self, examples: list[Any]) -> Any:
        """Collate as the user does."""
        self._rewind()
        return self._collate_fn(examples)


def needs_everything(dataset: Dataset[Any], indices: Sequence[int], workers: int) -> bool:
    """Tell whether a data set hands out the same example again only if all of its own state is put back before.

    Args:
        dataset: The data set; it is left as it was.
        indices: Some of these examples are fetched twice.
        workers: Of the training loader.

    Raises:
        DataError: If even then they differ, or if fetching changes what training's workers share.
    """
    chosen = list(dict.fromkeys((indices[0], indices[len(indices) // 2], indices[-1])))
    for everything in (False, True):
        found = Repeatable(dataset, everything=everything)
        with isolated_rng(), unchanged(dataset) as state:
            first, second = ([digest(found[index]) for index in chosen] for _ in range(2))
        if workers and (shared := state.shared & state.changed.keys()):
            raise DataError(
                f"fetching an example changes {', '.join(sorted(shared))}, which the {workers} workers of the training "
                "loader share: extra passes would change it under their hands. Keep state out of shared memory, or "
                "load with `num_workers=0`."
            )
        different = [index for index, one, other in zip(chosen, first, second, strict=True) if one != other]
        if not different:
            return everything
    raise DataError(
        f"the data set hands out something else for the same index each time (example {different[0]}, fetched twice), "
        "under equal random streams of Python, NumPy, torch and of the generators that it holds, and with its own "
        "state put back. Scores can't be filed under such examples. Draw from those streams, not from the clock or the "
        "system, and do not overwrite the stored data."
    )


def is_deterministic(dataset: Any) -> bool:
    """Tell whether a dataset surely hands out what it stores; all others may draw random numbers for an example."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) in (TensorDataset, list, tuple)
