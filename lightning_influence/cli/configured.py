"""From the YAML of a training to model, data and audit, by Lightning's own command line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_influence.callbacks import InfluenceAudit
from lightning_influence.cli.refusals import in_one_sentence, raising
from lightning_influence.core.errors import short

_AUDIT = "lightning_influence.InfluenceAudit"
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# What a saved configuration of `fit` holds beside the parts of a LightningCLI.
_OF_FIT = ("ckpt_path", "weights_only", "train_dataloaders", "val_dataloaders", "datamodule")
_PARTS = ("model", "data", "trainer", "seed_everything", "optimizer", "lr_scheduler")
_OF_CLASS = ("class_path", "init_args", "dict_kwargs")
# What matters of a trainer that trains nothing.
_OF_TRAINER = ("precision", "limit_val_batches", "default_root_dir", "deterministic", "plugins", "enable_progress_bar")


@dataclass(frozen=True)
class Configured:
    """What a YAML stands for.

    Attributes:
        audit: The ``InfluenceAudit`` among the callbacks, or one of its own.
        model: The model.
        data: The data module; None if the model has loaders itself.
        trainer: On one device, without loggers.
    """

    audit: InfluenceAudit
    model: Any
    data: Any
    trainer: Any

    @classmethod
    def read(
        cls,
        path: str,
        overrides: Sequence[str],
        arguments: Mapping[str, str],
        *,
        model: str | None = None,
        data: str | None = None,
        cli: str | None = None,
    ) -> Configured:
        """Make everything.

        Args:
            path: Of the YAML.
            overrides: ``["--data.batch_size", "64"]``.
            arguments: Of ``InfluenceAudit``, over those of the YAML.
            model: Class of the model, if the YAML has only its arguments.
            data: Class of the data module, too.
            cli: Class of a ``LightningCLI`` with arguments of its own.

        Raises:
            ValueError: If the YAML can't be read, or names no model or data.
            UsageError: If it has an argument or a value that there is none of.
            ImportError: If jsonargparse is missing, or a class is.
        """
        if importlib.util.find_spec("jsonargparse") is None:
            raise ImportError(
                "`lightning-influence audit` reads configurations by jsonargparse: "
                "`pip install 'lightning-influence[cli]'`."
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where `python train.py` has found its modules
        config = _section(_loaded(path))
        own = None if cli is None else _imported(cli)
        kinds: dict[str, Any] = {}
        fixed: dict[str, Any] = {}
        for part, given, keyword in (("model", model, "model_class"), ("data", data, "datamodule_class")):
            named = _names_class(config.get(part))
            if own is not None and given is not None and not named:
                # As its own main has it: links between arguments have other names where classes can be chosen.
                kinds[part] = fixed[keyword] = _imported(given)
            else:
                config[part] = _with_class(config.get(part), None if named else given)
        _override(config, overrides, plain=kinds)
        kinds |= {part: _class_of(config[part]) for part in ("model", "data") if part not in kinds}
        if (kind := kinds["model"]) is None:
            raise ValueError(
                f"{path} names no class of the model (`class_path`), as it is of a LightningCLI for one model; pass "
                "--model package.module.Class."
            )
        package = _package_of(kind)
        if kinds["data"] is None:
            _check_loaders(path, config.get("data"), kind, package)
        config["trainer"] = _trainer(config.get("trainer"), arguments, overrides)
        ignored = [name for name in config if name not in (*_PARTS, *_OF_FIT) and own is None]
        if ignored:
            print(
                f"{path}: left out what Lightning's own command line does not know ({', '.join(ignored)}); "
                "--cli package.module.Class names the one that does.",
                file=sys.stderr,
            )
        lightning_cli = importlib.import_module(f"{package}.cli").LightningCLI
        parts = {name: value for name, value in config.items() if name not in (*_OF_FIT, *ignored)}
        with _no_arguments(), in_one_sentence(path):
            made = raising(own or lightning_cli)(
                **fixed,
                subclass_mode_model="model_class" not in fixed,
                subclass_mode_data="datamodule_class" not in fixed,
                save_config_callback=None,
                run=False,
                args={name: value for name, value in parts.items() if value is not None},
            )
        audits = [each for each in made.trainer.callbacks if isinstance(each, InfluenceAudit)]
        return cls(audits[0], made.model, made.datamodule, made.trainer)


@contextmanager
def _no_arguments() -> Iterator[None]:
    """Hide the command line, which Lightning would warn of beside a configuration."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = before


def _loaded(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"the configuration {path} can't be read: {told}. Expected the YAML of a LightningCLI, such as the "
            "config.yaml that it saves beside its logs."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {short(config)}; expected the YAML of a LightningCLI: a mapping with `model`.")
    return config


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """Return what is about `fit`, with or without a level of that name."""
    fit = config.get("fit")
    if not isinstance(fit, dict):
        return dict(config)
    rest = {name: value for name, value in config.items() if not isinstance(value, dict)}
    return {**rest, **fit}


def _with_class(value: Any, kind: str | None) -> Any:
    """Return a part of the configuration with its class: as it has one itself, or given."""
    if isinstance(value, str):
        return {"class_path": value}
    return value if kind is None else {"class_path": kind, "init_args": dict(value or {})}


def _names_class(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "class_path" in value)


def _override(config: dict[str, Any], overrides: Sequence[str], plain: Collection[str]) -> None:
    """Put `--part.name value` into the configuration; ``plain`` parts hold the arguments of a class themselves."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name or not (equals or words):
            raise ValueError(f"{word!r}: expected --part.name value, such as --data.batch_size 64.")
        text = text if equals else words.pop(0)
        part, *keys = name.split(".")
        target = config[part] = config.get(part) or {}
        if part in ("model", "data") and part not in plain and keys[0] not in _OF_CLASS:
            keys.insert(0, "init_args")
        for key in keys[:-1]:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        target[keys[-1]] = yaml.safe_load(text)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"{path} can't be imported ({error}); run the command where the training was run, or set PYTHONPATH."
        ) from error


def _class_of(value: Any) -> Any:
    return _imported(value["class_path"]) if isinstance(value, Mapping) and "class_path" in value else None


def _package_of(kind: Any) -> str:
    """Return the package of Lightning that a class of a model is of."""
    for base in getattr(kind, "__mro__", ()):
        for package in _PACKAGES:
            if base.__module__.startswith(f"{package}."):
                return package
    raise ValueError(f"the model is {short(kind)}; expected the class of a LightningModule.")


def _check_loaders(path: str, arguments: Any, kind: Any, package: str) -> None:
    """Raise ``ValueError`` for a configuration without a data module, of a model without loaders."""
    if arguments:
        raise ValueError(
            f"{path} names no class of the data (`class_path`), only its arguments; pass --data package.module.Class."
        )
    base = importlib.import_module(package).LightningModule
    if kind.train_dataloader is base.train_dataloader:
        raise ValueError(
            f"{path} names no data, and {kind.__name__} has no `train_dataloader`; pass --data package.module.Class, "
            "the LightningDataModule of the training."
        )


def _trainer(section: Any, arguments: Mapping[str, str], overrides: Sequence[str]) -> dict[str, Any]:
    """Return what is needed of a trainer, with the audit alone among its callbacks."""
    then = section if isinstance(section, Mapping) else {}
    kept = {name: then[name] for name in _OF_TRAINER if then.get(name) is not None}
    # Where it was trained need not be where it is audited.
    asked = {word.partition("=")[0].removeprefix("--trainer.") for word in overrides if word.startswith("--trainer.")}
    kept |= {name: then[name] for name in asked if name in then}
    if "accelerator" not in asked:
        kept["accelerator"] = "cpu" if then.get("accelerator") == "cpu" else "auto"
    callbacks = then.get("callbacks") or []
    given = [_with_class(each, None) for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    named = [each for each in given if isinstance(each, Mapping) and "class_path" in each]  # the others are left out
    audits = [each for each in named if str(each["class_path"]).rpartition(".")[2] == InfluenceAudit.__name__]
    audit: Mapping[str, Any] = audits[0] if audits else {"class_path": _AUDIT}
    audit = {**audit, "init_args": {**(audit.get("init_args") or {}), **_arguments(arguments)}}
    return {
        "devices": 1,
        "max_epochs": 1,
        **kept,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "callbacks": [audit],
    }


def _arguments(given: Mapping[str, str]) -> dict[str, Any]:
    told: dict[str, Any] = dict(given)
    if "damping" in told:
        told["damping"] = yaml.safe_load(told["damping"])
    if "layers" in told:
        told["layers"] = [each.strip() for each in told["layers"].split(",")]
    return told
