"""What an audit takes beside its training: told before, timed during the first epoch, and kept within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.arguments import Arguments
from lightning_influence.callbacks.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_influence.callbacks.listening import BatchListener
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.callbacks.showing import SHARE
from lightning_influence.callbacks.training_passes import TrainingPasses
from lightning_influence.core import distributed
from lightning_influence.core.containers import leaves
from lightning_influence.core.durations import readable_seconds
from lightning_influence.core.meeting import together
from lightning_influence.core.memory import readable
from lightning_influence.core.precision import wait_for
from lightning_influence.curvature.registry import fitted_bytes
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.verify import Inspection
from lightning_influence.influence import Influence
from lightning_influence.scores.plan import InfluencePlan
from lightning_influence.training.features import look_at_labels
from lightning_influence.training.recording import Recording

# Looks at features that a belief about labels takes: before training and after each of the first epochs. Where training
# learns the labels slowly, there are more, after 4, 8, 16, ... epochs.
_LOOKS = 4
# Of a look, forward only, the time of a pass with per-example gradients (measured: 1.7 to 2.3 on a CPU).
_PASS = 2.5
# Seconds for files, pictures and the page at the end (measured on a CPU): in any case, and of an example.
_WRITTEN = 0.5, 3e-5
# Multiply-adds of a training so small that timing it would tell of the machine alone: a second at most.
_TINY = 10**9
# Examples of a pass that is made to be timed.
_TRIED = 1024


class RunBudget:
    """Times training and passes, and says when passes for TracIn are due.

    Args:
        listener: Hears the batches; the ``schedule`` of its recording is to be decided.
        passes: Extra passes over the training data.
        inspection: What one batch showed before the first step.
        arguments: Those of the callback.
        reporter: Says what comes of it.
    """

    def __init__(
        self,
        listener: BatchListener,
        passes: TrainingPasses,
        inspection: Inspection,
        arguments: Arguments,
        reporter: Reporter,
    ) -> None:
        self._listener, self._passes, self._inspection = listener, passes, inspection
        self._arguments, self._reporter = arguments, reporter
        # Seconds, once timed: of an example in a pass with gradients and in one without, of a whole look, and so far.
        self._pass: float | None = None
        self._forward: float | None = None
        self._look = self._prepared = 0.0
        # Of an epoch: ends of its first batch, which warms up, and its last one, how many were heard, the last place.
        self._first = self._last = 0.0
        self._batches, self._place = 0, -1
        # Between these: when validation began, how long it took since the last batch, what recording has taken.
        self._validates = self._validated = 0.0
        self._before = self._recorded = 0.0

    @property
    def _recording(self) -> Recording:
        return self._listener.recording

    # ----------------------------------------------------------------- timing

    def batch_ended(self, trainer: Trainer, number: int) -> None:
        """Note when a batch of the first epoch has ended, and its place there."""
        if self._recording.schedule.decided:
            return
        self._batches = 0 if number <= self._place else self._batches  # another epoch
        if not self._batches or number + 1 == trainer.num_training_batches:
            wait_for(trainer.strategy.root_device)
        self._last, self._place = time.perf_counter(), number
        self._first = self._first + self._validated if self._batches else self._last
        self._before = self._before if self._batches else self._listener.paused
        self._recorded, self._validated = self._listener.paused - self._before, 0.0
        self._batches += 1

    def validation(self, *, begins: bool) -> None:
        """Note when validation begins and ends, maybe within an epoch: that is no training."""
        if begins:
            self._validates = time.perf_counter()
        else:
            self._validated += time.perf_counter() - self._validates

    def prepared(self, seconds: float) -> None:
        """Note how long the preparation has taken."""
        self._prepared = seconds

    def went_over(self, seconds: float, examples: int) -> None:
        """Note how long a forward pass has taken."""
        if examples:
            self._forward = seconds / examples

    def looked(self, seconds: float) -> None:
        """Note how long a look at the labels has taken, with what was concluded from it."""
        self._look = seconds

    def passed(self, seconds: float, examples: int) -> None:
        """Note how long a pass with gradients has taken."""
        self._pass = seconds / examples

    @property
    def _seconds_per_example(self) -> float:
        """Of a pass with gradients."""
        if self._forward is None:  # of a stream; cold, and a batch of its own: too long rather than too short
            return self._pass or self._inspection.seconds / self._inspection.examples
        return self._pass or _PASS * self._forward

    def _of_final_audit(self, plan: InfluencePlan, coverage: Coverage, examples: int, queries: int) -> float:
        """Return a guess of its seconds, from numbers of training and of validation examples."""
        work = plan.gradient_passes(coverage, examples, queries, self._inspection.exact_draws or 1)
        return work * self._seconds_per_example + plan.decomposition_seconds(coverage)

    def _examples(self, trainer: Trainer) -> list[int]:
        """Return those of passes while training goes on."""
        recording, source = self._recording, self._passes.source
        return bridge.audited_indices(trainer, self._arguments.loader, recording.seen_indices(), source, last=False)

    def _always(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> float:
        """Return a guess of the seconds of all but the passes for TracIn and what is recorded and shown meanwhile."""
        gradients, n = self._passes.gradients(trainer, module), len(indices)
        plan = Influence.of(gradients, self._inspection, indices).plan(**self._arguments.fitting)
        looks = 0.0 if self._recording.labels.evidence.closed else _LOOKS * self._look
        final = self._of_final_audit(plan, gradients.coverage, n, _validation_examples(trainer))
        return self._prepared + looks + final + _WRITTEN[0] + _WRITTEN[1] * n

    # ---------------------------------------------------------------- telling

    def tell(self, trainer: Trainer, module: LightningModule) -> None:
        """Say before training what will be done, and what it costs, unless it is not known of which examples."""
        indices = self._examples(trainer)
        if indices and not bridge.is_dry_run(trainer):
            self._reporter.tell(lambda: self._plans(self._always(trainer, module, indices)))

    def announced(self, plan: InfluencePlan, coverage: Coverage, examples: int, queries: int) -> str:
        """Return the line before the final audit: what will be done, and about how much time and memory it takes."""
        memory = fitted_bytes(plan.curvature, coverage) + self._inspection.batch_bytes
        seconds = self._of_final_audit(plan, coverage, examples, queries)
        return (
            f"influence audit: {plan.curvature} on {len(coverage.blocks)} layers, {examples:,} training examples"
            f"{f', {queries:,} validation examples' if queries else ''}; about {readable_seconds(seconds)} and "
            f"{readable(memory)} of extra memory"
        )

    def _plans(self, always: float) -> str:
        tracin = self._arguments.tracin
        along = "without TracIn"
        if tracin is not None and tracin.mode == "step":
            along = "TracIn in flight"
        elif tracin is not None and tracin.mode == "auto" and tracin.overhead is not None:
            along = f"TracIn after as many epochs as overhead={tracin.overhead:g} of their time leaves room for"
        elif tracin is not None:
            along = f"TracIn after {_every(tracin.every_n_epochs)}"
        return (
            f"influence audit: {along}; looks at the labels and the final audit of {self._arguments.curvature} take "
            f"about {readable_seconds(always)}, however long training is"
        )

    def notes(self, trainer: Trainer) -> list[str]:
        """Return what a reader of the scores should know, at the end."""
        tracin, epochs = self._arguments.tracin, trainer.current_epoch + 1
        passes = len(self._recording.tracin.checkpoints)
        if tracin is None or tracin.mode != "auto" or not self._passes.any_time or not 0 < passes < epochs:
            return []
        if self._recording.schedule.spacing(bridge.expected_epochs(trainer)[0]) == 1:
            return []  # other ends are missing for another reason, which has its own note
        return [
            f"TracIn is the sum over {passes} of {epochs} ends of epochs, each for the steps since the one before: "
            f'overhead={tracin.overhead:g} of the training\'s time; `tracin="epoch"` takes all of them'
        ]

    # ----------------------------------------------------------- the schedule

    def due(self, trainer: Trainer) -> bool:
        """Tell whether a checkpoint of TracIn is due at the end of this epoch."""
        tracin, ended = self._arguments.tracin, trainer.current_epoch + 1
        if tracin is None:
            return False
        if tracin.mode != "auto":
            return not ended % tracin.every_n_epochs
        return self._recording.schedule.due(ended, bridge.expected_epochs(trainer)[0])

    def look_due(self, trainer: Trainer) -> bool:
        """Tell whether to look at the labels at the end of this epoch, if there is not enough known of them."""
        ended = trainer.current_epoch + 1
        return ended < _LOOKS or ended & (ended - 1) == 0  # so that they grow with the logarithm of the epochs

    def decide(self, trainer: Trainer, module: LightningModule) -> None:
        """Decide at the end of the first epoch how many passes fit, the same in all processes."""
        schedule = self._recording.schedule
        # Resumed at the end of an epoch, it has no batches that were timed; of a stream there may be no passes at all.
        if schedule.decided or self._place < 0 or not self._passes.any_time:
            return
        try:
            with together():
                self._decide(trainer, module)
        except Exception as error:  # once, and what this epoch is to say is not lost
            schedule.decide(math.inf, 0.0, math.inf)
            rank_zero_warn(
                "the influence audit can't tell how many passes for TracIn its budget has room for: there is one after "
                f'the last epoch alone; `tracin="epoch"` has all of them ({type(error).__name__}: {error})'
            )

    def _decide(self, trainer: Trainer, module: LightningModule) -> None:
        schedule = self._recording.schedule
        if not (indices := self._examples(trainer)):
            return
        epochs, most = bridge.expected_epochs(trainer)
        coverage = self._passes.gradients(trainer, module).coverage
        if self._work(coverage) * len(indices) * (most or epochs) <= _TINY:
            schedule.decide(0.0, 0.0, 0.0)
            return
        if distributed.any_process(not self._look):
            self._try_pass(trainer, module, indices)
        always, each, one, epoch = distributed.gather_objects(self._measured(trainer, module, indices))[0]
        schedule.decide(always / epoch, each / epoch, one / epoch)
        self._reporter.tell(partial(self._told, epochs, most, epoch))

    def _try_pass(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> None:
        """Time a pass where no look came before training: in a limited run, or one resumed before it was decided.

        What the first batch takes, cold, is several times too long.
        """
        start, some = time.perf_counter(), indices[:_TRIED]
        with bridge.aside(trainer):
            seen = look_at_labels(self._passes.gradients(trainer, module), some)
        if seen is not None:
            took = time.perf_counter() - start
            self.went_over(took, len(some))
            self.looked(took / len(some) * len(indices))

    def _measured(
        self, trainer: Trainer, module: LightningModule, indices: Sequence[int]
    ) -> tuple[float, float, float, float]:
        """Return seconds: of what comes once, in each epoch and in each pass for TracIn; and of training, an epoch."""
        one = self._seconds_per_example * len(indices)
        # A training of one batch an epoch has no more to tell of itself than a pass has.
        timed = self._batches - 1
        batch = (self._last - self._first - self._recorded) / timed if timed > 0 else 0.0
        # Resumed within an epoch, fewer were timed than it has.
        epoch = batch * (self._place + 1) or one
        recorded = self._recorded / timed * (self._place + 1) if timed > 0 else 0.0
        return self._always(trainer, module, indices), recorded + SHARE * epoch, one, epoch

    def _work(self, coverage: Coverage) -> int:
        """Return the multiply-adds of one example's forward pass."""
        positions = self._inspection.positions
        return sum(
            positions.get(name, 1) * sum(parameter.numel() for parameter in block.parameters.values())
            for name, block in coverage.blocks.items()
        )

    def _told(self, epochs: int, most: int | None, epoch: float) -> str:
        schedule = self._recording.schedule
        n = schedule.spacing(epochs)
        if epochs != most:
            when = "after epochs that lie the farther apart the longer training goes on"
        elif n is None:
            when = "after the last epoch alone"
        else:
            when = f"after {_every(n)} and the last ({(epochs - 1) // n + 1} passes)"
        share, budget = schedule.share(epochs), f"overhead={schedule.overhead:g}"
        exceeded = share > (schedule.overhead or 0.0)
        return (
            f"influence audit: TracIn {when}. Of {epochs} epochs, about {readable_seconds(epochs * epoch)}, the audit "
            f"adds {share:.0%}{f': what is done in any case takes more than {budget}' if exceeded else f' ({budget})'}"
        )


def _every(n: int) -> str:
    return "every epoch" if n == 1 else f"every {n} epochs"


def _validation_examples(trainer: Trainer) -> int:
    """Return about how many there are, without asking their loaders for any."""
    loaders: Any = [] if trainer.val_dataloaders is None else [loader for _, loader in leaves(trainer.val_dataloaders)]
    sizes = zip(loaders, trainer.num_val_batches, strict=False)
    return sum(int(n) * (getattr(loader, "batch_size", None) or 1) for loader, n in sizes if math.isfinite(n))
