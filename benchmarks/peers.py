"""Scores of other packages, for the benchmarks; each is asked for as its documentation says.

Pairwise scores are ``[queries, N]``, positive for proponents.
"""

from __future__ import annotations

import copy
import importlib.metadata
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Data = tuple[Tensor, Tensor]


def versions(*packages: str) -> str:
    """Return what is installed of some packages, this one first."""
    found = []
    for package in ("lightning-influence", "torch", *packages):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


class Kronfluence:
    """Factors and scores of kronfluence, on a copy of a network (it renames parameters); files in a folder of its own.

    Args:
        net: The trained network.
        batch_size: Examples in a batch of every pass.
    """

    def __init__(self, net: nn.Module, batch_size: int = 256) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class SummedCrossEntropy(Task):  # type: ignore[misc]
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits = model(batch[0])
                labels = batch[1]
                if sample:
                    labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        logging.getLogger().setLevel(logging.ERROR)
        self._folder = tempfile.TemporaryDirectory()
        self._batch_size = batch_size
        task = SummedCrossEntropy()
        model = prepare_model(copy.deepcopy(net), task)
        self._analyzer = Analyzer("peer", model, task, cpu=True, disable_tqdm=True, output_dir=self._folder.name)

    def fit(self, data: Data, *, strategy: str = "ekfac", empirical: bool = False) -> None:
        """Fit factors, with sampled labels or, for the empirical Fisher, the true ones."""
        from kronfluence.arguments import FactorArguments

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._analyzer.fit_all_factors(
                "factors",
                TensorDataset(*data),
                per_device_batch_size=self._batch_size,
                factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=empirical),
                overwrite_output_dir=True,
            )

    def self_scores(self, data: Data, *, damping: float | None) -> Tensor:
        """Return ``[N]``; ``damping=None`` is its heuristic, 0.1 of the mean eigenvalue of each layer."""
        from kronfluence.arguments import ScoreArguments

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._analyzer.compute_self_scores(
                "self",
                "factors",
                TensorDataset(*data),
                per_device_train_batch_size=self._batch_size,
                score_args=ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
        scores: Tensor = self._analyzer.load_self_scores("self")["all_modules"]
        return scores

    def pairwise_scores(self, queries: Data, data: Data, *, damping: float | None) -> Tensor:
        """Return ``[queries, N]``."""
        from kronfluence.arguments import ScoreArguments

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._analyzer.compute_pairwise_scores(
                "pairwise",
                "factors",
                TensorDataset(*queries),
                TensorDataset(*data),
                per_device_query_batch_size=len(queries[1]),
                per_device_train_batch_size=self._batch_size,
                score_args=ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
        scores: Tensor = self._analyzer.load_pairwise_scores("pairwise")["all_modules"]
        return scores


def kronfluence_scores(
    net: nn.Module, data: Data, queries: Data, *, damping: float | None, strategy: str = "ekfac"
) -> Tensor:
    """Return scores of kronfluence; ``damping=None`` is its heuristic, 0.1 of the mean eigenvalue."""
    peer = Kronfluence(net)
    peer.fit(data, strategy=strategy)
    return peer.pairwise_scores(queries, data, damping=damping)


def captum_tracin(net: nn.Module, data: Data, *, batch_size: int = 64, by_hooks: bool = True) -> Any:
    """Return captum's TracInCP of one checkpoint, the network as it is, with a learning rate of 1.

    Args:
        net: The trained network.
        data: Training examples.
        batch_size: Examples in a batch.
        by_hooks: Whether to form the gradients of a batch from what its hooks caught
            (``sample_wise_grads_per_batch=True``, for linear layers and convolutions), or one example after the other.
    """
    from captum.influence import TracInCP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TracInCP(
            model=net,
            train_dataset=TensorDataset(*data),
            checkpoints=["as it is"],
            checkpoints_load_func=lambda model, path: 1.0,
            loss_fn=nn.CrossEntropyLoss(reduction="sum" if by_hooks else "none"),
            batch_size=batch_size,
            sample_wise_grads_per_batch=by_hooks,
        )


def dattri_scores(net: nn.Module, data: Data, queries: Data, method: str, **options: Any) -> Tensor:
    """Return scores of dattri: ``"IFAttributorCG"``, ``"IFAttributorEKFAC"`` or ``"IFAttributorDataInf"``."""
    from dattri.algorithm import influence_function
    from dattri.task import AttributionTask

    model = copy.deepcopy(net)

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        inputs, labels = batch
        logits = torch.func.functional_call(model, parameters, inputs.unsqueeze(0))
        return F.cross_entropy(logits, labels.long().view(-1))

    def mean_loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(torch.func.functional_call(model, parameters, inputs), labels)

    def on_batches(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        return mean_loss(parameters, batch) if batch[1].ndim else loss(parameters, batch)

    task = AttributionTask(loss_func=on_batches, model=model, checkpoints=model.state_dict())
    attributor = getattr(influence_function, method)(task=task, **options)
    train = DataLoader(TensorDataset(*data), batch_size=len(data[1]))
    query = DataLoader(TensorDataset(*queries), batch_size=len(queries[1]))
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # progress bars
        warnings.simplefilter("ignore")
        attributor.cache(train)
        with torch.no_grad():
            scores: Tensor = attributor.attribute(train, query)
    return scores.T


def dattri_trak(net: nn.Module, states: Sequence[dict[str, Tensor]], data: Data, queries: Data) -> Tensor:
    """Return scores of dattri's TRAK over several trained networks, asked for as in its own benchmark.

    Its 512 dimensions for 5,000 examples are taken in proportion: with as many as there are examples or more the kernel
    that TRAK inverts is singular.

    Args:
        net: The network.
        states: State dicts, one of each training.
        data: Training examples.
        queries: Others.
    """
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = copy.deepcopy(net)

    def log_probability(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        logits = torch.func.functional_call(model, parameters, batch[0].unsqueeze(0))
        return -F.cross_entropy(logits, batch[1].view(1))

    def margin(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        found = log_probability(parameters, batch)
        return found - torch.log(1 - torch.exp(found))

    def probability(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.exp(log_probability(parameters, batch))

    task = AttributionTask(loss_func=margin, model=model, checkpoints=list(states))
    attributor = TRAKAttributor(task, probability, projector_kwargs={"proj_dim": 512 * len(data[1]) // 5000})
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # progress bars
        warnings.simplefilter("ignore")
        attributor.cache(DataLoader(TensorDataset(*data), batch_size=1024))
        with torch.no_grad():
            scores: Tensor = attributor.attribute(DataLoader(TensorDataset(*queries), batch_size=1024))
    return scores.T
