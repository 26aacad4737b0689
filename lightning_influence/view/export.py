"""Audits as one file of HTML, for mail and for artifacts of tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lightning_influence.page.embedding import Embedded, pieces
from lightning_influence.view.audits import Audits, ViewError, replace


def export_html(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the page with all audits of a directory in it; it needs neither a server nor a network.

    Args:
        directory: An audit's directory, or one that holds some.
        out: The file; one that is there is replaced.

    Returns:
        Its path.

    Raises:
        ViewError: If there is no audit that can be read, or the file can't be written.

    Warns:
        UserWarning: If it is without some that can't be read.
    """
    path = Path(out).expanduser()
    audits = Audits(Path(directory).expanduser().resolve())
    wrong: list[str] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, pieces(_embedded(audits, wrong)))
    except OSError as error:
        raise ViewError(f"{path} can't be written: {error}.") from error
    if wrong:
        warnings.warn(f"{path} is without audits that can't be read:\n  " + "\n  ".join(wrong), stacklevel=2)
    return path


def _embedded(audits: Audits, wrong: list[str]) -> Iterator[Embedded]:
    """Yield the audits that can be read, and say of the others why not.

    Raises:
        ViewError: If there is none.
    """
    none = True
    for run in audits.runs():
        try:
            if run["error"]:
                raise ViewError(run["error"])
            document = audits.document(run["id"])
        except (ValueError, OSError) as error:
            wrong.append(f"{run['name']}: {error}")
            continue
        none = False
        yield Embedded(run["name"], document, _pictures(audits, run, wrong))
    if none:
        raise ViewError(f"none of the audits in {audits.root} can be read:\n  " + "\n  ".join(wrong))


def _pictures(audits: Audits, run: Mapping[str, Any], wrong: list[str]) -> Iterator[bytes]:
    with suppress(KeyError):  # the last is the one before the first that is not there; the page does without others
        for chunk in count():
            try:
                pictures = audits.pictures(run["id"], str(chunk))
            except (ValueError, OSError) as error:
                wrong.append(f"{run['name']}, its pictures from chunk {chunk} on: {error}")
                return
            yield pictures
