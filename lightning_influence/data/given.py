"""What a user hands in as data, and as indices of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from lightning_influence.core.errors import check_count
from lightning_influence.core.indices import Indices as Many
from lightning_influence.core.indices import integers
from lightning_influence.data.source import DataError, ExampleSource

Data: TypeAlias = "Dataset[Any] | DataLoader[Any] | Sequence[Any]"
Indices: TypeAlias = "int | Many"


def source_of(
    data: Data, batch_size: int | None = None, collate_fn: Callable[[list[Any]], Any] | None = None
) -> tuple[ExampleSource, Sequence[int]]:
    """Return the examples of a data set or of a loader, and the indices of those that it draws from.

    Args:
        data: The data set or loader.
        batch_size: By default that of the loader, else 32.
        collate_fn: For a data set.

    Raises:
        DataError: If they have no index.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size, "None for that of the loader, else 32")
    if isinstance(data, DataLoader):
        sampler = getattr(data.batch_sampler, "sampler", None)
        source = ExampleSource.from_loader(data, batch_size)
        if isinstance(sampler, SubsetRandomSampler):
            return source, sorted({int(index) for index in sampler.indices})
    elif not _may_be_examples(data):
        what = f"the class {data.__name__}" if isinstance(data, type) else f"a {type(data).__name__}"
        raise DataError(
            f"the data are {what}; expected a data set or a DataLoader: tensors become one by "
            "`TensorDataset(inputs, targets)`."
        )
    else:
        source = ExampleSource(data, batch_size=batch_size or 32, collate_fn=collate_fn)
    if not len(source):
        raise DataError(f"{type(source.dataset).__name__} is empty; expected some examples.")
    return source, range(len(source))


def positions(indices: Indices | None, known: Sequence[int], what: str) -> list[int]:
    """Return dataset indices as a list; all that are known by default.

    Args:
        indices: One index or many.
        known: The indices that there are.
        what: What they are of, for errors.

    Raises:
        ValueError: If there is none, or one is no integer or unknown.
    """
    if indices is None:
        return list(known)
    chosen = integers(indices)
    if not chosen:
        raise ValueError(f"there is no index of the {what}; pass at least one, or None for all.")
    every = known if isinstance(known, range) else set(known)
    if outside := [index for index in chosen if index not in every]:
        raise ValueError(
            f"the {what} has no example {outside[:10]}; expected indices among {len(every):,} from {min(every)} to "
            f"{max(every)}."
        )
    return chosen


def _may_be_examples(data: Any) -> bool:
    """Tell whether something holds examples by index, or hands them out one after the other."""
    if isinstance(data, (type, str, Tensor, np.ndarray)) or (isinstance(data, Mapping) and 0 not in data):
        return False
    if type(data) is tuple and data and all(isinstance(item, (Tensor, np.ndarray)) for item in data):
        return False
    return hasattr(data, "__getitem__") or hasattr(data, "__iter__")
