"""Writing an index, beside the pass that scores the examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import readable
from lightning_influence.core.ranks import average_ranks
from lightning_influence.curvature import Curvature
from lightning_influence.curvature.choices import random_subset
from lightning_influence.data.contents import digest
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.capture import LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients
from lightning_influence.gradients.visitors import Visitor, loss_columns, visit
from lightning_influence.index.coding import CodedQueries, Coder, Layout, projection
from lightning_influence.index.files import DIGEST, EXAMPLE, Folder, Shard
from lightning_influence.index.search import Search
from lightning_influence.index.settings import Index, check_indexed
from lightning_influence.scores.examples import ExampleScorer
from lightning_influence.scores.queries import prepared_queries, query_chunks

# Training examples that are asked about to tell how good the index is, and about how many they are compared with.
_PROBES, _COMPARED = 8, 4096
# Numbers of rows that are in memory at a time.
_PART = 2**24
# Rows that the projection of the search is learnt from.
_SAMPLE = 2048
_TOP = 10


class IndexWriter(Visitor):
    """Writes an index as a pass over the training data goes by; ``finish`` completes it, ``give_up`` removes it.

    Args:
        gradients: Passes over the training data.
        indices: The training examples.
        curvature: The fitted curvature.
        directory: Where the folder ``index`` will be; those of several processes share it.
        settings: How large it is.
        own: Who looks at the same pass before, and finds the examples' self-influence.

    Raises:
        ValueError: If the curvature has no index, or the disk no room.
    """

    def __init__(
        self,
        gradients: ExampleGradients,
        indices: Sequence[int],
        curvature: Curvature,
        directory: Path,
        settings: Index,
        own: ExampleScorer,
    ) -> None:
        check_indexed(curvature.name)
        self._gradients, self._own, self._settings, self._curvature = gradients, own, settings, curvature
        coverage, indices = gradients.coverage, sorted(set(indices))
        probes = query_chunks(gradients, random_subset(indices, _PROBES, 1))[0]
        positions = _Positions()
        visit(gradients, probes, [positions], everywhere=True)
        shapes = {name: block.shape for name, block in coverage.blocks.items()}
        width = settings.width(coverage.covered_parameters)
        self.layout = Layout.planned(curvature, shapes, width, positions.single)
        self.coder = Coder(self.layout, curvature)
        self._probes = positions.order  # that of a visit, which may leave out and move examples
        self._coded = coded_queries(self.coder, gradients, self._probes)
        (self._prepared,) = prepared_queries(curvature, gradients, [self._probes])
        size = len(distributed.share(indices))
        self._exact = torch.full((size, len(self._probes)), torch.nan)
        # To form gradients once more takes a third of the time: of many examples some will do.
        self._every, self._batches = -(-size // _COMPARED), 0
        self._searched = settings.searched(self.layout.width)
        parts, item = 1 + len(self.layout.whole), np.dtype(settings.precision).itemsize
        self.row_bytes = item * (self.layout.width + self._searched) + 4 * parts + EXAMPLE.itemsize
        self._folder = Folder(directory, len(indices) * self.row_bytes)
        self._examples = self._folder.array("examples", (size,), EXAMPLE)
        self._kept = self._folder.array("rows", (size, self.layout.width), settings.precision)
        self._lengths = self._folder.array("lengths", (size, parts), np.float32)
        self._size = self._done = self._added = 0
        self._rows = self._of_parts = self._products = torch.zeros(0)

    # -------------------------------------------------------------------------------------------------- in the pass

    def begin(self, batch: BatchGradients) -> None:
        """Begin the rows of a batch."""
        n, device = batch.loss.n, batch.finite.device
        self._rows, self._of_parts = self.coder.empty(n, device)
        self._batches += 1
        self._products = self._prepared.self_influence.new_zeros((n, len(self._probes)))

    def add(self, io: LayerIO) -> None:
        """Add a layer."""
        self.coder.add(io, self._rows, self._of_parts)
        if self._comparing:
            self._products += self._prepared.products(io)

    def end(self, batch: BatchGradients) -> None:
        """Write the batch."""
        self.coder.finish(self._rows, self._of_parts)
        own = slice(self._done, self._done + batch.loss.n)
        examples = self._examples[own]
        examples["index"] = batch.indices
        known = self._own.self_influence.cpu().double().masked_fill(~batch.finite.cpu(), torch.nan)
        examples["self_influence"] = known.numpy()
        self._kept[own] = self._rows.cpu().numpy()
        self._lengths[own] = self._of_parts.cpu().numpy()
        # Also where not: a larger batch that has come again may have left some.
        self._exact[own] = self._products.float().cpu() if self._comparing else torch.nan
        self._added = batch.loss.n

    def file(self) -> None:
        """Count the batch as written."""
        self._done += self._added

    @property
    def _comparing(self) -> bool:
        return self._batches % self._every == 0

    # ------------------------------------------------------------------------------------------------- at the end

    def finish(self) -> dict[str, Any]:
        """Complete the index, on all processes.

        Returns:
            What it is about, and how good it is: for the manifest, and ``told``.
        """
        sizes = distributed.gather_objects(self._done)
        if not sum(sizes):
            raise ValueError("no example was seen.")
        examples = self._examples[: self._done]
        shard = Shard.mapped(examples, self._kept[: self._done], self._lengths[: self._done], np.zeros((0, 1)))
        hashed = self._settings.hashes and self._write_digests(examples)
        columns = self._projection(shard, sum(sizes))
        search = self._folder.array("search", (len(self._examples), columns.shape[1]), self._settings.precision)
        for part, own in self._searched_of(shard, torch.arange(self._done)):
            found = own @ columns
            length = found.norm(dim=1)
            examples["length"][part.numpy()] = length.numpy()
            search[part.numpy()] = (found / length.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).numpy()
        shard = Shard(examples, shard.rows, shard.lengths, torch.from_numpy(search[: self._done]))
        trust = distributed.from_first(partial(self._trust, shard, columns))
        scale, coverage = self._gradients.scale, self._gradients.coverage
        about = {
            "examples": sum(sizes),
            "bytes": self.row_bytes,
            "smaller": 4 * coverage.covered_parameters / self.row_bytes,
            "numbers": self.layout.width,
            "of": coverage.covered_parameters,
            "hashed": all(distributed.gather_objects(bool(hashed))),
            "trust": trust,
        }
        inside = {
            "sizes": sizes,
            "curvature": self._curvature.name,
            "layers": {name: list(block.shape) for name, block in coverage.blocks.items()},
            "parameters": [name for block in coverage.blocks.values() for name in block.parameters],
            "one_by_one": sorted(coverage.one_by_one),
            "whole": list(self.layout.whole),
            "prefix": self.layout.prefix,
            "scale": None if scale is None else [[*key, value] for key, value in scale.items()],
        }
        del examples, search, shard
        self._examples = self._kept = self._lengths = np.zeros(0)
        self._folder.complete(about | inside, {**self.layout.tensors(), "projection": columns})
        return about

    def give_up(self) -> None:
        """Remove what was written."""
        self._folder.give_up()

    def _projection(self, shard: Shard, examples: int) -> Tensor:
        """Return the columns that the search is made of, the same on every process."""
        share = min(self._done, -(-_SAMPLE * self._done // examples))
        own = torch.tensor(random_subset(range(self._done), share, 2), dtype=torch.long)
        parts = [found for _, found in self._searched_of(shard, own)]
        samples = distributed.gather_objects(torch.cat(parts) if parts else torch.zeros(0, self.layout.searched))
        # On one, so that no rounding of others' makes columns that differ.
        return distributed.from_first(lambda: projection(torch.cat(samples), self._searched))

    def _searched_of(self, shard: Shard, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some rows at a time, and the coordinates of these that the search is made of."""
        for part in rows.split(max(1, _PART // max(1, self.layout.width))) if len(rows) else ():
            yield part, self.coder.searched(shard.rows[part].float(), shard.lengths[part])

    def _write_digests(self, examples: np.ndarray[Any, Any]) -> bool:
        """Note what each example holds; return whether that can be told."""
        found = digests(self._gradients.source, examples["index"].tolist())
        if found is None:
            return False
        examples["digest"] = np.array(found, dtype=f"V{DIGEST}")
        return True

    def _trust(self, shard: Shard, columns: Tensor) -> dict[str, float]:
        """Return how scores of the index compare with exact ones: some training examples with all others."""
        chosen = (~self._exact[: len(shard)].isnan().all(1)).nonzero().squeeze(1)
        if not len(chosen):
            return {}
        chosen = chosen[:: -(-len(chosen) * self.layout.width // (2 * _PART))]  # of wide rows fewer: all are in memory
        shard = Shard(shard.examples[chosen.numpy()], *(t[chosen] for t in (shard.rows, shard.lengths, shard.search)))
        search, count = Search(self.coder, [shard], columns), len(self._probes)
        scores = torch.cat([part for _, part in search.all_scores(self._coded)], 1)
        of_index = torch.from_numpy(shard.examples["index"].copy())
        finite = torch.from_numpy(np.isfinite(shard.examples["self_influence"]))
        found = search.strongest(self._coded, min(_TOP + 1, len(shard)), relative=False, everything=False)
        told: list[list[float]] = []
        for probe in range(count):
            exact, others = self._exact[chosen, probe], finite & (of_index != self._probes[probe])
            a, b = scores[probe][others].double(), exact[others].double()
            if len(b) < 3 or not bool(b.isfinite().all()) or float(b.std()) == 0:
                continue
            top = min(_TOP, int(others.sum()))
            hits = 0
            for side, sign in enumerate((1, -1)):
                best = (sign * exact).masked_fill(~others, -torch.inf).topk(top).indices
                mine = [row for row in found.rows[side, probe].tolist() if row >= 0 and bool(others[row])][:top]
                hits += len(set(best.tolist()) & set(mine))
            told.append(
                [
                    float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
                    float(torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1]),
                    float((a - b).norm() / b.norm()),
                    hits / (2 * top),
                ]
            )
        if not told:
            return {}
        means = torch.tensor(told, dtype=torch.float64).nanmean(0).tolist()
        names = ("correlation", "rank_correlation", "relative_error", "strongest_found")
        return {"queries": float(len(told)), **dict(zip(names, means, strict=True))}


def told(about: dict[str, Any]) -> str:
    """Return what a reader should know of an index, in a sentence."""
    line = (
        f"index: {about['numbers']:,} numbers of each example's {about['of']:,} are kept, "
        f"{readable(about['bytes'])} an example, {about['smaller']:.3g} times smaller than the gradient"
    )
    if trust := about["trust"]:
        line += (
            f"; beside exact scores, of {trust['queries']:.0f} training examples with others: correlation "
            f"{trust['correlation']:.4f}, of ranks {trust['rank_correlation']:.4f}, error "
            f"{trust['relative_error']:.2g} of their size, {trust['strongest_found']:.0%} of the ten strongest found"
        )
    return line


def digests(source: ExampleSource, indices: Sequence[int]) -> list[bytes] | None:
    """Return what examples hold in short; None where they can't be asked for, or are not the same twice."""
    sampled = source.digests(indices)
    if not sampled or any(one is None for one in sampled):
        return None
    with source.fetching() as fetch:
        return [digest(fetch(index))[:DIGEST] for index in indices]


def coded_queries(coder: Coder, passes: ExampleGradients, indices: Sequence[int]) -> CodedQueries:
    """Return the gradients of some queries, ready to be multiplied with an index."""
    asked = _Coded(coder, len(indices))
    visit(passes, indices, [asked], title="queries", everywhere=True)
    return asked.result(list(indices))


class _Positions(Visitor):
    """Tells which layers have one position an example."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self._seen: set[str] = set()
        self._others: set[str] = set()

    def begin(self, batch: BatchGradients) -> None:
        self._indices = batch.indices

    def file(self) -> None:
        self.order += self._indices

    def add(self, io: LayerIO) -> None:
        self._seen.add(io.name)
        if io.x.shape[2] > 1 or not isinstance(io.gs[0], Tensor):
            self._others.add(io.name)

    @property
    def single(self) -> set[str]:
        return self._seen - self._others


class _Coded(Visitor):
    """Codes the gradients of queries."""

    def __init__(self, coder: Coder, count: int) -> None:
        self._coder, self._count = coder, count
        self._order: list[int] = []
        self._parts: list[CodedQueries] = []
        self._kept, self._whole = torch.zeros(0), dict[str, Tensor]()

    def begin(self, batch: BatchGradients) -> None:
        n, layout = batch.loss.n, self._coder.layout
        self._kept = torch.zeros(n, layout.coordinates, device=batch.finite.device)
        self._whole = {name: self._kept.new_zeros((n, *shape)) for name, shape in layout.whole.items()}

    def add(self, io: LayerIO) -> None:
        self._coder.queries(io, self._kept, self._whole)

    def end(self, batch: BatchGradients) -> None:
        told = {name: values.cpu() for name, values in loss_columns(batch.loss).items()}
        self._part = batch.indices, replace(self._coder.coded(self._kept, self._whole, batch.finite), told=told)

    def file(self) -> None:
        self._order += self._part[0]
        self._parts.append(self._part[1])

    def result(self, indices: Sequence[int]) -> CodedQueries:
        return CodedQueries.together(self._parts).some(torch.tensor(_places(self._order, indices)))


def _places(order: Sequence[int], indices: Iterable[int]) -> list[int]:
    """Return where examples came in a pass, each as often as it is asked for."""
    where: dict[int, list[int]] = {}
    for place, index in enumerate(order):
        where.setdefault(index, []).append(place)
    used: dict[int, int] = {}
    found = []
    for index in indices:
        number = used.get(index, 0)
        found.append(where[index][min(number, len(where[index]) - 1)])
        used[index] = number + 1
    return found
