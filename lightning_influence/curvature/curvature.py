"""Fitted curvature of all covered parameters, whatever it is made of: solving and scoring.

Vectors over all covered parameters go by block, name -> ``[..., k, o, i]`` (see ``layers``). Nobody outside this
package asks which approximation it is.

Index legend: ``n`` examples of a batch, ``k`` groups, ``o`` outputs, ``i`` inputs of a block.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.core.precision import summed, wide_zeros
from lightning_influence.curvature.blocks.block import CurvatureBlock, Eigenbasis
from lightning_influence.curvature.solve.solution import Solution
from lightning_influence.gradients.capture import LayerIO


class Scorer:
    """Adds up one batch's scores, block by block: each block is laid out once, in ``BatchGradients.layers``."""

    def __init__(self, curvature: Curvature, n: int) -> None:
        self._curvature, self._n = curvature, n
        self._parts: dict[str, Tensor] = {}

    def add(self, io: LayerIO, query: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Take one block's activations and output gradients.

        Args:
            io: The block of a batch of ``n`` examples.
            query: The block ``[k, o, i]`` of a vector to multiply with, usually ``(C + λ)⁻¹ g_q``.

        Returns:
            The block's part of the squared gradient norms ``[n]``, and of the inner products with ``query``.
        """
        norms, self._parts[io.name], inner = self._curvature.scores(io, query)
        return norms, inner

    def self_influence(self) -> Tensor:
        """Return ``gᵀ (C + λ)⁻¹ g`` of every example, ``[n]`` in the widest type, once all blocks have been added."""
        return self._curvature.self_influence(self._parts, self._n)


class Curvature(ABC):
    """A curvature of the mean loss, with its damping: ``C + λ``.

    Attributes:
        name: Which approximation.
        dampings: Block name to absolute damping λ.
        labels: Which labels each pass over the data used; products with GGN and Hessian use none.
        examples: Number of examples that each pass, and the products, saw.
        notes: What a reader of its scores should know.
        weights: Block name to a checksum of the weights that it was fitted at, see ``saved``.
        solves: How the iterative solver fared, one entry for each ``solve``; empty where solving is exact.
    """

    def __init__(
        self, name: str, dampings: Mapping[str, float], labels: Sequence[str], examples: Sequence[int]
    ) -> None:
        self.name = name
        self.dampings = dict(dampings)
        self.labels = tuple(labels)
        self.examples = tuple(examples)
        self.notes: list[str] = []
        self.weights: dict[str, str] = {}
        self.solves: list[Solution] = []

    def __repr__(self) -> str:
        least, most = min(self.dampings.values(), default=0.0), max(self.dampings.values(), default=0.0)
        damping = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        fitted = f", fitted on {max(self.examples):,} examples" if any(self.examples) else ""
        return f"{self.name} of {len(self.dampings)} layers with damping {damping}{fitted}"

    @property
    @abstractmethod
    def blockwise(self) -> BlockCurvature | None:
        """The block-diagonal curvature that self-influence is measured with; None where it is no sum over blocks."""

    @abstractmethod
    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(C + λ)⁻¹ v``, block by block: name -> ``[..., k, o, i]``.

        Raises:
            SolverError: If an iterative solver did not reach its tolerance; the message gives the way out.
        """

    def eigenbasis(self, name: str) -> Eigenbasis | None:
        """Return where solving is elementwise for one block, whatever the others are; None if there is no such basis.

        ``solve`` need not be given such blocks.
        """
        return None

    def scorer(self, n: int) -> Scorer:
        """Return what adds up the scores of one batch of ``n`` examples."""
        return Scorer(self, n)

    @abstractmethod
    def scores(self, io: LayerIO, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what one block of a batch adds: see ``Scorer.add``, and in between what ``self_influence`` takes."""

    def self_influence(self, parts: Mapping[str, Tensor], n: int) -> Tensor:
        """Put the blocks' parts together, ``[n]``: here they add up."""
        return summed(list(parts.values())) if parts else wide_zeros(n, torch.device("cpu"))

    @abstractmethod
    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return what the store keeps: file name -> tensors and text about them; ``saved.restored`` takes it back."""

    def about(self, layers: Collection[str]) -> dict[str, str]:
        """Return the text about stored tensors, those of some layers."""
        own = {
            "dampings": {layer: self.dampings[layer] for layer in layers},
            "weights": {layer: self.weights.get(layer, "") for layer in layers},
        }
        told = own | {"labels": self.labels, "examples": self.examples}
        return {"curvature": self.name, "kind": self.name, **{name: json.dumps(value) for name, value in told.items()}}


class BlockCurvature(Curvature):
    """A block-diagonal curvature, one block per layer.

    Attributes:
        blocks: Block name to its curvature.
    """

    def __init__(
        self,
        name: str,
        blocks: Mapping[str, CurvatureBlock],
        dampings: Mapping[str, float],
        labels: Sequence[str],
        examples: Sequence[int],
    ) -> None:
        super().__init__(name, dampings, labels, examples)
        self.blocks = dict(blocks)

    @property
    def blockwise(self) -> BlockCurvature:
        """The curvature itself."""
        return self

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``(C + λ)⁻¹ v``, block by block: name -> ``[..., k, o, i]``."""
        return {name: self.blocks[name].solve(v, self.dampings[name]) for name, v in vectors.items()}

    def eigenbasis(self, name: str) -> Eigenbasis | None:
        """Return where solving is elementwise for one block; None if there is no such basis."""
        return self.blocks[name].eigenbasis(self.dampings[name])

    def scores(self, io: LayerIO, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return squared gradient norms, self-influence and inner products with ``query`` within one block."""
        return self.blocks[io.name].scores(io.x, io.gs[0], self.dampings[io.name], query)

    def tensors(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Return the fitted state of every block; a tensor of several is with the first, and the others name that."""
        owners: dict[int, str] = {}
        files = {}
        for name, block in self.blocks.items():
            owner = {key: owners.setdefault(id(tensor), name) for key, tensor in block.tensors.items()}
            own = {key: tensor for key, tensor in block.tensors.items() if owner[key] == name}
            shared = {key: other for key, other in owner.items() if other != name}
            files[name] = own, self.about([name]) | ({"shared": json.dumps(shared)} if shared else {})
        return files
