from __future__ import annotations

import pytest
import torch
from torch import nn

from tad_plugin.errors import InvalidInputError, NoHeldOutError
from tad_plugin.iwd.scoring import embedding_of, held_out_folds, score_on_network, target_gradient
from tad_plugin.iwd.targets import Fold, matching_target, validation_target
from tests.iwd.problems import convnet, digits_problem

LABELS = torch.arange(10).repeat(30)
EVERY = torch.ones(300, dtype=torch.bool)


@pytest.mark.parametrize(("held_out", "expected"), [(0.1, 3), (0.5, 15), (1, 1), (4, 4), (100, 15), (0.01, 1)])
def test_size_of_the_held_out_part(held_out: float, expected: int, generator: torch.Generator) -> None:
    for fold in held_out_folds(LABELS, 10, held_out, EVERY, generator=generator):
        assert torch.equal(torch.bincount(LABELS[fold.held_out], minlength=10), torch.full((10,), expected))
        both = torch.cat([fold.held_out, fold.scored])
        assert torch.equal(both.sort().values, torch.arange(300))


def test_folds_are_disjoint_and_only_usable_samples_take_part(generator: torch.Generator) -> None:
    usable = torch.rand(300, generator=generator) < 0.5
    vouched = torch.rand(300, generator=generator) < 0.3
    folds = held_out_folds(LABELS, 10, 0.1, usable, vouched=vouched, generator=generator)
    assert len(folds) >= 2
    together = torch.cat([fold.held_out for fold in folds])
    assert len(together.unique()) == len(together)
    for fold in folds:
        assert bool((usable & vouched)[fold.held_out].all()) and bool(usable[fold.scored].all())
        assert len(fold.held_out) + len(fold.scored) == int(usable.sum())


def test_too_few_to_hold_out(generator: torch.Generator) -> None:
    for usable in (torch.zeros(300, dtype=torch.bool), torch.arange(300) < 10):
        with pytest.raises(NoHeldOutError, match="two samples"):
            held_out_folds(LABELS, 10, 0.1, usable, generator=generator)
    for bad in (0.0, 0.6, 1.5, -1):
        with pytest.raises(InvalidInputError, match="held_out"):
            held_out_folds(LABELS, 10, bad, EVERY, generator=generator)
    with pytest.raises(InvalidInputError, match="candidates"):
        held_out_folds(LABELS, 10, 0.1, EVERY, vouched=EVERY[:5], generator=generator)


def test_gradient_is_the_mean_over_networks() -> None:
    p = digits_problem()
    networks: list[nn.Module] = [convnet(seed=s) for s in (0, 1)]
    leaf = p.synthetic.clone().requires_grad_()
    args = (leaf, p.synthetic_labels, p.held_out, p.held_out_labels)
    value = torch.stack([validation_target(n, *args, alpha=0.1, steps=2) for n in networks]).mean()
    (expected,) = torch.autograd.grad(value, leaf)
    found = target_gradient(
        "validation", networks, p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, 10, alpha=0.1, steps=2
    )
    assert found[0] == pytest.approx(float(value.detach()))
    assert torch.allclose(found[1], expected, rtol=1e-9)
    value = matching_target(networks, *args, 10)
    (expected,) = torch.autograd.grad(value, leaf)
    soft = torch.nn.functional.one_hot(p.synthetic_labels, 10).double()
    found = target_gradient("matching", networks, p.synthetic, soft, p.held_out, p.held_out_labels, 10)
    assert torch.allclose(found[1], expected, rtol=1e-9)


def test_unknown_target() -> None:
    p = digits_problem()
    with pytest.raises(InvalidInputError, match="validation"):
        target_gradient("best", [convnet()], p.synthetic, p.synthetic_labels, p.held_out, p.held_out_labels, 10)


def test_scores_do_not_depend_on_chunks_or_on_embed() -> None:
    p = digits_problem()
    network = convnet()
    x, y = torch.cat([p.real, p.held_out]), torch.cat([p.real_labels, p.held_out_labels])
    fold = Fold(torch.arange(64, len(x)), torch.arange(64))
    whole = score_on_network(network, x, y, fold, p.synthetic, p.synthetic_labels, 10)
    parts = score_on_network(network, x, y, fold, p.synthetic, p.synthetic_labels, 10, chunk_size=7)
    assert torch.allclose(whole.influence, parts.influence, rtol=1e-9)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(images)
            return logits

    assert torch.allclose(embedding_of(Bare())(x), network.embed(x))  # type: ignore[operator]
    bare = score_on_network(Bare(), x, y, fold, p.synthetic, p.synthetic_labels, 10)
    assert torch.allclose(whole.influence, bare.influence, rtol=1e-9)
