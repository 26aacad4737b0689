"""Fitting curvature: which examples, which labels, how many passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.core.memory import available_bytes, fits, readable
from lightning_influence.core.precision import wide, wide_zeros, working_dtype
from lightning_influence.curvature.blocks.block import RELATIVE_DAMPING, CurvatureBlock, Measure
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
from lightning_influence.curvature.solve.spectrum import IndefiniteError
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.passes import NO_EXACT_LABELS, BatchGradients, ExampleGradients, Labels
from lightning_influence.objective.losses import known_losses
from lightning_influence.objective.terms import TaskError

Fisher = Literal["auto", "exact", "sampled", "empirical"]

# Up to so many parameters the matrix is formed (float64: 134 MB), which gives exact self-influence of all examples.
_DENSE_BY_ITSELF = 4096
# A dense matrix in float32, made symmetric, in block order, in float64, and its factor.
_DENSE_BYTES = 28
# Examples that a curvature is tried out on before training.
_LOOKED_AT = 4
# Products with more examples than this estimate the curvature hardly better, and cost a pass each.
_PRODUCT_EXAMPLES = 8192


@dataclass(frozen=True)
class FactorExamples:
    """How many examples each pass over the data sees.

    Attributes:
        covariances: For the eigenvectors (first pass).
        eigenvalues: For what is measured in the eigenbasis (second pass).
        products: For products with GGN or Hessian; None for all.
    """

    covariances: int
    eigenvalues: int
    products: int | None = None


def factor_examples(coverage: Coverage, positions: Mapping[str, int], draws: int, size: int) -> FactorExamples:
    """Return subset sizes that give every factor enough rows and do not grow with the data.

    A covariance of dimension ``m`` gets at least ``2 m`` rows, an example giving ``s`` of them (sides that keep the
    identity as their basis do not count). Beyond that both passes see 1,024 examples, or 512 where weights are shared
    over positions, which make an example worth more; exact labels make them worth more, too. LDS with all examples,
    1,024 and 512: .570, .567 and .560 (digits, MLP), .171, .167 and .169 (MNIST, CNN).

    Args:
        coverage: The layers.
        positions: Layer name to number of positions ``s``.
        draws: Labels per example in the second pass.
        size: Number of training examples.
    """
    rows = max(
        (math.ceil(2 * max(block.basis_sizes) / positions.get(name, 1)) for name, block in coverage.blocks.items()),
        default=0,
    )
    least = 512 if any(s > 1 for s in positions.values()) else 1024
    eigenvalues = min(size, least if draws <= 1 else max(256, 4096 // draws))
    # At least as many for the basis: outside of what it has seen, there is nothing to measure the eigenvalues in.
    return FactorExamples(min(size, max(least, rows, eigenvalues)), eigenvalues, min(size, _PRODUCT_EXAMPLES))


def choose_labels(fisher: Fisher, tapped: bool) -> tuple[Labels, Labels]:
    """Return the labels of the covariance pass and of the eigenvalue pass.

    Sampled labels are drawn by their part of the curvature (``losses``), which leaves little to gain from the exact
    expectation at a backward pass for every class. Measured (LDS on digits): labels drawn from the model itself .550,
    with exact eigenvalues .575; drawn by their part of the curvature .570; all exact .572.

    Args:
        fisher: ``"auto"`` samples, if there is anything to sample from.
        tapped: Whether the loss is known at all.
    """
    if fisher == "empirical" or (fisher == "auto" and not tapped):
        return "true", "true"
    return ("exact", "exact") if fisher == "exact" else ("sampled", "sampled")


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
    if LADDER[name].product is None:
        return _fit_blocks(gradients, name, indices, examples, labels, damping, seed)
    return _fit_full(gradients, name, indices, examples, labels, damping, solver, seed)


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


def check_labels(name: CurvatureName, fisher: Fisher, tapped: bool, exact_draws: int | None) -> None:
    """Find out before training whether a curvature can have the labels that are asked for.

    Args:
        name: Which approximation.
        fisher: Which labels.
        tapped: Whether the loss is known at all.
        exact_draws: Those of one example, None where the expectation over labels has no closed form.

    Raises:
        TaskError: If it is the exact expectation, and that has none.
    """
    if fisher == "exact" and exact_draws is None and (LADDER[name].block.measures or LADDER[name].product):
        unknown = f'no known loss call was seen ({known_losses()}); use `fisher="empirical"`.'
        raise TaskError(f'fisher="exact": {NO_EXACT_LABELS if tapped else unknown}')


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


def check_solver(name: CurvatureName, solver: Solver) -> None:
    """Refuse a solver that can't be had with a curvature.

    Raises:
        ValueError: For Nyström on what may have negative eigenvalues.
    """
    product = LADDER[name].product
    if solver == "nystrom" and product is not None and not product.semidefinite:
        raise ValueError(
            f'solver="nystrom" needs a curvature without negative eigenvalues, curvature={name!r} may have some: pass '
            '`solver="cg"` or "pcg", or `curvature="ggn"`.'
        )


def choose_solver(
    solver: Solver, size: int, device: torch.device, *, semidefinite: bool = True
) -> tuple[str, list[str]]:
    """Return the solver to take for ``size`` parameters, and what to say about it."""
    needed = _DENSE_BYTES * size * size
    iterative = "nystrom" if semidefinite else "cg"
    if solver == "auto":
        return ("dense" if size <= _DENSE_BY_ITSELF and fits(needed, device) else iterative), []
    if solver != "dense" or fits(needed, device):
        return solver, []
    note = (
        f"a dense matrix of {size:,} parameters takes {readable(needed)}, and {readable(available_bytes(device) or 0)} "
        f'are available: solver="{iterative}" was taken instead.'
    )
    return iterative, [note]


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


def random_subset(indices: Sequence[int], size: int, seed: int) -> list[int]:
    """Return ``size`` of the indices at random, in their own order; which ones depends on neither order nor process."""
    if size >= len(indices):
        return list(indices)
    generator = torch.Generator().manual_seed(seed)
    ranked = sorted(indices)
    chosen = {ranked[position] for position in torch.randperm(len(ranked), generator=generator)[:size].tolist()}
    return [index for index in indices if index in chosen]


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
