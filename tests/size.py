"""Lines of code by room: neither blank lines nor comments, docstrings and imports. ``python tests/size.py``."""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_influence"


def code_lines(text: str) -> int:
    """Count the lines of a module that do something."""
    idle: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        text_only = isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        if text_only or isinstance(node, ast.Import | ast.ImportFrom):
            idle.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        number not in idle and bool(line.strip()) and not line.lstrip().startswith("#")
        for number, line in enumerate(text.splitlines(), 1)
    )


def main() -> None:
    rooms: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts, text = path.relative_to(PACKAGE).parts, path.read_text()
        rooms[parts[0] if len(parts) > 1 else path.stem].append((code_lines(text), text.count("\n")))
    print(f"{'room':14}{'files':>6}{'code':>8}{'longest':>9}")
    for room, files in rooms.items():
        print(f"{room:14}{len(files):6}{sum(code for code, _ in files):8,}{max(lines for _, lines in files):9}")
    every = [file for files in rooms.values() for file in files]
    print(f"{'all':14}{len(every):6}{sum(code for code, _ in every):8,}{max(lines for _, lines in every):9}")
    print(f"\nmedian file: {statistics.median(lines for _, lines in every):.0f} lines")


if __name__ == "__main__":
    main()
