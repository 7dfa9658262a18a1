"""The audit of an image folder from the command line: from nothing to suspects.csv, killed and resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tad_plugin.cli import main
from tad_plugin.core.scorer import ScorerConfig
from tad_plugin.data.real import RealData
from tad_plugin.errors import ConfigError
from tad_plugin.experiments.audit import audit as module
from tad_plugin.experiments.audit.audit import AuditConfig, audit, judging_methods
from tad_plugin.experiments.audit.cross_fit import cross_fit, draw_folds
from tad_plugin.experiments.config import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
PER_CLASS = 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 8x8 images, bright at the left or at the right, without a test split; every tenth is in the wrong
    class, which its name tells."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for c, name in enumerate(("left", "right")):
        for i in range(PER_CLASS):
            pixels = draw.integers(0, 90, (8, 8))
            pixels[:, 4 * c : 4 * c + 4] += 120
            placed = ("right", "left")[c] if i % 10 == 0 else name
            place = folder / "train" / placed / f"{'wrong' if i % 10 == 0 else 'right'}-{name}-{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    return folder


SMALL = ["--epochs", "6", "--width", "8", "--networks", "1", "--folds", "3", "--device", "cpu"]


def test_from_a_folder_to_suspects_and_a_corrected_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, fixed = tmp_path / "audit", tmp_path / "fixed"
    command = ["audit", "--dataset", f"folder:{photos}", "--out", str(out), *SMALL]
    assert main([*command, "--fix", "copy", "--to", str(fixed)]) == 0
    assert "suspects.csv" in capsys.readouterr().out
    with open(out / "suspects.csv", newline="") as file:
        read = list(csv.DictReader(file))
    wrong = 2 * PER_CLASS // 10
    assert len(read) == 2 * PER_CLASS and all("wrong" in row["path"] for row in read[:wrong])
    assert {row["verdict"] for row in read[:wrong]} <= {"relabel", "drop", "unsure"}
    found = json.loads((out / "summary.json").read_text())
    assert found["samples"] == 2 * PER_CLASS and len(found["transition_matrix"]) == 2
    assert json.loads((out / "results.json").read_text())["quality"] is None  # nobody knows the truth of a folder
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") >= wrong and "http" not in page
    kept = [p for p in fixed.rglob("*.png") if p.name.split("-")[1] != p.parent.name]
    assert not kept and len(list(photos.rglob("*.png"))) == 2 * PER_CLASS


def test_a_killed_audit_goes_on_and_ends_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(dataset=f"folder:{photos}", device="cpu")
    settings = AuditConfig(folds=2, networks=1, rounds=2, scorer=ScorerConfig(epochs=1, width=4))
    whole = audit(config, settings, tmp_path / "whole")
    trained: list[Any] = []
    original = module._PART.write

    def killed(path: Path, *given: Any) -> None:
        trained.append(path)
        original(path, *given)
        if len(trained) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(module._PART), "write", lambda _self, *given: killed(*given))
        with pytest.raises(KeyboardInterrupt):
            audit(config, settings, tmp_path / "killed")
        again = audit(config, settings, tmp_path / "killed")
    assert len(trained) == 4 and torch.equal(again.probabilities, whole.probabilities)
    assert again.rows == whole.rows
    for name in ("suspects.csv", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_sample_is_judged_by_a_network_that_trained_on_it() -> None:
    """Other labels in a fold change no prediction of that fold."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 1, 8, 8, generator=generator), torch.arange(2).repeat(12)
    folds = draw_folds(labels, 2, 2, 0)
    usable = torch.ones(24, dtype=torch.bool)

    def predictions(given: torch.Tensor) -> torch.Tensor:
        return cross_fit(
            RealData(images, given, 2), folds, ScorerConfig(epochs=1, width=4), round=0, networks=1, seed=0,
            usable=usable, once=lambda _part, train: train(),
        )  # fmt: skip

    first, changed = predictions(labels), predictions(torch.where(folds == 0, 1 - labels, labels))
    assert torch.equal(first[folds == 0], changed[folds == 0])
    assert not torch.equal(first[folds == 1], changed[folds == 1])
    assert torch.allclose(first.sum(1), torch.ones(24))


def test_known_noise_is_judged_and_named_methods_are_offered(tmp_path: Path) -> None:
    settings = AuditConfig(folds=2, networks=1, rounds=1, scorer=ScorerConfig(epochs=1, width=4))
    config = RunConfig(dataset="digits", per_class=20, noise="symmetric:0.4", device="cpu")
    found = audit(config, settings, tmp_path / "digits")
    quality = found.results["quality"]
    assert quality["label_accuracy_before"] == pytest.approx(0.6, abs=0.1) and 0 < quality["average_precision"] <= 1
    assert all(row["path"] == "" for row in found.rows)
    assert judging_methods() == ["clean-then-distil", "tad"]
    with pytest.raises(ConfigError, match="tad"):
        audit(config, AuditConfig("iwd"), tmp_path / "iwd")


@pytest.mark.parametrize("flags", [["--to", "x"], ["--fix", "copy"], ["--fix", "copi", "--to", "x"], ["--folds", "1"]])
def test_mistakes_are_named_before_anything_runs(flags: list[str], tmp_path: Path) -> None:
    assert main(["audit", "--dataset", "digits", "--out", str(tmp_path / "out"), *flags]) == 2
    assert not (tmp_path / "out").exists()
