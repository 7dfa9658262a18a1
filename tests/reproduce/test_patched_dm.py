"""The outputs of reproduce/patched_dm.py: files that torchvision reads in order, and summary tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tad_plugin.data.sources import RawSplits
from tad_plugin.errors import InvalidInputError
from tad_plugin.upstream.stand_ins import any_checksum
from tests import ROOT


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = ROOT / "reproduce" / "patched_dm.py"
    spec = importlib.util.spec_from_file_location("patched_dm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_hold_the_images_in_their_order(study: ModuleType, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8, generator=g)
    labels = torch.arange(23) % 10
    names = tuple("abcdefghij")
    raw = RawSplits("folder:x", names, images, labels, torch.arange(23), None, images[:4], labels[:4])
    study.torchvision_folder(raw, tmp_path)
    with any_checksum():
        train, test = (CIFAR10(str(tmp_path), train=part) for part in (True, False))
    assert train.targets == labels.tolist() and tuple(train.classes) == names
    assert torch.equal(torch.from_numpy(train.data).permute(0, 3, 1, 2), images)
    assert torch.equal(torch.from_numpy(test.data).permute(0, 3, 1, 2), images[:4])


def test_the_summary_compares_arms_and_sides_seed_by_seed(study: ModuleType) -> None:
    found = {("noisy", 0): 25.0, ("noisy", 1): 26.0, ("tad", 0): 37.0, ("tad", 1): 39.0}

    def result(baseline: str, arm: str, seed: int, accuracy: float) -> dict[str, Any]:
        noise = {"kind": "symmetric", "rate": 0.4, "seed": seed}
        shared = {"arm": arm, "baseline": baseline, "dataset": "folder:x", "noise": noise, "ipc": 10, "seed": seed}
        return {**shared, "accuracy": {"last": [accuracy - 1, accuracy + 1]}}

    results = [result("dm", arm, seed, value) for (arm, seed), value in found.items()]
    results += [result(study.SCRIPT, arm, seed, value + seed) for (arm, seed), value in found.items()]
    text = study.summary(results)
    assert "bundled loop: TAD +12.5 points (seed by seed 25.0 -> 37.0, 26.0 -> 39.0)" in text
    assert "- noisy: script minus bundled loop +0.5 points (+0.0, +1.0)" in text
    assert "TAD" in study.summary(results[:4]) and "minus" not in study.summary(results[:4])


def test_the_accuracies_of_the_script_are_read_or_the_study_does_not_start(study: ModuleType, tmp_path: Path) -> None:
    content = {"data": [[torch.zeros(2)]], "accs_all_exps": {"ConvNet": [np.float64(0.25), np.float64(0.5)]}}
    torch.save(content, tmp_path / "res.pt")
    if hasattr(torch.serialization, "safe_globals"):
        study.check_torch()
        assert study.script_accuracies(tmp_path / "res.pt") == [0.25, 0.5]
    else:
        with pytest.raises(InvalidInputError):
            study.check_torch()
