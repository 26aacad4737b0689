"""Random Trainers: training is bitwise left alone, and the audit's numbers are those of plain autograd.

Each draw is trained twice, with and without the audit, and all that could differ is compared. Then ``times_seen`` and
``loss_mean`` are compared with what the model noted itself, and the gradients of examples picked at random, TracIn,
self-influence and harm with autograd, one example at a time, on a copy of the trained model in float64.

Other draws than the usual: ``INFLUENCE_TRIALS_SEED=7 INFLUENCE_TRIALS=300 pytest tests/test_random_trainers.py``.
A failure prints its draw; ``pytest "tests/test_random_trainers.py::test_draw[17]"`` (with the same seed) repeats it.
"""

from __future__ import annotations

import functools
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import leftovers
from random_models import Model, never_drawn, parts
from random_trainers import OPTIONS, Draw, Fit, differing, draw, train
from test_callback_untouched import differences
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_influence import AuditReport, InfluenceAudit

SEED = int(os.environ.get("INFLUENCE_TRIALS_SEED", "0"))
COUNT = int(os.environ.get("INFLUENCE_TRIALS", "48"))
# This share has to be audited, 38 of the usual draws; the others may be refused, with a reason.
AUDITED = 50 / 64

# Rounding of sums of a few dozen terms, relative to the largest of them. In bfloat16 one digit is 0.4 % of a number.
TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 1e-4, "64-true": 1e-9, "bf16-true": 0.15}


# ------------------------------------------------------------------------------------------------------ the reference


class Reference:
    """One example at a time, in float64, in eval mode."""

    def __init__(self, fit: Fit, audited: list[int]) -> None:
        self.drawn, self.data = fit.model.draw, fit.data
        self.low = torch.bfloat16 if self.drawn.precision == "bf16-true" else None
        self.model = Model(self.drawn).double().eval()
        for parameter, trained in zip(self.model.parameters(), fit.model.parameters(), strict=True):
            parameter.requires_grad_(trained.requires_grad)
        self.at(fit.model.state_dict())
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.covered = expected_coverage(self.drawn, self.model)
        # The loss of the batch is the mean of the examples' own losses, whatever it divides by.
        weights = [float(self._shares(self.batch([n]))[1]) for n in audited]
        self.divisor = sum(weights) / len(weights)
        if self.drawn.loss == "ignore" and self.drawn.model != "tokens":
            self.divisor = 1.0  # an example without a label has no loss, and is none of those that the mean is over
        if self.drawn.loss == "sum":
            self.divisor = 1 / self.drawn.batch_size

    def at(self, weights: Mapping[str, Tensor]) -> Reference:
        """Load weights."""
        self.model.load_state_dict({name: value.double() for name, value in weights.items()})
        return self

    def batch(self, indices: list[int], held_out: bool = False) -> Any:
        collate = self.data.collate or default_collate
        return collate([(self.data.held_out if held_out else self.data.train)[n] for n in indices])

    def _shares(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y, _ = parts(batch)
        if x.is_floating_point():
            x = (x if self.low is None else x.to(self.low)).double()
        return self.model.shares(self.model(x), y)

    def loss(self, batch: Any) -> Tensor:
        """Own losses ``[n]``."""
        return self._shares(batch)[0] / self.divisor

    def gradient(self, batch: Any) -> dict[str, Tensor]:
        """Of the sum of the own losses."""
        parameters = dict(self.model.named_parameters())
        chosen = [parameters[name] for name in self.names]
        found = torch.autograd.grad(self.loss(batch).sum(), chosen, allow_unused=True, materialize_grads=True)
        return dict(zip(self.names, found, strict=True))

    def norm(self, batch: Any, rates: Mapping[str, float] | None = None) -> float:
        """Squared, over what is audited, each parameter with its rate."""
        found = self.gradient(batch)
        sums = {name: float(found[name].square().sum()) for name in self.covered}
        return sum(value * (1.0 if rates is None else rates.get(name, 0.0)) for name, value in sums.items())


def expected_coverage(drawn: Draw, model: nn.Module) -> list[str]:
    """Parameters that the audit has to cover."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if drawn.layers == "head":
        return [name for name in trained if name.startswith("head")]
    if drawn.layers == "glob":
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return [name for name in trained if name.rpartition(".")[0] in linear]
    return trained


# ---------------------------------------------------------------------------------------------------------- the trial


@dataclass(frozen=True)
class Outcome:
    """What a draw came to."""

    drawn: Draw
    problems: tuple[str, ...]
    refusal: str = ""
    checked: tuple[str, ...] = ()


@functools.cache
def trial(number: int, seed: int = SEED) -> Outcome:
    """Train a draw twice and compare."""
    drawn = draw(seed, number)
    with tempfile.TemporaryDirectory() as directory:
        without = train(drawn, Path(directory, "without"), False)
        with_audit = train(drawn, Path(directory, "with"), True)
        problems = [f"left behind: {leftovers(with_audit.trainer, with_audit.model)}"]
        problems = [] if problems == ["left behind: []"] else problems
        if with_audit.refusal is not None:
            return Outcome(drawn, (*problems, *_unhelpful(with_audit)), str(with_audit.refusal))
        problems += [f"training differs: {where[:200]}" for where in differences(without.trace, with_audit.trace)]
        report = with_audit.report
        if report is None or report.status != "complete":
            said = "\n".join(with_audit.said)[-1500:]
            return Outcome(drawn, (*problems, f"no complete audit: {report and report.manifest} {said}"))
        checks = dict(_checks(with_audit, report))
        wrong = [f"{name}: {problem}" for name, found in checks.items() for problem in found]
        if wrong:
            wrong.append(f"notes: {report.manifest['notes']}")
        return Outcome(drawn, (*problems, *wrong), checked=tuple(checks))


def _unhelpful(fit: Fit) -> Iterator[str]:
    """A refusal comes before the first step, says what it is about and what to do."""
    message = str(fit.refusal)
    if fit.trainer.global_step or fit.model.diary:
        yield f"refused after {fit.trainer.global_step} steps, the model has noted {len(fit.model.diary)}: {message}"
    if len(message) < 60 or not any(word in message for word in ("`", "pass ", "expected", "Pass ", "Set ")):
        yield f"this refusal helps nobody: {fit.refusal!r}"


def _checks(fit: Fit, report: AuditReport) -> Iterator[tuple[str, list[str]]]:
    """Yield what is compared, and where it is wrong."""
    drawn, columns = fit.model.draw, report.columns
    position = fit.data.positions
    audited = columns["index"].tolist()
    row = {index: place for place, index in enumerate(audited)}
    picked = random.Random(drawn.number).sample(audited, 3)
    tolerance = TOLERANCES[drawn.precision]

    def compare(name: str, expected: Mapping[int, float], rough: float = tolerance) -> list[str]:
        if name not in columns:
            return ["there is no such column"]
        largest = max([abs(value) for value in expected.values()], default=0.0)
        found = {index: float(columns[name][row[index]]) for index in expected}
        return [
            f"example {index}: {found[index]:.8g}, expected {value:.8g}"
            for index, value in expected.items()
            if not abs(found[index] - value) <= rough * max(largest, 1e-6)
        ]

    # What training saw: an example that a batch repeats counts once.
    losses: dict[int, list[float]] = {index: [] for index in audited}
    strangers = set()
    for numbers, own in fit.model.diary:
        for place, number in enumerate(numbers):
            index = position[number]
            if index not in losses:
                strangers.add(index)
            elif number not in numbers[:place] and own[place] == own[place]:
                losses[index].append(own[place])
    never = [f"trained on, but not audited: {sorted(strangers)}"] if strangers else []
    if strangers := never_drawn(drawn).intersection(audited):
        never.append(f"audited, though the sampler never draws them: {sorted(strangers)}")
    yield "examples", never
    yield "times_seen", compare("times_seen", {index: len(values) for index, values in losses.items()}, 0.0)
    rough = max(tolerance, 0.02 if drawn.precision == "bf16-mixed" else 0.0)
    seen = {index: float(np.mean(values)) for index, values in losses.items() if values}
    yield "loss_mean", compare("loss_mean", seen, rough)

    if drawn.augment is not None:
        # Nobody else can draw the augmentation that the audit has drawn for an example.
        yield from _in_flight(fit, picked, compare, audited)
        return
    reference = Reference(fit, audited)
    own = {n: float(reference.loss(reference.batch([n]))) for n in picked}
    if drawn.loss == "sum" and "loss" in columns:
        # A sum may be taken as it is, or as the mean that it is over the batch size; then all numbers are of that one.
        loudest = max(own, key=lambda n: own[n])
        if float(columns["loss"][row[loudest]]) < 1.01 * own[loudest] * reference.divisor:
            own = {n: value * reference.divisor for n, value in own.items()}
            reference.divisor = 1.0
    said = report.manifest["coverage"]["covered"]
    covered = sorted(name for name in reference.names if not _is_uncovered(name, report))
    yield "coverage", [] if covered == sorted(reference.covered) else [f"{covered}, {said}"]
    if "loss" in columns or not any("no known loss call" in note for note in report.manifest["notes"]):
        yield "loss", compare("loss", own)
    norms = {n: reference.norm(reference.batch([n])) for n in picked}
    yield "grad_norm_squared", compare("grad_norm_squared", norms)
    damping = float(drawn.damping) if isinstance(drawn.damping, float) else None
    if drawn.curvature == "identity":
        scale = 1 + (damping or 0.0) if drawn.damping != "trainer" else None
        if scale is not None:
            yield "self_influence", compare("self_influence", {n: norms[n] / scale for n in picked})
            # A fit that ends before its first validation has not asked for the validation data.
            if drawn.loss != "sum" and fit.trainer.val_dataloaders:
                yield "harm", compare("harm", _harm(reference, picked, scale), 5 * tolerance)
    if drawn.curvature == "diagonal" and drawn.fisher == "empirical" and damping and drawn.factor_examples is None:
        yield "self_influence", compare("self_influence", _diagonal(reference, picked, audited, damping), 5 * tolerance)
    # Where batches are limited, the mean weight of the examples seen so far changes from checkpoint to checkpoint.
    weighty = drawn.loss == "weighted" or (drawn.loss == "ignore" and drawn.model == "tokens")
    steady = not (weighty and drawn.limit_train_batches)
    # A step along a sum is one along the mean, as many times longer as the batch has examples.
    longer = drawn.batch_size if drawn.loss == "sum" and reference.divisor == 1 else 1
    if drawn.tracin in ("epoch", "every 2 epochs") and _is_plain_descent(drawn) and steady:
        steps = [step for step, *_ in fit.watcher.ends]
        kept = report.manifest["tracin_steps"]
        yield "tracin_steps", [] if steps == kept else [f"{kept}, expected {steps}"]
        always, since_known = dict.fromkeys(picked, 0.0), dict.fromkeys(picked, 0.0)
        for _, batches, weights, moved in fit.watcher.ends:
            reference.at(weights)
            seen_by = {position[n] for ns, _ in fit.model.diary[:batches] for n in ns}
            for n in picked:
                always[n] += (increment := longer * reference.norm(reference.batch([n]), moved))
                since_known[n] += increment * (n in seen_by)
        wrong = compare("tracin", always)
        if drawn.limit_train_batches is not None:
            # Where batches are limited, an example may count from the first checkpoint that knows of it.
            wrong = min(wrong, compare("tracin", since_known), key=len)
        yield "tracin", wrong
    yield from _in_flight(fit, picked, compare, audited)


def _in_flight(fit: Fit, picked: list[int], compare: Any, audited: list[int]) -> Iterator[tuple[str, list[str]]]:
    """TracIn at every step, where training computes what plain autograd can: no noise and no rounding of its own."""
    drawn = fit.model.draw
    noisy = drawn.dropout > 0 or (drawn.model == "cnn" and drawn.frozen != "norm")
    exact = drawn.precision in ("32-true", "64-true") and drawn.loss not in ("weighted", "ignore", "sum")
    if drawn.tracin != "step" or not _is_plain_descent(drawn) or noisy or not exact or drawn.model == "gru":
        return
    reference, expected = Reference(fit, audited), dict.fromkeys(picked, 0.0)
    for visit in fit.watcher.visits:
        x, y, numbers = parts(visit.batch)
        for place, number in enumerate(numbers.tolist()):
            index = fit.data.positions[number]
            if index in expected:
                example = (x[place : place + 1], y[place : place + 1], numbers[place : place + 1])
                expected[index] += reference.at(visit.weights).norm(example, visit.rates)
    yield "tracin in flight", compare("tracin", expected)


def _is_plain_descent(drawn: Draw) -> bool:
    # One cycle may cycle the momentum, too: what a step sums up then has no closed form.
    return drawn.optimizer in ("sgd", "momentum", "nesterov", "decay", "groups")


def _is_uncovered(name: str, report: AuditReport) -> bool:
    coverage = report.manifest["coverage"]
    listed = {f"{layer}.{role}".lstrip(".") for layer, roles in coverage["covered"].items() for role in roles}
    return name not in listed and not any(
        name == layer or name in roles for layer, roles in coverage["covered"].items()
    )


def _harm(reference: Reference, picked: list[int], scale: float) -> dict[int, float]:
    everybody = list(range(4 if reference.drawn.limit_val_batches else len(reference.data.held_out)))
    sums = [reference.gradient(reference.batch([n], held_out=True)) for n in everybody]
    mean = {name: sum(found[name] for found in sums) / len(everybody) for name in reference.covered}
    result = {}
    for n in picked:
        own = reference.gradient(reference.batch([n]))
        result[n] = -sum(float((own[name] * mean[name]).sum()) for name in mean) / scale
    return result


def _diagonal(reference: Reference, picked: list[int], audited: list[int], damping: float) -> dict[int, float]:
    found = {n: reference.gradient(reference.batch([n])) for n in audited}
    mean = {name: sum(g[name].square() for g in found.values()) / len(audited) for name in reference.covered}
    return {n: sum(float((found[n][k].square() / (mean[k] + damping)).sum()) for k in mean) for n in picked}


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("number", range(COUNT))
def test_draw(number: int) -> None:
    outcome = trial(number)
    told = f"draw {number} of seed {SEED}: {differing(outcome.drawn)}\n{outcome.drawn}"
    assert not outcome.problems, told + "\n" + "\n".join(outcome.problems)


def test_most_draws_are_audited_and_compared() -> None:
    """A generator that is refused, or compares nothing, would show nothing."""
    outcomes = [trial(number) for number in range(COUNT)]
    refused = [f"draw {o.drawn.number}: {o.refusal[:200]}" for o in outcomes if o.refusal]
    assert len(refused) <= (1 - AUDITED) * COUNT, "\n".join(refused)
    compared = Counter(name for outcome in outcomes for name in outcome.checked)
    assert set(compared) >= {"times_seen", "loss_mean", "grad_norm_squared", "loss", "self_influence", "tracin", "harm"}
    assert min(compared.values()) >= COUNT // 30, compared


def test_every_option_is_drawn() -> None:
    drawn = [draw(SEED, number) for number in range(max(48, COUNT))]
    for name, options in OPTIONS.items():
        assert {getattr(each, name) for each in drawn} >= set(options), name


def test_a_draw_depends_on_its_seed_and_number_alone() -> None:
    assert draw(3, 5) == draw(3, 5) != draw(4, 5)


def test_the_comparison_notices_a_callback_that_draws_a_number(tmp_path: Path) -> None:
    class Clumsy(InfluenceAudit):
        def on_train_epoch_end(self, *_: Any) -> None:
            torch.rand(())

    drawn = draw(0, 0)
    without = train(drawn, tmp_path / "without", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("random_trainers.make_audit", lambda *_: Clumsy())
        clumsy = train(drawn, tmp_path / "with", True)
    assert any("random streams" in where for where in differences(without.trace, clumsy.trace))
