"""The patched scripts of MTT: off they are the originals, on they use methods and hand the state on.

Needs a checkout of the pinned commit, named by TAD_UPSTREAM_MTT; it is copied, never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.errors import StateMismatchError
from tests.patches.foreign import MARKS, Experts, check_bytes, flags, nearest, run, same

SETTINGS: dict[str, dict[str, object]] = {
    "tad": {"warmup": 1},
    "iwd": {"early": 1, "warmup": 0, "held_out": 4, "ess": 0.7},
}
NOISE = ["--tad_noise", "symmetric:0.4"]

CHECKOUT = "mtt"
pytestmark = MARKS


def experts(root: Path, data: Path, folder: Path, *more: str, epochs: int = 3, number: int = 2) -> Experts:
    """Trains experts into ``folder``; returns those of this run: for each its parameters after every epoch."""
    already = set(folder.rglob("*.pt"))
    size = ["--num_experts", str(number), "--train_epochs", str(epochs), "--save_interval", str(number)]
    small = ["--model", "ConvNetW32", "--batch_train", "32", "--lr_teacher", "0.02", "--mom", "0.9"]
    run(root, "buffer.py", [*size, *small, "--data_path", str(data), "--buffer_path", str(folder), *more])
    (file,) = set(folder.rglob("*.pt")) - already
    found: Experts = torch.load(file, weights_only=True)
    assert len(found) == number and all(len(expert) == epochs + 1 for expert in found)
    return found


def distilled(
    root: Path, data: Path, buffers: Path, found: dict[str, Any], *more: str, iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """Synthetic images [10,3,32,32] and learning rate after some updates; no network is evaluated."""
    size = ["--ipc", "1", "--Iteration", str(iterations - 1), "--num_eval", "0", "--syn_steps", "3"]
    segment = ["--expert_epochs", "2", "--max_start_epoch", "2", "--lr_img", "1", "--lr_lr", "1e-9"]
    where = ["--model", "ConvNetW32", "--data_path", str(data), "--buffer_path", str(buffers)]
    run(root, "distill.py", [*size, *segment, "--lr_teacher", "0.01", *where, *more])
    images = found["image_syn"].detach().clone()
    assert images.shape == (10, 3, 32, 32) and bool(torch.isfinite(images).all())
    return images, found["syn_lr"].detach().clone()


def on(folder: Path, method: str) -> list[str]:
    return flags(folder, method, SETTINGS)


def test_apply_and_reverse_leave_every_byte(tmp_path: Path) -> None:
    check_bytes("mtt", tmp_path, {"buffer.py": False, "distill.py": False})


def test_off_both_scripts_are_the_unmodified_ones(
    plain: Path, patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any]
) -> None:
    a = experts(plain, data, tmp_path / "plain")
    b = experts(patched, data, tmp_path / "none", "--tad_method", "none")
    assert same(a, b) and not torch.equal(a[0][0][0], a[0][-1][0])
    images, rate = distilled(plain, data, tmp_path / "plain", at_finish)
    again = distilled(patched, data, tmp_path / "none", at_finish, "--tad_method", "none")
    assert torch.equal(images, again[0]) and torch.equal(rate, again[1])


@pytest.fixture(scope="module")
def noisy(patched: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Experts]:
    """Buffers of experts that learned the wrong labels without a method."""
    folder = tmp_path_factory.mktemp("noisy")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_args, **_more: True)
        return folder, experts(patched, data, folder, *NOISE)


def test_injected_noise_reaches_experts_and_initial_images_without_a_method(
    noisy: tuple[Path, Experts], patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any]
) -> None:
    clean = experts(patched, data, tmp_path)
    assert torch.equal(clean[0][0][0], noisy[1][0][0][0]) and not torch.equal(clean[0][1][0], noisy[1][0][1][0])
    first = distilled(patched, data, noisy[0], at_finish)[0]
    assert not torch.equal(first, distilled(patched, data, noisy[0], at_finish, *NOISE)[0])


@pytest.mark.parametrize("method", ["tad", "iwd", "tad+iwd"])
def test_on_the_state_goes_from_experts_to_images_and_back(
    method: str, noisy: tuple[Path, Experts], patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any]
) -> None:
    given, path = on(tmp_path, method), tmp_path / "state.safetensors"
    first = experts(patched, data, tmp_path, *given, number=2 if method == "tad" else 1)
    assert same(first, noisy[1][: len(first)]) == (method == "iwd")  # IWD has not scored yet
    before = SampleState.load(path)
    if "tad" in method:
        assert 100 < int(before.trusted.sum()) < 390 and float(before.weight[before.trusted].std()) > 0.01
    else:
        assert bool(before.trusted.all()) and bool((before.weight == 1).all())

    images = distilled(patched, data, tmp_path, at_finish, *given)[0]
    without = distilled(patched, data, tmp_path, at_finish, *NOISE)[0]
    assert torch.equal(images, without) == (method == "iwd")  # IWD only scores here
    after = SampleState.load(path)
    assert torch.equal(before.trusted, after.trusted) and torch.equal(before.target, after.target)
    weights = after.weight[after.trusted]
    assert float(weights.std()) > 0.01 and float(weights.mean()) == pytest.approx(1, abs=1e-3)
    if "iwd" in method:
        assert bool((after["influence"] != 0).any()) and not torch.equal(before.weight, after.weight)

    # a second phase of experts uses the weights and scores nothing
    second = experts(patched, data, tmp_path, *given, number=1)
    assert torch.equal(first[0][0][0], second[0][0][0]) and not same(first[:1], second)
    again = SampleState.load(path)
    assert torch.equal(again.weight, after.weight) and torch.equal(again.trusted, after.trusted)


def test_the_initial_images_are_trusted_samples_of_their_class(
    noisy: tuple[Path, Experts], patched: Path, data: Path, tmp_path: Path, at_finish: dict[str, Any]
) -> None:
    experts(patched, data, tmp_path, *on(tmp_path, "tad"), number=1)
    still = ["--lr_img", "0", "--pix_init", "real"]
    images = distilled(patched, data, noisy[0], at_finish, *on(tmp_path, "tad"), *still, iterations=1)[0]
    state = SampleState.load(tmp_path / "state.safetensors")
    for c, found in enumerate(nearest(images, data)):
        assert bool(state.trusted[found]) and int(state.target[found]) == c


def test_a_state_of_other_labels_is_refused(
    noisy: tuple[Path, Experts], patched: Path, data: Path, tmp_path: Path
) -> None:
    given = on(tmp_path, "tad")
    experts(patched, data, tmp_path, *given, number=1, epochs=1)
    with pytest.raises(StateMismatchError, match="label hash"):
        experts(patched, data, tmp_path, *given[:-1], "symmetric:0.2")
