"""How well the ranking finds flipped labels, over several seeds: the demo's run, repeated. Run ``make detection``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from lightning_influence import AuditReport

EXAMPLE = Path(__file__).parent.parent / "examples" / "01_mislabelled_digits.py"
SEEDS = (0, 1, 2)


def main() -> None:
    """Train, audit and print one row per seed."""
    print(f"{'seed':<6}{'ranking':>9}{'best column':>34}{'difference':>12}{'found in top 10 %':>20}")
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as logs:
            command = [sys.executable, str(EXAMPLE), "--seed", str(seed), "--logs", logs]
            subprocess.run(command, check=True, capture_output=True)
            report = AuditReport.load(next(Path(logs).glob("**/influence")))
        auroc = {name: values["auroc"] for name, values in report.manifest["detection"].items()}
        ranking = auroc.pop("suspicion")
        best = max(auroc, key=lambda name: auroc[name])
        found = report.manifest["detection"]["suspicion"]["recall_at"]
        print(f"{seed:<6}{ranking:>9.4f}{best:>26}{auroc[best]:>8.4f}{ranking - auroc[best]:>+12.4f}{found:>20.1%}")


if __name__ == "__main__":
    main()
