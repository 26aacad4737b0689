"""Side by side with the peers: time, memory and agreement, contestants taking turns in one run.

make bench                                   everything, and docs/benchmarks.md
python benchmarks/side_by_side.py --quick    small sizes, to see that it works; the numbers mean little
python benchmarks/side_by_side.py --only self,tracin
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peers import versions
from rounds import (
    ContestantError,
    Result,
    compete,
    contestant_process,
    disagreement,
    megabytes,
    ratio,
    seconds,
    short,
    weigh,
)

THREADS = 2
NAMES = {
    "mlp": "MLP 784-256-256-10",
    "mlp1024": "MLP 784-1024-1024-10",
    "cnn": "CNN, 32-64-128 channels on 28 × 28",
    "transformer": "transformer, 4 layers, d = 128, S = 64",
    "resnet18": "ResNet-18 of width 32 on 32 × 32",
}
WORKS = {
    "self": "EK-FAC factors and self-influence",
    "tracin": "TracIn self-influence, one checkpoint",
    "pairs": "EK-FAC scores, 100 queries × N, factors given",
}
GROWING = ("mlp", "cnn")
# A profile of more examples takes more memory than what is measured.
WEIGHED = {"mlp": 500, "mlp1024": 500, "cnn": 200, "transformer": 128, "resnet18": 64}
# What is compared in memory: work and contestant, whose resident memory is that of a match in turn with others.
MEMORY = (("training", "training"), ("audit", "ours"), ("self", "kronfluence"))


@dataclass(frozen=True)
class Match:
    """Contestants that take turns with one work.

    Attributes:
        work: See ``contestants.CONTESTANTS``.
        network: Name of the network.
        examples: Number of training examples.
        contestants: Who takes part.
        compared: Scores of the first so many examples are compared.
        rounds: Rounds at most.
        budget: Seconds for all rounds.
        tensors: Whether tensors are counted, in place of all else.
    """

    work: str
    network: str
    examples: int
    contestants: tuple[str, ...]
    compared: int = 0
    rounds: int = 5
    budget: float = 60.0
    tensors: bool = False

    @property
    def kind(self) -> str:
        """The work, or ``"tensors"``: what matches are chosen by."""
        return "tensors" if self.tensors else self.work


@dataclass(frozen=True)
class Target:
    """What is to be reached: so many times as fast as a peer, with so small a difference of the scores."""

    work: str
    network: str
    peer: str
    ours: str
    factor: float
    difference: float | None = None


SPEED = [
    *(
        Target("self", network, "kronfluence", ours, factor, None if ours != "ours" else 1e-3)
        for network, factor in (("mlp", 100), ("mlp1024", 500), ("cnn", 5), ("transformer", 4), ("resnet18", 12))
        for ours in ("ours", "ours, defaults")
    ),
    Target("tracin", "mlp", "captum", "ours", 50, 1e-4),
    Target("tracin", "cnn", "captum", "ours", 6, 1e-4),
    Target("pairs", "mlp", "kronfluence", "ours", 10, 1e-3),
    Target("pairs", "cnn", "kronfluence", "ours", 2, 1e-3),
]
PASSES = 4.0
DYNAMICS, IN_FLIGHT, BUDGET = 0.03, {"mlp": 0.10, "cnn": 0.35, "transformer": 0.10}, 0.10

Results = dict[Match, dict[str, Result]]


def matches(quick: bool) -> list[Match]:
    """Return all that is measured; ``quick`` is a hundredth of it."""
    selves, pairs = ("kronfluence", "ours", "ours, defaults", "floor"), ("kronfluence", "ours", "floor")
    scale = 16 if quick else 1
    limits = {"rounds": 1} if quick else {}
    sizes = {"mlp": (1000, 200), "mlp1024": (1000, 64), "cnn": (1000, 200), "transformer": (200, 64)}
    sizes["resnet18"] = (200, 32)
    # No fewer examples than a training batch has.
    found = [
        Match("self", network, max(32, examples // scale), selves, max(32, compared // scale), **limits)
        for network, (examples, compared) in sizes.items()
    ]
    for network in GROWING:
        found.append(
            Match("tracin", network, 1000 // scale, ("captum", "ours", "floor"), max(32, 200 // scale), **limits)
        )
        found.append(Match("pairs", network, 5000 // scale, pairs, max(32, 500 // scale), **limits))
    for network in NAMES:
        found.append(Match("audit", network, 5000 // scale, ("plain pass", "ours"), **limits))
        found.append(Match("training", network, 256 // scale * 2, ("training",), rounds=1))
    for network in IN_FLIGHT:  # no fewer steps than the pace takes to be chosen, and then to measure some
        count = 320 if quick else 1200 if network == "mlp" else 480
        found.append(Match("step", network, 32 * count, ("every step", "with a budget"), **limits))
    for network in GROWING:
        for examples in (1000, 20000, 50000):
            found.append(Match("audit", network, examples // scale, ("ours",), rounds=1))
    found.append(Match("self", "cnn", 5000 // scale, ("kronfluence",), rounds=1))
    for network, examples in WEIGHED.items():
        for work, contestant in MEMORY:
            found.append(Match(work, network, max(32, examples // scale), (contestant,), rounds=1, tensors=True))
    return found


def play(match: Match, folder: Path) -> dict[str, Result]:
    """Start the contestants of a match and let them take turns; one that can't start has failed."""
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        ready = {}
        for name in match.contestants:
            spec = {
                "work": match.work,
                "contestant": name,
                "network": match.network,
                "examples": match.examples,
                "compared": match.compared or 32,
                "folder": str(folder),
                "threads": THREADS,
            }
            try:
                ready[name] = contestant_process(spec, folder / f"{name}.log")
                stack.callback(ready[name].close)
            except ContestantError as error:
                results[name] = Result(failure=str(error))
        if match.tensors:
            results |= weigh(ready)
        else:
            results |= compete(ready, folder, rounds=match.rounds, budget=match.budget)
    return {name: results[name] for name in match.contestants}


def prepare(network: str, folder: Path, quick: bool) -> None:
    """Train a network for a while and keep its weights."""
    spec = {
        "work": "prepare",
        "contestant": "",
        "network": network,
        "examples": 64 if quick or network == "resnet18" else 1024,
        "compared": 0,
        "folder": str(folder),
        "threads": THREADS,
    }
    contestant_process(spec, folder / "prepare.log").close()


# ------------------------------------------------------------------ tables


def pick(results: Results, work: str, network: str, contestants: Sequence[str]) -> tuple[Match, dict[str, Result]]:
    """Return the first match with these contestants; raise ``KeyError`` if it was not played."""
    for match, found in results.items():
        if (match.kind, match.network) == (work, network) and set(contestants) <= found.keys():
            return match, found
    raise KeyError(f"no match of {', '.join(contestants)} on {work}, {network}")


def of_kind(results: Results, kind: str) -> Iterator[tuple[Match, dict[str, Result]]]:
    """Yield the matches of a kind: a work that was timed, or ``"tensors"``."""
    return ((match, found) for match, found in results.items() if match.kind == kind)


def mark(met: bool) -> str:
    """Say whether a target was met."""
    return "met" if met else "**missed**"


def speed_table(results: Results, targets: Sequence[Target]) -> Iterator[str]:
    """Yield a line for every target whose match was played."""
    yield (
        "| work | network | N | peer | its median | ours | our median | times faster (rounds) | target | floor | "
        "the floor would be | largest difference of scores |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for target in targets:
        try:
            match, found = pick(results, target.work, target.network, (target.peer, target.ours))
        except KeyError:
            continue
        peer, ours = found[target.peer], found[target.ours]
        row = [WORKS[target.work], NAMES[target.network], f"{match.examples:,}", target.peer]
        faster = ratio(peer, ours)
        if faster is None:
            failed = target.peer if peer.failure else target.ours
            row += [f"{failed} failed: {peer.failure or ours.failure}", target.ours, "", "", "", "", "", ""]
        else:
            count = len(ours.seconds)
            row += [seconds(peer.median), target.ours, seconds(ours.median), f"{faster} ({count})"]
            lowest, stages = floor(target, found)
            reach, met = ratio(peer, lowest), faster.median >= target.factor
            beyond = ", beyond the floor" if not met and reach is not None and reach.median < target.factor else ""
            row += [f"≥ {target.factor:,.0f}: {mark(met)}{beyond}"]
            if reach is None:
                row += [f"failed: {lowest.failure}" if lowest.failure else "–", "–"]
            else:
                row += [f"{seconds(lowest.median)}{stages}", f"{short(reach.median)}×"]
            row += [agreement(target, peer, ours)]
        yield f"| {' | '.join(row)} |"


def floor(target: Target, found: dict[str, Result]) -> tuple[Result, str]:
    """Return the floor of a target's work, and its parts, written out.

    Args:
        target: With our defaults, whose factors may be fitted on fewer examples, the floor is that of fewer examples.
        found: The results of the match.
    """
    result = found.get("floor", Result())
    if not result.stages:
        return result, ""
    if target.ours == "ours, defaults":
        return Result([stages["defaults"] for stages in result.stages], failure=result.failure), ""
    parts = {
        name: statistics.median(stages[name] for stages in result.stages)
        for name in result.stages[0]
        if name != "defaults"
    }
    return result, f" ({', '.join(f'{name} {seconds(value)}' for name, value in parts.items())})"


def agreement(target: Target, peer: Result, ours: Result) -> str:
    """Write the largest relative difference of the scores."""
    if target.difference is None or peer.scores is None or ours.scores is None:
        return "–"
    value = disagreement(ours.scores, peer.scores)
    return f"{value:.0e} (≤ {target.difference:.0e}: {mark(value <= target.difference)})"


def audit_table(results: Results) -> Iterator[str]:
    """Yield a line for every network whose audit and training pass took turns."""
    yield "| network | N | plain pass | whole audit, defaults | audit / pass (rounds) | of which | target |"
    yield "|---|---|---|---|---|---|---|"
    for match, found in of_kind(results, "audit"):
        if "plain pass" not in found:
            continue
        one, ours = found["plain pass"], found["ours"]
        passes = ratio(ours, one)
        if passes is None:
            yield f"| {NAMES[match.network]} | {match.examples:,} | failed: {one.failure or ours.failure} | | | | |"
            continue
        stages = {name: ours.stages[-1][name] / one.median for name in ours.stages[-1]}
        parts = ", ".join(f"{name} {short(value)}" for name, value in stages.items() if value >= 0.05)
        yield (
            f"| {NAMES[match.network]} | {match.examples:,} | {seconds(one.median)} | {seconds(ours.median)} | "
            f"{passes} ({len(ours.seconds)}) | {parts} | ≤ {PASSES:.0f}: {mark(passes.median <= PASSES)} |"
        )


def step_table(results: Results) -> Iterator[str]:
    """Yield a line for every network whose training steps were timed."""
    yield (
        "| network | plain step | with the dynamics | target | with TracIn at every step, too | target | its floor | "
        "with a budget of 10% | target |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for match, found in of_kind(results, "step"):
        steps, paced = (found[name] for name in match.contestants)
        if steps.failure or paced.failure:
            yield f"| {NAMES[match.network]} | failed: {steps.failure or paced.failure} | | | | | | | |"
            continue
        plain = statistics.median(stages["plain"] for stages in steps.stages)
        least = statistics.median(stages["floor"] / stages["plain"] for stages in steps.stages)
        limit = IN_FLIGHT[match.network]
        cells = [
            added(steps, "dynamics", DYNAMICS),
            added(steps, "in flight", limit) + (", beyond the floor" if least > limit else ""),
            f"{least:.1%}",
            added(paced, "in flight", BUDGET, f" (1 of {round(paced.stages[-1]['every'])} steps)"),
        ]
        yield f"| {NAMES[match.network]} | {1000 * plain:.2f} ms | {' | '.join(cells)} |"


def added(result: Result, stage: str, limit: float, remark: str = "") -> str:
    """Write what a stage adds to the time of a plain step, and its target: the median over the rounds."""
    share = statistics.median(stages[stage] / stages["plain"] for stages in result.stages) - 1
    return f"{share:+.1%}{remark} | ≤ {limit:.0%}: {mark(share <= limit)}"


def memory_table(results: Results) -> Iterator[str]:
    """Yield a line for every network whose memory was measured in either way."""
    yield (
        "| network (N of tensors) | training, with its optimizer: tensors | resident | whole audit: tensors | resident "
        "| below training (tensors) | kronfluence, factors and scores: tensors | resident | the audit's peak is in |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    # Residents are those of contestants that took turns: the other matches have other numbers of examples.
    turns = {"audit": ("plain pass", "ours"), "self": ("kronfluence", "ours")}
    for network, name in NAMES.items():
        counted, resident = [], []
        for work, contestant in MEMORY:
            try:
                resident.append(pick(results, work, network, turns.get(work, (contestant,)))[1][contestant].peak)
            except KeyError:
                resident.append(None)
            counted.append(weighed(results, work, network, contestant))
        if not any(resident) and not any(result.tensors for result in counted):
            continue
        own, audit = (result.tensors for result in counted[:2])
        verdict = "–" if own is None or audit is None else "yes" if audit < own else "**no**"
        sizes = [
            f"{'failed: ' + result.failure if result.failure else megabytes(result.tensors)} | {megabytes(peak)}"
            for result, peak in zip(counted, resident, strict=True)
        ]
        operation = f"`{counted[1].operation}`" if counted[1].operation else "–"
        examples = {match.examples for match in results if match.kind == "tensors" and match.network == network}
        of = f" ({', '.join(map(str, sorted(examples)))})" if examples else ""
        yield f"| {name}{of} | {sizes[0]} | {sizes[1]} | {verdict} | {sizes[2]} | {operation} |"


def weighed(results: Results, work: str, network: str, contestant: str) -> Result:
    """Return the result of a contestant whose tensors were counted; an empty one if they were not."""
    for match, found in of_kind(results, "tensors"):
        if (match.work, match.network) == (work, network) and contestant in found:
            return found[contestant]
    return Result()


def growth(results: Results) -> dict[str, list[tuple[int, float, float]]]:
    """Return series by name: number of examples, milliseconds per example, megabytes."""
    series: dict[str, list[tuple[int, float, float]]] = {}
    for match, found in results.items():
        for work, contestant in (("audit", "ours"), ("self", "kronfluence")):
            if match.kind != work or contestant not in found or match.network not in GROWING:
                continue
            result = found[contestant]
            if result.seconds and result.peak is not None:
                name = f"{'whole audit' if work == 'audit' else contestant}, {match.network.upper()}"
                point = (match.examples, 1000 * result.median / match.examples, result.peak / 2**20)
                series.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def growth_table(series: dict[str, list[tuple[int, float, float]]]) -> Iterator[str]:
    """Yield the numbers of the plot."""
    yield "| | N | per example | extra memory |"
    yield "|---|---|---|---|"
    for name, points in series.items():
        for examples, milliseconds, megabytes_ in points:
            yield f"| {name} | {examples:,} | {milliseconds:.3f} ms | {megabytes_:,.0f} MB |"


def plot(series: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw time per example and memory against the number of examples."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    numbers = ticker.FuncFormatter(lambda value, _: f"{value:,.10g}")
    for name, points in series.items():
        style = "--s" if name.startswith("kronfluence") else "-o"
        counts, times, sizes = zip(*points, strict=True)
        left.plot(counts, times, style, label=name)
        right.plot(counts, sizes, style, label=name)
    for axes, title in ((left, "milliseconds per example"), (right, "extra peak memory, MB")):
        axes.set(title=title, xlabel="training examples", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.set_xticks([1_000, 5_000, 20_000, 50_000], minor=False)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(numbers)
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.minorticks_off()
    left.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ------------------------------------------------------------------ the page


def machine() -> str:
    """Name the machine and what is installed."""
    info, memory = Path("/proc/cpuinfo"), ""
    model = platform.processor() or platform.machine()
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"
    installed = versions("kronfluence", "captum")
    return f"{os.cpu_count()} cores ({model}){memory}, Python {platform.python_version()}; {installed}"


METHOD = (
    "Every contestant runs in a process of its own, with the same trained weights, the same digits, float32 and "
    f"{THREADS} threads; they warm up and then take turns (A B A B …), so that a ratio compares neighbours in time; "
    "medians over the rounds are given with the smallest and the largest. *ours* does the peer's work: labels sampled "
    "once in each pass, every example in every pass, only the layers that the peer knows; *ours, defaults* is what the "
    "callback computes (all layers, factors from a subset). Scores are compared "
    "where they are determined: empirical Fisher, damping 0.1 of the mean eigenvalue, on the first examples (for pairs "
    "relative to the query's largest score)."
)
FLOOR = (
    "The *floor* takes turns with the others and does only what no method leaves out that we know of, if it works with "
    "exact scores in float32, decomposes in float64 and keeps nothing of an example from one pass to the next: bare "
    "passes in torch (forward, and backward as far as the first layer's output, no gradients of weights; three for "
    "factors and self-influence, else one), the eigendecompositions of all Kronecker factors without their rows of "
    "zeros, one after the other, for pairs one matrix product of gradients and queries for each layer, and the algebra "
    "of examples (outer products, rotations, gradients of shared weights): the multiplications of its cheapest exact "
    "form are counted, and taken to be as fast as those of one large matrix product. That of *ours, defaults* counts "
    "the fewer examples that factors are fitted on. A target that asks for more than the floor would reach is *beyond "
    "the floor*: missed by any such method on this machine."
)
WEIGHTS = (
    "*Tensors*: the most bytes that torch's allocator had handed out at a time, beyond weights and data; counted "
    "exactly, in a run of its own with few examples (their number is in brackets). "
    "*Resident*: the peak of resident memory beyond what the process held when weights and data were loaded; it counts "
    "fragments of the heap and the buffers of libraries, too, and belongs to the runs that were timed above."
)
SKIPPED = """\
* **dattri 0.3.0**: its EK-FAC gives wrong scores (see `docs/results/lds.md`), so its time says nothing; its conjugate
  gradients solve for the GGN, another work than any above. Both are in `make lds`.
* **bergson 2.5.1**: attributes language models of `transformers` with data sets of `datasets`; none of the networks
  above is one.
* **captum 0.9.0** on the transformer and the ResNet: per-example gradients by its hooks are for linear layers and
  convolutions alone, not for norms.
* **kronfluence 1.0.1** leaves out norms and position embeddings; *ours* leaves them out as well where the two compare.
"""


def page(results: Results, started: float, picture: str | None) -> str:
    """Return the markdown."""
    series = growth(results)
    parts = [
        "# Benchmarks\n",
        f"Written by `make bench` on {time.strftime('%Y-%m-%d')}, in {(time.time() - started) / 60:.0f} minutes: "
        f"{machine()}.\n",
        METHOD + "\n",
        "## Side by side\n",
        *speed_table(results, SPEED),
        "\n" + FLOOR,
        "\n## The whole audit, in passes\n",
        "A pass is one forward and backward over the same data in batches of 32. The audit traces, verifies, fits "
        "factors (eigendecompositions included), scores every example and sweeps the damping.\n",
        *audit_table(results),
        "\n## While training\n",
        "Median time of a step under a Lightning Trainer, without recording and with, eight steps in a row by turns in "
        'one run, of which the first two do not count. With a budget, `TracIn(mode="step", overhead=0.1)` times '
        "itself and measures as many steps as fit. The floor of TracIn counts linear maps alone, in bare torch, warm, "
        "and without the dynamics: the lengths of their inputs and output gradients, or, for weights that are shared "
        "over positions, every example's squared norm in the fastest of three forms.\n",
        *step_table(results),
        "\n## Memory\n",
        WEIGHTS + "\n",
        *memory_table(results),
        "\n## Growth with the data\n",
        *([f"![time per example and memory against the number of examples]({picture})\n"] if picture else []),
        *growth_table(series),
        "\n## What is not there, and why\n",
        SKIPPED,
    ]
    return "\n".join(parts)


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument(
        "--only", default="", help="works, separated by commas: self,tracin,pairs,audit,training,step,tensors"
    )
    parser.add_argument("--networks", default=",".join(NAMES), help="networks, separated by commas")
    parser.add_argument("--out", type=Path, help="markdown file to write; the plot goes beside it")
    arguments = parser.parse_args()
    started = time.time()
    works, networks = arguments.only.split(","), arguments.networks.split(",")
    chosen = [
        match
        for match in matches(arguments.quick)
        if match.network in networks and (match.kind in works or not arguments.only)
    ]
    results: Results = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for network in dict.fromkeys(match.network for match in chosen):
            prepare(network, folder, arguments.quick)
        for match in chosen:
            results[match] = play(match, folder)
            told = ", ".join(
                f"{name} {result.failure or (megabytes(result.tensors) if match.tensors else seconds(result.median))}"
                for name, result in results[match].items()
            )
            work = f"{match.work}, tensors" if match.tensors else match.work
            print(
                f"[{time.time() - started:5.0f} s] {work}, {match.network}, N={match.examples}: {told}",
                flush=True,
            )
    picture = None
    if arguments.out and (series := growth(results)):
        picture = arguments.out.with_suffix(".png").name
        plot(series, arguments.out.with_suffix(".png"))
    text = page(results, started, picture)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
