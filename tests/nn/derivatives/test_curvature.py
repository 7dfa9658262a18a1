from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tad_plugin.errors import (
    ConvergenceError,
    ConvergenceWarning,
    DisconnectedGraphError,
    InvalidInputError,
    NonFiniteError,
)
from tad_plugin.nn.derivatives.curvature import conjugate_gradient, gauss_newton_vector_product, hessian_vector_product


def positive_definite(size: int, seed: int, smallest: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a @ a.T / size + smallest * torch.eye(size, dtype=torch.float64)).to(dtype)


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 12), seed=st.integers(0, 1000))
def test_hessian_product_of_a_quadratic(size: int, seed: int) -> None:
    a, b, x, v = positive_definite(size, seed), vector(size, 1), vector(size, 2), vector(size, 3)
    product = hessian_vector_product(lambda x: 0.5 * x @ a @ x + b @ x, x)
    assert torch.allclose(product(v), a @ v, atol=1e-12)
    assert torch.allclose(product(2 * v), 2 * (a @ v), atol=1e-12)  # the graph is kept


def test_hessian_product_over_several_tensors_against_autograd() -> None:
    shapes = [(3, 4), (4,), (2,)]
    parts = [vector(12, 0).reshape(3, 4), vector(4, 1), vector(2, 2)]

    def f(parts: tuple[Tensor, ...]) -> Tensor:  # the last enters linearly
        return ((parts[0] @ parts[1]).sin().sum() ** 2) + parts[2].sum()

    flat = torch.cat([p.flatten() for p in parts])

    def of_flat(flat: Tensor) -> Tensor:
        cut = flat.split([12, 4, 2])
        return f(tuple(c.reshape(s) for c, s in zip(cut, shapes, strict=True)))

    hessian = torch.autograd.functional.hessian(of_flat, flat)
    v = vector(18, 4)
    assert torch.allclose(hessian_vector_product(f, parts)(v), hessian @ v, atol=1e-12)


def test_hessian_product_of_a_linear_function_is_zero() -> None:
    assert torch.equal(hessian_vector_product(lambda x: x.sum(), vector(3, 0))(vector(3, 1)), torch.zeros(3).double())


def test_gauss_newton_product() -> None:
    x, y = vector(30, 0).reshape(10, 3), torch.arange(10) % 4
    w = vector(12, 1).reshape(3, 4)
    v = vector(12, 2)

    # Linear in the parameters: Gauss-Newton is the Hessian.
    linear = gauss_newton_vector_product(lambda w: x @ w, lambda out: F.cross_entropy(out, y), w)
    assert torch.allclose(linear(v), hessian_vector_product(lambda w: F.cross_entropy(x @ w, y), w)(v), atol=1e-12)

    # Not linear: J^T H_out J, formed explicitly.
    def model(w: Tensor) -> Tensor:
        return torch.tanh(x @ w) ** 2

    jacobian = torch.autograd.functional.jacobian(model, w).reshape(40, 12)
    out = model(w)
    curvature = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o.reshape(10, 4), y), out.flatten())
    found = gauss_newton_vector_product(model, lambda out: F.cross_entropy(out, y), w)(v)
    assert torch.allclose(found, jacobian.T @ curvature @ jacobian @ v, atol=1e-12)


@given(size=st.integers(1, 25), seed=st.integers(0, 1000))
def test_conjugate_gradient_equals_the_inverse(size: int, seed: int) -> None:
    a, b = positive_definite(size, seed), vector(size, 1)
    found = conjugate_gradient(lambda v: a @ v, b, tolerance=1e-10, max_iterations=20 * size)
    assert found.converged and found.residual <= 1e-10
    assert float((found.solution - torch.linalg.solve(a, b)).abs().max()) < 1e-6


def test_conjugate_gradient_needs_as_many_steps_as_distinct_eigenvalues() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    assert conjugate_gradient(lambda v: a @ v, vector(5, 0), tolerance=1e-10).iterations == 3


def test_conjugate_gradient_start_and_zero() -> None:
    a, b = positive_definite(6, 0), vector(6, 1)
    solution = torch.linalg.solve(a, b)
    assert conjugate_gradient(lambda v: a @ v, b, x0=solution).iterations == 0
    near = conjugate_gradient(lambda v: a @ v, b, x0=solution + 1e-3, tolerance=1e-10)
    assert torch.allclose(near.solution, solution, atol=1e-8)
    zero = conjugate_gradient(lambda v: a @ v, torch.zeros(6, dtype=torch.float64), x0=solution)
    assert zero.converged and not bool(zero.solution.any())


def test_float32_residual_is_the_true_one() -> None:
    a, b = positive_definite(40, 0, smallest=1e-3, dtype=torch.float32), vector(40, 1).float()
    found = conjugate_gradient(lambda v: a @ v, b, tolerance=1e-4, max_iterations=1000)
    assert found.converged
    assert float((b - a @ found.solution).norm() / b.norm()) == pytest.approx(found.residual)
    with pytest.warns(ConvergenceWarning, match="1e-12"):  # below what float32 can give
        unreachable = conjugate_gradient(lambda v: a @ v, b, tolerance=1e-12, max_iterations=1000)
    assert not unreachable.converged
    assert unreachable.residual < 1e-3


def test_not_converging_is_said_with_residual_and_way_out() -> None:
    a, b = positive_definite(30, 0, smallest=1e-6), vector(30, 1)
    with pytest.warns(ConvergenceWarning, match=r"1e-06.* 3 .*max_iterations"):
        found = conjugate_gradient(lambda v: a @ v, b, max_iterations=3)
    assert not found.converged and found.iterations == 3
    with pytest.raises(ConvergenceError, match="1e-06"):
        conjugate_gradient(lambda v: a @ v, b, max_iterations=3, strict=True)
    with warnings.catch_warnings():  # damping is what it says: enough of it, and it converges
        warnings.simplefilter("error")
        conjugate_gradient(lambda v: a @ v + 100.0 * v, b, max_iterations=6, tolerance=1e-6)


def test_negative_curvature_names_damping() -> None:
    a, b = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="curvature.*damping"):
        assert not conjugate_gradient(lambda v: a @ v, b).converged
    with pytest.raises(ConvergenceError, match="damping"):
        conjugate_gradient(lambda v: a @ v, b, strict=True)
    assert conjugate_gradient(lambda v: a @ v + 3.0 * v, b, strict=True).converged


def test_wrong_arguments() -> None:
    with pytest.raises(InvalidInputError, match=r"\[2, 2\]"):
        conjugate_gradient(lambda v: v, torch.ones(2, 2))
    with pytest.raises(InvalidInputError, match="tolerance 0.0"):
        conjugate_gradient(lambda v: v, torch.ones(2), tolerance=0.0)
    with pytest.raises(NonFiniteError, match="right-hand side"):
        conjugate_gradient(lambda v: v, torch.tensor([1.0, float("inf")]))
    with pytest.raises(NonFiniteError, match="iteration 1"):
        conjugate_gradient(lambda v: v * float("nan"), torch.ones(2))
    with pytest.raises(DisconnectedGraphError):
        hessian_vector_product(lambda x: torch.tensor(1.0), torch.ones(2))
    with pytest.raises(InvalidInputError, match=r"\[2\]"):
        hessian_vector_product(lambda x: x, torch.ones(2))
    with pytest.raises(InvalidInputError, match=r"2 .*\[3\]"):
        hessian_vector_product(lambda x: x.square().sum(), torch.ones(2))(torch.ones(3))
