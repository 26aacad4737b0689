"""Scores of other packages, for the benchmarks; each is asked for as its documentation says.

Every function takes a trained network, training data and queries, and returns ``[queries, N]``, positive for
proponents.
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import warnings
from contextlib import redirect_stderr
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Data = tuple[Tensor, Tensor]


def kronfluence_scores(
    net: nn.Module, data: Data, queries: Data, *, damping: float | None, strategy: str = "ekfac"
) -> Tensor:
    """Return scores of kronfluence; ``damping=None`` is its heuristic, 0.1 of the mean eigenvalue."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
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

    task = SummedCrossEntropy()
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare_model(copy.deepcopy(net), task)
        analyzer = Analyzer("peer", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        train, query = TensorDataset(*data), TensorDataset(*queries)
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=256, factor_args=FactorArguments(strategy=strategy)
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query,
            train,
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=256,
            score_args=ScoreArguments(damping_factor=damping),
        )
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores


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
