"""When the graph of a batch can be relied upon to tell what its calls did."""

from __future__ import annotations


class Reliance:
    """When the graph of a batch can be relied upon to tell what its calls did: then nothing has to watch them.

    To watch takes much longer than to read the graph. Once that has told of some batches in a row what was heard, it is
    relied upon; if it then fails to, or keeps disagreeing, it is not any more.
    """

    AGREEING = 16
    DISAGREEING = 64

    def __init__(self) -> None:
        self._agreed = 0
        self._disagreed = 0
        self._given_up = False

    @property
    def needs_watching(self) -> bool:
        """Whether the calls of the next batch have to be watched."""
        return self._given_up or self._agreed < self.AGREEING

    @property
    def given_up(self) -> bool:
        """Whether it is no use to compare any more."""
        return self._given_up

    def compared(self, agrees: bool) -> None:
        """Note whether the graph told what was heard."""
        self._agreed = self._agreed + 1 if agrees else 0
        self._disagreed += not agrees
        self._given_up = self._given_up or self._disagreed >= self.DISAGREEING

    def failed(self) -> None:
        """Note that the graph was relied upon, and told nothing."""
        self._given_up = True

    def doubted(self, batches: int) -> None:
        """Ask for so many more batches that agree."""
        self._agreed = min(self._agreed, self.AGREEING - batches)
