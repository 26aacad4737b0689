"""What every test starts from, and how it has to leave torch."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import random
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_influence.audit import ranking
from lightning_influence.audit.belief import LabelBeliefs

# Every Trainer asks which packages are installed and reads their files anew.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# What is synced survives a power cut, which no test is about: an audit waits two dozen times for the disk.
os.fsync = lambda descriptor: None

# Sums that are split over more threads round differently: no more threads anywhere than CI has.
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is imported by the tests, nearly a million objects, out of every search for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _torch_is_left_as_found() -> Iterator[None]:
    """A tap that is not removed or a switched mode would make later tests fail, not the guilty one."""
    before = _torch_state()
    yield
    assert _torch_state() == before, "the test changed torch for the tests after it"


def _torch_state() -> dict[str, object]:
    return {
        "torch function modes": torch._C._len_torch_function_stack(),
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random labels are none that a run can tell anything of: here it does."""
    found = ranking.believe

    def believe(*arguments: Any) -> Any:
        return LabelBeliefs("told", noise_rate=0.2), found(*arguments)[1]

    monkeypatch.setattr(ranking, "believe", believe)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits that do not compare gradients with autograd before training, unless they are told to.

    That takes a third of a small audit and changes no number. For files about what happens later in a run, whatever the
    model; the models and data that it may complain of are tried with it.
    """
    from lightning_influence import InfluenceAudit

    monkeypatch.setitem(InfluenceAudit.__init__.__kwdefaults__, "verify", False)
