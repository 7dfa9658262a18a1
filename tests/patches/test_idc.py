"""The patched script of IDC: off it is the original, on it uses methods.

Needs a checkout of the pinned commit, named by TAD_UPSTREAM_IDC; it is copied, never changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tests.patches.foreign import MARKS, check_bytes, flags, run

TINY = [
    *("-d", "cifar10", "--ipc", "1", "-f", "2", "--niter", "1", "--inner_loop", "2", "--n_data", "32"),
    *("--batch_real", "8", "--batch_size", "16", "--width", "0.0625", "--depth", "3", "-j", "0", "--seed", "1"),
    *("--metric", "mse", "--test"),
]
SETTINGS: dict[str, dict[str, object]] = {
    "scorer": {"epochs": 4, "width": 8, "batch_size": 32},
    "tad": {"warmup": 1},
    "iwd": {"early": 1, "networks": 1, "warmup": 0, "held_out": 4},
}
CHECKOUT = "idc"
pytestmark = MARKS


@pytest.fixture
def distilled(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Runs the script until it saves its images for the first time, after five of 50 iterations."""
    saved: list[Tensor] = []

    def save(content: Any, place: Any) -> None:
        hook = sys._getframe(1).f_locals.get("hook")
        saved.append(content[0])
        if hook is not None:
            hook.finish()
        raise SystemExit(0)

    def images(root: Path, *more: str) -> Tensor:
        where = os.getcwd()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", save)
            run(root, "condense.py", [*TINY, "--data_dir", str(data), *more])
        assert os.getcwd() == where
        found = saved.pop()
        assert found.shape == (10, 3, 32, 32) and bool(torch.isfinite(found).all())
        return found

    return images


def test_apply_and_reverse_leave_every_byte(tmp_path: Path) -> None:
    check_bytes("idc", tmp_path, {"argument.py": False, "condense.py": False})


@pytest.mark.parametrize("match", ["grad", "feat"])
def test_off_it_is_the_unmodified_script(
    match: str, plain: Path, patched: Path, distilled: Callable[..., Tensor]
) -> None:
    assert torch.equal(distilled(plain, "--match", match), distilled(patched, "--match", match, "--tad_method", "none"))


@pytest.mark.parametrize(
    ("method", "match", "mode"),
    [("tad", "grad", "all"), ("iwd", "grad", "all"), ("tad+iwd", "grad", "batch"), ("tad+iwd", "feat", "batch")],
)
def test_on_it_divides_and_weights(
    method: str, match: str, mode: str, patched: Path, distilled: Callable[..., Tensor], tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    noisy = distilled(patched, "--match", match, *flags(tmp_path / "none", "none", SETTINGS))
    images = distilled(patched, "--match", match, *flags(tmp_path, method, SETTINGS, mode=mode))
    assert not torch.equal(images, noisy)
    state = SampleState.load(tmp_path / "state.safetensors")
    if "tad" in method:
        assert 100 < int(state.trusted.sum()) < 380
    if "iwd" in method:
        assert bool((state["influence"] != 0).any()) and float(state["influence_weight"].std()) > 0.01
    for c in range(10):
        assert float(state.weight[state.pool(c)].mean()) == pytest.approx(1, abs=1e-3)
