"""The patched scripts of DATM (FTD experts, DATM, its TESLA form): off the originals, on they use methods.

Needs a checkout of the pinned commit, named by TAD_UPSTREAM_DATM; it is copied, never changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tests.patches.foreign import MARKS, Experts, check_bytes, flags, nearest, run, same

pytest.importorskip("yacs", reason="yacs is not installed, which DATM reads its settings with")

SCRIPTS = ["DATM", "DATM_tesla"]
SETTINGS: dict[str, dict[str, object]] = {
    "tad": {"warmup": 1},
    "iwd": {"early": 1, "warmup": 0, "held_out": 4, "ess": 0.7},
}
NOISE = ["--tad_noise", "symmetric:0.4"]
SMALL = """
dataset: CIFAR10
model: ConvNetW32
device: [0]
ipc: 1
syn_steps: 3
batch_syn: 4
expert_epochs: 2
min_start_epoch: 0
max_start_epoch: 2
Sequential_Generation: False
lr_img: 1
lr_teacher: 0.01
lr_lr: 0.000000001
threshold: 100.0
zca: False
num_eval: 0
parall_eva: True
"""

CHECKOUT = "datm"
pytestmark = MARKS


def experts(root: Path, data: Path, folder: Path, *more: str) -> Experts:
    """Trains one expert over three epochs into ``folder``; returns it."""
    already = set(folder.rglob("*.pt"))
    size = ["--num_experts", "1", "--train_epochs", "3", "--save_interval", "1", "--model", "ConvNetW32"]
    rates = ["--batch_train", "32", "--lr_teacher", "0.02", "--mom", "0.9", "--rho_max", "0.01", "--rho_min", "0.01"]
    where = ["--alpha", "0.3", "--data_path", str(data), "--buffer_path", str(folder)]
    run(root, "buffer/buffer_FTD.py", [*size, *rates, *where, *more])
    (file,) = set(folder.rglob("*.pt")) - already
    found: Experts = torch.load(file, weights_only=True)
    assert len(found) == 1 and len(found[0]) == 4
    return found


def distilled(
    root: Path, script: str, data: Path, buffers: Path, found: dict[str, Any], *more: str, **settings: object
) -> tuple[Tensor, Tensor]:
    """Synthetic images [10,3,32,32] and soft labels [10,10] after two updates; no network is evaluated."""
    given = {"data_path": data, "buffer_path": buffers, "pix_init": "real", "Iteration": 1, **settings}
    config = buffers / "settings.yaml"
    config.write_text(SMALL + "".join(f"{name}: {value}\n" for name, value in given.items()))
    run(root, f"distill/{script}.py", ["--cfg", str(config), *more])
    images, labels = (found[name].detach().clone() for name in ("image_syn", "label_syn"))
    assert images.shape == (10, 3, 32, 32) and labels.shape == (10, 10)
    assert bool(torch.isfinite(images).all() and torch.isfinite(labels).all())
    return images, labels


def test_apply_and_reverse_leave_every_byte(tmp_path: Path) -> None:
    crlf = {"buffer/buffer_FTD.py": True, "distill/DATM.py": False, "distill/DATM_tesla.py": False}
    check_bytes("datm", tmp_path, crlf)


@pytest.fixture(scope="module")
def phase(patched: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Experts]]:
    """Experts that learned the wrong labels with a method, each trained once: their folder and parameters."""
    known: dict[str, tuple[Path, Experts]] = {}

    def trained(method: str) -> tuple[Path, Experts]:
        if method not in known:
            folder = tmp_path_factory.mktemp("experts")
            known[method] = (folder, experts(patched, data, folder, *flags(folder, method, SETTINGS)))
        return known[method]

    return trained


def test_off_the_experts_are_the_unmodified_ones(
    plain: Path, patched: Path, data: Path, tmp_path: Path, phase: Callable[[str], tuple[Path, Experts]]
) -> None:
    a = experts(plain, data, tmp_path / "plain")
    assert not torch.equal(a[0][0][0], a[0][-1][0])
    assert same(a, experts(patched, data, tmp_path / "none", "--tad_method", "none"))
    assert not same(a, phase("none")[1])  # the injected noise


@pytest.mark.parametrize("init", ["real", "samples_predicted_correctly"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_off_the_images_are_those_of_the_unmodified_script(
    script: str, init: str, plain: Path, patched: Path, data: Path, at_finish: dict[str, Any],
    phase: Callable[[str], tuple[Path, Experts]],
) -> None:  # fmt: skip
    folder = phase("none")[0]
    expected = distilled(plain, script, data, folder, at_finish, pix_init=init)
    found = distilled(patched, script, data, folder, at_finish, "--tad_method", "none", pix_init=init)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("method", ["tad", "iwd", "tad+iwd"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_on_the_state_goes_from_experts_to_images(
    script: str, method: str, patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any],
    phase: Callable[[str], tuple[Path, Experts]],
) -> None:  # fmt: skip
    folder, found = phase(method)
    assert same(found, phase("none")[1]) == (method == "iwd")  # IWD has not scored yet
    path = tmp_path / "state.safetensors"
    shutil.copy(folder / path.name, path)
    before = SampleState.load(path)
    given = flags(tmp_path, method, SETTINGS)
    images = distilled(patched, script, data, folder, at_finish, *given)[0]
    without = distilled(patched, script, data, folder, at_finish, *NOISE)[0]
    assert torch.equal(images, without) == (method == "iwd")  # IWD only scores here
    after = SampleState.load(path)
    assert torch.equal(before.trusted, after.trusted) and torch.equal(before.target, after.target)
    if "tad" in method:
        assert 100 < int(after.trusted.sum()) < 390
    weights = after.weight[after.trusted]
    assert float(weights.std()) > 0.01 and float(weights.mean()) == pytest.approx(1, abs=1e-3)
    if "iwd" in method:
        assert bool((after["influence"] != 0).any()) and not torch.equal(before.weight, after.weight)
    if method == "tad+iwd" and script == SCRIPTS[0]:  # a second phase of experts uses the weights
        second = experts(patched, data, tmp_path, *given)
        assert torch.equal(found[0][0][0], second[0][0][0]) and not same(found, second)
        assert torch.equal(SampleState.load(path).weight, after.weight)


@pytest.mark.parametrize("init", ["real", "samples_predicted_correctly"])
def test_initial_images_and_soft_labels_come_from_trusted_samples(
    init: str, patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any],
    phase: Callable[[str], tuple[Path, Experts]],
) -> None:  # fmt: skip
    folder = phase("tad")[0]
    shutil.copy(folder / "state.safetensors", tmp_path)
    still = {"lr_img": 0, "lr_y": 0.0, "Iteration": 0, "pix_init": init}
    given = flags(tmp_path, "tad", SETTINGS)
    images, labels = distilled(patched, "DATM", data, folder, at_finish, *given, **still)
    state = SampleState.load(tmp_path / "state.safetensors")
    for c, found in enumerate(nearest(images, data)):
        assert bool(state.trusted[found]) and int(state.target[found]) == c
    if init != "real":  # chosen among samples on which the expert agrees with the target
        assert labels.argmax(1).tolist() == list(range(10))
