"""Which trainable parameters are understood, and the blocks that they form."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

from lightning_influence.core.torch_private import eager_name
from lightning_influence.gradients.profiles import Profile
from lightning_influence.gradients.trace import Trace
from lightning_influence.layers.blocks import (
    ONE_HOT,
    LayerError,
    MatrixBlock,
    ParameterBlock,
)

Uncovered = Literal["report", "exact"]
"""Parameters whose per-example gradients have no closed form: left out, or computed one example at a time."""
Layer: TypeAlias = "str | type[nn.Module]"
Layers: TypeAlias = "Layer | Iterable[Layer] | None"
"""What to look at: names of layers or parameters, glob patterns, types of modules; None for all."""

# Gradients of so many scalars are formed for every example where there is no other way; larger ones only on request.
_LARGEST_UNASKED = 2**20
# Recurrent layers are covered unasked in so many steps: a pass then takes 4 to 8 times as long as one of training.
_MOST_STEPS_UNASKED = 512


@dataclass(frozen=True)
class Coverage:
    """Which trainable parameters are understood.

    Attributes:
        blocks: Block name to block.
        uncovered: Name of every trainable parameter that is left out, to the reason.
        covered_parameters: Number of scalars covered.
        total_parameters: Number of trainable scalars.
        one_by_one: Names of the blocks whose gradients are computed one example at a time.
        trace: How the parameters are used.
        untrained_parameters: Number of scalars that require a gradient, but are in no optimizer: as if frozen.
    """

    blocks: dict[str, ParameterBlock]
    uncovered: dict[str, str] = field(default_factory=dict)
    covered_parameters: int = 0
    total_parameters: int = 0
    one_by_one: frozenset[str] = frozenset()
    trace: Trace = field(default_factory=Trace)
    untrained_parameters: int = 0

    @property
    def share(self) -> float:
        """Share of the trainable scalars that is covered, 0 to 1."""
        return self.covered_parameters / self.total_parameters if self.total_parameters else 0.0

    @property
    def shared_inputs(self) -> dict[str, str]:
        """Block name to the first block with the same activations in all traced batches: projections of one input.

        Other batches may yet tell them apart, see ``Capture.same_activations``.
        """
        first: dict[object, str] = {}
        shared = {}
        for name, block in self.blocks.items():
            if not isinstance(block, MatrixBlock) or block.kinds & ONE_HOT or not block.dense[1]:
                continue
            paths = self.trace.paths.get(id(block.weight), [])
            seen = tuple(tuple(use.activations for use in path) for path in paths)
            if seen and all(None not in path for path in seen):
                leader = first.setdefault((seen, block.has_bias), name)
                if leader != name:
                    shared[name] = leader
        return shared

    def __repr__(self) -> str:
        return f"Coverage({self.describe()})"

    def describe(self) -> str:
        """Return one line for logs: the share covered and what is left out."""
        line = f"{self.share:.1%} of {self.total_parameters:,} trainable parameters in {len(self.blocks)} layers"
        if self.untrained_parameters:
            line += f" ({self.untrained_parameters:,} others are in no optimizer, and count as frozen)"
        if self.one_by_one:
            line += f", one example at a time: {listed(sorted(self.one_by_one))}"
        if self.trace.failure is not None:
            line += f" (the model could not be traced: {self.trace.failure})"
        return f"{line}; not covered: {listed(list(self.uncovered))}" if self.uncovered else line


LEFT_OUT = "left out by `layers=`"
"""Why a parameter is not covered that could be."""


def listed_layers(layers: Layer | Iterable[Layer]) -> list[Layer]:
    """Return one name or type, or several, as a list."""
    return [layers] if isinstance(layers, (str, type)) else list(layers)


def listed_reasons(uncovered: Mapping[str, str], most: int) -> str:
    """Return the first parameters that are not covered, each with its reason, and the number of others."""
    return listed([f"{name} ({reason})" for name, reason in uncovered.items()], most, "; ")


def listed(things: Sequence[object], most: int = 6, separator: str = ", ") -> str:
    """Return the first of some things, and the number of others."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return separator.join(map(str, things[:most])) + more


def cover(
    module: nn.Module,
    layers: Layers = None,
    *,
    trace: Trace,
    uncovered: Uncovered = "report",
    trained: Container[int] | None = None,
) -> Coverage:
    """Find the parameters whose per-example gradients are understood.

    Args:
        module: The model. Only parameters that require a gradient count.
        layers: What to keep: names of modules (with everything in them), of blocks or parameters, glob patterns, or
            types of modules; None keeps all.
        trace: How the parameters are used, see ``discover``. All of a small model that could not be traced are covered
            by one backward pass per example.
        uncovered: ``"exact"`` covers all that are not understood by one backward pass per example.
        trained: Ids of the parameters that optimizers hold: others stay as they are, as if frozen. None for all.

    Returns:
        Blocks by name, and the reason for each trainable parameter that is not covered.

    Raises:
        LayerError: If nothing is covered, or an entry of ``layers`` matches nothing.
    """
    return _Survey(module, trace, uncovered, trained).coverage(layers)


class _Survey:
    """Sorts the trainable parameters of a model into blocks."""

    def __init__(self, module: nn.Module, trace: Trace, uncovered: Uncovered, trained: Container[int] | None) -> None:
        self.trace = trace
        self.exact = uncovered == "exact"
        self.profiles: dict[int, Profile] = {}
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self.untrained: dict[int, int] = {}  # id to size
        largest = math.inf if self.exact else _LARGEST_UNASKED
        for path, submodule in module.named_modules():
            for local, parameter in submodule.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append((eager_name(path), submodule))
                if parameter.requires_grad and trained is not None and id(parameter) not in trained:
                    self.untrained[id(parameter)] = parameter.numel()
                elif parameter.requires_grad and id(parameter) not in self.profiles:
                    name = eager_name(f"{path}.{local}" if path else local)
                    self.profiles[id(parameter)] = Profile.of(name, parameter, trace, largest)

    def coverage(self, layers: Layers) -> Coverage:
        untraced = self.trace.failure is not None
        slow = self._slow_blocks() if self.exact or untraced else []
        blocks = self._blocks() + slow
        chosen = self._unasked(blocks) if layers is None else self._selected(blocks, listed_layers(layers))
        size = sum(p.numel() for block in chosen for p in block.parameters.values())
        if untraced and not self.exact and size > _LARGEST_UNASKED:
            raise LayerError(
                f"the model could not be traced ({self.trace.failure}): the gradients of its {size:,} trainable "
                f"parameters would have to be computed one example at a time, which is not done unasked for more than "
                f'{_LARGEST_UNASKED:,}. Pass `uncovered="exact"` to do so, or choose fewer by `layers=`.'
            )
        covered = {name for block in chosen for name in block.parameters}
        of_slow = {name for block in slow for name in block.parameters}
        reasons = {p.name: p.reason for p in self.profiles.values() if p.reason is not None and p.name not in of_slow}
        left = [name for block in blocks for name in block.parameters if name not in covered]
        reasons |= {name: LEFT_OUT if layers is not None else self._too_long(name) for name in left}
        if not chosen:
            why = "; ".join(sorted(set(reasons.values()))) or "no parameter requires a gradient"
            way_out = ' Pass `uncovered="exact"` to compute them one example at a time.' if reasons else ""
            raise LayerError(
                "the model has no trainable parameter whose per-example gradients are understood. Found: "
                f"{why}.{way_out}"
            )
        order = [name for profile in self.profiles.values() if (name := profile.name) in reasons]
        strangers = dict.fromkeys(
            self.trace.outside, "registered in no module, so neither saved nor found; assign it to one"
        )
        return Coverage(
            {block.name: block for block in chosen},
            {name: reasons[name] for name in order} | strangers,
            size,
            sum(p.parameter.numel() for p in self.profiles.values()),
            frozenset(block.name for block in slow) & {block.name for block in chosen},
            self.trace,
            sum(self.untrained.values()),
        )

    def _unasked(self, blocks: list[ParameterBlock]) -> list[ParameterBlock]:
        """Leave out what takes many times a pass of training, unless that is everything."""
        steps, most = self.trace.steps, math.inf if self.exact else _MOST_STEPS_UNASKED
        quick = [b for b in blocks if max((steps.get(id(p), 0) for p in b.parameters.values()), default=0) <= most]
        return quick or blocks

    def _too_long(self, name: str) -> str:
        steps = next(self.trace.steps[id(p.parameter)] for p in self.profiles.values() if p.name == name)
        return f"runs in {steps:,} steps, in which passes take many times as long; `layers=` that name it cover it"

    def _blocks(self) -> list[ParameterBlock]:
        understood = [p for p in self.profiles.values() if p.reason is None]
        biases: dict[int, Profile] = {}
        for profile in understood:
            partners = set(profile.partners)
            if profile.form is None and len(partners) == 1 and None not in partners:
                (partner,) = partners
                weight = None if partner is None else self.profiles.get(partner)
                if weight and weight.reason is None and not weight.by_rows and partner and partner not in biases:
                    biases[partner] = profile
        joined = {id(p.parameter) for p in biases.values()}
        pairs = [(p, biases.get(id(p.parameter))) for p in understood if id(p.parameter) not in joined]
        return [_block(weight, bias) for weight, bias in pairs]

    def _slow_blocks(self) -> list[ParameterBlock]:
        named = [(p.name, p.parameter) for p in self.profiles.values() if p.reason and not p.parameter.is_complex()]
        return [
            MatrixBlock(name, (name, parameter), kinds=ONE_HOT)
            if parameter.ndim >= 2
            else ParameterBlock(name, {name: parameter})
            for name, parameter in named
        ]

    def _selected(self, blocks: list[ParameterBlock], patterns: Sequence[Layer]) -> list[ParameterBlock]:
        matched: set[int] = set()
        kept = []
        for block in blocks:
            owners = [owner for p in block.parameters.values() for owner in self.owners[id(p)]]
            names = {block.name, *block.parameters, *(path for path, _ in owners)}
            hits = {
                position
                for position, pattern in enumerate(patterns)
                if (
                    any(isinstance(owner, pattern) for _, owner in owners)
                    if isinstance(pattern, type)
                    else any(fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.") for n in names)
                )
            }
            matched |= hits
            if hits:
                kept.append(block)
        if missing := [pattern for position, pattern in enumerate(patterns) if position not in matched]:
            listed = [pattern.__name__ if isinstance(pattern, type) else pattern for pattern in missing]
            known = [block.name for block in blocks]
            close = [near for name in listed for near in difflib.get_close_matches(name, known, 3, 0.5)]
            hint = f"did you mean {close}?" if close else f"there are {known[:20] or 'none'}"
            raise LayerError(f"`layers=` names {listed}, which match no supported layer; {hint}")
        return kept


def _block(profile: Profile, bias: Profile | None) -> ParameterBlock:
    """Return the block of an understood parameter and its bias."""
    name = profile.name.removesuffix(".weight") if profile.name != "weight" else ""
    weight, added = (profile.name, profile.parameter), None if bias is None else (bias.name, bias.parameter)
    if profile.form is not None:
        kinds = frozenset(profile.kinds) | (ONE_HOT if profile.direct else frozenset())
        return MatrixBlock(name, weight, added, form=profile.form, groups=profile.groups, kinds=kinds)
    if profile.by_rows:
        return MatrixBlock(name, weight, form="rows", kinds=ONE_HOT)
    return ParameterBlock(name, dict([weight] if added is None else [weight, added]))
