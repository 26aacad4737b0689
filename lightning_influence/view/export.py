"""Audits as one file of HTML, for mail and for artifacts of tests."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

from lightning_influence.page.embedding import Embedded, one_file
from lightning_influence.view.audits import Audits, ViewError


def export_html(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the page with all audits of a directory in it; it needs neither a server nor a network.

    Args:
        directory: An audit's directory, or one that holds some.
        out: The file; one that is there is replaced.

    Returns:
        Its path.

    Raises:
        ViewError: If there is no audit that can be read, or the file can't be written.
    """
    audits = Audits(Path(directory).expanduser().resolve())
    found, wrong = [], []
    for run in audits.runs():
        try:
            document = audits.document(run["id"])
            found.append(Embedded(run["name"], document, _pictures(audits, run["id"], document)))
        except (ViewError, ValueError, OSError) as error:
            wrong.append(f"{run['name']}: {error}")
    if not found:
        raise ViewError(f"none of the audits in {audits.root} can be read:\n  " + "\n  ".join(wrong))
    path = Path(out).expanduser()
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(one_file(found))
        os.replace(temporary, path)
    except OSError as error:
        raise ViewError(f"{path} can't be written: {error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _pictures(audits: Audits, key: str, document: bytes) -> list[bytes]:
    about = json.loads(document)
    places = [*(about.get("pictures") or {}).values(), *(about.get("query_pictures") or {}).values()]
    found = []
    for chunk in range(1 + max((place[0] for place in places), default=-1)):
        try:
            found.append(audits.pictures(key, str(chunk)))
        except KeyError:  # the page does without
            found.append(b"[]")
    return found
