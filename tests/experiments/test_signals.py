"""Real signals to the command line: nothing is left running, the status is right, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.cli import main
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.experts.workers import FOLDER
from tests.processes import BOUND, command, members, wait_until

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning"),
]

COMPARE = [
    "compare",
    "--dataset",
    "digits",
    "--per_class",
    "40",
    "--width",
    "4",
    "--iterations",
    "40",
    "--eval_epochs",
    "2",
    "--eval_runs",
    "1",
    "--ipc",
    "1",
    "--candidates",
    "1",
    "--arms",
    "noisy,clean",
    "--seeds",
    "1",
    "--noise",
    "symmetric:0.4",
    "--pictures",
    "false",
    "--checkpoint_seconds",
    "0.0",
    "--out",
]
EXPERTS = [
    "experts",
    "--dataset",
    "digits",
    "--per_class",
    "40",
    "--width",
    "4",
    "--epochs",
    "8",
    "--batch_train",
    "16",
    "--experts",
    "3",
    "--arm",
    "noisy",
    "--checkpoint_seconds",
    "0.0",
    "--out",
]


def run(*arguments: str) -> int:
    return main(arguments)  # here: packages are imported already


def results(out: Path) -> list[Any]:
    """What a comparison found: accuracies, and the bits of the images."""
    found = json.loads((out / "results.json").read_text())
    images = [SyntheticSet.load(p).images.numpy().tobytes() for p in sorted(out.glob("*/ipc1/*/synthetic.safetensors"))]
    return [*[(r["arm"], r["accuracy"], r["best_iteration"]) for r in found], *images]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("whole")
    assert run(*COMPARE, str(out)) == 0
    found = results(out)
    assert len(found) == 4
    return found


def stopped(
    arguments: list[str],
    under_way: str,
    number: int,
    to_group: bool,
    count: int,
    twice: bool = False,
    forks: bool = True,
) -> int:
    """The status of a command that got the signal when ``count`` files of that kind were there."""
    folder = Path(arguments[-1])
    with command(*arguments, "--jobs", "2", forks=forks) as process:
        wait_until(lambda: len(list(folder.glob(under_way))) >= count or process.poll() is not None, 120)
        before = len(members(process.pid))
        for _ in range(1 + twice):
            if to_group:
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid, number)
        wait_until(lambda: process.poll() is not None and not members(process.pid), BOUND)
        assert before > count, "the workers had not begun, or had ended"
        return process.wait()


@pytest.mark.parametrize(
    ("number", "to_group", "status", "forks"),
    [
        (signal.SIGINT, True, 130, False),
        (signal.SIGTERM, False, 143, True),
        (signal.SIGKILL, False, -signal.SIGKILL, True),
    ],
)
def test_a_stopped_comparison_leaves_no_process_and_goes_on_to_the_same_results(
    tmp_path: Path, whole: list[Any], number: int, to_group: bool, status: int, forks: bool
) -> None:
    arguments = [*COMPARE, str(tmp_path / "out")]
    assert stopped(arguments, "*/ipc1/*/log.jsonl", number, to_group, 2, forks=forks) == status
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(*arguments) == 0 and results(tmp_path / "out") == whole


def test_a_second_signal_ends_a_comparison_at_once(tmp_path: Path) -> None:
    arguments = [*COMPARE, str(tmp_path / "out")]
    assert stopped(arguments, "*/ipc1/*/log.jsonl", signal.SIGINT, True, 2, twice=True) == 130


@pytest.fixture(scope="module")
def whole_experts(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("experts")
    assert run(*EXPERTS, str(folder)) == 0
    return experts_in(folder)


def experts_in(folder: Path) -> list[bytes]:
    assert not (folder / FOLDER).exists()
    found = [p.read_bytes() for p in sorted(folder.glob("replay_buffer_*.pt"))]
    assert found and len(torch.load(folder / "replay_buffer_0.pt", weights_only=True)) == 3
    return found


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGKILL, False, -signal.SIGKILL)],
)
def test_stopped_experts_leave_no_process_and_become_the_same(
    tmp_path: Path, whole_experts: list[bytes], number: int, to_group: bool, status: int
) -> None:
    arguments = [*EXPERTS, str(tmp_path)]
    assert stopped(arguments, f"{FOLDER}/expert-*/?.json", number, to_group, 2) == status
    assert not (tmp_path / "buffer.json").exists()
    assert run(*arguments) == 0 and experts_in(tmp_path) == whole_experts
