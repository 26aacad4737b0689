"""Audits in event files: which there are, and the blobs that each consists of.

An audit is a series of blobs of this plugin, ``audit/<name>`` once it is over and ``recording/<name>`` before: of each
step, the first is its document, ``audit.json``, the others its pictures in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensorboard.data.provider import RunTagFilter

from lightning_influence.page.listing import parsed, told, unreadable

PLUGIN = "influence"

_FORMAT = 1  # of documents, the newest that is understood
_LARGEST = 2**28  # bytes of a document


class AuditError(Exception):
    """An audit that can't be shown, and why."""


@dataclass(frozen=True)
class _Series:
    run: str
    tag: str
    changed: tuple[int, float]  # step and time of what is newest

    @property
    def key(self) -> str:
        """The same for what is recorded and what comes of it: the page goes on with it."""
        return f"{self.run}/{self.tag.partition('/')[2] or self.tag}"


class EventAudits:
    """The audits that a data provider has read.

    Args:
        provider: TensorBoard's.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._told: dict[_Series, dict[str, Any]] = {}

    def runs(self, context: Any, experiment: str) -> list[dict[str, Any]]:
        """Return what there is, the newest first; what can't be read says why."""
        found = self._found(context, experiment)
        self._told = {series: about for series, about in self._told.items() if series in found.values()}
        runs = []
        for key, series in found.items():
            if series not in self._told:
                self._told[series] = self._about(context, experiment, series)
            runs.append({"id": key, "name": key.removeprefix("./"), **self._told[series]})
        return sorted(runs, key=lambda run: str(run["created"]), reverse=True)

    def document(self, context: Any, experiment: str, key: str) -> bytes:
        """Return the document of an audit.

        Raises:
            KeyError: If there is no such audit.
            AuditError: If it can't be read.
        """
        content = self._blob(context, experiment, self._found(context, experiment)[key], 0)
        _checked(content)
        return content

    def pictures(self, context: Any, experiment: str, key: str, chunk: int) -> bytes:
        """Return a chunk of the pictures of an audit.

        Raises:
            KeyError: If there is no such audit, or chunk.
            AuditError: If it can't be read.
        """
        content = self._blob(context, experiment, self._found(context, experiment)[key], chunk + 1)
        if not isinstance(_parsed(content), list):
            raise AuditError("its pictures are damaged: they are no list")
        return content

    def _found(self, context: Any, experiment: str) -> dict[str, _Series]:
        """Return the newest series of each audit."""
        newest: dict[str, _Series] = {}
        listed = self._provider.list_blob_sequences(context, experiment_id=experiment, plugin_name=PLUGIN)
        for series in _series(listed):
            before = newest.get(series.key)
            # Both are of one time where clocks are coarse: what is over is what counts.
            if before is None or (series.changed[1], series.tag < before.tag) > (before.changed[1], False):
                newest[series.key] = series
        return newest

    def _about(self, context: Any, experiment: str, series: _Series) -> dict[str, Any]:
        try:
            return {**told(_checked(self._blob(context, experiment, series, 0))), "error": None}
        except KeyError:
            return unreadable("it holds nothing")
        except AuditError as error:
            return unreadable(error)
        except Exception as error:  # of one audit: whatever the data provider says of it, the others are listed
            return unreadable(f"it can't be read: {type(error).__name__}: {error}")

    def _blob(self, context: Any, experiment: str, series: _Series, number: int) -> bytes:
        read = self._provider.read_blob_sequences(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=1,  # the last
            run_tag_filter=RunTagFilter(runs=[series.run], tags=[series.tag]),
        )
        steps = read.get(series.run, {}).get(series.tag, ())
        blobs = steps[-1].values if steps else ()
        if not number < len(blobs):
            raise KeyError(number)
        content = self._provider.read_blob(context, blob_key=blobs[number].blob_key)
        if len(content) > _LARGEST:
            raise AuditError(f"it has {len(content):,} bytes, more than the {_LARGEST:,} that a page can take")
        return bytes(content)


def _series(listed: Mapping[str, Mapping[str, Any]]) -> Iterator[_Series]:
    for run, tags in sorted(listed.items()):
        for tag, about in sorted(tags.items()):
            yield _Series(run, tag, (about.max_step, about.max_wall_time))


def _checked(content: bytes) -> dict[str, Any]:
    """Return a document.

    Raises:
        AuditError: If it is none, or of a later version.
    """
    found = _parsed(content)
    if not isinstance(found, dict) or type(version := found.get("format")) is not int:
        raise AuditError("it is no document of an audit: another program may have written it")
    if version > _FORMAT:
        raise AuditError(
            f"it has format {version}, and this version reads up to {_FORMAT}: upgrade lightning-influence"
        )
    if not isinstance(found.get("columns"), list) or type(found.get("examples")) is not int:
        raise AuditError("its document is damaged: columns or the number of examples are missing")
    return found


def _parsed(content: bytes) -> Any:
    try:
        return parsed(content)
    except ValueError as error:
        raise AuditError(f"it is damaged, or no audit's: {error}") from error
