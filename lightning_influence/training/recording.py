"""What a training run has said about each example so far: dynamics, TracIn, neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_influence.core.indices import Indices
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.objective.losses import LossCall
from lightning_influence.objective.scale import TermKey
from lightning_influence.objective.terms import TermForm
from lightning_influence.training import optimizers
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.curves import CurveRecord
from lightning_influence.training.dynamics import TrainingDynamics
from lightning_influence.training.evidence import LabelEvidence
from lightning_influence.training.example_sums import ExampleSums, share
from lightning_influence.training.flight.pace import Pace
from lightning_influence.training.gaps import Gaps
from lightning_influence.training.heard_losses import HeardLosses
from lightning_influence.training.label_record import LabelRecord
from lightning_influence.training.pass_schedule import PassSchedule
from lightning_influence.training.settings import TracIn
from lightning_influence.training.step_sizes import StepSizes
from lightning_influence.training.table import table
from lightning_influence.training.tracin import TracInScores, VisitSums

# Batches that wait for being added up.
_FILE_EVERY = 64
# What starts anew where TracIn was recorded otherwise.
_OF_TRACIN = ("tracin", "visits", "pace", "schedule")
# What has a row for each example.
_BY_EXAMPLE = {"curves", "dynamics", "seen", "tracin", "labels", "visits"}


class Recording:
    """Hands every batch, step and pass of a run to those who keep something of it.

    Args:
        size: Number of examples of the data set.
        module: The model, for the names of its parameters.
        tracin: How TracIn is computed; None for not at all.

    Attributes:
        stream: The training data, if their examples are numbered in the order in which they come.
        losses: What the batches' losses are made of.
        dynamics: What they have said of the examples.
        step_sizes: Learning rates that were really used.
        tracin: TracIn from passes.
        visits: TracIn in flight, if that is how it is computed.
        pace: Which batches are measured for it.
        schedule: Ends of epochs with a pass, if time decides.
        labels: What the features of passes have said of the labels.
        gaps: What the columns lack.
        notes: Remarks for the report.
        directory: Of the audit; before resuming, of the run before.
        kept, carried: What the checkpoints there stand for, and what none of them does any more or yet.
        postponed: Step of a checkpoint left to the final pass.
    """

    def __init__(self, size: int, module: nn.Module, tracin: TracIn | None = None) -> None:
        self.stream: StreamSource | None = None
        self.losses, self.step_sizes = HeardLosses(), StepSizes(module)
        self.wants_tracin = tracin is not None
        in_flight = tracin if tracin is not None and tracin.mode == "step" else None
        self._in_flight = in_flight is not None
        self.pace = Pace() if in_flight is None else Pace(in_flight.every_n_steps, in_flight.overhead)
        self.schedule, self.gaps, self.notes = PassSchedule(tracin), Gaps(), list[str]()
        self.directory, self.postponed = "", -1
        self.kept: list[Checkpoint] = []
        self.carried: Checkpoint | None = None
        self._start(size)

    def _start(self, size: int) -> None:
        self.size = size
        self.dynamics, self.curves = _no_dynamics(size)
        self.tracin = TracInScores(size)
        self.visits = VisitSums(size) if self._in_flight else None
        self.labels = LabelRecord(size)
        self._passes: list[int] = []  # steps
        self._seen = ExampleSums(size, "seen", whole=("seen",))
        self._unfiled: list[BatchRecord] = []

    def start_again(self, size: int, epoch: int) -> None:
        """Forget what was recorded about other data, which the same indices stood for.

        Args:
            size: Number of examples now.
            epoch: That starts with them.
        """
        checks = self.dynamics.checks_labels
        self._start(size)
        self.dynamics.checks_labels, self.curves.epoch = checks, epoch
        self.losses.start_again()
        self.gaps.start_again(epoch)

    # ---------------------------------------------------------------- batches

    def fail(self, what: str, error: Exception) -> None:
        """Record nothing more of the training: what is known is incomplete, and says so."""
        if (reason := f"{what}, recording them failed: {type(error).__name__}: {error}") not in self.gaps.failures:
            self.gaps.failures.append(reason)
            warnings.warn(f"InfluenceAudit: {reason}", stacklevel=3)

    def note(self, remark: str) -> None:
        """Keep a remark for the report, once."""
        self.notes += [] if remark in self.notes else [remark]

    def record_lost(self, batch: BatchRecord) -> None:
        """Note a batch whose examples are not known, or that had no loss."""
        if batch.indices is None:
            self.gaps.unknown[batch.reason] = self.gaps.unknown.get(batch.reason, 0) + 1
        else:
            self._note(batch)
            self.gaps.skipped += 1
        self.losses.terms.add(None)  # there is a batch that nothing tells about

    def record_batch(
        self,
        batch: BatchRecord,
        loss: Tensor,
        calls: Sequence[LossCall] | None,
        forms: Mapping[TermKey, TermForm] | None = None,
    ) -> None:
        """File one training batch; the arguments are those of ``HeardLosses.read``."""
        try:
            self._note(batch)
            if self.gaps.failures:
                return
            call = self.losses.read(batch, loss, calls, forms or {})
            if self.losses.mixed and not self.gaps.mixed:  # not every such batch can be told from others
                (self.dynamics, self.curves), self.gaps.contradicted = _no_dynamics(self.size), 0
            if call is not None and not self.gaps.mixed:
                self.dynamics.record_call(batch, call)
            else:
                self.gaps.silent(mixed=self.losses.mixed, ragged=batch.ragged and calls is not None)
        except Exception as error:  # a statistic must never end a training run
            self.fail("training dynamics are incomplete", error)

    def record_step(self, optimizer: Any, times: int = 1) -> None:
        """Note the learning rates of one optimizer step, or of several that are alike."""
        known = len(self.step_sizes.unknown)
        try:
            self.step_sizes.record(optimizer, times)
        except Exception as error:
            self.fail("learning rates are incomplete", error)
        if self.wants_tracin and len(self.step_sizes.unknown) > known:
            warnings.warn(f"InfluenceAudit: {_plain_steps({optimizers.name_of(optimizer)})}", stacklevel=2)

    def _note(self, batch: BatchRecord) -> None:
        self.size = _room_for(batch, self.size, self._parts)
        self._unfiled.append(batch)
        if len(self._unfiled) >= _FILE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Add up all that waits."""
        unfiled, self._unfiled = self._unfiled, []
        rows = torch.from_numpy(np.fromiter(chain.from_iterable(batch.indices or () for batch in unfiled), np.int64))
        self._seen.add("seen", rows, torch.ones(len(rows)))
        try:
            self.dynamics.flush()
            self.gaps.contradicted = self.dynamics.contradicted_batches
            if self.visits is not None:
                self.visits.flush()  # once the labels have told which batches hold other examples
        except Exception as error:  # a statistic must never end a training run
            self.fail("training dynamics are incomplete", error)

    # ----------------------------------------------------------------- passes

    def add_pass(self, step: int, scores: ExampleScores) -> None:
        """Add what one fixed-order pass says, TracIn and the neighbours' labels; of a step once (a resumed run)."""
        columns = scores.columns
        if "tracin" in columns:
            self.tracin.add(step, scores.indices.tolist(), columns["tracin"])
        if step in self._passes or "label" not in columns:
            return
        self._passes.append(step)
        self.postponed = -1
        self.flush()
        self.gaps.relabel(self.dynamics.relabelled(scores.indices.cpu(), columns["label"].cpu()))
        self.add_snapshot(scores)

    def add_snapshot(self, scores: ExampleScores) -> None:
        """Add what the features of the moment say about the labels."""
        self.flush()
        self.labels.add(scores, trained=bool(self._seen["seen"].any()), right=self.dynamics.predicted_rightly())

    # ---------------------------------------------------------------- results

    def remarks(self) -> list[str]:
        """Return what a reader of the columns should know."""
        unknown = self.step_sizes.unknown if self.wants_tracin else ()
        plain = [_plain_steps(unknown)] if unknown else []
        return self.gaps.remarks(compiled=self.losses.compiled, late=self.tracin.late) + self.notes + plain

    def synchronise(self) -> None:
        """Let every process know what all have seen, so that any of them can write a checkpoint."""
        self.flush()
        share([self.dynamics.sums, self._seen, *([] if self.visits is None else [self.visits.sums])])
        self.dynamics.probabilities.share()

    def seen_indices(self) -> list[int]:
        """Return the sorted indices of the examples trained on, by all processes until they last synchronised."""
        self.flush()
        indices: list[int] = self._seen["seen"].nonzero().squeeze(1).tolist()
        return indices

    def columns(
        self, indices: Indices, scores: ExampleScores | None = None, evidence: LabelEvidence | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return all columns for the given examples, of what was synchronised; see ``table``."""
        self.flush()
        known = not self.gaps.misplaced
        dynamics, visits = (self.dynamics, self.visits) if known else (TrainingDynamics(self.size), None)
        return table(indices, dynamics, self.tracin, visits, self.labels.neighbours, evidence, scores)

    def label_evidence(self, indices: Indices) -> LabelEvidence | None:
        """Return what is known of the labels of the given examples without them, of what was synchronised."""
        return None if self.gaps.misplaced else self.labels.about(indices, self.dynamics.mean_probabilities)

    def local_columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of the examples that this process has seen, without talking to others."""
        return self.columns(seen := self.seen_indices(), evidence=self.label_evidence(seen))

    # ------------------------------------------------------------------ state

    def _parts(self) -> dict[str, Any]:
        """Return those who keep something, each with a state of its own."""
        return {
            "losses": self.losses,
            "dynamics": self.dynamics,
            "curves": self.curves,  # once the dynamics are there
            "seen": self._seen,
            "step_sizes": self.step_sizes,
            "tracin": self.tracin,
            "pace": self.pace,
            "schedule": self.schedule,
            "labels": self.labels,
            "gaps": self.gaps,
            **({} if self.visits is None else {"visits": self.visits}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only: Lightning can't resume from anything else."""
        self.flush()
        return {
            "size": self.size,
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
            "passes": list(self._passes),
            "notes": list(self.notes),
            "directory": self.directory,
            "kept": [each.described() for each in self.kept],
            "carried": [] if self.carried is None else [self.carried.described()],
            "postponed": self.postponed,
            **({} if self.stream is None else {"stream": self.stream.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, tracin: bool = True) -> None:
        """Go on from a checkpoint; without ``tracin``, which was recorded otherwise, that starts anew.

        Raises:
            ValueError: If it was written for a data set of another size.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"the checkpoint was written for {state['size']} training examples, the data set has {self.size}. "
                "Resume with the same training data, or start a new run."
            )
        self._start(self.size)
        kept = {"curves": {}, **state["parts"]}  # an earlier version has none
        for name, part in self._parts().items():
            if name in kept and (tracin or name not in _OF_TRACIN):
                part.load_state_dict(kept[name])
        self.dynamics.contradicted_batches = self.gaps.contradicted
        self._passes, self.notes, self.directory = list(state["passes"]), list(state["notes"]), state["directory"]
        self.kept = [Checkpoint(parameters={}, **each) for each in state["kept"]]
        self.carried = next((Checkpoint(parameters={}, **each) for each in state["carried"]), None)
        if tracin:
            self.postponed = state["postponed"]
        elif steps := self.step_sizes.steps:
            # Kept checkpoints still have to stand for them.
            waiting = Checkpoint(0, {}, step_sizes=self.step_sizes.take(), steps=steps)
            self.carried = waiting if self.carried is None else waiting.standing_for(self.carried)


def _no_dynamics(size: int) -> tuple[TrainingDynamics, CurveRecord]:
    dynamics = TrainingDynamics(size)
    return dynamics, CurveRecord(dynamics)


def _room_for(batch: BatchRecord, size: int, parts: Callable[[], dict[str, Any]]) -> int:
    """Let parts grow if a batch, of a stream, holds examples beyond their size; return it."""
    needed = 1 + max(batch.indices or (), default=-1)
    if needed > size:
        size, found = needed + needed // 8 + 256, parts()
        for name in _BY_EXAMPLE & found.keys():
            found[name].grow(size)
    return size


def _plain_steps(names: Collection[str]) -> str:
    return (
        f"it is not known how {', '.join(sorted(names))} turns gradients into steps: TracIn takes them for plain "
        "gradient steps with its learning rate"
    )
