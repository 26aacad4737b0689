"""What an index for later questions takes, how close it is to exact scores, and how fast it answers.

Real digits, shifted copies beyond 5,000 (``networks.data``). Queries are digits that were not trained on.

    python benchmarks/index.py [--network cnn] [--examples 4000] [--queries 1000]
    python benchmarks/index.py --memory 400 --examples 8000 --numbers 32768  # larger than the memory of its process
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from networks import NETWORKS, data
from torch.utils.data import TensorDataset

from lightning_influence import Index, Influence
from lightning_influence.core.ranks import average_ranks
from lightning_influence.gradients.visitors import visit
from lightning_influence.index.search import Search
from lightning_influence.scores.examples import ExampleScorer

Result = TypeVar("Result")
COMPARED = 50


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean correlation of rows."""
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]).mean())


def own_bytes() -> int:
    """Return the private memory that can be written to: what ``RLIMIT_DATA`` counts, which mapped files are not."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))


def within(room: int, influence: Influence, settings: Index, new: TensorDataset) -> None:
    """Write an index and ask it, where the process gets no more than so many MB of memory from now on."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is given back is given back, not kept in pieces
    resource.setrlimit(resource.RLIMIT_DATA, (own_bytes() + room * 2**20,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        index, writing = timed(lambda: influence.index(Path(folder) / "audit", settings))
        size = sum(file.stat().st_size for file in index.folder.iterdir())
        print(f"{size / 2**20:.0f} MB within {room} MB, written in {writing:.1f} s; {index}", flush=True)
        try:
            torch.empty(size, dtype=torch.uint8)
            raise SystemExit("the index is no larger than the memory: there is room for it")
        except RuntimeError:
            print("as much memory in one piece is refused")
        for everything in (True, False):
            _, asking = timed(
                lambda every=everything: index.ask(
                    influence.training.module, new, loss=F.cross_entropy, everything=every
                )
            )
            print(f"{len(new)} queries, {'all' if everything else 'search'}: {asking:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="cnn", choices=list(NETWORKS))
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--numbers", type=int, default=None)
    parser.add_argument("--memory", type=int, help="MB that the process may take more, once the model is fitted")
    asked = parser.parse_args()
    torch.manual_seed(0)
    every = data(asked.network, asked.examples + asked.queries)
    order = torch.randperm(len(every)).tolist()
    inputs, targets = (tensor[order] for tensor in every.tensors)
    train = TensorDataset(inputs[asked.queries :], targets[asked.queries :])
    new = TensorDataset(inputs[: asked.queries], targets[: asked.queries])
    model = NETWORKS[asked.network]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(asked.epochs):
        for batch in torch.randperm(min(len(train), 4000)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train.tensors[0][batch]), train.tensors[1][batch]).backward()
            optimizer.step()
    influence, fitting = timed(lambda: Influence(model, F.cross_entropy, train).fit())
    if asked.memory is not None:
        influence.top(new, [0], 1)  # what is made once has been made
        within(asked.memory, influence, Index(asked.numbers, "float32"), new)
        return
    own = ExampleScorer(influence.training, influence.examples, influence.curvature)
    _, plain = timed(lambda: visit(influence.training, influence.examples, [own]))
    with tempfile.TemporaryDirectory() as folder:
        index, writing = timed(lambda: influence.index(Path(folder) / "audit", Index(asked.numbers)))
        size = sum(file.stat().st_size for file in index.folder.iterdir())
        print(f"{asked.network}: fit {fitting:.1f} s, scores alone {plain:.1f} s, with the index {writing:.1f} s")
        print(f"{size / 1e6:.0f} MB for {len(index):,} examples; {index}")
        exact = influence.pairs(new, range(min(COMPARED, len(new)))).scores
        scores = index.scores(model, new, loss=F.cross_entropy, indices=range(len(exact))).scores
        ranks = [torch.stack([average_ranks(row) for row in each]) for each in (scores, exact)]
        error = ((scores - exact).norm(dim=1) / exact.norm(dim=1)).median()
        print(
            f"{len(exact)} new queries: correlation {correlation(scores, exact):.4f}, "
            f"of ranks {correlation(*ranks):.4f}, error {error:.3f}"
        )
        for normalise in ("none", "relative"):
            want = influence.top(new, range(len(exact)), 10, normalise=normalise)
            for everything in (True, False):
                got = index.ask(
                    model,
                    new,
                    10,
                    loss=F.cross_entropy,
                    indices=range(len(exact)),
                    normalise=normalise,
                    everything=everything,
                )
                hits = [
                    len(set(a) & set(b)) / 10
                    for x, y in ((want.proponents, got.proponents), (want.opponents, got.opponents))
                    for a, b in zip(x.tolist(), y.tolist(), strict=True)
                ]
                print(f"  ten strongest, {normalise}, {'all' if everything else 'search'}: {sum(hits) / len(hits):.3f}")
        for count in (1, len(new)):
            start, searching = time.perf_counter(), 0.0
            for _, coder, queries in index._asked(model, new, F.cross_entropy, range(count)):
                search = Search(coder, index._shards, index._projection)
                searching += timed(lambda q=queries, s=search: s.strongest(q, 10, relative=False))[1]
            rest = time.perf_counter() - start - searching
            print(f"{count:,} queries: search {searching:.2f} s, their gradients and the rest {rest:.2f} s")


if __name__ == "__main__":
    main()
