"""A grid runs, resumes, isolates failures and writes its report; public scripts run in copies of their checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.cli import main
from tad_plugin.data.sources import RawSplits
from tad_plugin.errors import ConfigError, ResumeError, TadPluginError
from tad_plugin.experiments import launch
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.grid import script_data
from tad_plugin.experiments.grid.runner import prepare_grid, run_grid
from tad_plugin.experiments.grid.scripts import ScriptTask, accuracy_lines, filled_step
from tad_plugin.experiments.grid.spec import read_grid
from tad_plugin.experiments.run import run

TINY = """
question: Does it help?
sizes:
  smoke:
    settings: {dataset: digits, per_class: 20, iterations: 1, eval_epochs: 1, eval_runs: 1, width: 4, candidates: 1}
    noise: ["symmetric:0.4"]
    ipc: [1]
    seeds: [0, 1]
    arms: [noisy, random]
    cells: {dm: {}}
published:
  - {baseline: dm, dataset: cifar10, noise: none, ipc: 10, arm: clean, accuracy: 48.9, source: a <paper>}
"""
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


def test_from_nothing_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(TINY)
    command = ["reproduce", str(file), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--dry_run"]) == 0 and not out.exists()

    def broken(config: RunConfig, arm: str, folder: Path, **more: Any) -> dict[str, Any]:
        if arm == "noisy" and config.seed == 1:
            raise ZeroDivisionError("nothing left")
        return run(config, arm, folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(launch, "run", broken)
        assert main(command) == 1
    assert "nothing left" in (out / "failures.txt").read_text()
    first = json.loads((out / "results.json").read_text())
    assert [(r["arm"], r["seed"], r["cell"], r["way"]) for r in first] == [
        ("noisy", 0, "dm", "bundled"), ("random", 0, "dm", "bundled"), ("random", 1, "dm", "bundled")
    ]  # fmt: skip
    assert main(command) == 0 and not (out / "failures.txt").exists()
    found = json.loads((out / "results.json").read_text())
    assert len(found) == 4 and [r for r in found if (r["arm"], r["seed"]) != ("noisy", 1)] == first
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "| 1 | noisy | 2 |" in text and "48.9" in text
    assert "a &lt;paper&gt;" in page and "data:image/svg+xml" in page and "http" not in page.replace("http-equiv", "")
    (out / "report.md").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.md").read_text() == text
    capsys.readouterr()
    with pytest.raises(ResumeError, match="tiny"):
        other = tmp_path / "other.yaml"
        other.write_text(TINY)
        prepare_grid(read_grid(other), out)
    assert main(["report", str(tmp_path)]) == 2


PRINTS = """
import argparse, pathlib
p = argparse.ArgumentParser()
p.add_argument("--ipc", type=int); p.add_argument("--data"); p.add_argument("--folder")
a = p.parse_args()
from torchvision import datasets
n = len(datasets.CIFAR10(a.data, train=True))
(pathlib.Path(a.folder) / "seen.txt").open("a").write("x")
print(f"Evaluate 2 random ConvNet, mean = 0.{n} std = 0.0100")
"""


def fake_dataset(*_: Any, **__: Any) -> RawSplits:
    labels = torch.arange(10).repeat(5)
    images = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    names = tuple("abcdefghij")
    return RawSplits("fake", names, images, labels, torch.arange(50), None, images[:10], labels[:10])


def test_a_public_script_runs_in_a_copy_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_data, "read_source", fake_dataset)
    checkout = tmp_path / "public"
    checkout.mkdir()
    (checkout / "main.py").write_text(PRINTS)
    config = RunConfig(dataset="folder:x", ipc=3, seed=1)
    task = ScriptTask(
        "clean", config, tmp_path / "run", way="upstream", codebase="public", checkout=checkout, data=tmp_path / "data",
        steps=("main.py --ipc {ipc} --data {data} --folder {folder}",),
    )  # fmt: skip
    found = task.execute(progress=False, overwrite=False)
    assert found["accuracy"] == {"last": [50.0], "best": [50.0]} and found["way"] == "upstream" and found["ipc"] == 3
    assert found["dataset"] == "fake" and sorted(p.name for p in checkout.iterdir()) == ["main.py"]
    assert task.execute(progress=False, overwrite=False) == found
    assert (tmp_path / "run" / "seen.txt").read_text() == "x" and not (tmp_path / "run" / "checkout").exists()
    (checkout / "main.py").write_text(PRINTS + "\n# edited")
    with pytest.raises(ResumeError, match="sources"):
        task.execute(progress=False, overwrite=False)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(TadPluginError, match="status 1"):
        ScriptTask(**{**vars(task), "folder": tmp_path / "second"}).execute(progress=False, overwrite=False)


def test_data_for_scripts_are_of_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script_data, "read_source", fake_dataset)
    assert script_data.write_torchvision(RunConfig(dataset="folder:x"), tmp_path) == "fake"
    with pytest.raises(ConfigError, match="--out"):
        script_data.write_torchvision(RunConfig(dataset="folder:y"), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="32"):
        script_data.write_torchvision(RunConfig(dataset="digits"), tmp_path / "digits")


def test_steps_are_filled_in() -> None:
    places: dict[str, Any] = {"ipc": 3, "seed": 1, "data": Path("/d"), "folder": Path("/a b")}
    words = filled_step("buffer.py --path {folder}/x --ipc={ipc} --name 'two words'", **places)
    assert words == ["buffer.py", "--path", "/a b/x", "--ipc=3", "--name", "two words"]
    for wrong in ("main.py {where}", "main.py 'open", "--ipc 3", ""):
        with pytest.raises(ConfigError):
            filled_step(wrong, **places)


def test_accuracies_are_read_from_what_scripts_print() -> None:
    line = "Evaluate 5 random ConvNet, mean = {} std = 0.0030\n-----\n"
    text = "x\n" + line.format("0.4125") + line.format("41.5")
    assert accuracy_lines(text) == [41.25, 41.5] and accuracy_lines("Evaluate nothing") == []


def test_failures_are_raised_where_nobody_collects_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    prepared = prepare_grid(read_grid(file), tmp_path / "out", given={"device": "cpu"})

    def fails(*_: Any, **__: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(launch, "run", fails)
    with pytest.raises(TadPluginError, match="4 runs"):
        run_grid(prepared, progress=False)
