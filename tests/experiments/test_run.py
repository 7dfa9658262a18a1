"""One run: resume after SIGKILL, what it refuses before it leaves anything behind, and what it computes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tad_plugin.experiments.run as experiment
from tad_plugin.core.state import SampleState
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import ConfigError, FileFormatError, NotEnoughSamplesError, ResumeError, StateMismatchError
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.loading import load_noisy
from tad_plugin.experiments.plan import Plan, resolve
from tad_plugin.experiments.run import run
from tad_plugin.utils.machine import peak_memory_bytes, reset_peak_memory
from tests.experiments.killed_runs import CONFIG, moments
from tests.warm import start_program

SMALL = dataclasses.replace(CONFIG, iterations=3, eval_runs=1, checkpoint_seconds=60.0)
KILLED = ("noisy", "tad", "dc/noisy", "idm/tad")
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


def contents(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in list(f.keys())}


# resume


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    if not hasattr(os, "fork"):
        pytest.skip("attempts are forks")
    folder = tmp_path_factory.mktemp("killed")
    process = start_program("tests.experiments.killed_runs", str(folder), *KILLED, output=folder / "output")
    assert process.wait() == 0, (folder / "output").read_text()
    found = [json.loads(line) for line in (folder / "output").read_text().splitlines() if line.startswith("{")]
    return folder, {line.pop("arm"): line for line in found}


@pytest.mark.parametrize("arm", KILLED)
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(arm: str, killed: Any) -> None:
    folder, found = killed
    statuses = dict(found[arm])
    assert statuses.pop("last") == 0
    assert set(statuses) == set(moments(arm)) and len(statuses) >= 4
    assert set(statuses.values()) == {-signal.SIGKILL}
    whole, broken = RunFolder(folder / arm / "whole"), RunFolder(folder / arm / "killed")
    for name in ("synthetic.safetensors", "state.safetensors"):
        a, b = contents(whole.path / name), contents(broken.path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # one log, without a line twice or missing
    assert whole.records() == broken.records()
    same = ("arm", "accuracy", "best_iteration", "state", "noise", "iterations")
    assert {k: whole.results()[k] for k in same} == {k: broken.results()[k] for k in same}
    assert not list(broken.path.rglob(".tmp-*"))


def test_a_finished_run_is_returned_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(SMALL, "noisy", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "load_noisy", None)
        assert run(dataclasses.replace(SMALL, checkpoint_seconds=5.0), "noisy", tmp_path) == first
    for config, arm, text in (
        (dataclasses.replace(SMALL, seed=1), "noisy", "seed: there 0, now 1"),
        (SMALL, "clean", "arm: there 'noisy', now 'clean'"),
    ):
        with pytest.raises(ResumeError, match=text):
            run(config, arm, tmp_path)
    again = run(dataclasses.replace(SMALL, seed=1), "noisy", tmp_path, overwrite=True)
    assert again["seed"] == 1 and again["accuracy"] != first["accuracy"]


def test_other_labels_on_resume_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(experiment, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        run(SMALL, "noisy", tmp_path)
    original = load_noisy

    def changed(plan: Plan) -> Any:
        splits, noisy, held = original(plan)
        return splits, dataclasses.replace(noisy, labels=noisy.labels.flip(0)), held

    monkeypatch.setattr(experiment, "load_noisy", changed)
    with pytest.raises(StateMismatchError, match="label hash"):
        run(SMALL, "noisy", tmp_path)


# mistakes


def test_a_mistake_leaves_nothing_that_would_block_the_corrected_command(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"noise": "symetric:0.4"}, ConfigError),
        ({"dataset": f"folder:{tmp_path / 'nothing'}"}, FileFormatError),
        ({"per_class": 1000}, NotEnoughSamplesError),
    ]
    for change, error in mistakes:
        with pytest.raises(error):
            run(dataclasses.replace(SMALL, **change), "noisy", tmp_path / "run")
    assert run(SMALL, "random", tmp_path / "run")["arm"] == "random"


def test_more_images_per_class_than_usable_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSamplesError, match="40.*class 0"):
        run(dataclasses.replace(SMALL, ipc=40), "noisy", tmp_path)


# what a run does


def test_arms_of_a_seed_share_noise_split_and_initial_images(tmp_path: Path) -> None:
    found = {arm: run(SMALL, arm, tmp_path / arm) for arm in ("clean", "noisy", "random", "oracle")}
    assert len({r["noise"]["realised_rate"] for r in found.values()}) == 1
    noisy, clean = (SampleState.load(tmp_path / arm / "state.safetensors") for arm in ("noisy", "clean"))
    splits, labels, _ = load_noisy(resolve(SMALL, "noisy"))
    assert torch.equal(clean.observed, splits.train_labels) and torch.equal(noisy.observed, labels.labels)
    random = SyntheticSet.load(tmp_path / "random" / "synthetic.safetensors")
    for image, label in zip(random.images, random.labels, strict=True):
        same = (splits.train_images == image).flatten(1).all(1).nonzero().flatten()
        assert len(same) == 1 and labels.labels[same[0]] == label  # a real image with its observed label
    assert found["random"]["iterations"] == 0 and found["random"]["best_iteration"] == 0
    assert found["oracle"]["split"]["precision"] == 1.0 and found["noisy"]["split"] is None
    assert not torch.equal(random.images, SyntheticSet.load(tmp_path / "noisy" / "synthetic.safetensors").images)


def test_results_hold_what_the_reports_read(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, eval_network="convnet,mlp", eval_runs=2)
    found = run(config, "tad", tmp_path)
    assert {
        "arm", "baseline", "dataset", "ipc", "noise", "seed", "accuracy", "seconds_per_iteration", "scoring_seconds",
        "peak_memory_bytes", "split", "versions", "command",
    } <= set(found)  # fmt: skip
    assert found["noise"]["kind"] == "symmetric" and found["noise"]["rate"] == 0.4 and found["noise"]["seed"] == 0
    accuracy = found["accuracy"]
    assert len(accuracy["last"]) == len(accuracy["best"]) == 2 and len(accuracy["networks"]["mlp"]["last"]) == 2
    assert all(0 <= a <= 100 for a in accuracy["last"] + accuracy["best"])
    assert found["scoring_seconds"] > 0 and found["seconds_per_iteration"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["arm"] == "tad"
    records = RunFolder(tmp_path).records()
    assert [r["iteration"] for r in records if r["event"] == "iteration"] == [1, 2, 3]
    assert {"round", "split", "iteration", "chosen"} == {r["event"] for r in records}


def test_the_best_iterate_is_chosen_on_held_out_images_with_observed_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = experiment.evaluate, []

    def watched(synthetic: Any, on: Any, *args: Any, **more: Any) -> Any:
        result = original(synthetic, on, *args, **more)
        seen.append((on, synthetic.images, result.accuracies[0]))
        return result

    monkeypatch.setattr(experiment, "evaluate", watched)
    config = dataclasses.replace(SMALL, holdout=0.3, eval_runs=1)
    found = run(config, "noisy", tmp_path)
    splits, _, held = load_noisy(resolve(config, "noisy"))
    choosing = [s for s in seen if len(s[0][1]) == len(splits.holdout_labels)]
    testing = [s for s in seen if len(s[0][1]) == len(splits.test_labels)]
    assert held is not None and len(choosing) == 3 and len(choosing) + len(testing) == len(seen)
    for (images, labels), _, _ in choosing:
        assert torch.equal(images, splits.holdout_images) and torch.equal(labels, held.labels)
    for (images, labels), _, _ in testing:
        assert torch.equal(images, splits.test_images) and torch.equal(labels, splits.test_labels)
    best = max(range(3), key=lambda i: (choosing[i][2], i))
    assert found["best_iteration"] == best + 1
    assert any(torch.equal(choosing[best][1], s[1]) and s[2] == found["accuracy"]["best"][0] for s in testing)


def test_without_held_out_images_the_last_iterate_counts(tmp_path: Path) -> None:
    found = run(dataclasses.replace(SMALL, holdout=0.0), "noisy", tmp_path)
    assert found["best_iteration"] == 3 and found["accuracy"]["best"] == found["accuracy"]["last"]


def test_a_run_touches_no_global_generator(tmp_path: Path, global_rng_untouched: None) -> None:
    run(SMALL, "tad", tmp_path)


def test_the_kept_synthetic_set_is_the_last_iterate_with_its_statistics(tmp_path: Path) -> None:
    run(SMALL, "noisy", tmp_path)
    found = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    assert found.dataset == "digits" and len(found) == 10 and len(found.class_names) == 10
    found.preprocessing.check_same(load_dataset("digits").preprocessing)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10])
def test_candidates_are_evenly_spaced_and_more_than_all_are_all(total: int, tmp_path: Path) -> None:
    for parts in (1, 2, 3, 5, total, total + 1, 4 * total, 2**40):
        config = dataclasses.replace(SMALL, iterations=total, candidates=parts)
        found = experiment.Run(resolve(config, "noisy"), tmp_path)._candidate_iterations()
        exact = {round(total * (k + 1) / parts) for k in range(min(parts, 4 * total))}
        assert set(found) == (exact - {0} if parts <= 4 * total else set(range(1, total + 1)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the mark can only be reset on Linux")
def test_peak_memory_is_measured_anew_for_each_run() -> None:
    block = torch.ones(2**26)  # 256 MiB
    high = peak_memory_bytes()
    del block
    if not reset_peak_memory():
        pytest.skip("this process may not reset it")
    low = peak_memory_bytes()
    assert high is not None and low is not None and low < high - 2**27
