"""Examples by index: a data set visited in a fixed order, whatever the training loader does.

Random augmentation is drawn from a stream that belongs to the example, so neither batch size nor workers matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from lightning_influence.core.errors import Forgiving, examples, told
from lightning_influence.core.isolation import unchanged
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.data.collation import Collated, Collating, Collation, is_plain
from lightning_influence.data.collation import DataError as DataError
from lightning_influence.data.contents import digest
from lightning_influence.data.probing import learn
from lightning_influence.data.repeatable import (
    Repeatable,
    RepeatableCollate,
    WorkerStart,
    is_deterministic,
    needs_everything,
)
from lightning_influence.data.room import Room

if TYPE_CHECKING:
    from lightning_influence.data.company import Company

BY_ID = '`InfluenceAudit(sample_id=lambda batch: batch["key"])`'
# Batches that are tried to find examples which stay where they are.
_TRIALS = 16
# Examples that tell one data set from another.
_SAMPLE = 32


class ExampleSource:
    """The examples of a map-style dataset, fetched by index in any order.

    Args:
        dataset: Map-style dataset.
        batch_size: Number of examples in a training batch. Passes start with it too; ``pass_batch_size`` may be set.
        collate_fn: Turns a list of examples into a batch, as for ``DataLoader``.
        num_workers: Worker processes of each pass.
        worker_init_fn: As for ``DataLoader``.
        multiprocessing_context: As for ``DataLoader``.
        sequential: Whether training takes the examples in their own order, instead of in a random one.

    Attributes:
        missing: Dataset indices of examples that no batch held so far, with the reason.
        company: What a step gets beside a batch; None if that is all.
        room: How many examples at a time there is memory for.

    Raises:
        DataError: For an ``IterableDataset`` or a dataset without a length.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        batch_size: int = 32,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        sequential: bool = False,
    ) -> None:
        if isinstance(dataset, DataLoader):
            raise DataError(
                "ExampleSource got a DataLoader where it expects a data set; `ExampleSource.from_loader(loader)` takes "
                "the data set, batch size and collate function from a loader."
            )
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise DataError(
                f"{type(dataset).__name__} is a stream: its examples have no index to file scores under or to fetch "
                "them again by. Expected a map-style dataset, with `__getitem__` and `__len__`; an audit of training "
                f"files a stream by ids that its batches hold: {BY_ID}."
            )
        self.dataset = cast("Dataset[Any]", dataset)
        self.batch_size = self.pass_batch_size = batch_size
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.worker_init_fn = worker_init_fn
        self.sequential = sequential
        start = WorkerStart(worker_init_fn)
        self._of_workers = {"worker_init_fn": start, "multiprocessing_context": multiprocessing_context}
        # What passes have found fetches to change in the data set, and put back.
        self.changed: dict[str, None] = {}
        self._rewinding: bool | None = None
        self.missing: dict[int, str] = {}
        self.company: Company | None = None
        self.room = Room()

    @classmethod
    def from_loader(cls, loader: Any, batch_size: int | None = None) -> ExampleSource:
        """Take dataset, collation and workers from a ``DataLoader``.

        Args:
            loader: A ``DataLoader`` that collates batches itself (with a batch size or a batch sampler).
            batch_size: Number of examples fetched together; by default the loader's own.

        Raises:
            DataError: If the loader is something else, or does not collate.
        """
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"the data come from a {type(loader).__name__}; expected a torch `DataLoader` over a map-style "
                "dataset, whose examples can be fetched again by index. An audit of training files what others "
                f"hand out by ids that their batches hold: {BY_ID}."
            )
        if isinstance(loader.dataset, IterableDataset):
            return cls(loader.dataset)  # raises, with the reason
        if loader.batch_sampler is None:
            raise DataError(
                "the DataLoader has `batch_size=None`: its dataset hands out whole batches, so single examples have no "
                "index. Let the DataLoader make the batches (`batch_size=` or `batch_sampler=`); an audit of training "
                f"also files examples by ids that the batches hold: {BY_ID}."
            )
        size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
        return cls(
            loader.dataset,
            batch_size=int(size),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            sequential=type(getattr(loader.batch_sampler, "sampler", None)) is SequentialSampler,
        )

    @property
    def plain(self) -> bool:
        """Whether batches are rows of tensors: one look-up each, instead of one for every example and a stack."""
        return type(self.dataset) is TensorDataset and self.collate_fn in (None, default_collate)

    def __len__(self) -> int:
        """Return the number of examples of the dataset."""
        return len(cast("Sized", self.dataset))

    def batches(self, indices: Sequence[int], size: int | None = None) -> Iterator[tuple[list[int], Any]]:
        """Yield ``(indices, batch)`` in the given order, ``size`` examples at a time (the last time fewer).

        Collate functions of the user's own may change the order, and leave examples out (see ``missing``); examples of
        several lengths that lie end to end come in several batches. The indices are those of the batch.

        Neither the random streams nor what data set and collation reach is changed by it.

        Raises:
            DataError: If the data set hands out something else for the same index each time, or changes what training's
                workers share.
        """
        with closing(self._batches(indices, size or self.pass_batch_size)) as batches:
            for chosen, batch in batches:
                yield chosen, self.beside(chosen, batch)

    def one_batch(self, indices: Sequence[int], beside: Sequence[int] | None = None) -> Any:
        """Return what a step gets of these examples as one batch, in the company of others if so asked."""
        ((_, batch),) = self._batches(indices, len(indices))
        return self.beside(indices if beside is None else beside, batch)

    def beside(self, indices: Sequence[int], batch: Any) -> Any:
        """Return what a step gets of a batch of these examples."""
        return batch if self.company is None else self.company.beside(indices, batch)

    def _batches(self, indices: Sequence[int], size: int) -> Generator[tuple[list[int], Any], None, None]:
        plan = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
        if len(plan) > 1 and len(plan[-1]) == 1 and size > 2:
            # A lone last example would meet steps that `squeeze()` the batch away; the one before keeps it company.
            plan[-1].insert(0, plan[-2].pop())
        if self.plain and not self.num_workers:
            tensors = cast("TensorDataset", self.dataset).tensors
            for chosen in plan:
                yield chosen, [tensor[chosen] for tensor in tensors]
            return
        if not plan:
            return
        workers = min(self.num_workers, len(plan) // 2)
        in_order = is_plain(self.collate_fn)
        loader: DataLoader[Any] = DataLoader(
            self.repeatable(indices),
            batch_sampler=plan,
            collate_fn=self.collate_fn
            if in_order
            else Collating(RepeatableCollate(self._collate), self.collation, apart=True),
            num_workers=workers,
            **self._of_workers if workers else {},
        )
        with nullcontext() if in_order and is_deterministic(self.dataset) else self._unchanged():
            # Around each fetch: whoever asks for batches may draw between them.
            with isolated_rng():
                fetching = iter(loader)
            for chosen in plan:
                with isolated_rng(), told(partial(_refusal, self.dataset, self._collate, chosen)):
                    batch = next(fetching)
                if in_order:
                    yield chosen, batch
                else:
                    yield from self._known(chosen, batch)

    def _known(self, chosen: list[int], made: list[Collated]) -> Iterator[tuple[list[int], Any]]:
        """Yield the batches whose examples are known; note what they lack."""
        lacking = dict.fromkeys(chosen, "the collate function leaves it out")
        for one in made:
            if one.order is None:
                lacking |= dict.fromkeys(lacking, f"its batch is not understood: {one.reason}")
                continue
            own = [chosen[k] for k in one.order.tolist()]
            for index in own:
                lacking.pop(index, None)
            if own:
                yield own, one.data
        self.missing |= lacking

    @contextmanager
    def fetching(self) -> Iterator[Callable[[int], Any]]:
        """Look at single examples, leaving no trace."""
        with isolated_rng(), self._unchanged():
            yield self.repeatable(range(len(self))).__getitem__

    def digests(self, indices: Sequence[int] | None = None) -> list[bytes | None]:
        """Return what a few random examples hold, in short; None for those that are not the same twice.

        Args:
            indices: Dataset indices to choose from; all by default.
        """
        every = range(len(self)) if indices is None else indices
        chosen = random.Random(0).sample(every, min(_SAMPLE, len(every)))
        with self.fetching() as fetch:
            twice = [[_digest_of(fetch, index) for index in chosen] for _ in range(2)]
        return [one if one == two else None for one, two in zip(*twice, strict=True)]

    @cached_property
    def collation(self) -> Collation:
        """What the collate function does with its examples; looked at once.

        Raises:
            DataError: If it reorders them in a way that can't be followed.
        """
        if is_plain(self.collate_fn) or not len(self):
            return Collation()
        with self.fetching() as fetch:
            return learn(fetch, len(self), self._collate)

    @property
    def _collate(self) -> Callable[[list[Any]], Any]:
        return self.collate_fn or default_collate

    def settled(self, indices: Sequence[int]) -> list[int]:
        """Return the examples that make one batch together, in the order in which it holds them."""
        if is_plain(self.collate_fn):
            return list(indices)
        return max((own for own, _ in self._batches(indices, len(indices))), key=len, default=[])

    def steady(self, indices: Sequence[int], start: int, size: int) -> list[int]:
        """Return a few examples that come in their order, also with a copy of the first at the end.

        Args:
            indices: To choose from.
            start: Where to begin.
            size: How many.

        Raises:
            DataError: If the collate function moves all that were tried.
        """
        return _steady(self, indices, start, size)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        with unchanged(self.dataset, self.collate_fn) as state:
            yield
        self.changed |= state.changed

    def repeatable(self, indices: Sequence[int]) -> Dataset[Any]:
        """Return the data set for one pass; before the first one, some of the given examples are fetched twice.

        Raises:
            DataError: As ``batches``.
        """
        if is_deterministic(self.dataset):
            return self.dataset
        if self._rewinding is None:
            with _by_number(self.dataset, indices):
                self._rewinding = needs_everything(self.dataset, indices, self.num_workers)
        return Repeatable(self.dataset, everything=self._rewinding)


@contextmanager
def _by_number(dataset: Any, indices: Sequence[int]) -> Iterator[None]:
    """Refuse a data set that has no examples by number."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if not _has_keys(dataset, indices):
            raise
        raise DataError(
            f"{type(dataset).__name__} can't be asked for its examples by number ({type(error).__name__}: {error}). "
            "Expected a data set with indices from 0; one with keys of its own, which its sampler draws, is filed by "
            f"these: {BY_ID}."
        ) from None


def _has_keys(dataset: Any, indices: Sequence[int]) -> bool:
    """Tell whether a data set has none of some examples: its keys are no numbers."""
    for index in dict.fromkeys(indices[:_TRIALS]):
        with isolated_rng(), unchanged(dataset), Forgiving():
            dataset[index]
            return False
    return True


def _steady(source: ExampleSource, indices: Sequence[int], start: int, size: int) -> list[int]:
    collation = source.collation
    pool = list(indices) if is_plain(source.collate_fn) else source.settled(list(indices)[: max(64, size)])
    if collation.lengths and not collation.few_lengths:
        # What lies end to end has to be seen to do so.
        with source.fetching() as fetch:
            pool.sort(key=lambda index: collation.lengths_of(fetch(index)))
        return [pool[(start + k * (len(pool) // size or 1)) % len(pool)] for k in range(size)]
    for shift in range(_TRIALS):
        chosen = [pool[(start + shift + k) % len(pool)] for k in range(size)]
        if collation.keeps_order or source.settled([*chosen, chosen[0]]) == [*chosen, chosen[0]]:
            return chosen
    # It sorts by something that all of them differ in: copies of one example are all that it leaves in place.
    alike = [pool[start % len(pool)]] * size
    if source.settled([*alike, alike[0]]) == [*alike, alike[0]]:
        return alike
    raise DataError("the collate function moves examples, and none that it leaves in place were found.")


def _refusal(dataset: Any, collate: Callable[[list[Any]], Any], chosen: list[int], words: str) -> DataError:
    """Return what to say of examples that make no batch: which of them can't be had by themselves, if any."""
    bad = []
    for index in chosen:
        with Forgiving():
            collate([dataset[index]])
            continue
        bad.append(index)
    return DataError(
        f"{type(dataset).__name__} can't give a batch of {examples(bad or chosen)} ({words}): mend what it holds "
        "there, or leave it out."
    )


def _digest_of(fetch: Callable[[int], Any], index: int) -> bytes | None:
    with Forgiving():  # a broken example that the sampler may leave out
        return digest(fetch(index))
    return None


def same_data(before: ExampleSource, digests: Sequence[bytes | None], after: ExampleSource) -> bool:
    """Tell whether two sources hold the same examples, as far as their number and a sample tell.

    Args:
        before: A source.
        digests: Its ``digests`` when it was looked at.
        after: Another one.
    """
    if len(before) != len(after):
        return False
    now = after.digests()
    return all(a == b for a, b in zip(digests, now, strict=True) if a is not None and b is not None)
