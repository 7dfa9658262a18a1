"""Implicit influence: the sample trained a network that the synthetic set is matched to. [ours: README.md, 2]

The network was trained on real data with weights, theta_{t+1} = theta_t - eta_t / B * sum_i w_i grad l_i(theta_t).
M depends on the result theta_T. The *direction* is u = dM/dtheta_T (``explicit.target_direction``, or dL/dtheta_T for
the target `matching`). More weight on sample i moves theta_T against grad l_i, hence the minus signs:

    unrolled          I_i = - sum_t eta_t / B * < u_t, grad l_i(theta_t) >,  u_T = u, u_t = (1 - eta_t H_t) u_{t+1}
    TracIn-like       the same with u_t = u: neglects curvature along the segment, exact for one step
    at an optimum     I_i = - 1/n * < u, (H + damping)^-1 grad l_i >

**Negative = helpful.** All three are linear in grad l_i. Each costs forward-mode passes and the products with H; no
per-sample gradient is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.nn.derivatives.curvature import (
    MatVec,
    conjugate_gradient,
    gauss_newton_vector_product,
    hessian_vector_product,
)
from tad_plugin.nn.derivatives.per_sample import (
    DEFAULT_MEMORY_BUDGET,
    Parameters,
    activation_bytes,
    as_parameters,
    per_sample_directional,
)
from tad_plugin.nn.derivatives.vectors import LossFunction, cross_entropy, flatten, require_finite
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images

__all__ = ["SegmentStep", "curvature_product", "inverse_hessian_influence", "unrolled_influence"]


@dataclass(frozen=True)
class SegmentStep:
    """One update of the network that was trained on real data.

    Attributes:
        parameters: theta_t *before* the update, by name or flat [P].
        learning_rate: eta_t > 0.
        indices: int64, positions of the batch's images; None for all images.
        divisor: B, by which the sum of weighted losses was divided; None for the number of samples in the step.
            One step may stand for a whole epoch if only one theta per epoch is kept. Then ``indices`` is None and
            ``divisor`` the batch size, because each sample took part once in a mean over B.
    """

    parameters: Parameters | Tensor
    learning_rate: float
    indices: Tensor | None = None
    divisor: float | None = None


@named_errors
def unrolled_influence(
    network: nn.Module,
    steps: Sequence[SegmentStep],
    images: Images,
    labels: Tensor,
    direction: Parameters | Tensor,
    *,
    curvature: bool = False,
    weights: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss_fn: LossFunction = cross_entropy,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes the influence of every real sample through a segment of SGD, dM/dw_i.

    With ``curvature`` this is the exact derivative through the segment, at one Hessian-vector product per step: the
    adjoint of torch.optim.SGD with momentum and weight decay. Without it, Hessians along the segment are neglected
    (TracIn-like): exact for one step, first order in the learning rate for more.

    Args:
        network: logits [B, K]; must treat samples independently (instance or group norm, or eval mode).
        steps: the updates of the segment, first to last.
        images: real images [N, C, H, W], augmented as in training if the augmentation was the same for all.
        labels: labels of the training, int64 [N] or probabilities [N, K].
        direction: u = dM/dtheta_T, by name or flat [P].
        curvature: propagate u through the Hessians of the steps.
        weights: w_i of the training, [N]; None for 1. Only the Hessians depend on them.
        momentum: of the SGD, in [0, 1).
        weight_decay: of the SGD, >= 0.
        loss_fn: (logits [B, K], labels [B] or [B, K]) -> [B].
        memory_budget: bytes for one chunk, see ``nn.derivatives.per_sample``.

    Returns:
        [N] in the parameters' dtype; 0 for a sample that no step used. Negative = helpful.

    Raises:
        InvalidInputError: no steps, or settings or shapes that do not fit.
        MemoryBudgetError: a single sample does not fit the budget.
        NonFiniteError: an influence is NaN or infinite.
    """
    if not steps or not 0.0 <= momentum < 1.0 or weight_decay < 0.0:
        got = f"{len(steps)} steps, momentum {momentum}, weight_decay {weight_decay}"
        raise InvalidInputError(
            explain("at least one step, momentum in [0, 1), weight_decay >= 0", got, "Pass the SGD's settings")
        )
    for number, step in enumerate(steps):
        if not step.learning_rate > 0 or (step.divisor is not None and not step.divisor > 0):
            got = f"learning_rate {step.learning_rate}, divisor {step.divisor} in step {number}"
            raise InvalidInputError(explain("a learning rate and divisor > 0", got, "Pass those of the training"))

    adjoint = flatten(as_parameters(network, direction))  # dM/dtheta_{t+1}, walking backwards
    velocity = torch.zeros_like(adjoint)  # dM/dv_{t+1} through later steps
    total = torch.zeros(len(images), dtype=adjoint.dtype, device=adjoint.device)
    for step in reversed(steps):
        # theta' = theta - eta v',  v' = momentum v + grad + weight_decay theta
        moved = velocity - step.learning_rate * adjoint  # dM/dv_{t+1}, complete
        if step.indices is None:
            x, y, w = images, labels, weights
        else:
            x, y, w = images[step.indices], labels[step.indices], None if weights is None else weights[step.indices]
        divisor = float(len(x)) if step.divisor is None else step.divisor
        found = per_sample_directional(
            network, x, y, moved, parameters=step.parameters, loss_fn=loss_fn, memory_budget=memory_budget
        )
        total = total + found / divisor if step.indices is None else total.index_add(0, step.indices, found / divisor)
        if curvature:
            product = curvature_product(
                network,
                x,
                y,
                parameters=step.parameters,
                weights=w,
                divisor=divisor,
                loss_fn=loss_fn,
                memory_budget=memory_budget,
                reuse=False,
            )
            adjoint = adjoint + product(moved)
        adjoint = adjoint + weight_decay * moved
        velocity = momentum * moved
    return require_finite(total, "influences", "Lower the learning rate, or check the direction")


@named_errors
def inverse_hessian_influence(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    direction: Parameters | Tensor,
    *,
    damping: float,
    curvature: Literal["hessian", "gauss_newton"] = "hessian",
    scored: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    parameters: Parameters | Tensor | None = None,
    loss_fn: LossFunction = cross_entropy,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    strict: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Computes the influence of every real sample on M through an optimum, -1/n <u, (H + damping I)^-1 grad l_i>.

    If theta minimises 1/n sum_i w_i l_i(theta) + damping/2 |theta|^2 over n training samples, this is dM/dw_i, and
    leaving i out changes M by about -I_i. Away from an optimum, damping only makes the inverse exist.

    Args:
        network: logits [B, K]; must treat samples independently.
        images: the training images [n, C, H, W]; H is the curvature of their mean loss.
        labels: int64 [n] or probabilities [n, K].
        direction: u = dM/dtheta, by name or flat [P].
        damping: > 0, added to the curvature (an L2 penalty of the training belongs here too).
        curvature: "hessian", or "gauss_newton" (positive semi-definite for cross-entropy at every theta).
        scored: (images, labels) to score instead of the training samples.
        weights: w_i of the training, [n]; None for 1.
        parameters: theta, by name or flat [P]; by default the network's values.
        loss_fn: (logits [B, K], labels [B] or [B, K]) -> [B].
        tolerance: of the conjugate gradients (relative residual).
        max_iterations: of the conjugate gradients.
        strict: raise instead of warning if they do not converge.
        memory_budget: bytes for one chunk, see ``nn.derivatives.per_sample``.

    Returns:
        [number of scored samples], in the parameters' dtype. Negative = helpful.

    Raises:
        ConvergenceError: ``strict``, and the conjugate gradients did not reach the tolerance.
        InvalidInputError: damping or shapes do not fit.
        MemoryBudgetError: a single sample does not fit the budget.
        NonFiniteError: an influence is NaN or infinite.
    """
    if not damping > 0:
        raise InvalidInputError(explain("damping > 0", str(damping), "Pass a small positive number, such as 0.01"))
    values = as_parameters(network, parameters)
    product = curvature_product(
        network,
        images,
        labels,
        parameters=values,
        weights=weights,
        kind=curvature,
        loss_fn=loss_fn,
        memory_budget=memory_budget,
    )
    solved = conjugate_gradient(
        lambda v: product(v) + damping * v,
        flatten(as_parameters(network, direction)),
        tolerance=tolerance,
        max_iterations=max_iterations,
        strict=strict,
    )
    x, y = (images, labels) if scored is None else scored
    along = per_sample_directional(
        network, x, y, solved.solution, parameters=values, loss_fn=loss_fn, memory_budget=memory_budget
    )
    return -along / len(images)


@named_errors
def curvature_product(
    network: nn.Module,
    images: Images,
    labels: Tensor,
    *,
    kind: Literal["hessian", "gauss_newton"] = "hessian",
    parameters: Parameters | Tensor | None = None,
    weights: Tensor | None = None,
    divisor: float | None = None,
    loss_fn: LossFunction = cross_entropy,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    reuse: bool = True,
) -> MatVec:
    """Makes the map v -> H v, H being the curvature of 1/n sum_i w_i l_i over a dataset, in chunks.

    Args:
        network: logits [B, K]; must treat samples independently.
        images: [n, C, H, W].
        labels: int64 [n] or probabilities [n, K].
        kind: "hessian" or "gauss_newton".
        parameters: where, by name or flat [P]; by default the network's values.
        weights: w_i, [n]; None for 1.
        divisor: used instead of n.
        loss_fn: (logits [B, K], labels [B] or [B, K]) -> [B].
        memory_budget: bytes for the graph of one chunk, estimated as six times the activations of its samples.
        reuse: if all samples fit into one chunk, keep its graph between products (faster from the second on).

    Returns:
        A closure [P] -> [P].

    Raises:
        InvalidInputError: lengths or the kind do not fit.
    """
    if kind not in ("hessian", "gauss_newton"):
        raise InvalidInputError(explain("curvature 'hessian' or 'gauss_newton'", repr(kind), "Pass one of the two"))
    if len(images) != len(labels) or len(images) == 0 or (weights is not None and len(weights) != len(images)):
        got = f"{len(images)} images, {len(labels)} labels, {'no' if weights is None else len(weights)} weights"
        raise InvalidInputError(explain("as many images as labels and weights", got, "Pass one of each per sample"))
    values = as_parameters(network, parameters)
    names, parts = tuple(values), tuple(values.values())
    scale = float(len(images)) if divisor is None else divisor
    # The graph of a Hessian product holds the activations about three times, its backward pass as much again.
    chunk = max(1, memory_budget // max(1, 6 * activation_bytes(network, images[0], values)))
    starts = range(0, len(images), chunk)

    def of_chunk(start: int) -> MatVec:
        x, y = images[start : start + chunk], labels[start : start + chunk]
        w = None if weights is None else weights[start : start + chunk].detach()

        def logits(parameters: Sequence[Tensor]) -> Tensor:
            return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (x,))

        def loss(outputs: Tensor) -> Tensor:
            losses = loss_fn(outputs, y)
            return (losses if w is None else w.to(losses.dtype) * losses).sum() / scale

        if kind == "gauss_newton":
            return gauss_newton_vector_product(logits, loss, parts)
        return hessian_vector_product(lambda parameters: loss(logits(parameters)), parts)

    makers: list[Callable[[], MatVec]] = [lambda start=start: of_chunk(start) for start in starts]  # type: ignore[misc]
    kept = makers[0]() if len(makers) == 1 and reuse else None

    def product(vector: Tensor) -> Tensor:
        if kept is not None:
            return kept(vector)
        result = torch.zeros_like(vector)
        for make in makers:
            result = result + make()(vector)
        return result

    return product
