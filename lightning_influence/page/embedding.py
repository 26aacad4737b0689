"""The page as one file that needs no server and no network: data, scripts and style inside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import chain, islice
from typing import Any

from lightning_influence.page.assets import static_files
from lightning_influence.page.listing import parsed, told, unreadable

_PREFIX = "influence/"  # of the modules' names in the import map, which `data:` addresses can refer to
_IMPORT = re.compile(r"""^(import\b[^;'"]*|export\b[^;'"]*\bfrom\s*|\} from\s*)(["'])\./([\w-]+\.js)\2""", re.MULTILINE)
# Even what an audit could smuggle in would reach nobody.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' data:; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class Embedded:
    """An audit that goes into the file.

    Args:
        name: What it is called where there are several.
        audit: Its ``audit.json``.
        pictures: Its ``pictures-<chunk>.json``, in order; each is asked for when it is written.
    """

    name: str
    audit: bytes
    pictures: Iterable[bytes] = ()


def one_file(audits: Iterable[Embedded], title: str = "") -> bytes:
    """Return the page with some audits in it; see ``pieces``."""
    return b"".join(pieces(audits, title))


def pieces(audits: Iterable[Embedded], title: str = "") -> Iterator[bytes]:
    """Yield the page with some audits in it, of whose pictures no more than a chunk has to be in memory.

    Args:
        audits: The first is shown first.
        title: Of the browser's window; by default the name of the first audit.
    """
    files, others = static_files(), iter(audits)
    first = list(islice(others, 1))
    yield "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
            f"<title>{escape(title or (first[0].name if first else 'Influence'))}</title>",
            f"<style>{files['style.css'][1].decode()}</style></head><body>\n",
        ]
    ).encode()
    runs = []
    for number, each in enumerate(chain(first, others)):
        runs.append(_about(str(number), each))
        yield from _data(f"influence-audit-{number}", each.audit)
        for chunk, pictures in enumerate(each.pictures):
            yield from _data(f"influence-pictures-{number}-{chunk}", pictures)
    yield from _data("influence-runs", json.dumps(runs).encode())
    modules = {
        _PREFIX + name: "data:text/javascript;base64," + base64.b64encode(_renamed(content)).decode("ascii")
        for name, (_, content) in files.items()
        if name.endswith(".js")
    }
    yield f'<script type="importmap">{json.dumps({"imports": modules})}</script>\n'.encode()
    start = f'import {{ render }} from "{_PREFIX}index.js"; render();'
    yield f'<script type="module">{start}</script></body></html>\n'.encode()


def _renamed(content: bytes) -> bytes:
    """Return a module whose imports are names of the import map: relative ones don't work in ``data:`` addresses."""
    return _IMPORT.sub(rf"\1\2{_PREFIX}\3\2", content.decode()).encode()


def _about(key: str, audit: Embedded) -> Mapping[str, Any]:
    try:
        about = told(parsed(audit.audit))
    except ValueError as error:
        about = unreadable(f"it can't be read: {error}")
    return {"id": key, "name": audit.name, **about}


def _data(key: str, text: bytes) -> Iterator[bytes]:
    yield f'<script type="application/json" id="{escape(key)}">'.encode()
    yield text.replace(b"<", b"\\u003c")
    yield b"</script>\n"
