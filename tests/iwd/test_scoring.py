from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tad_plugin.errors import InvalidInputError, InvalidLabelsError, NoHeldOutError
from tad_plugin.iwd.scoring import Fold, cross_fit, embedding_of, held_out_folds, score_on_network
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
        with pytest.raises(NoHeldOutError, match="at most [01]"):
            held_out_folds(LABELS, 10, 0.1, usable, generator=generator)
    for bad in (0.0, 0.6, 1.5, -1):
        with pytest.raises(InvalidInputError, match="held_out"):
            held_out_folds(LABELS, 10, bad, EVERY, generator=generator)
    with pytest.raises(InvalidInputError, match=r"\[5\]"):
        held_out_folds(LABELS, 10, 0.1, EVERY, vouched=EVERY[:5], generator=generator)


@pytest.mark.parametrize("folds", [2, 5])
def test_cross_fit_never_scores_by_a_target_that_contains_the_sample(
    folds: int, generator: torch.Generator, global_rng_untouched: None
) -> None:
    labels = torch.randint(0, 7, (211,), generator=torch.Generator().manual_seed(1))
    found = cross_fit(labels, 7, folds, generator=generator)
    times_held_out = torch.zeros(211, dtype=torch.int64)
    times_scored = torch.zeros(211, dtype=torch.int64)
    for fold in found:
        assert not set(fold.held_out.tolist()) & set(fold.scored.tolist())
        assert len(fold.held_out) + len(fold.scored) == 211
        times_held_out[fold.held_out] += 1
        times_scored[fold.scored] += 1
        counts = torch.bincount(labels[fold.held_out], minlength=7)
        assert bool(((counts - torch.bincount(labels, minlength=7) / folds).abs() < 1).all())  # stratified
    assert bool((times_held_out == 1).all())
    assert bool((times_scored == folds - 1).all())
    again = cross_fit(labels, 7, folds, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a.held_out, b.held_out) for a, b in zip(found, again, strict=True))


def test_cross_fit_with_mask_and_limit(generator: torch.Generator) -> None:
    labels = torch.arange(3).repeat(40)
    mask = torch.arange(120) % 4 != 0
    for fold in cross_fit(labels, 3, 3, generator=generator, mask=mask, per_class=2):
        assert bool(mask[fold.held_out].all())
        assert torch.bincount(labels[fold.held_out], minlength=3).tolist() == [2, 2, 2]
        assert len(fold.scored) == 120 - 6


def test_cross_fit_errors(generator: torch.Generator) -> None:
    labels = torch.arange(3).repeat(4)
    with pytest.raises(NoHeldOutError, match="0 candidates"):
        cross_fit(labels, 3, 3, generator=generator, mask=torch.zeros(12, dtype=torch.bool))
    with pytest.raises(NoHeldOutError):
        cross_fit(labels, 3, 13, generator=generator)
    with pytest.raises(InvalidInputError, match="folds 1"):
        cross_fit(labels, 3, 1, generator=generator)
    with pytest.raises(InvalidInputError, match=r"\[3\]"):
        cross_fit(labels, 3, 2, generator=generator, mask=torch.ones(3, dtype=torch.bool))


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


def test_wrong_arguments() -> None:
    p, network = digits_problem(), convnet()
    fold, nothing = Fold(torch.arange(10), torch.arange(10, 64)), torch.arange(0)

    def score(fold: Fold = fold, synthetic_labels: torch.Tensor = p.synthetic_labels, k: int = 10, **more: Any) -> None:
        score_on_network(network, p.real, p.real_labels, fold, p.synthetic, synthetic_labels, k, **more)

    for name, value in {"steps": 0, "alpha": 0.0, "chunk_size": 0}.items():
        with pytest.raises(InvalidInputError, match=f"{name} {value}"):
            score(**{name: value})
    with pytest.raises(InvalidInputError, match="best"):
        score(target="best")
    for bad in (torch.ones(3), -torch.ones(64)):
        with pytest.raises(InvalidInputError, match="weights"):
            score(weights=bad)
    with pytest.raises(InvalidLabelsError):
        score(k=9)
    with pytest.raises(InvalidLabelsError, match="synthetic_labels"):
        score(synthetic_labels=p.synthetic_labels + 1)
    for empty in (Fold(nothing, fold.scored), Fold(fold.held_out, nothing)):
        with pytest.raises(NoHeldOutError):
            score(empty)
