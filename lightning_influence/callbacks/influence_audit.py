"""``InfluenceAudit``: the whole audit as one callback."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import distributed
from lightning_influence.audit import AuditReport
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.afterwards import MakeUnlearner, unlearner_maker
from lightning_influence.callbacks.arguments import (
    check_choice,
    check_count,
    check_layers,
    check_number,
    checked_indices,
    checked_tracin,
)
from lightning_influence.callbacks.batch_indices import BatchIndexRecorder
from lightning_influence.callbacks.flight import FlightRecorder
from lightning_influence.callbacks.query_report import QueryReport, checked_queries, described
from lightning_influence.callbacks.recording import Recording
from lightning_influence.callbacks.reporting import Reporter
from lightning_influence.checkpoints import Checkpoint
from lightning_influence.coverage import Coverage, Layers, Uncovered, cover, listed_layers
from lightning_influence.curvature import (
    CurvatureName,
    Damping,
    Fisher,
    IterativeSolver,
    Solver,
    check_curvature,
)
from lightning_influence.discover import trace_model
from lightning_influence.influence import InfluencePlan, influence_scores
from lightning_influence.layers import LayerError
from lightning_influence.optimizers import preconditioners
from lightning_influence.passes import ExampleGradients
from lightning_influence.query_pairs import Queries
from lightning_influence.scoring import score_examples
from lightning_influence.source import DataError, ExampleSource
from lightning_influence.store import AuditStore, StoreError
from lightning_influence.task import LossTap, Task, TaskError, TrainingStepTask
from lightning_influence.trace import Trace
from lightning_influence.tracin import Mode, StepSize, TracIn, block_step_sizes
from lightning_influence.unlearning import Unlearner
from lightning_influence.verify import Inspection, VerificationError, inspect, roomy_batch_size

# Less than this share of the parameters is worth a warning.
_COMPLETE = 0.99

_AVERAGING_CALLBACKS = {"StochasticWeightAveraging", "WeightAveraging"}


class InfluenceAudit(Callback):
    """Audits the training data of a run: self-influence of every example, and the labels that are probably wrong.

    Training is left bitwise unchanged. The user's own ``training_step`` defines the loss; everything else is read off
    the run. At the end of training the audit lies in ``<log_dir>/influence``, in TensorBoard, and in ``report``.

    During training, loss, margin and EL2N of every example are noted from the training pass itself, and TracIn adds up
    ``η‖g‖²`` per example, in a fixed-order pass at epoch ends or from the training pass, too. At the end, curvature is
    fitted and one more pass scores every example. Extra passes run in eval mode, in the precision of the weights.

    Args:
        curvature: Approximation behind ``self_influence`` and ``harm``, from the cheapest: ``"identity"`` (plain
            gradient products), ``"diagonal"``, ``"kfac"``, ``"ekfac"``, ``"block_ggn"`` (dense for each layer),
            ``"ggn"`` and ``"hessian"`` (all covered parameters at once, by products with them).
        fisher: Labels that the curvature is fitted with: ``"sampled"`` from the model's predictions, their
            ``"exact"`` expectation, or the given ones (``"empirical"``). ``"auto"`` samples; empirical if the loss is
            not a known one.
        damping: Absolute λ > 0 added to the curvature; ``"relative"``: 0.1 times the mean eigenvalue of each layer
            (nothing for the identity); ``"trainer"``: ``1 / Σ η / (1 - momentum)`` over the steps of the run, plus
            L2 weight decay. ``"auto"`` is ``"trainer"`` for ``"block_ggn"``, ``"ggn"`` and ``"hessian"``.
        solver: For ``"ggn"`` and ``"hessian"``: ``"dense"`` forms the matrix; ``"cg"`` (conjugate gradients),
            ``"nystrom"`` and ``"pcg"`` (the same, preconditioned with a sketch of the matrix, or with EK-FAC) and
            ``"lissa"`` use products only. ``"auto"`` is dense for up to 4,096 parameters, else ``"nystrom"`` (``"cg"``
            for the Hessian).
        factor_examples: Number of random examples that the curvature is fitted on; ``"auto"`` gives every factor
            enough rows and does not grow with the data; None takes all.
        tracin: ``"epoch"``: TracIn by a pass over the training data at ends of epochs. ``"step"``: in flight, at every
            step, from the training pass itself (automatic optimization only). ``TracIn(...)`` has further settings,
            such as a budget of time; None for no TracIn.
        layers: What to audit: names of modules (with everything in them), of layers or parameters, glob patterns, or
            types such as ``torch.nn.Linear``; None for everything that is trained.
        uncovered: What to do about trainable parameters whose per-example gradients have no closed form (recurrent
            layers, custom autograd functions, reparametrised weights): ``"report"`` them with their share and leave
            them out, or ``"exact"``: one backward pass per example.
        task: A function ``(module, batch) -> loss`` in place of ``training_step``. Needed for manual optimization.
        queries: Examples to ask about: the training examples that help and harm each of them most are found, kept in
            ``pairs.parquet`` and shown in TensorBoard. ``"worst"`` takes the eight validation examples with the highest
            loss, a ``DataLoader`` its first eight; ``Queries(...)`` has more to choose, such as what is measured: a
            margin, an adversarial loss, or a gap between groups.
        known_noise: Dataset indices of labels that are known to be wrong, to measure the detection.
        dirpath: Directory of the audit, instead of ``<log_dir>/influence``. An existing audit is never overwritten:
            a version suffix is added.
        verify: Whether to check per-example gradients against autograd on one batch before training starts.

    Attributes:
        report: The audit, once training has ended.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: During ``fit``, before the first step: for data that can't be indexed (an
            ``IterableDataset``), loaders with ``in_order=False``, manual optimization without a ``task``, models
            without a supported layer, losses that are not the mean of per-example losses, unwritable directories.

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
        tracin: Mode | TracIn | None = "epoch",
        layers: Layers = None,
        uncovered: Uncovered = "report",
        task: Task | None = None,
        queries: Literal["worst"] | DataLoader[Any] | Queries | None = None,
        known_noise: Sequence[int] | Tensor | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        check_choice("curvature", curvature, get_args(CurvatureName))
        check_choice("fisher", fisher, get_args(Fisher))
        check_choice("uncovered", uncovered, get_args(Uncovered))
        check_layers(layers)
        if damping not in ("auto", "relative", "trainer"):
            check_number(
                "damping",
                damping,
                'a number > 0, "relative" (0.1 times the mean eigenvalue), "trainer" (1 / sum of step sizes) or "auto"',
            )
        check_choice("solver", solver, ("auto", "dense", *get_args(IterativeSolver)))
        if factor_examples != "auto" and factor_examples is not None:
            check_count("factor_examples", factor_examples, '"auto", None for all examples')
        if task is not None and not callable(task):
            raise ValueError(f"task={task!r} is not callable; expected a function (module, batch) -> loss.")
        self.curvature = curvature
        self.fisher = fisher
        self.damping = damping
        self.solver = solver
        self.factor_examples = factor_examples
        self.tracin = checked_tracin(tracin)
        self.layers = layers
        self.uncovered = uncovered
        self.task = task
        self.queries = checked_queries(queries)
        self.known_noise = checked_indices(known_noise)
        self.dirpath = dirpath
        self.verify = verify
        self.report: AuditReport | None = None
        self._key: str | None = None
        self._recorder = BatchIndexRecorder()
        self._recording: Recording | None = None
        self._reporter: Reporter | None = None
        self._make_unlearner: MakeUnlearner | None = None
        self._source: ExampleSource | None = None
        self._inspection: Inspection | None = None
        self._trace: Trace | None = None
        # The scale of losses that depend on their batch: labels and weights stay, so one look per run is enough.
        self._references: dict[int, float] | None = None
        self._tap: LossTap | None = None
        self._flight: FlightRecorder | None = None
        self._batch_indices: list[int] | None = None
        self._restored_state: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback's state in checkpoints: two audits of one run have two states."""
        if self._key is None:  # asked for at every hook
            # Not `dirpath`: a resumed run may write elsewhere. Not `verify`: it changes no number.
            arguments = {name: value for name, value in self._arguments().items() if name != "verify"}
            self._key = self._generate_state_key(**arguments)
        return self._key

    # ------------------------------------------------------------------ start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the combination of model and trainer, and start to note batch indices."""
        if stage != "fit":
            return
        # Of an earlier fit: an error before training starts must not be filed under that one's audit.
        self.report = self._recording = self._reporter = self._inspection = self._flight = self._make_unlearner = None
        if self.task is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"InfluenceAudit can't re-run the `training_step` of {type(pl_module).__name__}: with manual "
                "optimization it steps the optimizers. Pass `InfluenceAudit(task=...)`, a function "
                "(module, batch) -> loss."
            )
        if self.tracin is not None and self.tracin.mode == "step" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"TracIn in flight can't tell which steps of {type(pl_module).__name__} a backward pass is for: it "
                'optimizes manually. Pass `tracin="epoch"`.'
            )
        bridge.check_strategy(trainer)
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        after = callbacks[callbacks.index(self) + 1 :]
        later = {kind.__name__ for callback in after for kind in type(callback).__mro__}
        if averaging := _AVERAGING_CALLBACKS & later:
            rank_zero_warn(
                f"{averaging.pop()} comes after InfluenceAudit and replaces the weights once the audit is done: the "
                "audit describes the weights before. List InfluenceAudit after it."
            )
        self._recorder.attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at one batch before the first step, so that nothing fails after hours of training."""
        loader: Any = trainer.train_dataloader
        if getattr(loader, "in_order", True) is False:
            raise MisconfigurationException(
                "the training DataLoader has `in_order=False`: its batches arrive in another order than their indices "
                "were drawn in, so scores would be filed under the wrong examples. Set `in_order=True`."
            )
        self._recorder.check()
        try:
            self._source = ExampleSource.from_loader(loader)
            size = len(self._source)
            if self.known_noise is not None and int(self.known_noise.max()) >= size:
                raise DataError(
                    f"known_noise holds the index {int(self.known_noise.max())}; the data have {size} examples."
                )
            self._recording = Recording(size, pl_module, self.tracin)
            self._references = None
            if self._restored_state is not None:
                self._recording.load_state_dict(self._restored_state)
                self._restored_state = None
            first = self._indices(trainer) or list(range(size))
            with bridge.silenced_loggers(trainer):
                self._trace = trace_model(
                    pl_module, self._task, self._source, indices=first, **bridge.surroundings(trainer, pl_module)
                )
                gradients = self._gradients(trainer, pl_module)
                self._warn_of_gaps(gradients.coverage)
                check_curvature(gradients, self.curvature, first)
                self._inspection = inspect(gradients, first, verify=self.verify)
                if self.queries is not None:
                    validation = bridge.validation_queries(trainer, pl_module, self._task, gradients.coverage)
                    QueryReport(self.queries).check(trainer, pl_module, self._task, gradients.coverage, validation)
            self._source.pass_batch_size = max(self._source.batch_size, roomy_batch_size(self._inspection))
            self._reporter = self._open_reporter(trainer)
            if self.tracin is not None:
                self._reporter.take_over_checkpoints(self.tracin, self._recording, trainer.global_step)
            if self.tracin is not None and self.tracin.mode == "step":
                self._flight = self._make_flight(pl_module, self._recording, self.tracin)
            if self._recording.postponed == trainer.global_step and self._recording.step_sizes.steps:
                self._add_checkpoint(trainer, pl_module, self._recording, self._reporter)
        except (DataError, LayerError, TaskError, VerificationError, StoreError, ValueError) as error:
            raise MisconfigurationException(f"InfluenceAudit: {error}") from error

    def _warn_of_gaps(self, coverage: Coverage) -> None:
        if self.layers is not None or coverage.share >= _COMPLETE:
            return
        reasons = [f"{name} ({reason})" for name, reason in coverage.uncovered.items()]
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        rank_zero_warn(
            f"InfluenceAudit covers {coverage.share:.1%} of the trainable parameters. Not covered: "
            f'{"; ".join(reasons[:4])}{more}. They are left out of every score; `uncovered="exact"` computes '
            "their gradients one example at a time, `layers=` makes a choice on purpose."
        )

    def _open_reporter(self, trainer: Trainer) -> Reporter:
        directory = self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "influence")
        store: AuditStore | None = None
        failure: StoreError | None = None
        if trainer.is_global_zero and not bridge.is_dry_run(trainer):
            try:
                store = AuditStore.create(directory)
            except StoreError as error:
                failure = error
        if distributed.any_process(failure is not None):
            raise failure or StoreError(f"rank 0 can't write the audit directory {directory}; its error says why.")
        if not trainer.loggers and store is not None:
            rank_zero_warn(f"no logger: the influence audit goes to disk only, to {store.directory}")
        return Reporter(store, self._arguments(), None if self.known_noise is None else self.known_noise.numpy())

    # ------------------------------------------------------- during training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which examples come, and listen for their loss."""
        self._stop_tap()
        self._batch_indices = self._recorder.next()
        if self._batch_indices is not None and self._recording is not None:
            flight, indices = self._flight, self._batch_indices
            self._tap = LossTap() if flight is None else flight.tap(trainer, pl_module, indices)
            self._tap.__enter__()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Stop listening: the loss is there, and zeroing asks torch twice about every parameter."""
        if self._tap is not None:
            self._tap.stop()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """File what the training pass itself said about each example."""
        tap, indices = self._stop_tap(), self._batch_indices
        if tap is not None and indices is not None and self._recording is not None:
            forms = {} if self._trace is None else self._trace.forms
            self._recording.record_batch(indices, loss, tap.calls, forms)
            if self._flight is not None:
                self._flight.before_backward(trainer, indices)
            self._batch_indices = None  # a second backward pass of the same step is not a second visit

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the backward pass said about each example's gradient."""
        if self._flight is not None:
            self._flight.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening if there was no backward pass."""
        self._stop_tap()
        if self._flight is not None:
            self._flight.batch_ended()
        if batch is None:
            # A batch that collation dropped: it was drawn, but its start was not announced.
            self._recorder.next()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the learning rates that are really used."""
        if self._recording is not None:
            self._recording.record_step(optimizer)
            if self._flight is not None:
                self._flight.before_step(trainer, optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a TracIn checkpoint; the last one is part of the final pass."""
        self._stop_tap()  # a batch that `on_train_batch_start` skipped has no end
        recording, reporter = self._recording, self._reporter
        if recording is None or reporter is None or bridge.is_dry_run(trainer):
            return
        try:
            self._end_of_epoch(trainer, pl_module, recording, reporter)
        except Exception:
            if distributed.world_size() > 1:
                raise  # the others would wait for this process at the next collective
            recording.failed_passes.append(trainer.current_epoch)
            rank_zero_warn(
                f"the influence audit's pass at the end of epoch {trainer.current_epoch} failed; training goes on.\n"
                f"{traceback.format_exc()}"
            )

    def _end_of_epoch(
        self, trainer: Trainer, pl_module: LightningModule, recording: Recording, reporter: Reporter
    ) -> None:
        recording.synchronise()
        tracin = self.tracin
        due = tracin is not None and (trainer.current_epoch + 1) % tracin.every_n_epochs == 0
        if due and recording.step_sizes.steps and self._flight is not None:
            self._take_step_sizes(trainer, pl_module)
        elif due and recording.step_sizes.steps:
            # The final pass comes next; a run that is resumed from here for more epochs has to catch up.
            recording.postponed = trainer.global_step if _is_last_epoch(trainer) else -1
            if recording.postponed < 0:
                self._add_checkpoint(trainer, pl_module, recording, reporter)
        if recording.visits is not None:
            reporter.log_visits(trainer, recording.visits.gathered().values())
        reporter.log_dynamics(trainer, recording.dynamics.gathered().columns())

    def _add_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, recording: Recording, reporter: Reporter
    ) -> None:
        indices = self._indices(trainer)
        start = time.perf_counter()
        with bridge.silenced_loggers(trainer):
            gradients = self._gradients(trainer, pl_module)
            gradients.calibrate(indices)
            self._references = gradients.references
            scores = score_examples(
                gradients,
                indices,
                step_sizes=self._take_step_sizes(trainer, pl_module, gradients.coverage),
                features=True,
                title=f"TracIn, step {trainer.global_step}",
            )
        recording.add_pass(trainer.global_step, scores)
        reporter.seconds_per_example = (time.perf_counter() - start) / len(indices)
        reporter.write_partial(recording.columns(indices), "recording")
        reporter.log_checkpoint(trainer, scores)

    # -------------------------------------------------------------------- end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the curvature, score every example, write the report."""
        if self._recording is None or self._reporter is None or self._inspection is None:
            return
        try:
            self._audit(trainer, pl_module, self._recording, self._reporter, self._inspection)
        except Exception as error:
            # In one process the training that has just ended is worth more than the audit; with several, the others
            # would wait for this one at the next collective.
            if distributed.world_size() > 1:
                raise
            self._keep_what_there_is(trainer, repr(error))
            rank_zero_warn(
                f"the influence audit failed; training is not affected, and what was recorded until then is kept in "
                f"{self._reporter.directory}.\n{traceback.format_exc()}"
            )

    def _audit(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        recording: Recording,
        reporter: Reporter,
        inspection: Inspection,
    ) -> None:
        indices = self._indices(trainer)
        if bridge.is_dry_run(trainer) and self._source is not None:
            indices = (indices or list(range(len(self._source))))[: self._source.batch_size]
        if not indices:
            rank_zero_warn("no influence audit: no training batch was seen.")
            return
        gradients = self._gradients(trainer, pl_module)
        history = recording.step_sizes.history()

        def planned(curvature: CurvatureName) -> InfluencePlan:
            return InfluencePlan.make(
                gradients.coverage,
                inspection,
                len(indices),
                curvature=curvature,
                fisher=self.fisher,
                damping=self.damping,
                examples=self.factor_examples,
                history=history,
                solver=self.solver,
            )

        plan = planned(self.curvature)
        queries = bridge.validation_queries(trainer, pl_module, self._task, gradients.coverage)
        rank_zero_info(reporter.announce(plan, gradients, inspection, len(indices), sum(len(q) for _, q in queries)))
        step_sizes = None
        if recording.step_sizes.steps and self.tracin is not None:
            step_sizes = self._take_step_sizes(trainer, pl_module, gradients.coverage)
        if self._flight is not None:
            step_sizes = None
            recording.notes += self._flight.notes()
        with bridge.silenced_loggers(trainer):
            result = influence_scores(
                gradients,
                indices,
                plan,
                queries=queries,
                step_sizes=step_sizes,
            )
        recording.add_pass(trainer.global_step, result.scores)
        columns = recording.columns(indices, result.scores)
        self._make_unlearner = unlearner_maker(trainer, gradients, planned, columns, history.weight_decay)
        if self.queries is not None:
            reporter.queries = QueryReport(self.queries)
            start = time.perf_counter()
            with bridge.silenced_loggers(trainer):
                columns |= reporter.queries.find(trainer, gradients, indices, result.curvature, queries, columns)
            result.seconds["queries"] = time.perf_counter() - start
        if trainer.is_global_zero:
            self.report = reporter.finish(trainer, gradients, plan, inspection, result, columns, recording)
            rank_zero_info(f"\n{self.report}")

    def unlearner(self, curvature: CurvatureName = "ggn") -> Unlearner:
        """Return what removes training examples from the model, or repairs their labels, by one Newton step.

        The curvature is fitted at the weights that the model has now, so load the weights that are meant first. With
        several processes, call it on all of them.

        Args:
            curvature: The GGN, with the audit's damping and solver, comes closest to retraining; Kronecker factors with
                their relative damping, good for ranking, step far too wide (``benchmarks/unlearning.py``).

        Raises:
            RuntimeError: Before an audit is complete.
            ValueError, IndefiniteError: As ``Unlearner.fitted``.

        Example:
            >>> update = audit.unlearner().newton_removal(audit.report.candidates[:10], leverage=True)
            >>> cleaner = update.applied_to_copy(model)
        """
        if self._make_unlearner is None:
            raise RuntimeError("there is no complete audit to unlearn from; let `trainer.fit` end first.")
        check_choice("curvature", curvature, get_args(CurvatureName))
        return self._make_unlearner(curvature)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo everything and keep what was recorded so far."""
        self._stop_tap()
        self._recorder.detach()
        if self.report is None:
            self._keep_what_there_is(trainer, repr(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo everything."""
        self._stop_tap()
        self._recorder.detach()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and primitives."""
        return {} if self._recording is None else self._recording.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the size of the data set is known."""
        self._restored_state = state_dict or None

    # ---------------------------------------------------------------- helpers

    @property
    def _task(self) -> Task:
        return self.task or TrainingStepTask()

    def _gradients(self, trainer: Trainer, pl_module: LightningModule) -> ExampleGradients:
        assert self._source is not None
        # Anew each time: callbacks that thaw a backbone change what there is to cover.
        coverage = cover(pl_module, self.layers, trace=self._trace, uncovered=self.uncovered)
        gradients = bridge.example_gradients(trainer, pl_module, self._task, self._source, coverage)
        gradients.references = self._references
        return gradients

    def _indices(self, trainer: Trainer) -> list[int]:
        assert self._recording is not None
        return bridge.audited_indices(trainer, self._recording.seen_indices(), self._recording.size)

    def _make_flight(self, module: LightningModule, recording: Recording, tracin: TracIn) -> FlightRecorder:
        assert self._source is not None
        layers = self.layers if tracin.layers is None else tracin.layers

        def covered() -> Coverage:
            return cover(module, layers, trace=self._trace)

        covered()  # a layer that does not exist is an error now
        forms = {} if self._trace is None else self._trace.forms
        sums = bool(forms) and all(form.sums for form in forms.values())
        return FlightRecorder(recording, covered, self._source.batch_size if sums else None)

    def _take_step_sizes(
        self, trainer: Trainer, module: LightningModule, coverage: Coverage | None = None
    ) -> dict[str, StepSize]:
        """Return the step sizes since the last checkpoint, by layer, and keep a checkpoint that stands for them."""
        assert self._recording is not None
        assert self._reporter is not None
        assert self.tracin is not None
        taken = self._recording.step_sizes
        steps, sums = taken.steps, taken.take()
        scales = preconditioners(trainer.optimizers, module)
        checkpoint = Checkpoint.of(
            module,
            trainer.global_step,
            step_sizes=sums,
            steps=steps,
            preconditioner=scales,
            optimizer=", ".join(sorted(taken.optimizers)),
        )
        self._reporter.keep_checkpoint(checkpoint, self.tracin, self._recording)
        return {} if coverage is None else block_step_sizes(coverage.blocks, sums, module, scales)

    def _stop_tap(self) -> LossTap | None:
        tap, self._tap = self._tap, None
        if tap is not None:
            tap.stop()
        return tap

    def _keep_what_there_is(self, trainer: Trainer, error: str) -> None:
        recording, reporter = self._recording, self._reporter
        if recording is None or reporter is None or not trainer.is_global_zero:
            return
        try:
            # Local numbers only: other processes may be gone, and a collective would wait for them for ever.
            reporter.write_partial(recording.local_columns(), "interrupted", error=error)
        except Exception as failure:  # the first error is the one to see
            rank_zero_warn(f"the interrupted influence audit could not be written: {failure}")

    def _arguments(self) -> dict[str, Any]:
        return {
            "curvature": self.curvature,
            "fisher": self.fisher,
            "damping": self.damping,
            "solver": self.solver,
            "factor_examples": self.factor_examples,
            "tracin": None if self.tracin is None else self.tracin.described(),
            "layers": None if self.layers is None else [getattr(e, "__name__", e) for e in listed_layers(self.layers)],
            "uncovered": self.uncovered,
            "queries": described(self.queries),
            "task": None if self.task is None else getattr(self.task, "__name__", type(self.task).__name__),
            "verify": self.verify,
        }


def _is_last_epoch(trainer: Trainer) -> bool:
    """Tell whether the final pass comes next; if not after all, its steps count towards the next checkpoint."""
    if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
        return True
    return 0 <= trainer.max_steps <= trainer.global_step
