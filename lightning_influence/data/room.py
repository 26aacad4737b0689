"""How many examples at a time there is memory for, as far as running out of it has told."""

from __future__ import annotations

import warnings


class Room:
    """What passes over a data set have learned of memory.

    Attributes:
        shrunk: Examples at a time that memory has run out with, and with how many it went on; None if it never has.
    """

    def __init__(self) -> None:
        self.shrunk: tuple[int, int] | None = None

    @property
    def most(self) -> int | None:
        """How many there is room for; None if that is not known."""
        return None if self.shrunk is None else self.shrunk[1]

    def shrink(self, size: int, most: int) -> None:
        """Take note that memory has run out with ``size`` examples: passes go on with at most ``most``."""
        if self.shrunk is None:
            warnings.warn(
                f"memory has run out in a pass over {size} examples at a time; it goes on with {most}.", stacklevel=2
            )
        self.shrunk = max(size, self.shrunk[0] if self.shrunk else 0), most

    def notes(self) -> list[str]:
        """Return what a reader of the scores should know."""
        if self.shrunk is None:
            return []
        size, most = self.shrunk
        return [
            f"memory ran out in passes over {size} examples at a time: they went on with {most}, which changes no score"
        ]
