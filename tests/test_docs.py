"""What the documentation shows can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(<!-- not run -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[str]:
    """Return the Python blocks that are to be run, each with blank lines before it, so that errors name its line."""
    return ["\n" * text[: m.start(2)].count("\n") + m[2] for m in BLOCK.finditer(text) if not m[1]]


@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md")) if blocks(path.read_text())])
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": name}
    for block in blocks((DOCS / name).read_text()):
        exec(compile(block, name, "exec"), names)


def test_a_block_that_is_marked_is_not_run() -> None:
    text = "```python\na\n```\n\n<!-- not run -->\n```python\nb\n```\n\n```bash\nc\n```\n```python\nd\n```\n"
    assert [block.strip() for block in blocks(text)] == ["a", "d"]


ROOT = DOCS.parent
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_what_is_there(page: Path) -> None:
    targets = [first or second for first, second in LINK.findall(page.read_text())]
    inside = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in inside if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing
