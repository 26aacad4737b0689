"""What a replay costs, in trainings: the run once more to see that it is the same, and back through it with queries.

All of it in one process, CPU time, the training by a plain loop without recording.

    python benchmarks/replay.py                 digits MLP and CNN, some minutes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from replay_lds import passes, settings, train

from lightning_influence.replay.scores import replay_measurement, replay_scores


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the least CPU time that something took."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="digits", help="part of a title")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 8, 32])
    chosen = parser.parse_args()
    asked = " | ".join(f"{q} queries" for q in chosen.queries)
    print(f"| in trainings | one training | verified | mean of 50 queries | {asked} |")
    print("|" + " --- |" * (4 + len(chosen.queries)))
    for setting in settings():
        if chosen.only not in setting.title:
            continue
        train(setting)  # the first one has more to set up
        plain = seconds(lambda setting=setting: train(setting), chosen.times)  # type: ignore[misc]
        module, rerun = train(setting, record=True)
        assert rerun is not None
        queries = passes(module, setting.queries, passes(module, setting.data))
        verified = seconds(rerun.verify, chosen.times) / plain
        every = [(queries, range(len(setting.queries[1])))]
        whole = seconds(lambda: replay_measurement(rerun, every), chosen.times) / plain  # noqa: B023
        found = [
            seconds(lambda q=q: replay_scores(rerun, queries, range(q)), chosen.times) / plain  # type: ignore[misc] # noqa: B023
            for q in chosen.queries
        ]
        cells = " | ".join(f"{value:.1f}" for value in (verified, whole, *found))
        print(f"| {setting.title} | {plain:.2f} s | {cells} |", flush=True)


if __name__ == "__main__":
    main()
