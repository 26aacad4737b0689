"""The files of the page, as a closed table: what is not in it is not served."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def static_files() -> dict[str, tuple[str, bytes]]:
    """Return file name to media type and content, of everything the page is made of."""
    return _read()


@cache
def _read() -> dict[str, tuple[str, bytes]]:
    found = sorted(path for path in _FOLDER.iterdir() if path.suffix in _KINDS and path.is_file())
    return {path.name: (_KINDS[path.suffix], path.read_bytes()) for path in found}
