from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.errors import ConvergenceError, ConvergenceWarning, InvalidInputError, MemoryBudgetError
from tad_plugin.iwd.implicit import SegmentStep, curvature_product, inverse_hessian_influence, unrolled_influence
from tad_plugin.nn.derivatives.per_sample import as_parameters, per_sample_gradients
from tad_plugin.nn.derivatives.vectors import flatten
from tests.iwd.problems import LinearModel, Problem, convnet, correlation_and_slope, digits, digits_problem

Values = dict[str, Tensor]


def run(
    network: nn.Module,
    p: Problem,
    w: Tensor,
    batches: list[Tensor],
    rates: list[float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Values, list[SegmentStep]]:
    """Real SGD on the weighted loss, with a graph to the weights; also what is recorded of it."""
    values = {name: q.detach().clone().requires_grad_() for name, q in network.named_parameters()}
    velocity = {name: torch.zeros_like(q) for name, q in values.items()}
    steps = []
    for batch, rate in zip(batches, rates, strict=True):
        steps.append(SegmentStep({name: q.detach() for name, q in values.items()}, rate, batch))
        logits = torch.func.functional_call(network, values, (p.real[batch],))
        loss = (w[batch] * F.cross_entropy(logits, p.real_labels[batch], reduction="none")).mean()
        gradients = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        for (name, q), g in zip(list(values.items()), gradients, strict=True):
            velocity[name] = momentum * velocity[name] + g + weight_decay * q
            values[name] = q - rate * velocity[name]
    return values, steps


def held_out_loss(network: nn.Module, p: Problem, values: Values) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(network, values, (p.held_out,)), p.held_out_labels)


def direction(network: nn.Module, p: Problem, values: Values) -> Tensor:
    leaves = {name: q.detach().clone().requires_grad_() for name, q in values.items()}
    return flatten(torch.autograd.grad(held_out_loss(network, p, leaves), list(leaves.values())))


def smooth() -> nn.Module:
    """With ReLU the gradient of SGD jumps where a unit switches, and a finite difference may step across."""
    return convnet(activation="sigmoid")


def central_differences(network: nn.Module, p: Problem, batches: list[Tensor], rates: list[float]) -> Tensor:
    found = []
    for i in range(len(p.real)):
        values = []
        for sign in (1, -1):
            w = torch.ones(len(p.real), dtype=torch.float64)
            w[i] += sign * 1e-3
            values.append(float(held_out_loss(network, p, run(network, p, w, batches, rates)[0]).detach()))
        found.append((values[0] - values[1]) / 2e-3)
    return torch.tensor(found, dtype=torch.float64)


def test_one_step_is_exact_against_finite_differences() -> None:
    p, network = digits_problem(real=24), smooth()
    batches = [torch.arange(16)]
    w = torch.ones(24, dtype=torch.float64)
    end, steps = run(network, p, w, batches, [0.3])
    u = direction(network, p, end)
    oracle = central_differences(network, p, batches, [0.3])
    for curvature in (False, True):
        found = unrolled_influence(network, steps, p.real, p.real_labels, u, curvature=curvature)
        assert torch.allclose(found, oracle, atol=1e-6 * float(oracle.abs().max()))
    assert bool((found[16:] == 0).all())  # not in the batch


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.05)])
def test_several_steps_with_curvature_equal_autograd_through_the_segment(momentum: float, weight_decay: float) -> None:
    p, network = digits_problem(real=24), convnet()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(24, generator=generator)[:10] for _ in range(4)]
    rates = [0.2, 0.1, 0.2, 0.05]
    w = (torch.rand(24, dtype=torch.float64, generator=generator) + 0.5).requires_grad_()
    end, steps = run(network, p, w, batches, rates, momentum, weight_decay)
    (oracle,) = torch.autograd.grad(held_out_loss(network, p, end), w)
    u = direction(network, p, end)

    def score(curvature: bool, budget: int = 2**30) -> Tensor:
        return unrolled_influence(
            network,
            steps,
            p.real,
            p.real_labels,
            u,
            curvature=curvature,
            weights=w.detach(),
            momentum=momentum,
            weight_decay=weight_decay,
            memory_budget=budget,
        )

    assert torch.allclose(score(True), oracle, atol=1e-11 * float(oracle.abs().max()) + 1e-14)
    assert torch.allclose(score(True, budget=10**5), score(True), atol=1e-13)  # in chunks
    correlation, slope = correlation_and_slope(score(False), oracle)
    print(f"first order over 4 steps, momentum {momentum}: correlation {correlation:.4f}, slope {slope:.3f}")
    assert correlation > 0.9


def test_several_steps_against_finite_differences() -> None:
    p, network = digits_problem(real=12), smooth()
    batches, rates = [torch.arange(8), torch.arange(4, 12), torch.arange(0, 12, 2)], [0.2, 0.2, 0.1]
    end, steps = run(network, p, torch.ones(12, dtype=torch.float64), batches, rates)
    oracle = central_differences(network, p, batches, rates)
    found = unrolled_influence(network, steps, p.real, p.real_labels, direction(network, p, end), curvature=True)
    assert torch.allclose(found, oracle, atol=1e-6 * float(oracle.abs().max()))


def test_first_order_error_vanishes_with_the_learning_rate() -> None:
    p, network = digits_problem(real=16), convnet()
    w = torch.ones(16, dtype=torch.float64)
    errors = []
    for rate in (0.1, 0.01):
        end, steps = run(network, p, w, [torch.arange(16)] * 5, [rate] * 5)
        u = direction(network, p, end)
        exact, first = (
            unrolled_influence(network, steps, p.real, p.real_labels, u, curvature=c) for c in (True, False)
        )
        errors.append(float((exact - first).norm() / exact.norm()))
    assert errors[1] < 0.2 * errors[0]


def test_a_checkpoint_may_stand_for_an_epoch() -> None:
    p, network = digits_problem(real=12), convnet()
    u = torch.ones(flatten(as_parameters(network)).shape, dtype=torch.float64)
    epoch = SegmentStep(as_parameters(network), 0.1, None, divisor=4)
    batches = [SegmentStep(as_parameters(network), 0.1, torch.arange(i, i + 4)) for i in (0, 4, 8)]
    whole = unrolled_influence(network, [epoch], p.real, p.real_labels, u)
    assert torch.allclose(whole, unrolled_influence(network, batches, p.real, p.real_labels, u), atol=1e-13)
    gradients = per_sample_gradients(network, p.real, p.real_labels)
    assert torch.allclose(whole, -0.1 / 4 * gradients @ u, atol=1e-12)


def test_curvature_product_in_chunks_and_with_weights() -> None:
    p, network = digits_problem(real=11), convnet(width=4)
    values = as_parameters(network)
    v = torch.randn(flatten(values).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for kind in ("hessian", "gauss_newton"):
        whole, chunked = (
            curvature_product(network, p.real, p.real_labels, kind=kind, weights=w, memory_budget=budget)
            for budget in (2**30, 10**5)
        )
        assert torch.allclose(whole(v), chunked(v), atol=1e-12)

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(values, flat.split([q.numel() for q in values.values()]), strict=True))
        parts = {name: part.reshape(values[name].shape) for name, part in parts.items()}
        losses = F.cross_entropy(torch.func.functional_call(network, parts, (p.real,)), p.real_labels, reduction="none")
        return (w * losses).mean()

    gradient = torch.func.grad(loss)
    flat = flatten(values)
    difference = (gradient(flat + 1e-5 * v) - gradient(flat - 1e-5 * v)) / 2e-5
    found = curvature_product(network, p.real, p.real_labels, weights=w)(v)
    assert torch.allclose(found, difference, atol=1e-6 * float(difference.abs().max()))


# -- at an optimum ----------------------------------------------------------------------------------

L2 = 0.03


def fit(x: Tensor, y: Tensor, w: Tensor, n: int) -> LinearModel:
    """Minimises 1/n sum w_i l_i + L2/2 |theta|^2 to the last digit by Newton's method, in closed form."""
    rows = torch.cat([x.flatten(1), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    theta = torch.zeros(3, rows.shape[1], dtype=x.dtype)
    gradient = torch.ones_like(theta)
    while float(gradient.norm()) > 1e-12:
        p = F.softmax(rows @ theta.T, dim=1)
        gradient = (w[:, None] * (p - F.one_hot(y, 3))).T @ rows / n + L2 * theta
        inner = w[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        hessian = torch.einsum("nab,ni,nj->aibj", inner, rows, rows).reshape(theta.numel(), -1) / n
        hessian += L2 * torch.eye(theta.numel(), dtype=x.dtype)
        theta = theta - torch.linalg.solve(hessian, gradient.flatten()).reshape(theta.shape)
    model = LinearModel(x[0].numel(), 3)
    with torch.no_grad():
        model.linear.weight.copy_(theta[:, :-1])
        model.linear.bias.copy_(theta[:, -1])
    return model


def linear_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = digits()
    x, y = F.avg_pool2d(x[y < 3], 2), y[y < 3]  # 16 features, so that the closed forms stay small
    y = torch.where(torch.arange(len(y)) % 7 == 0, (y + 1) % 3, y)  # some mislabelled, so influences differ
    return x[:300], y[:300], x[300:500], y[300:500]


def gradient_of_target(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return flatten(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def test_inverse_hessian_equals_the_closed_form() -> None:
    x, y, vx, vy = linear_problem()
    n = len(x)
    model = fit(x, y, torch.ones(n, dtype=torch.float64), n)
    u = gradient_of_target(model, vx, vy)
    product = curvature_product(model, x, y)
    hessian = torch.stack([product(e) for e in torch.eye(len(u), dtype=torch.float64)])
    expected = -(per_sample_gradients(model, x, y) @ torch.linalg.solve(hessian + L2 * torch.eye(len(u)), u)) / n
    for curvature in ("hessian", "gauss_newton"):  # the same for a linear model
        found = inverse_hessian_influence(
            model, x, y, u, damping=L2, curvature=curvature, tolerance=1e-10, max_iterations=500, strict=True
        )
        assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_inverse_hessian_predicts_leave_one_out_retraining() -> None:
    x, y, vx, vy = linear_problem()
    n = len(x)
    ones = torch.ones(n, dtype=torch.float64)
    model = fit(x, y, ones, n)
    base = float(F.cross_entropy(model(vx), vy).detach())

    def retrained(i: int, weight: float) -> float:
        w = ones.clone()
        w[i] = weight
        return float(F.cross_entropy(fit(x, y, w, n)(vx), vy).detach())

    found = inverse_hessian_influence(
        model, x, y, gradient_of_target(model, vx, vy), damping=L2, tolerance=1e-9, max_iterations=500, strict=True
    )
    # A small change of the weight: the derivative itself.
    some = list(range(0, n, 10))
    small = torch.tensor([(retrained(i, 1 + 1e-4) - retrained(i, 1 - 1e-4)) / 2e-4 for i in some], dtype=torch.float64)
    assert torch.allclose(found[some], small, atol=1e-6 * float(small.abs().max()))
    # Taking i out lowers its weight by 1, so M changes by about -I_i: a helpful sample (I < 0) is missed (M rises).
    # That is no longer small for a sample with much leverage; the error falls with n and with the penalty.
    left_out = torch.tensor([retrained(i, 0.0) - base for i in range(n)], dtype=torch.float64)
    correlation, slope = correlation_and_slope(-found, left_out)
    print(f"leave-one-out: correlation {correlation:.5f}, slope {slope:.3f}")
    assert correlation >= 0.99
    assert 0.9 < slope < 1.1
    flipped = torch.arange(n) % 7 == 0
    assert float(found[flipped].mean()) > 0 > float(found[~flipped].mean())  # harmful and helpful


def test_scoring_other_samples() -> None:
    x, y, vx, vy = linear_problem()
    model = fit(x, y, torch.ones(len(x), dtype=torch.float64), len(x))
    u = gradient_of_target(model, vx, vy)
    whole = inverse_hessian_influence(model, x, y, u, damping=L2, max_iterations=500)
    some = inverse_hessian_influence(model, x, y, u, damping=L2, max_iterations=500, scored=(x[:7], y[:7]))
    assert torch.allclose(some, whole[:7])


def test_not_converging_and_negative_curvature() -> None:
    x, y, _, _ = linear_problem()
    model = LinearModel(16, 3)
    u = torch.randn(51, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ConvergenceWarning):
        inverse_hessian_influence(model, x, y, u, damping=1e-6, max_iterations=2)
    with pytest.raises(ConvergenceError):
        inverse_hessian_influence(model, x, y, u, damping=1e-6, max_iterations=2, strict=True)
    # A fresh network is far from any optimum: its Hessian is indefinite, its Gauss-Newton matrix is not.
    p, network = digits_problem(real=30), convnet(width=4, depth=2)
    u = torch.randn(
        flatten(as_parameters(network)).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ConvergenceError, match="curvature"):
        inverse_hessian_influence(network, p.real, p.real_labels, u, damping=1e-3, max_iterations=1000, strict=True)
    inverse_hessian_influence(
        network,
        p.real,
        p.real_labels,
        u,
        damping=1e-3,
        curvature="gauss_newton",
        max_iterations=1000,
        strict=True,
    )


def test_wrong_arguments() -> None:
    p, network = digits_problem(real=4), convnet()
    u = as_parameters(network)
    step = SegmentStep(u, 0.1)
    with pytest.raises(InvalidInputError, match="0 steps"):
        unrolled_influence(network, [], p.real, p.real_labels, u)
    with pytest.raises(InvalidInputError, match="momentum 1.0"):
        unrolled_influence(network, [step], p.real, p.real_labels, u, momentum=1.0)
    with pytest.raises(InvalidInputError, match="learning_rate 0.0"):
        unrolled_influence(network, [SegmentStep(u, 0.0)], p.real, p.real_labels, u)
    with pytest.raises(InvalidInputError, match="damping"):
        inverse_hessian_influence(network, p.real, p.real_labels, u, damping=0.0)
    with pytest.raises(InvalidInputError, match="fisher"):
        curvature_product(network, p.real, p.real_labels, kind="fisher")  # type: ignore[arg-type]
    with pytest.raises(MemoryBudgetError):
        unrolled_influence(network, [step], p.real, p.real_labels, u, memory_budget=100)
