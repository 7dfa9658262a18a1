"""Grid files: what they expand to, and mistakes that are named before anything runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tad_plugin.errors import ConfigError, DiskSpaceError, FileFormatError, PatchError, TadPluginError, UnknownNameError
from tad_plugin.experiments.grid import checks
from tad_plugin.experiments.grid.conventions import resolve_noise
from tad_plugin.experiments.grid.runner import prepare_grid
from tad_plugin.experiments.grid.scripts import ScriptTask
from tad_plugin.experiments.grid.spec import SIZES, read_grid
from tests import ROOT

GRID: dict[str, Any] = {
    "question": "Does it help?",
    "sizes": {
        "smoke": {
            "settings": {"dataset": "digits", "iterations": 2},
            "noise": ["symmetric:0.4", "rdc:asymmetric:0.2"],
            "ipc": [1, 2],
            "seeds": [3, 4],
            "arms": ["clean", "tad"],
            "cells": {"dm": {}, "dc": {"ipc": [1], "noise": "pair:0.4", "settings": {"baseline": "dc"}}},
        }
    },
}


def written(folder: Path, *path: str, value: Any = None, content: Any = None) -> Path:
    """A file with GRID, in which ``value`` stands at ``path``."""
    grid = copy.deepcopy(GRID) if content is None else content
    place = grid
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return file


def test_a_grid_is_its_runs_seed_by_seed(tmp_path: Path) -> None:
    prepared = prepare_grid(read_grid(written(tmp_path)), tmp_path / "out", given={"device": "cpu"})
    runs = [(t.config.seed, t.config.baseline, t.config.noise, t.config.ipc, t.arm) for t in prepared.tasks]
    expected = [
        (seed, *setting, arm)
        for seed in (3, 4)
        for setting in (
            ("dm", "symmetric:0.4", 1), ("dm", "symmetric:0.4", 2), ("dm", "pair:0.2", 1), ("dm", "pair:0.2", 2),
            ("dc", "pair:0.4", 1),
        )
        for arm in ("clean", "tad")
    ]  # fmt: skip
    assert runs == expected
    assert len({t.folder for t in prepared.tasks}) == len(runs) == len(prepared.left)
    assert {t.config.iterations for t in prepared.tasks} == {2} and not (tmp_path / "out").exists()
    assert prepared.minutes() is None


def test_minutes_come_from_the_grid_until_runs_are_measured(tmp_path: Path) -> None:
    file = written(tmp_path, "sizes", "smoke", "minutes", value=0.5)
    prepared = prepare_grid(read_grid(file), tmp_path / "out")
    assert prepared.minutes() == 0.5 * 20
    for name in ("config.yaml", "results.json"):
        prepared.tasks[0].folder.mkdir(parents=True, exist_ok=True)
        (prepared.tasks[0].folder / name).write_text("{}")
    assert prepared.minutes() == pytest.approx(0.5 * 4, abs=0.01) and len(prepared.left) == 19
    assert "20 runs" not in prepared.describe() and "19 runs left" in prepared.describe()


SMOKE = ("sizes", "smoke")


@pytest.mark.parametrize(
    ("path", "value", "error", "named"),
    [
        ((*SMOKE, "arms"), ["clean", "tda"], UnknownNameError, "tda.*tad"),
        ((*SMOKE, "arsm"), ["clean"], UnknownNameError, "arsm.*arms"),
        ((*SMOKE, "settings"), {"iteration": 2}, UnknownNameError, "iteration.*iterations"),
        ((*SMOKE, "settings"), {"dataset": "cifar11"}, UnknownNameError, "cifar11"),
        ((*SMOKE, "settings"), {"dataset": "folder:/absent"}, ConfigError, "/absent"),
        ((*SMOKE, "settings"), {"dataset": "folder:{images}"}, ConfigError, "--images"),
        ((*SMOKE, "settings"), {"width": -1}, ConfigError, "width"),
        ((*SMOKE, "seeds"), [0, 0], ConfigError, "seeds"),
        ((*SMOKE, "ipc"), ["1"], ConfigError, "ipc"),
        ((*SMOKE, "noise"), ["symetric:0.4"], TadPluginError, "symetric"),
        ((*SMOKE, "noise"), ["rdc:flip:0.4"], UnknownNameError, "flip"),
        ((*SMOKE, "minutes"), 0, ConfigError, "minutes"),
        ((*SMOKE, "cells"), {}, ConfigError, "cell"),
        ((*SMOKE, "cells"), {"../dm": {}}, ConfigError, "cells"),
        ((*SMOKE, "cells"), {"dm": {"ways": ["bundeled"]}}, UnknownNameError, "bundled"),
        ((*SMOKE, "cells"), {"dm": {"ways": ["upstream"]}}, ConfigError, "checkout"),
        ((*SMOKE, "cells"), {"dm": {"checkout": "dm", "steps": ["main_DM.py"]}}, ConfigError, "ways"),
        ((*SMOKE, "cells"), {"dm": {"ways": "upstream", "checkout": "dm", "steps": ["a.py"]}}, ConfigError, "dm=PATH"),
        (("question",), "", ConfigError, "question"),
        (("published",), [{"baseline": "dm"}], ConfigError, "accuracy"),
        (("sizes",), {"big": {}}, UnknownNameError, "big"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    path: tuple[str, ...], value: Any, error: type, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAD_UPSTREAM_DM", raising=False)
    file = written(tmp_path, *path, value=value)
    with pytest.raises(error, match=named):
        prepare_grid(read_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="smoke"):
        read_grid(written(tmp_path), "smok")
    with pytest.raises(ConfigError, match="full"):
        read_grid(written(tmp_path), "full")
    with pytest.raises(FileFormatError):
        read_grid(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError):
        read_grid(written(tmp_path, content=["a"]))


def test_checkouts(tmp_path: Path) -> None:
    cell = {"ways": ["upstream", "patched"], "checkout": "dm", "steps": ["main_DM.py --ipc {ipc}"]}
    grid = read_grid(written(tmp_path, *SMOKE, "cells", value={"public": cell}))
    assert checks.find_checkouts(grid, "", {"TAD_UPSTREAM_DM": str(tmp_path)}) == {"dm": tmp_path}
    assert checks.find_checkouts(grid, f"dm={tmp_path}", {}) == {"dm": tmp_path}
    for given in ("", "dm", "dm=/absent", f"dm={tmp_path},mtt={tmp_path}"):
        with pytest.raises(ConfigError):
            checks.find_checkouts(grid, given, {})
    with pytest.raises(PatchError, match="main_DM.py"):
        prepare_grid(grid, tmp_path / "out", checkouts=f"dm={tmp_path}")


def test_an_unmodified_script_has_one_arm_and_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"ways": ["upstream", "patched"], "checkout": "dm", "steps": ["main_DM.py"], "ipc": [1], "seeds": [0]}
    grid = read_grid(written(tmp_path, *SMOKE, "cells", value={"public": cell}))
    monkeypatch.setattr(checks, "_check_scripts", lambda *_: None)
    tasks = prepare_grid(grid, tmp_path / "out", checkouts=f"dm={tmp_path}").tasks
    assert all(isinstance(t, ScriptTask) for t in tasks)
    upstream = [t for t in tasks if isinstance(t, ScriptTask) and t.way == "upstream"]
    assert [(t.arm, t.config.noise) for t in upstream] == [("clean", "none")] and len(tasks) == 5


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskSpaceError, match="MiB"):
        prepare_grid(read_grid(written(tmp_path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("rdc:asymmetric:0.4", "pair:0.4"),
        ("rdc:symmetric:0.4", "symmetric:0.4"),
        ("rdc:human:worse", "human:worse"),
        ("dd_lnl:pairflip:0.4", "asymmetric:0.4"),
        ("asymmetric:0.4", "asymmetric:0.4"),
        ("none", "none"),
    ],
)
def test_noise_by_the_name_that_other_projects_give_it(text: str, ours: str) -> None:
    assert resolve_noise(text) == ours


@pytest.mark.parametrize("path", sorted((ROOT / "reproduce").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_grids_of_this_project_are_whole(path: Path, tmp_path: Path) -> None:
    """All three sizes are read, and every bundled run has settings that are valid."""
    images = tmp_path / "images"
    images.mkdir()
    for size in SIZES:
        grid = read_grid(path, size, str(images))
        names = {cell.checkout for cell in grid.cells if cell.checkout}
        tasks = checks_only(grid, tmp_path, names)
        assert tasks and all(cell.minutes for cell in grid.cells if size == "smoke")


def checks_only(grid: Any, out: Path, names: set[str]) -> list[Any]:
    from tad_plugin.experiments.grid.tasks import grid_tasks
    from tad_plugin.experiments.plan import resolve

    tasks = grid_tasks(grid, out, {"device": "cpu"}, dict.fromkeys(names, out))
    chosen: dict[Any, Any] = {}
    for task in tasks:  # each arm and each cell once: a plan takes milliseconds, a grid has hundreds of runs
        chosen.setdefault(("arm", task.arm), task)
        chosen.setdefault(("cell", task.folder.relative_to(out / "runs").parts[0], task.config.ipc), task)
    for task in {id(task): task for task in chosen.values()}.values():
        resolve(task.config, task.arm)
    return tasks
