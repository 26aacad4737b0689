"""The axes of the compatibility table, and its page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
DATA = (
    *("DataLoader", "DataModule", "Hugging Face", "Subset", "stream", "stream, `sample_id=`"),
    *("two loaders", "two loaders, `loader=`"),
)
OPTIMIZATION = ("automatic", "manual", "manual, `task=`")
STRATEGIES = ("one device", "DDP", "FSDP2", "tensor parallel", "FSDPStrategy", "DeepSpeedStrategy")
LOGGERS = ("TensorBoard", "CSV", "W&B", "MLflow", "none")

_LEGEND = """Each cell is a small training, run with and without the audit.
**✓** right: the weights are bit for bit those of the training alone, every example has the scores that the plainest
workflow gives it, the audit is whole on disk, and the logger holds it. A number is a refusal before the first step; its
words are below. **–** the package of the logger or data was not installed there."""

_STRATEGIES = """Two processes (gloo, CPU) with half of each batch, beside one with all of it. **✓** the weights are bit
for bit those of the training alone, and every example has the score that one process gives it, to 1e-5. FSDP2 and
tensor parallel are those of `ModelParallelStrategy`; see [several processes](processes.md)."""

Environment = tuple[str, str]
"""Which releases (newest or floor), and which package."""


def page(
    found: Mapping[Environment, Sequence[dict[str, Any]]],
    versions: Mapping[Environment, Any],
    strategies: Mapping[Environment, Sequence[dict[str, Any]]],
) -> str:
    """Return the page: tables of workflows by environment and logger, and of strategies; the words of each refusal."""
    words: dict[str, int] = {}
    counts: dict[str, int] = {}
    lines = [
        "# Compatibility",
        "",
        f"Written by `make compatibility` on {time.strftime('%Y-%m-%d')}. {_LEGEND}",
        "",
        "| | " + " | ".join(f"{releases} {package}" for releases, package in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for name in ("lightning", "pytorch-lightning", "torch", "tensorboard", "wandb", "mlflow-skinny", "datasets"):
        told = [str(versions[each].get(name) or "–") for each in found]
        lines.append(f"| {name} | " + " | ".join(told) + " |")
    for releases, package in found:
        cells = {(cell["data"], cell["optimization"], cell["logger"]): cell for cell in found[releases, package]}
        lines += ["", f"## `{package}`, {releases}", "", f"| data | optimization | {' | '.join(LOGGERS)} |"]
        lines.append("|---|---|" + "---|" * len(LOGGERS))
        for data in DATA:
            for optimization in OPTIMIZATION:
                row = [_shown(cells[data, optimization, logger], words, counts) for logger in LOGGERS]
                lines.append(f"| {data} | {optimization} | {' | '.join(row)} |")
    lines += strategy_table(strategies, words, counts)
    lines += ["", "## Refusals", "", *(f"{number}. {told}" for told, number in words.items())]
    tally = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    return "\n".join([*lines, "", f"In all: {tally}.", ""])


def strategy_table(
    found: Mapping[Environment, Sequence[dict[str, Any]]], words: dict[str, int], counts: dict[str, int]
) -> list[str]:
    """Return a section with a row for each strategy."""
    head = " | ".join(f"{releases} {package}" for releases, package in found)
    lines = ["", "## Strategies", "", _STRATEGIES, "", f"| | {head} |", "|---|" + "---|" * len(found)]
    for name in STRATEGIES:
        cells = [cell for each in found.values() for cell in each if cell["strategy"] == name]
        lines.append(f"| {name} | {' | '.join(_shown(cell, words, counts) for cell in cells)} |")
    return lines


def _shown(cell: Mapping[str, Any], words: dict[str, int], counts: dict[str, int]) -> str:
    outcome = cell["outcome"]
    kind = outcome.partition(":")[0]
    counts[kind] = counts.get(kind, 0) + 1
    if outcome == "right":
        return "✓"
    if outcome == "not installed":
        return "–"
    told = " ".join(f"{'' if outcome == 'refused' else outcome + ' '}{cell['words']}".split())
    number = words.setdefault(told, len(words) + 1)
    return str(number) if outcome == "refused" else f"**{kind}** {number}"
