from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tad_plugin.core.diagnostics import area_under_roc
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Match
from tad_plugin.core.hook.attach import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import initial_images
from tad_plugin.distill.dc import DC
from tad_plugin.distill.dm import DM
from tad_plugin.errors import ConfigError, DisconnectedGraphError, NoHeldOutError, NonFiniteError, StateMismatchError
from tad_plugin.iwd.config import STATISTICS, IWDConfig
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.iwd.method import IWD
from tad_plugin.iwd.scoring import Fold, score_on_network
from tad_plugin.iwd.targets import class_mean_distance, target_gradient
from tad_plugin.iwd.weighting import effective_sample_size
from tests.iwd.problems import digits

Made = tuple[DM, Hook, list[dict[str, Any]]]


def noisy_digits(n: int = 400, rate: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Images float32, observed labels, true labels."""
    g = torch.Generator().manual_seed(0)
    x, y = digits()
    order = torch.randperm(len(x), generator=g)[:n]
    x, y = x[order].float(), y[order]
    flip = torch.rand(n, generator=g) < rate
    return x, torch.where(flip, (y + torch.randint(1, 10, (n,), generator=g)) % 10, y), y


X, OBSERVED, TRUE = noisy_digits()


def make(
    method: str | None,
    settings: dict[str, Any] | None = None,
    *,
    batch: int = 32,
    images: Tensor = X,
    kind: type[Any] = DM,
) -> Made:
    """A DM (or other) loop on noisy digits; None as method stands for "none"."""
    records: list[dict[str, Any]] = []
    method = method or "none"
    hook = attach(
        method, labels=OBSERVED, data=images, num_classes=10, seed=3, true_labels=TRUE, dataset="digits", ipc=1,
        log=records.append, config={"iwd": settings or {}} if "iwd" in method else {},
    )  # fmt: skip
    data = RealData(images, OBSERVED, 10, TRUE, "digits", ipc=1)
    config = kind.Config(ipc=1, width=8, batch_real=batch, lr_img=1.0)
    generator = torch.Generator().manual_seed(1)
    start, labels = initial_images(config, data, hook, generator)
    synthetic = SyntheticSet(start, labels, 10, Preprocessing((0.0,), (1.0,)), "digits")
    return kind(config, data, hook, synthetic, generator), hook, records


def run(loop: DM, first: int, last: int) -> Tensor:
    for iteration in range(first, last):
        loop.step(iteration)
    return loop.result().images


def callback_of(hook: Hook) -> IWD:
    (found,) = [c for c in hook.callbacks if isinstance(c, IWD)]
    return found


# -- schedule and warm-up ----------------------------------------------------------------------------
def test_refreshes_come_early_and_then_every() -> None:
    method = IWD(IWDConfig(every=100, early=10))
    assert [i for i in range(310) if method.due(i)] == [0, 10, 20, 40, 80, 100, 200, 300]
    assert [i for i in range(310) if IWD(IWDConfig(every=100, early=0)).due(i)] == [0, 100, 200, 300]
    assert all(IWD(IWDConfig(mode="batch")).due(i) for i in range(20))
    assert [i for i in range(1100) if IWD(IWDConfig(early=0)).due(i)] == [0, 500, 1000]


@pytest.mark.parametrize("mode", ["all", "batch"])
def test_warm_up_gives_the_baseline_bit_for_bit(mode: str) -> None:
    plain = run(make(None)[0], 0, 12)
    loop, hook, records = make("iwd", {"mode": mode, "every": 5, "early": 0, "warmup": 100})
    assert torch.equal(run(loop, 0, 12), plain)
    assert torch.equal(hook.state.weight, torch.ones(len(X)))
    assert callback_of(hook).refreshes == 3
    assert [r["active"] for r in records if r["event"] == "influence"] == [False] * 3


def test_an_effective_sample_size_of_one_never_weights() -> None:
    plain = run(make(None)[0], 0, 12)
    assert torch.equal(run(make("iwd", {"every": 5, "warmup": 0, "ess": 1.0})[0], 0, 12), plain)


def test_weights_follow_after_the_warm_up() -> None:
    plain = run(make(None)[0], 0, 8)
    loop, hook, records = make("iwd", {"every": 4, "early": 0, "warmup": 1, "ess": 0.4, "saturate": 0})
    assert not torch.equal(run(loop, 0, 8), plain)
    state, reports = hook.state, [r for r in records if r["event"] == "influence"]
    assert [r["active"] for r in reports] == [False, True]
    seen = state["influence_count"] > 0
    found = effective_sample_size(state["influence_weight"], state.target, 10, seen)
    assert torch.allclose(found, torch.full_like(found, 0.4), atol=2e-3)
    assert reports[1]["ess"] == pytest.approx(0.4, abs=2e-3)
    assert reports[1]["seconds"] > 0 and reports[1]["temperature"][0] > 0
    # The more harmful, the lighter: inside a class weights fall with the score.
    for c in range(10):
        rows = (seen & (state.target == c)).nonzero().flatten()
        by_score = rows[state["influence"][rows].argsort()]
        assert bool((state["influence_weight"][by_score].diff() <= 1e-6).all())


def test_the_time_of_scoring_is_in_scoring_seconds() -> None:
    loop, hook, records = make("iwd", {"every": 2, "early": 0})
    run(loop, 0, 4)
    assert hook.scoring_seconds >= sum(r["seconds"] for r in records if r["event"] == "influence")


# -- what is computed --------------------------------------------------------------------------------
def test_all_scores_equal_the_explicit_influence_of_the_same_match() -> None:
    """On one network and with all samples in one batch the two modes compute the same numbers."""
    loop, _, _ = make(None)
    network = loop.fresh_network(torch.Generator().manual_seed(4)).double()
    x, s, labels = X.double(), loop.synthetic.images.detach().double().requires_grad_(), loop.synthetic.labels
    held_out, scored = torch.arange(0, 60), torch.arange(60, len(X))
    found = score_on_network(network, x, OBSERVED, Fold(held_out, scored), s, labels, 10)
    value, slope = target_gradient("validation", [network], s, labels, x[held_out], OBSERVED[held_out], 10)
    w = torch.ones(len(scored), dtype=torch.float64, requires_grad=True)
    loss = class_mean_distance(network, s, labels, x[scored], OBSERVED[scored], 10, weights=w)
    assert found.target == pytest.approx(value)
    expected = explicit_influence(loss, w, s, slope)
    assert torch.allclose(found.influence, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def test_batch_scores_equal_all_scores_through_the_hook() -> None:
    """The loop's own leaf, with the whole pool as the batch: the same ranks and z-scores inside each class."""
    loop, hook, _ = make("iwd", {"mode": "batch", "warmup": 9}, batch=len(X))
    loop.augmentation = type(loop.augmentation)("")
    before, network = loop.synthetic.images.detach().clone(), copy.deepcopy(loop.network)
    generator = torch.Generator().manual_seed(0)
    generator.set_state(loop.generator.get_state())
    folds = callback_of(hook)
    kept = folds.generator.get_state()
    loop.step(0)
    from tad_plugin.nn.networks import reinitialise

    reinitialise(network, generator)
    folds.generator.set_state(kept)
    fold = folds._folds(hook.state)[0]
    oracle = score_on_network(network, X, OBSERVED, fold, before, loop.synthetic.labels, 10)
    assert torch.equal(hook.state["influence_count"][fold.scored], torch.ones_like(fold.scored))
    assert int(hook.state["influence_count"][fold.held_out].sum()) == 0
    assert torch.allclose(2 * hook.state["influence"][fold.scored].double(), oracle.standardised, atol=1e-3)


@pytest.mark.parametrize("mode", ["all", "batch"])
def test_a_loop_that_goes_class_by_class_has_one_refresh_for_all_of_them(mode: str) -> None:
    loop, hook, records = make("iwd", {"mode": mode, "warmup": 9, "networks": 1, "every": 1})
    iwd, network, s, labels = callback_of(hook), loop.network, loop.synthetic.images, loop.synthetic.labels
    kept = iwd.generator.get_state()
    for c in range(10):
        indices = hook.pool(c)
        hook.drawn(indices)
        rows = hook.reweight(network.embed(X[indices]).detach())
        loss = (rows.mean(0) - network.embed(s[labels == c]).mean(0)).square().sum()
        iwd.generator.set_state(kept)  # the same samples are held out for every class
        hook.before_update(loss, s, network, labels=labels, last=c == 9)
        assert hook.iteration == (c == 9) and iwd.refreshes == (c == 9)
    iwd.generator.set_state(kept)
    fold = iwd._folds(hook.state)[0]
    network = network if mode == "batch" else loop.fresh_network(iwd.generator)
    oracle = score_on_network(network, X, OBSERVED, fold, s.detach(), labels, 10)
    assert torch.equal(hook.state["influence_count"][fold.scored], torch.ones_like(fold.scored))
    assert torch.allclose(2 * hook.state["influence"][fold.scored].double(), oracle.standardised, atol=1e-3)
    (record,) = [r for r in records if r["event"] == "influence"]
    assert 0 < record["seconds"] <= hook.scoring_seconds


@pytest.mark.parametrize("target", ["validation", "matching"])
@pytest.mark.parametrize("mode", ["all", "batch"])
def test_no_sample_is_scored_by_a_target_that_contains_it(
    mode: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held-out sample must not be scored in that refresh: with one refresh and one network its count is 0."""
    settings = {"mode": mode, "target": target, "networks": 1, "every": 50, "early": 0, "held_out": 0.25}
    loop, hook, _ = make("iwd", settings, batch=len(X))
    method = callback_of(hook)
    kept = method.generator.get_state()
    loop.step(0)
    method.generator.set_state(kept)
    fold = method._folds(hook.state)[0]
    counts = hook.state["influence_count"]
    assert int(counts[fold.held_out].sum()) == 0 and bool((counts[fold.scored] == 1).all())
    assert 0.2 < len(fold.held_out) / len(X) < 0.35


def test_influence_finds_mislabelled_samples_and_the_reversed_sign_weights_them_up() -> None:
    weights = {}
    for sign in (1, -1):
        loop, hook, records = make("iwd", {"networks": 8, "held_out": 0.25, "warmup": 0, "sign": sign, "ess": 0.5})
        run(loop, 0, 1)
        weights[sign] = hook.state["influence_weight"]
        quality = [r for r in records if r["event"] == "influence_quality"][-1]
        expected = area_under_roc(-hook.state["influence"], OBSERVED == TRUE)
        assert quality["auc"] == pytest.approx(expected) and expected > 0.7
    wrong = OBSERVED != TRUE
    assert float(weights[1][wrong].mean()) < 0.75 < 1.25 < float(weights[-1][wrong].mean())


def test_held_out_samples_that_the_user_vouches_for() -> None:
    loop, hook, _ = make("iwd", {"networks": 1, "warmup": 0})
    known = (OBSERVED == TRUE) & (torch.arange(len(X)) % 3 == 0)
    hook.state.register("held_out", known)
    for fold in callback_of(hook)._folds(hook.state):
        assert bool(known[fold.held_out].all())
        assert len(fold.held_out) + len(fold.scored) == len(X)
    run(loop, 0, 1)


# -- beside other methods ----------------------------------------------------------------------------
def test_beside_another_method_only_its_trusted_samples_are_scored_and_weights_multiply() -> None:
    loop, hook, _ = make("oracle+iwd", {"networks": 2, "warmup": 0, "ess": 0.5})
    run(loop, 0, 1)
    state, right = hook.state, OBSERVED == TRUE
    assert torch.equal(state.trusted, right)
    assert bool((state["influence_count"][~right] == 0).all()) and bool((state["influence_count"][right] > 0).any())
    assert torch.equal(state["influence_weight"][~right], torch.ones(int((~right).sum())))
    # Half of each class is to count: of those that are left, more than half.
    share = (0.5 * torch.bincount(OBSERVED) / torch.bincount(OBSERVED[right])).clamp(max=1).double()
    assert float(share.min()) > 0.6
    found = effective_sample_size(state["influence_weight"], OBSERVED, 10, right & (state["influence_count"] > 0))
    assert torch.allclose(found, share, atol=2e-3)
    expected = state["influence_weight"] * right
    for c in range(10):
        rows = right & (c == OBSERVED)
        assert torch.allclose(state.weight[rows], expected[rows] / expected[rows].mean(), atol=1e-5)


def test_a_relabelled_sample_loses_its_scores() -> None:
    loop, hook, _ = make("iwd", {"every": 1, "networks": 1, "held_out": 1})
    run(loop, 0, 3)
    moved = hook.state.target.clone()
    moved[:20] = (moved[:20] + 1) % 10
    hook.state.update(target=moved)
    run(loop, 3, 4)
    assert int(hook.state["influence_count"][:20].max()) <= 1
    assert int(hook.state["influence_count"][20:].min()) >= 2


# -- resume ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["all", "batch"])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_resume_ends_with_the_same_bits(mode: str, decay: float) -> None:
    settings = {"mode": mode, "every": 2, "early": 0, "networks": 1, "decay": decay}
    loop, hook, _ = make("iwd", settings)
    run(loop, 0, 5)
    saved = copy.deepcopy((loop.state_dict(), hook.state_dict()))
    whole = run(loop, 5, 9)
    again, other, _ = make("iwd", settings)
    assert other is not None
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    assert torch.equal(run(again, 5, 9), whole)
    for name in ("influence", "influence_count", "influence_weight", "weight"):
        assert torch.equal(other.state[name], hook.state[name])


def test_scores_of_another_size_are_refused() -> None:
    loop, hook, _ = make("iwd", {"every": 1, "networks": 1})
    run(loop, 0, 1)
    saved = callback_of(hook).state_dict()
    with pytest.raises(StateMismatchError, match="decay"):
        IWD(IWDConfig(decay=0.5)).load_state_dict(saved)


def test_scores_are_taken_up_from_a_state_file(tmp_path: Any) -> None:
    loop, hook, _ = make("iwd", {"every": 1, "networks": 1, "held_out": 1})
    run(loop, 0, 2)
    hook.save_state(tmp_path / "state.safetensors")
    other = SampleState.load(tmp_path / "state.safetensors", OBSERVED)
    method = IWD(IWDConfig(every=1, networks=1, held_out=1))
    running = method._store(other)
    assert torch.equal(running.counts, hook.state["influence_count"])
    assert torch.allclose(running.estimate, hook.state["influence"], atol=1e-6)


def test_nothing_is_drawn_from_the_global_generators(global_rng_untouched: None) -> None:
    for settings in ({"networks": 1}, {"mode": "batch"}, {"networks": 1, "target": "matching"}):
        run(make("iwd", settings)[0], 0, 2)


# -- bad input ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "some"}, {"explicit": False, "implicit": False}, {"target": "accuracy"}, {"held_out": 0.7},
        {"held_out": 0}, {"held_out": 2.5}, {"ess": 1.5}, {"ess": 0, "saturate": 0}, {"saturate": 1.0, "ess": 1},
        {"saturate": 0.6, "ess": 0.5}, {"every": -1}, {"early": -1}, {"networks": 0}, {"warmup": -1}, {"alpha": 0},
        {"alpha": float("nan")}, {"statistic": "medians"}, {"learned": 1}, {"networks": 1.5}, {"steps": 0},
        {"decay": 1.0}, {"sign": 2}, {"chunk_size": -1}, {"memory_budget": 0},
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"iwd\.{next(iter(settings))}"):
        IWD.from_settings(settings)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="network_count"):
        IWD.from_settings({"network_count": 2})


def test_a_loop_whose_loss_ignores_the_weights() -> None:
    loop, hook, _ = make("iwd", {"mode": "batch"})
    s = loop.synthetic.images
    with pytest.raises(DisconnectedGraphError, match="weights"):
        hook.before_update(s.square().sum(), s, loop.network, labels=loop.synthetic.labels)
    hook.weights(torch.arange(20))  # asked for, and then not used
    with pytest.raises(DisconnectedGraphError, match="weights"):
        hook.before_update(s.square().sum(), s, loop.network, labels=loop.synthetic.labels)


def test_no_held_out_samples() -> None:
    loop, hook, _ = make("iwd")
    hook.state.register("held_out", torch.zeros(len(X), dtype=torch.bool))
    with pytest.raises(NoHeldOutError):
        loop.step(0)


def test_an_image_with_nan_is_named() -> None:
    loop, hook, _ = make("iwd", images=X.clone())
    assert hook is not None and hook.data is not None
    hook.data.images[7] = float("nan")  # attach() refuses it; this one comes later
    loop.data = RealData(X, OBSERVED, 10, TRUE, "digits")  # the loop's own batch is clean
    with pytest.raises(NonFiniteError):
        for iteration in range(11):
            loop.step(iteration)


def test_paths_that_a_loop_does_not_have() -> None:
    loop, _, _ = make("iwd", {"explicit": False})
    with pytest.raises(ConfigError, match="explicit"):
        loop.step(0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_gradient_matching_loop_is_scored_on_all_samples_too(statistic: str) -> None:
    loop, hook, records = make("iwd", {"networks": 1, "every": 2, "statistic": statistic}, kind=DC)
    run(loop, 0, 3)
    assert [r["refresh"] for r in records if r["event"] == "influence"] == [1, 2]
    seen = hook.state["influence_count"] > 0
    assert float(seen.float().mean()) > 0.9
    # Two random networks and a third of the digits: well above chance.
    assert area_under_roc(hook.state["influence"][seen], (OBSERVED != TRUE)[seen]) > 0.7
    assert float(hook.state.weight.std()) > 0.01


def test_class_means_score_a_gradient_matching_loop_as_they_score_one_of_means() -> None:
    found = []
    for kind, distance in (("distribution", None), ("gradient", lambda *_: torch.zeros(()))):
        loop, hook, _ = make("iwd")
        s = loop.synthetic.images
        labels = loop.synthetic.labels
        hook.before_update(s.square().sum(), s, loop.network, labels=labels, kind=kind, distance=distance)
        found.append(hook.state["influence"].clone())
    assert torch.equal(*found)


def test_a_gradient_matching_loop_that_tells_no_distance_cannot_be_scored_through_it() -> None:
    loop, hook, _ = make("iwd", {"statistic": "loop"})
    s = loop.synthetic.images
    with pytest.raises(ConfigError, match="statistic"):
        hook.before_update(s.square().sum(), s, loop.network, labels=loop.synthetic.labels, kind="gradient")


def test_labels_of_the_synthetic_images_are_needed() -> None:
    loop, hook, _ = make("iwd")
    s = loop.synthetic.images
    with pytest.raises(ConfigError, match="labels"):
        hook.before_update(s.square().sum(), s, loop.network)


def test_data_is_needed() -> None:
    with pytest.raises(ConfigError, match="data"):
        attach("iwd", labels=OBSERVED, num_classes=10)
    state, method = SampleState(OBSERVED, 10), IWD()
    empty = torch.zeros(0, dtype=torch.int64)
    match = Match(torch.zeros(()), torch.zeros(len(X)), empty, (X[:10],), torch.arange(10), nn.Linear(1, 1), 0)
    with pytest.raises(ConfigError, match="data"):
        CallbackList([method]).match(state, match)


def test_a_foreign_network_without_embed_and_without_a_maker() -> None:
    """A script's own network: features are the input of its last linear layer, fresh ones are redrawn copies."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    before = copy.deepcopy(network.state_dict())
    hook = attach("iwd", labels=OBSERVED, data=X, num_classes=10, config={"iwd": {"networks": 1, "warmup": 0}})
    s = X[:10].clone().requires_grad_()
    hook.before_update(s.square().sum(), s, network, labels=torch.arange(10))
    assert float(hook.state["influence"].abs().max()) > 0
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
