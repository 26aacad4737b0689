"""Fitting curvature: which examples, which labels, how many passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import cast

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.precision import wide, wide_zeros, working_dtype
from lightning_influence.curvature.blocks.block import RELATIVE_DAMPING, CurvatureBlock, Measure
from lightning_influence.curvature.choices import FactorExamples, check_solver, choose_solver, random_subset
from lightning_influence.curvature.coordinates import BlockCoordinates, joined_gradients
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.full import (
    DenseCurvature,
    ImplicitCurvature,
    IterativeSolver,
    Solver,
    mean_eigenvalue,
)
from lightning_influence.curvature.registry import LADDER, CurvatureName, check_memory
from lightning_influence.curvature.saved import checksum
from lightning_influence.curvature.solve.spectrum import IndefiniteError
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients, Labels

# Examples that a curvature is tried out on before training.
_LOOKED_AT = 4


def fit(
    gradients: ExampleGradients,
    name: CurvatureName,
    indices: Sequence[int],
    *,
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    damping: float | Mapping[str, float] | None = None,
    solver: Solver = "auto",
    seed: int = 0,
) -> Curvature:
    """Fit one curvature approximation.

    Args:
        gradients: The passes.
        name: Which approximation, see ``ladder``.
        indices: The training examples; random subsets of them are used.
        examples: Subset sizes.
        labels: Labels of the covariance and eigenvalue passes; approximations with one pass in the parameter basis
            take the latter, products none.
        damping: Absolute λ for every block, or one by block name; by default 0.1 times the mean eigenvalue of each
            block (of all parameters for GGN and Hessian).
        solver: For GGN and Hessian: ``"dense"`` forms the matrix; ``"cg"`` (conjugate gradients), ``"nystrom"`` and
            ``"pcg"`` (the same, preconditioned with a sketch of the matrix, see ``nystrom``, or with EK-FAC) and
            ``"lissa"`` need its products only. ``"auto"`` is dense for up to 4,096 parameters, else ``"nystrom"`` for
            the GGN and ``"cg"`` for the Hessian, which a sketch may not be taken of.
        seed: Seed of the subsets.

    Returns:
        The fitted curvature.

    Raises:
        ValueError: If ``damping`` leaves a block singular, a block is missing in it, no example has finite gradients,
            or the memory does not suffice.
        IndefiniteError: If a Hessian has eigenvalues below ``-λ``.
        TaskError: If GGN or Hessian are not defined for the loss, or the model can't be differentiated twice.
    """
    blocks = gradients.coverage.blocks
    if isinstance(damping, Mapping) and (missing := blocks.keys() - damping.keys()):
        raise ValueError(f"damping has no entry for {sorted(missing)}; expected one for every covered layer.")
    check_memory(name, blocks)
    curvature = (
        _fit_blocks(gradients, name, indices, examples, labels, damping, seed)
        if LADDER[name].product is None
        else _fit_full(gradients, name, indices, examples, labels, damping, solver, seed)
    )
    curvature.weights = {layer: checksum(block) for layer, block in blocks.items()}
    return curvature


def check_curvature(gradients: ExampleGradients, name: CurvatureName, indices: Sequence[int]) -> None:
    """Find out before training whether a curvature can be had after it, from a few examples.

    Raises:
        ValueError: If the memory does not suffice.
        TaskError: If GGN or Hessian are not defined for the loss, or the model can't be differentiated twice.
    """
    check_memory(name, gradients.coverage.blocks)
    make = LADDER[name].product
    if make is None:
        return
    trial = gradients.with_scale(None)  # that of the data is not worth a pass yet
    if usable := _usable(trial, indices[: 4 * _LOOKED_AT])[:_LOOKED_AT]:
        make(trial, usable, parameters=BlockCoordinates(gradients.coverage.blocks).parameters)


def _fit_blocks(
    gradients: ExampleGradients,
    name: str,
    indices: Sequence[int],
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    damping: float | Mapping[str, float] | None,
    seed: int,
) -> BlockCurvature:
    kind = LADDER[name].block
    covered = gradients.coverage.blocks
    blocks = {name: kind(block.shape, block.dense) for name, block in covered.items()}
    chosen: dict[Measure, tuple[Labels, int]] = {
        "covariances": (labels[0], examples.covariances),
        "eigenvalues": (labels[1], examples.eigenvalues),
    }
    used = []
    for number, measure in enumerate(kind.measures):
        which, size = chosen[measure]
        subset = random_subset(indices, size, seed)
        used.append(len(subset))
        # Another draw for each pass: eigenvalues measured with that of their basis come out biased.
        run = gradients.run(subset, which, draw=1 + number, title=f"{kind.title} {measure}")
        with closing(run) as batches:
            counted = _update(blocks, batches)
        # Layers that the forward pass never reached have an all-zero gradient: their curvature is zero too.
        for layer, block in blocks.items():
            for x, g in covered[layer].no_rows(*_kind_of_tensor(gradients)):
                block.update(x, [g], 0)
            with _naming(layer):
                block.end_pass(counted)
    dampings = {layer: _block_damping(layer, block, damping) for layer, block in blocks.items()}
    return BlockCurvature(name, blocks, dampings, [chosen[measure][0] for measure in kind.measures], used)


def _block_damping(layer: str, block: CurvatureBlock, damping: float | Mapping[str, float] | None) -> float:
    if damping is not None:
        value = damping[layer] if isinstance(damping, Mapping) else damping
        block.check_damping(value)
        return value
    if not block.measures:
        return block.damping()
    # A layer without any gradient has no scale of its own; its scores are zero with any damping.
    return block.damping() or 1.0


def _fit_full(
    gradients: ExampleGradients,
    name: str,
    indices: Sequence[int],
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    damping: float | Mapping[str, float] | None,
    solver: Solver,
    seed: int,
) -> Curvature:
    check_solver(cast(CurvatureName, name), solver)
    coordinates = BlockCoordinates(gradients.coverage.blocks)
    for value in damping.values() if isinstance(damping, Mapping) else [] if damping is None else [damping]:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"damping is {value!r}; expected a number >= 0, and > 0 if the {name} is singular.")
    make = LADDER[name].product
    assert make is not None
    subset = random_subset(indices, len(indices) if examples.products is None else examples.products, seed)
    usable = _usable(gradients, subset)
    product = make(gradients, usable or subset, parameters=coordinates.parameters)
    like = product.gradient.new_zeros(coordinates.size)
    chosen, notes = choose_solver(solver, coordinates.size, product.flat.device, semidefinite=product.semidefinite)
    matrix = None
    if chosen == "dense":
        matrix = _dense_ggn(gradients, usable or subset, coordinates, like) if product.semidefinite else None
        if matrix is None:
            places = coordinates.places_in(product.flat)
            matrix = product.to_dense(limit=coordinates.size)[places][:, places]
    if damping is None:
        mean = mean_eigenvalue(product, like) if matrix is None else float(wide(matrix.diagonal()).mean())
        if mean <= 0:
            raise IndefiniteError(
                f"the mean eigenvalue of the {name} is {mean:.3g}: there is no relative damping. Pass a number, "
                '`damping="trainer"`, or use the GGN.'
            )
        dampings = dict.fromkeys(coordinates.blocks, RELATIVE_DAMPING * mean)
    elif isinstance(damping, Mapping):
        dampings = {layer: damping[layer] for layer in coordinates.blocks}
    else:
        dampings = dict.fromkeys(coordinates.blocks, damping)
    curvature: Curvature
    if matrix is not None:
        curvature = DenseCurvature(name, matrix, coordinates, dampings, [], [product.examples])
    else:
        blocks = _fit_blocks(gradients, "ekfac", indices, examples, labels, dampings, seed)
        notes.append(
            f"self_influence is that of EK-FAC with the same damping: with the {name} it would take a solve for every "
            f"training example. What is solved with the {name}: harm, and scores of queries."
        )
        curvature = ImplicitCurvature(
            name,
            product,
            coordinates,
            dampings,
            solver=cast("IterativeSolver", chosen),
            blocks=blocks,
            labels=blocks.labels,
            examples=[product.examples, *blocks.examples],
            seed=seed,
        )
    if left_out := len(subset) - product.examples:
        notes.append(f"{left_out} examples with a non-finite loss or gradient are not in the {name}.")
    curvature.notes += notes
    return curvature


def _usable(gradients: ExampleGradients, indices: Sequence[int]) -> list[int]:
    """Return the examples whose gradients can be squared, on every process: products see none of what they multiply."""
    kept: list[int] = []
    with closing(gradients.run(indices)) as batches:
        for batch in batches:
            kept += [index for index, good in zip(batch.indices, batch.finite.tolist(), strict=True) if good]
    own = torch.tensor(kept, dtype=torch.long, device=gradients.device)
    found = set(distributed.gather_by_index(own, {})[0].tolist())
    return [index for index in indices if index in found]


def _dense_ggn(
    gradients: ExampleGradients, indices: Sequence[int], coordinates: BlockCoordinates, like: Tensor
) -> Tensor | None:
    """Return the GGN ``[p, p]`` as the mean of outer products of per-example gradients, where that is the cheaper way.

    The exact expectation over labels makes it, ``Σ_draws v vᵀ``, at ``2 d p²`` operations an example for ``d`` draws.
    Products with ``p`` unit vectors cost about eight passes forward, ``8 p Σ_l s_l p_l`` for layers that share ``p_l``
    parameters over ``s_l`` positions, so that convolutions are better off with outer products.
    """
    draws, forward = 0, 0
    # The same example on every process: they all have to decide alike.
    with closing(gradients.run(indices[:1], everywhere=True)) as batches:
        for batch in batches:
            draws = batch.loss.exact_draws() or 0
            forward = sum(io.x.shape[2] * coordinates.sizes[io.name] for io in batch.layers())
    if not draws or draws * coordinates.size > 4 * forward:
        return None
    total = like.new_zeros((coordinates.size, coordinates.size))
    count = wide_zeros((), like.device)
    with closing(gradients.run(indices, "exact", title="GGN")) as batches:
        for batch in batches:
            count += batch.counted
            for draw in range(draws):
                rows = joined_gradients(batch, coordinates, draw)
                # np, nr -> pr
                total.addmm_(rows.T, rows)
    summed, examples = distributed.sum_across_processes([total, count])
    return summed / examples.to(summed.dtype)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Say which layer's decomposition failed."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"the curvature of {layer!r} can't be decomposed: {error} Leave it out by `layers=`, or use "
            '`curvature="diagonal"`.'
        ) from error


def _update(blocks: Mapping[str, CurvatureBlock], batches: Iterator[BatchGradients]) -> int:
    total = 0
    for batch in batches:
        counted = batch.counted
        total += counted
        for io in batch.drained():
            blocks[io.name].update(io.activations, io.gs, counted)
    return total


def _kind_of_tensor(gradients: ExampleGradients) -> tuple[torch.dtype, torch.device]:
    like = next(p for p in gradients.module.parameters() if p.is_floating_point())
    return working_dtype(like.dtype), like.device
