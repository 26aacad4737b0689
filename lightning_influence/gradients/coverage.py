"""Which trainable parameters are understood, and the blocks that they form."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

from lightning_influence.gradients.trace import Trace, TracedUse
from lightning_influence.layers.blocks import (
    LARGEST_VECTOR,
    ONE_HOT,
    LayerError,
    MatrixBlock,
    ParameterBlock,
    VectorBlock,
)
from lightning_influence.layers.convolution import ConvolutionCall
from lightning_influence.layers.embedding import EmbeddingCall
from lightning_influence.layers.linear import LinearCall

Uncovered = Literal["report", "exact"]
Layer: TypeAlias = "str | type[nn.Module]"
Layers: TypeAlias = "Layer | Iterable[Layer] | None"

# Gradients of so many scalars are formed for every example where there is no other way; larger ones only on request.
_LARGEST_REPEATED = 2**20


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

    def __repr__(self) -> str:
        return f"Coverage({self.describe()})"

    def describe(self) -> str:
        """Return one line for logs: the share covered and what is left out."""
        line = f"{self.share:.1%} of {self.total_parameters:,} trainable parameters in {len(self.blocks)} layers"
        if self.untrained_parameters:
            line += f" ({self.untrained_parameters:,} others are in no optimizer, and count as frozen)"
        if self.trace.failure is not None:
            line += f", taken to be used in the standard way (not traced: {self.trace.failure})"
        if self.one_by_one:
            line += f", one example at a time: {listed(sorted(self.one_by_one))}"
        return f"{line}; not covered: {listed(list(self.uncovered))}" if self.uncovered else line


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
    trace: Trace | None = None,
    uncovered: Uncovered = "report",
    trained: Container[int] | None = None,
) -> Coverage:
    """Find the parameters whose per-example gradients are understood.

    Args:
        module: The model. Only parameters that require a gradient count.
        layers: What to keep: names of modules (with everything in them), of blocks or parameters, glob patterns, or
            types of modules; None keeps all.
        trace: How the parameters are used, see ``discover``; without it, layers are taken to be used in the standard
            way, and other parameters are not covered.
        uncovered: ``"exact"`` covers all others by one backward pass per example.
        trained: Ids of the parameters that optimizers hold: others stay as they are, as if frozen. None for all.

    Returns:
        Blocks by name, and the reason for each trainable parameter that is not covered.

    Raises:
        LayerError: If nothing is covered, or an entry of ``layers`` matches nothing.
    """
    return _Survey(module, trace or Trace(), uncovered, trained).coverage(layers, uncovered)


@dataclass(eq=False)
class _Profile:
    """How one parameter is used, over all its uses."""

    name: str
    parameter: nn.Parameter
    form: str | None = None  # of a matrix
    groups: int = 1
    kinds: set[str] = field(default_factory=set)
    direct: bool = False
    reason: str | None = None
    partners: list[int | None] = field(default_factory=list)  # weights that it is the bias of, one per use
    seen: bool = False

    def matrix(self, form: str, groups: int = 1, kind: str = "linear") -> None:
        """Note a use as a matrix."""
        if self.form is not None and (self.form, self.groups) != (form, groups):
            self.reason = f"used both as {self.form} and as {form}"
        self.form, self.groups = form, groups
        self.kinds.add(kind)


class _Survey:
    """Sorts the trainable parameters of a model into blocks."""

    def __init__(self, module: nn.Module, trace: Trace, uncovered: Uncovered, trained: Container[int] | None) -> None:
        self.module = module
        self.trace = trace
        self.exact = uncovered == "exact"
        self.largest_repeated: float = math.inf if self.exact else _LARGEST_REPEATED
        self.profiles: dict[int, _Profile] = {}
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self.untrained: dict[int, int] = {}  # id to size
        for path, submodule in module.named_modules():
            for local, parameter in submodule.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append((_clean(path), submodule))
                if parameter.requires_grad and trained is not None and id(parameter) not in trained:
                    self.untrained[id(parameter)] = parameter.numel()
                elif parameter.requires_grad and id(parameter) not in self.profiles:
                    name = _clean(f"{path}.{local}" if path else local)
                    self.profiles[id(parameter)] = _Profile(name, parameter)
        for profile in self.profiles.values():
            self._look(profile)

    def coverage(self, layers: Layers, uncovered: Uncovered) -> Coverage:
        blocks = self._blocks()
        slow = self._slow_blocks() if uncovered == "exact" else []
        reasons = {p.name: p.reason for p in self.profiles.values() if p.reason is not None}
        chosen = blocks + slow
        for block in slow:
            reasons = {name: reason for name, reason in reasons.items() if name not in block.parameters}
        if layers is not None:
            chosen = self._selected(chosen, listed_layers(layers))
            kept = {name for block in chosen for name in block.parameters}
            left = [name for block in blocks + slow for name in block.parameters if name not in kept]
            reasons |= dict.fromkeys(left, "left out by `layers=`")
        if not chosen:
            why = "; ".join(sorted(set(map(str, reasons.values())))) or "no parameter requires a gradient"
            way_out = ' Pass `uncovered="exact"` to compute them one example at a time.' if reasons else ""
            raise LayerError(
                "the model has no trainable parameter whose per-example gradients are understood. Found: "
                f"{why}.{way_out}"
            )
        reasons |= dict.fromkeys(
            self.trace.outside, "registered in no module, so neither saved nor found; assign it to one"
        )
        order = {p.name: k for k, p in enumerate(self.profiles.values())}
        return Coverage(
            {block.name: block for block in chosen},
            {name: str(reasons[name]) for name in sorted(reasons, key=lambda name: order.get(name, len(order)))},
            sum(p.numel() for block in chosen for p in block.parameters.values()),
            sum(p.parameter.numel() for p in self.profiles.values()),
            frozenset(block.name for block in slow) & {block.name for block in chosen},
            self.trace,
            sum(self.untrained.values()),
        )

    # ------------------------------------------------------------- profiles

    def _look(self, profile: _Profile) -> None:
        uses = [use for use in self.trace.uses(profile.parameter) if use.kind != "penalty"]
        met = [use for use in uses if use.kind != "shared"]
        profile.seen = bool(met)
        for use in met:
            self._look_at_use(profile, use)
        if profile.parameter.is_complex():
            profile.reason = "complex numbers have no influence scores here"
        elif not uses and self.trace.failure is not None and self.exact:
            profile.reason = f"the model could not be traced ({self.trace.failure})"
        elif not uses and self.trace.paths:
            profile.reason = "took no part in the first batch"
            if id(profile.parameter) in self.trace.without_gradients:
                profile.reason = (
                    "used without gradients only, under `torch.no_grad` or in a reentrant checkpoint (pass "
                    "`use_reentrant=False`)"
                )
        elif not uses:
            self._look_at_owner(profile)
        elif not met and profile.reason is None:
            profile.reason = "its values never meet the batch"
        if profile.direct and profile.form not in (None, "linear"):
            profile.reason = f"used both as {profile.form} and elementwise"

    def _look_at_use(self, profile: _Profile, use: TracedUse) -> None:
        if use.kind == "unknown" or use.call is None:
            profile.reason = use.reason
            return
        if use.repeated_size > self.largest_repeated:
            profile.reason = f"{use.reason}; its gradients of every example are too large to form unasked"
        for role, sources in use.roles.items():
            if id(profile.parameter) not in sources:
                continue
            view = use.views[role]
            whole = view is not None and view.rows == len(profile.parameter) if profile.parameter.ndim else True
            if role not in use.call.matrix_roles:
                profile.direct = True
                weights = use.roles.get("weight", ())
                paired = role == "bias" and view is not None and len(weights) == 1 and _same_rows(use)
                profile.partners.append(weights[0] if paired else None)
            elif issubclass(use.call, EmbeddingCall) and view is not None and view.transposed:
                profile.reason = "used transposed by an embedding"
            elif issubclass(use.call, EmbeddingCall):
                profile.matrix("linear", kind="embedding")
                profile.reason = profile.reason or (None if whole else "used in parts by an embedding")
            elif issubclass(use.call, ConvolutionCall):
                profile.matrix("transposed convolution" if use.transposed else "convolution", use.groups)
                profile.reason = profile.reason or (None if whole else "used in parts by a convolution")
            else:
                assert view is not None  # or the call would have been repeated for every example
                across = use.transposed != view.transposed
                profile.matrix("transposed" if across else "linear")
                if across and not whole:
                    profile.reason = "used in parts by a matrix product"

    def _look_at_owner(self, profile: _Profile) -> None:
        """Take a layer that was not seen at work to be used in the standard way."""
        path, owner = self.owners[id(profile.parameter)][0]
        local = profile.name.removeprefix(f"{path}." if path else "")
        weight = next((p for n, p in owner.named_parameters(recurse=False) if n == "weight"), None)
        reason = None
        for _, each in self.owners[id(profile.parameter)]:
            if dict(each.named_parameters(recurse=False)).get(local) is None and not isinstance(
                each, nn.MultiheadAttention
            ):
                continue
            if isinstance(each, (nn.Linear, nn.modules.conv._ConvNd)) and local == "bias":
                profile.direct = True
                profile.partners.append(id(weight) if weight is not None else None)
            elif isinstance(each, nn.Linear) and local == "weight":
                profile.matrix("linear")
            elif isinstance(each, nn.modules.conv._ConvTransposeNd) and local == "weight":
                profile.matrix("transposed convolution", each.groups)
            elif isinstance(each, nn.modules.conv._ConvNd) and local == "weight":
                profile.matrix("convolution", each.groups)
            elif isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and local == "weight":
                profile.matrix("linear", kind="embedding")
            elif isinstance(each, _SCALES) and local in ("weight", "bias"):
                profile.direct = True
                profile.partners.append(id(weight) if local == "bias" and weight is not None else None)
            elif isinstance(each, nn.MultiheadAttention) and local.endswith("proj_weight"):
                profile.matrix("linear")
            elif isinstance(each, nn.MultiheadAttention):
                profile.direct = True
                packed = each.in_proj_weight if local == "in_proj_bias" else None
                profile.partners.append(None if packed is None else id(packed))
            else:
                reason = f"{type(each).__name__} is not supported"
        profile.reason = profile.reason or reason
        if profile.form is None and not profile.direct and profile.reason is None:
            profile.reason = "no supported use of it is known"

    # --------------------------------------------------------------- blocks

    def _blocks(self) -> list[ParameterBlock]:
        understood = [p for p in self.profiles.values() if p.reason is None]
        biases: dict[int, _Profile] = {}
        for profile in understood:
            partners = set(profile.partners)
            if profile.form is None and len(partners) == 1 and None not in partners:
                (partner,) = partners
                weight = None if partner is None else self.profiles.get(partner)
                if weight is not None and weight.reason is None and partner is not None and partner not in biases:
                    biases[partner] = profile
        joined = {id(p.parameter) for p in biases.values()}
        blocks: list[ParameterBlock] = []
        for profile in understood:
            if id(profile.parameter) in joined:
                continue
            bias = biases.get(id(profile.parameter))
            pair = {p.name: p.parameter for p in (profile, bias) if p is not None}
            name = profile.name.removesuffix(".weight") if profile.name != "weight" else ""
            rows = profile.parameter.ndim >= 2 and profile.parameter.shape[-1] > 1
            if profile.form is None and (not rows or profile.parameter.numel() <= LARGEST_VECTOR):
                blocks.append(VectorBlock(name, pair))
            elif profile.form is None:
                blocks.append(MatrixBlock(name, (profile.name, profile.parameter), form="rows", kinds=ONE_HOT))
            else:
                kinds = frozenset(profile.kinds) | (ONE_HOT if profile.direct else frozenset())
                blocks.append(
                    MatrixBlock(
                        name,
                        (profile.name, profile.parameter),
                        None if bias is None else (bias.name, bias.parameter),
                        form=profile.form,
                        groups=profile.groups,
                        kinds=kinds,
                    )
                )
        return blocks

    def _slow_blocks(self) -> list[ParameterBlock]:
        blocks: list[ParameterBlock] = []
        for profile in self.profiles.values():
            if profile.reason is None or profile.parameter.is_complex():
                continue
            if profile.parameter.ndim >= 2:
                named = (profile.name, profile.parameter)
                blocks.append(MatrixBlock(profile.name, named, kinds=ONE_HOT))
            else:
                blocks.append(VectorBlock(profile.name, {profile.name: profile.parameter}))
        return blocks

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


_SCALES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
)


def _same_rows(use: TracedUse) -> bool:
    """Tell whether a linear map takes the same rows of its weight and of its bias, if it takes only some."""
    weight, bias = use.views.get("weight"), use.views.get("bias")
    if use.call is not LinearCall or use.transposed or weight is None or bias is None or weight.transposed:
        return True
    return (weight.start, weight.rows) == (bias.start, bias.rows)


def _clean(path: str) -> str:
    """Drop what ``torch.compile`` puts into module paths, so that names are those of the eager model."""
    return path.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")
