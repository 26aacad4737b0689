"""Between Trainer and engine: devices, precision, loggers and progress bars of an extra pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypedDict

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_influence.callbacks.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    dummy_logger,
    is_a,
    rank_zero_warn,
)
from lightning_influence.callbacks.loaders import LoaderName, path_of_loader, train_loader
from lightning_influence.callbacks.sharded import AFTERWARDS, check_split
from lightning_influence.core import distributed
from lightning_influence.core.containers import leaves
from lightning_influence.core.isolation import kept
from lightning_influence.core.meeting import together
from lightning_influence.core.origin import is_lightnings, is_users
from lightning_influence.core.random_streams import isolated_rng
from lightning_influence.core.reachable import Found, shallow
from lightning_influence.core.sharding import names_of, whole
from lightning_influence.core.weights import parameters_of
from lightning_influence.data.company import Company
from lightning_influence.data.source import DataError, ExampleSource
from lightning_influence.data.stream import StreamSource
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.training.optimizers import inner


class Surroundings(TypedDict):
    """What a trainer puts around a forward pass."""

    to_device: Callable[[Any], Any]
    forward_context: Callable[[], AbstractContextManager[Any]]


def surroundings(trainer: Trainer, module: LightningModule) -> Surroundings:
    """Return the trainer's way of moving batches, and its precision.

    Mixed precision is left out: extra passes run in the weights' own precision, as rounded gradients would be noise
    in the scores and scaled losses would have to be unscaled.
    """
    plugin = trainer.precision_plugin

    def to_device(batch: Any) -> Any:
        convert: Any = type(plugin).convert_input
        batch = convert(plugin, batch)  # past what notes the batches of training
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        # Once training has ended, the strategy moves the model off its device.
        return trainer.strategy.batch_to_device(batch, device=module.device, dataloader_idx=0)

    own_precision = not is_a(plugin, "MixedPrecision")
    return {"to_device": to_device, "forward_context": plugin.forward_context if own_precision else nullcontext}


def after_training(trainer: Trainer, gradients: ExampleGradients) -> ExampleGradients:
    """Return the same passes for use once training has ended: what they would log goes nowhere, the epoch stays."""
    epoch = trainer.current_epoch

    @contextmanager
    def around() -> Iterator[None]:
        with _left_alone(trainer), at_epoch(trainer, epoch):
            yield

    return gradients.within(around)


@contextmanager
def at_epoch(trainer: Trainer, epoch: int) -> Iterator[None]:
    """Let the module see an epoch: after the last one, ``current_epoch`` is one that nothing was trained in."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    before = progress.processed, progress.completed
    try:
        progress.processed = progress.completed = max(epoch, 0)
        yield
    finally:
        progress.processed, progress.completed = before


def trained(trainer: Trainer, module: LightningModule) -> frozenset[int] | None:
    """Return the ids of the parameters that the trainer's optimizers hold; None if they hold none of the module's."""
    groups = [group for optimizer in trainer.optimizers for group in inner(optimizer).param_groups]
    names, own = names_of(module), parameters_of(module)
    held = {names.get(id(parameter)) for group in groups for parameter in group["params"]}
    return frozenset(id(own[name]) for name in held if name is not None) or None


def in_company(trainer: Trainer, name: LoaderName, source: ExampleSource) -> ExampleSource:
    """Let the batches of a loader be what ``training_step`` gets of them: with those of others, in a container."""
    if path := path_of_loader(trainer, name):
        source.company = Company(trainer.train_dataloader, path, drawn_from)
    return source


def audited_indices(
    trainer: Trainer, name: LoaderName, seen: list[int], source: ExampleSource, *, last: bool
) -> list[int]:
    """Return the training examples: what the sampler draws from, or what it has drawn if that may be less.

    Args:
        trainer: The trainer.
        name: Of the training loader, of several.
        seen: Sorted indices of the examples trained on so far.
        source: The training data; of a stream, no more are known than those that it has drawn.
        last: Whether no more examples are drawn. Until then some may turn up that passes must not have left out.
    """
    if isinstance(source, StreamSource):
        source.look_again()
        return seen or (list(range(len(source))) if source.whole else [])
    loader: Any = train_loader(trainer, name)
    limited = trainer.num_training_batches < length_of(loader) or bool(getattr(trainer, "overfit_batches", False))
    return seen if limited or (last and seen and not _draws_all(loader)) else drawn_from(loader, len(source))


def drawn_from(loader: Any, size: int) -> list[int]:
    """Return the examples that a loader's sampler can draw, as far as its kind tells."""
    sampler = _sampler(loader)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted({int(index) for index in sampler.indices})
    return list(range(size))


def length_of(loader: Any) -> float:
    """Return the number of a loader's batches; infinity if it can't tell, or has none."""
    try:
        return len(loader) or math.inf
    # What torch and Lightning take for "no length": the trainer counts no batches of such a loader, either.
    except (TypeError, NotImplementedError):
        return math.inf


def _sampler(loader: Any) -> Any:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if is_a(sampler, "DistributedSamplerWrapper"):  # around the user's own
        sampler = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler


def _draws_all(loader: Any) -> bool:
    """Tell whether every example that can be drawn surely is, sooner or later."""
    if type(loader).__iter__ is not DataLoader.__iter__ and not type(loader).__module__.startswith("torchdata"):
        return False  # who knows which batches it hands on
    sampler, batches = _sampler(loader), loader.batch_sampler
    plain = type(batches) is BatchSampler or is_lightnings(type(batches).__module__)
    if type(sampler) is RandomSampler:
        return plain and not sampler.replacement and sampler.num_samples >= len(sampler.data_source)
    if type(sampler) is SequentialSampler:
        return plain and not getattr(batches, "drop_last", False)
    return plain and isinstance(sampler, (DistributedSampler, SubsetRandomSampler))


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that split the model: ranks visit different examples, and sharded layers would wait for ever.

    Raises:
        MisconfigurationException: For anything but one device, data-parallel training, and FSDP2, and for processes
            that torch does not know of, or others than the trainer's.
    """
    strategy, name, known = trainer.strategy, type(trainer.strategy).__name__, distributed.world_size()
    if is_a(strategy, "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        check_split(strategy)
    elif not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise MisconfigurationException(
            f'InfluenceAudit does not support {name}, and knows one device, DDP, and FSDP2. Use `strategy="ddp"`, or '
            f"{AFTERWARDS}."
        )
    if trainer.world_size != known:
        raise MisconfigurationException(
            f"the trainer's {name} trains with {trainer.world_size} processes, and torch.distributed knows of {known} "
            "here, with which the audit would be shared. End a process group that is not the trainer's before `fit` "
            f"(`torch.distributed.destroy_process_group()`), or {AFTERWARDS}."
        )


def is_dry_run(trainer: Trainer) -> bool:
    """Tell whether this is a ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_last_epoch(trainer: Trainer) -> bool:
    """Tell whether training ends with this epoch, as far as can be known at its end."""
    epochs, steps = trainer.current_epoch + 1, trainer.global_step
    stops = trainer.should_stop and epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
    if stops or epochs == trainer.max_epochs:
        return True
    return 0 <= trainer.max_steps <= trainer.global_step


def expected_epochs(trainer: Trainer) -> tuple[int, int | None]:
    """Return how many epochs training will have, at the end of one of them, and how many at most.

    The same number if that is known. Training that a callback may end early, or nothing known, is expected to have as
    many as the next power of two.
    """
    ended, most = trainer.current_epoch + 1, trainer.max_epochs
    limits = [most] if most is not None and most > 0 else []
    if trainer.max_steps > 0 and trainer.global_step:
        limits.append(math.ceil(trainer.max_steps * ended / trainer.global_step))
    last = min(limits, default=None)
    early = any(is_a(each, kind) for each in callbacks_of(trainer) for kind in ("EarlyStopping", "Timer"))
    if last is not None and not early:
        return max(last, ended), last
    guess = 1 << ended.bit_length()
    return guess if last is None else max(ended, min(guess, last)), last


def has_loss_scaler(trainer: Trainer) -> bool:
    """Tell whether losses are scaled before their backward pass (``16-mixed``)."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


def loss_scale(trainer: Trainer) -> float:
    """Return what mixed precision multiplies losses with before their backward pass."""
    plugin: Any = trainer.precision_plugin
    return float(plugin.scaler.get_scale()) if has_loss_scaler(trainer) else 1.0


def real_loggers(trainer: Trainer) -> list[Any]:
    """Return the loggers that write something (Lightning puts dummies in place during a dry run)."""
    return [logger for logger in trainer.loggers if not is_a(logger, "DummyLogger")]


@contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """Make extra passes of the whole model, and leave the trainer alone; to be entered by all processes."""
    with whole(trainer.lightning_module), _left_alone(trainer):
        yield


@contextmanager
def _left_alone(trainer: Trainer) -> Iterator[None]:
    """Leave the trainer alone in an extra pass, whatever ``training_step`` does to it.

    What it writes to ``self.logger`` is kept out of the user's logs; learning rates, schedulers and the user's own
    callbacks are put back.
    """
    loggers = trainer.loggers
    try:
        trainer.loggers = [dummy_logger(trainer) for _ in loggers]
        with kept(trainer.lightning_module, list(_belongings(trainer))):
            yield
    finally:
        trainer.loggers = loggers


def _belongings(trainer: Trainer) -> Iterator[Found]:
    """Yield what a step can reach by its trainer, and may change with good reason."""
    yield from shallow("trainer", vars(trainer))  # `should_stop`, a counter
    for optimizer in trainer.optimizers:
        for number, group in enumerate(inner(optimizer).param_groups):
            yield from shallow(f"optimizer.param_groups[{number}]", group)
    for config in trainer.lr_scheduler_configs:
        for scheduler in (config.scheduler, *getattr(config.scheduler, "_schedulers", ())):
            yield from shallow(type(scheduler).__name__, vars(scheduler))
    for callback in callbacks_of(trainer):
        own = not any(kind.__module__.startswith("lightning_influence.") for kind in type(callback).__mro__)
        if own and is_users(type(callback).__module__):
            yield from shallow(type(callback).__name__, vars(callback))


def set_up_validation(trainer: Trainer) -> None:
    """Load the validation data of a run that ends before its first validation."""
    if not trainer.enable_validation or trainer.val_dataloaders is not None:
        return
    trainer.validating = True
    try:
        with isolated_rng():
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    finally:
        trainer.training = True


def validation_queries(trainer: Trainer, gradients: ExampleGradients) -> list[tuple[ExampleGradients, list[int]]]:
    """Return the validation data as queries, if there are any whose examples can be visited again."""
    queries = []
    loaders: Any = [] if trainer.val_dataloaders is None else [loader for _, loader in leaves(trainer.val_dataloaders)]
    for loader, batches in zip(loaders, trainer.num_val_batches, strict=False):
        try:
            with together():
                source, drawn = query_examples(loader, int(batches) if math.isfinite(batches) else None)
        except Exception as error:  # a data set may raise anything once its files are gone
            rank_zero_warn(f"validation data are left out of the influence audit (no harm column): {error!r}")
            continue
        if not isinstance(source, StreamSource) and batches < length_of(loader):
            drawn = drawn[: int(batches) * source.batch_size * trainer.world_size]
        if drawn:
            queries.append((gradients.on(source), drawn))
    return queries


def query_examples(loader: Any, batches: int | None = None) -> tuple[ExampleSource, list[int]]:
    """Return the examples of a loader that are asked about, a stream's as it hands them out, and which those are.

    Args:
        loader: The loader.
        batches: Of a stream: how many are taken, None for all.

    Raises:
        DataError: If they can't be visited.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
        source = ExampleSource.from_loader(loader)
        if len(source):
            source.repeatable(range(len(source)))
        _ = source.collation
        return source, drawn_from(loader, len(source))
    if distributed.world_size() > 1:
        raise DataError(f"{type(loader.dataset).__name__} is a stream, of which each process may have another part.")
    stream = StreamSource(loader, None)
    return stream, stream.counted(math.inf if batches is None else batches)


def label_names(dataset: Any) -> list[str] | None:
    """Return the class names that a dataset carries (``classes``, as in torchvision), looking through subsets."""
    while dataset is not None:
        names = getattr(dataset, "classes", None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return list(names)
        dataset = getattr(dataset, "dataset", None)
    return None
