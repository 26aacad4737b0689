"""Which damping: a rule, chosen before anything is computed, never tuned on the scores.

* relative: 0.1 times the mean eigenvalue of each block (Grosse et al. 2023, 2308.03296); of exact curvatures each
  eigenvalue is weighted with itself, ``Σ lam² / Σ lam``: most of them are about zero and tell nothing of the others;
* bounded, for K-FAC and EK-FAC: the same, raised where a block would have more effective dimensions than its data
  span, see ``KFACBlock.bounded_damping``;
* trainer: ``1 / Σ_t η_t P_t``, over the optimizer's own steps, which multiply gradients by ``P`` (1 for gradient
  descent). From ``θ`` on a quadratic with curvature ``C`` they solve for directions with eigenvalues above that, and
  hardly move along others (2209.10015, 2405.12186). A block has the mean over its scalars.

Weight decay that is an L2 term of the loss is curvature, ``+ weight_decay · I``, and comes on top of the trainer's. It
does not come on top of the relative one, which is a heuristic of its own: there it cost EK-FAC .03 of .57 LDS
(``benchmarks/lds.py``). A number is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_influence.core.errors import is_number, short
from lightning_influence.gradients.coverage import listed
from lightning_influence.layers.blocks import ParameterBlock
from lightning_influence.training.step_sizes import OptimizerHistory

Damping = float | Literal["auto", "relative", "trainer"]
"""A number λ, or the rule that it follows from; ``"auto"`` for the curvature's own."""
DampingRule = Literal["relative", "bounded", "trainer"]
"""The default of a curvature."""


@dataclass(frozen=True)
class DampingChoice:
    """A damping, decided as far as it can be before the curvature is known.

    Attributes:
        absolute: λ of every block, one for all, or None for what follows from the curvature.
        rule: ``"absolute"``, ``"relative"``, ``"bounded"`` or ``"trainer"``.
        notes: What a reader of the scores should know.
        source: What the numbers are, in words.
    """

    absolute: Mapping[str, float] | float | None = None
    rule: str = "relative"
    notes: tuple[str, ...] = ()
    source: str = "0.1 times the mean eigenvalue, weighted with itself for GGN, block GGN and Hessian"


def choose_damping(
    damping: Damping,
    default: DampingRule,
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
        The choice. Where it is not known what the optimizers multiplied gradients with, there is no ``"trainer"``
        damping: it is relative then, and says so.

    Raises:
        ValueError: If ``damping`` is none of these.
    """
    known = damping in ("auto", "relative", "trainer") if isinstance(damping, str) else is_number(damping)
    if not known or (not isinstance(damping, str) and damping < 0):
        raise ValueError(f'damping={short(damping)}; expected a number >= 0, "relative", "trainer" or "auto".')
    if not isinstance(damping, str):
        return DampingChoice(absolute=float(damping), rule="absolute", source="given")
    rule = default if damping == "auto" else damping
    if rule == "relative":
        return DampingChoice()
    if rule == "bounded":
        source = "0.1 times the mean eigenvalue; more where the layer would have more dimensions than its data span"
        return DampingChoice(rule=rule, source=source)
    if history is None or (why := _unknown(blocks, history)):
        reason = "no optimizer step was seen" if history is None else why
        note = (
            f"the damping is relative to the mean eigenvalue: {reason}, so there is no damping that follows from the "
            "training (1 / sum of step sizes). A number for `damping=` sets it."
        )
        return DampingChoice(notes=(note,))
    moved = _moved(history)
    inverses = {name: 1 / size for name, size in moved.items() if size}
    found = {
        name: sum(inverses[p] * count for p, count in counts.items() if p in inverses) / of_moved
        for name, counts in _sizes(blocks).items()
        if (of_moved := sum(count for p, count in counts.items() if p in inverses))
    }
    # A layer that never moved gets the mean of the others.
    everywhere = sum(found.values()) / len(found)
    decay = block_means(blocks, history.weight_decay)
    absolute = {name: found.get(name, everywhere) + decay[name] for name in blocks}
    scaled = f" times what {', '.join(history.adaptive)} multiplied gradients with" if history.adaptive else ""
    added = ", plus the L2 weight decay" if any(decay.values()) else ""
    source = f"1 / sum of the step sizes of {history.steps:,} steps{scaled}{added}"
    return DampingChoice(absolute=absolute, rule="trainer", source=source)


def _moved(history: OptimizerHistory) -> Mapping[str, float]:
    if history.moved is not None:
        return history.moved
    return {} if history.adaptive else history.step_sizes


def _unknown(blocks: Mapping[str, ParameterBlock], history: OptimizerHistory) -> str:
    """Tell why no damping follows from a history; an empty text if one does."""
    names = [name for block in blocks.values() for name in block.parameters if history.step_sizes.get(name)]
    if not names:
        return "no optimizer step was seen"
    if missing := [name for name in names if name not in _moved(history)]:
        who = ", ".join(history.adaptive) or "the optimizer"
        return f"it is not known what {who} multiplied the gradients of {listed(missing, 3)} with"
    return "" if any(_moved(history)[name] for name in names) else "no layer was moved"


def _sizes(blocks: Mapping[str, ParameterBlock]) -> dict[str, dict[str, int]]:
    """Return the number of scalars of every parameter of every block."""
    return {name: {p: value.numel() for p, value in block.parameters.items()} for name, block in blocks.items()}


def block_means(blocks: Mapping[str, ParameterBlock], values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over each block's scalars of what is known by parameter."""
    return {
        name: sum(values.get(p, 0.0) * count for p, count in counts.items()) / (sum(counts.values()) or 1)
        for name, counts in _sizes(blocks).items()
    }
