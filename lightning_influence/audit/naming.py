"""What the examples of a data set are called, where they come from, and what a person sees of them.

An id names one example; a description is a text or an image, fetched for the few examples that are shown. Neither is
worth an audit: what fails is said once, and left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import eq
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from lightning_influence.audit.columns import Columns
from lightning_influence.audit.descriptions import Description, description, guessed, guessed_images, token_texts
from lightning_influence.audit.relabel import Relabelled
from lightning_influence.core.containers import map_tensors
from lightning_influence.core.errors import short
from lightning_influence.core.isolation import left_alone
from lightning_influence.data.contents import copied
from lightning_influence.data.ids import IdBook, plain_id
from lightning_influence.data.source import ExampleSource
from lightning_influence.data.stream import Stream

Ids = Sequence[Any] | NDArray[Any] | Tensor | Callable[[int], Any] | None
Describe = Callable[[Any], Any] | Any
"""A function from an example to a text or an image, or a tokenizer."""

_MOST_TEXTS = 1_000  # fetched for the file of candidates
_GIVEN_UP = 3  # after so many failures, and nothing else

_KNOWN = 10  # ids and examples that a message lists


def check_naming(ids: Any, describe: Any) -> None:
    """Raise ``ValueError`` unless these can be ids, and a way to describe an example."""
    listed = hasattr(ids, "__len__") and hasattr(ids, "__getitem__") and not isinstance(ids, (str, bytes, Mapping))
    if not (ids is None or listed or callable(ids)) or getattr(ids, "ndim", 1) != 1:
        shape = f" of shape {tuple(ids.shape)}" if hasattr(ids, "shape") else ""
        raise ValueError(
            f"ids is a {type(ids).__name__}{shape}; expected one id for each training example, in their order (a list, "
            "an array, a column of a table), or a function from dataset index to id."
        )
    if not (describe is None or callable(describe) or callable(getattr(describe, "decode", None))):
        raise ValueError(
            f"describe={short(describe)}; expected a function from an example (what the data set "
            "returns for an index) to "
            "a text or an image, or a tokenizer with `decode`."
        )


class ExampleNames:
    """Names and descriptions of the examples of a data set, and of others that share their originals.

    Args:
        dataset: What is trained on.
        ids: One for each of its examples or, if it is a part of another data set, for each of that; or a function
            from an index of ``dataset`` to the id.
        describe: A function from an example to a text or an image, or a tokenizer with ``decode``.

    Raises:
        ValueError: If there are more or fewer ids than examples, an example has none, or two have the same.
    """

    def __init__(self, dataset: Any, ids: Any = None, describe: Any = None) -> None:
        self.dataset = dataset
        self._given, self._describe = ids, describe
        self._ids: NDArray[Any] | IdBook | None = None
        self._named = dataset  # whose examples the ids are of
        self._texts: dict[tuple[int, int], str] = {}
        self._said = False
        if isinstance(ids, IdBook):  # of a stream: it goes on
            self._ids = ids
        elif ids is not None:
            self._ids, self._named = _checked_ids(ids, dataset)

    def columns(self, indices: Sequence[int] | NDArray[np.int64], dataset: Any = None) -> dict[str, NDArray[Any]]:
        """Return ``id``, ``dataset`` and ``original_index`` of some examples, those of them that there are.

        Args:
            indices: Dataset indices.
            dataset: Of another data set than the one trained on.
        """
        dataset = self.dataset if dataset is None else dataset
        at = np.asarray(indices, dtype=np.int64)
        index, part, roots = origins(dataset, at)
        found: dict[str, NDArray[Any]] = {}
        if self._ids is not None and dataset is self._named:
            found["id"] = self._ids[at]
        elif self._ids is not None and all(root is self._named for root in roots):
            found["id"] = self._ids[index]
        if len(roots) > 1:
            found["dataset"] = part
        if roots[0] is not _unwrapped(dataset):
            found["original_index"] = index
        return found

    def in_pairs(self, pairs: Columns, query_sets: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Return the names of the training examples and of the queries in a table of pairs.

        Args:
            pairs: The table, see ``columns.PAIR_DESCRIPTIONS``.
            query_sets: The data set of each query set.
        """
        found = self.columns(pairs["index"])
        for number, dataset in enumerate(query_sets):
            rows = np.flatnonzero(pairs["query_set"] == number)
            for name, values in self.columns(pairs["query"][rows], dataset).items():
                unknown: Any = -1 if values.dtype != object else ""
                entries = np.full(len(pairs["query"]), unknown, dtype=values.dtype)
                column = found.setdefault(f"query_{name}", entries)
                column[rows] = values
        return found

    def texts(self, indices: Sequence[int]) -> NDArray[Any] | None:
        """Return what is said of some examples, of the first thousand at most; None if nothing is, or in pictures."""
        if self._describe is None:
            return None
        found = np.full(len(indices), "", dtype=object)
        _fetch(self.dataset, indices[:_MOST_TEXTS])
        for place, shown in enumerate(self._described(self.dataset, list(indices[:_MOST_TEXTS]))):
            if isinstance(shown, Tensor):
                return None
            found[place] = shown or ""
        return found if any(found) else None

    def shown(self, indices: Sequence[int], dataset: Any = None) -> Sequence[Tensor | str] | None:
        """Return what can be shown of some examples: as described, else the images that they hold; None for neither."""
        dataset, indices = self.dataset if dataset is None else dataset, list(indices)
        _fetch(dataset, indices)
        if self._describe is not None:
            found = list(self._described(dataset, indices))
            if any(each is not None for each in found):
                return ["" if each is None else each for each in found]
        return guessed_images(dataset, indices)

    def each(self, indices: Sequence[int], dataset: Any = None) -> Generator[Description, None, None]:
        """Yield what a page shows of each example: as described, else what it holds that a person can look at."""
        dataset = self.dataset if dataset is None else dataset
        _fetch(dataset, indices)
        if self._describe is not None:
            yield from self._described(dataset, list(indices))
            return
        with left_alone(dataset):
            for index in indices:
                yield guessed(dataset[index])

    @property
    def tokenized(self) -> bool:
        """Whether a tokenizer describes the examples."""
        return callable(getattr(self._describe, "decode", None))

    def tokens(self, indices: Sequence[int], source: ExampleSource) -> dict[int, list[str | None]]:
        """Return the text of each token of examples, None for padding; of none where no tokenizer describes them.

        Args:
            indices: The examples.
            source: What makes batches of them: a collate function may add tokens, or cut some.
        """
        if not self.tokenized:
            return {}
        found: dict[int, list[str | None]] = {}
        _fetch(self.dataset, indices)
        with left_alone(self.dataset):
            for index in indices:
                found[index] = self._tokens_of(copied(self.dataset[index]))
        # The rows of a stream are those of its batches.
        for chosen, batch in source.batches(indices, 1) if not isinstance(self.dataset, Stream) else ():
            for key in () if source.company is None else source.company.own:
                batch = batch[key]
            example = map_tensors(lambda tensor: tensor[0] if tensor.shape[:1] == (1,) else tensor, batch)
            given = self._tokens_of(example)
            # What masks some of them at random leaves most in place.
            if given and not _mostly_same(given, found[chosen[0]]):
                found[chosen[0]] = given
        return {index: texts for index, texts in found.items() if texts}

    def _tokens_of(self, example: Any) -> list[str | None]:
        with suppress(ValueError):  # there are none to decode
            return token_texts(self._describe, example) or []
        return []

    def try_out(self, indices: Sequence[int]) -> None:
        """Describe examples, so that what fails is said while something can be done about it."""
        if self._describe is not None:
            list(self._described(self.dataset, list(indices)))

    def of(self, dataset: Any) -> ExampleNames:
        """Return the names of the examples of a data set that takes this one's place; no ids, if they don't fit it."""
        try:
            return ExampleNames(dataset, self._given, self._describe)
        except ValueError as error:
            warnings.warn(f"the training data were loaded again, are others, and have no ids. {error}", stacklevel=2)
            return ExampleNames(dataset, None, self._describe)

    def _described(self, dataset: Any, indices: list[int]) -> Iterator[Description]:
        tried = failed = 0
        with left_alone(dataset):
            for index in indices:
                key = (id(dataset), index)
                shown: Description = self._texts.get(key)
                if shown is None and (failed < _GIVEN_UP or failed < tried):
                    tried += 1
                    example: Any = None
                    try:
                        example = dataset[index]
                        # A copy: what writes to its argument, to undo a normalisation, would write to the data.
                        shown = description(self._describe, copied(example))
                    except Exception as error:
                        failed += 1
                        self._say(index, example, error)
                    if isinstance(shown, str):
                        self._texts[key] = shown
                yield shown

    def _say(self, index: int, example: Any, error: Exception) -> None:
        if self._said:
            return
        self._said = True
        held = f" with {', '.join(map(str, list(example)[:_KNOWN]))}" if isinstance(example, Mapping) else ""
        given = "which can't be fetched" if example is None else f"a {type(example).__name__}{held}"
        warnings.warn(
            f"example {index}, {given}, can't be described by describe={self._describe!r:.80} "
            f"({type(error).__name__}: {error}). It is shown without; the audit goes on.",
            stacklevel=2,
        )


def _mostly_same(one: Sequence[str | None], other: Sequence[str | None]) -> bool:
    return len(one) == len(other) and 2 * sum(map(eq, one, other)) > len(one)


def _fetch(dataset: Any, indices: Sequence[int]) -> None:
    """Have the examples of a stream at hand, by going over it once for all of them."""
    if isinstance(dataset, Stream):
        dataset.fetch(indices)


# ------------------------------------------------------------------ where examples come from


def origins(dataset: Any, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Any]]:
    """Return where examples lie in the data sets that this one is a part of, or is put together from.

    ``Subset`` (and so ``random_split``), ``ConcatDataset``, ``Relabelled`` and Hugging Face data sets with a selection
    are looked through, in any nesting.

    Args:
        dataset: The data set.
        indices: Of it, ``[n]``.

    Returns:
        Positions in the originals ``[n]``; numbers of the originals, from 0, ``[n]``; the originals, one for each place
        where one is used. Of a data set that is none of these, it itself.
    """
    dataset = _unwrapped(dataset)
    selected = _selected(dataset)
    if selected is not None:
        below, chosen = selected
        own = chosen[indices]
        if (own < 0).any():
            own = np.where(own < 0, own + len(below), own)
        return origins(below, own)
    if not isinstance(dataset, ConcatDataset):
        return indices, np.zeros_like(indices), [dataset]
    ends = np.asarray(dataset.cumulative_sizes)
    which = np.searchsorted(ends, indices, side="right")
    index, part = indices.copy(), np.zeros_like(indices)
    roots: list[Any] = []
    for number, each in enumerate(dataset.datasets):
        rows = np.flatnonzero(which == number)
        start = ends[number - 1] if number else 0
        index[rows], inner, own_roots = origins(each, indices[rows] - start)
        part[rows] = inner + len(roots)
        roots += own_roots
    return index, part, roots


def _unwrapped(dataset: Any) -> Any:
    while isinstance(dataset, Relabelled):
        dataset = dataset.dataset
    return dataset


def _selected(dataset: Any) -> tuple[Any, NDArray[np.int64]] | None:
    """Return the data set that examples are chosen from, and which of it."""
    below, chosen = None, None
    if isinstance(dataset, Subset):
        below, chosen = dataset.dataset, dataset.indices
    elif type(dataset).__module__.partition(".")[0] == "datasets" and getattr(dataset, "_indices", None) is not None:
        # Of Hugging Face: rows of the table below, as `select`, `shuffle` and `train_test_split` have left them.
        below, chosen = dataset._data, dataset._indices.column(0)
    if below is None:
        return None
    array = np.asarray(chosen)
    # A subset of something with keys of its own is no selection by position.
    return (below, array.astype(np.int64)) if np.issubdtype(array.dtype, np.integer) and array.ndim == 1 else None


# ------------------------------------------------------------------ ids


def _checked_ids(ids: Any, dataset: Any) -> tuple[NDArray[Any], Any]:
    """Return ids as integers or text ``[n]``, and whose examples they name."""
    size, named = len(dataset), dataset
    if not hasattr(ids, "__len__"):
        with left_alone(dataset):
            values = [_called(ids, index) for index in range(size)]
    else:
        values = list(ids)
        _, _, roots = origins(dataset, np.arange(0))
        original = roots[0] if all(root is roots[0] for root in roots) else dataset
        if len(values) != size and len(values) == len(original):
            size, named = len(values), original
        if len(values) != size:
            more = "" if original is dataset else f", or {len(original):,}, one for each of those it is taken from"
            raise ValueError(
                f"ids: {len(values):,} are given; expected {size:,}, one for each training example "
                f"({type(dataset).__name__}){more}."
            )
    plain = [plain_id(value) for value in values]
    missing = [index for index, value in enumerate(plain) if value is None]
    if missing:
        raise ValueError(
            f"ids: {len(missing):,} of {len(plain):,} are missing (None, NaN or an empty text), of examples "
            f"{missing[:_KNOWN]}; expected one for each. `str(index)` is one that there always is."
        )
    whole = all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in plain)
    # Text as objects: arrays of fixed width drop trailing zeros, and pad all to the longest.
    array = np.asarray(plain, dtype=np.int64) if whole else np.asarray([str(v) for v in plain], dtype=object)
    _check_distinct(array)
    return array, named


def _called(ids: Callable[[int], Any], index: int) -> Any:
    try:
        return ids(index)
    except Exception as error:
        raise ValueError(
            f"ids({index}) failed ({type(error).__name__}: {error}); expected a function from dataset index to id."
        ) from error


def _check_distinct(ids: NDArray[Any]) -> None:
    first: dict[Any, int] = {}
    for index, value in enumerate(ids.tolist()):
        if first.setdefault(value, index) != index:
            raise ValueError(
                f"ids: examples {first[value]} and {index} are both called {value!r} ({len(ids) - len(set(ids)):,} ids "
                "are not the first of their name); expected ids that tell examples apart, as people look them up by "
                "these. Add what differs (a row, a line), show a shared name by `describe=`; of a subset that holds "
                "examples repeatedly, pass the ids of the data set that it is taken from."
            )
