"""Whether removing what a fairness gap names makes the gap smaller: arrests in Toronto, over 5 seeds.

make fairness
"""

from __future__ import annotations

import torch
from removal import Split, Study, run
from retraining import Recipe
from sklego.datasets import load_arrests
from torch import nn

from lightning_influence import DemographicParityGap, EqualOpportunityGap

TRAINING, QUERIES = 3000, 1113
HIDDEN = 16
SHARE = 0.02
ABOUT = (
    "`load_arrests` of scikit-lego: 5,226 arrests for possession of marijuana; whether a person was released, from "
    f"colour, year, age, sex, employment, citizenship and earlier checks. {TRAINING:,} train a multilayer perceptron "
    f"(8-{HIDDEN}-2), {QUERIES:,} are queries, {5226 - TRAINING - QUERIES:,} the test set. The gaps are those between "
    "white and black people in the predicted probability of release; for equal opportunity, among those released. "
    f"{SHARE:.0%} of the training examples are removed; removing 5 % was predicted to take the gap past zero, where "
    "its size no longer tells the direction. Curvature: GGN with the trainer's damping."
)


def arrests(seed: int) -> tuple[Split, Split, Split]:
    """Return training, query and test examples."""
    frame = load_arrests(as_frame=True)
    white = torch.tensor((frame["colour"] == "White").to_numpy()).long()
    numbers = torch.stack([torch.tensor(frame[name].to_numpy()).float() for name in ("year", "age", "checks")], 1)
    yes = torch.stack(
        [
            torch.tensor((frame[name] == value).to_numpy()).float()
            for name, value in (("sex", "Male"), ("employed", "Yes"), ("citizen", "Yes"))
        ],
        1,
    )
    inputs = torch.cat([numbers, numbers[:, 1:2].log(), yes, white[:, None].float()], 1)
    order = torch.randperm(len(frame), generator=torch.Generator().manual_seed(seed))
    inputs = (inputs - inputs[order[:TRAINING]].mean(0)) / inputs[order[:TRAINING]].std(0)
    released = torch.tensor((frame["released"] == "Yes").to_numpy()).long()
    every = Split(inputs, released, white)
    parts = order.split([TRAINING, QUERIES, len(order) - TRAINING - QUERIES])
    return every.rows(parts[0]), every.rows(parts[1]), every.rows(parts[2])


STUDY = Study(
    net=nn.Sequential(nn.Linear(8, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2)),
    recipe=Recipe(learning_rate=0.05, momentum=0.9, weight_decay=1e-3, batch_size=64, epochs=20),
    split=arrests,
    measurements={
        "Demographic parity gap": lambda split: DemographicParityGap(split.group),
        "Equal opportunity gap": lambda split: EqualOpportunityGap(split.group),
    },
    curvature="ggn",
    share=SHARE,
    starts=4,
    random=5,
    trainer_damping=True,
)


if __name__ == "__main__":
    run(STUDY, "Fairness: removal of what a gap names", ABOUT, "fairness.py", ("lightning-influence", "scikit-lego"))
