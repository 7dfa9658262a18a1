"""The TAD callback: rounds, spaces, recall and return; and that it finds the mislabelled where that is easy."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin import attach
from tad_plugin.core.diagnostics import split_quality
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.scorer import score_all
from tad_plugin.core.state import SampleState
from tad_plugin.data.labels import check_labels
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, NonFiniteError
from tad_plugin.tad import calibrate_threshold, divide, fit_class_mixture, geometry, reliability
from tad_plugin.tad.consistency import ramp_up
from tad_plugin.tad.geometry import check_features
from tad_plugin.tad.method import TAD, TADConfig
from tad_plugin.tad.mixture import check_losses
from tests.problems import blobs, flip

SCORER = {"width": 8, "epochs": 8, "batch_size": 32, "lr": 0.05}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


def on_blobs(
    rate: float = 0.3, settings: dict[str, Any] | None = None, num_classes: int = 4, **more: Any
) -> tuple[Hook, Tensor, list[dict[str, Any]]]:
    """TAD attached to separable blobs with symmetric noise; the true labels; what was logged."""
    images, true = blobs(60, num_classes, spread=0.6, seed=1)
    records: list[dict[str, Any]] = []
    hook = attach(
        "tad", labels=flip(true, num_classes, rate, seed=2), data=images, num_classes=num_classes, true_labels=true,
        config={"tad": settings or {}, "scorer": SCORER}, log=records.append, **more,
    )  # fmt: skip
    return hook, true, records


class Fixed:
    """TAD on a network that does not change: images are their own features, [N,6], three classes of fifty."""

    def __init__(self, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.true = torch.arange(150) % 3
        centres = torch.eye(3, 6) * 4
        images = centres[self.true] + 0.4 * torch.randn(150, 6, generator=generator)
        self.observed = flip(self.true, 3, 0.2, seed=4)
        self.state = SampleState(self.observed, 3)
        self.data = RealData(images, self.observed, 3)
        self.network = nn.Linear(6, 3)
        with torch.no_grad():
            # The last three features are noise to the anchors, and evidence to the network.
            self.network.weight.copy_(torch.cat([torch.eye(3) * 2, torch.eye(3) * 2.5], 1))
            self.network.bias.zero_()
        self.records: list[dict[str, Any]] = []
        self.tad = TAD(TADConfig(**{"warmup": 0, "history": 1, **settings}), seed=3)
        self.tad.sink = self.records.append
        self.tad.on_start(state=self.state, data=self.data)

    def round(self) -> dict[str, Any]:
        self.tad.on_scorer_epoch(state=self.state, network=self.network, data=self.data)
        return self.records[-1]


@pytest.fixture(autouse=True)
def keep_global_rng() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


# what it is for


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_on_separable_classes_it_finds_the_mislabelled_and_relabels_right(rate: float) -> None:
    hook, true, _ = on_blobs(rate)
    s = hook.state
    found = split_quality(s.observed, s.target, s.trusted, s.trust, true)
    assert found["precision"] > 0.95 and found["recall"] > 0.9 and found["auc"] > 0.95
    assert found["relabelled"] > 0.25 * float((s.observed != true).sum()) and found["relabel_accuracy"] > 0.95


def test_on_right_labels_it_changes_little() -> None:
    hook, true, _ = on_blobs(0.0)
    s = hook.state
    assert float(s.trusted.float().mean()) > 0.9 and float((s.target == true).float().mean()) > 0.98


def test_it_touches_no_global_generator(global_rng_untouched: None) -> None:
    on_blobs()


# rounds


def test_every_round_is_logged_and_the_spaces_add_up() -> None:
    hook, true, records = on_blobs(settings={"warmup": 2})
    rounds = [r for r in records if r["event"] == "round"]
    assert [r["round"] for r in rounds] == list(range(1, 9)) and [r["warmup"] for r in rounds] == [True] * 2 + [
        False
    ] * 6
    assert all(r["trusted"] + r["untrusted"] == len(true) for r in rounds)
    assert all((r["trusted"], r["recalled"], r["returned"]) == (len(true), 0, 0) for r in rounds[:2])
    last, s = rounds[-1], hook.state
    assert last["trusted"] == int(s.trusted.sum()) and last["relabelled"] == int((s.target != s.observed).sum())
    assert len(last["kept_share"]) == len(last["separation"]) == 4
    splits = [r for r in records if r["event"] == "split"]
    assert len(splits) == 8 and splits[-1]["precision"] > 0.95


def test_the_observed_labels_never_change_and_only_recalled_samples_have_other_targets() -> None:
    hook, true, _ = on_blobs()
    s = hook.state
    assert torch.equal(s.observed, flip(true, 4, 0.3, seed=2))
    moved = s.target != s.observed
    assert bool(moved.any()) and bool(((s["recall_score"] > 0) & s.trusted)[moved].all())
    assert bool((s.target == s.observed)[~s.trusted].all())


def test_the_loss_is_the_mean_over_the_last_rounds_against_the_observed_labels() -> None:
    fixed = Fixed(warmup=9, history=2)
    losses = []
    for scale in (1.0, 2.0, 0.5):
        with torch.no_grad():
            fixed.network.weight.copy_(torch.eye(3, 6) * scale)
        assert fixed.round()["warmup"]
        logits = (fixed.data.images @ torch.eye(3, 6).T * scale).detach()
        losses.append(F.cross_entropy(logits, fixed.observed, reduction="none"))
    torch.testing.assert_close(fixed.state["tad_loss"], (losses[1] + losses[2]) / 2)
    assert bool(fixed.state.trusted.all()) and torch.equal(fixed.state.weight, torch.ones(150))


# recall and return


def test_a_recalled_sample_that_fails_returns_to_its_observed_label_and_the_others_stay() -> None:
    fixed = Fixed()
    assert fixed.round()["recalled"] > 0
    state = fixed.state
    moved = ((state["recall_score"] > 0) & (state.target != fixed.observed)).nonzero().flatten()
    assert len(moved) > 5 and torch.equal(state.target[moved], fixed.true[moved])
    before = state.target.clone()
    # nothing changed: they stand
    assert fixed.round()["returned"] == 0 and torch.equal(state.target[moved], before[moved])
    # the network now sees the third class in this one, and the anchors do not agree
    fails = int(moved[0])
    target = int(before[fails])
    third = 3 - target - int(fixed.observed[fails])
    fixed.data.images[fails] = 4 * torch.eye(6)[3 + third] + 1.5 * torch.eye(6)[target]
    found = fixed.round()
    assert found["returned"] == 1 and found["trusted"] + found["untrusted"] == 150
    assert state.target[fails] == fixed.observed[fails] and not state.trusted[fails]
    assert state["recall_score"][fails] == 0
    assert torch.equal(state.target[moved[1:]], before[moved[1:]]) and bool(state.trusted[moved[1:]].all())


def test_without_recall_no_label_changes() -> None:
    fixed = Fixed(recall=False)
    assert fixed.round()["recalled"] == 0
    assert torch.equal(fixed.state.target, fixed.observed) and 0 < int((~fixed.state.trusted).sum()) < 60


def test_a_class_keeps_as_many_trusted_samples_as_the_synthetic_set_needs() -> None:
    for more, settings, least in (({"ipc": 50}, {}, 50), ({"ipc": 1}, {"min_per_class": 48}, 48)):
        hook, _, _ = on_blobs(0.4, {"recall": False, **settings}, **more)
        trusted = torch.bincount(hook.state.observed[hook.state.trusted], minlength=4)
        sizes = torch.bincount(hook.state.observed, minlength=4)
        assert bool((trusted >= torch.minimum(sizes, torch.tensor(least))).all())
        assert hook.state.summary()["smallest_pool"] >= min(least, int(sizes.min()))


def test_a_class_of_one_sample_keeps_it() -> None:
    images, true = blobs(30, 3, spread=0.6)
    keep = (true != 2) | (torch.arange(90) == 2)
    hook = attach("tad", labels=true[keep], data=images[keep], num_classes=3, config={"scorer": SCORER})
    assert len(hook.state.pool(2)) >= 1


# weights


@pytest.mark.parametrize("weighting", ["hard", "soft"])
def test_weights_have_mean_one_in_each_pool(weighting: str) -> None:
    fixed = Fixed(weighting=weighting)
    fixed.round()
    s = fixed.state
    for c in range(3):
        inside = s.weight[s.trusted & (s.target == c)]
        assert float(inside.mean()) == pytest.approx(1, rel=1e-5) and float(inside.min()) > 0
        if weighting == "hard":
            torch.testing.assert_close(inside, torch.ones_like(inside))
    assert bool(((s.trust >= 0) & (s.trust <= 1)).all())
    assert (
        float(s.trust[fixed.observed == fixed.true].mean())
        > 0.9
        > 0.1
        > float(s.trust[fixed.observed != fixed.true].mean())
    )


# what a round costs


def test_a_round_checks_no_labels_scans_the_features_once_and_computes_the_axes_once() -> None:
    """Arguments are checked where a user passes them. The callback's own are right by construction."""
    fixed = Fixed(max_dim=3)  # features are 6 wide, so that they are projected
    fixed.round()
    watched = {f.__code__: f.__name__ for f in (check_labels, check_losses, check_features, geometry._principal_axes)}
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code not in watched or frame.f_back is None:
            return
        # SampleState checks its own arguments; that is not TAD's.
        if frame.f_back.f_globals["__name__"].startswith("tad_plugin.tad"):
            calls[watched[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        fixed.round()
    finally:
        sys.setprofile(None)
    assert int((fixed.state.target != fixed.observed).sum()) > 5  # the round relabels
    assert calls == {"check_features": 1, "_principal_axes": 1}


@pytest.mark.parametrize("lone", [False, True])
def test_a_round_gives_what_the_public_functions_give(lone: bool) -> None:
    """One class may have a single trusted sample: it has no anchor, but it is in the calibration's projection."""
    fixed = Fixed(max_dim=3, weighting="hard")
    observed, k = fixed.observed, 3
    if lone:
        observed = torch.where(fixed.observed == 2, 0, fixed.observed)
        observed[2] = 2
        fixed.state, fixed.observed = SampleState(observed, 3), observed
        fixed.data = RealData(fixed.data.images, observed, 3)
        fixed.tad.on_start(state=fixed.state, data=fixed.data)
    found = fixed.round()
    scores = score_all(fixed.network, fixed.data)
    losses = F.cross_entropy(scores.logits, observed, reduction="none")
    trusted = divide(losses, observed, fit_class_mixture(losses, observed, k), k).trusted
    assert not lone or int(trusted[observed == 2].sum()) == 1
    calibration = calibrate_threshold(
        scores.features, observed, trusted, scores.logits, k, generator=torch.Generator().manual_seed(3), max_dim=3
    )
    proposed = reliability(
        scores.features, observed, trusted, scores.logits, k, temperature=calibration.temperature, max_dim=3
    )
    limit = torch.where(proposed.proposal == observed, calibration.threshold_agree, calibration.threshold)
    recalled = (proposed.proposal >= 0) & (proposed.score >= limit)
    assert found["rho"] == calibration.threshold and found["recalled"] == int(recalled.sum())
    assert torch.equal(fixed.state.target, torch.where(recalled, proposed.proposal, observed))
    assert torch.equal(fixed.state.trusted, trusted | recalled)
    expected = torch.where(recalled, proposed.score.clamp_min(0.05), torch.zeros(150))
    assert torch.equal(fixed.state["recall_score"], expected)


# the consistency term


def test_the_consistency_term_is_the_mean_square_distance_to_earlier_predictions() -> None:
    fixed = Fixed(warmup=9, consistency=2.0, consistency_beta=0.6, consistency_rounds=4)
    generator, indices = torch.Generator().manual_seed(5), torch.tensor([3, 1, 8])
    zero = torch.zeros(())
    first, second, third = (torch.randn(3, 3, generator=generator) for _ in range(3))
    given: dict[str, Any] = {"state": fixed.state, "indices": indices}
    assert float(fixed.tad.on_scorer_batch(**given, logits=first, loss=zero + 1)) == 1.0  # nothing to compare with
    fixed.round()
    found = fixed.tad.on_scorer_batch(**given, logits=second, loss=zero)
    p, q = first.softmax(1), second.softmax(1)
    weight = ramp_up(1, 4, 2.0)
    assert weight > 0 and float(found) == pytest.approx(weight * float((q - p).square().sum(1).mean()), rel=1e-2)
    fixed.round()
    found = fixed.tad.on_scorer_batch(**given, logits=third.requires_grad_(), loss=zero)
    mean = (0.6 * 0.4 * p + 0.4 * q) / (1 - 0.6**2)  # bias-corrected
    expected = ramp_up(2, 4, 2.0) * float((third.detach().softmax(1) - mean).square().sum(1).mean())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-2)  # half precision
    found.backward()
    assert third.grad is not None and bool(third.grad.any())


def test_without_the_term_the_loss_is_the_same_object_and_nothing_is_stored() -> None:
    fixed, loss = Fixed(consistency=0.0), torch.ones(())
    logits = torch.zeros(1, 3)
    assert fixed.tad.on_scorer_batch(state=fixed.state, indices=torch.tensor([0]), logits=logits, loss=loss) is loss
    assert fixed.tad.ensemble is None and fixed.tad.state_dict()["ensemble"] is None


# bad input


def test_losses_that_are_not_numbers_are_named() -> None:
    fixed = Fixed()
    fixed.data.images[7] = float("nan")
    fixed.data.images[9] = float("nan")
    with pytest.raises(NonFiniteError, match="2 .*sample 7"):
        fixed.round()


class OddHead(nn.Module):
    """Finite logits from features of which one is not: what a foreign network may do after its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.where(torch.arange(6) == 5, images / 0.0, images)
        return self.last(features).nan_to_num(0.0, 1.0, -1.0)


def test_features_that_are_not_finite_are_named() -> None:
    fixed = Fixed()
    fixed.network = OddHead()  # type: ignore[assignment]
    with pytest.raises(NonFiniteError, match="features.*150 of 150"):
        fixed.round()


@pytest.mark.parametrize(
    "given",
    [
        {"warmup": -1}, {"history": 0}, {"threshold": 0.0}, {"threshold": 1.0}, {"min_per_class": 0},
        {"weighting": "none"}, {"consistency": -1.0}, {"consistency_beta": 1.0}, {"consistency_rounds": 0},
        {"recall_precision": 0.0}, {"max_dim": 0}, {"recall": 1}, {"warmup": 1.5}, {"threshold": float("nan")},
    ],
)  # fmt: skip
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"tad.{next(iter(given))} .*{next(iter(given.values()))}"):
        TADConfig(**given)
