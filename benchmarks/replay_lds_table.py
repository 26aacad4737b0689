"""The page that ``replay_lds.py`` writes."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peers import versions
from replay_lds_methods import AVERAGED, METHODS, REPLAY

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Of the training examples, left out at random."""
QUESTIONS = {"this": "this run", "mean": "mean over four runs"}

Found = dict[str, Any]
"""What is found of a recipe: ``rows`` by method with scores by question and share, and how they were had."""


def page(every: Mapping[str, Found]) -> str:
    """Return the whole page."""
    parts = [header(), summary(every, "this"), "", exceptions(every), ""]
    if several := {title: found for title, found in every.items() if found["seeds"] > 1}:
        parts += [
            "## Four runs\n\nThe same examples are left out of four runs with starts and orders of their own, of which "
            "this run is the first. The truth is the mean of these four runs' losses. *Four replays averaged* are the "
            "replays of the same four: for runs with yet other starts this is a bound.\n",
            summary(several, "mean"),
            "",
            "The same methods against this run alone:\n",
            summary(several, "this"),
            "",
        ]
    parts += [strongest(every), "", *(section(*each) + "\n" for each in every.items())]
    return "\n".join(parts)


def header() -> str:
    """Say what was run, on what, and how to read it."""
    return (
        "# Replay: what if these had been missing from this run?\n\n"
        f"Written by `benchmarks/replay_lds.py` on {time.strftime('%Y-%m-%d')}: {versions('kronfluence', 'dattri')}; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n\n"
        "A run is recorded, and trained again without some examples: same start, same order of batches, same chance; "
        "their part of the loss is multiplied by 0. A method predicts the change of a query's loss by the sum of the "
        "scores of what is left out. The LDS is Spearman's correlation of prediction and truth over random subsets, "
        "averaged over queries; in brackets a 95 % bootstrap interval over subsets and queries. Queries whose loss is "
        "the same after every training are left out and counted. A query's margin (log-odds of its label) is a "
        "monotone function of its loss, and its scores are a multiple: there is one LDS for both. Every method "
        "explains the same run; GGN, EK-FAC, K-FAC and IP its final weights, SOURCE and TracIn ten checkpoints; "
        "dampings are the defaults (after Adam with what its state tells). Seconds are for all queries (on a busy "
        "machine they mean little), a replay's with two trainings (recorded, and run again to the same bits).\n\n"
        "**This is another question than that of [lds.md](lds.md)**, which asks what becomes of *any* run: random "
        "halves, averaged over seeds. A method that is good at one need not be at the other.\n"
    )


def summary(every: Mapping[str, Found], question: str) -> str:
    """Return a line for each recipe."""
    shown = [REPLAY, "GGN", "EK-FAC"]
    if question == "mean" or all(found["seeds"] > 1 for found in every.values()):
        shown += list(AVERAGED)
    shares = "/".join(f"{share * 100:g}" for share in SHARES)
    heads = [*shown, "best other"]
    lines = [
        f"| LDS, {QUESTIONS[question]}, {shares} % left out | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for title, found in every.items():
        values = {name: [score[0] for score in row.get(question, ())] for name, row in found["rows"].items()}
        others = [row for name, row in values.items() if name not in shown and row]
        told = [*(values.get(name, []) for name in shown), [max(column) for column in zip(*others, strict=True)]]
        lines.append(f"| {title} | {' | '.join(_short(row) for row in told)} |")
    return "\n".join(lines)


def exceptions(every: Mapping[str, Found]) -> str:
    """Say where a replay is not above the others that know this run alone."""
    above, there, lines = dict.fromkeys(list(METHODS)[1:], 0), dict.fromkeys(METHODS, 0), list[str]()
    cells = 0
    for title, found in every.items():
        values = {name: [score[0] for score in row.get("this", ())] for name, row in found["rows"].items()}
        for place, value in enumerate(values[REPLAY]):
            cells += 1
            for name in above:
                above[name] += bool(values[name]) and values[name][place] < value
                there[name] += bool(values[name])
            better = [
                f"{name} {values[name][place]:.2f}" for name in above if values[name] and values[name][place] >= value
            ]
            if better:
                lines.append(f"* {title}, {_percent(SHARES[place])}: replay {value:.2f}; {'; '.join(better)}")
    told = "; ".join(
        f"{name} in {count}{'' if there[name] == cells else f' of {there[name]}'}" for name, count in above.items()
    )
    return "\n".join(
        [f"Of {cells} cells (recipe and share), replay is above {told}. Not above:\n", *(lines or ["* none"])]
    )


def strongest(every: Mapping[str, Found]) -> str:
    """Return what leaving out each query's own strongest proponents does to its loss."""
    names = list(next(iter(every.values()))["qld"])
    lines = [
        "## Without each query's strongest proponents (QLD)\n",
        "By how much the loss of a query rises when this run is made without the 1 % of the examples with its highest "
        "scores: mean over queries, and in how many it rises by more than by leaving out 1 % at random "
        "(the mean of the subsets above).\n",
        f"| recipe | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for title, found in every.items():
        cells = []
        for values in (found["qld"].get(name) for name in names):
            if values is None:
                cells.append("not run, or failed")
                continue
            more = sum(value > other for value, other in zip(values, found["qld"]["random"], strict=True))
            told = f"{statistics.mean(values):.4f}"
            cells.append(told if values is found["qld"]["random"] else f"{told} ({more} of {len(values)})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(title: str, found: Found) -> str:
    """Return a recipe's table."""
    lines = [
        f"## {title}\n",
        f"{found['examples']:,} training examples, {found['queries']} queries, {found['subsets']} random subsets for "
        f"each share. {_constant(found['constant'])}\n",
    ]
    for question, told in QUESTIONS.items():
        if question == "mean" and found["seeds"] == 1:
            continue
        lines += [
            f"| {told} | {' | '.join(f'{_percent(share)} left out' for share in SHARES)} | seconds |",
            "|---" * (len(SHARES) + 2) + "|",
        ]
        for name, row in found["rows"].items():
            if "failed" in row:
                lines.append(f"| {name} | {row['failed']} |" + " |" * len(SHARES))
                continue
            cells = " | ".join(f"{value:.3f} ({low:.2f} to {high:.2f})" for value, low, high in row[question])
            lines.append(f"| {name} | {cells} | {row['seconds']:.1f} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}".replace("0.", ".") for value in values) or "failed"


def _percent(share: float) -> str:
    return f"{share * 100:g} %"


def _constant(counts: Sequence[int]) -> str:
    if not any(counts):
        return "Every query changed."
    told = ", ".join(f"{count} ({_percent(share)})" for count, share in zip(counts, SHARES, strict=True))
    return f"Queries that did not change, left out: {told}."
