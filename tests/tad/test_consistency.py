"""The temporal ensemble against the exponential mean written out, and the term's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from tad_plugin.errors import InvalidInputError, NonFiniteError, StateMismatchError
from tad_plugin.tad.consistency import TemporalEnsemble, consistency_loss, ramp_up


def probabilities(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize(
    ("beta", "dtype", "tolerance"), [(0.6, torch.float32, 1e-6), (0.99, torch.float16, 3e-3), (0.0, torch.float32, 0)]
)
def test_equals_the_bias_corrected_exponential_mean(beta, dtype, tolerance):
    n, k = 12, 5
    ensemble = TemporalEnsemble(n, k, beta, dtype=dtype)
    mean, visits = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n)
    generator = torch.Generator().manual_seed(0)
    for step in range(15):
        indices = torch.randperm(n, generator=generator)[:7]
        new = probabilities(7, k, seed=step)
        ensemble.update(indices, new)
        mean[indices] = beta * mean[indices] + (1 - beta) * new.double()
        visits[indices] += 1
    expected = mean / (1 - beta ** visits.double()).unsqueeze(1)
    torch.testing.assert_close(ensemble.ensemble(torch.arange(n)).double(), expected, atol=tolerance, rtol=0)
    assert torch.equal(ensemble.count, visits.int())
    assert ensemble.mean.dtype == dtype


def test_a_sample_twice_in_a_batch_counts_once_with_its_mean():
    new = probabilities(3, 4)
    ensemble = TemporalEnsemble(5, 4, dtype=torch.float32)
    ensemble.update(torch.tensor([2, 0, 2]), new)
    torch.testing.assert_close(ensemble.ensemble(torch.tensor([2]))[0], (new[0] + new[2]) / 2)
    assert ensemble.count.tolist() == [1, 0, 1, 0, 0]


def test_first_visit_contributes_nothing():
    ensemble = TemporalEnsemble(4, 3)
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    indices = torch.tensor([1, 3])
    loss = consistency_loss(logits, ensemble.ensemble(indices))
    loss.backward()
    assert loss.item() == 0 and not bool(logits.grad.any())
    ensemble.update(indices[:1], logits[:1].softmax(1))
    moved = logits.detach() + torch.tensor([1.0, 0.0, -1.0])
    expected = (moved[0].softmax(0) - logits[0].softmax(0)).square().sum() / 2
    torch.testing.assert_close(
        consistency_loss(moved, ensemble.ensemble(indices)), expected.detach(), atol=1e-3, rtol=0
    )


def test_gradient_by_finite_differences_and_constant_target():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = probabilities(4, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: consistency_loss(x, target.detach()), (logits,))
    consistency_loss(logits, target).backward()
    assert target.grad is None


def test_state_is_restored_bit_for_bit():
    first, second = TemporalEnsemble(6, 3), TemporalEnsemble(6, 3)
    first.update(torch.tensor([0, 4]), probabilities(2, 3))
    second.load_state_dict(first.state_dict())
    for ensemble in (first, second):
        ensemble.update(torch.tensor([4, 5]), probabilities(2, 3, seed=1))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.count, second.count)
    for other in (TemporalEnsemble(7, 3), TemporalEnsemble(6, 3, 0.7), TemporalEnsemble(6, 3, dtype=torch.float32)):
        with pytest.raises(StateMismatchError, match="beta.*dtype"):
            other.load_state_dict(first.state_dict())


def test_ramp_up():
    assert ramp_up(0, 10, 2.0) == pytest.approx(2 * math.exp(-5))
    assert ramp_up(5, 10, 2.0) == pytest.approx(2 * math.exp(-1.25))
    assert ramp_up(10, 10, 2.0) == ramp_up(99, 10, 2.0) == ramp_up(0, 0, 2.0) == 2.0
    with pytest.raises(InvalidInputError, match="epoch=-1"):
        ramp_up(-1, 10, 1.0)


def test_bad_input():
    ensemble = TemporalEnsemble(4, 3)
    for arguments in ((0, 3), (4, 0), (4, 3, 1.0)):
        with pytest.raises(InvalidInputError, match="num_samples.*beta"):
            TemporalEnsemble(*arguments)
    for indices in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(InvalidInputError, match="indices"):
            ensemble.ensemble(indices)
    with pytest.raises(InvalidInputError, match="probabilities.*2, 3"):
        ensemble.update(torch.tensor([0]), probabilities(2, 3))
    with pytest.raises(NonFiniteError, match="3 non-finite"):
        ensemble.update(torch.tensor([0]), torch.full((1, 3), math.nan))
    with pytest.raises(InvalidInputError, match="2, 4"):
        consistency_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    assert ensemble.count.tolist() == [0] * 4
