"""The patched scripts of DatasetCondensation (DM, DC, DSA): off they are the originals, on they use methods.

Needs a checkout of the pinned commit, named by TAD_UPSTREAM_DM; it is copied, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tests.patches.foreign import MARKS, check_bytes, flags, run

DM = ["main_DM.py", "--model", "ConvNet"]
DM_BN = ["main_DM.py", "--model", "ConvNetBN"]
DC = ["main.py", "--method", "DC", "--model", "ConvNet"]
DSA = ["main.py", "--method", "DSA", "--dsa_strategy", "color_crop_cutout_flip_scale_rotate", "--init", "real"]
SHORT = ["--Iteration", "1"]
SETTINGS: dict[str, dict[str, object]] = {
    "scorer": {"epochs": 4, "width": 8, "batch_size": 32},
    "tad": {"warmup": 1},
    "iwd": {"early": 1, "networks": 1, "warmup": 0, "held_out": 4},
}

CHECKOUT = "dm"
pytestmark = MARKS


def distilled(root: Path, script: list[str], data: Path, out: Path, *more: str) -> Tensor:
    """Synthetic images [10,3,32,32] after three updates; no network is evaluated."""
    out.mkdir(parents=True)
    tiny = ["--ipc", "1", "--num_exp", "1", "--num_eval", "0", "--Iteration", "2", "--eval_mode", "none"]
    where = ["--batch_real", "8", "--data_path", str(data), "--save_path", str(out)]
    run(root, script[0], [*script[1:], *tiny, *where, *more])
    (file,) = out.glob("res_*.pt")
    images: Tensor = torch.load(file, weights_only=True)["data"][0][0]
    assert images.shape == (10, 3, 32, 32) and bool(torch.isfinite(images).all())
    return images


def on(folder: Path, method: str, **iwd: object) -> list[str]:
    """Flags for a method on 40% wrong labels; ``iwd``: settings of IWD besides the small ones above."""
    return flags(folder, method, SETTINGS, **iwd)


def test_apply_and_reverse_leave_every_byte(tmp_path: Path) -> None:
    check_bytes("dm", tmp_path, {"main.py": True, "main_DM.py": True})


@pytest.mark.parametrize("script", [DM, DM_BN, DC, DSA], ids=["dm", "dm-bn", "dc", "dsa"])
def test_off_it_is_the_unmodified_script(
    script: list[str], plain: Path, patched: Path, data: Path, tmp_path: Path
) -> None:
    images = distilled(plain, script, data, tmp_path / "plain")
    assert torch.equal(images, distilled(patched, script, data, tmp_path / "none", "--tad_method", "none"))


def test_injected_noise_reaches_the_script_without_a_method(patched: Path, data: Path, tmp_path: Path) -> None:
    clean = distilled(patched, DM, data, tmp_path / "clean", *SHORT)
    assert not torch.equal(clean, distilled(patched, DM, data, tmp_path / "noisy", *SHORT, *on(tmp_path, "none")))
    state = SampleState.load(tmp_path / "state.safetensors")
    assert state.summary()["trusted"] == len(state) == 400 and bool((state.weight == 1).all())


@pytest.fixture(scope="module")
def noisy(patched: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Tensor]:
    """Returns the synthetic images of a script with the same wrong labels and no method."""
    known: dict[str, Tensor] = {}

    def images(script: list[str]) -> Tensor:
        if (key := " ".join(script)) not in known:
            folder = tmp_path_factory.mktemp("noisy")
            known[key] = distilled(patched, script, data, folder / "out", *SHORT, *on(folder, "none"))
        return known[key]

    return images


@pytest.mark.parametrize("method", ["tad", "iwd", "tad+iwd"])
@pytest.mark.parametrize(
    ("script", "mode"), [(DM, "all"), (DC, "batch"), (DC, "all"), (DSA, "all")], ids=["dm", "dc-batch", "dc", "dsa"]
)
def test_on_it_divides_and_weights(
    script: list[str], mode: str, method: str, patched: Path, data: Path, tmp_path: Path, noisy: Any
) -> None:
    images = distilled(patched, script, data, tmp_path / "on", *SHORT, *on(tmp_path, method, mode=mode))
    assert not torch.equal(images, noisy(script))
    state = SampleState.load(tmp_path / "state.safetensors")
    if "tad" in method:
        assert 100 < int(state.trusted.sum()) < 380
    else:
        assert bool(state.trusted.all())
    weights = state.weight[state.trusted]
    assert float(weights.std()) > 0.01
    if "iwd" in method:
        assert bool((state["influence"] != 0).any()) and float(state["influence_weight"].std()) > 0.01
    # what a script reads instead of its indices_class: mean weight 1, and every class has samples to draw
    for c in range(10):
        pool = state.pool(c)
        assert len(pool) >= 1 and float(state.weight[pool].mean()) == pytest.approx(1, abs=1e-3)


def test_the_initial_images_are_trusted_samples_of_their_class(patched: Path, data: Path, tmp_path: Path) -> None:
    frozen = ["--lr_img", "0", "--init", "real"]
    images = distilled(patched, DM, data, tmp_path / "on", *frozen, *SHORT, *on(tmp_path, "tad"))
    state = SampleState.load(tmp_path / "state.safetensors")
    real = _training_images(data)
    for c in range(10):
        (index,) = (real - images[c]).abs().amax((1, 2, 3)).lt(1e-6).nonzero().flatten().tolist()
        assert bool(state.trusted[index]) and int(state.target[index]) == c


def test_influence_waits_for_its_warm_up_with_the_bits_of_the_baseline(
    patched: Path, data: Path, tmp_path: Path, noisy: Any
) -> None:
    waiting = on(tmp_path, "iwd", mode="batch", warmup=99)
    assert torch.equal(noisy(DC), distilled(patched, DC, data, tmp_path / "on", *SHORT, *waiting))
    assert int(SampleState.load(tmp_path / "state.safetensors")["influence_count"].sum()) > 0


def test_a_state_file_is_taken_up_by_the_next_run(patched: Path, data: Path, tmp_path: Path) -> None:
    first = distilled(patched, DM, data, tmp_path / "first", *on(tmp_path, "tad"))
    written = SampleState.load(tmp_path / "state.safetensors")
    # the clock gives other numbers to other runs, the file the same division
    second = distilled(patched, DM, data, tmp_path / "second", *on(tmp_path, "tad"))
    assert torch.equal(first, second)
    again = SampleState.load(tmp_path / "state.safetensors")
    assert torch.equal(written.trusted, again.trusted) and torch.equal(written.weight, again.weight)


def _training_images(data: Path) -> Tensor:
    from torchvision import datasets, transforms

    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    real = datasets.CIFAR10(str(data), train=True, transform=steps)
    return torch.stack([real[i][0] for i in range(len(real))])
