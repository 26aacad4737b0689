"""Audits as one file of HTML, for mail and for artifacts of tests."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning_influence.page.embedding import Embedded, one_file
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
    found, wrong = [], []
    for run in audits.runs():
        try:
            if run["error"]:
                raise ViewError(run["error"])
            found.append(Embedded(run["name"], audits.document(run["id"]), _pictures(audits, run["id"])))
        except (ValueError, OSError) as error:
            wrong.append(f"{run['name']}: {error}")
    if wrong and found:
        warnings.warn(f"{path} is without audits that can't be read:\n  " + "\n  ".join(wrong), stacklevel=2)
    if not found:
        raise ViewError(f"none of the audits in {audits.root} can be read:\n  " + "\n  ".join(wrong))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, one_file(found))
    except OSError as error:
        raise ViewError(f"{path} can't be written: {error}.") from error
    return path


def _pictures(audits: Audits, key: str) -> list[bytes]:
    found: list[bytes] = []
    with suppress(KeyError):  # the last is the one before the first that is not there; the page does without others
        for chunk in count():
            found.append(audits.pictures(key, str(chunk)))
    return found
