"""What the columns of a run lack, and what a reader has to know of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_influence.gradients.coverage import listed

# Share of batches with other labels than their examples had, beyond which rows and examples do not belong together.
_MOST_CONTRADICTED = 0.2


@dataclass
class Gaps:
    """Counts and lists in primitives, so that checkpoints hold them: what columns lack, they lack after resuming, too.

    Attributes:
        batches: Number of training batches.
        untapped: Those without a known loss call.
        mixed: Those from the first on whose step has mixed examples, where ``task=`` says what is audited.
        skipped: Those without a loss or a backward pass.
        ragged: Those whose rows of several lengths lie end to end.
        contradicted: Those whose examples had other labels before.
        unknown: Those of which it is not known which examples they hold, by reason.
        relabelled: Examples that had other labels when they were fetched again.
        data_changes: Epochs that started with other data.
        failed_passes: Epochs at whose ends a pass failed.
        failures: Why recording was given up.
    """

    batches: int = 0
    untapped: int = 0
    mixed: int = 0
    skipped: int = 0
    ragged: int = 0
    contradicted: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    relabelled: list[int] = field(default_factory=list)
    data_changes: list[int] = field(default_factory=list)
    failed_passes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def misplaced(self) -> bool:
        """Whether so many batches had other labels that none of them can be trusted."""
        return self.contradicted > _MOST_CONTRADICTED * self.batches

    def silent(self, *, mixed: bool, ragged: bool) -> None:
        """Count a batch that has told nothing of its examples."""
        if mixed or self.mixed:
            self.mixed += 1
        elif ragged:
            self.ragged += 1
        else:
            self.untapped += 1

    def start_again(self, epoch: int) -> None:
        """Forget what was about other data than those from an epoch on."""
        kept = {"failed_passes": self.failed_passes, "failures": self.failures}
        self.load_state_dict({**asdict(Gaps()), **kept, "data_changes": [*self.data_changes, epoch]})

    def relabel(self, indices: Collection[int]) -> None:
        """Note examples that had other labels."""
        self.relabelled = sorted({*self.relabelled, *indices})

    def remarks(self, *, compiled: bool, late: int) -> list[str]:
        """Return them as sentences.

        Args:
            compiled: Whether training runs compiled code, in which nothing is heard.
            late: Number of examples that came in a later TracIn checkpoint than the first.
        """
        unknown = "; ".join(f"{reason} ({count})" for reason, count in self.unknown.items())
        found = {
            f"{self.untapped} training batches had no known loss call"
            f"{' outside of what is compiled' if compiled else ''}: no training dynamics there": self.untapped,
            "training mixes the labels of examples (mixup, CutMix), and what it says is of no example alone: no "
            "training dynamics": self.mixed,
            f"{self.skipped} of {self.batches} training batches had no loss or no backward pass: no training dynamics "
            "there": self.skipped,
            f"{sum(self.unknown.values())} of {self.batches} training batches count for nobody, as it is not known "
            f"which examples they hold: {unknown}": self.unknown,
            f"{self.ragged} of {self.batches} training batches have no training dynamics: rows of several lengths lie "
            "end to end in them": self.ragged,
            f"{self.contradicted} of {self.batches} training batches count for nobody: they had other labels than "
            "their examples had before": self.contradicted,
            "so many that the rest may be those of other examples, too (rows that are moved in training alone?): what "
            "training said of each example is left out": self.misplaced,
            f"{len(self.relabelled)} examples had another label in training than when they were fetched again; their "
            f"training dynamics may be those of other examples: {listed(self.relabelled, 10)}": self.relabelled,
            f"{late} examples were first drawn after a TracIn checkpoint had been taken: their tracin lacks the steps "
            "before": late,
            f"the training data changed with the epochs {self.data_changes}: the audit is about the last data, and "
            "what training said before then is left out": self.data_changes,
            f"the passes at the ends of the epochs {self.failed_passes} failed: tracin lacks their "
            "steps": self.failed_passes,
        }
        return [sentence for sentence, told in found.items() if told] + self.failures

    def state_dict(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in asdict(Gaps(**state)).items():
            setattr(self, name, value)
