"""Hook: an identity without a method, one line in a loop with one, and state files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.core.state import SampleState
from tad_plugin.data.labels import label_digest
from tad_plugin.errors import (
    ConfigError,
    FileFormatError,
    InvalidInputError,
    StateMismatchError,
)
from tests.problems import blobs, distilled, dm_loop, flip

SMALL = {"scorer": {"epochs": 3, "width": 4, "batch_size": 32}, "tad": {"warmup": 1}}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


class Ones(Callback):
    """Weights that are all 1, through the multiplication; with a graph if asked."""

    name = "ones"
    needs_graph = True

    def __init__(self, graph: bool = False) -> None:
        super().__init__()
        self.graph = graph
        self.seen: list[Match] = []

    def on_start(self, *, state: SampleState, data: Any) -> None:
        state.set_weights(self.name, torch.full((len(state),), 0.25))

    def wants_graph(self, iteration: int) -> bool:
        return self.graph

    def on_match(self, *, state: SampleState, match: Match) -> None:
        self.seen.append(match)


def with_callback(callback: Callback, images: Tensor, labels: Tensor) -> Hook:
    made = attach("none", labels=labels, data=images, num_classes=3)
    return Hook(made.state, made.data, [callback]).start()


# the identity


def test_no_hook_none_and_weights_of_one_give_the_same_bits() -> None:
    images, labels = blobs()
    plain = distilled(dm_loop(images, labels, 3, None), 20)
    assert not torch.equal(plain, distilled(dm_loop(images, labels, 3, None), 19))
    hooks = [
        attach("none", labels=labels, data=images, num_classes=3),
        with_callback(Callback(), images, labels),
        with_callback(Ones(), images, labels),
        with_callback(Ones(graph=True), images, labels),
    ]
    for hook in hooks:
        assert torch.equal(plain, distilled(dm_loop(images, labels, 3, hook), 20))


def test_none_returns_the_same_objects_and_draws_nothing(global_rng_untouched: None) -> None:
    images, labels = blobs()
    hook = attach("none", labels=labels, data=images, num_classes=3)
    before = hook.generator.get_state()
    loader, criterion = DataLoader(TensorDataset(images, labels), batch_size=4), nn.CrossEntropyLoss()
    rows, indices = torch.randn(4, 3, generator=torch.Generator()), torch.arange(4)
    assert hook.loader(loader) is loader and hook.criterion(criterion) is criterion
    assert hook.reweight(rows, indices) is rows and not hook.enabled and hook.wants_graph() is False
    weights = hook.weights(indices)
    weights[0] = 5  # and pools: writing into what was returned changes nothing
    hook.pools()[0].clear()
    hook.pool(0).zero_()
    assert torch.equal(hook.weights(indices), torch.ones(4))
    assert len(hook.pools()[0]) == 20 and hook.pool(0).tolist() == hook.pools()[0]
    assert hook.data is not None and hook.data.images.data_ptr() == images.data_ptr()
    hook.epoch_end(nn.Identity())
    hook.before_update(rows.sum(), rows, nn.Identity())
    hook.start(progress=True)
    hook.finish()
    assert torch.equal(before, hook.generator.get_state()) and hook.scorer is None and hook.iteration == 0


def test_none_needs_no_images_and_gives_the_baselines_pools() -> None:
    _, labels = blobs()
    hook = attach(labels=labels.tolist())
    assert hook.data is None and hook.state.num_classes == 3
    assert hook.pools() == [[i for i, y in enumerate(labels.tolist()) if y == c] for c in range(3)]
    assert hook.pool(1).tolist() == hook.pools()[1] and hook.targets([0, 1, 2]).tolist() == [0, 1, 2]
    assert len(hook.sample(0, 5)) == 5


# with a method


def test_tad_through_the_one_line_is_a_weighted_mean() -> None:
    images, true = blobs(spread=0.8)
    labels = flip(true, 3, 0.3)
    hook = attach("tad", labels=labels, data=images, num_classes=3, seed=1, config=SMALL)
    indices = hook.sample(1, 12)
    n, state = len(indices), hook.state
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    assert bool((state.target[indices] == 1).all() and state.trusted[indices].all())
    w = [float(state.weight[i]) for i in indices]
    for column in range(5):
        expected = sum(a * float(r[column]) for a, r in zip(w, rows, strict=True)) / sum(w)
        assert float(hook.reweight(rows, indices).mean(0)[column]) == pytest.approx(expected, rel=1e-5)
    assert torch.allclose((hook.weights(indices)[:, None] * rows).mean(0), hook.reweight(rows, indices).mean(0))
    assert hook.reweight(rows.view(n, 5, 1, 1), indices).shape == (n, 5, 1, 1)
    with pytest.raises(InvalidInputError, match=f"{n}.* {n - 1}"):
        hook.reweight(rows, indices[1:])


def test_attach_touches_no_global_generator_and_the_seed_decides(global_rng_untouched: None) -> None:
    images, true = blobs(spread=0.8)
    labels = flip(true, 3, 0.3)
    states = [attach("tad", labels=labels, data=images, seed=s, config=SMALL).state.weight for s in (1, 1, 2)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_graph_of_the_weights_is_given_when_it_is_wanted() -> None:
    images, labels = blobs()
    callback = Ones(graph=True)
    hook = with_callback(callback, images, labels)
    indices = torch.tensor([0, 3, 1, 4])
    rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    loss = hook.reweight(rows, indices).square().sum()
    hook.before_update(loss, images[:2], nn.Linear(1, 1), labels=labels[:2], kind="gradient")
    match = callback.seen[0]
    (gradient,) = torch.autograd.grad(match.loss, match.weights)
    expected = torch.zeros(len(images))
    expected[indices] = 2 * rows.square().sum(1)
    assert torch.allclose(gradient, expected) and torch.equal(match.indices, indices)
    assert match.data is hook.data and match.kind == "gradient" and match.iteration == 0 and hook.iteration == 1
    hook.before_update(rows.sum(), images[:2], nn.Linear(1, 1))
    assert len(callback.seen[1].indices) == 0


def test_segments_get_their_iteration_and_data() -> None:
    class Watcher(Callback):
        def on_segment(self, *, state: SampleState, segment: Segment) -> None:
            seen.append((segment.iteration, segment.data))

    seen: list[Any] = []
    images, labels = blobs()
    hook = with_callback(Watcher(), images, labels)
    zero = torch.zeros(())
    for _ in range(2):
        hook.before_segment_update(Segment(zero, zero, zero, (zero,), None, nn.Linear(1, 1), 0, 0, 1, -1))
    assert seen == [(0, hook.data), (1, hook.data)]


def test_a_loop_that_trains_on_real_data_scores_with_its_own_network() -> None:
    images, true = blobs(spread=0.8)
    records: list[dict[str, Any]] = []
    hook = attach(
        "tad", labels=flip(true, 3, 0.3), data=images, num_classes=3, true_labels=true, trains_on_real=True,
        config={"tad": {"warmup": 1}}, log=records.append,
    )  # fmt: skip
    assert hook.scorer is None and hook.state.summary()["trusted"] == 60
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = hook.loader(DataLoader(TensorDataset(images, hook.state.observed), batch_size=20))
    criterion: Any = hook.criterion(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(network(x), y).backward()
            optimizer.step()
        hook.epoch_end(network)
    assert hook.state.summary()["trusted"] < 60 and hook.scoring_seconds > 0
    assert [r["event"] for r in records] == ["round", "split"] * 4


def test_the_scorer_is_refreshed_between_updates() -> None:
    images, labels = blobs()
    config = {**SMALL, "scorer": {**SMALL["scorer"], "refresh_every": 2}}
    hook = attach("tad", labels=labels, data=images, num_classes=3, config=config)
    distilled(dm_loop(images, labels, 3, hook), 5)
    assert hook.scorer is not None and hook.scorer.epoch == 3 + 2


# state files


def test_a_state_file_is_taken_over_without_scoring_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, true = blobs(spread=0.8)
    labels, path = flip(true, 3, 0.3), tmp_path / "state.safetensors"
    first = attach("tad", labels=labels, data=images, config=SMALL, state=path)
    first.finish()
    monkeypatch.setattr("tad_plugin.core.scorer.Scorer.run_epoch", None)  # nothing may be trained
    again = attach("tad", labels=labels, data=images, config=SMALL, state=path)
    assert torch.equal(again.state.weight, first.state.weight) and torch.equal(again.state.target, first.state.target)
    again.epoch_end(nn.Linear(1, 1))  # what was decided stays
    images_a, images_b = (distilled(dm_loop(images, labels, 3, h), 3) for h in (first, again))
    assert torch.equal(images_a, images_b)
    later = attach("tad+iwd", labels=labels, data=images, config=SMALL, state=path)
    assert "influence" in later.state
    resumed = attach("tad", labels=labels, data=images, config=SMALL, start=False)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed.start().state.weight, first.state.weight)


def test_a_state_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    images, true = blobs(spread=0.8)
    labels, path = flip(true, 3, 0.3), tmp_path / "state.safetensors"
    attach("tad", labels=labels, data=images, config=SMALL, state=path).finish()
    common: dict[str, Any] = {"data": images, "state": path, "num_classes": 3}
    other = {**SMALL, "tad": {"warmup": 2}}
    with pytest.raises(StateMismatchError, match="'tad'.*warmup: 1 .*2 "):
        attach("tad", labels=labels, config=other, **common)
    with pytest.raises(
        StateMismatchError, match=f"{label_digest(true)[:16]}.*{label_digest(labels)[:16]}.*{path.name}"
    ):
        attach("tad", labels=true, config=SMALL, **common)
    for method in ("none", "random"):
        with pytest.raises(StateMismatchError, match=f"'{method}'.*tad"):
            attach(method, labels=labels, **common)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError):
        attach("tad", labels=labels, config=SMALL, **common)
    with pytest.raises(FileFormatError):
        attach("none", labels=labels, **common)
    path.unlink()
    attach("random", labels=labels, state=path).finish()
    with pytest.raises(ConfigError, match="tad"):
        attach("random+tad", labels=labels, config=SMALL, **common)


def test_a_state_that_no_method_wrote_is_a_start(tmp_path: Path) -> None:
    images, labels = blobs()
    attach("none", labels=labels, state=tmp_path / "s").finish()
    hook = attach("tad", labels=labels, data=images, config=SMALL, state=tmp_path / "s")
    assert hook.scorer is not None and hook.scorer.epoch == 3


def test_an_epoch_without_images_is_named() -> None:
    _, labels = blobs()
    hook = attach("tad", labels=labels, trains_on_real=True)
    with pytest.raises(ConfigError, match="data=images"):
        hook.epoch_end(nn.Linear(1, 3))


def test_a_scorer_without_data_is_named() -> None:
    hook = Hook(SampleState(torch.tensor([0, 1]), 2), None, [], scorer=ScorerConfig())
    with pytest.raises(ConfigError, match="data=images"):
        hook.load_state_dict({**hook.state_dict(), "scorer": {}})
