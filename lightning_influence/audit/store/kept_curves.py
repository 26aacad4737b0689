"""The curves of an audit: a file for each epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_influence.audit.store.atomic import StoreError, reading, replacing
from lightning_influence.audit.store.tensors import SUFFIX, load_tensors, packed_tensors


@dataclass(frozen=True)
class KeptCurves:
    """Curves of the epochs.

    Args:
        directory: Their folder.
    """

    directory: Path

    def write(self, epochs: Collection[int], of_epoch: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Writes one file an epoch; those of other epochs go, and what is there stays: an epoch is over once.

        Args:
            epochs: Their numbers.
            of_epoch: Returns curve name to values by dataset index, see `curves.Curves`.

        Raises:
            StoreError: A file cannot be written.
        """
        stored = self._curve_files()
        for epoch in set(epochs) - stored.keys():
            data = packed_tensors(of_epoch(epoch), {})
            with replacing(self.directory / f"epoch-{epoch:05d}{SUFFIX}") as handle:
                handle.write(data)
        for epoch in stored.keys() - set(epochs):
            with suppress(OSError):
                stored[epoch].unlink()

    def read(self) -> dict[int, dict[str, Tensor]]:
        """Reads the curves, see `write`; a damaged file is left out with a warning: the audit is whole."""
        found = {}
        for epoch, path in self._curve_files().items():
            try:
                with reading(path):
                    found[epoch] = _flat(load_tensors(path)[0])
            except StoreError as error:
                warnings.warn(f"no curves of epoch {epoch}: {error}", stacklevel=3)
        return found

    def _curve_files(self) -> dict[int, Path]:
        files = {file.stem.removeprefix("epoch-"): file for file in self.directory.glob(f"epoch-*{SUFFIX}")}
        return {int(number): file for number, file in sorted(files.items()) if number.isdecimal()}


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or tensor.dtype != torch.float32:
            raise ValueError(f"{name!r} is {tensor.dtype} of the shape {tuple(tensor.shape)}; expected float32 [n]")
    return tensors
