"""A run folder belongs to one process at a time, and a finished run is trusted only if it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import tad_plugin.experiments.run as experiment
from tad_plugin.errors import (
    ConfigError,
    FileFormatError,
    FolderInUseError,
    NotEnoughSamplesError,
    ResumeError,
    TadPluginWarning,
)
from tad_plugin.experiments.compare import compare
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.lock import claimed_folder
from tad_plugin.experiments.run import run
from tests.experiments.killed_runs import CONFIG
from tests.processes import wait_until
from tests.warm import start_program

SMALL = dataclasses.replace(CONFIG, iterations=2, eval_runs=1, candidates=1, checkpoint_seconds=60.0)
HOLD = """
import sys, time
from pathlib import Path
from tad_plugin.experiments.lock import claimed_folder
with claimed_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


# one process at a time


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = start_program("tests.warm", HOLD, str(tmp_path / "run"), output=tmp_path / "output")
    wait_until(lambda: (tmp_path / "output").exists() and (tmp_path / "output").read_text(), 60)
    assert (tmp_path / "output").read_text() == "held\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_in_use_is_refused_with_the_process_and_a_killed_one_holds_nothing(
    holder: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for start in (
        lambda: run(SMALL, "noisy", folder),
        lambda: run(SMALL, "noisy", folder, overwrite=True),
        lambda: compare(SMALL, arms=["noisy"], seeds=[0], ipcs=[1], out=folder, progress=False),
    ):
        with pytest.raises(FolderInUseError, match=f"process {holder.pid} "):
            start()
    assert sorted(p.name for p in folder.iterdir()) == [".lock", ".lock.pid"]
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run(SMALL, "noisy", folder)["arm"] == "noisy"
    assert not (folder / ".lock.pid").exists()


def test_a_claim_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c" / ".lock").exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), claimed_folder(tmp_path / "mine" / "c"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


# a failed command


def test_a_failed_first_command_does_not_make_the_second_fail(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSamplesError):  # found after the configuration was written
        run(dataclasses.replace(SMALL, ipc=40), "noisy", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run(SMALL, "noisy", tmp_path / "run")["ipc"] == 1


def test_what_resumes_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(experiment, "evaluate", stopped)
        run(dataclasses.replace(SMALL, checkpoint_seconds=0.0), "noisy", tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists() and list((tmp_path / "run" / "checkpoint").glob("*.json"))
    with pytest.raises(ResumeError):
        run(dataclasses.replace(SMALL, seed=1), "noisy", tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists()


# a finished run


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("synthetic.safetensors", "state.safetensors")}


def lose(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def swap(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder.parent / "other" / name).read_bytes())


@pytest.mark.parametrize("harm", [lose, cut, swap])
@pytest.mark.parametrize("name", ["synthetic.safetensors", "state.safetensors", "results.json"])
def test_a_finished_run_that_is_not_whole_is_repaired(harm: Any, name: str, tmp_path: Path) -> None:
    first = run(SMALL, "noisy", tmp_path / "run")
    run(dataclasses.replace(SMALL, seed=1), "noisy", tmp_path / "other")
    before = contents(tmp_path / "run")
    assert set(first["files"]) == set(before) and {first[k] for k in ("arm", "dataset")} == {"noisy", "digits"}
    harm(tmp_path / "run", name)
    if (harm, name) == (lose, "results.json"):  # that is a run that is not finished
        again = run(SMALL, "noisy", tmp_path / "run")
    else:
        with pytest.warns(TadPluginWarning, match=name.split(".")[0]):
            again = run(SMALL, "noisy", tmp_path / "run")
    assert contents(tmp_path / "run") == before and again["accuracy"] == first["accuracy"] and again["seed"] == 0
    assert run(SMALL, "noisy", tmp_path / "run") == again


def test_a_lost_configuration(tmp_path: Path) -> None:
    first = run(SMALL, "noisy", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ResumeError, match="config.yaml"):
        run(dataclasses.replace(SMALL, width=5), "noisy", tmp_path / "run")
    assert run(SMALL, "noisy", tmp_path / "run") == first and (tmp_path / "run" / "config.yaml").exists()


def test_every_changed_digit_of_the_results_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_results({"accuracy": {"last": [81.0]}})
    text = folder.results_path.read_text()
    folder.results_path.write_text(text.replace("81.0", "91.0"))
    with pytest.raises(FileFormatError):
        folder.results()


def test_results_and_log_are_strict_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_results({"split": {"auc": float("nan")}, "a": [float("inf"), -float("inf"), 1.0]})
    folder.log({"auc": float("nan")})

    def refuse(word: str) -> None:
        raise ValueError(word)

    for text in (folder.results_path.read_text(), folder.log_path.read_text()):
        json.loads(text, parse_constant=refuse)
    assert folder.results()["split"] == {"auc": None} and folder.results()["a"] == [None, None, 1.0]
    assert folder.records() == [{"auc": None}]


def test_labels_without_human_noise_are_refused(tmp_path: Path) -> None:
    for noise in ("none", "symmetric:0.4", "human:worse@path=a.npz"):
        with pytest.raises(ConfigError, match="labels|label file"):
            run(dataclasses.replace(SMALL, noise=noise, labels="b.npz"), "noisy", tmp_path / "run")
    assert not list(tmp_path.iterdir())
