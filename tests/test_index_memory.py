"""An index that is larger than the memory which its process may have of its own is written, and answers.

The limit is on private memory (``RLIMIT_DATA``). Mapped files do not count for it: their pages are the page cache's,
which gives them up when memory is needed. Run as a script, this file is the process that has a limit.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Index, Influence
from lightning_influence.index import search, writer

MB = 2**20
N, ROOM = 3000, 60 * MB  # each of the examples has 64 kB in the index
SMALL = ((search, "_PART"), (search, "_SCORES"), (search, "_GATHERED"), (writer, "_PART"))


class Mean(nn.Module):
    """A layer over two positions, which leaves no gradient of rank one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(127, 128), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh().mean(1))
        return out


def own_bytes() -> int:
    """Return the size of what counts: private memory that can be written to."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmData"].split()[0])


def main(directory: Path) -> None:
    for module, name in SMALL:
        setattr(module, name, 2**19)
    writer._SAMPLE = 256
    torch.manual_seed(0)
    model = Mean()
    x = torch.randn(N, 2, 127)
    data = TensorDataset(x, x[:, 0, :4].argmax(1))
    influence = Influence(model, F.cross_entropy, data, batch_size=16).fit(factor_examples=200)
    settings = Index(16384, "float32")
    influence.top(data, range(2), 2)  # whatever is made once has been made
    resource.setrlimit(resource.RLIMIT_DATA, (own_bytes() + ROOM,) * 2)
    index = influence.index(directory, settings)
    size = sum(file.stat().st_size for file in index.folder.iterdir())
    try:
        np.ones(size, dtype=np.int8)
        raise SystemExit("the limit is none")
    except MemoryError:
        pass
    told: dict[str, Any] = {"bytes": size, "rows": len(index)}
    for everything in (True, False):
        found = index.ask(model, data, 5, loss=F.cross_entropy, indices=range(3), everything=everything)
        told[str(everything)] = found.proponents.tolist()
    print(json.dumps(told))


@pytest.mark.skipif(sys.platform != "linux", reason="what counts for the limit is told by Linux")
def test_an_index_larger_than_memory(tmp_path: Path) -> None:
    # What is given back is given back: else malloc keeps pieces that nothing else fits into.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["bytes"] > 3 * ROOM
    assert told["rows"] == N
    # Each of the queries is a training example: by all scores and by the search, it is among its own proponents.
    for answers in (told["True"], told["False"]):
        assert all(query in rows for query, rows in enumerate(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
