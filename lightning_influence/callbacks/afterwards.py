"""What a finished audit can still do: removal and repair at the weights that the model has then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from numpy.typing import NDArray

from lightning_influence.audit.unlearning import Unlearner
from lightning_influence.callbacks import bridge
from lightning_influence.curvature import CurvatureName
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.scores.plan import InfluencePlan

MakeUnlearner = Callable[[CurvatureName], Unlearner]


def unlearner_maker(
    trainer: Trainer,
    gradients: ExampleGradients,
    planned: Callable[[CurvatureName], InfluencePlan],
    columns: Mapping[str, NDArray[Any]],
    weight_decay: Mapping[str, float],
) -> MakeUnlearner:
    """Return what fits a curvature by name, once it is asked for: nothing is held until then but references.

    Args:
        trainer: The trainer of the run.
        gradients: Passes over the training data.
        planned: Curvature to the plan of an audit with it.
        columns: Those of the audited examples, ``index`` and, where there are classes, ``label``.
        weight_decay: Parameter name to the coefficient of an L2 term in the loss.
    """
    later = bridge.after_training(trainer, gradients)
    examples = columns["index"].tolist()
    pairs = zip(examples, columns["label"].tolist(), strict=True) if "label" in columns else ()
    labels = {index: int(label) for index, label in pairs if label >= 0}

    def make(curvature: CurvatureName) -> Unlearner:
        passes = later.calibrate(examples)
        fitted = planned(curvature).fit(passes, examples)
        return Unlearner(passes, fitted, examples, labels=labels, weight_decay=weight_decay)

    return make
