"""Which workflows an audit goes through in: releases of Lightning, data, loggers, kinds of optimization, strategies.

make compatibility

Each environment and package is a process of its own (``compatibility_cells.py``, ``compatibility_strategies.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from compatibility_table import PACKAGES, Environment, page

HERE = Path(__file__).parent


def cells(python: str, package: str, script: str = "compatibility_cells.py") -> list[dict[str, Any]]:
    """Run all workflows of a package in an environment; return what each came to, after the releases."""
    command = [python, str(HERE / script), package]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}; its last words are above.")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Run all of them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", default=sys.executable, metavar="PYTHON", help="of the newest releases")
    parser.add_argument("--floor", metavar="PYTHON", help="of the lowest releases that are supported")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "compatibility.md")
    arguments = parser.parse_args()
    found: dict[Environment, list[dict[str, Any]]] = {}
    strategies: dict[Environment, list[dict[str, Any]]] = {}
    versions: dict[Environment, Any] = {}
    for releases, python in (("newest", arguments.newest), ("floor", arguments.floor)):
        for package in PACKAGES if python else ():
            first, *rest = cells(python, package)
            if "missing" in first:
                continue
            found[releases, package], versions[releases, package] = rest, first["versions"]
            strategies[releases, package] = cells(python, package, "compatibility_strategies.py")
            tally = {kind: [c["outcome"] for c in rest].count(kind) for kind in {c["outcome"] for c in rest}}
            print(f"{releases} {package}: {tally}", flush=True)
    arguments.out.write_text(page(found, versions, strategies))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
