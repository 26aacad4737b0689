"""What a training run has said about each example so far: dynamics, TracIn, neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_influence.gradients.example_scores import ExampleScores
from lightning_influence.objective.losses import CrossEntropy, LossCall
from lightning_influence.objective.scale import HeardTerms, TermKey
from lightning_influence.objective.tap import calls_in
from lightning_influence.objective.terms import TermForm, placed_calls, steady_terms
from lightning_influence.training import optimizers
from lightning_influence.training.batch_record import BatchRecord
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.dynamics import TrainingDynamics
from lightning_influence.training.example_sums import ExampleSums, share
from lightning_influence.training.flight.pace import Pace
from lightning_influence.training.gaps import Gaps
from lightning_influence.training.loss_graph import LossGraph, call_in_graph, trained_elements
from lightning_influence.training.neighbours import NeighbourRecord
from lightning_influence.training.settings import TracIn
from lightning_influence.training.step_sizes import StepSizes
from lightning_influence.training.table import table
from lightning_influence.training.tracin import TracInScores, VisitSums

# Batches that wait for being added up.
_FILE_EVERY = 64

_Forms = Mapping[TermKey, TermForm]


class Recording:
    """Hands every batch, step and pass of a run to those who keep something of it.

    Args:
        size: Number of examples of the data set.
        module: The model, for the names of its parameters.
        tracin: How TracIn is computed; None for not at all.

    Attributes:
        step_sizes: Learning rates that were really used.
        pace: Which batches are measured in flight.
        gaps: What the columns lack.
        dynamics: What the losses have said.
        tracin: TracIn from passes.
        visits: TracIn in flight, if that is how it is computed.
        neighbours: What the features of passes have said.
        heard: What the losses have told of their scale.
        compiled: Whether training runs compiled code: what watches its calls would have it compiled anew, perhaps
            otherwise.
        directory: Of the audit; before resuming, of the run before.
        kept: What the checkpoints there stand for.
        carried: What none of them stands for any more or yet.
        postponed: Step of a TracIn checkpoint that was left to the final pass.
        notes: Remarks for the report.
    """

    def __init__(self, size: int, module: nn.Module, tracin: TracIn | None = None) -> None:
        self.step_sizes = StepSizes(module)
        self.wants_tracin = tracin is not None
        self._in_flight = tracin is not None and tracin.mode == "step"
        self.pace = Pace() if tracin is None else Pace(tracin.every_n_steps, tracin.overhead)
        self.gaps = Gaps()
        self.notes: list[str] = []
        self.compiled = False
        self.directory = ""
        self.kept: list[Checkpoint] = []
        self.carried: Checkpoint | None = None
        self.postponed = -1
        self._graph = LossGraph()
        self._forget(size)

    def _forget(self, size: int) -> None:
        self.size = size
        self.dynamics = TrainingDynamics(size)
        self.tracin = TracInScores(size)
        self.visits = VisitSums(size) if self._in_flight else None
        self.neighbours = NeighbourRecord(size)
        self.heard = HeardTerms()
        self._passes: list[int] = []  # steps
        self._seen = ExampleSums(size, "seen")
        self._unfiled: list[BatchRecord] = []

    def start_again(self, size: int, epoch: int) -> None:
        """Forget what was recorded about other data, which the same indices stood for.

        Args:
            size: Number of examples now.
            epoch: That starts with them.
        """
        checks = self.dynamics.checks_labels
        self._forget(size)
        self.dynamics.checks_labels = checks
        self.gaps = self.gaps.start_again(epoch)

    # ---------------------------------------------------------------- batches

    @property
    def failed(self) -> bool:
        """Whether recording has failed, and was given up."""
        return bool(self.gaps.failures)

    def fail(self, what: str, error: Exception) -> None:
        """Record nothing more of the training: what is known is incomplete, and says so."""
        reason = f"{what}, recording them failed: {type(error).__name__}: {error}"
        if reason not in self.gaps.failures:
            self.gaps.failures.append(reason)
            warnings.warn(f"InfluenceAudit: {reason}", stacklevel=3)

    def note(self, remark: str) -> None:
        """Keep a remark for the report, once."""
        self.notes += [] if remark in self.notes else [remark]

    def listens(self, epoch: int) -> bool:
        """Tell whether the loss calls of the next batch have to be heard.

        Args:
            epoch: Of the batch.
        """
        return not self.compiled and self._graph.needs_listening(epoch)

    def record_unknown(self, batch: BatchRecord) -> None:
        """Note a batch that counts for nobody."""
        self.gaps.unknown[batch.reason] = self.gaps.unknown.get(batch.reason, 0) + 1
        self.heard.add(None)  # there is a batch that nothing tells about

    def record_skipped(self, batch: BatchRecord) -> None:
        """Note a batch without a loss."""
        self._note(batch)
        self.gaps.skipped += 1
        self.heard.add(None)

    def record_batch(
        self, batch: BatchRecord, loss: Tensor, calls: Sequence[LossCall] | None, forms: _Forms | None = None
    ) -> None:
        """File one training batch.

        Args:
            batch: The batch.
            loss: Before the backward pass.
            calls: What was heard; None if nothing has listened: then its graph tells.
            forms: See ``discover.term_forms``.
        """
        if self.failed:
            return
        try:
            self._note(batch)
            with torch.no_grad():
                if calls is None:
                    self._record_graph(batch, loss, forms or {})
                else:
                    self._record_calls(batch, loss, calls, forms or {})
        except Exception as error:  # a statistic must never end a training run
            self.fail("training dynamics are incomplete", error)

    def _record_graph(self, batch: BatchRecord, loss: Tensor, forms: _Forms) -> None:
        n, call = len(batch.indices or ()), call_in_graph(loss)
        if call is None or not all(_is_plain(call, n, form) for form in forms.values() or (None,)):
            self.gaps.untapped += 1
            self.heard.add(None)
            self._graph.failed()
            return
        if call.reduction != "mean" or call.class_weights is not None:
            self.heard.add(None)  # else this one is what was heard before, or it would not be relied upon
        self.dynamics.record_rows(batch, call)

    def _record_calls(self, batch: BatchRecord, loss: Tensor, calls: Sequence[LossCall], forms: _Forms) -> None:
        """File a batch by the first known call that its loss is made of."""
        n = len(batch.indices or ())
        placed = placed_calls(calls_in(loss, calls), forms)
        self.heard.terms.update(key for key, call, _ in placed if call.rows_match(n))
        self.heard.add(steady_terms(placed, n))
        _, first, form = placed[0] if placed else (None, None, None)
        if isinstance(first, CrossEntropy) and first.reduction != "none" and _is_plain(first, n, form):
            told = None if self._graph.given_up else call_in_graph(loss)
            agreed = told is not None and _agree(first, told)
            self._graph.compared(agreed)
            # What is told alike is computed together.
            self.dynamics.record_rows(batch, told if agreed and told is not None else first)
            return
        self._graph.compared(False)
        call = next((call for _, call, _ in placed if call.rows_match(n)), None)
        if batch.ragged:  # only one row for each example is read then
            self.gaps.ragged += 1
        elif call is None:
            self.gaps.untapped += 1
        else:
            self.dynamics.record(batch, trained_elements(loss, call).statistics(n))

    def record_step(self, optimizer: Any) -> None:
        """Note the learning rates of one optimizer step."""
        known = len(self.step_sizes.unknown)
        try:
            self.step_sizes.record(optimizer)
        except Exception as error:
            self.fail("learning rates are incomplete", error)
        if self.wants_tracin and len(self.step_sizes.unknown) > known:
            warnings.warn(f"InfluenceAudit: {_plain_steps({optimizers.name_of(optimizer)})}", stacklevel=2)

    def _note(self, batch: BatchRecord) -> None:
        self._unfiled.append(batch)
        if len(self._unfiled) >= _FILE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Add up all that waits."""
        unfiled, self._unfiled = self._unfiled, []
        rows = torch.from_numpy(np.fromiter(chain.from_iterable(batch.indices or () for batch in unfiled), np.int64))
        self._seen.add("seen", rows, torch.ones(len(rows), dtype=torch.float64))
        self.dynamics.flush()
        self.gaps.contradicted = self.dynamics.contradicted_batches
        if self.visits is not None:
            self.visits.flush()  # once the labels have told which batches hold other examples

    # ----------------------------------------------------------------- passes

    def add_pass(self, step: int, scores: ExampleScores) -> None:
        """Add what one fixed-order pass says: TracIn if it was asked for, and the neighbours' labels.

        A step that was added before (a resumed run) is left alone.
        """
        columns = scores.columns
        if "tracin" in columns:
            self.tracin.add(step, scores.indices.tolist(), columns["tracin"])
        if step in self._passes or "label" not in columns:
            return
        self._passes.append(step)
        self.flush()
        if self.dynamics.checks_labels and "label" in self.dynamics.sums:
            # Another label in training than fetched again: it was not they.
            indices, fetched = scores.indices.cpu(), columns["label"].cpu()
            trained = self.dynamics.sums["label"][indices]
            differs = (trained >= 0) & (fetched >= 0) & (trained != fetched)
            self.gaps.relabel(indices[differs].tolist())
        if scores.features is not None:
            self.neighbours.add(scores.indices, scores.features, columns["label"])

    # ---------------------------------------------------------------- results

    def remarks(self) -> list[str]:
        """Return what a reader of the columns should know."""
        unknown = self.step_sizes.unknown if self.wants_tracin else ()
        plain = [_plain_steps(unknown)] if unknown else []
        return self.gaps.remarks(compiled=self.compiled, late=self.tracin.late) + self.notes + plain

    def synchronise(self) -> None:
        """Let every process know what all have seen, so that any of them can write a checkpoint."""
        self.flush()
        share([self.dynamics.sums, self._seen, *([] if self.visits is None else [self.visits.sums])])

    def seen_indices(self) -> list[int]:
        """Return the sorted indices of the examples trained on, by all processes until they last synchronised."""
        self.flush()
        indices: list[int] = self._seen["seen"].nonzero().squeeze(1).tolist()
        return indices

    def columns(self, indices: Sequence[int], scores: ExampleScores | None = None) -> dict[str, NDArray[Any]]:
        """Return all columns for the given examples, of what was synchronised; see ``table``."""
        self.flush()
        dynamics, visits = self.dynamics, self.visits
        if self.gaps.misplaced:
            dynamics, visits = TrainingDynamics(self.size), None
        return table(indices, dynamics, self.tracin, visits, self.neighbours, scores)

    def local_columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of the examples that this process has seen, without talking to others."""
        return self.columns(self.seen_indices())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only: Lightning can't resume from anything else."""
        self.flush()
        return {
            "size": self.size,
            "dynamics": self.dynamics.state_dict(),
            "seen": self._seen.state_dict(),
            "tracin": self.tracin.state_dict(),
            "visits": {} if self.visits is None else self.visits.state_dict(),
            "pace": self.pace.state_dict(),
            "neighbours": self.neighbours.state_dict(),
            "step_sizes": self.step_sizes.state_dict(),
            "passes": list(self._passes),
            "heard": self.heard.state_dict(),
            "directory": self.directory,
            "kept": [_described(each) for each in self.kept],
            "carried": [] if self.carried is None else [_described(self.carried)],
            "postponed": self.postponed,
            "gaps": asdict(self.gaps),
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, tracin: bool = True) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of the recording then.
            tracin: Whether TracIn was recorded as it will be from now on; else it starts anew.

        Raises:
            ValueError: If it was written for a data set of another size.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"the checkpoint was written for {state['size']} training examples, the data set has {self.size}. "
                "Resume with the same training data, or start a new run."
            )
        self._forget(self.size)
        self.gaps, self.notes = Gaps(**state["gaps"]), list(state["notes"])
        self.dynamics.load_state_dict(state["dynamics"])
        self.dynamics.contradicted_batches = self.gaps.contradicted
        self._seen.load_state_dict(state["seen"])
        self.neighbours.load_state_dict(state["neighbours"])
        self.step_sizes.load_state_dict(state["step_sizes"])
        self._passes = list(state["passes"])
        self.heard = HeardTerms.of_state(state["heard"])
        self.directory = state["directory"]
        self.kept = [Checkpoint(parameters={}, **each) for each in state["kept"]]
        self.carried = next((Checkpoint(parameters={}, **each) for each in state["carried"]), None)
        if tracin:
            self.tracin.load_state_dict(state["tracin"])
            if self.visits is not None and state["visits"]:
                self.visits.load_state_dict(state["visits"])
                self.pace.load_state_dict(state["pace"])
            self.postponed = state["postponed"]
        elif steps := self.step_sizes.steps:
            # Kept checkpoints still have to stand for them.
            waiting = Checkpoint(0, {}, step_sizes=self.step_sizes.take(), steps=steps)
            self.carried = waiting if self.carried is None else waiting.standing_for(self.carried)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint stands for, in primitives."""
    return {
        "step": checkpoint.step,
        "steps": checkpoint.steps,
        "step_sizes": dict(checkpoint.step_sizes),
        "optimizer": checkpoint.optimizer,
    }


def _is_plain(call: CrossEntropy, n: int, form: TermForm | None) -> bool:
    """Tell whether a cross-entropy has one row for each of ``n`` examples, in their order."""
    return n > 0 and (form is None or (form.layout is not None and form.layout.dim == 0)) and call.single_rows(n)


def _agree(heard: CrossEntropy, told: CrossEntropy) -> bool:
    """Tell whether the graph tells of the very call that was heard."""
    same = told.target.data_ptr() == heard.target.data_ptr()
    return same and told.input.shape == heard.input.shape and told.ignore_index == heard.ignore_index


def _plain_steps(names: Collection[str]) -> str:
    return (
        f"it is not known how {', '.join(sorted(names))} turns gradients into steps: TracIn takes them for plain "
        "gradient steps with its learning rate"
    )
