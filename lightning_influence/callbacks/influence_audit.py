"""``InfluenceAudit``: the whole audit as one callback."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.audit.naming import Describe, Ids
from lightning_influence.audit.queries import Queries
from lightning_influence.audit.report import AuditReport
from lightning_influence.callbacks import bridge, preparing
from lightning_influence.callbacks.afterwards import Afterwards
from lightning_influence.callbacks.answers import WITHOUT_TRAINING
from lightning_influence.callbacks.arguments import Arguments, checked_indices, checked_tracin
from lightning_influence.callbacks.beginning import begun
from lightning_influence.callbacks.chosen_weights import Weights, check_weights
from lightning_influence.callbacks.lightning import LightningModule, Trainer, overrides, rank_zero_info, rank_zero_warn
from lightning_influence.callbacks.query_report import checked_queries
from lightning_influence.callbacks.replayed import with_replayed
from lightning_influence.callbacks.resuming import as_at_the_end_of_training, restore, warn_of_other_labels
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.core.errors import settings
from lightning_influence.core.meeting import together
from lightning_influence.curvature import CurvatureName, Damping, Fisher, Solver
from lightning_influence.data.ids import SampleId
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.coverage import Layers, Uncovered
from lightning_influence.index.settings import Index
from lightning_influence.objective.standard_task import TaskName, checked_task
from lightning_influence.objective.task import Task
from lightning_influence.replay.settings import Record
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import Mode, TracIn


class InfluenceAudit(Afterwards):
    """Audits the training data of a run: self-influence of every example, and the labels that are probably wrong.

    Training is left bitwise unchanged. The user's own ``training_step`` defines the loss; everything else is read off
    the run. At the end of training the audit lies in ``influence`` beside the checkpoints, in the loggers, and in
    ``report``.

    During training, loss, margin and EL2N of every example are noted from the training pass itself, and TracIn adds up
    ``η gᵀPg`` per example (P: what Adam and its kin multiply gradients with), in a fixed-order pass at epoch ends or
    from the training pass, too. At the end, curvature is fitted and one more pass scores every example. Extra passes
    run in eval mode, in the precision of the weights.

    Args:
        curvature: Approximation behind ``self_influence`` and ``harm``, from the cheapest: ``"identity"`` (plain
            gradient products), ``"diagonal"``, ``"kfac"``, ``"ekfac"``, ``"block_ggn"`` (dense for each layer),
            ``"ggn"`` and ``"hessian"`` (all covered parameters at once, by products with them).
        fisher: Labels that the curvature is fitted with: ``"sampled"`` from the model's predictions (by their part of
            the curvature), their ``"exact"`` expectation, or the given ones (``"empirical"``). ``"auto"`` samples;
            empirical if the loss is not a known one.
        damping: Absolute λ > 0 added to the curvature; ``"relative"``: 0.1 times the mean eigenvalue of each layer
            (nothing for the identity); ``"trainer"``: ``1 / (Σ η / (1 - momentum))`` over the steps of the run, plus
            L2 weight decay; of Adam and its kin ``1 / Σ η P``. ``"auto"`` is ``"trainer"`` for ``"block_ggn"``,
            ``"ggn"`` and ``"hessian"``, else relative, for K-FAC and EK-FAC bounded (``docs/curvature.md``).
        solver: For ``"ggn"`` and ``"hessian"``, also those that ``influence()`` and ``unlearner()`` fit later:
            ``"dense"`` forms the matrix; ``"cg"`` (conjugate gradients), ``"nystrom"`` and ``"pcg"`` (the same,
            preconditioned with a sketch, or EK-FAC) and ``"lissa"`` use products only, ``"woodbury"`` some gradients.
            ``"auto"``: dense up to 4,096 parameters, else ``"nystrom"`` or ``"woodbury"``, of the Hessian ``"cg"``.
        factor_examples: Number of random examples that the curvature is fitted on; ``"auto"`` gives every factor
            enough rows and does not grow with the data; None takes all.
        tracin: ``"auto"``: TracIn by passes over the training data at as many ends of epochs as ``overhead`` leaves
            room for, the last one always. ``"epoch"``: at all of them. ``"step"``: in flight, at every step, from the
            training pass itself (automatic optimization only). ``TracIn(...)`` has further settings; None for none.
        layers: What to audit: names of modules (with everything in them), of layers or parameters, glob patterns, or
            types such as ``torch.nn.Linear``; None for everything that is trained.
        uncovered: What to do about trainable parameters whose per-example gradients have no closed form (some
            packed sequences, own autograd functions, large reparametrised weights): ``"report"`` them with their share
            and leave them out, or ``"exact"``: one backward pass per example.
        task: A function ``(module, batch) -> loss`` in place of ``training_step``. Needed for manual optimization, and
            where a step mixes examples. ``"classification"``, ``"binary"`` and ``"regression"`` are the plain losses of
            ``module(x)`` and ``y``, found in batches ``(x, y)`` or mappings with usual names.
        queries: Examples to ask about: the training examples that help and harm each of them most are found, kept in
            ``pairs.parquet`` and shown in the loggers. ``"worst"`` takes the eight validation examples with the highest
            loss, a ``DataLoader`` its first eight; ``Queries(...)`` has more to choose, such as what is measured: a
            margin, an adversarial loss, or a gap between groups.
        known_noise: Dataset indices of labels that are known to be wrong, to measure the detection.
        trusted: Dataset indices of labels that are known to be right, a few hundred at random: beside them even
            mistakes show that the network shares.
        ids: What the examples are called (file names, keys of rows) in every table: a sequence with one id for each
            training example (or, if these are a part of another data set, for each of that), or a function from
            dataset index to id.
        describe: What a person sees of an example: a function from what the data set returns for an index to a text or
            an image, or a tokenizer (``decode``) for token batches. Asked for the few examples that are shown.
        weights: Which ones the final pass is about: the ``"last"``, those that ``ModelCheckpoint`` found ``"best"``,
            or ``"averaged"`` ones, of an averaging callback (SWA, EMA). The model's own are put back.
        dirpath: Directory of the audit, instead of ``influence`` in the run's folder, beside the checkpoints. An
            existing audit is never overwritten: a version suffix is added.
        verify: Whether to check per-example gradients against autograd on half a training batch before training starts.
        sample_id: For streams (``IterableDataset``, WebDataset, loaders without an index): the name or place of the
            column of a batch that holds each example's id, or a function from batch to ids. Everything is filed by
            these, and the examples are met again by going over the loader once more, see ``docs/streams.md``.
        loader: Of several training loaders at once, the one whose examples are audited: its key, or place in a list.
        record: Whether to note every step, so that the run can be replayed (``training_record``): what would have come
            out without an example, exactly to first order (``report.replay``; see ``docs/replay.md``). With validation
            data, a short run gets a column ``harm_exact``. ``Record(...)`` has budgets of memory and time.
        overhead: Share of the training time that all of this may add; ``tracin="auto"`` keeps within what the looks at
            labels and the final audit, which are always made, leave of it. None for no limit. See ``docs/costs.md``.
        index: Whether to keep every example's gradient, weighted and compressed, beside the audit: ``report.ask(model,
            batch)`` then answers later questions without the training data. ``Index(...)`` has its size.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: During ``fit``, before the first step: for a stream without ``sample_id``, collate
            functions whose order can't be followed, strategies that split layers, manual optimization without a
            ``task``, models without a supported layer, losses that are not made of per-example losses, ...

    Example:
        >>> trainer = Trainer(max_epochs=10, callbacks=[InfluenceAudit()])
        >>> trainer.fit(model, train_loader, val_loader)
        >>> trainer.callbacks[0].report.candidates[:10]
    """

    def __init__(
        self,
        *,
        curvature: CurvatureName = "ekfac",
        fisher: Fisher = "auto",
        damping: Damping = "auto",
        solver: Solver = "auto",
        factor_examples: int | Literal["auto"] | None = "auto",
        tracin: Mode | TracIn | None = "auto",
        layers: Layers = None,
        uncovered: Uncovered = "report",
        task: Task | TaskName | None = None,
        queries: Literal["worst"] | DataLoader[Any] | Queries | None = None,
        known_noise: Sequence[int] | Tensor | None = None,
        trusted: Sequence[int] | Tensor | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        verify: bool = True,
        ids: Ids = None,
        describe: Describe | None = None,
        weights: Weights = "last",
        sample_id: SampleId | None = None,
        loader: str | int | None = None,
        record: bool | Record = False,
        overhead: float | None = 0.1,
        index: bool | Index = False,
    ) -> None:
        self.arguments = Arguments(
            curvature,
            fisher,
            damping,
            solver,
            factor_examples,
            checked_tracin(tracin, overhead),
            layers,
            uncovered,
            checked_task(task),
            checked_queries(queries),
            checked_indices("known_noise", known_noise),
            checked_indices("trusted", trusted),
            dirpath,
            verify,
            ids,
            describe,
            weights,
            sample_id,
            loader,
            settings("record", record, Record),
            settings("index", index, Index),
        )
        super().__init__()
        self._recorder.sample_id, self._recorder.loader = sample_id, loader
        self._before: tuple[AuditReport | None, Recording | None, AuditRun | None] = (None, None, None)

    @cached_property  # asked for at every hook
    def state_key(self) -> str:
        """Key of the callback's state in checkpoints: two audits of one run have two states."""
        # Not `dirpath`: a resumed run may write elsewhere. Not `verify`: it changes no number.
        arguments = self.arguments.described()
        arguments.pop("verify")
        arguments.pop("index", None)  # neither does that
        if arguments["weights"] == "last":  # as checkpoints of earlier versions have it
            arguments.pop("weights")
        return self._generate_state_key(**arguments)

    # ------------------------------------------------------------------ start

    def setup(self, trainer: Trainer, pl_module: LightningModule | None = None, stage: str = "fit") -> None:
        """Check the combination of model and trainer, and start to note batch indices."""
        if pl_module is None:
            preparing.refuse_class(self)
        if stage != "fit":
            if stage == "validate" and not self.has_report:
                rank_zero_info(f"influence audit: `trainer.validate` makes none; {WITHOUT_TRAINING}.")
            return
        preparing.check_queries(trainer, pl_module, self.arguments.queries)
        # Of an earlier fit: an error before training starts must not be filed under that one's audit.
        self._before = self._report, self._recording, self._run
        self._report = self._recording = self._run = self._restored = None
        self._no_report = "training has not ended yet"
        if trainer.is_global_zero:
            self._child.forget()
        preparing.check_optimization(pl_module, self.arguments.task, self.arguments.tracin)
        bridge.check_strategy(trainer)
        check_weights(trainer, self, self.arguments.weights)
        self._replay.attach(trainer, pl_module, self._recorder, self.arguments.record)
        self._recorder.attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at one batch before the first step, so that nothing fails after hours of training."""
        self._replay.start()
        # Callbacks come before the model's own hooks, in which it may set up what its step needs.
        # Of a stream, the first batch is the only one that can be looked at without taking it from training.
        own = any(overrides(hook, pl_module) for hook in ("on_train_start", "on_train_epoch_start"))
        if not own and self.arguments.sample_id is None:
            self._prepare(trainer, pl_module).catch_up(trainer, pl_module)

    def _prepare(self, trainer: Trainer, module: LightningModule) -> AuditRun:
        with preparing.errors_as_misconfiguration(), together():
            source = self._recorder.source_of(trainer)
            preparing.check_indices("known_noise", self.arguments.known_noise, source)
            preparing.check_indices("trusted", self.arguments.trusted, source)
            restored, self._restored = self._restored, None
            stream = source if isinstance(source, StreamSource) else None
            # How long a stream is, is not known: there is room for what has been met.
            grown = restored.state.get("size", 0) if restored and stream else len(source)
            self._recording = Recording(grown, module, self.arguments.tracin)
            self._recording.stream = stream
            restore(self._recording, restored, trainer)
            self._run = begun(self.arguments, trainer, module, source, self._recording)
            self._run.take_over(trainer)
            if restored is not None:
                warn_of_other_labels(self._run, trainer, module)
        if not trainer.global_step:
            self._run.look(trainer, module)
        self._run.budget.tell(trainer, module)
        self._before = None, None, None
        return self._run

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo everything and keep what was recorded so far: that of the fit before, if this one did not begin."""
        super().on_exception(trainer, pl_module, exception)
        if self._run is None and self._before[2] is not None:
            self._report, self._recording, self._run = self._before

    # -------------------------------------------------------------------- end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the curvature, score every example, write the report."""
        if self._run is not None:
            self._replay.finish(self._run)
            self._finish(self._run, trainer, pl_module)
            settings, record = self.arguments.record, self._replay.record
            if self._report is not None and settings is not None and settings.max_cost != 0 and record is not None:
                self._report = with_replayed(self._report, self._run, record, trainer, pl_module, settings.max_cost)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the audit of a run that had nothing left to train, if it has none yet; else say why there is none."""
        if self._run is not None or bridge.is_dry_run(trainer):
            return
        if not trainer.global_step or trainer.train_dataloader is None:
            self._no_report = (
                f"no step was trained (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"limit_train_batches={trainer.limit_train_batches})"
            )
            rank_zero_warn(f"no influence audit: {self._no_report}; {WITHOUT_TRAINING}.")
            return
        before = self._before[2]
        if self._restored is None and before is not None and before.finished:
            self._report, self._recording, self._run = self._before
            rank_zero_info("influence audit: nothing was left to train; `report` is that of the fit before.")
            return
        rank_zero_info("influence audit: nothing was left to train; what was recorded until then is audited now.")
        try:
            with as_at_the_end_of_training(trainer, pl_module):
                self._finish(self._prepare(trainer, pl_module), trainer, pl_module)
        except Exception as error:
            self._no_report = str(error)
            rank_zero_warn(f"no influence audit: {error}\nOnce that is mended: {WITHOUT_TRAINING}.")

    def _finish(self, run: AuditRun, trainer: Trainer, module: LightningModule) -> None:
        finished = run.finish_or_warn(trainer, module)
        if finished is None:
            self._no_report = run.failure
            return
        # Before anything is written: what is computed is not lost to a disk or a logger.
        self._report, publish = finished
        self._no_report = f"it is that of rank zero, and this is rank {trainer.global_rank}"
        publish()
