"""The audits below a directory, and what the page asks of each."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_influence.page.listing import parsed, told, unreadable

AUDIT, MANIFEST, SCORES, REVIEW = "audit.json", "manifest.json", "scores.parquet", "review.csv"

_DEPTH = 5  # folders below the one that was named
_MOST = 500  # audits
_LARGEST = 2**28  # bytes of a file that is handed out
_SKIPPED = {"checkpoints", "factors", "curves", "node_modules", "__pycache__"}
_CHUNK = re.compile(r"0|[1-9]\d{0,5}")


class ViewError(ValueError):
    """What can't be shown; the message names the path and the way out."""


class ChangedError(ViewError):
    """A review that somebody else has changed."""


def tag_of(content: bytes) -> str:
    """Return what tells contents apart; of nothing, too."""
    return f'"{hashlib.sha256(content).hexdigest()[:24]}"'


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file: the old one or the new one is there at any time. That of the store needs torch."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _no_document(directory: Path) -> bytes:
    """Return the document of an audit that was written without one; this needs torch."""
    from lightning_influence.audit.report import AuditReport
    from lightning_influence.page.document import AUDIT as NAME
    from lightning_influence.page.document import files

    return files(AuditReport.load(directory))[NAME]


@dataclass
class Audits:
    """The audits in a directory; looked for anew at each request, so that those of a running training come in.

    Args:
        root: An audit's directory, or one that holds some.
        make: What makes the document of an audit without one.
    """

    root: Path
    make: Callable[[Path], bytes] = _no_document
    _made: dict[Path, tuple[tuple[int, int], bytes]] = field(default_factory=dict, repr=False)
    _told: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = field(default_factory=dict, repr=False)
    _known: dict[str, Path] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise ViewError(f"{self.root} {found}; expected the directory of an audit, or one that holds some.")
        if not self.found():
            raise ViewError(
                f"{self.root} holds no audit: expected {MANIFEST} and {SCORES}, here or up to {_DEPTH} folders below. "
                "An audit is written at the end of training, as a rule to <log_dir>/influence."
            )

    def found(self) -> dict[str, Path]:
        """Return the audits by their ids: the paths below the root."""
        folders = islice(self._folders(), _MOST)
        self._known = {_key(folder.relative_to(self.root)): folder for folder in folders}
        return self._known

    def _folder(self, key: str) -> Path:
        """Return the folder of an audit; whoever asks for one has seen the list as a rule, and a walk takes time."""
        known = self._known.get(key)
        there = known is not None and any((known / name).is_file() for name in (AUDIT, MANIFEST))
        # What has become a link since is not followed, as in a walk.
        return known if known is not None and there and os.path.realpath(known) == str(known) else self.found()[key]

    def runs(self) -> list[dict[str, Any]]:
        """Return what there is, the newest first; what can't be read says why."""
        runs = []
        for key, folder in self.found().items():
            name = key if key != "." else _key(Path(folder.parent.name, folder.name))
            runs.append({"id": key, "name": name, **self._about(folder)})
        return sorted(runs, key=lambda run: str(run["created"]), reverse=True)

    def document(self, key: str) -> bytes:
        """Return the document of an audit.

        Raises:
            KeyError: If there is no such audit.
            ViewError: If it can't be read.
        """
        folder = self._folder(key)
        if (folder / AUDIT).is_file():
            return self._whole(folder / AUDIT)
        with self._lock:  # one at a time: it takes a while, and browsers ask twice
            stamp = _stamp(folder / MANIFEST)
            if folder not in self._made or self._made[folder][0] != stamp:
                try:
                    self._made[folder] = stamp, self.make(folder)
                except Exception as error:  # of a damaged audit, anything
                    raise ViewError(str(error) or type(error).__name__) from error
            return self._made[folder][1]

    def pictures(self, key: str, chunk: str) -> bytes:
        """Return a chunk of the pictures of an audit.

        Raises:
            KeyError: If there is no such audit, or chunk.
        """
        path = self._folder(key) / f"pictures-{chunk}.json"
        if not _CHUNK.fullmatch(chunk) or not path.is_file():
            raise KeyError(chunk)
        return self._whole(path)

    def review(self, key: str) -> bytes:
        """Return what was decided so far, as CSV; empty for nothing."""
        path = self._folder(key) / REVIEW
        return self._whole(path) if path.is_file() else b""

    def write_review(self, key: str, content: bytes, instead_of: str) -> str:
        """Write what was decided beside the audit: the old file or the new one is there at any time.

        Args:
            key: The audit.
            content: The table.
            instead_of: The tag of what the writer has seen there; what somebody else has written stays.

        Returns:
            The tag of what is there now.

        Raises:
            KeyError: If there is no such audit.
            ChangedError: If there is something else.
            ViewError: If it can't be written.
        """
        with self._lock:
            path = self._folder(key) / REVIEW
            if tag_of(self.review(key)) != instead_of:
                raise ChangedError(f"{REVIEW} has been changed by somebody else; reload the page to have both.")
            try:
                replace(path, [content])
            except OSError as error:
                raise ViewError(
                    f"{path} can't be written ({error}); the decisions are still in the browser."
                ) from error
        return tag_of(content)

    def _folders(self) -> Iterator[Path]:
        for here, folders, names in os.walk(self.root, onerror=None, followlinks=False):
            place = Path(here)
            if AUDIT in names or (MANIFEST in names and (SCORES in names or _recording(place))):
                yield place
            deep = len(place.relative_to(self.root).parts) >= _DEPTH
            kept = [] if deep else sorted(name for name in folders if name not in _SKIPPED and name[:1] != ".")
            folders[:] = kept

    def _about(self, folder: Path) -> Mapping[str, Any]:
        source = folder / AUDIT if (folder / AUDIT).is_file() else folder / MANIFEST
        try:
            stamp = _stamp(source)
            if folder not in self._told or self._told[folder][0] != stamp:
                self._told[folder] = stamp, {**told(parsed(self._whole(source))), "error": None}
            return self._told[folder][1]
        except (OSError, ValueError) as error:
            return unreadable(f"{source.name} can't be read: {error}")

    def _whole(self, path: Path) -> bytes:
        """Return what a file holds, if it is one of the directory, and not too large."""
        if not Path(os.path.realpath(path)).is_relative_to(self.root):
            raise ViewError(f"{path.name} is a link to elsewhere; view a directory that holds both.")
        if (size := path.stat().st_size) > _LARGEST:
            raise ViewError(f"{path.name} has {size:,} bytes, more than the {_LARGEST:,} that a page can take.")
        return path.read_bytes()


def _key(path: Path) -> str:
    """Return a path as text that can be written in any encoding: names of files are bytes, and may be none."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _recording(folder: Path) -> bool:
    """Return whether a training is at it, or has been stopped: its manifest is there before the scores."""
    return folder.name.startswith("influence")


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
