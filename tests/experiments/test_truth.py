"""What is known of the truth: folders whose labels may be wrong, sets of other data, and doubtful results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tad_plugin.cli import main
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.image_range import out_of_range, spread_of
from tad_plugin.errors import ConfigError, InvalidInputError, PreprocessingMismatchError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.doubts import at_chance, doubt_lines
from tad_plugin.experiments.loading import load_test, truth_known
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tests.experiments.killed_runs import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
SMALL = dataclasses.replace(
    CONFIG, per_class=0, noise="none", iterations=1, eval_runs=1, candidates=1, checkpoint_seconds=60.0, holdout=0.0
)


def images(
    top: Path, names: tuple[str, ...] = ("ape", "bee"), *, seed: int = 0, size: int = 8, mode: str = "L"
) -> Path:
    numbers = np.random.default_rng(seed)
    for part, count in (("train", 12), ("test", 4)):
        for name in names:
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = numbers.integers(0, 256, (size, size) if mode == "L" else (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels, mode).save(top / part / name / f"{i}.png")
    return top


def config(top: Path, **more: Any) -> RunConfig:
    return dataclasses.replace(SMALL, dataset=f"folder:{top}", **more)


# truth


def test_a_division_is_judged_only_where_the_truth_is_known(tmp_path: Path) -> None:
    top = images(tmp_path / "photos")
    unknown = run(config(top), "tad", tmp_path / "unknown")
    assert unknown["split"] is None and unknown["noise"]["realised_rate"] is None
    log = (tmp_path / "unknown" / "log.jsonl").read_text()
    assert "precision" not in log and "NaN" not in log
    known = run(config(top, noise="symmetric:0.4"), "tad", tmp_path / "known")
    assert 0 <= known["split"]["precision"] <= 1 and known["noise"]["realised_rate"] > 0
    with pytest.raises(ConfigError, match="oracle"):
        run(config(top), "oracle", tmp_path / "oracle")
    assert not (tmp_path / "oracle").exists()


def test_which_labels_are_known_to_be_true(tmp_path: Path) -> None:
    (tmp_path / "with.csv").write_text("path,clean,mine\ntrain/ape/0.png,ape,bee\n")
    (tmp_path / "without.csv").write_text("path,mine\ntrain/ape/0.png,bee\n")
    for dataset, noise, labels, known in (
        ("digits", "none", "", True),
        ("folder:x", "none", "", False),
        ("folder:x", "pair:0.1", "", True),
        ("folder:x", "human:worse", "any.npz", True),
        ("folder:x", "human:mine", str(tmp_path / "with.csv"), True),
        ("folder:x", "human:mine", str(tmp_path / "without.csv"), False),
    ):
        plan = resolve(RunConfig(dataset=dataset, noise=noise, labels=labels), "noisy")
        assert truth_known(plan) is known, (dataset, noise, labels)


# the data of an evaluation


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("distilled")
    run(config(images(top / "photos.v1")), "noisy", top / "run")
    return top


@pytest.mark.parametrize(
    ("name", "more", "error"),
    [
        ("photos.v1", {"names": ("cat", "dog")}, InvalidInputError),
        ("photos.v1", {"names": ("ape", "bee", "cat")}, InvalidInputError),
        ("photos.v1", {"size": 12}, InvalidInputError),
        ("photos.v1", {"mode": "RGB"}, InvalidInputError),
        ("photos.v1", {"seed": 1}, PreprocessingMismatchError),
        ("photos.v2", {}, InvalidInputError),
    ],
)
def test_other_data_are_an_error(distilled: Path, name: str, more: Any, error: type, tmp_path: Path) -> None:
    path = distilled / "run" / "synthetic.safetensors"
    plan = resolve(config(images(tmp_path / name, **more)), "noisy")
    with pytest.raises(error):
        load_test(plan, SyntheticSet.load(path), path)
    flags = ["--dataset", f"folder:{tmp_path / name}", "--eval_epochs", "1", "--eval_runs", "1", "--width", "4"]
    assert main(["evaluate", str(path), *flags]) == 2


def test_the_same_data_at_another_place_are_evaluated(distilled: Path, tmp_path: Path) -> None:
    path = distilled / "run" / "synthetic.safetensors"
    top = images(tmp_path / "photos.v1")
    flags = ["--eval_epochs", "1", "--eval_runs", "1", "--width", "4", "--out", str(tmp_path / "found.json")]
    assert main(["evaluate", str(path), "--dataset", f"folder:{top}", *flags]) == 0
    assert set(json.loads((tmp_path / "found.json").read_text())) == {"convnet"}


def test_images_are_brought_to_a_size(tmp_path: Path) -> None:
    found = run(config(images(tmp_path / "p"), image_size=12), "noisy", tmp_path / "run")
    synthetic = SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert synthetic.images.shape[1:] == (1, 12, 12) and found["ipc"] == 1
    path = tmp_path / "run" / "synthetic.safetensors"
    for size, error in ((None, InvalidInputError), (12, None)):
        plan = resolve(config(tmp_path / "p", image_size=size), "noisy")
        if error is None:
            assert load_test(plan, synthetic, path).shape == (1, 12, 12)
        else:
            with pytest.raises(error):
                load_test(plan, synthetic, path)
    assert "image_size" not in resolve(SMALL, "noisy").record  # folders of earlier versions can be resumed


# doubts


@pytest.mark.parametrize("baseline", ["dm", "dc"])
def test_a_set_out_of_range_is_named(baseline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--per_class", "12", "--iterations", "2", "--eval_epochs", "1", "--eval_runs", "1", "--width", "4"]
    flags += ["--baseline", baseline, "--ipc", "1", "--candidates", "1", "--out", str(tmp_path / "run")]
    assert main(["distill", *flags, "--lr_img", "1e8"]) == 0
    assert "doubtful: arm noisy, IPC 1, seed 0: " in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["doubts"] and doubt_lines([found, {**found, "doubts": []}, {"arm": "of an earlier version"}])


def test_range_and_chance() -> None:
    real = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for times, odd in ((1.0, False), (4.5, False), (6.0, True), (float("nan"), True), (float("inf"), True)):
        assert (out_of_range(real * times, spread_of(real), 1.0, "at the end") is not None) is odd
    labels = torch.tensor([0, 0, 0, 1])
    assert at_chance("mlp", [75.0, 75.0], labels) and at_chance("mlp", [40.0], labels)
    assert at_chance("mlp", [75.0, 76.0], labels) is None
