"""The run folder: configuration, log, checkpoints and results, also after a kill or with damaged files."""

from __future__ import annotations

import enum
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.errors import FileFormatError, InvalidInputError, MissingExtraError, ResumeError, TadPluginWarning
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.utils.files import plain
from tad_plugin.utils.machine import command_line, peak_memory_bytes, versions


class Colour(str, enum.Enum):
    RED = "red"


@dataclass
class Settings:
    rate: float
    where: Path


def test_plain_gives_json_types() -> None:
    value = {
        "d": Settings(0.4, Path("x/y")),
        1: (np.float64(0.5), np.int64(3), np.bool_(True), np.array([[1, 2]])),
        "t": torch.tensor([1.0, 2.0]),
        "scalar": torch.tensor(4),
        "set": {"b", "a"},
        "enum": Colour.RED,
        "dtype": torch.float32,
        "none": None,
    }
    expected = {
        "d": {"rate": 0.4, "where": "x/y"},
        "1": [0.5, 3, True, [[1, 2]]],
        "t": [1.0, 2.0],
        "scalar": 4,
        "set": ["a", "b"],
        "enum": "red",
        "dtype": "torch.float32",
        "none": None,
    }
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value))) == expected
    assert type(plain(np.float64(0.5))) is float and type(plain(Colour.RED)) is str


# configuration


CONFIG = {"arm": "tad", "distill": {"lr": 1e-5, "steps": 20, "shape": (1, 8)}, "note": "ä: 'x'", "nan": float("nan")}


def test_config_is_written_once_and_the_same_one_resumes(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run").write_config(CONFIG)
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert RunFolder(tmp_path / "run").write_config(CONFIG)["distill"] == first["distill"]
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == text
    assert first["distill"] == {"lr": 1e-5, "steps": 20, "shape": [1, 8]}
    assert RunFolder(tmp_path / "run").config()["note"] == "ä: 'x'"


def test_another_config_is_refused_with_every_differing_key(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(CONFIG)
    other = {"arm": "noisy", "distill": {"lr": 1e-5, "steps": 30, "shape": (1, 8), "new": True}, "nan": float("nan")}
    with pytest.raises(ResumeError) as caught:
        RunFolder(tmp_path).write_config(other)
    message = str(caught.value)
    assert "4 keys" in message
    assert "arm: there 'tad', now 'noisy'" in message
    assert "distill.steps: there 20, now 30" in message
    assert "distill.new: there '(not set)', now True" in message
    assert "note: there \"ä: 'x'\", now '(not set)'" in message
    assert "distill.lr" not in message and "nan" not in message
    assert "--out" in message and "--overwrite" in message
    assert RunFolder(tmp_path).config()["arm"] == "tad"


def test_ignored_keys_may_differ_on_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config({"jobs": 1, "steps": 5})
    assert RunFolder(tmp_path).write_config({"jobs": 2, "steps": 5}, ignore=["jobs"])["jobs"] == 2
    with pytest.raises(ResumeError, match="steps: there 5, now 6"):
        RunFolder(tmp_path).write_config({"jobs": 2, "steps": 6}, ignore=["jobs"])


def test_true_and_one_are_different_settings(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config({"zca": True})
    with pytest.raises(ResumeError, match="zca: there True, now 1"):
        RunFolder(tmp_path).write_config({"zca": 1})


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\x00"])
def test_a_corrupt_config_is_a_named_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FileFormatError, match=r"config\.yaml"):
        RunFolder(tmp_path).write_config(CONFIG)


def test_without_yaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"tad_plugin\[reproduce\]"):
        RunFolder(tmp_path).write_config(CONFIG)


def test_a_file_in_the_place_of_the_folder_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(InvalidInputError), RunFolder(path).claimed():
            pass
    for path in ("", " ", "a\0b"):
        with pytest.raises(InvalidInputError, match="--out"):
            RunFolder(path)


# log


def test_records_come_back_in_order_and_an_unfinished_line_does_not_count(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.records() == []
    run.log({"step": 1, "loss": torch.tensor(0.5)})
    run.log({"step": 2, "text": "two\nlines"})
    with open(run.log_path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert run.records() == [{"step": 1, "loss": 0.5}, {"step": 2, "text": "two\nlines"}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_path.write_bytes(b'{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(FileFormatError, match="line 2"):
        run.records()


# results


def test_results_make_a_run_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.is_done()
    with pytest.raises(FileFormatError, match=r"results\.json"):
        run.results()
    run.write_results({"accuracy": {"last": [np.float32(50.0)]}, "split": None})
    found = RunFolder(tmp_path).results()
    assert run.is_done() and "seal" not in found
    assert found == {"accuracy": {"last": [50.0]}, "split": None}
    run.results_path.write_text("[1]")
    with pytest.raises(FileFormatError, match="list"):
        run.results()


def test_overwrite_removes_the_run_but_not_other_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config({"a": 1})
    run.log({"x": 1})
    run.save_checkpoint({"x": 1}, 1)
    run.write_results({})
    (tmp_path / "picture.png").write_bytes(b"p")
    fresh = RunFolder(tmp_path, overwrite=True)
    assert fresh.write_config({"a": 2}) == {"a": 2}
    assert fresh.load_checkpoint() is None and fresh.records() == [] and not fresh.is_done()
    assert (tmp_path / "picture.png").exists()


# checkpoints and the log together


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.log({"step": step})
        if step in (2, 4):
            run.save_checkpoint({"step": step}, step)
    resumed = RunFolder(tmp_path)
    assert resumed.load_checkpoint() == ({"step": 4}, 4)
    resumed.log({"step": 5, "again": True})
    assert [r["step"] for r in resumed.records()] == [1, 2, 3, 4, 5] and resumed.records()[-1]["again"]


def test_a_run_without_checkpoint_starts_its_log_over_unless_it_is_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"step": 1})
    assert run.load_checkpoint() is None and run.records() == []
    run.log({"step": 1})
    run.write_results({})
    assert RunFolder(tmp_path).load_checkpoint() is None and run.records() == [{"step": 1}]


def test_a_log_that_is_shorter_than_recorded_is_reported(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"step": 1})
    run.save_checkpoint({}, 1)
    run.log_path.write_bytes(b"")
    with pytest.warns(TadPluginWarning, match="log.jsonl"):
        assert run.load_checkpoint() == ({}, 1)


# environment


def test_versions_name_what_figures_depend_on() -> None:
    found = versions()
    assert set(found) == {"python", "torch", "torchvision", "numpy", "tad_plugin", "platform", "device"}
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_peak_memory_counts_bytes_of_this_process() -> None:
    before = peak_memory_bytes()
    assert before is not None and before > 20 * 2**20  # torch alone takes more
    block = np.ones(2**26, dtype=np.uint8)  # touches 64 MiB
    after = peak_memory_bytes()
    assert block.sum() == 2**26 and after is not None and before <= after < 2**40


def test_command_line_is_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tad-plugin", "compare", "--out", "a b"])
    assert command_line() == "tad-plugin compare --out 'a b'"


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    tree: dict[str, Any] = {"x": torch.arange(3)}
    run.save_checkpoint(tree, 3)
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = RunFolder(tmp_path / "b").load_checkpoint()
    assert found is not None and torch.equal(found[0]["x"], tree["x"])
