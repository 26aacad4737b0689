"""What a training run has said about each example so far: dynamics, TracIn, neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_influence.core import distributed
from lightning_influence.core.precision import exact
from lightning_influence.gradients.coverage import listed
from lightning_influence.gradients.visitors import ExampleScores
from lightning_influence.objective.losses import CrossEntropy, LossCall
from lightning_influence.objective.scale import HeardTerms, TermKey
from lightning_influence.objective.tap import calls_in
from lightning_influence.objective.terms import TermForm, placed_calls, steady_terms
from lightning_influence.training import optimizers
from lightning_influence.training.checkpoints import Checkpoint
from lightning_influence.training.dynamics import TrainingDynamics, trained_elements
from lightning_influence.training.flight.pace import Pace
from lightning_influence.training.flight.reliance import Reliance
from lightning_influence.training.loss_graph import History, call_in_graph
from lightning_influence.training.neighbours import NeighbourRecord
from lightning_influence.training.settings import TracIn
from lightning_influence.training.step_sizes import StepSizes
from lightning_influence.training.tracin import Increments, TracInScores, VisitSums

# Batches whose examples wait for being noted as seen.
_FILE_EVERY = 64
# Share of batches with other labels than their examples had, beyond which rows and examples do not belong together.
_MOST_CONTRADICTED = 0.2
# Batches of each later epoch whose graph has to tell what is heard, too, to be relied upon.
_AGREEING_AGAIN = 2


class Recording:
    """Running columns of a training run.

    Args:
        size: Number of examples of the data set.
        module: The model, for the names of its parameters.
        tracin: How TracIn is computed; None for not at all.
    """

    def __init__(self, size: int, module: nn.Module, tracin: TracIn | None = None) -> None:
        self.step_sizes = StepSizes(module)
        self.postponed = -1  # step of a TracIn checkpoint that was left to the final pass
        self._in_flight = tracin is not None and tracin.mode == "step"
        self.pace = Pace() if tracin is None else Pace(tracin.every_n_steps, tracin.overhead)
        # Whether training runs compiled code: what watches its calls would have it compiled anew, perhaps otherwise.
        self.compiled = False
        self.directory = ""  # of the audit; before resuming, of the run before
        # What the checkpoints there stand for, and what none of them does any more or yet.
        self.kept: list[Checkpoint] = []
        self.carried: Checkpoint | None = None
        self.failures: list[str] = []
        self.failed_passes: list[int] = []  # epochs
        self.notes: list[str] = []
        self.wants_tracin = tracin is not None
        self._next_step = 0  # steps before this one are in the sums in flight
        self.data_changes: list[int] = []  # epochs that started with other data
        self.relabelled: set[int] = set()  # other labels when they were fetched again
        self._forget(size)
        self._graph = Reliance()
        self._epoch = -1
        self._history: History | None = None

    def _forget(self, size: int) -> None:
        self.size = size
        self.dynamics = TrainingDynamics(size)
        self.tracin = TracInScores(size)
        self._visits = VisitSums(size) if self._in_flight else None
        self._new_visits: list[tuple[Sequence[int], Increments | None]] = []
        self._passes: list[int] = []  # steps
        self.fewest = 0  # examples that a pass for TracIn has scored
        self.late = 0  # examples that came in a later one
        self._seen = torch.zeros(size, dtype=torch.bool)
        self._unfiled: list[Sequence[int]] = []  # batches that are not in there yet
        self.neighbours = NeighbourRecord(size)
        self.batches = self.ragged_batches = self.untapped_batches = self.skipped_batches = 0
        self.unknown: dict[str, int] = {}  # batches that count for nobody, by reason
        self.heard = HeardTerms()

    def start_again(self, size: int, epoch: int) -> None:
        """Forget what was recorded about other data, which the same indices stood for.

        Args:
            size: Number of examples now.
            epoch: That starts with them.
        """
        checks = self.dynamics.checks_labels
        self._forget(size)
        self.dynamics.checks_labels = checks
        self.relabelled.clear()
        self.data_changes.append(epoch)

    @property
    def failed(self) -> bool:
        """Whether recording has failed, and was given up."""
        return bool(self.failures)

    def listens(self, epoch: int) -> bool:
        """Tell whether the loss calls of the next batch have to be watched.

        That takes longer than all the rest. The graph has to agree at the start of every epoch to be relied upon; a
        batch of which it then tells nothing is lost to the dynamics.

        Args:
            epoch: Of the batch.
        """
        if self.compiled:
            return False
        if epoch != self._epoch:
            self._epoch = epoch
            self._graph.doubted(_AGREEING_AGAIN)
        return self._graph.needs_watching

    def note(self, remark: str) -> None:
        """Keep a remark for the report, once."""
        self.notes += [] if remark in self.notes else [remark]

    def record_unknown(self, reason: str) -> None:
        """Note a batch that counts for nobody."""
        self.unknown[reason] = self.unknown.get(reason, 0) + 1
        self.heard.add(None)  # there is a batch that nothing tells about

    def record_skipped(self, indices: Sequence[int]) -> None:
        """Note a batch without a loss."""
        self._note(indices)
        self.skipped_batches += 1
        self.heard.add(None)

    def record_graph(
        self,
        indices: Sequence[int],
        loss: Tensor,
        forms: Mapping[TermKey, TermForm] | None = None,
        *,
        last: bool = True,
    ) -> bool:
        """File one training batch under its indices by its graph; tell whether that is done.

        Args:
            indices: Of its examples.
            loss: Before the backward pass.
            forms: See ``discover.term_forms``.
            last: Whether there is nothing else to file it by.
        """
        if self.failed:
            return True
        try:
            call = call_in_graph(loss)
            told = call is not None and self._is_still_plain(call, len(indices), forms)
            if not (told or last):
                return False
            self._note(indices)
            if not told or call is None or call.reduction != "mean" or call.class_weights is not None:
                self.heard.add(None)  # else this one is what was heard before, or it would not be relied upon
            if told and call is not None:
                self.dynamics.record_rows(indices, call)
            else:
                self.untapped_batches += 1
                self._graph.failed()
        except Exception as error:  # a statistic must never end a training run
            self.fail("training dynamics are incomplete", error)
        return True

    def record_batch(
        self,
        indices: Sequence[int],
        loss: Tensor,
        calls: Sequence[LossCall],
        forms: Mapping[TermKey, TermForm] | None = None,
        *,
        ragged: bool = False,
    ) -> None:
        """File one training batch under its indices, by the first known call that its loss is made of.

        Args:
            indices: Of its examples.
            loss: Before the backward pass.
            calls: What was heard.
            forms: See ``discover.term_forms``.
            ragged: Whether rows of several lengths lie end to end: only one row for each example is read then.
        """
        if self.failed:
            return
        try:
            n = len(indices)
            self._note(indices)
            placed = placed_calls(calls_in(loss, calls), forms or {})
            self.heard.terms.update(key for key, call, _ in placed if call.rows_match(n))
            self.heard.add(steady_terms(placed, n))
            if (plain := _plain(placed, n)) is not None:
                told = None if self._graph.given_up else call_in_graph(loss)
                agreed = told is not None and _agree(plain, told)
                self._graph.compared(agreed)
                # What is told alike is computed together.
                self.dynamics.record_rows(indices, told if agreed and told is not None else plain)
                return
            self._graph.compared(False)
            if ragged:
                self.ragged_batches += 1
                return
            call = next((call for _, call, _ in placed if call.rows_match(n)), None)
            if call is None:
                self.untapped_batches += 1
                return
            call = trained_elements(loss, call)
            with torch.no_grad():
                self.dynamics.record_call(indices, call)
        except Exception as error:  # a statistic must never end a training run
            self.fail("training dynamics are incomplete", error)

    def record_step(self, optimizer: Any) -> None:
        """Note the learning rates of one optimizer step."""
        known = len(self.step_sizes.unknown)
        try:
            self.step_sizes.record(optimizer)
        except Exception as error:
            self.fail("learning rates are incomplete", error)
        if self.wants_tracin and len(self.step_sizes.unknown) > known:
            warnings.warn(f"InfluenceAudit: {_plain_steps({optimizers.name_of(optimizer)})}", stacklevel=2)

    def first_time(self, step: int) -> bool:
        """Tell whether the sums in flight lack an optimizer step, which is in them from now on."""
        new = step >= self._next_step
        self._next_step = max(self._next_step, step + 1)
        return new

    def record_visit(self, indices: Sequence[int], scores: Increments | None) -> None:
        """File what a batch and its step say in flight; None if the batch was not measured."""
        if self._visits is not None:
            self._new_visits.append((indices, scores))
            if len(self._new_visits) >= _FILE_EVERY:
                self._file_visits()

    def _file_visits(self) -> None:
        """Add the last visits, but for batches whose labels have told that they hold other examples."""
        new, self._new_visits = self._new_visits, []
        self.dynamics.flush()
        wrong = {id(batch) for batch in self.dynamics.contradicted}
        for indices, scores in new:
            if self._visits is not None and id(indices) not in wrong:
                self._visits.add(indices, scores)

    @property
    def visits(self) -> VisitSums | None:
        """TracIn in flight so far, if that is how it is computed."""
        self._file_visits()
        return self._visits

    def fail(self, what: str, error: Exception) -> None:
        """Record nothing more of the training: what is known is incomplete, and says so."""
        reason = f"{what}, recording them failed: {type(error).__name__}: {error}"
        if reason not in self.failures:
            self.failures.append(reason)
            warnings.warn(f"InfluenceAudit: {reason}", stacklevel=3)

    def add_pass(self, step: int, scores: ExampleScores) -> None:
        """Add what one fixed-order pass says: TracIn if it was asked for, and the neighbours' labels.

        A step that was added before (a resumed run) is left alone.
        """
        if "tracin" in scores.columns:
            self.tracin.add(step, scores.indices.tolist(), scores.columns["tracin"])
            count = len(scores.indices)
            self.fewest = min(self.fewest or count, count)
            self.late = max(self.late, count - self.fewest)
        if step in self._passes:
            return
        self._passes.append(step)
        self._compare_labels(scores)
        if scores.features is not None and "label" in scores.columns:
            self.neighbours.add(scores.indices, scores.features, scores.columns["label"])

    def _compare_labels(self, scores: ExampleScores) -> None:
        """Note examples that had another label in training than fetched again: it was not they."""
        self.dynamics.flush()
        if not self.dynamics.checks_labels or "label" not in scores.columns or "label" not in self.dynamics.sums:
            return
        trained, fetched = self.dynamics.sums["label"][scores.indices.cpu()], scores.columns["label"].cpu()
        differs = (trained >= 0) & (fetched >= 0) & (trained != fetched)
        self.relabelled |= set(scores.indices.cpu()[differs].tolist())

    def remarks(self) -> list[str]:
        """Return what a reader of the columns should know."""
        remarks = []
        if self.untapped_batches:
            remarks.append(
                f"{self.untapped_batches} training batches had no known loss call"
                f"{' outside of what is compiled' if self.compiled else ''}: no training dynamics there"
            )
        if self.skipped_batches:
            remarks.append(
                f"{self.skipped_batches} of {self.batches} training batches had no loss or no backward pass: no "
                "training dynamics there"
            )
        if self.unknown:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in self.unknown.items())
            remarks.append(
                f"{sum(self.unknown.values())} of {self.batches} training batches count for nobody, as it is not "
                f"known which examples they hold: {reasons}"
            )
        if self.ragged_batches:
            remarks.append(
                f"{self.ragged_batches} of {self.batches} training batches have no training dynamics: rows of several "
                "lengths lie end to end in them"
            )
        if count := self.dynamics.contradicted_batches:
            remarks.append(
                f"{count} of {self.batches} training batches count for nobody: they had other labels than their "
                "examples had before"
            )
        if self.misplaced:
            remarks.append(
                "so many that the rest may be those of other examples, too (rows that are moved in training alone?): "
                "what training said of each example is left out"
            )
        if self.relabelled:
            remarks.append(
                f"{len(self.relabelled)} examples had another label in training than when they were fetched again; "
                f"their training dynamics may be those of other examples: {listed(sorted(self.relabelled), 10)}"
            )
        if self.late:
            remarks.append(
                f"{self.late} examples were first drawn after a TracIn checkpoint had been taken: their tracin lacks "
                "the steps before"
            )
        if self.data_changes:
            remarks.append(
                f"the training data changed with the epochs {self.data_changes}: the audit is about the last data, and "
                "what training said before then is left out"
            )
        if self.failed_passes:
            remarks.append(
                f"the passes at the ends of the epochs {self.failed_passes} failed: tracin lacks their steps"
            )
        remarks += self.failures + self.notes
        if self.wants_tracin and self.step_sizes.unknown:
            remarks.append(_plain_steps(self.step_sizes.unknown))
        return remarks

    def synchronise(self) -> None:
        """Let every process know what all have seen, so that any of them can write a checkpoint."""
        self._file()
        if distributed.world_size() == 1:
            return
        parts = [self.dynamics.addends(), [] if self.visits is None else self.visits.addends(), [self._seen.double()]]
        totals = iter(distributed.sum_across_processes([*chain.from_iterable(parts)]))
        dynamics, visits, (seen,) = ([*islice(totals, len(part))] for part in parts)
        self.dynamics.take(dynamics)
        if self.visits is not None:
            self.visits.take(visits)
        self._seen = seen > 0

    def _is_still_plain(self, call: CrossEntropy, n: int, forms: Mapping[TermKey, TermForm] | None) -> bool:
        """As ``_is_plain``, without a search where the logits have the history of a batch before."""
        one_each = call.input.shape[:-1] == call.target.shape == (n,)
        if self._history is not None and one_each and self._history.is_of(call.input):
            return True
        plain = all(_is_plain(call, n, form) for form in (forms or {}).values())
        self._history = History.of(call.input) if plain else None
        return plain

    def _note(self, indices: Sequence[int]) -> None:
        self._unfiled.append(indices)
        if len(self._unfiled) >= _FILE_EVERY:
            self._file()

    def _file(self) -> None:
        """Note the examples of the last batches as seen."""
        unfiled, self._unfiled = self._unfiled, []
        self._seen.numpy()[list(chain.from_iterable(unfiled))] = True  # a third of the time of a tensor of indices

    def seen_indices(self) -> list[int]:
        """Return the sorted indices of the examples trained on so far, over all processes."""
        indices: list[int] = self._gathered_seen().nonzero().squeeze(1).tolist()
        return indices

    @property
    def misplaced(self) -> bool:
        """Whether so many batches had other labels that none of them can be trusted."""
        return self.dynamics.contradicted_batches > _MOST_CONTRADICTED * self.batches

    def columns(self, indices: Sequence[int], scores: ExampleScores | None = None) -> dict[str, NDArray[Any]]:
        """Return all columns for the given examples, the final scores included; to be called by every process."""
        self.synchronise()
        return self._columns(indices, scores)

    def local_columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of the examples that this process has seen, without talking to others."""
        self.dynamics.flush()
        self._file()
        return self._columns(self._seen.nonzero().squeeze(1).tolist(), None)

    def _gathered_seen(self) -> Tensor:
        self._file()
        if distributed.world_size() == 1:
            return self._seen
        (count,) = distributed.sum_across_processes([self._seen.int()])
        return count > 0

    def _columns(self, indices: Sequence[int], scores: ExampleScores | None) -> dict[str, NDArray[Any]]:
        dynamics, visits = self.dynamics, self.visits
        if self.misplaced:
            dynamics, visits = TrainingDynamics(self.size), None
        rows = torch.as_tensor(list(indices), dtype=torch.long)
        columns: dict[str, Tensor] = {"index": rows}
        columns |= {name: values[rows] for name, values in dynamics.columns().items()}
        finite = torch.ones(len(rows), dtype=torch.bool)
        if self.tracin.checkpoints:
            columns["tracin"] = self.tracin.values[rows]
            finite &= torch.isfinite(columns["tracin"])
        if visits is not None:
            columns["tracin"] = visits.values()[rows]
            finite &= torch.isfinite(columns["tracin"]) | visits.unmeasured[rows]
        if (disagreement := self.neighbours.disagreement) is not None:
            columns["neighbour_disagreement"] = disagreement[rows]
        if (probabilities := dynamics.mean_probabilities()) is not None:
            # Where a network soon knows wrong labels by heart, its mean prediction stands up for them; its features
            # are slower to forget what the examples look like.
            belief = probabilities[rows] + self.neighbours.votes(probabilities.shape[1])[rows]
            columns["suggested"] = torch.where(columns["suggested"] < 0, -1, belief.nan_to_num().argmax(1))
        if "nonfinite" in dynamics.sums:
            finite &= dynamics.sums["nonfinite"][rows] == 0
        if scores is not None:
            final = {
                name: (exact(values) if values.is_floating_point() else values).cpu()
                for name, values in scores.columns.items()
                if name != "tracin"
            }
            finite &= final.pop("finite")
            columns |= final
            if "suggested" not in columns and "predicted" in columns:
                # No mean over the run was kept (too many classes): the final prediction will have to do.
                columns["suggested"] = columns["predicted"]
        columns["finite"] = finite
        return {name: np.asarray(values) for name, values in columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only: Lightning can't resume from anything else."""
        self._file()
        return {
            "size": self.size,
            "dynamics": self.dynamics.state_dict(),
            "seen": self._seen.clone(),
            "tracin": self.tracin.values.clone(),
            "tracin_steps": list(self.tracin.checkpoints),
            "passes": list(self._passes),
            "visits": {} if (visits := self.visits) is None else visits.state_dict(),
            "pace": self.pace.state_dict(),
            "next_step": self._next_step,
            "heard": self.heard.state_dict(),
            "directory": self.directory,
            "kept": [_described(each) for each in self.kept],
            "carried": None if self.carried is None else _described(self.carried),
            "incomplete": {
                "untapped_batches": self.untapped_batches,
                "batches": self.batches,
                "ragged_batches": self.ragged_batches,
                "fewest": self.fewest,
                "late": self.late,
                "skipped_batches": self.skipped_batches,
                "contradicted_batches": self.dynamics.contradicted_batches,
                "data_changes": list(self.data_changes),
                "relabelled": sorted(self.relabelled),
                "unknown": dict(self.unknown),
                "failures": list(self.failures),
                "failed_passes": list(self.failed_passes),
                "notes": list(self.notes),
            },
            **self.step_sizes.state_dict(),
            "postponed": self.postponed,
            **self.neighbours.state_dict(),
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
        self.dynamics.load_state_dict(state["dynamics"])
        self._seen, self._unfiled = state["seen"].clone(), []
        self._passes = list(state["passes"])
        self._next_step = state.get("next_step", 0)
        self.heard = HeardTerms.of_state(state.get("heard"))
        self.directory = state.get("directory", state.get("checkpoint_directory", ""))
        self.kept = [Checkpoint(parameters={}, **each) for each in state.get("kept", ())]
        carried = state.get("carried")
        self.carried = None if carried is None else Checkpoint(parameters={}, **carried)
        # What the columns lack, they lack after resuming, too.
        lacking = state.get("incomplete", {})
        self.untapped_batches = lacking.get("untapped_batches", 0)
        self.batches = lacking.get("batches", 0)
        self.ragged_batches = lacking.get("ragged_batches", 0)
        self.fewest = lacking.get("fewest", 0)
        self.late = lacking.get("late", 0)
        self.skipped_batches = lacking.get("skipped_batches", 0)
        self.dynamics.contradicted_batches = lacking.get("contradicted_batches", 0)
        self.data_changes = list(lacking.get("data_changes", []))
        self.relabelled = set(lacking.get("relabelled", []))
        self.unknown = dict(lacking.get("unknown", {}))
        self.failures = list(lacking.get("failures", []))
        self.failed_passes = list(lacking.get("failed_passes", []))
        self.notes = list(lacking.get("notes", []))
        self.step_sizes.load_state_dict(state)
        self.neighbours.load_state_dict(state)
        if tracin:
            self.tracin.values = state["tracin"].clone()
            self.tracin.checkpoints = list(state["tracin_steps"])
            if self.visits is not None and state.get("visits"):
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


def _plain(calls: Sequence[tuple[TermKey, LossCall, TermForm | None]], n: int) -> CrossEntropy | None:
    """Return the first of the calls that a loss is made of, if that is a mean of cross-entropies, one per example."""
    if not calls:
        return None
    _, call, form = calls[0]
    plain = type(call) is CrossEntropy and call.reduction != "none" and _is_plain(call, n, form)
    return call if plain and isinstance(call, CrossEntropy) else None


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
