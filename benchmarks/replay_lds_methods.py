"""What ``replay_lds.py`` compares: methods that explain a run, and what becomes of several runs' scores together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peers import dattri_scores, dattri_trak, kronfluence_scores
from replay_runs import Setting, followed, passes, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import Checkpoint, Influence
from lightning_influence.replay.scores import replay_scores
from lightning_influence.training import OptimizerHistory


@dataclass(frozen=True)
class Run:
    """A run that methods explain; that of seed 0 is *this run*."""

    setting: Setting
    seed: int
    module: nn.Module
    checkpoints: Sequence[Checkpoint]
    history: OptimizerHistory

    @classmethod
    def of(cls, setting: Setting, seed: int) -> Run:
        """Train it."""
        return cls(setting, seed, *followed(setting, seed=seed))

    @property
    def influence(self) -> Influence:
        """The door to its final weights."""
        data = TensorDataset(*self.setting.data)
        return Influence(self.module, None, data, batch_size=self.setting.batch_size)

    @property
    def asked(self) -> TensorDataset:
        """The queries."""
        return TensorDataset(*self.setting.queries)


def replay(run: Run) -> Tensor:
    """Record the run, check that it ends in the same weights, and go back through it."""
    module, rerun = train(run.setting, seed=run.seed, record=True)
    assert rerun is not None
    rerun.verify()
    ends = run.checkpoints[-1].parameters
    assert all(torch.equal(value, ends[name]) for name, value in module.named_parameters()), "not the same run"
    queries = passes(module, run.setting.queries, passes(module, run.setting.data))
    return replay_scores(rerun, queries, range(len(run.setting.queries[1]))).scores


def fitted(curvature: Any, **options: Any) -> Callable[[Run], Tensor]:
    """Return a method of ours with its default damping; labels and examples are not sampled."""

    def scores(run: Run) -> Tensor:
        influence = run.influence.fit(curvature, history=run.history, **options)
        return influence.pairs(run.asked).scores

    return scores


def source(run: Run) -> Tensor:
    """Three segments with EK-FAC."""
    along = run.influence.along(run.checkpoints)
    exact: dict[str, Any] = {"fisher": "exact", "factor_examples": None}
    return along.source(run.asked, weight_decay=run.history.weight_decay, **exact).scores


def network(module: nn.Module) -> nn.Module:
    """Return what returns logits, for evaluation: peers have losses of their own."""
    net = module.net
    assert isinstance(net, nn.Module)
    return net.eval()


def kronfluence(run: Run) -> Tensor:
    """Its EK-FAC with the damping that it derives by itself."""
    torch.manual_seed(run.seed)  # it draws labels from the global stream
    return kronfluence_scores(network(run.module), run.setting.data, run.setting.queries, damping=None)


def dattri_cg(run: Run) -> Tensor:
    """Ten steps of conjugate gradients; the regularisation is that of ``lds.py``."""
    options = {"max_iter": 10, "regularization": 5e-3}
    return dattri_scores(network(run.module), run.setting.data, run.setting.queries, "IFAttributorCG", **options)


def dattri_trak_10(setting: Setting) -> Tensor:
    """TRAK over this run and nine of other seeds."""
    nets = [network(train(setting, seed=seed)[0]) for seed in range(10)]
    return dattri_trak(nets[0], [net.state_dict() for net in nets], setting.data, setting.queries)


REPLAY = "**replay**"
METHODS: dict[str, Callable[[Run], Tensor]] = {
    REPLAY: replay,
    "GGN": fitted("ggn"),
    "block GGN": fitted("block_ggn"),
    "EK-FAC": fitted("ekfac", fisher="exact", factor_examples=None),
    "K-FAC": fitted("kfac", fisher="exact", factor_examples=None),
    "SOURCE, EK-FAC": source,
    "TracIn, 10 checkpoints": lambda run: run.influence.along(run.checkpoints).tracin(run.asked).scores,
    "inner product (IP)": fitted("identity"),
    "kronfluence EK-FAC, `damping_factor=None`": kronfluence,
    "dattri CG (10 steps, 5e-3)": dattri_cg,
}
AVERAGED: dict[str, tuple[str, int]] = {
    "four replays averaged": (REPLAY, 4),
    "GGN, three runs averaged": ("GGN", 3),
    "EK-FAC, three runs averaged": ("EK-FAC", 3),
}
"""Mean scores of runs of several seeds, this one among them."""
SEVERAL: dict[str, Callable[[Setting], Tensor]] = {"dattri TRAK-10, ten runs": dattri_trak_10}
"""What takes several runs by itself."""
