"""``tad-plugin export``: finds the set of a run, and load.py trains as its evaluation did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tad_plugin.cli import main
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import FileFormatError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.export_run import find_synthetic
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import resolve


def finished(folder: Path) -> Path:
    """What export reads of a finished run of DATM, which trains its networks in batches of 128."""
    folder.mkdir(parents=True)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    SyntheticSet(images, torch.tensor([0, 1]), 2, Preprocessing((0.3,), (0.4,)), "digits", ("a", "b")).save(
        folder / "synthetic.safetensors"
    )
    config = RunConfig(baseline="datm", width=4, eval_epochs=7, eval_lr=0.03, ipc=1)
    RunFolder(folder).write_config(resolve(config, "noisy").record)
    return folder


def training(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "set.json").read_text())["training"]
    return found


def test_a_run_is_exported_with_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run")
    assert main(["export", str(run), "--to", str(tmp_path / "e"), "--format", "npz"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "e")
    expected = {"width": 4, "depth": 2, "epochs": 7, "batch_size": 128, "lr": 0.03, "momentum": 0.9}
    assert training(tmp_path / "e") == {**expected, "weight_decay": 5e-4}
    assert main(["export", str(run), "--to", str(tmp_path / "e")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (run / "config.yaml").unlink()  # the file of a set alone
    file = str(run / "synthetic.safetensors")
    assert main(["export", file, "--to", str(tmp_path / "e"), "--overwrite"]) == 0
    assert training(tmp_path / "e")["epochs"] == 1000 and (tmp_path / "e" / "a" / "0000.png").exists()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="nothing at"):
        find_synthetic(tmp_path / "absent")
    run = finished(tmp_path / "all" / "tad" / "ipc1" / "seed0")
    with pytest.raises(FileFormatError, match="ipc1"):  # the folder of a comparison: one of its runs is suggested
        find_synthetic(tmp_path / "all")
    assert find_synthetic(run) == run / "synthetic.safetensors"
