"""The patched scripts of IDM: off they are the originals, on they use methods.

Needs a checkout of the pinned commit, named by TAD_UPSTREAM_IDM; it is copied, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tests.patches.foreign import MARKS, check_bytes, flags, run

SCRIPTS = ["IDM_cifar10.py", "IDM_cifar100.py", "IDM_tiny.py"]
TINY = [
    *("--dataset", "CIFAR10", "--model", "ConvNetW32", "--ipc", "1", "--init", "real", "--lr_img", "0.2"),
    *("--num_exp", "1", "--num_eval", "1", "--net_train_real", "--net_decay", "--embed_last", "1000"),
    *("--syn_ce", "--ce_weight", "0.5", "--train_net_num", "1", "--fetch_net_num", "1", "--batch_real", "8"),
    *("--net_generate_interval", "5", "--model_train_steps", "2", "--trained_bs", "16"),
]
NO_EVALUATION = ["--eval_mode", "none"]
SETTINGS: dict[str, dict[str, object]] = {
    "scorer": {"epochs": 4, "width": 8, "batch_size": 32},
    "tad": {"warmup": 1},
    "iwd": {"early": 1, "networks": 1, "warmup": 0, "held_out": 4},
}

CHECKOUT = "idm"
pytestmark = MARKS


def distilled(root: Path, script: str, data: Path, out: Path, *more: str) -> Tensor:
    """Synthetic images [10,3,32,32] after two iterations."""
    out.mkdir(parents=True)
    where = ["--data_path", str(data), "--save_path", str(out)]
    run(root, script, [*TINY, *NO_EVALUATION, "--Iteration", "1", *where, *more])
    (file,) = out.glob("res_*.pt")
    images: Tensor = torch.load(file, weights_only=True)["data"][0][0]
    assert images.shape == (10, 3, 32, 32) and bool(torch.isfinite(images).all())
    return images


def on(folder: Path, method: str, **iwd: object) -> list[str]:
    """Flags for a method on 40% wrong labels; ``iwd``: settings of IWD besides the small ones above."""
    return flags(folder, method, SETTINGS, **iwd)


def test_apply_and_reverse_leave_every_byte(tmp_path: Path) -> None:
    check_bytes("idm", tmp_path, {name: name != "IDM_tiny.py" for name in SCRIPTS})


@pytest.mark.parametrize(
    ("script", "flags"),
    [*((name, ["--aug"]) for name in SCRIPTS), ("IDM_cifar10.py", [])],
    ids=["cifar10", "cifar100", "tiny", "cifar10-reselecting"],
)
def test_off_it_is_the_unmodified_script(
    script: str, flags: list[str], plain: Path, patched: Path, data: Path, tmp_path: Path
) -> None:
    images = distilled(plain, script, data, tmp_path / "plain", *flags)
    assert torch.equal(images, distilled(patched, script, data, tmp_path / "none", *flags, "--tad_method", "none"))


@pytest.fixture(scope="module")
def noisy(patched: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensor]:
    """Returns the synthetic images of a script with the same wrong labels and no method."""
    known: dict[str, Tensor] = {}

    def images(script: str) -> Tensor:
        if script not in known:
            folder = tmp_path_factory.mktemp("noisy")
            known[script] = distilled(patched, script, data, folder / "out", "--aug", *on(folder, "none"))
        return known[script]

    return images


@pytest.mark.parametrize(
    ("script", "method", "mode"),
    [
        *(("IDM_cifar10.py", method, "all") for method in ("tad", "iwd", "tad+iwd")),
        ("IDM_cifar10.py", "tad+iwd", "batch"),
        ("IDM_cifar100.py", "tad+iwd", "all"),
        ("IDM_tiny.py", "tad+iwd", "all"),
    ],
)
def test_on_it_divides_and_weights(
    script: str,
    method: str,
    mode: str,
    patched: Path,
    data: Path,
    tmp_path: Path,
    noisy: Callable[[str], Tensor],
) -> None:
    images = distilled(patched, script, data, tmp_path / "on", "--aug", *on(tmp_path, method, mode=mode))
    assert not torch.equal(images, noisy(script))
    state = SampleState.load(tmp_path / "state.safetensors")
    if "tad" in method:
        assert 100 < int(state.trusted.sum()) < 380
    else:
        assert bool(state.trusted.all())
    assert float(state.weight[state.trusted].std()) > 0.01
    if "iwd" in method:
        assert bool((state["influence"] != 0).any()) and float(state["influence_weight"].std()) > 0.01
        # one refresh per iteration, not one per class
        assert int(state["influence_count"].max()) <= 2
    for c in range(10):
        pool = state.pool(c)
        assert len(pool) >= 1 and float(state.weight[pool].mean()) == pytest.approx(1, abs=1e-3)


def test_at_one_image_per_class_the_reselected_rows_keep_their_weights(
    patched: Path, data: Path, tmp_path: Path
) -> None:
    distilled(patched, "IDM_cifar10.py", data, tmp_path / "on", *on(tmp_path, "tad+iwd", mode="batch"))
    state = SampleState.load(tmp_path / "state.safetensors")
    assert int((state["influence_count"] > 0).sum()) > 10 and float(state["influence_weight"].std()) > 0.01


def test_the_tiles_of_the_initial_images_are_trusted_samples_of_their_class(
    patched: Path, data: Path, tmp_path: Path
) -> None:
    from torchvision import datasets, transforms

    # no step of the images: they stay as they were made
    images = distilled(patched, "IDM_cifar10.py", data, tmp_path / "on", "--aug", "--lr_img", "0", *on(tmp_path, "tad"))
    state = SampleState.load(tmp_path / "state.safetensors")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    real = datasets.CIFAR10(str(data), transform=transforms.ToTensor())
    x = torch.stack([(real[i][0] - torch.tensor(mean)[:, None, None]) for i in range(len(real))])
    small = torch.nn.functional.avg_pool2d(x / torch.tensor(std)[:, None, None], 2)
    for c in range(10):
        for tile in (images[c, :, a : a + 16, b : b + 16] for a in (0, 16) for b in (0, 16)):
            nearest = int((small - tile).square().mean((1, 2, 3)).argmin())
            assert float((small[nearest] - tile).abs().max()) < 1e-4
            assert bool(state.trusted[nearest]) and int(state.target[nearest]) == c


def test_an_evaluation_writes_its_checkpoint(patched: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    evaluation = ["--eval_mode", "S", "--eval_interval", "1", "--Iteration", "1", "--epoch_eval_train", "1", "--aug"]
    where = ["--data_path", str(data), "--save_path", str(out)]
    assert not (patched / "checkpoints").exists()
    run(patched, "IDM_cifar10.py", [*TINY, *evaluation, *where])
    assert list((patched / "checkpoints").rglob("*.pkl"))
