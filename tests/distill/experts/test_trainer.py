"""One expert: its steps against a plain loop, and what methods see and change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.core.scorer import weighted_cross_entropy
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer, expert_network
from tad_plugin.errors import ConfigError, NonFiniteError
from tad_plugin.nn.augment import Augmentation
from tad_plugin.utils.seeds import expert_generator
from tests.distill.experts.training import Even, Term, config, data, hook_of, plain, same


def plain_loop(setup: ExpertConfig, real: RealData, generator: torch.Generator) -> list[list[Tensor]]:
    """The same training written out, a whole batch in one pass."""
    network = expert_network(setup, real, generator).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=setup.lr, momentum=setup.momentum)
    augmentation = Augmentation(setup.augment, align_corners=True)
    found = [[p.detach().clone() for p in network.parameters()]]
    for _ in range(setup.epochs):
        for indices in torch.randperm(len(real), generator=generator).split(setup.batch_train):
            images = augmentation(real.images[indices], generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(images), real.labels[indices]).backward()
            optimizer.step()
        found.append([p.detach().clone() for p in network.parameters()])
    return found


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9}])
@pytest.mark.parametrize("chunk", [5, 16])
def test_an_expert_is_sgd_on_the_observed_labels(
    chunk: int, changes: dict[str, float], global_rng_untouched: None
) -> None:
    setup = config(**changes)
    trainer = ExpertTrainer(setup, data(), plain(data()), expert_generator(0, 0))
    trainer.chunk = chunk
    for _ in range(setup.epochs):
        trainer.run_epoch()
    expected = plain_loop(setup, data(), expert_generator(0, 0))
    assert len(trainer.trajectory) == setup.epochs + 1
    for mine, theirs in zip(trainer.trajectory, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.equal(trainer.trajectory[0][0], trainer.trajectory[1][0])


def test_entries_of_a_trajectory_are_copies() -> None:
    trainer = ExpertTrainer(config(), data(), plain(data()), expert_generator(0, 0))
    before = [p.clone() for p in trainer.trajectory[0]]
    trainer.run_epoch()
    assert same(trainer.trajectory[0], before)


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_even_weights_give_the_baseline(rho: float) -> None:
    real = data()
    found = []
    for hook in (plain(real), hook_of(real, Even())):
        trainer = ExpertTrainer(config(rho=rho), real, hook, expert_generator(0, 0))
        trainer.run_epoch()
        found.append(trainer.trajectory[-1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_targets_weights_and_a_methods_term_enter_the_gradient_of_a_batch() -> None:
    real, generator = data(), torch.Generator().manual_seed(1)
    term = Term()
    hook = hook_of(real, term)
    hook.state.update(target=real.true_labels, trusted=torch.rand(60, generator=generator) < 0.7)
    hook.state.set_weights("test", torch.rand(60, generator=generator))
    trainer = ExpertTrainer(config(), real, hook, expert_generator(0, 0))
    trainer.chunk = 5
    indices = torch.randperm(60, generator=generator)[:16]
    loss = trainer.step(indices, real.images[indices])
    assert [len(i) for i in term.seen] == [5, 5, 5, 1] and torch.equal(torch.cat(term.seen), indices)
    other = expert_network(config(), real, expert_generator(0, 0))
    logits, state = other(real.images[indices]), hook.state
    expected = weighted_cross_entropy(logits, state.target[indices], (state.weight * state.trusted)[indices])
    expected = expected + 0.1 * logits.square().sum(1).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for p, g in zip(trainer.parameters, torch.autograd.grad(expected, list(other.parameters())), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_trusted_sample_moves_nothing() -> None:
    real = data()
    hook = hook_of(real, Even())
    hook.state.update(trusted=torch.arange(60) >= 16)
    trainer = ExpertTrainer(config(), real, hook, expert_generator(0, 0))
    trainer.step(torch.arange(16), real.images[:16])
    assert same([p.detach() for p in trainer.parameters], trainer.trajectory[0])


def test_the_schedule_drops_the_rate_where_the_published_one_does() -> None:
    trainer = ExpertTrainer(config(epochs=6, decay=True, momentum=0.5), data(), plain(data()), expert_generator(0, 0))
    rates = []
    for _ in range(6):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.run_epoch()
    assert rates == pytest.approx([0.1] * 5 + [0.01])  # epochs 0 to 6 // 2 + 1 at the full rate


def test_a_diverged_expert_is_named() -> None:
    trainer = ExpertTrainer(config(lr=1e30), data(), plain(data()), expert_generator(0, 0))
    with pytest.raises(NonFiniteError, match="nan.* 0.* lr"):
        trainer.run_epoch()


# -- sharpness-aware steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_sharpness_aware_step_is_gradient_surgery_written_out(adaptive: bool) -> None:
    real, setup = data(), config(rho=0.05, alpha=0.4, adaptive=adaptive)
    trainer = ExpertTrainer(setup, real, plain(real), expert_generator(0, 0))
    network = expert_network(setup, real, expert_generator(0, 0))
    names = [n for n, _ in network.named_parameters()]
    start = [p.detach().clone() for p in network.parameters()]

    def slope(at: list[Tensor]) -> Tensor:
        points = [p.clone().requires_grad_() for p in at]
        logits = torch.func.functional_call(network, dict(zip(names, points, strict=True)), (real.images[:16],))
        return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(logits, real.labels[:16]), points)])

    flat, old = torch.cat([p.flatten() for p in start]), slope(start)
    scale = flat.abs() if adaptive else torch.ones_like(flat)
    climbed = flat + 0.05 * scale.square() * old / (scale * old).norm()
    new = slope([c.view_as(p) for c, p in zip(climbed.split([p.numel() for p in start]), start, strict=True)])
    across = old - (old @ new) / (new @ new) * new
    expected = flat - setup.lr * (new - 0.4 * across)
    trainer.step(torch.arange(16), real.images[:16])
    found = torch.cat([p.detach().flatten() for p in trainer.parameters])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_methods_are_asked_again_at_the_perturbed_parameters() -> None:
    term = Term()
    trainer = ExpertTrainer(config(rho=0.05), data(), hook_of(data(), term), expert_generator(0, 0))
    trainer.run_epoch()
    assert [len(i) for i in term.seen] == [16, 16, 16, 12] and same(term.again, term.seen)


def test_batch_norm_keeps_its_batch_whole_and_counts_it_once() -> None:
    real = data()
    trainer = ExpertTrainer(config(norm="batch", rho=0.05), real, plain(real), expert_generator(0, 0))
    other = ExpertTrainer(config(norm="batch"), real, plain(real), expert_generator(0, 0))
    assert trainer.chunk == 16
    for t in (trainer, other):
        t.step(torch.arange(16), real.images[:16])
    assert same(list(trainer.network.buffers()), list(other.network.buffers())) is False  # counters see both passes
    for a, b in zip(trainer.network.named_buffers(), other.network.named_buffers(), strict=True):
        if "running" in a[0]:
            assert torch.equal(a[1], b[1])


# -- settings ----------------------------------------------------------------------------------------


def test_rounds_of_pilots_need_one() -> None:
    for changes, named in (({"rounds": "pilots", "pilots": 0}, "pilots"), ({"rounds": "none"}, "rounds")):
        with pytest.raises(ConfigError, match=named):
            config(**changes)
    assert config(rounds="all", pilots=0).pilots == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts", 0), ("epochs", 0), ("width", 0), ("depth", -1), ("batch_train", 0), ("lr", 0.0),
        ("momentum", -0.1), ("weight_decay", -1e-4), ("rho", -0.1), ("alpha", -0.1), ("pilots", -1),
        ("pilot_epochs", -1), ("experts_per_file", 0), ("lr", float("inf")), ("rho", float("nan")), ("half", 1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} .*{value}"):
        config(**{name: value})
