"""Torch functions in which parameters meet the batch, and what each says about per-example gradients.

A call turns its raw input and the gradient of its output into rows (activations ``x``, output gradients ``g``, see
``per_sample``) for parameters that form a matrix, or into every example's own gradient for parameters that scale or
shift. ``reading`` recognises the calls.

Index legend: ``k`` groups, ``n`` examples, ``m`` rows of an example that lie in one dimension with the examples, ``s``
positions, ``i`` inputs, ``o`` outputs, ``c`` channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.layout import BatchLayout
from lightning_influence.patches import Activations, Patches
from lightning_influence.precision import working
from lightning_influence.rows import OneHot


@dataclass(frozen=True)
class Layouts:
    """Where the examples are in the input and in the output of a call."""

    input: BatchLayout = BatchLayout()
    output: BatchLayout = BatchLayout()


@dataclass(frozen=True, eq=False)
class Call:
    """One call.

    Attributes:
        input: What came from the batch, detached.
        parameters: Role (``weight``, ``bias``) to the tensor that was passed in it.
    """

    input: Tensor
    parameters: Mapping[str, Tensor]

    matrix_roles: ClassVar[frozenset[str]] = frozenset()
    """Roles whose gradient is a sum of outer products; the others scale or shift."""

    @property
    def needs_input(self) -> bool:
        """Whether the values of the input enter the gradients."""
        return True

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Every tensor whose values enter the gradients."""
        return (self.input,) if self.needs_input else ()

    @property
    def examples_in_input(self) -> bool:
        """Whether a dimension of the input holds the examples, as one of the output does."""
        return True

    def batched_ndim(self) -> int:
        """Return the smallest number of dimensions of an input with a batch."""
        return 1


@dataclass(frozen=True, eq=False)
class DirectCall(Call):
    """A call whose parameters scale or shift: every example's own gradient is formed."""

    @abstractmethod
    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return every example's own gradient of a parameter that scales or shifts: ``[n, *shape]``.

        Args:
            role: Of the parameter.
            gradient: Of the call's output.
            n: Number of examples.
            layouts: Where they are.
        """


@dataclass(frozen=True, eq=False)
class MatrixCall(Call):
    """A call whose weight has a gradient ``Σ_s g_s x_sᵀ``."""

    matrix_roles = frozenset({"weight"})

    @property
    def needs_input(self) -> bool:
        """Whether the weight is followed: the bias alone does not need the input."""
        return "weight" in self.parameters

    @abstractmethod
    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """Return ``[k, n, s, i]``."""

    @abstractmethod
    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``[k, n, s, o]``."""

    def captured(self, n: int, layouts: Layouts, *, ones: bool = False) -> Activations:
        """Return the activations, laid out only where that costs nothing.

        Args:
            n: Number of examples.
            layouts: Where they are.
            ones: Whether to add a last column of ones.
        """
        x = self.activations(n, layouts)
        if not ones:
            return x
        widened = x.new_empty((*x.shape[:-1], x.shape[-1] + 1))  # F.pad would write everything twice
        widened[..., :-1], widened[..., -1] = x, 1
        return widened

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return the bias's gradient: the output gradients summed over positions."""
        return self.output_gradients(gradient, n, layouts).sum(2).transpose(0, 1).reshape(n, -1)


@dataclass(frozen=True, eq=False)
class LinearCall(MatrixCall):
    """``x Wᵀ + b`` with any number of dimensions; ``transposed``: ``x W + b``."""

    transposed: bool = False

    def batched_ndim(self) -> int:
        """Return 2."""
        return 2

    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """``[..., i] -> [1, n, s, i]``."""
        return layouts.input.by_example(working(self.input), n).reshape(1, n, -1, self.input.shape[-1])

    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """``[..., o] -> [1, n, s, o]``."""
        return layouts.output.by_example(gradient, n).reshape(1, n, -1, gradient.shape[-1])


@dataclass(frozen=True, eq=False)
class ConvolutionCall(MatrixCall):
    """``F.conv1d`` to ``F.conv3d`` and their transposes.

    Attributes:
        kernel: Size of the kernel, per spatial dimension.
        stride: Per spatial dimension.
        padding: Before and after, per spatial dimension; negative amounts crop.
        dilation: Per spatial dimension.
        groups: Number of groups.
        transposed: Whether this is a transposed convolution: one of the input with ``stride - 1`` zeros between its
            pixels, by the flipped kernel, with stride 1.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    def batched_ndim(self) -> int:
        """Return two more than the spatial dimensions."""
        return 2 + len(self.stride)

    def activations(self, n: int, layouts: Layouts) -> Tensor:
        """``[n·m, c, ...] -> [groups, n, s, i]``: one row per output position."""
        return self.captured(n, layouts).laid_out()

    def captured(self, n: int, layouts: Layouts, *, ones: bool = False) -> Patches:
        """``[n·m, c, ...] -> [groups, n, s, i (+ 1)]``: one row per output position, not laid out yet."""
        images = layouts.input.by_example(working(self.input), n).flatten(0, 1)
        stride = (1,) * len(self.stride) if self.transposed else self.stride
        before, after = (max(side, 0) for side in self.padding[0])
        return Patches(
            self._padded(images),
            n,
            self.kernel,
            stride,
            self.dilation,
            self.groups,
            flipped=self.transposed,
            ones=ones,
            margin=(before, after),
        )

    def output_gradients(self, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """``[n·m, c, ...] -> [groups, n, s, o]``."""
        rows = layouts.output.by_example(gradient, n)
        grouped = rows.reshape(n, rows.shape[1], self.groups, rows.shape[2] // self.groups, -1)
        if rows.shape[1] == 1:
            return grouped[:, 0].permute(1, 0, 3, 2)
        return grouped.permute(2, 0, 1, 4, 3).flatten(2, 3)

    def _padded(self, images: Tensor) -> Tensor:
        if self.transposed and any(step > 1 for step in self.stride):
            spread = tuple((size - 1) * step + 1 for size, step in zip(images.shape[2:], self.stride, strict=True))
            apart = images.new_zeros((*images.shape[:2], *spread))
            every = tuple(slice(None, None, step) for step in (1, 1, *self.stride))
            apart[every] = images
            images = apart
        sides = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(images, sides) if any(sides) else images


@dataclass(frozen=True, eq=False)
class EmbeddingCall(Call):
    """Vectors looked up by index: a linear layer on one-hot rows, with the roles of input and gradient exchanged.

    Attributes:
        padding_idx: Index whose vector gets no gradient.
    """

    padding_idx: int | None = None

    matrix_roles = frozenset({"weight"})

    def rows(self, gradient: Tensor, n: int, layouts: Layouts) -> tuple[Tensor, OneHot]:
        """Return the gradients of the looked-up vectors ``[1, n, s, i]`` and the one-hot rows of their indices."""
        indices = layouts.input.by_example(self.input, n).reshape(n, -1)
        vectors = layouts.output.by_example(gradient, n).reshape(1, n, -1, gradient.shape[-1])
        return _looked_up(indices, vectors, len(self.parameters["weight"]), self.padding_idx)


@dataclass(frozen=True, eq=False)
class EmbeddingBagCall(EmbeddingCall):
    """Sums or means of looked-up vectors, one bag per row of the output.

    Attributes:
        scales: Factor of every index in its bag, shaped like ``input`` (1 / size of the bag for means).
        bags: For inputs with ``offsets``: the bag of every index. None if every row of ``input`` is a bag.
    """

    scales: Tensor | None = None
    bags: Tensor | None = None

    @property
    def examples_in_input(self) -> bool:
        """Whether every row of the input is a bag."""
        return self.bags is None

    def rows(self, gradient: Tensor, n: int, layouts: Layouts) -> tuple[Tensor, OneHot]:
        """Return the gradients of the looked-up vectors ``[1, n, s, i]`` and the one-hot rows of their indices."""
        size = len(self.parameters["weight"])
        if self.bags is None:
            indices, scales = self.input, self.scales
            valid = torch.ones_like(indices, dtype=torch.bool)
        else:
            indices, scales, valid = self._padded(len(gradient))
        # bl, bd -> bld
        vectors = gradient.unsqueeze(1).expand(-1, indices.shape[1], -1)
        if scales is not None:
            vectors = vectors * scales.unsqueeze(-1).to(vectors.dtype)
        of_bags = layouts.output
        picked = of_bags.by_example(indices, n).reshape(n, -1)
        flat = of_bags.by_example(vectors, n).reshape(1, n, -1, gradient.shape[-1])
        return _looked_up(picked, flat, size, self.padding_idx, of_bags.by_example(valid, n).reshape(n, -1))

    def _padded(self, bags: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Lay bags of different sizes out as ``[bags, longest]``."""
        assert self.bags is not None
        counts = torch.bincount(self.bags, minlength=bags)
        longest = max(int(counts.max()), 1)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.bags), device=self.bags.device) - starts[self.bags]
        indices = self.input.new_zeros((bags, longest))
        valid = torch.zeros_like(indices, dtype=torch.bool)
        indices[self.bags, place], valid[self.bags, place] = self.input, True
        if self.scales is None:
            return indices, None, valid
        scales = self.scales.new_zeros((bags, longest))
        scales[self.bags, place] = self.scales
        return indices, scales, valid


def _looked_up(
    indices: Tensor, vectors: Tensor, size: int, padding_idx: int | None, kept: Tensor | None = None
) -> tuple[Tensor, OneHot]:
    if padding_idx is not None:
        real = indices != padding_idx
        kept = real if kept is None else kept & real
    if kept is not None:
        vectors = torch.where(kept.view(1, *kept.shape, 1), vectors, 0)
    return vectors, OneHot(indices, size, kept=kept)


@dataclass(frozen=True, eq=False)
class NormCall(DirectCall):
    """A normalisation with an affine part.

    Attributes:
        normalise: The same normalisation without the affine part.
        features: Number of last dimensions that the weight spans; 0 for a weight per channel (dimension 1).
    """

    normalise: Callable[[Tensor], Tensor] = torch.clone
    features: int = 0

    @property
    def needs_input(self) -> bool:
        """Whether there is a weight to scale with the normalised input."""
        return "weight" in self.parameters

    def batched_ndim(self) -> int:
        """Return one more than the normalised dimensions."""
        return max(self.features + 1, 2)

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``Σ g x̂`` for the weight and ``Σ g`` for the bias, over all positions."""
        scaled = gradient * self.normalise(self.input) if role == "weight" else gradient
        rows = layouts.output.by_example(scaled, n)
        if self.features:
            shape = rows.shape[-self.features :]
            return rows.reshape(n, -1, *shape).sum(1)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)


@dataclass(frozen=True, eq=False)
class PReLUCall(DirectCall):
    """``F.prelu``: one slope for all, or one per channel (dimension 1)."""

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return ``Σ g x`` over the positions with a negative input."""
        rows = layouts.output.by_example(gradient * self.input.clamp(max=0), n)
        if self.parameters[role].numel() == 1:
            return rows.flatten(1).sum(1, keepdim=True)
        return rows.flatten(3).sum((1, 3)) if rows.ndim > 3 else rows.sum(1)


@dataclass(frozen=True, eq=False)
class ElementwiseCall(DirectCall):
    """An elementwise function of a parameter and the batch, with broadcasting.

    Attributes:
        function: Out-of-place form.
        arguments: Its arguments, detached.
        position: Role to the place (index or name) of the parameter among them.
        shifts: Whether the gradient is that of the output itself up to its sign: then no argument's value matters.
    """

    function: Callable[..., Tensor] = torch.add
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    position: int | str = 0
    sign: int = 0

    @property
    def needs_input(self) -> bool:
        """Whether it does more than add."""
        return not self.sign

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The other arguments."""
        return tuple(tensors_in(self.arguments))

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Differentiate the function once more, with the parameter spread over the examples."""
        parameter = self.parameters[role]
        if self.sign:
            spread = gradient * self.sign
        else:
            args, kwargs = list(self.arguments[0]), dict(self.arguments[1])
            with torch.enable_grad():
                leaf = parameter.detach().expand(gradient.shape).requires_grad_()
                if isinstance(self.position, int):
                    args[self.position] = leaf
                else:
                    kwargs[self.position] = leaf
                output = self.function(*args, **kwargs)
                (spread,) = torch.autograd.grad(output, leaf, gradient.to(output.dtype))
                spread = working(spread)
        return _reduced(spread, parameter.shape, n, layouts.output)


@dataclass(frozen=True, eq=False)
class ExpandCall(DirectCall):
    """A parameter repeated for every example: ``cls_token.expand(n, -1, -1)``."""

    @property
    def needs_input(self) -> bool:
        """False: there is no input."""
        return False

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return each example's part of the gradient."""
        return _reduced(gradient, self.parameters[role].shape, n, layouts.output)


@dataclass(frozen=True, eq=False)
class RepeatedCall(DirectCall):
    """Any function that treats each example alone: run once more for each, and differentiated there.

    Attributes:
        function: The function.
        arguments: Its positional and keyword arguments, detached.
        argument_layouts: Of every tensor among them, in order: where the examples are, None if nowhere.
    """

    function: Callable[..., Tensor] = torch.clone
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    argument_layouts: tuple[BatchLayout | None, ...] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All arguments."""
        return tuple(tensors_in(self.arguments))

    def of_example(self, index: int, n: int, leaves: Mapping[str, Tensor]) -> Tensor:
        """Run the function on one of ``n`` examples, with other tensors in the place of parameters."""
        places = {id(tensor): leaves[role] for role, tensor in self.parameters.items()}
        layouts = iter(self.argument_layouts)

        def own(tensor: Tensor) -> Tensor:
            layout = next(layouts)
            if id(tensor) in places:
                return places[id(tensor)]
            return tensor if layout is None else layout.in_place(tensor.detach(), n)[index]

        args, kwargs = map_tensors(own, self.arguments)
        return self.function(*args, **kwargs)

    def direct(self, role: str, gradient: Tensor, n: int, layouts: Layouts) -> Tensor:
        """Return the gradients of ``n`` calls with one example each."""
        rows = []
        for index, start in enumerate(layouts.output.in_place(gradient, n)):
            with torch.enable_grad():
                leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
                output = self.of_example(index, n, leaves)
                (found,) = torch.autograd.grad(output, leaves[role], start.to(output.dtype))
            rows.append(working(found))
        return torch.stack(rows)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results: in sequences and mappings, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return arguments with every tensor replaced, in the order of ``tensors_in``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def as_now(function: Callable[..., Tensor], like: Tensor) -> Callable[..., Tensor]:
    """Return a function that runs later under the autocast that is active now."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        return function
    dtype = torch.get_autocast_dtype(kind)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(kind, dtype):
            return function(*args, **kwargs)

    return run


def _reduced(gradient: Tensor, shape: torch.Size, n: int, layout: BatchLayout) -> Tensor:
    """Sum the gradient of a broadcast tensor over everything but the examples: ``[n, *shape]``."""
    rows = layout.in_place(gradient, n)
    padded = (1,) * (rows.ndim - 1 - len(shape)) + tuple(shape)
    for dim, size in enumerate(padded, start=1):
        if size == 1:
            rows = rows.sum(dim, keepdim=True)
    return rows.reshape((n, *shape))
