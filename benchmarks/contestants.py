"""Who does which work, one process each: ``side_by_side.py`` starts them, and tells them when to run.

Every process loads the same trained weights and the same digits, in float32, with the same number of threads. It then
answers requests, one line each: ``exact`` (scores that do not depend on sampled labels, saved for comparison; the
warm-up), ``run`` (the work, timed) and ``tensors`` (the work, every allocation of a tensor noted). Replies are lines of
JSON, with the seconds or the bytes, and the memory that the process has taken at most beyond what it held when
everything was loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from floors import BarePass, Products, eigendecompositions, live_layers, multiplications_a_second, timed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Influence
from lightning_influence.curvature import Fisher
from lightning_influence.scores import influence_scores, pairwise_scores, score_examples

TRAINING_BATCH = 32
# What the peers are given: they hold gradients of all examples of a batch. The fastest of 16, 64 and 256 (MLP), of 32,
# 64 and 256 (CNN), of 16, 32 and 100 (transformer); the wide MLP and the ResNet as those that are like them.
KRONFLUENCE_BATCH = {"mlp": 16, "mlp1024": 16, "cnn": 64, "transformer": 32, "resnet18": 32}
CAPTUM_BATCH = {"mlp": 16, "cnn": 64}
KRONFLUENCE_PAIRS_BATCH = 64
# Layers that kronfluence knows.
COMMON = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Spec:
    """What one process has to do.

    Attributes:
        work: A row of the table.
        contestant: Who does it.
        network: Name of the network.
        examples: Number of training examples.
        compared: The first so many of them give the scores that are compared.
        folder: Where the trained weights are.
        queries: Number of queries, taken from the end of the 5,000 digits.
        threads: Threads of torch.
    """

    work: str
    contestant: str
    network: str
    examples: int
    compared: int
    folder: str
    queries: int = 100
    threads: int = 2


@dataclass(frozen=True)
class Entry:
    """A contestant ready to start.

    Attributes:
        run: The work; may return the seconds of its stages, or the ``seconds`` that count instead of all.
        exact: Scores for comparison, or None: a warm-up only.
    """

    run: Callable[[], Any]
    exact: Callable[[], Tensor | None] | None = None


class Setting:
    """A trained network and its data.

    Args:
        spec: Which.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.net = networks.NETWORKS[spec.network]()
        self.net.load_state_dict(load_file(weights(spec.folder, spec.network)))
        self.net.eval()
        self.data = networks.data(spec.network, spec.examples)
        self.compared = first(self.data, spec.compared)

    def queries(self) -> TensorDataset:
        """Return the last digits of the 5,000; the networks were trained on the first ones."""
        held = networks.data(self.spec.network, 5000)
        return TensorDataset(*(tensor[-self.spec.queries :].clone() for tensor in held.tensors))

    def influence(self, data: TensorDataset, *, common: bool = False) -> Influence:
        """Return our door to the network, trained on some data, with the batch size that the callback takes.

        Args:
            data: The examples.
            common: Leave out the layers that kronfluence does not know (norms, position embeddings).
        """
        known = [kind for kind in COMMON if any(isinstance(module, kind) for module in self.net.modules())]
        layers = known if common else None
        return Influence(self.net, networks.task, data, batch_size=TRAINING_BATCH, layers=layers)


def first(data: TensorDataset, count: int) -> TensorDataset:
    """Return the first examples."""
    return TensorDataset(*(tensor[:count] for tensor in data.tensors))


def weights(folder: str, network: str) -> Path:
    """Return the file of a network's trained weights."""
    return Path(folder) / f"{network}.safetensors"


def prepare(folder: str, network: str, examples: int) -> None:
    """Train a network for a while: gradients and curvature of an untrained one are of another kind."""
    torch.manual_seed(0)
    net = networks.NETWORKS[network]()
    networks.train(net, networks.data(network, examples), epochs=2)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, weights(folder, network))


# ------------------------------------------------------------------ factors and self-influence


def kronfluence_self(setting: Setting) -> Entry:
    from peers import Kronfluence

    peer = Kronfluence(setting.net, KRONFLUENCE_BATCH[setting.spec.network])

    def score(data: TensorDataset, empirical: bool) -> Tensor:
        peer.fit(data.tensors, empirical=empirical)
        return peer.self_scores(data.tensors, damping=None)

    return Entry(lambda: score(setting.data, False), lambda: score(setting.compared, True))


def our_self(setting: Setting) -> Entry:
    """The same work: labels sampled once for each pass, every example in every pass, the same layers."""
    timed, compared = (setting.influence(data, common=True) for data in (setting.data, setting.compared))
    return Entry(
        lambda: fitted(timed, "sampled").self_influence(), lambda: fitted(compared, "empirical").self_influence()
    )


def our_default_self(setting: Setting) -> Entry:
    """Self-influence as the callback gets it: all layers, exact Fisher for the eigenvalues, factors from a subset."""
    influence = setting.influence(setting.data)
    return Entry(lambda: influence.fit().self_influence())


def floor_of_self(setting: Setting) -> Entry:
    """Three bare passes, and eigendecompositions and algebra of the layers that kronfluence knows.

    The stages are these parts, and ``defaults``: the seconds that are left where factors are fitted on the subset that
    the callback takes.
    """
    gradients, count = setting.influence(setting.data, common=True).training, len(setting.data)
    examples = setting.influence(setting.data).plan("ekfac").examples
    layers = live_layers(gradients)
    matrices = [moment for layer in layers for moment in layer.moments]
    bare_pass = BarePass(setting.net, COMMON, gradients.source.pass_batch_size)

    def algebra(covariances: int, eigenvalues: int) -> float:
        rotated = sum(layer.rotated() for layer in layers) * (eigenvalues + count)
        return sum(layer.covariances() for layer in layers) * covariances + rotated

    def run() -> Mapping[str, Any]:
        # Covariances, the squares in their basis, scores; one draw of labels each.
        passes = timed(lambda: [bare_pass(setting.data) for _ in range(3)])
        decompositions, speed = timed(lambda: eigendecompositions(matrices)), multiplications_a_second()
        stages = {"passes": passes, "eigendecompositions": decompositions, "algebra": algebra(count, count) / speed}
        share = (examples.covariances + examples.eigenvalues + count) / (3 * count)
        fewer = algebra(examples.covariances, examples.eigenvalues) / speed
        return summed(stages, defaults=share * passes + decompositions + fewer)

    def warm_up() -> None:
        bare_pass(setting.compared)
        eigendecompositions(matrices[-1:])

    return Entry(run, warm_up)


def summed(stages: Mapping[str, float], **others: float) -> Mapping[str, Any]:
    """Return the seconds of all stages together, some of which were counted and not run."""
    return {"seconds": sum(stages.values()), "stages": {**stages, **others}}


def fitted(influence: Influence, fisher: Fisher) -> Influence:
    """Return EK-FAC from every example, in both passes."""
    return influence.fit("ekfac", fisher=fisher, factor_examples=None)


# ------------------------------------------------------------------ TracIn self-influence of a checkpoint


def captum_tracin(setting: Setting) -> Entry:
    import peers

    size = CAPTUM_BATCH[setting.spec.network]
    timed, compared = (
        peers.captum_tracin(setting.net, data.tensors, batch_size=size) for data in (setting.data, setting.compared)
    )
    return Entry(timed.self_influence, compared.self_influence)


def our_tracin(setting: Setting) -> Entry:
    timed, compared = (setting.influence(data) for data in (setting.data, setting.compared))
    sizes = dict.fromkeys(timed.coverage.blocks, (1.0, 1.0))

    def score(influence: Influence) -> Tensor:
        return score_examples(influence.training, influence.examples, step_sizes=sizes).columns["tracin"]

    return Entry(lambda: score(timed), lambda: score(compared))


def floor_of_tracin(setting: Setting) -> Entry:
    """One bare pass."""
    bare_pass = BarePass(setting.net, COMMON, setting.influence(setting.data).training.source.pass_batch_size)
    return Entry(lambda: bare_pass(setting.data), lambda: bare_pass(setting.compared))


# ------------------------------------------------------------------ queries x examples, with fitted factors


def kronfluence_pairs(setting: Setting) -> Entry:
    from peers import Kronfluence

    peer, queries = Kronfluence(setting.net, KRONFLUENCE_PAIRS_BATCH), setting.queries()
    peer.fit(setting.compared.tensors, empirical=True)
    return Entry(
        lambda: peer.pairwise_scores(queries.tensors, setting.data.tensors, damping=None),
        lambda: peer.pairwise_scores(queries.tensors, setting.compared.tensors, damping=None),
    )


def our_pairs(setting: Setting) -> Entry:
    timed, compared = (setting.influence(data, common=True) for data in (setting.data, setting.compared))
    curvature, queries = fitted(compared, "empirical").curvature, compared.queries(setting.queries())

    def score(influence: Influence) -> Tensor:
        return pairwise_scores(influence.training, influence.examples, curvature, *queries).scores

    return Entry(lambda: score(timed), lambda: score(compared))


def floor_of_pairs(setting: Setting) -> Entry:
    """One bare pass, the gradients of examples, and their products with those of queries, layer by layer."""
    gradients = setting.influence(setting.data, common=True).training
    layers = live_layers(gradients)
    products = Products([layer.weights for layer in layers], setting.spec.queries)
    bare_pass = BarePass(setting.net, COMMON, gradients.source.pass_batch_size)
    formed = sum(layer.formed() for layer in layers)

    def run(data: TensorDataset) -> Mapping[str, Any]:
        stages = {"passes": timed(lambda: bare_pass(data)), "products": timed(lambda: products(len(data)))}
        return summed({**stages, "algebra": formed * len(data) / multiplications_a_second()})

    def warm_up() -> None:
        run(setting.compared)

    return Entry(lambda: run(setting.data), warm_up)


# ------------------------------------------------------------------ the whole audit, and training


def audit(setting: Setting) -> Entry:
    """All that the callback computes with its defaults: tracing, verification, factors, scores, features, sweep."""

    def score(data: TensorDataset) -> Mapping[str, float]:
        start = time.perf_counter()
        influence = setting.influence(data)
        gradients = influence.training
        looked = time.perf_counter() - start
        plan = influence.plan("ekfac")
        return {"look": looked, **influence_scores(gradients, influence.examples, plan, features=True).seconds}

    def warm_up() -> None:
        score(setting.compared)

    return Entry(lambda: score(setting.data), warm_up)


def plain_pass(setting: Setting) -> Entry:
    """One forward and backward over the data, in training's batches."""

    def run() -> None:
        setting.net.train()
        for batch in DataLoader(setting.data, batch_size=TRAINING_BATCH, shuffle=True):
            setting.net.zero_grad()
            networks.task(setting.net, batch).backward()

    return Entry(run)


def training(setting: Setting) -> Entry:
    """One epoch, optimizer steps included."""
    return Entry(lambda: networks.train(setting.net, setting.data))


def steps(setting: Setting) -> Entry:
    """Train under a Lightning Trainer; tells the seconds of a step by what is recorded."""
    from in_flight import bare_norms, measure

    make, count = networks.NETWORKS[setting.spec.network], setting.spec.examples // TRAINING_BATCH

    def run() -> Mapping[str, float]:
        plain, dynamics, flight = measure(make, setting.data, "sgd", count, time.perf_counter)
        stages = {"plain": plain, "dynamics": plain * (1 + dynamics), "in flight": plain * (1 + flight)}
        return {**stages, "floor": bare_norms(setting.net, setting.data, time.perf_counter)}

    return Entry(run)


def paced_steps(setting: Setting) -> Entry:
    """The same with a budget, which sets of how many steps one is measured; tells that, too."""
    from in_flight import BUDGET, measure_paced

    make, count = networks.NETWORKS[setting.spec.network], setting.spec.examples // TRAINING_BATCH

    def run() -> Mapping[str, float]:
        plain, share, every = measure_paced(make, setting.data, "sgd", count, time.perf_counter, BUDGET)
        return {"plain": plain, "in flight": plain * (1 + share), "every": every}

    return Entry(run)


CONTESTANTS: dict[tuple[str, str], Callable[[Setting], Entry]] = {
    ("self", "kronfluence"): kronfluence_self,
    ("self", "ours"): our_self,
    ("self", "ours, defaults"): our_default_self,
    ("self", "floor"): floor_of_self,
    ("tracin", "captum"): captum_tracin,
    ("tracin", "ours"): our_tracin,
    ("tracin", "floor"): floor_of_tracin,
    ("pairs", "kronfluence"): kronfluence_pairs,
    ("pairs", "ours"): our_pairs,
    ("pairs", "floor"): floor_of_pairs,
    ("audit", "plain pass"): plain_pass,
    ("audit", "ours"): audit,
    ("training", "training"): training,
    ("step", "every step"): steps,
    ("step", "with a budget"): paced_steps,
}


# ------------------------------------------------------------------ the process


class Memory:
    """What this process has taken at most beyond what it held at the start, in bytes (Linux)."""

    def __init__(self) -> None:
        try:
            # Sets the high-water mark to what is held now: importing torch takes more for a moment.
            Path("/proc/self/clear_refs").write_text("5")
            self._start = self._status("VmRSS")
        except OSError:
            self._start = 0

    def peak(self) -> int | None:
        """Return the bytes; None where the system does not tell."""
        return self._status("VmHWM") - self._start if self._start else None

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def tensor_peak(work: Callable[[], Any]) -> tuple[int, str | None]:
    """Run a work and return the bytes of tensors that it held at most, and the operation that was running then.

    Only what torch's allocator hands out counts, exactly: neither its heap's fragments nor buffers of libraries.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    held, peak, moment = 0, 0, None
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        if held > peak:
            peak, moment = held, event.start_ns()
    if moment is None:
        return 0, None
    # The outermost one: the innermost one is whatever allocates.
    running = [
        event for event in events if event.name().startswith("aten::") and event.start_ns() <= moment <= event.end_ns()
    ]
    return peak, min(running, key=lambda event: event.start_ns()).name() if running else None


def answer(request: list[str], entry: Entry, memory: Memory) -> dict[str, Any]:
    """Do what is asked for."""
    reply: dict[str, Any]
    start = time.perf_counter()
    if request[0] == "run":
        stages = entry.run()
        reply = {"seconds": time.perf_counter() - start}
        if isinstance(stages, Mapping):
            reply |= {"stages": dict(stages)} if "seconds" not in stages else stages
    elif request[0] == "tensors":
        tensors, operation = tensor_peak(entry.run)
        reply = {"tensors": tensors, "operation": operation}
    else:
        scores = None if entry.exact is None else entry.exact()
        if scores is not None:
            np.save(request[1], scores.detach().double().numpy())
        reply = {"seconds": time.perf_counter() - start, "compared": scores is not None}
    return {**reply, "peak": memory.peak()}


def main() -> None:
    """Load, then answer requests until there are no more."""
    spec = Spec(**json.loads(sys.argv[1]))
    # Peers print; the replies have the real stdout to themselves.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(spec.threads)
    if spec.work == "prepare":
        prepare(spec.folder, spec.network, spec.examples)
        print(json.dumps({"ready": asdict(spec)}), file=replies, flush=True)
        return
    torch.manual_seed(0)
    entry = CONTESTANTS[spec.work, spec.contestant](Setting(spec))
    # Optimizers and the backward pass import the compiler when they are first used: code, not data.
    importlib.import_module("torch._dynamo")
    memory = Memory()
    print(json.dumps({"ready": asdict(spec)}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.rstrip("\n").split("\t"), entry, memory)), file=replies, flush=True)


if __name__ == "__main__":
    main()
