"""How well scores predict what leaving examples out of *this run* does: same start, same order, same chance.

A network is trained and recorded; then again without some examples (their part of the loss is multiplied by 0), once
for each of some random subsets. The LDS is the rank correlation, over the subsets, of the summed scores with what has
really changed, averaged over queries. Some recipes are retrained from four starts and orders, and scores of several
runs averaged. What has been trained and scored is kept in ``.replay_lds/`` and not run again; remove it there to have
it anew.

    make lds-this-run                           all recipes (an hour; resumes)
    python benchmarks/replay_lds.py --only cancer --subsets 10
    python benchmarks/replay_lds.py --kept --out docs/results/replay.md    the page of what there is, running nothing
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lds_methods import slug
from replay_lds_methods import AVERAGED, METHODS, REPLAY, SEVERAL, Run
from replay_lds_table import SHARES, Found, page
from replay_runs import Setting, retrained, settings
from retraining import GroundTruth, datamodeling_score, keep
from torch import Tensor

KEPT = Path(".replay_lds")
STRONGEST = 0.01
"""Share of the training examples that is left out for a query's sake."""
ASKED_FOR_STRONGEST = (REPLAY, "GGN", "EK-FAC")


class NotRunError(LookupError):
    """Something is not kept, and not to be run."""


class Recipe:
    """A setting, and what is kept of its runs.

    Args:
        setting: The run.
        subsets: Trainings for each share.
        runs: Whether what is not kept is run.
    """

    def __init__(self, setting: Setting, subsets: int, *, runs: bool = True) -> None:
        self.setting, self.subsets, self._may_run = setting, subsets, runs
        self._runs = dict[int, Run]()
        asked = repr((setting.title, len(setting.data[1]), len(setting.queries[1])))
        self._folder = KEPT / f"{slug(setting.title)}-{sha256(asked.encode()).hexdigest()[:8]}"

    def kept(self, name: str, make: Callable[[], Tensor]) -> dict[str, Any]:
        """Return a ``tensor``, made now or before, with the ``seconds`` it took."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            if not self._may_run:
                raise NotRunError(f"{path} is not there")
            start = time.perf_counter()
            found = {"tensor": make(), "seconds": time.perf_counter() - start}
            keep(found, path)
            print(f"  {name}: {found['seconds']:.1f} s", flush=True)
        read: dict[str, Any] = torch.load(path)
        return read

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        if seed not in self._runs:
            self._runs[seed] = Run.of(self.setting, seed)
        return self._runs[seed]

    def scores(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Return a method's scores of a run ``[queries, N]``."""
        return self.kept(f"{slug(name)}-run-{seed}", lambda: METHODS[name](self.run(seed)))

    def averaged(self, name: str, runs: int) -> dict[str, Any]:
        """Return mean scores of several runs."""
        found = [self.scores(name, seed) for seed in range(runs)]
        return {
            "tensor": torch.stack([each["tensor"] for each in found]).mean(0),
            "seconds": sum(each["seconds"] for each in found),
        }

    def rows(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yield methods with what gives their scores."""
        for name in METHODS:
            yield name, lambda name=name: self.scores(name)
        if self.setting.seeds == 1:
            return
        for name, (single, runs) in AVERAGED.items():
            yield name, lambda single=single, runs=runs: self.averaged(single, runs)
        for name, method in SEVERAL.items():
            yield name, lambda name=name, method=method: self.kept(slug(name), lambda: method(self.setting))

    def without(self, out: Tensor, seed: int = 0) -> Tensor:
        """Return log-odds ``[models, queries]`` after trainings without some examples ``[models, k]``."""
        weights = torch.ones(len(out), len(self.setting.data[1])).scatter_(1, out, 0.0)
        return torch.cat([retrained(self.setting, part, seed) for part in weights.split(20)])

    def truth(self, share: float, seed: int) -> GroundTruth:
        """Return what becomes of the queries without random examples."""
        n, generator = len(self.setting.data[1]), torch.Generator().manual_seed(2)
        left_out = max(round(share * n), 1)
        out = torch.stack([torch.randperm(n, generator=generator)[:left_out] for _ in range(self.subsets)])
        found = self.kept(f"{self.subsets}-without-{share:g}-seed-{seed}", lambda: self.without(out, seed))
        return GroundTruth(torch.ones(self.subsets, n).scatter_(1, out, 0.0), found["tensor"].unsqueeze(1))

    def strongest(self, name: str) -> list[float]:
        """Return by how much each query's loss rises without its strongest proponents, or on average without others."""
        asked, n = torch.arange(len(self.setting.queries[1])), len(self.setting.data[1])
        whole = self.kept("whole", lambda: self.without(torch.empty(1, 0, dtype=torch.long)))["tensor"]
        before = GroundTruth(torch.ones(1, n), whole.unsqueeze(1)).losses[0, 0]
        if name == "random":
            return (self.truth(STRONGEST, 0).losses.mean((0, 1)) - before).tolist()
        out = self.scores(name)["tensor"].topk(max(round(STRONGEST * n), 1)).indices
        after = self.kept(f"without-strongest-{slug(name)}", lambda: self.without(out))["tensor"]
        found: list[float] = (
            GroundTruth(torch.ones(1, n), after.unsqueeze(1)).losses[asked, 0, asked] - before
        ).tolist()
        return found


def there(setting: Setting, subsets: int) -> Setting:
    """Return a setting with all the starts that it has been retrained from, or with one.

    Raises:
        NotRunError: If it has not been retrained from one.
    """
    recipe = Recipe(setting, subsets, runs=False)
    for share in SHARES:
        recipe.truth(share, 0)
    try:
        for share in SHARES:
            for seed in range(1, setting.seeds):
                recipe.truth(share, seed)
    except NotRunError:
        return replace(setting, seeds=1)
    return setting


def measure(setting: Setting, subsets: int, *, runs: bool = True) -> Found:
    """Score a recipe's run with every method, and hold it against trainings without examples."""
    print(setting.title, flush=True)
    recipe, scores, rows = Recipe(setting, subsets, runs=runs), dict[str, Tensor](), dict[str, Found]()
    for name, make in recipe.rows():
        try:
            made = make()
            if not bool(made["tensor"].isfinite().all()):
                raise ValueError(f"{int((~made['tensor'].isfinite()).sum())} scores are not finite")
        except NotRunError:
            rows[name] = {"failed": "not run"}
        except Exception as error:  # a method that fails is a finding, not the end of the table
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            print(f"  {name}: {rows[name]['failed']}", flush=True)
        else:
            scores[name], rows[name] = made["tensor"], {"seconds": made["seconds"], "this": [], "mean": []}
    constant = []
    for share in SHARES:
        every = [recipe.truth(share, seed) for seed in range(setting.seeds)]
        asked = {"this": every[0]}
        if setting.seeds > 1:
            asked["mean"] = GroundTruth(every[0].members, torch.cat([truth.margins for truth in every], 1))
        constant.append(int((~every[0].varies).sum()))
        for name, given in scores.items():
            for question, truth in asked.items():
                score = datamodeling_score(given, truth)
                rows[name][question].append([score.value, score.low, score.high])
    qld = dict[str, list[float]]()
    for name in ("random", *ASKED_FOR_STRONGEST):
        if name in scores or name == "random":
            with suppress(NotRunError):
                qld[name] = recipe.strongest(name)
    return {
        "rows": rows,
        "constant": constant,
        "examples": len(setting.data[1]),
        "queries": len(setting.queries[1]),
        "subsets": subsets,
        "seeds": setting.seeds,
        "qld": qld,
    }


def main() -> None:
    """Run what is not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=20, help="trainings for each share (default 20)")
    parser.add_argument("--queries", type=int, default=32, help="default 32")
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--kept", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    chosen = parser.parse_args()
    every: dict[str, Found] = {}
    text = f"no recipe has {chosen.only!r} in its title"
    for setting in settings(chosen.queries):
        if chosen.only in setting.title:
            try:
                known = there(setting, chosen.subsets) if chosen.kept else setting
            except NotRunError as error:
                print(f"{setting.title}: {error}")
                continue
            every[setting.title] = measure(known, chosen.subsets, runs=not chosen.kept)
            text = page(every)
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
