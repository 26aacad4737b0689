"""What a run proposes instead of a label: its own mean prediction and its neighbours, taken together."""

from __future__ import annotations

import torch
from torch import nn

from lightning_influence.callbacks.recording import Recording
from lightning_influence.scoring import ExampleScores

SIZE, CLASSES = 40, 3


def recording(own: float) -> tuple[Recording, torch.Tensor]:
    """Two clusters; example 0 lies in the first and carries the label of the second, which the run half believes."""
    labels = torch.arange(SIZE) % 2
    features = nn.functional.one_hot(labels, 2).float() + 0.01 * torch.randn(
        SIZE, 2, generator=torch.Generator().manual_seed(0)
    )
    given = labels.clone()
    given[0] = 1
    probabilities = 0.9 * nn.functional.one_hot(given, CLASSES).float() + 0.1 / CLASSES
    probabilities[0] = torch.tensor([1 - own, own, 0.0])
    record = Recording(SIZE, nn.Linear(2, CLASSES))
    statistics = {"loss": torch.ones(SIZE), "label": given, "probabilities": probabilities}
    record.dynamics.record(range(SIZE), statistics)
    columns = {"label": given, "loss": torch.ones(SIZE), "finite": torch.ones(SIZE, dtype=torch.bool)}
    record.add_pass(1, ExampleScores(torch.arange(SIZE), columns, features))
    return record, given


def test_neighbours_outvote_a_label_that_is_known_by_heart() -> None:
    record, given = recording(own=0.6)
    columns = record.columns(range(SIZE))
    assert columns["prob_margin"][0] > 0, "the mean prediction alone stands up for the wrong label"
    assert columns["suggested"][0] == 0
    assert columns["suggested"][1:].tolist() == given[1:].tolist()


def test_a_sure_run_outvotes_its_neighbours() -> None:
    record, given = recording(own=1.0)
    # All its neighbours say 0, which weighs as much as the run's own certainty: one dissenting neighbour decides.
    record.neighbours._votes[0] = torch.tensor([0.95, 0.05])
    assert record.columns(range(SIZE))["suggested"].tolist() == given.tolist()


def test_without_a_pass_the_run_speaks_alone() -> None:
    record = Recording(2, nn.Linear(2, CLASSES))
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    record.dynamics.record(
        [0, 1], {"loss": torch.ones(2), "label": torch.tensor([1, 2]), "probabilities": probabilities}
    )
    columns = record.columns([0, 1])
    assert columns["suggested"].tolist() == [0, 2]
    assert "neighbour_disagreement" not in columns
