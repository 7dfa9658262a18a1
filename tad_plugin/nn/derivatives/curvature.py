"""Curvature-vector products, and conjugate gradients for their inverse. [ours]

A product is a closure over flat vectors: ``make(f, parameters) -> (v [P] -> product [P])``. A solver needs nothing
else, so it can be tested on functions with a known Hessian.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tad_plugin.errors import (
    ConvergenceError,
    ConvergenceWarning,
    DisconnectedGraphError,
    InvalidInputError,
    NonFiniteError,
    explain,
)
from tad_plugin.nn.derivatives.vectors import Tensors, as_tuple, flatten, pushed_forward, require_finite, unflatten
from tad_plugin.utils.arguments import named_errors

__all__ = ["CGResult", "MatVec", "conjugate_gradient", "gauss_newton_vector_product", "hessian_vector_product"]

MatVec = Callable[[Tensor], Tensor]
"""A symmetric linear map of flat vectors, [P] -> [P]."""


@named_errors
def hessian_vector_product(f: Callable[[Any], Tensor], parameters: Tensors) -> MatVec:
    """Makes the map v -> H v, where H is the Hessian of ``f`` at ``parameters``.

    The graph of the gradient is built once and kept with the closure. So each product costs one backward pass.

    Args:
        f: parameters -> scalar. It gets one tensor or a tuple, as ``parameters`` is given.
        parameters: one tensor or a sequence, with P entries in all; not changed.

    Returns:
        A closure [P] -> [P] in the dtype and on the device of the parameters. It gives zeros for a linear ``f``.

    Raises:
        InvalidInputError: ``f`` does not return a scalar. The closure: a vector of another length.
        DisconnectedGraphError: ``f`` does not depend on the parameters.
    """
    leaves = tuple(p.detach().clone().requires_grad_() for p in as_tuple(parameters))
    with torch.enable_grad():
        value = f(leaves[0] if isinstance(parameters, Tensor) else leaves)
        gradients = _connected_gradients(value, leaves)
        gradient = flatten(gradients)

    def product(vector: Tensor) -> Tensor:
        unflatten(vector, leaves)  # checks the length
        if not gradient.requires_grad:
            return torch.zeros_like(vector)
        parts = torch.autograd.grad(gradient, leaves, vector, retain_graph=True, allow_unused=True)
        return flatten([torch.zeros_like(p) if d is None else d for d, p in zip(parts, leaves, strict=True)])

    return product


@named_errors
def gauss_newton_vector_product(
    model: Callable[[Any], Tensor], loss: Callable[[Tensor], Tensor], parameters: Tensors
) -> MatVec:
    """Makes the map v -> J^T H_out J v, the Gauss-Newton approximation of the Hessian of loss(model(parameters)).

    J is the Jacobian of the model, H_out the Hessian of the loss in the outputs. The map is positive semi-definite if
    the loss is convex in the outputs, as cross-entropy is. J v takes one forward-mode pass, J^T one backward pass.

    Args:
        model: parameters -> outputs of any shape. It gets one tensor or a tuple, as ``parameters`` is given.
        loss: outputs -> scalar.
        parameters: one tensor or a sequence, with P entries in all; not changed.

    Returns:
        A closure [P] -> [P] in the dtype and on the device of the parameters.

    Raises:
        InvalidInputError: ``loss`` does not return a scalar. The closure: a vector of another length.
        DisconnectedGraphError: ``loss`` does not depend on the outputs.
    """
    single = isinstance(parameters, Tensor)
    fixed = tuple(p.detach() for p in as_tuple(parameters))

    def outputs(*parts: Tensor) -> Tensor:
        return model(parts[0] if single else parts)

    found = torch.func.vjp(outputs, *fixed)
    out, pull_back = found[0], found[1]
    curvature = hessian_vector_product(loss, out)

    def product(vector: Tensor) -> Tensor:
        with torch.no_grad():
            pushed = pushed_forward(outputs, fixed, unflatten(vector, fixed))
        return flatten(pull_back(curvature(pushed.reshape(-1)).reshape(out.shape)))

    return product


@dataclass(frozen=True)
class CGResult:
    """Result of :func:`conjugate_gradient`.

    Attributes:
        solution: x, [P].
        iterations: number of steps, one product each. Products for the true residual are not counted.
        residual: |b - A x| / |b|, recomputed at the end.
        converged: True if ``residual`` is within the tolerance.
    """

    solution: Tensor
    iterations: int
    residual: float
    converged: bool


@named_errors
def conjugate_gradient(
    matvec: MatVec,
    b: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    x0: Tensor | None = None,
    strict: bool = False,
) -> CGResult:
    """Solves A x = b for a symmetric positive definite A, given by its products.

    Warns with ConvergenceWarning if the tolerance is not reached, and then returns the best iterate.

    Args:
        matvec: v -> A v, [P] -> [P]. Include the damping: ``lambda v: hvp(v) + damping * v``.
        b: right-hand side [P].
        tolerance: limit of the relative residual |b - A x| / |b|, > 0.
        max_iterations: limit of the number of steps, >= 1.
        x0: start [P]; None takes zeros.
        strict: raise an error instead of warning.

    Raises:
        ConvergenceError: ``strict`` is set and the tolerance was not reached, or A has negative curvature.
        NonFiniteError: b or a product is NaN or infinite.
        InvalidInputError: b or x0 has a wrong shape, or a limit is too small.
    """
    if b.ndim != 1 or (x0 is not None and x0.shape != b.shape):
        got = f"b {list(b.shape)}" + ("" if x0 is None else f" and x0 {list(x0.shape)}")
        raise InvalidInputError(explain("vectors [P] of one length", got, "Flatten them first"))
    if not tolerance > 0 or max_iterations < 1:
        got = f"tolerance {tolerance}, max_iterations {max_iterations}"
        raise InvalidInputError(explain("tolerance > 0 and max_iterations >= 1", got, "Pass positive limits"))
    require_finite(b, "right-hand side", "Check the gradient that the inverse is applied to")
    scale = float(b.norm())
    if scale == 0.0:
        return CGResult(torch.zeros_like(b), 0, 0.0, True)

    x = torch.zeros_like(b) if x0 is None else x0.detach().clone()
    residual = b.clone() if x0 is None else b - matvec(x)
    direction = residual.clone()
    squared = float(residual.square().sum())
    best, best_squared = x, squared
    goal, iterations, trouble, last_true = (tolerance * scale) ** 2, 0, "", math.inf
    while True:
        if squared <= goal:
            # The recurrence drifts from the true residual in float32. So the true one is computed, and the iteration
            # restarts from it as long as that helps.
            residual = b - matvec(x)
            true_squared = float(residual.square().sum())
            if true_squared <= goal or true_squared > 0.25 * last_true:
                best = x
                trouble = "" if true_squared <= goal else "the residual stalls at rounding errors"
                break
            squared = last_true = best_squared = true_squared
            best, direction = x, residual.clone()
        if iterations >= max_iterations:
            trouble = f"no convergence after {iterations} iterations"
            break
        product = matvec(direction)
        curvature = float(direction @ product)
        iterations += 1
        if not math.isfinite(curvature):
            got = f"{curvature} in iteration {iterations}"
            raise NonFiniteError(explain("finite curvature products", got, "Check the loss, or use float64"))
        if curvature <= 0.0:
            trouble = f"negative curvature ({curvature:.3g} in iteration {iterations}: not positive definite)"
            break
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * product
        updated = float(residual.square().sum())
        direction = residual + (updated / squared) * direction
        squared = updated
        if squared < best_squared:  # the norm of the residual may rise in between
            best, best_squared = x, squared

    true = float((b - matvec(best)).norm()) / scale
    converged = not trouble
    if not converged:
        got = f"{trouble} (relative residual {true:.3g})"
        ways = "Raise damping (add a larger multiple of the identity)"
        indefinite = "curvature" in trouble
        ways += ", or use the Gauss-Newton product" if indefinite else ", raise max_iterations, or use float64"
        message = explain(f"conjugate gradients to reach a relative residual of {tolerance:.3g}", got, ways)
        if strict:
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return CGResult(best, iterations, true, converged)


def _connected_gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    way_out = "Compute the value from the parameters that it is given, without .detach() or .item()"
    if value.ndim != 0:
        raise InvalidInputError(
            explain("a scalar function", f"shape {list(value.shape)}", "Reduce it with .mean() or .sum()")
        )
    if not value.requires_grad:
        raise DisconnectedGraphError(explain("a value that depends on the parameters", "one without a graph", way_out))
    parts = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    if all(part is None for part in parts):
        raise DisconnectedGraphError(
            explain("a value that depends on the parameters", "one that ignores them", way_out)
        )
    return tuple(torch.zeros_like(p) if d is None else d for d, p in zip(parts, leaves, strict=True))
