"""A folder without test images: accuracy is null, and a held-out part of the training data tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tad_plugin.cli import main
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.splits import class_members
from tad_plugin.experiments.folder import RunFolder
from tests.data.files import png, write

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
TINY = [
    "--iterations", "2", "--eval_epochs", "3", "--eval_runs", "2", "--width", "4", "--ipc", "1", "--holdout", "0.25",
    "--loop.batch_real", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of 12 images each; no test/ and no val/."""
    generator = np.random.default_rng(0)
    files = {}
    for c in range(3):
        for i in range(12):
            image = generator.integers(0, 90, (8, 8), dtype=np.uint8)
            image[:, 2 * c : 2 * c + 3] += 150
            files[f"train/class{c}/{i}.png"] = png(image)
    return f"folder:{write(tmp_path_factory.mktemp('own') / 'photos', files)}"


def test_the_data_say_that_there_are_no_test_images(photos: str) -> None:
    splits = load_dataset(photos, holdout=0.25)
    assert not splits.tested and tuple(splits.test_images.shape) == (0, *splits.shape)
    assert [len(m) for m in class_members(splits.holdout_labels, 3)] == [3, 3, 3]
    assert "0 test images" in splits.summary()


def test_distill_tells_the_accuracy_on_held_out_images(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["distill", *TINY, "--dataset", photos, "--arm", "noisy", "--noise", "symmetric:0.4"]
    assert main([*command, "--out", str(run)]) == 0
    found = json.loads((run / "results.json").read_text())
    assert found["accuracy"] == {"last": None, "best": None}
    assert found["heldout"]["samples"] == 9 and found["heldout"]["labels"] == "observed"
    assert len(found["heldout"]["last"]) == 2 and all(0 <= value <= 100 for value in found["heldout"]["last"])
    text = capsys.readouterr().out
    assert "held out" in text.splitlines()[2] and "observed labels, which may be wrong" in text
    assert " last " not in text.splitlines()[2]
    assert main([*command, "--out", str(run)]) == 0  # a finished run is read
    assert main(["evaluate", str(run / "synthetic.safetensors"), "--dataset", photos]) == 2
    assert "heldout" in capsys.readouterr().err


def test_clean_labels_count_where_the_arm_sees_them(photos: str, tmp_path: Path) -> None:
    for noise, labels in (("symmetric:0.4", "true"), ("none", "observed")):
        out = tmp_path / labels
        command = ["distill", *TINY, "--dataset", photos, "--arm", "clean", "--noise", noise]
        assert main([*command, "--out", str(out)]) == 0
        assert RunFolder(out).results()["heldout"]["labels"] == labels


def test_with_nothing_held_out_no_accuracy_is_known_and_that_is_said(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", *TINY, "--dataset", photos, "--arm", "noisy", "--holdout", "0"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    found = RunFolder(tmp_path / "run").results()
    assert found["accuracy"] == {"last": None, "best": None} and found["heldout"] is None
    assert "no accuracy is known" in capsys.readouterr().out


def test_compare_and_its_page(photos: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    out = tmp_path / "all"
    command = ["compare", *TINY, "--dataset", photos, "--noise", "symmetric:0.4", "--arms", "noisy,random"]
    assert main([*command, "--seeds", "2", "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    assert "held out" in page and "Accuracy by arm" not in page
    header = next(line for line in (out / "table.md").read_text().splitlines() if line.startswith("| IPC"))
    assert "held out" in header and "last" not in header


def test_experts_are_tested_on_held_out_images(photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["experts", "--dataset", photos, "--width", "4", "--experts", "1", "--epochs", "1", "--arm", "noisy"]
    assert main([*command, "--out", str(tmp_path / "e")]) == 0
    found = RunFolder(tmp_path / "e").results()
    assert found["accuracy"] == {"experts": None} and len(found["heldout"]["experts"]) == 1
    assert "held-out images by their observed labels" in capsys.readouterr().out
    assert main([*command, "--holdout", "0", "--out", str(tmp_path / "f")]) == 0
    assert "not known" in capsys.readouterr().out
