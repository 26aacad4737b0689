"""How close removal and label repair by one Newton step come to retraining without the examples.

Ridge and logistic regression have one minimum, so there is an exact answer. Networks have none: the gold standard is to
train again from the same start, with the same order of batches, the removed examples left out of theirs. Several starts
are trained, all at once, and every removal is of the same examples in all of them. Training is chaotic, so the tables
say how far from each other two trainings end that differ in the order of batches only, and how well the changes of one
half of the starts agree with those of the other.

    make unlearning                             both networks, a few minutes on 2 cores
    python benchmarks/unlearning.py --only mlp
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lds_methods import Setting, digits, task
from retraining import Data, forward, load, losses, train
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature import Damping, IndefiniteError

SIZES = (1, 10, 100)
FLIPS = (10, 100)
L2 = 0.01

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A rung of the ladder with its damping rule.

    Attributes:
        damping: Of a setting.
        leverage: Whether to take the removed examples out of the curvature.
    """

    title: str
    curvature: Any
    damping: Callable[[Setting], Damping]
    leverage: tuple[bool, ...] = (False, True)


def _relative(setting: Setting) -> Damping:
    return "relative"


def _trainer(setting: Setting) -> float:
    return setting.trainer_damping


METHODS = [
    Method("K-FAC, relative damping", "kfac", _relative, (False,)),
    Method("EK-FAC, relative damping", "ekfac", _relative, (False,)),
    Method("EK-FAC, trainer damping", "ekfac", _trainer),
    Method("block GGN, trainer damping", "block_ggn", _trainer),
    Method("GGN, trainer damping", "ggn", _trainer),
    Method("Hessian, 3 x trainer damping", "hessian", lambda setting: 3 * _trainer(setting)),
]


# ------------------------------------------------------------------------------------------------- measuring


def flat(parameters: Parameters) -> Tensor:
    """Return all parameters of every model, ``[m, p]``."""
    return torch.cat([value.flatten(1) for value in parameters.values()], 1).double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def mean_correlation(a: Tensor, b: Tensor) -> float:
    """Return the mean over models of the correlation over queries, both ``[m, q]``."""
    return sum(correlation(x, y) for x, y in zip(a, b, strict=True)) / len(a)


@dataclass(frozen=True)
class Outcome:
    """What some models do, by model.

    Attributes:
        theta: ``[m, p]``.
        touched: Mean loss on the examples removed or repaired, ``[m]``.
        queries: Loss on each test example, ``[m, q]``.
        accuracy: On the test examples, ``[m]``.
    """

    theta: Tensor
    touched: Tensor
    queries: Tensor
    accuracy: Tensor

    @classmethod
    def of(cls, setting: Setting, parameters: Parameters, touched: Data, test: Data) -> Outcome:
        """Measure models of a setting."""
        models = len(next(iter(parameters.values())))
        with torch.no_grad():
            logits = forward(setting.net, parameters, test[0].expand(models, *test[0].shape))
        return cls(
            flat(parameters),
            losses(setting.net, parameters, *touched).mean(1),
            losses(setting.net, parameters, *test),
            (logits.argmax(-1) == test[1]).double().mean(1),
        )


HEADER = (
    "| examples | method | loss on them: before | after | retrained | test accuracy: before | after | retrained | "
    "distance | r | r of the means |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(what: str, method: str, before: Outcome, after: Outcome, again: Outcome) -> str:
    """Compare changed models with retrained ones."""
    cells = [f"{float(each.touched.mean()):.3f}" for each in (before, after, again)]
    cells += [f"{float(each.accuracy.mean()):.1%}" for each in (before, after, again)]
    ratio = (after.theta - again.theta).norm(dim=1) / (before.theta - again.theta).norm(dim=1)
    made, true = after.queries - before.queries, again.queries - before.queries
    if bool(made.abs().max() > 0):
        agreement = [f"{mean_correlation(made, true):.2f}", f"{correlation(made.mean(0), true.mean(0)):.2f}"]
    else:
        agreement = ["", ""]
    return "| " + " | ".join([what, method, *cells, f"{float(ratio.mean()):.2f}", *agreement]) + " |"


# -------------------------------------------------------------------------------------------------- networks


@dataclass
class Removals:
    """One setting, several starts: the models on all the data, and what is removed from them."""

    setting: Setting
    test: Data
    seeds: int

    @property
    def everything(self) -> Tensor:
        """Every example, for every model."""
        return torch.arange(self.setting.examples).expand(self.seeds, -1)

    def trained(self, labels: Tensor, removed: Sequence[int] = (), order: int = 0) -> Parameters:
        """Train every start without some examples; the order of the others stays."""
        weights = torch.ones(self.seeds, self.setting.examples)
        weights[:, list(removed)] = 0
        orders = [1000 + seed + 500 * order for seed in range(self.seeds)]
        return train(
            self.setting.net,
            self.setting.data[0],
            labels,
            self.everything,
            range(self.seeds),
            self.setting.recipe,
            weights=weights,
            order_seeds=orders,
        )

    def fitted(self, full: Parameters, labels: Tensor, method: Method) -> Iterator[Influence]:
        """Yield what removes examples from every model; ``setting.net`` is that model meanwhile."""
        for model in range(self.seeds):
            load(self.setting.net, full, model)
            yield self.setting.influence(labels=labels).fit(
                method.curvature,
                fisher="exact",
                factor_examples=None,
                damping=method.damping(self.setting),
                solver="dense" if method.curvature in ("ggn", "hessian") else "auto",
            )

    def stacked(self, models: list[nn.Module]) -> Parameters:
        """Put the models' parameters together."""
        return {
            name: torch.stack([dict(each.named_parameters())[name].detach() for each in models])
            for name, _ in self.setting.net.named_parameters()
        }

    def most_influential(self, full: Parameters) -> Tensor:
        """Return the examples by EK-FAC self-influence, the mean over starts, largest first."""
        total = torch.zeros(self.setting.examples, dtype=torch.float64)
        for influence in self.fitted(full, self.setting.data[1], METHODS[1]):
            total += influence.self_influence()
        return total.argsort(descending=True)


def halves(change: Tensor) -> float:
    """Return how well the changes of one half of the starts agree with those of the other, ``[m, q]``."""
    half = len(change) // 2
    return correlation(change[:half].mean(0), change[half:].mean(0))


def removals(setting: Setting, test: Data, seeds: int, methods: Sequence[Method]) -> Iterator[str]:
    """Yield the lines about removal."""
    both = Removals(setting, test, seeds)
    inputs, labels = setting.data
    full, other = both.trained(labels), both.trained(labels, order=1)
    floor = (flat(full) - flat(other)).norm(dim=1) / flat(full).norm(dim=1)
    yield (
        f"{setting.examples:,} training examples, {len(test[1])} test examples, {seeds} starts. Two trainings that "
        f"differ in the order of batches only end {float(floor.mean()):.0%} of the length of the weights apart.\n"
    )
    yield HEADER
    generator = torch.Generator().manual_seed(0)
    orders = {
        "random": torch.randperm(setting.examples, generator=generator),
        "most self-influential": both.most_influential(full),
    }
    groups = {(kind, size): order[:size].tolist() for kind, order in orders.items() for size in SIZES}
    decay = setting.recipe.weight_decay
    lines: dict[tuple[str, int], list[str]] = {}
    measured: dict[tuple[str, int], tuple[Outcome, Outcome]] = {}
    for (kind, size), removed in groups.items():
        touched = inputs[removed], labels[removed]
        before, again = (Outcome.of(setting, each, touched, test) for each in (full, both.trained(labels, removed)))
        measured[kind, size] = before, again
        change = again.queries - before.queries
        moved = (before.theta - again.theta).norm(dim=1) / before.theta.norm(dim=1)
        name = f"nothing done (retraining moves {float(moved.mean()):.0%}; its halves agree {halves(change):.2f})"
        lines[kind, size] = [line(f"{size} {kind}", name, before, before, again)]
        reordered = Outcome.of(setting, other, touched, test)
        lines[kind, size].append(line(f"{size} {kind}", "trained on all, in another order", before, reordered, again))
    for method in methods:
        results: dict[tuple[str, int, bool], list[nn.Module] | str] = {}
        for influence in both.fitted(full, labels, method):
            for key, removed in groups.items():
                for leverage in method.leverage:
                    done = results.setdefault((*key, leverage), [])
                    if isinstance(done, str):
                        continue
                    try:
                        update = influence.remove(removed, leverage=leverage, weight_decay=decay)
                    except IndefiniteError:
                        results[(*key, leverage)] = "not positive definite"
                        continue
                    done.append(update.applied_to_copy(setting.net))
        for (kind, size, leverage), done in results.items():
            title = method.title + (", leverage" if leverage else "")
            before, again = measured[kind, size]
            if isinstance(done, str):
                lines[kind, size].append(f"| {size} {kind} | {title} | {done} | | | | | | | | |")
                continue
            removed = groups[kind, size]
            after = Outcome.of(setting, both.stacked(done), (inputs[removed], labels[removed]), test)
            lines[kind, size].append(line(f"{size} {kind}", title, before, after, again))
    for key in groups:
        yield from lines[key]


def repairs(setting: Setting, test: Data, seeds: int, methods: Sequence[Method]) -> Iterator[str]:
    """Yield the lines about label repair."""
    yield HEADER
    both = Removals(setting, test, seeds)
    inputs, labels = setting.data
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(setting.examples, generator=generator)
    clean = both.trained(labels)
    for size in FLIPS:
        flipped = order[:size]
        noisy = labels.clone()
        noisy[flipped] = (noisy[flipped] + torch.randint(1, 10, (size,), generator=generator)) % 10
        full = both.trained(noisy)
        touched = inputs[flipped], labels[flipped]
        before, again = (Outcome.of(setting, each, touched, test) for each in (full, clean))
        yield line(f"{size} flipped", "nothing done", before, before, again)
        for method in methods:
            done: list[nn.Module] = []
            try:
                for influence in both.fitted(full, noisy, method):
                    update = influence.repair(flipped, labels[flipped])
                    done.append(update.applied_to_copy(setting.net))
            except IndefiniteError:
                yield f"| {size} flipped | {method.title} | not positive definite | | | | | | | | |"
                continue
            after = Outcome.of(setting, both.stacked(done), touched, test)
            yield line(f"{size} flipped", method.title, before, after, again)


# ------------------------------------------------------------------------------- where there is one minimum


def regressions() -> Iterator[str]:
    """Yield the lines about ridge and logistic regression: Newton with leverage against the minimum without them."""
    yield "| model | examples | error without leverage | error with leverage | r of the changes of test losses |"
    yield "|---|---|---|---|---|"
    pixels, digit = load_digits(return_X_y=True)
    x, y = load_diabetes(return_X_y=True)
    shuffled = torch.randperm(len(digit), generator=torch.Generator().manual_seed(0))
    problems: list[tuple[str, Tensor, Tensor, int, nn.Module, Any, Any]] = [
        ("ridge, diabetes", torch.from_numpy(x) * 21, torch.from_numpy(y) / 80, 342, nn.Linear(10, 1), squares, "ggn"),
        (
            "logistic, digits",
            torch.from_numpy(pixels)[shuffled] / 16,
            torch.from_numpy(digit).long()[shuffled],
            1400,
            nn.Linear(64, 10),
            task,
            "hessian",
        ),
    ]
    for title, inputs, targets, count, net, loss, curvature in problems:
        data, test = (inputs[:count], targets[:count]), (inputs[count:], targets[count:])
        full = minimised(net.double(), loss, data)
        influence = Influence(full, loss, TensorDataset(*data), batch_size=256)
        start, before = vector(full), each_loss(full, loss, test)
        for size in SIZES:
            removed = list(range(size))
            best = minimised(net, loss, (data[0][size:], data[1][size:]))
            fitted = influence.fit(curvature, fisher="exact", factor_examples=None, damping=L2 * (count - size) / count)
            way, errors, changes = vector(best) - start, [], torch.zeros(0)
            for leverage in (False, True):
                made = fitted.remove(removed, leverage=leverage, weight_decay=L2).applied_to_copy(full)
                errors.append(float((vector(made) - vector(best)).norm() / way.norm()))
                changes = each_loss(made, loss, test) - before
            agreement = correlation(changes, each_loss(best, loss, test) - before)
            yield f"| {title} | {size} | {errors[0]:.1e} | {errors[1]:.1e} | {agreement:.5f} |"


def squares(module: nn.Module, batch: Data) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(module(batch[0]).squeeze(1), batch[1])


def minimised(net: nn.Module, loss: Any, data: Data) -> nn.Module:
    """Return a copy of the net at the minimum of the mean loss and the L2 term."""
    copied = type(net)(net.in_features, net.out_features).double()  # type: ignore[arg-type, call-arg]
    copied.load_state_dict(net.state_dict())
    optimizer = torch.optim.LBFGS(
        copied.parameters(),
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total: Tensor = loss(copied, data) + 0.5 * L2 * sum(p.square().sum() for p in copied.parameters())
        total.backward()
        return total

    optimizer.step(closure)
    return copied


def vector(net: nn.Module) -> Tensor:
    """Return all parameters."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def each_loss(net: nn.Module, loss: Any, data: Data) -> Tensor:
    """Return the loss of every example."""
    with torch.no_grad():
        return torch.stack([loss(net, (x[None], y[None])) for x, y in zip(*data, strict=True)])


# ---------------------------------------------------------------------------------------------------- report


def introduction() -> str:
    """Say what was run, on what, and how to read it."""
    return (
        "# Removal and label repair against retraining\n\n"
        f"Written by `benchmarks/unlearning.py` on {time.strftime('%Y-%m-%d')}: torch {torch.__version__}, "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}.\n\n"
        "## Where there is one minimum\n\n"
        "Error: distance of the parameters from the new minimum, over the way there (doing nothing: 1).\n"
    )


READING = (
    "Losses, accuracies: means over starts. *distance*: of the changed weights from the retrained ones, over that of "
    "the unchanged ones (1 = no closer than doing nothing). *r*: correlation of the changes of single test losses with "
    "those of retraining, mean over starts; *r of the means*: of the changes averaged over starts, in which the noise "
    "of retraining averages out to a part. *its halves agree*: that correlation between the retrained changes of one "
    "half of the starts and the other.\n"
)


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["regressions", "mlp", "cnn"], help="one part")
    parser.add_argument("--seeds", type=int, default=3, help="starts of each network (default 3)")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    arguments = parser.parse_args()
    started, text = time.perf_counter(), [introduction()]

    def add(lines: Iterator[str]) -> None:
        for each in lines:
            print(each, flush=True)
            text.append(each)

    if arguments.only in (None, "regressions"):
        add(regressions())
    chosen = [METHODS[1], METHODS[2], METHODS[4]]
    for name, setting, methods in (("mlp", digits(), METHODS), ("cnn", convolutional(), chosen)):
        if arguments.only in (None, name):
            add(iter(["", f"## {setting.title}: removal\n", READING]))
            add(removals(setting, _held_out(setting), arguments.seeds, methods))
            add(iter(["", f"## {setting.title}: label repair\n"]))
            add(repairs(setting, _held_out(setting), arguments.seeds, chosen))
    text.append(f"\nTook {(time.perf_counter() - started) / 60:.1f} minutes.")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(text) + "\n")


def convolutional() -> Setting:
    """The same digits, a small CNN."""
    flat_digits = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    data, queries = (_as_images(data) for data in (flat_digits.data, flat_digits.queries))
    return Setting("digits, CNN 6-12-16", net, data, queries, flat_digits.recipe, at_once=100)


def _as_images(data: Data) -> Data:
    return data[0].view(-1, 1, 8, 8), data[1]


def _held_out(setting: Setting) -> Data:
    """Return the digits that are not trained on."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(pixels).float()[order], torch.from_numpy(labels).long()[order]
    inputs = (inputs - inputs[:1400].mean(0)) / (inputs[:1400].std(0) + 1e-6)
    return inputs[1400:].view(-1, *setting.data[0].shape[1:]), targets[1400:]


if __name__ == "__main__":
    main()
