"""Before the first step: what can't be audited is refused, what needs a word gets it, the directory is made."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_influence.audit.queries import Queries
from lightning_influence.audit.store.store import AuditStore, StoreError
from lightning_influence.callbacks import bridge
from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    overrides,
    rank_zero_warn,
)
from lightning_influence.core import distributed
from lightning_influence.core.errors import Forgiving
from lightning_influence.core.isolation import rewind, unchanged, untouched
from lightning_influence.core.random_streams import seed_everything
from lightning_influence.core.reachable import Walk
from lightning_influence.core.snapshot import StateError
from lightning_influence.core.torch_private import is_compiled, meets_compiled
from lightning_influence.data.collation import is_plain
from lightning_influence.data.source import DataError, ExampleSource, is_deterministic
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.answering import answered
from lightning_influence.gradients.capture import Capture
from lightning_influence.gradients.coverage import Coverage, listed_reasons
from lightning_influence.gradients.discover import trace_model
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.verify import Inspection, VerificationError, inspect
from lightning_influence.gradients.verify import looked_at as look_size
from lightning_influence.layers.blocks import LayerError
from lightning_influence.objective.own_part import OwnRows
from lightning_influence.objective.scale import TermKey
from lightning_influence.objective.standard_task import StandardTask
from lightning_influence.objective.task import Task, TaskError, TrainingStepTask, run_tapped
from lightning_influence.training.recording import Recording
from lightning_influence.training.settings import TracIn

# Less than this share of the parameters is worth a warning.
_COMPLETE = 0.99

# Examples that the look before training may choose from, at least.
_LOOKED_AT = 64

# So many are run, at least, to see whether all batches take the same path.
_FOR_PATHS = 32


@contextmanager
def errors_as_misconfiguration() -> Iterator[None]:
    """Raise the engine's errors as Lightning's ``MisconfigurationException``."""
    try:
        yield
    except (DataError, StateError, LayerError, TaskError, VerificationError, StoreError, ValueError) as error:
        raise MisconfigurationException(f"InfluenceAudit: {error}") from error


def refuse_class(trainer: Any) -> NoReturn:
    """Raise ``TypeError`` for a callback's class where the trainer expects a callback.

    The trainer calls hooks of the class then, with itself for the callback.
    """
    classes = [each for each in trainer.callbacks if isinstance(each, type)]
    trainer.callbacks[:] = [each for each in trainer.callbacks if each not in classes]  # their other hooks would fail
    names = ", ".join(each.__name__ for each in classes)
    raise TypeError(f"`callbacks=` holds a class, {names}, where a callback belongs: write {names}().")


def check_optimization(module: LightningModule, task: Task | None, tracin: TracIn | None) -> None:
    """Raise ``MisconfigurationException`` for what manual optimization rules out."""
    if module.automatic_optimization:
        return
    if task is None:
        raise MisconfigurationException(
            f"InfluenceAudit can't re-run the `training_step` of {type(module).__name__}: with manual "
            "optimization it steps the optimizers. Pass `InfluenceAudit(task=...)`, a function "
            "(module, batch) -> loss."
        )
    if tracin is not None and tracin.mode == "step":
        raise MisconfigurationException(
            f"TracIn in flight can't tell which steps of {type(module).__name__} a backward pass is for: it "
            'optimizes manually. Pass `tracin="epoch"`.'
        )


def check_company(source: ExampleSource, tracin: TracIn | None) -> None:
    """Raise ``MisconfigurationException`` for what batches of several loaders rule out."""
    if source.company is not None and source.company.others and tracin is not None and tracin.mode == "step":
        raise MisconfigurationException(
            f"TracIn in flight can't tell which gradients of a step are those of {source.company.loader!r}: the step "
            f'goes over {", ".join(map(repr, source.company.others))}, too. Pass `tracin="epoch"`.'
        )


def own_terms(gradients: ExampleGradients) -> dict[TermKey, OwnRows] | None:
    """Return which terms of the loss are about one of several loaders; None if there are no others.

    Where all of them are, those of other batches and epochs may be about others: what is known is the first ones.

    Raises:
        MisconfigurationException: If a single example is to be audited, with which nothing changes.
    """
    company, trace = gradients.source.company, gradients.coverage.trace
    if trace.own == {} and company is not None:
        raise MisconfigurationException(
            f"InfluenceAudit(loader={company.loader!r}): that loader has a single example, and what of the loss is "
            "about it is told by what changes with the examples. Audit one with two or more, or pass `task=`, a "
            "function (module, batch) -> the loss of that loader's batch alone."
        )
    if trace.own is not None or company is None or not company.others:
        return trace.own
    return dict.fromkeys(trace.forms, "all") or None


def own_terms_of_step(gradients: ExampleGradients, indices: Sequence[int]) -> dict[TermKey, OwnRows] | None:
    """Return which terms of the loss of ``training_step``, that a task replaces, are about one of several loaders.

    None if all of them are; none of them if they can't be told: training then says nothing of the examples.
    """
    source, module = gradients.source, gradients.module
    if source.company is None or not source.company.others:
        return None
    if not getattr(module, "automatic_optimization", True):
        return {}
    to_device, context = gradients.to_device, gradients.forward_context
    with Forgiving():  # whatever is the matter with it: the task is there for that
        return trace_model(
            module, TrainingStepTask(), source, indices=indices, to_device=to_device, forward_context=context
        ).own
    return {}


def compiled_parts(gradients: ExampleGradients, indices: Sequence[int], tracin: TracIn | None) -> list[str]:
    """Return what of a training step ``torch.compile`` has wrapped, as far as can be told without compiling anything.

    Raises:
        MisconfigurationException: If it is to be watched in flight: whatever watches it makes other graphs of it.
    """
    module = gradients.module
    walk = Walk([("", module), ("task", gradients.task)])
    found = [reached.path or type(module).__name__ for reached in walk if is_compiled(reached.value)]
    if not found and _step_is_compiled(gradients, list(indices[:2])):
        found = ["something that it calls"]
    if found and tracin is not None and tracin.mode == "step":
        raise MisconfigurationException(
            f"the training step of {type(module).__name__} is compiled ({', '.join(found[:4])}): TracIn in flight "
            'would have to watch it, which breaks its graphs and may change the weights. Pass `tracin="epoch"`.'
        )
    return found


def _step_is_compiled(gradients: ExampleGradients, chosen: list[int]) -> bool:
    """Run the step once where it would have to compile what it has not run before."""
    with Forgiving(), untouched(gradients.module, gradients.task):  # the look that comes next says what failed
        ((_, batch),) = gradients.source.batches(chosen, len(chosen))
        seed_everything(0)
        with meets_compiled() as met, gradients.forward_context():
            gradients.task(gradients.module, gradients.to_device(batch))
        return met.found
    return False


def look_for_paths(gradients: ExampleGradients, indices: Sequence[int]) -> int:
    """Run a few batches forward, and return with how many examples: a step may do otherwise with some of them.

    Raises:
        NewUseError: If it uses a parameter in a way that is not understood.
    """
    if isinstance(gradients.source, StreamSource):  # a batch is all that there is of it so far
        return 0
    size, capture = look_size(gradients.source.batch_size), Capture(gradients.coverage)
    chosen = indices[: max(2 * size, _FOR_PATHS)]
    # That of the data is not worth a pass yet.
    passes = gradients.with_scale(None)
    run = passes.losses(chosen, everywhere=True, size=size, watch=capture.forward, capture=capture)
    with closing(run) as losses:
        for _ in losses:
            capture.clear()
    return len(chosen)


def some_of(indices: Sequence[int], batch_size: int) -> list[int]:
    """Return random examples to look at: the first ones of a sorted data set are alike, and rare ones come later."""
    return random.Random(0).sample(indices, min(len(indices), max(_LOOKED_AT, batch_size)))


def with_loss(
    trainer: Trainer, module: LightningModule, task: Task, source: ExampleSource, indices: Sequence[int]
) -> list[int]:
    """Return those of some examples that there is a loss for.

    Raises:
        NoLossError: If that is none of them.
    """
    around = bridge.surroundings(trainer, module)

    def run(batch: Any, chosen: list[int]) -> None:
        _run_once(task, module, batch, **around)

    with bridge.aside(trainer), untouched(module, task):
        return [k for chosen, _ in answered(source, indices, source.batch_size, run) for k in chosen]


def _run_once(
    task: Task, module: nn.Module, batch: Any, to_device: Callable[[Any], Any], forward_context: Callable[[], Any]
) -> Tensor:
    rewind()
    seed_everything(0)
    with forward_context():
        loss, _ = run_tapped(task, module, to_device(batch))
    return loss


def depends_on_batch_idx(gradients: ExampleGradients, indices: Sequence[int]) -> bool:
    """Tell whether two examples have another loss as other batches, though the same as the same batch once more."""
    module, around, losses = gradients.module, (gradients.to_device, gradients.forward_context), []
    with Forgiving():  # whatever a step makes of two examples: the look that comes next says so
        _, batch = next(iter(gradients.source.batches(indices[:2], 2)))
        with untouched(module), torch.no_grad():
            for number in (0, 0, 1, 2, 3):
                losses.append(float(_run_once(TrainingStepTask(number), module, deepcopy(batch), *around).mean()))
        return losses[0] == losses[1] and not all(math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses)
    return False


def told_of_task(gradients: ExampleGradients, indices: Sequence[int]) -> str:
    """Return what a reader should know of a loss that is not that of `training_step`."""
    task = gradients.task
    what = f"`task={getattr(task, '__name__', type(task).__name__)}`"
    if isinstance(task, StandardTask):
        ((_, batch),) = gradients.source.batches(indices[:2], len(indices[:2]))
        with untouched(gradients.module, task):
            what = f'`task="{task.name}"`, {gradients.applied(task.written_out, batch)}'
    return f"the loss behind scores and labels is {what}, not that of `training_step`"


def looked_at(gradients: ExampleGradients, indices: Sequence[int], recording: Recording, *, verify: bool) -> Inspection:
    """Return what the look at a batch has told, see ``inspect``.

    Where a task stands for a step that mixes examples, so may the collate function: batches of passes are then those
    of torch's own.
    """
    source = gradients.source
    try:
        return inspect(gradients, indices, verify=verify)
    except VerificationError:
        own = source.collate_fn
        if isinstance(gradients.task, TrainingStepTask) or is_plain(own):
            raise
        source.collate_fn = None
        with Forgiving():
            inspection = inspect(gradients, indices, verify=verify)
            recording.note(f"passes make batches without {_name_of(own)}, in which an example depends on the others")
            return inspection
        source.collate_fn = own
        raise


def _name_of(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)


def labels_vary(gradients: ExampleGradients, indices: Sequence[int], inspection: Inspection) -> bool:
    """Tell whether examples have other labels when they are fetched once more, without streams of their own."""
    source = gradients.source
    if isinstance(source, StreamSource):  # a batch is all that there is of it so far
        return False
    if is_deterministic(source.dataset) and is_plain(source.collate_fn) and not inspection.random:
        return False
    chosen, labels = source.settled(indices[: inspection.examples]), []
    if not chosen:
        return False
    passes = gradients.with_scale(None)
    state = unchanged(source.dataset, source.collate_fn)
    with untouched(gradients.module, gradients.task), Capture(gradients.coverage), state:
        for seed in range(2):
            seed_everything(seed)
            batch = (source.collate_fn or default_collate)([source.dataset[index] for index in chosen])
            loss = passes.forward(source.beside(chosen, batch), len(chosen), step_seed=seed)
            labels.append(None if loss.primary is None else loss.primary.decided(loss.n).get("label"))
    first, second = labels
    return first is not None and second is not None and not torch.equal(first, second)


def check_queries(trainer: Trainer, module: LightningModule, queries: Queries | None) -> None:
    """Raise ``MisconfigurationException`` for queries among validation examples that the trainer will not load."""
    if queries is None or queries.which != "worst" or trainer.enable_validation:
        return
    if not overrides("validation_step", module):
        lacking = f"{type(module).__name__} has no `validation_step`, so the trainer loads no validation data"
    elif trainer.limit_val_batches == 0:
        lacking = "limit_val_batches=0 leaves none"
    else:
        lacking = "`trainer.fit` was given no validation data"
    raise MisconfigurationException(
        f'InfluenceAudit(queries="worst") asks about validation examples, but {lacking}. Mend that, or pass a '
        "DataLoader of the examples in question as `queries=`."
    )


def check_indices(name: str, indices: Tensor | None, source: ExampleSource) -> None:
    """Raise ``DataError`` for indices beyond the data."""
    if indices is not None and isinstance(source, StreamSource):
        raise DataError(
            f"{name} holds indices, and a stream has none before it is trained on. Leave it out, and compare "
            'the ids of the report: `report.columns["id"]`.'
        )
    if indices is not None and int(indices.max()) >= len(source):
        raise DataError(f"{name} holds the index {int(indices.max())}; the data have {len(source)} examples.")


def warn_of_gaps(coverage: Coverage) -> None:
    """Warn of parameters that every score lacks, unless they are few, and of slow passes."""
    if coverage.trace.failure is not None:
        rank_zero_warn(
            f"The model could not be traced ({coverage.trace.failure}): the gradients of its "
            f"{coverage.covered_parameters:,} covered parameters are computed one example at a time, by a forward and "
            "a backward pass for each, which takes many times as long. `layers=` makes it fewer."
        )
    if coverage.share >= _COMPLETE:
        return
    rank_zero_warn(
        f"InfluenceAudit covers {coverage.share:.1%} of the trainable parameters. Not covered: "
        f'{listed_reasons(coverage.uncovered, 4)}. They are left out of every score; `uncovered="exact"` computes '
        "their gradients one example at a time, `layers=` makes a choice on purpose."
    )


def run_directory(trainer: Trainer) -> str:
    """Return the folder of a run, as ModelCheckpoint finds it: of the first logger, with the run's id.

    ``trainer.log_dir`` is one for all runs where loggers have no ``log_dir`` of their own, and the root of MLflow's
    files may hold nothing else. To be called on all processes: rank zero's is everybody's.
    """
    folder = [trainer.default_root_dir]
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = [logger.save_dir or trainer.default_root_dir, str(logger.name), version]
    return distributed.from_first(lambda: os.path.join(*folder))


def open_store(trainer: Trainer, dirpath: str | os.PathLike[str] | None) -> AuditStore | None:
    """Make the audit directory; None in a dry run and on other ranks than zero.

    Raises:
        StoreError: On every rank, if it can't be made.
    """
    directory = dirpath or os.path.join(run_directory(trainer), "influence")
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
    return store
