"""What a list of audits says of each, from its document or its manifest: of files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any, NoReturn

_LONGEST = 100  # characters


def parsed(content: bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: If it is none, has numbers that are none in browsers, or is nested too deeply.
    """
    try:
        return json.loads(content, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def told(document: Any) -> dict[str, Any]:
    """Return status, time and number of epochs, each of the type that it should have.

    Raises:
        ValueError: If it is no object.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}; expected an object")
    status, created, done = (document.get(name) for name in ("status", "created", "epochs_done"))
    texts = {
        name: value[:_LONGEST] if isinstance(value, str) else ""
        for name, value in (("status", status), ("created", created))
    }
    return {**texts, "epochs_done": done if type(done) is int and abs(done) < 2**53 else None}


def unreadable(reason: object) -> dict[str, Any]:
    """Return what is said of an audit that can't be read."""
    return {"status": "", "created": "", "error": str(reason)}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no number")
