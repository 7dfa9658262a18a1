"""One changed bit in any file that the package writes is found, or makes no difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tad_plugin.errors import FileFormatError
from tad_plugin.experiments.run import run
from tests.bit_flips import ARMS, CONFIGS, Files

#: files that hold every kind of contents
KINDS = {
    "dm/checkpoint/A.json",
    "dm/config.yaml",
    "dm/log.jsonl",
    "dm/results.json",
    "dm/state.safetensors",
    "dm/synthetic.safetensors",
    "mtt/checkpoint/B.pt",
    "mtt/experts/buffer.json",
    "mtt/experts/checkpoint/A.json",
    "mtt/experts/replay_buffer_0.pt",
    "foreign_buffer.pt",
    "labels.pt",
    "noise.json",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("flips"))


def test_no_flipped_bit_is_read_silently(files: Files, generator: torch.Generator) -> None:
    table = files.read(max(90, 2 * len(files.readers)), generator)
    assert set(table) >= KINDS
    bad = {kind: dict(c) for kind, c in table.items() if c["silent"] or c["internal error"]}
    assert not bad
    # The whole file is under a seal.
    assert set(table["mtt/experts/replay_buffer_0.pt"]) == set(table["dm/log.jsonl"]) == {"found"}


def test_a_stopped_run_with_a_flipped_bit_does_not_end_with_other_results(
    files: Files, generator: torch.Generator
) -> None:
    table = files.resume(3, generator)
    assert sum(c["silent"] + c["internal error"] for c in table.values()) == 0


def test_the_issues_case(files: Files, tmp_path: Path) -> None:
    """A run is killed, a bit of a parameter in its replay buffer changes, and the run goes on."""
    shutil.copytree(files.stopped / "mtt", tmp_path / "mtt")
    path = tmp_path / "mtt" / "experts" / "replay_buffer_0.pt"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FileFormatError, match="replay_buffer_0.pt"):
        run(CONFIGS["mtt"], ARMS["mtt"], tmp_path / "mtt")
