"""Which damping: a rule, chosen before anything is computed, never tuned on the scores.

* relative: 0.1 times the mean eigenvalue of each block (Grosse et al. 2023, 2308.03296), for Kronecker factors, whose
  eigenvalues are not to be trusted at the lower end;
* trainer: ``1 / Σ_t η_t``, over the optimizer's own steps. Gradient descent from ``θ`` on a quadratic with curvature
  ``C`` solves for directions with eigenvalues above that, and hardly moves along others (2209.10015, 2405.12186).

Weight decay that is an L2 term of the loss is curvature, ``+ weight_decay · I``, and comes on top of the trainer's. It
does not come on top of the relative one, which is a heuristic of its own: there it cost EK-FAC .03 of .57 LDS
(``benchmarks/lds.py``). A number is taken as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.training.step_sizes import OptimizerHistory

Damping = float | Literal["auto", "relative", "trainer"]
"""A number λ, or the rule that it follows from; ``"auto"`` for the curvature's own."""


@dataclass(frozen=True)
class DampingChoice:
    """A damping, decided as far as it can be before the curvature is known.

    Attributes:
        absolute: λ of every block, one for all, or None for a multiple of the mean eigenvalue.
        rule: ``"absolute"``, ``"relative"`` or ``"trainer"``.
        notes: What a reader of the scores should know.
    """

    absolute: Mapping[str, float] | float | None = None
    rule: str = "relative"
    notes: tuple[str, ...] = ()


def choose_damping(
    damping: Damping,
    default: Literal["relative", "trainer"],
    blocks: Mapping[str, ParameterBlock],
    history: OptimizerHistory | None,
) -> DampingChoice:
    """Decide a damping.

    Args:
        damping: A number λ >= 0, ``"relative"``, ``"trainer"``, or ``"auto"``: the curvature's default.
        default: The default of the curvature.
        blocks: The covered parameters.
        history: What the optimizers did, None if unknown.

    Returns:
        The choice. Without plain gradient steps there is no ``"trainer"`` damping: it is relative then, and says so.

    Raises:
        ValueError: If ``damping`` is none of these.
    """
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool) and 0 <= damping <= sys.float_info.max
    if not number and not (isinstance(damping, str) and damping in ("auto", "relative", "trainer")):
        raise ValueError(f'damping={damping!r}; expected a number >= 0, "relative", "trainer" or "auto".')
    if not isinstance(damping, str):
        return DampingChoice(absolute=float(damping), rule="absolute")
    rule = default if damping == "auto" else damping
    if rule == "relative":
        return DampingChoice()
    moved = block_means(blocks, {} if history is None else history.step_sizes)
    if history is None or history.adaptive or not any(moved.values()):
        reason = "no optimizer step was seen"
        if history is not None and any(moved.values()):
            reason = f"{', '.join(history.adaptive)} takes steps that are not multiples of the gradient"
        note = (
            f"the damping is 0.1 of the mean eigenvalue: {reason}, so there is no damping that follows from the "
            "training (1 / sum of step sizes). A number for `damping=` sets it."
        )
        return DampingChoice(notes=(note,))
    decay = block_means(blocks, history.weight_decay)
    everywhere = sum(moved.values()) / len(moved)
    absolute = {name: 1 / (size or everywhere) + decay[name] for name, size in moved.items()}
    return DampingChoice(absolute=absolute, rule="trainer")


def block_means(blocks: Mapping[str, ParameterBlock], values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over each block's scalars of what is known by parameter."""
    sizes = {name: {p: value.numel() for p, value in block.parameters.items()} for name, block in blocks.items()}
    return {
        name: sum(values.get(p, 0.0) * count for p, count in counts.items()) / (sum(counts.values()) or 1)
        for name, counts in sizes.items()
    }
