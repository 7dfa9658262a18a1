"""Callbacks: dispatch, observers, and what must hold for every registered method."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.dispatch import CallbackList
from tad_plugin.core.events import Match, Segment
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.observer import Observer, StateView
from tad_plugin.core.registry import available_methods, load_method
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError, TadPluginWarning
from tests.problems import blobs, dm_loop, flip

EVENTS = ("on_start", "on_scorer_batch", "on_scorer_epoch", "on_match", "on_segment", "on_end")
SMALL: dict[str, Any] = {"epochs": 4, "width": 4, "batch_size": 32}
#: settings under which each method acts several times within a few steps
SETTINGS: dict[str, dict[str, Any]] = {
    "tad": {"warmup": 1, "history": 2},
    "iwd": {"every": 2, "early": 0, "networks": 1, "warmup": 1},
    "loss-prune": {"scorer": SMALL},
    "el2n": {"scorer": SMALL, "epochs": SMALL["epochs"], "networks": 2},
    "clean-then-distil": {"scorer": SMALL, "folds": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


@pytest.fixture(autouse=True)
def verdict_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for the method that reads one: every fifth sample is left out."""
    torch.save(torch.arange(48) % 5 != 0, tmp_path / "verdict.pt")
    own = {"file": str(tmp_path / "verdict.pt"), "means": "keep", "order": "given"}
    monkeypatch.setitem(SETTINGS, "verdict", own)


class Recorder(Callback):
    """Notes the events and adds one to the loss."""

    name = "recorder"

    def __init__(self, calls: list[Any], number: int) -> None:
        super().__init__()
        self.calls, self.number = calls, number

    def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        self.calls.append((self.number, "on_scorer_batch", float(loss)))
        return loss + 1

    def __getattribute__(self, name: str) -> Any:
        if name in EVENTS and name != "on_scorer_batch":
            return lambda **given: self.calls.append((self.number, name, sorted(given)))
        return super().__getattribute__(name)


def test_events_reach_the_callbacks_in_order_with_keyword_arguments() -> None:
    calls: list[Any] = []
    events = CallbackList([Recorder(calls, 0), Recorder(calls, 1)])
    state, data = SampleState(torch.tensor([0, 1]), 2), RealData(torch.zeros(2, 3), torch.tensor([0, 1]), 2)
    zero, network = torch.zeros(()), torch.nn.Linear(3, 2)
    events.start(state, data)
    assert float(events.scorer_batch(state, torch.tensor([0]), zero, zero)) == 2
    events.scorer_epoch(state, network, data)
    events.match(state, Match(zero, zero, zero, (zero,), None, network, 0))
    events.segment(state, Segment(zero, zero, zero, (zero,), None, network, 0, 0, 1, 0))
    events.end(state)
    assert [c[:2] for c in calls] == [(n, e) for e in EVENTS for n in (0, 1)]
    assert [c[2] for c in calls if c[1] == "on_scorer_batch"] == [0.0, 1.0]
    assert {c[1]: c[2] for c in calls if c[1] != "on_scorer_batch"} == {
        "on_start": ["data", "state"],
        "on_scorer_epoch": ["data", "network", "state"],
        "on_match": ["match", "state"],
        "on_segment": ["segment", "state"],
        "on_end": ["state"],
    }


def test_the_base_class_changes_nothing() -> None:
    callback, loss = Callback(), torch.tensor(3.0)
    state = SampleState(torch.tensor([0, 1]), 2)
    assert callback.on_scorer_batch(state=state, indices=loss, logits=loss, loss=loss) is loss
    assert callback.settings() == {} and callback.wants_graph(0) is False
    callback.report("nobody listens", value=1)


def test_records_carry_the_position_and_reach_log_and_observers() -> None:
    seen: list[Mapping[str, Any]] = []
    logged: list[dict[str, Any]] = []

    class Watcher(Observer):
        def on_log(self, *, record: Mapping[str, Any]) -> None:
            seen.append(record)

    callback = Callback()
    events = CallbackList([callback], [Watcher()], logged.append)
    events.position(iteration=7)
    callback.report("round", trusted=3)
    assert logged == seen == [{"iteration": 7, "event": "round", "method": "callback", "trusted": 3}]


def test_an_observer_reads_copies_and_cannot_write() -> None:
    state = SampleState(torch.tensor([0, 1]), 2)
    view = StateView(state)
    view["weight"].zero_()
    view.weight.zero_()
    assert torch.equal(state.weight, torch.ones(2)) and view.summary() == state.summary()
    with pytest.raises(AttributeError, match="'weight'"):
        view.weight = torch.zeros(2)
    with pytest.raises(AttributeError, match="'update'"):
        view.update(trusted=torch.zeros(2))


def test_an_observer_with_the_hook_changes_no_bit() -> None:
    class Nosy(Observer):
        def on_scorer_epoch(self, *, state: StateView, data: RealData) -> Mapping[str, Any]:
            state["weight"].zero_()
            return {"event": "nosy"}

    images, labels = blobs()
    found = []
    for observers in ([], [Nosy()]):
        hook = attach("tad", labels=labels, data=images, num_classes=3, config={"scorer": SMALL}, observers=observers)
        found.append(hook.state.weight)
    assert torch.equal(*found)


def test_a_checkpoint_of_other_methods_is_refused() -> None:
    events = CallbackList([Callback()])
    with pytest.raises(ConfigError, match="0:tad"):
        events.load_state_dict({"0:tad": {}}, torch.device("cpu"))


# every registered method, through one table


def made(method: str, records: list[dict[str, Any]] | None = None, **more: Any) -> tuple[Hook, Any]:
    images, true = blobs(per_class=16, spread=0.8)
    labels = flip(true, 3, 0.3)
    settings: dict[str, Any] = {n: SETTINGS[n] for n in method.split("+") if n in SETTINGS}
    settings["scorer"] = {**SMALL, "refresh_every": 2}
    hook = attach(
        method, labels=labels, data=images, num_classes=3, true_labels=true, ipc=2, noise_rate=0.3, seed=4,
        config=settings, log=records.append if records is not None else None, **more,
    )  # fmt: skip
    return hook, (images, labels)


def reloaded(tree: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


METHODS = [*available_methods(), "tad+iwd", "random+oracle"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_resumes_with_the_same_bits(method: str, global_rng_untouched: None) -> None:
    whole, data = made(method)
    loop = dm_loop(*data, 3, whole)
    for iteration in range(6):
        if iteration == 3:
            saved = reloaded({"hook": whole.state_dict(), "loop": loop.state_dict()})
        loop.step(iteration)
    whole.finish()
    again, data = made(method, start=False)
    again.load_state_dict(saved["hook"])
    again.start()
    resumed = dm_loop(*data, 3, again)
    resumed.load_state_dict(saved["loop"])
    for iteration in range(3, 6):
        resumed.step(iteration)
    again.finish()
    assert torch.equal(loop.result().images, resumed.result().images)
    a, b = whole.state_dict(), again.state_dict()
    for tree in (a, b):
        tree.pop("scoring_seconds")
    assert equal(a, b)
    assert torch.equal(whole.state.observed, data[1]) and int(whole.state.summary()["smallest_pool"]) >= 2


@pytest.mark.parametrize("method", ["tad", "tad+iwd"])
def test_scoring_resumes_in_the_middle_with_the_same_bits(method: str) -> None:
    kept: list[Any] = []
    whole, _ = made(method, start=False)
    whole.start(checkpoint=lambda: kept.append(reloaded(whole.state_dict())))
    assert len(kept) == 1 + SMALL["epochs"]
    again, _ = made(method, start=False)
    again.load_state_dict(kept[2])
    again.start()
    assert equal({**again.state_dict(), "scoring_seconds": 0}, {**kept[-1], "scoring_seconds": 0})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_under_its_name_and_is_the_same_each_time(method: str) -> None:
    records: list[dict[str, Any]] = []
    first, data = made(method, records)
    second, _ = made(method)
    for hook in (first, second):
        loop = dm_loop(*data, 3, hook)
        for iteration in range(5):
            loop.step(iteration)
    assert equal(first.state.state_dict(), second.state.state_dict())
    assert {r["method"] for r in records if "method" in r} == set(method.split("+"))


@pytest.mark.parametrize("method", available_methods())
def test_every_method_refuses_unknown_settings_and_tells_its_own(method: str) -> None:
    cls = load_method(method)
    with pytest.raises(ConfigError, match="no_such_setting"):
        cls.from_settings({"no_such_setting": 1})
    callback = cls.from_settings(SETTINGS.get(method))
    for name, value in SETTINGS.get(method, {}).items():
        stored = callback.settings()[name]
        assert {**stored, **value} == stored if isinstance(value, dict) else stored == value
    assert reloaded(callback.state_dict()).keys() == callback.state_dict().keys()


def test_our_warnings_have_one_base() -> None:
    assert issubclass(TadPluginWarning, UserWarning)
