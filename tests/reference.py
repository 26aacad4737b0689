"""Dense reference: float64, plain autograd, one example at a time.

Slow on purpose. It shares no idea with the code it checks: no hooks, no unfolding, no contraction that avoids
a per-example gradient, no Kronecker identity. Every curvature matrix is formed, every system solved densely.

Layout. `K` convolution groups (1 otherwise), `N` examples, `S` shared positions, `O` outputs per group, `I`
inputs per group in the order of `weight.flatten(1)`, plus a last column for the bias if the layer has one. A
gradient `[O, I]` becomes a vector row by row (entry `o * I + i`).

Every function that takes a model works on a float64 deep copy. Train or eval mode is the caller's choice.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def per_example_gradients(
    model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of every example's own loss, by one backward pass per example.

    Args:
        model: Any module that maps a batch to outputs.
        loss_fn: Called as `loss_fn(model(inputs[n : n + 1]), targets[n : n + 1])`; returns one number.
        inputs: `[N, ...]`.
        targets: `[N, ...]`.

    Returns:
        `{name: [N, *parameter.shape]}` for every trainable parameter; zeros where the loss does not depend on
        it. A parameter shared by several modules appears once, under its first name, summed over its uses.
    """
    model = _float64_copy(model)
    parameters = _trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for example, target in _examples(inputs, targets):
        loss = _one_number(loss_fn(model(example), target))
        for name, gradient in zip(parameters, _gradients(loss, parameters.values()), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def gradients_alone(
    model: nn.Module, task: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Return the gradient of every example's own loss, for batches and tasks of any kind.

    Args:
        model: Any module; its copy is brought to float64, the batches are taken as they are.
        task: Called as `task(model, batch)`; returns one number.
        batches: One batch for every example, that example alone in it.

    Returns:
        As `per_example_gradients`. Sparse gradients are made dense.
    """
    model = _float64_copy(model)
    parameters = _trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for batch in batches:
        loss = _one_number(task(model, batch))
        for name, gradient in zip(parameters, _gradients(loss, parameters.values()), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def gradient_matrix(module: nn.Module, weight_grads: Tensor, bias_grads: Tensor | None) -> Tensor:
    """Bring the gradients of one layer into the layout `[K, N, O, I]`.

    Args:
        module: A linear layer or convolution.
        weight_grads: `[N, *module.weight.shape]`.
        bias_grads: `[N, *module.bias.shape]`, or None for a layer without a bias.
    """
    groups = _groups(module)
    examples, outputs = weight_grads.shape[:2]
    per_group = outputs // groups
    matrix = weight_grads.new_zeros(groups, examples, per_group, weight_grads[0, 0].numel())
    for k in range(groups):
        channels = slice(k * per_group, (k + 1) * per_group)
        matrix[k] = weight_grads[:, channels].flatten(2)
    if bias_grads is None:
        return matrix
    column = torch.stack([bias_grads[:, k * per_group : (k + 1) * per_group] for k in range(groups)])
    return torch.cat([matrix, column[..., None]], dim=-1)


def layer_inputs_and_output_gradients(
    model: nn.Module, module_name: str, loss_fn: LossFunction, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what one layer sees and the gradient of every example's own loss at its output.

    In the copy, the layer's forward is replaced by one that adds a zero tensor to the output; the gradient
    of that tensor is the output gradient. A layer may be called several times in one forward pass: then the
    positions of all calls stand one after the other along `S`.

    Args:
        model: Any module that maps a batch to outputs.
        module_name: Name of the layer in `model.named_modules()`.
        loss_fn: See `per_example_gradients`.
        inputs: `[N, ...]`.
        targets: `[N, ...]`.

    Returns:
        `x: [K, N, S, I]` with a last column of ones if the layer has a bias, and `g: [K, N, S, O]`.

    Raises:
        TypeError: If the layer is neither linear nor a convolution.
        RuntimeError: If the forward pass of `model` does not call the layer.
    """
    model = _float64_copy(model)
    module = model.get_submodule(module_name)
    _groups(module)
    forward = module.forward
    seen: list[Tensor] = []
    zeros: list[Tensor] = []

    def forward_plus_zero(input: Tensor) -> Tensor:
        output: Tensor = forward(input)
        seen.append(input.detach().clone())
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    module.forward = forward_plus_zero
    all_inputs, all_gradients = [], []
    for example, target in _examples(inputs, targets):
        seen.clear()
        zeros.clear()
        loss = _one_number(loss_fn(model(example), target))
        if not seen:
            raise RuntimeError(f"the forward pass never calls {module_name!r}; name a layer that it calls")
        gradients = _gradients(loss, zeros)
        all_inputs.append(torch.cat([_layer_input(module, value) for value in seen], dim=1))
        all_gradients.append(torch.cat([_output_gradient(module, value) for value in gradients], dim=1))
    return torch.stack(all_inputs, dim=1), torch.stack(all_gradients, dim=1)


def second_moments(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the K-FAC factors of one layer (KFAC-expand, Eschenhagen et al. 2023, 2311.00636).

    Args:
        x: `[K, N, S, I]`.
        g: `[K, N, S, O]`.

    Returns:
        `A: [K, I, I]`, the sum over positions and mean over examples of `x xᵀ`, and `B: [K, O, O]`, the mean
        over examples and positions of `g gᵀ`. For `S = 1` both are plain means over examples.
    """
    groups, examples, positions, inputs = x.shape
    outputs = g.shape[-1]
    A, B = x.new_zeros(groups, inputs, inputs), g.new_zeros(groups, outputs, outputs)
    for k in range(groups):
        for n in range(examples):
            for s in range(positions):
                A[k] += torch.outer(x[k, n, s], x[k, n, s]) / examples
                B[k] += torch.outer(g[k, n, s], g[k, n, s]) / (examples * positions)
    return A, B


def kfac_dense(A: Tensor, B: Tensor) -> Tensor:
    """Return the K-FAC matrices `B ⊗ A: [K, O*I, O*I]` of factors `A: [K, I, I]` and `B: [K, O, O]`."""
    return torch.stack([torch.kron(b_k, a_k) for a_k, b_k in zip(A, B, strict=True)])


def eigenbasis(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors `Q_A: [K, I, I]` and `Q_B: [K, O, O]`, in columns, by rising eigenvalue.

    Where eigenvalues coincide the basis is not unique, and the EK-FAC eigenvalues depend on it: compare
    EK-FAC numbers in one and the same basis.
    """
    Q_A = torch.stack([torch.linalg.eigh((a_k + a_k.T) / 2).eigenvectors for a_k in A])
    Q_B = torch.stack([torch.linalg.eigh((b_k + b_k.T) / 2).eigenvectors for b_k in B])
    return Q_A, Q_B


def ekfac_eigenvalues(gradients: Tensor, Q_A: Tensor, Q_B: Tensor) -> Tensor:
    """Return the EK-FAC eigenvalues (George et al. 2018, 1806.03884), `[K, O, I]`.

    Args:
        gradients: `[K, N, O, I]`.
        Q_A: `[K, I, I]`, eigenvectors in columns.
        Q_B: `[K, O, O]`, eigenvectors in columns.

    Returns:
        The mean over examples of the squared coordinates of `vec G_n` in the basis `Q_B ⊗ Q_A`.
    """
    groups, examples, outputs, inputs = gradients.shape
    eigenvalues = gradients.new_zeros(groups, outputs * inputs)
    for k in range(groups):
        basis = torch.kron(Q_B[k], Q_A[k])
        for n in range(examples):
            eigenvalues[k] += (basis.T @ gradients[k, n].reshape(-1)) ** 2 / examples
    return eigenvalues.reshape(groups, outputs, inputs)


def ekfac_dense(Q_A: Tensor, Q_B: Tensor, lam: Tensor) -> Tensor:
    """Return the EK-FAC matrices `[K, O*I, O*I]` of a basis and its eigenvalues `lam: [K, O, I]`."""
    blocks = []
    for k in range(lam.shape[0]):
        basis = torch.kron(Q_B[k], Q_A[k])
        blocks.append(basis @ torch.diag(lam[k].reshape(-1)) @ basis.T)
    return torch.stack(blocks)


def embedding_output_gradients(
    model: nn.Module, module_name: str, loss_fn: LossFunction, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Return the gradient of every example's own loss at the output of an `nn.Embedding`, `[N, S, D]`.

    Found as in `layer_inputs_and_output_gradients`: a zero tensor is added to the output. The positions of several
    calls stand one after the other.
    """
    model = _float64_copy(model)
    module = model.get_submodule(module_name)
    forward = module.forward
    zeros: list[Tensor] = []

    def forward_plus_zero(input: Tensor) -> Tensor:
        output: Tensor = forward(input)
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    module.forward = forward_plus_zero
    rows = []
    for example, target in _examples(inputs, targets):
        zeros.clear()
        loss = _one_number(loss_fn(model(example), target))
        gradients = _gradients(loss, zeros)
        rows.append(torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]))
    return torch.stack(rows)


def embedding_dense(gradients: Tensor, g: Tensor) -> Tensor:
    """Return the EK-FAC matrix of an embedding, `[1, V*D, V*D]`: every row of the weight in the same basis.

    Only the output side is rotated: one-hot inputs have a diagonal second moment already.

    Args:
        gradients: `[N, V, D]`, of the weight.
        g: `[N, S, D]`, at the output.
    """
    examples, rows, features = gradients.shape
    B = g.new_zeros(features, features)
    for example in g:
        for position in example:
            B += torch.outer(position, position) / examples
    Q = torch.linalg.eigh(B).eigenvectors
    C = g.new_zeros(rows * features, rows * features)
    for v in range(rows):
        lam = g.new_zeros(features)
        for n in range(examples):
            lam += (Q.T @ gradients[n, v]) ** 2 / examples
        block = slice(v * features, (v + 1) * features)
        C[block, block] = Q @ torch.diag(lam) @ Q.T
    return C[None]


def mean_outer_product(vectors: Tensor) -> Tensor:
    """Return `1/N Σ_n v_n v_nᵀ: [P, P]` of `vectors: [N, P]`, the empirical Fisher if they are gradients."""
    total = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
    for vector in vectors:
        total += torch.outer(vector, vector) / len(vectors)
    return total


def quadratic_forms(C: Tensor, gradients: Tensor, damping: Tensor | float) -> Tensor:
    """Return `gᵀ (C + λI)⁻¹ g` of every example, summed over the groups.

    Args:
        C: `[K, P, P]` with `P = O * I`.
        gradients: `[K, N, O, I]`; for a matrix over all parameters `flatten_gradients(...)[None, :, None]`.
        damping: `λ`, absolute; one number or one per group `[K]`.

    Returns:
        `[N]`.
    """
    total = gradients.new_zeros(gradients.shape[1])
    for c_k, gradients_k, damping_k in zip(C, gradients, _per_group(damping, C), strict=True):
        damped = c_k + damping_k * torch.eye(len(c_k), dtype=c_k.dtype)
        vectors = gradients_k.flatten(1)
        solutions = torch.linalg.solve(damped, vectors.T).T
        for n, (vector, solution) in enumerate(zip(vectors, solutions, strict=True)):
            total[n] += vector @ solution
    return total


def bilinear_forms(C: Tensor, left: Tensor, right: Tensor, damping: Tensor | float) -> Tensor:
    """Return `l_mᵀ (C + λI)⁻¹ r_n` of every pair, summed over the groups.

    Args:
        C: `[K, P, P]` with `P = O * I`.
        left: `[K, M, O, I]`.
        right: `[K, N, O, I]`.
        damping: `λ`, absolute; one number or one per group `[K]`.

    Returns:
        `[M, N]`.
    """
    total = left.new_zeros(left.shape[1], right.shape[1])
    for c_k, left_k, right_k, damping_k in zip(C, left, right, _per_group(damping, C), strict=True):
        damped = c_k + damping_k * torch.eye(len(c_k), dtype=c_k.dtype)
        solutions = torch.linalg.solve(damped, right_k.flatten(1).T).T
        for m, query in enumerate(left_k.flatten(1)):
            for n, solution in enumerate(solutions):
                total[m, n] += query @ solution
    return total


def class_gradients(
    model: nn.Module, inputs: Tensor, num_classes: int, weight_fn: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the gradient of `-log p_c` for every class, scaled so that outer products add up to the Fisher.

    Args:
        model: Maps `[1, ...]` to logits `[1, C]`.
        inputs: `[N, ...]`.
        num_classes: `C`.
        weight_fn: Maps the detached probabilities `[C]` of one example to the scale `[C]` of its gradients.
            Default: the square root, which makes `1/N Σ_n Σ_c v vᵀ` the Fisher of softmax cross-entropy.

    Returns:
        `{name: [N, C, *parameter.shape]}` for every trainable parameter.

    Raises:
        ValueError: If the model's outputs are not `[1, num_classes]`.
    """
    model = _float64_copy(model)
    parameters = _trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for example, _ in _examples(inputs, inputs):
        log_probabilities = torch.log_softmax(_logits(model, example), dim=0)
        if len(log_probabilities) != num_classes:
            raise ValueError(f"the model has {len(log_probabilities)} outputs, not num_classes={num_classes}")
        probabilities = log_probabilities.detach().exp()
        scales = probabilities.sqrt() if weight_fn is None else weight_fn(probabilities)
        per_class = [
            [scales[c] * gradient for gradient in _gradients(-log_probabilities[c], parameters.values())]
            for c in range(num_classes)
        ]
        for name, gradients in zip(parameters, zip(*per_class, strict=True), strict=True):
            rows[name].append(torch.stack(gradients))
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def exact_fisher(model: nn.Module, inputs: Tensor, num_classes: int, params: Sequence[str] | None = None) -> Tensor:
    """Return the Fisher `[P, P]` of softmax cross-entropy, the expectation over labels taken exactly.

    Args:
        model: Maps `[1, ...]` to logits `[1, C]`.
        inputs: `[N, ...]`.
        num_classes: `C`.
        params: Names and order of the parameters; default all trainable, as in `named_parameters()`.
    """
    vectors = class_gradients(model, inputs, num_classes)
    names = list(vectors) if params is None else list(params)
    size = sum(vectors[name][0, 0].numel() for name in names)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for n in range(len(inputs)):
        for c in range(num_classes):
            vector = torch.cat([vectors[name][n, c].reshape(-1) for name in names])
            fisher += torch.outer(vector, vector) / len(inputs)
    return fisher


def ggn_dense(
    model: nn.Module,
    inputs: Tensor,
    kind: Literal["cross_entropy", "bce", "mse"],
    params: Sequence[str] | None = None,
) -> Tensor:
    """Return the generalised Gauss-Newton matrix `1/N Σ_n J_nᵀ H_n J_n: [P, P]`, `H_n` from its formula.

    Args:
        model: Maps `[1, ...]` to the outputs of one example.
        inputs: `[N, ...]`.
        kind: The loss of one example: `"cross_entropy"` of logits `[1, C]`, `"bce"` the sum over outputs of
            the binary cross-entropy with logits, `"mse"` the sum of the squared errors (no one half).
        params: Names and order of the parameters; default all trainable, as in `named_parameters()`.
    """
    model = _float64_copy(model)
    parameters = _trainable(model, params)
    size = sum(parameter.numel() for parameter in parameters.values())
    ggn = torch.zeros(size, size, dtype=torch.float64)
    for example, _ in _examples(inputs, inputs):
        outputs = _logits(model, example) if kind == "cross_entropy" else model(example).reshape(-1)
        values = outputs.detach()
        if kind == "cross_entropy":
            probabilities = torch.softmax(values, dim=0)
            hessian = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
        elif kind == "bce":
            hessian = torch.diag(torch.sigmoid(values) * torch.sigmoid(-values))
        elif kind == "mse":
            hessian = 2 * torch.eye(len(values), dtype=torch.float64)
        else:
            raise ValueError(f"kind is {kind!r}; expected 'cross_entropy', 'bce' or 'mse'")
        jacobian = torch.stack([_flat(_gradients(output, parameters.values())) for output in outputs])
        ggn += jacobian.T @ hessian @ jacobian / len(inputs)
    return ggn


def hessian_dense(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    params: Sequence[str] | None = None,
) -> Tensor:
    """Return the Hessian `[P, P]` of the mean over examples of their own loss, by differentiating twice.

    Args:
        model: Any module that maps a batch to outputs.
        loss_fn: See `per_example_gradients`.
        inputs: `[N, ...]`.
        targets: `[N, ...]`.
        params: Names and order of the parameters; default all trainable, as in `named_parameters()`.
    """
    model = _float64_copy(model)
    parameters = _trainable(model, params)
    size = sum(parameter.numel() for parameter in parameters.values())
    hessian = torch.zeros(size, size, dtype=torch.float64)
    for example, target in _examples(inputs, targets):
        loss = _one_number(loss_fn(model(example), target))
        gradient = _flat(_gradients(loss, parameters.values(), create_graph=True))
        for row in range(size):
            # The derivative of a loss that is linear in a parameter is a constant without a graph.
            if gradient[row].requires_grad:
                hessian[row] += _flat(_gradients(gradient[row], parameters.values())) / len(inputs)
    return hessian


def tracin_self(
    grads_per_checkpoint: Sequence[Mapping[str, Tensor]], etas: Sequence[float | Mapping[str, float]]
) -> Tensor:
    """Return TracInCP self-influence `Σ_t η_t ‖g_n(θ_t)‖²: [N]` (Pruthi et al. 2020, 2002.08484).

    Args:
        grads_per_checkpoint: For every checkpoint the result of `per_example_gradients`.
        etas: For every checkpoint the learning rate, one number or one per parameter name.
    """
    examples = len(next(iter(grads_per_checkpoint[0].values())))
    total = torch.zeros(examples, dtype=torch.float64)
    for gradients, eta in zip(grads_per_checkpoint, etas, strict=True):
        for name, gradient in gradients.items():
            rate = eta[name] if isinstance(eta, Mapping) else eta
            for n in range(examples):
                total[n] += rate * (gradient[n] ** 2).sum()
    return total


def source_dense(queries: Tensor, segments: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return SOURCE scores `g_qᵀ Σ_l (Π_{m>l} S_m) r_l: [Q, N]` (Bae et al. 2024, 2405.12186), without the `1/N`.

    By matrix exponentials: `S = exp(-D C)`, and `r = ∫_0^1 exp(-s D C) D ds ḡ`, the upper right block of
    `exp([[-D C, D], [0, 0]])`, which needs no inverse of `C`.

    Args:
        queries: Their gradients at the end of training, `[Q, P]`.
        segments: In the order of training: curvature with weight decay `C: [P, P]`, step sizes `D: [P]`, summed over
            the segment's steps, and the examples' gradients, averaged over its checkpoints, `[N, P]`.
    """
    scores = torch.zeros(len(queries), len(segments[0][2]), dtype=torch.float64)
    for place, (curvature, sizes, gradients) in enumerate(segments):
        size = len(sizes)
        generator = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        generator[:size, :size] = -torch.diag(sizes) @ curvature
        generator[:size, size:] = torch.diag(sizes)
        moved = torch.linalg.matrix_exp(generator)[:size, size:] @ gradients.T
        for later, later_sizes, _ in segments[place + 1 :]:
            moved = torch.linalg.matrix_exp(-torch.diag(later_sizes) @ later) @ moved
        scores += queries @ moved
    return scores


def diff_in_dense(queries: Tensor, gradients: Tensor, hessians: Tensor, batch: Sequence[int], sizes: Tensor) -> Tensor:
    """Return `g_qᵀ D (H_B D g_z + H_z D g_B): [Q, N]`, the term of one checkpoint of Diff-In (2508.14648).

    Args:
        queries: Their gradients, `[Q, P]`.
        gradients: The examples' gradients, `[N, P]`.
        hessians: The examples' Hessians, `[N, P, P]`.
        batch: Examples of the batch `B`.
        sizes: Step size of every parameter, `[P]`.
    """
    mean_hessian, mean_gradient = hessians[list(batch)].mean(0), gradients[list(batch)].mean(0)
    scores = torch.zeros(len(queries), len(gradients), dtype=torch.float64)
    for q, query in enumerate(queries):
        for n in range(len(gradients)):
            change = mean_hessian @ (sizes * gradients[n]) + hessians[n] @ (sizes * mean_gradient)
            scores[q, n] = (sizes * query) @ change
    return scores


def z0_dense(queries: Tensor, examples: Tensor, weights: Sequence[Tensor], sizes: Sequence[Tensor]) -> Tensor:
    """Return `Σ_t ĝ_t(q)ᵀ D_t ĝ_t(z): [Q, N]` with `ĝ = D⁻¹ Δ δ / (Δᵀ D⁻¹ Δ)` (Z0-Inf, 2510.11832, with step sizes).

    Args:
        queries: Their losses at `T + 1` checkpoints, `[T + 1, Q]`.
        examples: Those of the examples, `[T + 1, N]`.
        weights: The parameters at the checkpoints, `[P]` each.
        sizes: Step sizes between them, `T` of `[P]`.
    """
    scores = torch.zeros(queries.shape[1], examples.shape[1], dtype=torch.float64)
    for t, size in enumerate(sizes):
        move = weights[t + 1] - weights[t]
        direction = move / size / (move @ (move / size))
        of_queries = torch.outer(queries[t + 1] - queries[t], direction)
        of_examples = torch.outer(examples[t + 1] - examples[t], direction)
        scores += of_queries @ torch.diag(size) @ of_examples.T
    return scores


def flatten_gradients(gradients: Mapping[str, Tensor], params: Sequence[str] | None = None) -> Tensor:
    """Return `per_example_gradients` as `[N, P]`, in the parameter order of `ggn_dense`."""
    names = list(gradients) if params is None else list(params)
    return torch.cat([gradients[name].flatten(1) for name in names], dim=1)


def layer_blocks(matrix: Tensor, model: nn.Module, module_name: str, params: Sequence[str] | None = None) -> Tensor:
    """Cut one layer's blocks `[K, O*I, O*I]`, laid out as by `gradient_matrix`, out of a matrix.

    Args:
        matrix: `[P, P]` from `ggn_dense`, `hessian_dense` or `exact_fisher`.
        model: The model that `matrix` belongs to.
        module_name: Name of the layer in `model.named_modules()`.
        params: The `params` that `matrix` was made with.
    """
    positions, start = {}, 0
    for name, parameter in _trainable(model, params).items():
        positions[name] = torch.arange(start, start + parameter.numel()).reshape(1, *parameter.shape)
        start += parameter.numel()
    prefix = f"{module_name}." if module_name else ""
    module = model.get_submodule(module_name)
    index = gradient_matrix(module, positions[f"{prefix}weight"], positions.get(f"{prefix}bias"))
    return torch.stack([matrix[rows.reshape(-1)][:, rows.reshape(-1)] for rows in index])


def _float64_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _trainable(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return parameters if names is None else {name: parameters[name] for name in names}


def _examples(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets; expected one target per input")
    inputs, targets = (value.double() if value.is_floating_point() else value for value in (inputs, targets))
    return [(inputs[n : n + 1], targets[n : n + 1]) for n in range(len(inputs))]


def _one_number(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)} for one example; expected one number")
    return loss.reshape(())


def _gradients(value: Tensor, variables: Iterable[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    variables = list(variables)
    gradients = torch.autograd.grad(value, variables, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [
        torch.zeros_like(variable) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
        for variable, gradient in zip(variables, gradients, strict=True)
    ]


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def _logits(model: nn.Module, example: Tensor) -> Tensor:
    outputs: Tensor = model(example)
    if outputs.ndim != 2 or len(outputs) != 1:
        raise ValueError(f"outputs of one example have shape {tuple(outputs.shape)}; expected logits [1, C]")
    return outputs[0]


def _per_group(damping: Tensor | float, c: Tensor) -> list[float]:
    return torch.as_tensor(damping, dtype=c.dtype).expand(len(c)).tolist()


def _groups(module: nn.Module) -> int:
    if isinstance(module, _Convolution):
        return module.groups
    if isinstance(module, nn.Linear):
        return 1
    raise TypeError(f"{type(module).__name__} has no reference; expected nn.Linear or a convolution")


def _layer_input(module: nn.Module, value: Tensor) -> Tensor:
    """Rewrite the input of one call for one example as `[K, S, I]`."""
    if isinstance(module, _Convolution):
        x = torch.cat([_patches(module, image) for image in _images(module, value)], dim=1)
    else:
        x = value.reshape(1, -1, value.shape[-1])
    if "bias" not in dict(module.named_parameters(recurse=False)):
        return x
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def _output_gradient(module: nn.Module, value: Tensor) -> Tensor:
    """Rewrite the output gradient of one call for one example as `[K, S, O]`."""
    if not isinstance(module, _Convolution):
        return value.reshape(1, -1, value.shape[-1])
    per_group = module.out_channels // module.groups
    rows = [
        [
            image[(slice(k * per_group, (k + 1) * per_group), *pixel)]
            for image in _images(module, value)
            for pixel in itertools.product(*map(range, image.shape[1:]))
        ]
        for k in range(module.groups)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _images(module: Convolution, value: Tensor) -> Tensor:
    return value if value.ndim == len(module.kernel_size) + 2 else value[None]


def _patches(module: Convolution, image: Tensor) -> Tensor:
    """Cut an image `[channels, *pixels]` into the patches `[K, S, I]` that the kernel is laid on."""
    axes = range(len(module.kernel_size))
    for axis in axes:
        before, after = _padding(module, axis)
        image = _pad(image, axis + 1, before, after, module.padding_mode)
    spans = [module.dilation[axis] * (module.kernel_size[axis] - 1) + 1 for axis in axes]
    starts = [range(0, image.shape[axis + 1] - spans[axis] + 1, module.stride[axis]) for axis in axes]
    per_group = module.in_channels // module.groups
    patches = []
    for corner in itertools.product(*starts):
        window = [slice(corner[axis], corner[axis] + spans[axis], module.dilation[axis]) for axis in axes]
        patches.append(image[(slice(None), *window)])
    groups = [
        torch.stack([patch[k * per_group : (k + 1) * per_group].reshape(-1) for patch in patches])
        for k in range(module.groups)
    ]
    return torch.stack(groups)


def _padding(module: Convolution, axis: int) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return int(module.padding[axis]), int(module.padding[axis])


def _pad(image: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    size = image.shape[axis]
    lines = []
    for position in range(-before, size + after):
        if 0 <= position < size:
            source = position
        elif mode == "circular":
            source = position % size
        elif mode == "replicate":
            source = 0 if position < 0 else size - 1
        elif mode == "reflect":
            source = -position if position < 0 else 2 * (size - 1) - position
        elif mode == "zeros":
            lines.append(torch.zeros_like(image.select(axis, 0)))
            continue
        else:
            raise ValueError(f"padding_mode is {mode!r}; expected zeros, circular, replicate or reflect")
        lines.append(image.select(axis, source))
    return torch.stack(lines, dim=axis)
