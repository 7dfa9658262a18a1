"""Runs on 8-bit images end with the bits of runs on floats, whatever the loop and the method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.errors import ConfigError, UnknownNameError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.flags import check_distill_flags
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tad_plugin.utils.image_store import ImageStore, MappedPixels
from tests.data.files import png, write

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
SCORER = {"epochs": 3, "width": 4, "batch_size": 32}
METHODS: dict[str, Any] = {
    "tad": {"scorer": SCORER, "tad": {"warmup": 1}},
    "iwd": {"iwd": {"every": 2, "early": 0, "warmup": 0, "held_out": 2}},
    "noisy": {},
}
CONFIG = RunConfig(
    dataset="digits",
    per_class=12,
    noise="symmetric:0.3",
    ipc=1,
    iterations=4,
    width=4,
    loop={"batch_real": 8},
    eval_epochs=2,
    eval_runs=1,
    candidates=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    files = {
        f"{split}/{name}/{i}.png": png(
            (generator.normal(90 + 60 * (name == "b"), 40, (9, 8, 3)).clip(0, 255)).astype("u1")
        )
        for split, count in (("train", 14), ("test", 3))
        for name in "ab"
        for i in range(count)
    }
    return write(tmp_path_factory.mktemp("data") / "pets", files)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {**load_file(out / "synthetic.safetensors"), **load_file(out / "state.safetensors")}


@pytest.mark.parametrize(("baseline", "arm"), [("dm", "tad"), ("dm", "iwd"), ("dc", "iwd"), ("idm", "noisy")])
def test_runs_have_the_same_bits(baseline: str, arm: str, tmp_path: Path) -> None:
    loop = {"batch_real": 8, **({"outer": 2, "inner": 1} if baseline == "dc" else {})}
    config = dataclasses.replace(CONFIG, baseline=baseline, loop=loop, methods=METHODS[arm])
    found = {}
    for storage in ("float32", "uint8"):
        own = dataclasses.replace(config, storage=storage, memory_budget="3GB")
        results = run(own, arm, tmp_path / storage)
        found[storage] = (tensors(tmp_path / storage), results["accuracy"])
    first, second = found.values()
    assert first[1] == second[1] and list(first[0]) == list(second[0])
    for name, value in first[0].items():
        assert torch.equal(second[0][name], value), name


def test_a_folder_is_decoded_once_to_a_mapped_file(folder: Path) -> None:
    name = f"folder:{folder}"
    for size in (None, 6):
        floats = load_dataset(name, image_size=size, storage="float32")
        assert isinstance(floats.train_images, torch.Tensor)
        stored = load_dataset(name, image_size=size, storage="uint8")
        for part in ("train", "holdout", "test"):
            images = getattr(stored, f"{part}_images")
            assert isinstance(images, ImageStore) and isinstance(images.source, MappedPixels)
            assert torch.equal(images[:], getattr(floats, f"{part}_images"))
            assert torch.equal(getattr(stored, f"{part}_labels"), getattr(floats, f"{part}_labels"))
        assert floats.preprocessing.fingerprint() == stored.preprocessing.fingerprint() and floats.shape == stored.shape
        noise = NoiseSpec.parse("instance:0.4")
        for a, b in zip(floats.apply_noise(noise), stored.apply_noise(noise), strict=True):
            assert a is not None and b is not None and torch.equal(a.labels, b.labels)
    assert len(list((folder.parent / ".pets.pixels").glob("*.pixels"))) == 2


def test_storage_follows_the_size(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    name, count = f"folder:{folder}", 34
    for module in ("sources", "preparation"):
        monkeypatch.setattr(f"tad_plugin.data.{module}.FLOAT_BYTES", 4 * count * 3 * 72)
    assert isinstance(load_dataset(name).test_images, torch.Tensor)
    monkeypatch.setattr("tad_plugin.data.sources.FLOAT_BYTES", 4 * count * 3 * 72 - 1)
    assert isinstance(load_dataset(name).test_images, ImageStore)
    digits = load_dataset("digits", per_class=2)
    assert isinstance(digits.train_images, ImageStore) and digits.train_images.scale == 16
    large = load_dataset("digits", per_class=2, image_size=20)
    assert torch.equal(
        large.train_images[:], load_dataset("digits", per_class=2, image_size=20, storage="float32").train_images
    )


def test_what_does_not_go_together_is_named(folder: Path) -> None:
    for more in ({"zca": True}, {"preprocessing": load_dataset("digits", per_class=3, zca=True).preprocessing}):
        with pytest.raises(ConfigError, match="--storage float32"):
            load_dataset("digits", per_class=3, storage="uint8", **more)
    plain = load_dataset("digits", per_class=3, storage="uint8", preprocessing=Preprocessing((0.5,), (0.5,)))
    assert plain.preprocessing.mean == (0.5,)
    with pytest.raises(UnknownNameError):
        load_dataset("digits", storage="int4")
    with pytest.raises(ConfigError, match="storage"):
        RunConfig(storage="int4")
    for text in ("many", "0GB", "-1", "1 PB", "5.5.5MB"):
        with pytest.raises(ConfigError, match="--memory_budget"):
            resolve(dataclasses.replace(CONFIG, memory_budget=text), "noisy")
    plan = resolve(dataclasses.replace(CONFIG, memory_budget="1.5 GiB", storage="uint8"), "noisy")
    assert plan.memory_budget == 3 * 2**29 and plan.storage == "uint8"
    check_distill_flags(
        dataclasses.replace(CONFIG, dataset=f"folder:{folder}", root="elsewhere", per_class=0), ["noisy"]
    )
