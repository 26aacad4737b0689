"""How a parameter is used, over all its uses: as a matrix, elementwise, or in a way that is not understood."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_influence.gradients.trace import Trace, TracedUse
from lightning_influence.layers.blocks import LARGEST_VECTOR
from lightning_influence.layers.linear import LinearCall

_ACROSS = {"linear": "transposed", "transposed": "linear"}


@dataclass(eq=False)
class Profile:
    """How one parameter is used.

    Attributes:
        name: Full name.
        parameter: The parameter.
        form: How the matrix lies in it, see ``MatrixBlock``; None if it is no matrix.
        groups: Number of groups of a convolution.
        kinds: Kinds of rows that it gets as a matrix.
        direct: Whether it scales or shifts.
        reason: Why it is not understood.
        partners: Ids of the weights that it is the bias of, None for what is none, one per use.
    """

    name: str
    parameter: nn.Parameter
    form: str | None = None
    groups: int = 1
    kinds: set[str] = field(default_factory=set)
    direct: bool = False
    reason: str | None = None
    partners: list[int | None] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, trace: Trace, largest_repeated: float) -> Profile:
        """Look at all the uses of a parameter.

        Args:
            name: Full name.
            parameter: The parameter.
            trace: How it is used.
            largest_repeated: Scalars of the gradients that may be formed by running a function once more per example.
        """
        profile = cls(name, parameter)
        uses = [use for use in trace.uses(parameter) if use.kind != "penalty"]
        met = [use for use in uses if use.kind != "shared"]
        for use in met:
            profile._look_at(use, largest_repeated)
        if profile.direct and profile.form not in (None, "linear"):
            profile.reason = f"used both as {profile.form} and elementwise"
        if parameter.is_complex():
            profile.reason = "complex numbers have no influence scores here"
        elif trace.failure is not None:
            profile.reason = f"the model could not be traced ({trace.failure})"
        elif not uses and id(parameter) in trace.without_gradients:
            profile.reason = (
                "used without gradients only, under `torch.no_grad` or in a reentrant checkpoint (pass "
                "`use_reentrant=False`)"
            )
        elif not uses:
            profile.reason = "took no part in the first batch"
        elif not met:
            profile.reason = "its values never meet the batch"
        return profile

    @property
    def by_rows(self) -> bool:
        """Whether it is too large for a vector, and has rows: it stands alone, as there is no place for a bias."""
        shape = self.parameter.shape
        return self.form is None and len(shape) >= 2 and shape[-1] > 1 and shape.numel() > LARGEST_VECTOR

    def _look_at(self, use: TracedUse, largest_repeated: float) -> None:
        if use.kind == "unknown" or use.call is None:
            self.reason = use.reason
            return
        if use.repeated_size > largest_repeated:
            self.reason = f"{use.reason}; its gradients of every example are too large to form unasked"
        for role, sources in use.roles.items():
            if id(self.parameter) not in sources:
                continue
            view = use.views[role]
            if role not in use.call.matrix_roles:
                self.direct = True
                weights = use.roles.get("weight", ())
                paired = role == "bias" and view is not None and len(weights) == 1 and _same_rows(use)
                self.partners.append(weights[0] if paired else None)
                continue
            assert view is not None  # or the call would have been repeated for every example
            form = _ACROSS.get(use.form) if view.transposed else use.form
            if form is None:
                self.reason = f"used transposed by {use.call.title}"
                continue
            self._as_matrix(form, use.groups, use.call.kind)
            if view.rows != len(self.parameter) and not (use.call.takes_parts and form == "linear"):
                self.reason = self.reason or f"used in parts by {use.call.title}"

    def _as_matrix(self, form: str, groups: int, kind: str) -> None:
        if self.form is not None and (self.form, self.groups) != (form, groups):
            self.reason = f"used both as {self.form} and as {form}"
        self.form, self.groups = form, groups
        self.kinds.add(kind)


def _same_rows(use: TracedUse) -> bool:
    """Tell whether a linear map takes the same rows of its weight and of its bias, if it takes only some."""
    weight, bias = use.views.get("weight"), use.views.get("bias")
    if use.call is not LinearCall or use.form != "linear" or weight is None or bias is None or weight.transposed:
        return True
    return (weight.start, weight.rows) == (bias.start, bias.rows)
