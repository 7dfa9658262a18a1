from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.errors import DisconnectedGraphError, InvalidInputError, InvalidLabelsError, NonFiniteError
from tad_plugin.iwd.explicit import dm_influence, embedding_directions, explicit_influence, influence, target_direction
from tad_plugin.iwd.targets import class_mean_distance, validation_target
from tests.iwd.problems import Problem, convnet, correlation_and_slope, digits_problem

LossFn = Callable[[Tensor, Tensor], Tensor]


def dm_loss(network: nn.Module, p: Problem) -> LossFn:
    def loss(w: Tensor, s: Tensor) -> Tensor:
        return class_mean_distance(network, s, p.synthetic_labels, p.real, p.real_labels, 10, weights=w)

    return loss


def dc_loss(network: nn.Module, p: Problem) -> LossFn:
    """Gradient matching: cosine distance between the weighted real and the synthetic gradient of each layer."""
    parameters = list(network.parameters())

    def loss(w: Tensor, s: Tensor) -> Tensor:
        real = (w * F.cross_entropy(network(p.real), p.real_labels, reduction="none")).mean()
        goal = torch.autograd.grad(real, parameters, create_graph=True)
        own = torch.autograd.grad(F.cross_entropy(network(s), p.synthetic_labels), parameters, create_graph=True)
        pairs = [(a.flatten(), b.flatten()) for a, b in zip(goal, own, strict=True)]
        return torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]).sum()

    return loss


def step(loss_fn: LossFn, w: Tensor, s: Tensor, eta: float) -> Tensor:
    """The real step that a loop takes."""
    leaf = s.detach().clone().requires_grad_()
    loss_fn(w, leaf).backward()
    return (leaf - eta * leaf.grad).detach()


def finite_differences(loss_fn: LossFn, s: Tensor, target: Callable[[Tensor], Tensor], eta: float, n: int) -> Tensor:
    """Raise and lower every weight, take the real step each time, measure M."""
    found = []
    for i in range(n):
        eps = torch.zeros(n, dtype=s.dtype)
        eps[i] = 1e-3
        values = [float(target(step(loss_fn, 1 + sign * eps, s, eta)).detach()) for sign in (1, -1)]
        found.append((values[0] - values[1]) / 2e-3)
    return torch.tensor(found, dtype=s.dtype)


@pytest.mark.parametrize(("make_loss", "eta"), [(dm_loss, 0.05), (dc_loss, 0.5)])
def test_explicit_influence_is_the_derivative_of_the_target_after_the_real_step(
    make_loss: Callable[[nn.Module, Problem], LossFn], eta: float
) -> None:
    p = digits_problem(real=64)
    network, scorer = convnet(seed=0), convnet(seed=1)
    loss_fn = make_loss(network, p)

    def target(s: Tensor) -> Tensor:
        return validation_target(scorer, s, p.synthetic_labels, p.held_out, p.held_out_labels, alpha=0.1)

    w = torch.ones(64, dtype=torch.float64)
    oracle = finite_differences(loss_fn, p.synthetic, target, eta, 64)
    exact = influence(loss_fn, w, p.synthetic, target, eta=eta)
    cheap = influence(loss_fn, w, p.synthetic, target, eta=eta, target_at="before")
    correlation, slope = correlation_and_slope(exact, oracle)
    print(f"{make_loss.__name__}: after: correlation {correlation:.9f}, slope {slope:.7f}", end="; ")
    assert correlation >= 0.999
    assert abs(slope - 1) <= 0.01
    assert torch.allclose(exact, oracle, rtol=1e-4, atol=1e-4 * float(oracle.abs().max()))
    # At S instead of S' it is first order in eta: a good ranking, a scale that is only near.
    correlation, slope = correlation_and_slope(cheap, oracle)
    print(f"before: correlation {correlation:.6f}, slope {slope:.5f}")
    assert correlation >= 0.95


def test_gradient_at_the_synthetic_set_converges_with_the_step_size() -> None:
    p = digits_problem(real=24)
    loss_fn, scorer, w = dm_loss(convnet(seed=0), p), convnet(seed=1), torch.ones(24, dtype=torch.float64)

    def target(s: Tensor) -> Tensor:
        return validation_target(scorer, s, p.synthetic_labels, p.held_out, p.held_out_labels, alpha=0.1)

    def error(eta: float) -> float:
        exact = influence(loss_fn, w, p.synthetic, target, eta=eta) / eta
        cheap = influence(loss_fn, w, p.synthetic, target, eta=eta, target_at="before") / eta
        return float((exact - cheap).norm() / exact.norm())

    assert error(1e-3) < 0.01
    assert error(1e-4) < 0.15 * error(1e-3)


def test_sign_negative_is_helpful() -> None:
    """One image per class, M = distance to a class mean: a real sample on the far side must be harmful."""
    s = torch.zeros(1, 2, dtype=torch.float64)
    real = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    goal = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    found = influence(
        lambda w, s: ((w[:, None] * real).mean(0) - s).square().sum(),
        torch.ones(2, dtype=torch.float64),
        s,
        lambda s: (s - goal).square().sum(),
        eta=0.1,
    )
    # S' = S + 2 eta (mean - S) and M = (S' - 2)^2, so dM/dw_i = 2 (S' - 2) * 2 eta * x_i / 2 = -0.4 x_i.
    assert torch.allclose(found, torch.tensor([-0.4, 0.4], dtype=torch.float64))


def test_tuples_of_synthetic_tensors_with_their_own_rates() -> None:
    torch_generator = torch.Generator().manual_seed(0)
    a, b, unused = (torch.randn(3, dtype=torch.float64, generator=torch_generator) for _ in range(3))
    c, w = torch.randn(5, 3, dtype=torch.float64, generator=torch_generator), torch.ones(5, dtype=torch.float64)

    def loss_fn(w: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        return (((w[:, None] * c).mean(0) - parts[0] * parts[1]).square()).sum()

    def target(parts: tuple[Tensor, ...]) -> Tensor:
        return (parts[0].sin() * parts[1] + parts[2]).sum()

    rates = (0.3, 0.07, 1.0)
    found = influence(loss_fn, w, (a, b, unused), target, eta=rates)

    def after(w: Tensor) -> Tensor:
        parts = tuple(t.clone().requires_grad_() for t in (a, b, unused))
        gradients = torch.autograd.grad(loss_fn(w, parts), parts[:2], create_graph=True)
        return target((parts[0] - 0.3 * gradients[0], parts[1] - 0.07 * gradients[1], parts[2]))

    assert torch.allclose(found, torch.autograd.functional.jacobian(after, w), atol=1e-12)


def test_the_loops_own_backward_pass_is_not_disturbed() -> None:
    p = digits_problem(real=16)
    network = convnet()
    loss_fn = dm_loss(network, p)

    def gradient(measure: bool) -> Tensor:
        s = p.synthetic.clone().requires_grad_()
        w = torch.ones(16, dtype=torch.float64, requires_grad=True)
        loss = loss_fn(w, s)
        if measure:
            explicit_influence(loss, w, s, torch.ones_like(s))
            assert s.grad is None and w.grad is None
        loss.backward()
        assert s.grad is not None
        return s.grad

    assert torch.equal(gradient(False), gradient(True))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_dm_influence_equals_the_general_identity(normalise: bool, weighted: bool) -> None:
    p = digits_problem(real=64)
    network = convnet()
    generator = torch.Generator().manual_seed(3)
    values = torch.ones(64, dtype=torch.float64)
    if weighted:
        values = torch.rand(64, dtype=torch.float64, generator=generator) + 0.2
    slope = torch.randn(p.synthetic.shape, dtype=torch.float64, generator=generator)
    w, s = values.clone().requires_grad_(), p.synthetic.clone().requires_grad_()
    if normalise:
        loss = class_mean_distance(network, s, p.synthetic_labels, p.real, p.real_labels, 10, weights=w)
    else:
        phi, own = network.embed(p.real), network.embed(s)
        terms = []
        for c in range(10):
            inside = p.real_labels == c
            terms.append(
                ((w[inside, None] * phi[inside]).mean(0) - own[p.synthetic_labels == c].mean(0)).square().sum()
            )
        loss = torch.stack(terms).sum()
    expected = explicit_influence(loss, w, s, slope, eta=0.7)
    found = dm_influence(
        network.embed,
        p.real,
        p.real_labels,
        p.synthetic,
        p.synthetic_labels,
        slope,
        10,
        weights=values,
        normalise=normalise,
        eta=0.7,
        chunk_size=17,
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_dm_influence_divisor_and_absent_class() -> None:
    p = digits_problem(real=32)
    network = convnet()
    slope = torch.ones_like(p.synthetic)
    arguments = (network.embed, p.real, p.real_labels, p.synthetic[1:], p.synthetic_labels[1:], slope[1:], 10)
    plain, scaled = dm_influence(*arguments), dm_influence(*arguments, divisor=256.0)
    counts = torch.bincount(p.real_labels, minlength=10)[p.real_labels]
    assert torch.allclose(scaled, plain * counts / 256.0)
    assert bool((plain[p.real_labels == p.synthetic_labels[0]] == 0).all())
    assert bool((plain[p.real_labels != p.synthetic_labels[0]] != 0).any())


def test_target_direction_matches_autograd_through_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    start, theta, s, goal = (torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(4))

    def loss_fn(
        theta: Tensor, s: Tensor
    ) -> Tensor:  # a trajectory-matching loss: S moves the student, theta is its aim
        student = start - 0.3 * torch.tanh(s * start) * s
        return (student - theta).square().sum() / (start - theta).square().sum()

    def after(theta: Tensor) -> Tensor:
        leaf = s.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_fn(theta, leaf), leaf, create_graph=True)
        return (leaf - 0.2 * g - goal).square().sum()

    expected = torch.autograd.functional.jacobian(after, theta)
    leaf, t = s.clone().requires_grad_(), theta.clone().requires_grad_()
    stepped = step(loss_fn, theta, s, 0.2)
    (u,) = target_direction(loss_fn(t, leaf), t, leaf, 2 * (stepped - goal), eta=0.2)
    assert torch.allclose(u, expected, atol=1e-12)


def test_a_loss_that_does_not_depend_on_the_weights_or_the_synthetic_set() -> None:
    s, w = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
    with pytest.raises(DisconnectedGraphError, match="synthetic set"):
        explicit_influence((w * 2).sum(), w, s, torch.ones(3))
    with pytest.raises(DisconnectedGraphError, match="synthetic set"):
        explicit_influence(torch.tensor(1.0), w, s, torch.ones(3))
    with pytest.raises(DisconnectedGraphError, match="weights"):
        explicit_influence(s.square().sum(), w, s, torch.ones(3))
    with pytest.raises(DisconnectedGraphError, match="weights"):  # beside S, not inside the matched term
        explicit_influence(s.square().sum() + w.square().sum(), w, s, torch.ones(3))
    with pytest.raises(DisconnectedGraphError, match="target"):
        influence(lambda w, s: (w.sum() * s).sum(), w, s, lambda s: torch.zeros((), requires_grad=True) * 1)


def test_non_finite_values_are_named() -> None:
    s, w = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
    with pytest.raises(NonFiniteError, match="target gradient"):
        explicit_influence(w.sum() * s.square().sum(), w, s, torch.tensor([1.0, float("nan"), 1.0]))
    with pytest.raises(NonFiniteError, match="loss"):
        explicit_influence(w.sum() * s.square().sum() * float("inf"), w, s, torch.ones(3))


def test_wrong_arguments() -> None:
    s, w = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
    loss = w.sum() * s.square().sum()
    with pytest.raises(InvalidInputError, match="weights"):
        explicit_influence(loss, w * 1, s, torch.ones(3))
    with pytest.raises(InvalidInputError, match="weights"):
        explicit_influence(loss, torch.ones(4), s, torch.ones(3))
    with pytest.raises(InvalidInputError, match=r"\[2\]"):
        explicit_influence(loss, w, s, torch.ones(2))
    with pytest.raises(InvalidInputError, match=r"\[3\]"):
        explicit_influence(w.sum() * s, w, s, torch.ones(3))
    with pytest.raises(InvalidInputError, match="eta"):
        explicit_influence(loss, w, s, torch.ones(3), eta=0.0)
    with pytest.raises(InvalidInputError, match="target_at"):
        influence(lambda w, s: loss, w, s, lambda s: s.sum(), target_at="later")  # type: ignore[arg-type]
    p, network = digits_problem(real=8), convnet()
    with pytest.raises(InvalidLabelsError):
        dm_influence(
            network.embed, p.real, p.real_labels[:3], p.synthetic, p.synthetic_labels, torch.ones_like(p.synthetic), 10
        )
    given = (network.embed, p.real, p.real_labels, p.synthetic, p.synthetic_labels, torch.ones_like(p.synthetic), 10)
    for more in ({"eta": -1.0}, {"chunk_size": 0}, {"divisor": 0.0}, {"weights": -torch.ones(8)}):
        with pytest.raises(InvalidInputError, match=next(iter(more))):
            dm_influence(*given, **more)  # type: ignore[arg-type]
    with pytest.raises(InvalidLabelsError, match="synthetic_labels"):
        dm_influence(*given[:4], p.synthetic_labels + 1, *given[5:])
    with pytest.raises(InvalidInputError, match="target_gradient"):
        embedding_directions(network.embed, p.synthetic, p.synthetic_labels, p.real, 10)
    with pytest.raises(InvalidInputError, match=r"\[2, 2\]"):
        influence(lambda w, s: loss, torch.ones(2, 2), s, lambda s: s.sum())
