"""The scorer: what it trains, what it reads, and how it resumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.scorer import Scorer, ScorerConfig, features_and_logits, score_all, weighted_cross_entropy
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, InvalidInputError, InvalidLabelsError, NonFiniteError
from tad_plugin.nn.networks import make_network
from tests.problems import blobs

SMALL = ScorerConfig(width=4, epochs=3, batch_size=16)


def real() -> tuple[RealData, SampleState]:
    images, labels = blobs()
    return RealData(images, labels, 3), SampleState(labels, 3)


class Foreign(nn.Module):
    """Two branches; the classifier is the last linear layer, and gets [B,8,1,1] flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x)).flatten(1))


def foreign() -> Foreign:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Foreign()


# reading


def test_features_are_the_input_of_the_classifier() -> None:
    images, _ = blobs()
    generator = torch.Generator().manual_seed(0)
    own = make_network("convnet", in_channels=1, num_classes=3, image_size=8, width=4, depth=2, generator=generator)
    features, logits = features_and_logits(own, images)
    assert torch.equal(features, own.embed(images)) and torch.equal(logits, own(images))  # type: ignore[operator]
    theirs = foreign().eval()
    features, logits = features_and_logits(theirs, images)
    assert torch.equal(features, theirs.body(images).flatten(1)) and torch.equal(theirs.head(features), logits)
    assert not theirs.head._forward_pre_hooks  # nothing is left behind
    with pytest.raises(InvalidInputError, match="Conv2d"):
        features_and_logits(nn.Conv2d(1, 3, 8), images)


def test_all_samples_are_scored_in_eval_mode_whatever_the_chunk_and_the_mode_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, _ = real()
    network = foreign().train()
    whole = score_all(network, data)
    monkeypatch.setattr("tad_plugin.nn.passes.chunk_size", lambda device: 7)
    parts = score_all(network, data)
    assert network.training and not whole.logits.requires_grad
    torch.testing.assert_close(whole.logits, parts.logits)
    network.eval()
    torch.testing.assert_close(whole.logits, network(data.images).detach())
    score_all(network, data)
    assert not network.training and whole.features.shape == (60, 8)


def test_weighted_cross_entropy_is_that_of_a_for_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(9, 4, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    weights = torch.rand(9, generator=generator)
    rows = [-float(z.log_softmax(0)[y]) for z, y in zip(logits, targets, strict=True)]
    expected = sum(float(w) * r for w, r in zip(weights, rows, strict=True)) / float(weights.sum())
    assert float(weighted_cross_entropy(logits, targets, weights)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, torch.ones(9)), F.cross_entropy(logits, targets))
    logits.requires_grad_()
    nothing = weighted_cross_entropy(logits, targets, torch.zeros(9))
    nothing.backward()
    assert float(nothing.detach()) == 0 and logits.grad is not None and not bool(logits.grad.any())


# training


def test_the_scorer_learns_and_touches_no_global_generator(global_rng_untouched: None) -> None:
    data, state = real()
    scorer = Scorer(data, ScorerConfig(width=8, epochs=8, batch_size=16, lr=0.05), seed=1)
    losses = [scorer.run_epoch(state, CallbackList()) for _ in range(8)]
    found = score_all(scorer.network, data)
    assert losses[-1] < 0.5 * losses[0]
    assert float((found.logits.argmax(1) == data.labels).float().mean()) > 0.95


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    data, state = real()
    found = []
    for seed in (1, 1, 2):
        scorer = Scorer(data, SMALL, seed=seed)
        scorer.run_epoch(state, CallbackList())
        found.append(score_all(scorer.network, data).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_untrusted_samples_do_not_train() -> None:
    """Their labels may be anything, and the network's bits stay the same."""
    images, labels = blobs()
    outside = torch.arange(60) < 20
    found = []
    for observed in (labels, torch.where(outside, (labels + 1) % 3, labels)):
        state = SampleState(observed, 3)
        state.update(trusted=~outside)
        scorer = Scorer(RealData(images, observed, 3), SMALL, seed=1)
        scorer.run_epoch(state, CallbackList())
        found.append(score_all(scorer.network, scorer.data).logits)
    assert torch.equal(found[0], found[1])


def test_training_follows_the_targets_not_the_observed_labels() -> None:
    images, labels = blobs()
    state = SampleState((labels + 1) % 3, 3)
    state.update(target=labels)
    scorer = Scorer(RealData(images, state.observed, 3), ScorerConfig(width=8, epochs=8, batch_size=16, lr=0.05))
    for _ in range(8):
        scorer.run_epoch(state, CallbackList())
    assert float((score_all(scorer.network, scorer.data).logits.argmax(1) == labels).float().mean()) > 0.95


def test_events_see_every_sample_once_per_epoch_and_may_change_the_loss() -> None:
    class Watcher(Callback):
        def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
            seen.extend(indices.tolist())
            assert logits.requires_grad and logits.shape == (len(indices), 3)
            return loss * 0

        def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
            epochs.append(score_all(network, data).logits)

    seen: list[int] = []
    epochs: list[Tensor] = []
    data, state = real()
    scorer = Scorer(data, ScorerConfig(width=4, epochs=3, batch_size=16, weight_decay=0.0))
    for _ in range(2):
        scorer.run_epoch(state, CallbackList([Watcher()]))
        assert sorted(seen) == list(range(60))
        seen.clear()
    assert torch.equal(epochs[0], epochs[1])  # a loss of nothing moves nothing


def test_a_scorer_resumes_with_the_same_bits() -> None:
    data, state = real()
    whole, half = Scorer(data, SMALL, seed=1), Scorer(data, SMALL, seed=1)
    for _ in range(2):
        whole.run_epoch(state, CallbackList())
    half.run_epoch(state, CallbackList())
    again = Scorer(data, SMALL, seed=9)
    again.load_state_dict(half.state_dict())
    again.run_epoch(state, CallbackList())
    assert again.epoch == 2
    for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8), (3, 16, 16), (1, 8, 16)])
def test_flat_small_and_large_images_are_served(shape: tuple[int, ...]) -> None:
    images = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    scorer = Scorer(RealData(images, labels, 3), SMALL)
    scorer.run_epoch(SampleState(labels, 3), CallbackList())
    assert score_all(scorer.network, scorer.data).logits.shape == (12, 3)


# bad input


def test_images_that_are_not_numbers_stop_the_scorer() -> None:
    data, state = real()
    data.images[7] = float("nan")
    with pytest.raises(NonFiniteError, match="nan"):
        Scorer(data, SMALL).run_epoch(state, CallbackList())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"images": torch.zeros(60, 1, 8, 8, dtype=torch.uint8)}, InvalidInputError, "uint8"),
        ({"images": torch.zeros(60)}, InvalidInputError, r"\[60\]"),
        ({"labels": torch.arange(60)}, InvalidLabelsError, "59"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, InvalidLabelsError, "60.* 5"),
        ({"true_labels": torch.full((60,), 3)}, InvalidLabelsError, "true_labels"),
    ],
)
def test_bad_data_are_named(given: dict[str, Any], error: type, message: str) -> None:
    images, labels = blobs()
    with pytest.raises(error, match=message):
        RealData(**{"images": images, "labels": labels, "num_classes": 3, **given})


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0}, {"batch_size": -1}, {"width": 0}, {"depth": -1}, {"lr": 0.0}, {"momentum": 1.0},
        {"weight_decay": -1e-4}, {"refresh_every": -1}, {"epochs": "ten"}, {"lr": float("nan")},
    ],
)  # fmt: skip
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"scorer.{next(iter(given))}"):
        ScorerConfig(**given)


def test_a_subset_keeps_what_is_known() -> None:
    images, labels = blobs()
    data = RealData(images, labels, 3, labels.flip(0), "digits", 0.4, 5)
    part = data.subset(torch.tensor([4, 2]))
    assert torch.equal(part.images[:], images[[4, 2]]) and part.labels.tolist() == labels[[4, 2]].tolist()
    assert part.true_labels is not None and part.true_labels.tolist() == labels.flip(0)[[4, 2]].tolist()
    assert (part.dataset, part.noise_rate, part.ipc, len(part)) == ("digits", 0.4, 5, 2)
    assert [i.tolist() for i, _ in data.batches(25)] == [list(range(25)), list(range(25, 50)), list(range(50, 60))]
