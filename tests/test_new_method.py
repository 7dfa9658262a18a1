"""A new method is one folder of another package: `compare` finds it by its name, and no file of ours is changed."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.warm import start_program

METHOD = '''
"""Halves: a method of somebody else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from tad_plugin import Callback
from tad_plugin.utils.settings import Settings, setting


@dataclass
class HalvesConfig(Settings):
    prefix: ClassVar[str] = "halves."
    every: int = setting(2, at_least=1)


class Normals:
    def density(self, index, grid):
        return torch.stack([0.5 * torch.exp(-((grid - mean) ** 2)) for mean in (0.0, 1.0)], dim=1)


class Halves(Callback):
    """Trusts every n-th sample."""

    name = "halves"
    Config = HalvesConfig

    @classmethod
    def loss_division(cls, state):
        return state["halves_loss"], Normals()

    def on_start(self, *, state, data):
        state.register("halves_loss", torch.arange(len(state)) % self.config.every / 1.0)
        state.update(trusted=state["halves_loss"] == 0)
        self.report("round", trusted=int(state.trusted.sum()))
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package `stranger` that registers one method."""
    package, info = tmp_path / "site" / "stranger", tmp_path / "site" / "stranger-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tad_plugin.methods]\nhalves = stranger:Halves\n")
    return tmp_path / "site"


def tad_plugin(site: Path, *arguments: str) -> tuple[int, str]:
    """Status and output of a process that has the folder on its path."""
    process = start_program("tad_plugin.cli", *arguments, output=site.parent / "output", path=site)
    return process.wait(), process.output.read_text()  # type: ignore[union-attr]


def test_a_method_from_another_package_is_an_arm(site: Path) -> None:
    settings = textwrap.dedent(
        """
        --dataset digits --noise symmetric:0.4 --ipc 1 --seeds 1, --iterations 2 --width 4 --device cpu
        --eval_runs 1 --eval_epochs 1 --candidates 1
        """
    ).split()
    out = site.parent / "out"
    methods = ["--methods", json.dumps({"halves": {"every": 3}})]
    names = "noisy,halves,halves+random"
    status, printed = tad_plugin(site, "compare", *settings, *methods, "--arms", names, "--out", str(out))
    assert status == 0, printed
    results = {r["arm"]: r for r in json.loads((out / "results.json").read_text())}
    assert list(results) == ["noisy", "halves", "halves+random"]
    assert results["noisy"]["split"] is None and 0 < results["halves"]["split"]["recall"] < 0.5
    # its division by loss has a picture, without a line of code here that knows it
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert {"trusted-halves.svg", "losses-halves.svg"} <= pictures and "losses-noisy.svg" not in pictures
    wrong = ["--methods", '{"halves": {"every": 0}}', "--arms", "halves", "--out", str(site.parent / "wrong")]
    status, printed = tad_plugin(site, "compare", *settings, *wrong)
    assert status == 2 and "halves.every" in printed


def test_without_the_package_the_name_is_unknown(site: Path) -> None:
    status, printed = tad_plugin(site.parent, "compare", "--arms", "halves", "--out", str(site.parent / "out"))
    assert status == 2 and "'halves'" in printed
