"""Fitting curvature: passes over a random subset of the examples, and a damping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

from lightning_influence.core import distributed
from lightning_influence.core.precision import wide, working_dtype
from lightning_influence.core.weights import checksum
from lightning_influence.curvature.blocks.block import RELATIVE_DAMPING, CurvatureBlock, Measure, end_passes
from lightning_influence.curvature.blocks.kfac import KFACBlock
from lightning_influence.curvature.choices import FactorExamples, Solver, check_solver, choose_solver, random_subset
from lightning_influence.curvature.coordinates import BlockCoordinates
from lightning_influence.curvature.curvature import BlockCurvature, Curvature
from lightning_influence.curvature.dense import DenseCurvature, dense_matrix
from lightning_influence.curvature.implicit import ImplicitCurvature, mean_eigenvalues
from lightning_influence.curvature.registry import LADDER, CurvatureName, check_memory
from lightning_influence.curvature.sampled import Effort, sampled_inverse
from lightning_influence.curvature.solve.spectrum import IndefiniteError, check_damping
from lightning_influence.gradients.capture import Capture, LayerIO
from lightning_influence.gradients.passes import BatchGradients, ExampleGradients, Labels
from lightning_influence.gradients.visitors import Visitor, visit

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
    directions: int | None = None,
    solver: Solver = "auto",
) -> Curvature:
    """Fit one curvature approximation.

    Args:
        gradients: The passes.
        name: Which approximation, see ``registry``.
        indices: The training examples; random subsets of them are used.
        examples: Subset sizes.
        labels: Labels of the covariance and eigenvalue passes; approximations with one pass in the parameter basis
            take the latter, products none.
        damping: Absolute λ for every block, or one by block name; by default 0.1 times the mean eigenvalue of each
            block. For GGN and Hessian, that of all parameters; for these and the block GGN weighted with itself.
        directions: Of one example's output gradient: bounds the dimensions of K-FAC and EK-FAC by default, see
            ``KFACBlock.bounded_damping``; None for no bound.
        solver: For GGN and Hessian: ``"dense"`` forms the matrix; ``"cg"`` (conjugate gradients), ``"nystrom"`` and
            ``"pcg"`` (the same, preconditioned with a sketch of the matrix, see ``nystrom``, or with EK-FAC) and
            ``"lissa"`` need its products only; ``"woodbury"`` inverts a GGN of some gradients, see ``sampled``, and
            measures the residual with all. ``"auto"`` is dense for up to 4,096 parameters, else the cheaper one of
            ``"nystrom"`` and ``"woodbury"`` for the GGN, as the number of systems has it, and ``"cg"`` for the
            Hessian, which a sketch may not be taken of.

    Returns:
        The fitted curvature.

    Raises:
        ValueError: If ``damping`` leaves a block singular, no example has finite gradients,
            or the memory does not suffice.
        IndefiniteError: If a Hessian has eigenvalues below ``-λ``.
        TaskError: If GGN or Hessian are not defined for the loss, or the model can't be differentiated twice.
    """
    gradients = gradients.of_whole_loss()
    blocks = gradients.coverage.blocks
    dampings = None
    if damping is not None:
        given = damping if isinstance(damping, Mapping) else dict.fromkeys(blocks, damping)
        dampings = {layer: given[layer] for layer in blocks}
    check_memory(name, gradients.coverage)
    curvature: Curvature
    if LADDER[name].product is None:
        curvature = _fit_blocks(gradients, name, indices, examples, labels, dampings, directions)
    else:
        curvature = _fit_full(gradients, name, indices, examples, labels, dampings, solver)
    curvature.weights = {layer: checksum(block.parameters.values()) for layer, block in blocks.items()}
    return curvature


def check_curvature(gradients: ExampleGradients, name: CurvatureName, indices: Sequence[int]) -> None:
    """Find out before training whether a curvature can be had after it, from a few examples.

    Raises:
        ValueError: If the memory does not suffice.
        TaskError: If GGN or Hessian are not defined for the loss, or the model can't be differentiated twice.
    """
    check_memory(name, gradients.coverage)
    make = LADDER[name].product
    if make is None:
        return
    trial = gradients.with_scale(None).of_whole_loss()  # that of the data is not worth a pass yet
    with closing(trial.run(indices[: 4 * _LOOKED_AT], everywhere=True)) as batches:
        finite = [pair for batch in batches for pair in zip(batch.indices, batch.finite.tolist(), strict=True)]
    if usable := [index for index, good in finite if good][:_LOOKED_AT]:
        make(trial, usable, parameters=BlockCoordinates(gradients.coverage.blocks).parameters)


def _fit_blocks(
    gradients: ExampleGradients,
    name: str,
    indices: Sequence[int],
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    dampings: Mapping[str, float] | None,
    directions: int | None = None,
) -> BlockCurvature:
    kind = LADDER[name].block
    covered = gradients.coverage.blocks
    blocks = {layer: kind(block.shape, block.dense) for layer, block in covered.items()}
    leaders = _agreed(gradients.coverage.shared_inputs)
    for layer, leader in leaders.items():
        blocks[layer].inputs_of = blocks[leader]
    chosen: dict[Measure, tuple[Labels, int]] = {
        "covariances": (labels[0], examples.covariances),
        "eigenvalues": (labels[1], examples.eigenvalues),
    }
    used, lacks = list[int](), False
    for number, measure in enumerate(kind.measures):
        which, size = chosen[measure]
        subset = random_subset(indices, size, 0)
        used.append(len(subset))
        fitter = _Fitter(blocks, leaders if measure == "covariances" else {})
        # Another draw for each pass: eigenvalues measured with that of their basis come out biased.
        visit(gradients, subset, [fitter], which, draw=1 + number, title=f"{kind.title} {measure}")
        lacks |= fitter.remainder and which != "true"
        # Layers that the forward pass never reached have an all-zero gradient: their curvature is zero too.
        for layer, block in blocks.items():
            like = next(iter(covered[layer].parameters.values()))
            for x, g in covered[layer].no_rows(working_dtype(like.dtype), like.device):
                block.update(x, [g], 0)
        together = _agreed({layer: leader for layer, leader in leaders.items() if blocks[layer].inputs_of is not None})
        for layer in leaders.keys() - together.keys():  # what one process tells apart, all do
            blocks[layer].part()
        end_passes(blocks, fitter.examples)
    if dampings is None:
        # A layer without any gradient has no scale of its own; its scores are zero with any damping.
        found = {layer: _default_damping(block, len(indices), directions) for layer, block in blocks.items()}
        dampings = {layer: value or float(bool(kind.measures)) for layer, value in found.items()}
    for layer, block in blocks.items():
        block.check_damping(dampings[layer])
    curvature = BlockCurvature(name, blocks, dampings, [chosen[measure][0] for measure in kind.measures], used)
    if lacks:
        curvature.notes.append("the curvature lacks a part of the loss that is no known loss call")
    return curvature


def _agreed(leaders: Mapping[str, str]) -> dict[str, str]:
    """Return what is the same on all processes."""
    if distributed.world_size() == 1:
        return dict(leaders)
    found = [set(each.items()) for each in distributed.gather_objects(dict(leaders))]
    return dict(set.intersection(*found))


def _part_differing(blocks: Mapping[str, CurvatureBlock], leaders: Mapping[str, str], capture: Capture) -> None:
    """Let blocks part whose activations are not the same in a batch."""
    for layer, leader in leaders.items():
        if blocks[layer].inputs_of is not None and not capture.same_activations(leader, layer):
            blocks[layer].part()


class _Fitter(Visitor):
    """Adds the batches of one pass to the sums of blocks.

    Args:
        blocks: The blocks.
        leaders: Those that may have the activations of others, as long as batches agree.

    Attributes:
        examples: How many have counted.
        remainder: Whether a part of the loss was no known loss call.
    """

    def __init__(self, blocks: Mapping[str, CurvatureBlock], leaders: Mapping[str, str]) -> None:
        self._blocks, self._leaders = blocks, leaders
        self.examples, self.remainder = 0, False

    def begin(self, batch: BatchGradients) -> None:
        self._usable = batch.counted
        self.remainder |= batch.loss.remainder
        _part_differing(self._blocks, self._leaders, batch.capture)

    def keep(self, io: LayerIO) -> None:
        self._blocks[io.name].update(io.xs, io.gs, self._usable)

    def file(self) -> None:
        self.examples += self._usable


def _default_damping(block: CurvatureBlock, examples: int, directions: int | None) -> float:
    if directions is None or not isinstance(block, KFACBlock):
        return block.damping()
    return block.bounded_damping(examples, directions)


def _fit_full(
    gradients: ExampleGradients,
    name: str,
    indices: Sequence[int],
    examples: FactorExamples,
    labels: tuple[Labels, Labels],
    dampings: Mapping[str, float] | None,
    solver: Solver,
) -> Curvature:
    check_solver(name, solver)
    coordinates = BlockCoordinates(gradients.coverage.blocks)
    for value in (dampings or {}).values():
        check_damping(value)
    make = LADDER[name].product
    assert make is not None
    subset = random_subset(indices, len(indices) if examples.products is None else examples.products, 0)
    product = make(gradients, subset, parameters=coordinates.parameters)
    found = choose_solver(solver, coordinates.size, product.flat.device, semidefinite=product.semidefinite)
    # Where it does not fit on one process, all take the other: solvers do not meet at the same collectives.
    chosen, notes = max(distributed.gather_objects(found), key=lambda each: each[0] != "dense")
    matrix = dense_matrix(product, gradients, subset, coordinates) if chosen == "dense" else None
    if dampings is None:
        if matrix is None:
            mean, square = mean_eigenvalues(product, product.gradient)
        else:
            mean, square = float(wide(matrix.diagonal()).mean()), float(wide(matrix).square().sum()) / len(matrix)
        if mean <= 0:
            raise IndefiniteError(
                f"the mean eigenvalue of the {name} is {mean:.3g}: there is no relative damping. Pass a number, "
                '`damping="trainer"`, or use the GGN.'
            )
        # The plain mean counts the many directions that no gradient has a part in, and is a hundred times too small.
        dampings = dict.fromkeys(coordinates.blocks, RELATIVE_DAMPING * square / mean)
    curvature: Curvature
    if matrix is not None:
        curvature = DenseCurvature(name, matrix, coordinates, dampings, [], [product.examples])
    else:
        blocks = _fit_blocks(gradients, "ekfac", indices, examples, labels, dampings)
        notes.append(
            f"self_influence is that of EK-FAC with the same damping: with the {name} it would take a solve for every "
            f"training example. What is solved with the {name}: harm, and scores of queries."
        )
        left = set(product.left_out)
        sampled_from = gradients, [index for index in subset if index not in left], coordinates
        curvature = ImplicitCurvature(
            name,
            product,
            coordinates,
            dampings,
            solver=chosen,
            blocks=blocks,
            sample=partial(sampled_inverse, *sampled_from),
            effort=partial(Effort.of, *sampled_from),
        )
    if left_out := len(subset) - product.examples:
        notes.append(f"{left_out} examples with a non-finite loss or gradient are not in the {name}.")
    curvature.notes += notes
    return curvature
