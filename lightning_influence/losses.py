"""Known losses: what a tapped loss call says about each example.

A call of ``F.cross_entropy(logits, targets, ...)`` tells everything attribution needs: every example's own loss,
its prediction and margin, the gradient for labels sampled from the model (true Fisher), and a square root of the
loss Hessian (generalised Gauss-Newton matrix, GGN). One class per loss; nobody else looks at the kind.

Index legend: ``n`` examples, ``r`` rows of the logits (a multiple of ``n``), ``c`` classes, ``...`` further
positions such as pixels of a segmentation map.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossCall(ABC):
    """One call of a known loss function, as seen by the tap.

    Attributes:
        output: What the call returned: a scalar for ``mean``/``sum``, one value per element for ``none``.
        input: Logits (log-probabilities for ``nll_loss``, predictions for ``mse_loss``), still in the graph.
        target: Targets of the call.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    output: Tensor
    input: Tensor
    target: Tensor
    reduction: str

    @abstractmethod
    def elements(self) -> Tensor:
        """Return the loss terms before reduction, rows first (class weights included)."""

    @abstractmethod
    def weights(self) -> Tensor:
        """Return each element's share of the denominator of a mean reduction, shaped like ``elements()``."""

    @abstractmethod
    def noise_shape(self, n: int) -> tuple[int, ...]:
        """Return the shape of the uniform noise that one example's pseudo-label needs."""

    @abstractmethod
    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return a gradient with respect to ``input`` whose outer product has the loss Hessian as its mean.

        Args:
            scale: Weight of each element in its example's own loss, broadcastable to ``elements()``.
            noise: Uniform float64 numbers in (0, 1), ``[n, *noise_shape]``, independent for each example.

        Returns:
            Tensor shaped like ``input``. For the softmax and logistic losses this is the gradient for a label
            drawn from the model times the square root of the element's weight.
        """

    @abstractmethod
    def exact_draws(self, n: int) -> int | None:
        """Return how many columns the exact square root of an example's loss Hessian has, or None if too many."""

    @abstractmethod
    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield the columns of a square root of every example's loss Hessian, each shaped like ``input``."""

    @abstractmethod
    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return what the training dynamics record, each ``[n]`` (``probabilities``: ``[n, c]``), detached.

        ``loss`` is the mean over the example's own elements without class weights in its scale; ``margin``, ``el2n``
        and ``wrong`` likewise; ``predicted`` and ``label`` (integers, -1 if ignored) and ``probabilities`` only if
        there is one class decision per example.
        """

    def scale(self, coefficient: Tensor, n: int, reference: float | None = None) -> Tensor:
        """Return the weight of each element in its example's own loss ``ℓ``, where the batch loss is the mean of ℓ.

        Args:
            coefficient: Derivative of the batch loss with respect to ``output``.
            n: Number of examples in the batch.
            reference: Mean weight per example (``mean``) or batch size (``sum``) of the whole training set; by
                default that of this batch. See ``batch_reference``.

        Returns:
            Scalar, or one weight per element for ``reduction="none"``.
        """
        if self.reduction == "none":
            return n * coefficient
        value = self.batch_reference(n) if reference is None else reference
        return coefficient * value if self.reduction == "sum" else coefficient / value

    def batch_reference(self, n: int) -> float:
        """Return the number that makes this call's scale depend on the batch it was made with.

        For ``mean`` it is the sum of weights per example (1 for plain cross-entropy), for ``sum`` the batch size.
        """
        if self.reduction == "sum":
            return float(n)
        return float(self.weights().sum()) / n if self.reduction == "mean" else 1.0

    def natural_reference(self, n: int) -> float | None:
        """Return the reference that needs no look at the other examples, if there is one."""
        return None

    def scale_varies(self, n: int) -> bool:
        """Tell whether the same example would weigh differently in another batch."""
        return self.reduction == "sum"

    def per_example(self, values: Tensor, n: int) -> Tensor:
        """Sum element values over each example's own rows and positions: ``[r, ...] -> [n]``."""
        return values.reshape(n, -1).sum(1)

    def rows_match(self, n: int) -> bool:
        """Tell whether the rows of ``input`` can be shared out evenly over ``n`` examples."""
        return self.input.ndim >= 1 and self.input.shape[0] > 0 and self.input.shape[0] % n == 0

    def _mean(self, values: Tensor, mask: Tensor, n: int) -> Tensor:
        """Average element values over each example's own counted elements."""
        mask = mask.to(values.dtype)
        return self.per_example(torch.where(mask > 0, values, 0) * mask, n) / self.per_example(mask, n)


@dataclass(frozen=True, eq=False)
class CrossEntropy(LossCall):
    """``F.cross_entropy`` on logits or ``F.nll_loss`` on log-probabilities, ``input: [r, c, ...]``.

    Covers class weights, ``ignore_index``, label smoothing and probability targets.
    """

    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    log_probabilities: bool = False

    def rows_match(self, n: int) -> bool:
        """Tell whether there are rows at all (a single example may come as ``[c]``) and ``n`` shares of them."""
        return self.input.ndim >= 2 and super().rows_match(n)

    def natural_reference(self, n: int) -> float | None:
        """Return 1 where each example makes one decision: those without a label then simply have no loss."""
        plain = self.reduction == "mean" and self.class_weights is None and not self._soft
        return 1.0 if plain and self.target.numel() == n else None

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        if self.log_probabilities:
            return F.nll_loss(
                self.input, self.target, self.class_weights, ignore_index=self.ignore_index, reduction="none"
            )
        return F.cross_entropy(
            self.input,
            self.target,
            self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    def weights(self) -> Tensor:
        """Return ``[r, ...]``: class weight of the target, 0 where ignored."""
        if self._soft:  # torch divides by the number of elements here, whatever the class weights
            return torch.ones_like(self.input[:, 0])
        kept = self._kept
        if self.class_weights is None:
            return kept.to(self.input.dtype)
        return self.class_weights[self.target.where(kept, 0)] * kept

    def scale_varies(self, n: int) -> bool:
        """Tell whether the same example would weigh differently in another batch: weights, ignored targets, sums."""
        uneven = self.reduction == "mean" and not self._soft and self.natural_reference(n) is None
        return uneven or super().scale_varies(n)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """Return one number per class decision."""
        return (self.input.shape[0] // n, *self.input.shape[2:])

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``sqrt(scale * mass) * (p - onehot(sampled))``; Kunstner et al. 2019 (1905.12558)."""
        probabilities = self._probabilities()
        uniform = noise.to(probabilities).reshape(self.input[:, 0].shape).unsqueeze(1)
        cumulative = probabilities.cumsum(1)
        # The last class takes what rounding leaves below 1.
        sampled = (cumulative < uniform * cumulative[:, -1:]).sum(1, keepdim=True)
        sampled = sampled.clamp_(max=self.input.shape[1] - 1)
        one = torch.ones_like(probabilities)
        return (probabilities.scatter_add(1, sampled, -one)) * self._root(scale).unsqueeze(1)

    def exact_draws(self, n: int) -> int | None:
        """Return ``c`` if each example makes one decision."""
        return self.input.shape[1] if self.input.shape[0] == n and self.input.ndim == 2 else None

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield ``sqrt(scale * mass * p_c) * (p - onehot(c))`` for every class ``c``."""
        probabilities = self._probabilities()
        root = self._root(scale)
        for c in range(probabilities.shape[1]):
            column = probabilities.clone()
            column[:, c] -= 1
            yield column * (root * probabilities[:, c].sqrt()).unsqueeze(1)

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return loss, margin (target logit minus the largest other), EL2N, wrong and the class decision."""
        call = self._detached()
        logits, probabilities = call.input, call._probabilities()
        kept = call._kept
        label = call._hard_target()
        others = logits.scatter(1, label.unsqueeze(1), -math.inf).amax(1)
        margin = logits.gather(1, label.unsqueeze(1)).squeeze(1) - others
        predicted = logits.argmax(1)
        if call._soft:
            difference = probabilities - call.target
            # A class that is impossible (log-probability -inf) and not the target adds nothing.
            unweighted = -torch.where(call.target > 0, call._log_probabilities() * call.target, 0).sum(1)
        else:  # without a one-hot tensor: logits may be as large as anything in training
            one = torch.ones_like(label, dtype=probabilities.dtype).unsqueeze(1)
            difference = probabilities.scatter_add(1, label.unsqueeze(1), -one)
            unweighted = -call._log_probabilities().gather(1, label.unsqueeze(1)).squeeze(1)
        result = {
            "loss": self._mean(unweighted, kept, n),
            "margin": self._mean(margin, kept, n),
            "el2n": self._mean(difference.norm(dim=1), kept, n),
            "wrong": self._mean((predicted != label).to(logits.dtype), kept, n),
        }
        if self.exact_draws(n) is not None:
            result |= {
                "predicted": predicted,
                "label": label.masked_fill(~kept, -1),
                "probabilities": probabilities,
            }
        return result

    @property
    def _soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def _kept(self) -> Tensor:
        if self._soft:
            return torch.ones_like(self.input[:, 0], dtype=torch.bool)
        return self.target != self.ignore_index

    def _detached(self) -> CrossEntropy:
        return CrossEntropy(
            self.output.detach(),
            _working_precision(self.input.detach()),
            self.target,
            self.reduction,
            self.class_weights,
            self.ignore_index,
            self.label_smoothing,
            self.log_probabilities,
        )

    def _hard_target(self) -> Tensor:
        return self.target.argmax(1) if self._soft else self.target.where(self._kept, 0)

    def _log_probabilities(self) -> Tensor:
        logits = _working_precision(self.input.detach())
        return logits if self.log_probabilities else logits.log_softmax(1)

    def _probabilities(self) -> Tensor:
        return self._log_probabilities().exp()

    def _root(self, scale: Tensor) -> Tensor:
        """Square root of each element's factor in front of ``diag(p) - p pᵀ``."""
        smoothing, classes = self.label_smoothing, self.input.shape[1]
        smooth = self.target * (1 - smoothing) + smoothing / classes if self._soft else self.target
        if self.class_weights is None:
            mass = smooth.sum(1) if self._soft else self._kept.to(self.input.dtype)
        elif self._soft:
            mass = torch.einsum("rc...,c->r...", smooth.to(self.class_weights.dtype), self.class_weights)
        else:
            own = self.class_weights[self._hard_target()]
            mass = ((1 - smoothing) * own + smoothing * self.class_weights.mean()) * self._kept
        return _root_of(scale * mass)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(LossCall):
    """``F.binary_cross_entropy_with_logits``, ``input`` and ``target``: ``[r, ...]`` of the same shape."""

    element_weights: Tensor | None = None
    pos_weight: Tensor | None = None

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        return F.binary_cross_entropy_with_logits(
            self.input, self.target, self.element_weights, pos_weight=self.pos_weight, reduction="none"
        )

    def weights(self) -> Tensor:
        """Return ones: torch's mean counts elements, not weights."""
        return torch.ones_like(self.input)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """Return one number per element."""
        return (self.input.shape[0] // n, *self.input.shape[1:])

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``sqrt(scale * mass) * (sigmoid(z) - sampled)``."""
        probabilities = _working_precision(self.input.detach()).sigmoid()
        sampled = (noise.to(probabilities).reshape(self.input.shape) < probabilities).to(probabilities.dtype)
        return (probabilities - sampled) * self._root(scale)

    def exact_draws(self, n: int) -> int | None:
        """Return the number of outputs of one example."""
        return math.prod(self.noise_shape(n))

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield one column per output: its Hessian is diagonal."""
        probabilities = _working_precision(self.input.detach()).sigmoid()
        diagonal = (probabilities * (1 - probabilities)).sqrt() * self._root(scale)
        yield from _diagonal_columns(diagonal, n)

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return means over the example's outputs, and the class decision if it has just one output."""
        logits = _working_precision(self.input.detach())
        probabilities = logits.sigmoid()
        sign = 2 * self.target - 1
        every = torch.ones_like(logits)
        plain = F.binary_cross_entropy_with_logits(logits, self.target, reduction="none")
        result = {
            "loss": self._mean(plain, every, n),
            "margin": self._mean(logits * sign, every, n),
            # times sqrt(2): the distance of the two-class probability vectors, as for softmax
            "el2n": self._mean((probabilities - self.target).abs() * math.sqrt(2), every, n),
            "wrong": self._mean(((logits > 0) != (self.target > 0.5)).to(logits.dtype), every, n),
        }
        if math.prod(self.noise_shape(n)) == 1:
            positive = probabilities.reshape(n)
            result |= {
                "predicted": (logits > 0).reshape(n).long(),
                "label": (self.target > 0.5).reshape(n).long(),
                "probabilities": torch.stack([1 - positive, positive], 1),
            }
        return result

    def _root(self, scale: Tensor) -> Tensor:
        mass = torch.ones_like(self.input, dtype=_working_precision(self.input).dtype)
        if self.pos_weight is not None:
            mass = mass * (self.pos_weight * self.target + 1 - self.target)
        if self.element_weights is not None:
            mass = mass * self.element_weights
        return _root_of(scale * mass)


@dataclass(frozen=True, eq=False)
class SquaredError(LossCall):
    """``F.mse_loss``, ``input`` and ``target``: ``[r, ...]``. Its Hessian is 2 per element (not 1)."""

    def elements(self) -> Tensor:
        """Return ``[r, ...]``."""
        return (self.input - self.target).square()

    def weights(self) -> Tensor:
        """Return ones."""
        return torch.ones_like(self.input)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """Return one number per element."""
        return (self.input.shape[0] // n, *self.input.shape[1:])

    def sampled_gradient(self, scale: Tensor, noise: Tensor) -> Tensor:
        """Return ``sqrt(2 scale)`` times normal noise: a pseudo-target ``f + N(0, 1)`` of the halved loss."""
        # In the noise's own float64: rounded to float32, a uniform number can be 1 and the normal one infinite.
        normal = torch.special.ndtri(noise).reshape(self.input.shape)
        root = self._root(scale)
        scaled: Tensor = normal.to(root) * root
        return scaled

    def exact_draws(self, n: int) -> int | None:
        """Return the number of outputs of one example."""
        return math.prod(self.noise_shape(n))

    def exact_gradients(self, scale: Tensor, n: int) -> Iterator[Tensor]:
        """Yield one column per output."""
        yield from _diagonal_columns(self._root(scale), n)

    def statistics(self, n: int) -> dict[str, Tensor]:
        """Return the loss and the size of the residual (as EL2N)."""
        residual = (_working_precision(self.input.detach()) - self.target).reshape(n, -1)
        return {"loss": residual.square().mean(1), "el2n": residual.norm(dim=1)}

    def _root(self, scale: Tensor) -> Tensor:
        return _root_of(2 * scale * torch.ones_like(self.input, dtype=_working_precision(self.input).dtype))


def known_loss(function: Callable[..., Any]) -> bool:
    """Tell whether calls of ``function`` are understood."""
    return function in _READERS


def read_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> LossCall | None:
    """Turn one call of a known loss function into a ``LossCall``.

    Args:
        function: A function for which ``known_loss`` is true.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output: What the call returned.

    Returns:
        The call, its logits still attached to the graph; None for a form that is not understood (broadcasting).
    """
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    return _READERS[function](output, bound.arguments)


def _reduction(arguments: dict[str, Any]) -> str:
    if arguments["size_average"] is None and arguments["reduce"] is None:
        return str(arguments["reduction"])
    # size_average/reduce are deprecated but still obeyed by torch, whatever `reduction` says.
    if arguments["reduce"] is False:
        return "none"
    return "sum" if arguments["size_average"] is False else "mean"


def _read_cross_entropy(output: Tensor, a: dict[str, Any]) -> LossCall:
    return CrossEntropy(
        output,
        a["input"],
        a["target"],
        _reduction(a),
        class_weights=a["weight"],
        ignore_index=a["ignore_index"],
        label_smoothing=a["label_smoothing"],
    )


def _read_nll(output: Tensor, a: dict[str, Any]) -> LossCall:
    return CrossEntropy(
        output,
        a["input"],
        a["target"],
        _reduction(a),
        class_weights=a["weight"],
        ignore_index=a["ignore_index"],
        log_probabilities=True,
    )


def _read_bce(output: Tensor, a: dict[str, Any]) -> LossCall:
    return BinaryCrossEntropy(
        output,
        a["input"],
        a["target"],
        _reduction(a),
        element_weights=a["weight"],
        pos_weight=a["pos_weight"],
    )


def _read_mse(output: Tensor, a: dict[str, Any]) -> LossCall | None:
    if a.get("weight") is not None or a["input"].shape != a["target"].shape:
        return None  # broadcasting or weighted errors: left to the untapped path
    return SquaredError(output, a["input"], a["target"], _reduction(a))


_READERS: dict[Callable[..., Any], Callable[[Tensor, dict[str, Any]], LossCall | None]] = {
    F.cross_entropy: _read_cross_entropy,
    F.nll_loss: _read_nll,
    F.binary_cross_entropy_with_logits: _read_bce,
    F.mse_loss: _read_mse,
}
_SIGNATURES = {function: inspect.signature(function) for function in _READERS}


def _working_precision(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _root_of(values: Tensor) -> Tensor:
    if bool((values < 0).any()):
        raise ValueError(
            f"a loss term enters the batch loss with a negative weight ({float(values.min()):.3g}); the Fisher and the "
            'GGN need weights >= 0. Pass `fisher="empirical"`, or a `task=` whose loss leaves that term out.'
        )
    return values.sqrt()


def _diagonal_columns(diagonal: Tensor, n: int) -> Iterator[Tensor]:
    """Yield, for each entry of one example's part of ``diagonal: [r, ...]``, a tensor with everything else 0."""
    flat = diagonal.reshape(n, -1)
    for k in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, k] = flat[:, k]
        yield column.reshape(diagonal.shape)
