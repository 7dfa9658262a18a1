"""Several runs side by side: which ones, what is kept, and what happens when one fails."""

from __future__ import annotations

import builtins
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.errors import ConfigError, MissingExtraError, TadPluginError, UnknownNameError
from tad_plugin.experiments import launch as module
from tad_plugin.experiments.compare import compare, parse_numbers, parse_seeds, tasks_of
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.launch import Failure
from tad_plugin.experiments.report.pictures import draw_comparison
from tad_plugin.experiments.run import run
from tests.experiments.killed_runs import CONFIG

SMALL = dataclasses.replace(CONFIG, iterations=2, eval_runs=1, candidates=1, checkpoint_seconds=60.0)
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", [0, 1, 2, 3, 4]), ("1", [0]), ("7,8,9", [7, 8, 9]), ("7, 9", [7, 9]), ("7,", [7]), ("0,0", [0, 0])],
)
def test_seeds_are_a_number_or_a_list(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1.5", "1,,", "1,-2", "2147483648"])
def test_other_seeds_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_numbers_name_their_flag() -> None:
    assert parse_numbers("1,10", "ipc") == [1, 10]
    with pytest.raises(ConfigError, match="--ipc.*'ten'"):
        parse_numbers("ten", "ipc")


def test_seeds_come_first_and_each_run_has_a_folder(tmp_path: Path) -> None:
    tasks = tasks_of(SMALL, ["clean", "tad+iwd"], [3, 4], [1, 2], tmp_path)
    assert [(t.config.seed, t.config.ipc, t.arm) for t in tasks] == [
        (s, i, a) for s in (3, 4) for i in (1, 2) for a in ("clean", "tad+iwd")
    ]
    assert tasks[1].folder == tmp_path / "tad+iwd" / "ipc1" / "seed3"
    assert len({t.folder for t in tasks}) == 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arms": ["clean", "nosy"]}, UnknownNameError, "'nosy'.*'noisy'"),
        ({"arms": []}, ConfigError, "--arms"),
        ({"arms": ["tad", "tad"]}, ConfigError, "tad,tad"),
        ({"jobs": 0}, ConfigError, "--jobs"),
        ({"launcher": "slurm"}, ConfigError, "--launcher.*'slurm'"),
        ({"ipcs": [0]}, ConfigError, "ipc"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    change: dict[str, Any], error: type, message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"arms": ["noisy"], "seeds": [0], "ipcs": [1], "out": tmp_path / "out", **change}
    with pytest.raises(error, match=message):
        compare(SMALL, progress=False, **given)
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_its_runs_and_finished_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"arms": ["noisy", "clean"], "ipcs": [1], "out": tmp_path / "out", "progress": False}
    found = compare(SMALL, seeds=[0], **given)
    assert [r["arm"] for r in found] == ["noisy", "clean"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    alone = run(SMALL, "clean", tmp_path / "alone")
    assert alone["accuracy"] == found[1]["accuracy"]
    ran = []
    monkeypatch.setattr(module, "run", lambda *a, **k: ran.append(a[2]) or run(*a, **k))
    shutil.rmtree(tmp_path / "out" / "clean")
    again = compare(SMALL, seeds=[0, 1], **given)
    assert again[0] == found[0] and again[1]["accuracy"] == found[1]["accuracy"] and len(again) == 4 == len(ran)


def failing(config: RunConfig, arm: str, folder: Path, **more: Any) -> dict[str, Any]:
    if arm == "noisy" and config.seed == 1:
        raise ZeroDivisionError("nothing left")
    return run(config, arm, folder, **more)


def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    given: dict[str, Any] = {"arms": ["noisy", "random"], "seeds": [0, 1], "ipcs": [1], "out": out, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(module, "run", failing)
        failures: list[Failure] = []
        found = compare(SMALL, **given, failures=failures)
        assert [(r["arm"], r["seed"]) for r in found] == [("noisy", 0), ("random", 0), ("random", 1)]
        assert [str(f) for f in failures] == ["arm noisy, IPC 1, seed 1: ZeroDivisionError: nothing left"]
        text = (out / "failures.txt").read_text()
        assert "Traceback" in text and "in failing" in text
        with pytest.raises(TadPluginError, match="4 runs.*arm noisy, IPC 1"):
            compare(SMALL, **given)
        assert len(json.loads((out / "results.json").read_text())) == 3
        drawn = draw_comparison(found, tasks_of(SMALL, ["noisy", "random"], [0, 1], [1], out), out)
        assert all(p.is_file() for p in drawn.values())
    assert len(compare(SMALL, **given)) == 4 and not (out / "failures.txt").exists()


def test_runs_side_by_side_give_the_same_accuracies(tmp_path: Path, workers_as_forks: None) -> None:
    """In two processes; a run that cannot be loaded fails alone there too."""
    out = tmp_path / "two"
    (out / "random" / "ipc1" / "seed0").mkdir(parents=True)
    (out / "random" / "ipc1" / "seed0" / "config.yaml").write_text("arm: other\n")
    failures: list[Failure] = []
    given: dict[str, Any] = {"arms": ["noisy", "random"], "seeds": [0], "ipcs": [1], "progress": False}
    found = compare(SMALL, **given, jobs=2, out=out, failures=failures)
    assert [f.task.arm for f in failures] == ["random"] and "arm: there 'other'" in failures[0].message
    assert [r["accuracy"] for r in found] == [run(SMALL, "noisy", tmp_path / "alone")["accuracy"]]


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name in ("ray", "tqdm"):
            raise ImportError(name)
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    given: dict[str, Any] = {"arms": ["random"], "seeds": [0], "ipcs": [1], "out": tmp_path}
    with pytest.raises(MissingExtraError, match=r"'ray'.*tad_plugin\[cluster\]"):
        compare(SMALL, **given, launcher="ray")
    with pytest.raises(MissingExtraError, match="'tqdm'"):
        compare(SMALL, **given)
