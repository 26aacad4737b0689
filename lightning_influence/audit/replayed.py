"""What a report says of the training run itself, as it was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, overload

from torch import nn
from torch.utils.data import DataLoader

from lightning_influence.audit.store.atomic import StoreError
from lightning_influence.audit.store.kept_run import KeptRun
from lightning_influence.core.progress import shown
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.data.given import Data, Indices, positions, source_of
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import TraceError, discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.objective.standard_task import TaskName, checked_task
from lightning_influence.objective.task import Task, TrainingStepTask
from lightning_influence.replay.as_trained import as_trained, moved
from lightning_influence.replay.attribution import Replay, ReplayedMeasurement, ReplayedPairs
from lightning_influence.replay.record import ReplayError, TrainingRecord
from lightning_influence.replay.rerun import Rerun, forward_context
from lightning_influence.scores.measurements import AnyMeasurement


class Replayed:
    """The training run behind a report."""

    manifest: Mapping[str, Any]
    directory: Path | None

    def training_record(self) -> TrainingRecord:
        """Return the training run as it was recorded (``InfluenceAudit(record=True)``), with its states on the disk.

        Raises:
            StoreError: If there is none, or a file of it is damaged.
        """
        kept = None if self.directory is None else KeptRun.beside(self.directory)
        if kept is None or not kept.exists:
            told = (note for note in self.manifest.get("notes", ()) if "replayed" in note or "record of the" in note)
            why = next(told, "it was not recorded, see `InfluenceAudit(record=True)`")
            where = "of the training" if self.directory is None else f"of the training in {self.directory}"
            raise StoreError(f"there is no record {where}: {why}.")
        return kept.read()

    @overload
    def replay(
        self,
        model: nn.Module,
        data: Any,
        queries: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: Literal[False] = False,
        task: Task | TaskName | None = None,
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedPairs: ...

    @overload
    def replay(
        self,
        model: nn.Module,
        data: Any,
        queries: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: Literal[True],
        task: Task | TaskName | None = None,
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedMeasurement: ...

    def replay(
        self,
        model: nn.Module,
        data: Any,
        queries: Data,
        indices: Indices | None = None,
        *,
        measurement: AnyMeasurement = "loss",
        together: bool = False,
        task: Task | TaskName | None = None,
        max_cost: float | None = None,
        self_test: int = 5,
    ) -> ReplayedPairs | ReplayedMeasurement:
        """Return what every training example did, in this very run, to queries at its end.

        The training is run again, which must end in the same bits, and gone back through: scores ``-N ∂f_q/∂w_z``, of
        which ``1/N`` is what leaving ``z`` out of this run adds to ``f_q``, to first order. Then the run is made a few
        times without some examples, which tells how far to trust the scores. See ``docs/replay.md``.

        Args:
            model: The model that was trained, or another of its making: the weights are the record's, and the model has
                its own afterwards.
            data: The training data: the data module, ``DataLoader`` or data set of the run.
            queries: The queries' data: a ``DataLoader`` or data set.
            indices: Which of them; all by default. Each costs about as much as the training, so take few.
            measurement: ``"loss"``, ``"margin"``, a gap, an attack's loss, or a function ``(model, batch) -> number``.
            together: Whether to measure the queries as one set, which costs as much as one query, instead of each.
            task: The loss by example, where that of the training step does not tell the examples apart.
            max_cost: Seconds that it may take; known after a few steps.
            self_test: Number of trainings without 5 % of the examples; 0 for none.

        Raises:
            StoreError: If the run was not recorded.
            ReplayError: If it can't be replayed, does not come out the same, or would take longer than ``max_cost``.
            MeasurementError: If the measurement is one of whole sets, and ``together`` is not asked for.

        Example:
            >>> report = trainer.callbacks[0].report
            >>> scores = report.replay(model, datamodule, datamodule.val_dataloader(), [3, 14])
            >>> scores.scores[0].argsort()[:5]  # rows of the strongest opponents; scores.trust tells how far to trust
        """
        record = self.training_record()
        source, to_device = _training_data(data, model, record)
        if len(source) != record.recipe.examples:
            raise ReplayError(
                f"the run was trained on {record.recipe.examples:,} examples, and {type(source.dataset).__name__} has "
                f"{len(source):,}; pass the data that it was trained on."
            )
        asked, drawn = source_of(queries, collate_fn=source.collate_fn)
        chosen = positions(indices, drawn, "query set")
        rerun = Rerun(record, model, TrainingStepTask(), source, to_device=to_device)
        by_example = checked_task(self._task_of(task)) or rerun.task
        around: dict[str, Any] = {"to_device": rerun.to_device, "forward_context": partial(_around, model, record)}
        try:
            coverage = discover(model, by_example, source, uncovered="exact", **around)
        except TraceError as error:
            if isinstance(error.__cause__, ReplayError):
                raise error.__cause__ from None
            raise
        training = ExampleGradients(model, by_example, source, coverage, progress=shown, **around)
        return Replay(rerun, by_example).asked(
            training.on(asked), chosen, measurement, together=together, max_cost=max_cost, self_test=self_test
        )

    def _task_of(self, task: Any) -> Any:
        """Return the loss by example: what is asked for, or what the audit was made with."""
        then = self.manifest.get("arguments", {}).get("task")
        if task is not None or then is None or then in get_args(TaskName):
            return then if task is None else task
        raise ReplayError(
            f"the audit was made with `task={then}` in place of the training step, which does not tell examples apart; "
            "pass it here, too. It has to come to the loss that was trained on."
        )


@contextmanager
def _around(model: nn.Module, record: TrainingRecord) -> Iterator[None]:
    """Run a pass at the end of training in the weights' own precision, as those of an audit."""
    own = nullcontext() if "mixed" in record.recipe.precision else forward_context(record.recipe, model)
    epoch = max((batch.epoch for batch in record.steps[-1].batches), default=0) if record.steps else 0
    with own, as_trained(model, lambda: (epoch, len(record.steps))):
        yield


def _training_data(
    data: Any, model: nn.Module, record: TrainingRecord
) -> tuple[ExampleSource, Callable[[Any], Any] | None]:
    """Return the training data, and what moves a batch of theirs to the device, if that is not the model's affair."""
    if isinstance(data, DataLoader) or not callable(getattr(data, "train_dataloader", None)):
        return source_of(data)[0], None
    if getattr(data, "trainer", None) is None:  # nobody has set it up
        with isolated_rng():
            data.prepare_data()
            data.setup("fit")
    return source_of(data.train_dataloader())[0], partial(moved, model, record.recipe.precision, data_module=data)
