"""The rival arms on blobs whose mislabelled samples are easy to see."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.registry import load_method, make_callbacks
from tad_plugin.core.scorer import ScorerConfig, train_logits
from tad_plugin.data.real import RealData
from tad_plugin.data.splits import dealt_evenly
from tad_plugin.errors import ConfigError, MissingExtraError, NotEnoughSamplesError
from tests.problems import blobs, flip

SCORER = {"width": 8, "epochs": 8, "batch_size": 16, "lr": 0.05}
TRAINED = ("loss-prune", "el2n", "clean-then-distil")


def noisy(rate: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    images, true = blobs(40)
    return images, true, flip(true, 3, rate, seed=2)


def attached(method: str, settings: dict[str, Any] | None = None, **more: Any) -> Hook:
    images, true, labels = noisy()
    config = {method: {**({"scorer": SCORER} if method in TRAINED else {}), **(settings or {})}}
    given: dict[str, Any] = {"labels": labels, "data": images, "true_labels": true, "ipc": 2, "noise_rate": 0.3, **more}
    return attach(method, config=config if config[method] else None, **given)


def test_the_oracle_trusts_exactly_the_right_labels() -> None:
    _, true, labels = noisy()
    state = attached("oracle").state
    assert torch.equal(state.trusted, labels == true) and torch.equal(state.trust, (labels == true).float())
    assert torch.equal(state.target, labels)


def test_a_random_part_is_of_each_class_and_of_the_seed(global_rng_untouched: None) -> None:
    _, _, labels = noisy()
    states = [attached("random", {"keep": 0.25}, seed=s).state for s in (0, 0, 1)]
    for c in range(3):
        assert int(states[0].trusted[labels == c].sum()) == round(0.25 * int((labels == c).sum()))
    assert torch.equal(states[0].trusted, states[1].trusted) and not torch.equal(states[0].trusted, states[2].trusted)


@pytest.mark.parametrize("method", TRAINED)
def test_mislabelled_samples_are_found_where_it_is_easy(method: str, global_rng_untouched: None) -> None:
    _, true, labels = noisy()
    records: list[dict[str, Any]] = []
    state = attached(method, log=records.append).state
    kept = state.trusted
    assert float((labels == true)[kept].float().mean()) > 0.95
    assert float(kept[labels == true].float().mean()) > 0.8
    assert torch.equal(state.target, labels) and not bool(state.weight[~kept].any())
    assert records[0]["event"] == "division" and records[0]["trusted"] == int(kept.sum())


@pytest.mark.parametrize("method", ["loss-prune", "el2n"])
def test_the_share_is_the_users_or_that_of_the_noise(method: str) -> None:
    _, _, labels = noisy()
    sizes = torch.bincount(labels)
    quick = {"scorer": {**SCORER, "epochs": 3}}
    for given, more, share in (
        ({"keep": 0.5}, {}, 0.5),
        ({}, {}, 0.7),
        ({}, {"noise_rate": 0.6}, 0.4),
        ({}, {"noise_rate": None}, 0.7),
        ({"keep": 0.01}, {"ipc": 7}, None),
    ):
        kept = attached(method, {**quick, **given}, **more).state.trusted
        expected = [7, 7, 7] if share is None else [round(share * int(n)) for n in sizes]
        assert torch.bincount(labels[kept]).tolist() == expected


def test_loss_pruning_keeps_the_lowest_losses_of_its_network() -> None:
    images, _, labels = noisy()
    callback = load_method("loss-prune").from_settings({"scorer": SCORER, "history": 1, "keep": 0.5}, seed=11)
    hook = Hook(attach("none", labels=labels).state, RealData(images, labels, 3), [callback]).start()
    logits = train_logits(RealData(images, labels, 3), ScorerConfig(**SCORER), seed=11)[-1]
    losses = [-float(z.log_softmax(0)[y]) for z, y in zip(logits, labels, strict=True)]
    for c in range(3):
        members = sorted((i for i in range(120) if labels[i] == c), key=lambda i: losses[i])
        assert {i for i in members if hook.state.trusted[i]} == set(members[: round(0.5 * len(members))])


def test_el2n_is_the_mean_norm_of_the_error_over_networks() -> None:
    images, _, labels = noisy()
    data = RealData(images, labels, 3)
    for hardest in (False, True):
        settings = {"scorer": SCORER, "epochs": SCORER["epochs"], "networks": 2, "keep": 0.5, "hardest": hardest}
        callback = load_method("el2n").from_settings(settings, seed=11)
        hook = Hook(attach("none", labels=labels).state, data, [callback]).start()
        score = [0.0] * 120
        for k in range(2):
            for i, z in enumerate(train_logits(data, ScorerConfig(**SCORER), seed=11 + 101 * k)[-1]):
                error = z.softmax(0)
                error[labels[i]] -= 1
                score[i] += float(error.square().sum().sqrt()) / 2
        for c in range(3):
            members = sorted((i for i in range(120) if labels[i] == c), key=lambda i: score[i], reverse=hardest)
            assert {i for i in members if hook.state.trusted[i]} == set(members[: round(0.5 * len(members))])


def test_folds_are_stratified_and_each_sample_is_in_one() -> None:
    _, _, labels = noisy()
    fold = dealt_evenly(labels, 3, 4, torch.Generator().manual_seed(0))
    for c in range(3):
        counts = torch.bincount(fold[labels == c], minlength=4)
        assert int(counts.max() - counts.min()) <= 1
    other = dealt_evenly(labels, 3, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(fold, other)


def test_a_class_that_is_smaller_than_the_folds_is_named() -> None:
    images, _ = blobs(1)
    with pytest.raises(NotEnoughSamplesError, match="4 samples .* got 1"):
        attach("clean-then-distil", labels=torch.tensor([0, 1, 2]), data=images)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return original(name, *args, **more)

    for name in [m for m in sys.modules if m.split(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="cleanlab.*reproduce"):
        attached("clean-then-distil")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("loss-prune", {"keep": 1.5}, "loss-prune.keep .*1.5"),
        ("loss-prune", {"history": 0}, "loss-prune.history .* 0"),
        ("loss-prune", {"history": 11}, "history .*10.* 11"),
        ("loss-prune", {"scorer": {"epochs": 2}}, "history .*2.* 3"),
        ("loss-prune", {"scorer": {"epoch": 2}}, "scorer.*epoch"),
        ("loss-prune", {"scorer": 2}, "scorer.* 2"),
        ("el2n", {"networks": 0}, "el2n.networks .* 0"),
        ("el2n", {"epochs": 0}, "el2n.epochs .* 0"),
        ("el2n", {"keep": -1.0}, "el2n.keep .*-1.0"),
        ("clean-then-distil", {"folds": 1}, "clean-then-distil.folds .* 1"),
        ("clean-then-distil", {"filter_by": "luck"}, "filter_by .*prune_by_noise_rate.*luck"),
        ("random", {"keep": 0.0}, "random.keep .*0.0"),
        ("random", {"keep": -0.1}, "random.keep .*-0.1"),
        ("random", {"keep": 1.1}, "random.keep .*1.1"),
        ("random", {"keep": float("nan")}, "random.keep .*nan"),
    ],
)
def test_bad_settings_are_named(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_callbacks(method, {method: settings})


def test_the_number_of_el2n_epochs_is_its_own() -> None:
    """The score is an early one, whatever the settings of the networks say."""
    images, _, labels = noisy()
    found = []
    for epochs in (2, 9):
        settings = {"scorer": {**SCORER, "epochs": epochs}, "epochs": 3, "networks": 1, "keep": 0.5}
        callback = load_method("el2n").from_settings(settings, seed=11)
        hook = Hook(attach("none", labels=labels).state, RealData(images, labels, 3), [callback]).start()
        found.append(hook.state.trusted)
    assert torch.equal(*found)
