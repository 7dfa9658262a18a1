"""What every bundled baseline shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tad_plugin import attach
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import (
    BASELINES,
    Baseline,
    BaselineConfig,
    baseline_class,
    check_loss,
    class_pool,
    draw_class,
    initial_images,
)
from tad_plugin.errors import ConfigError, NonFiniteError, NotEnoughSamplesError, UnknownNameError
from tests.problems import PLAIN, blobs


def data() -> RealData:
    images, labels = blobs()
    return RealData(images, labels, 3)


def test_initial_images_are_real_ones_of_their_class(global_rng_untouched: None) -> None:
    real = data()
    images, labels = initial_images(BaselineConfig(ipc=4), real, None, torch.Generator().manual_seed(0))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for image, label in zip(images, labels, strict=True):
        same = [i for i in range(60) if torch.equal(real.images[i], image)]
        assert len(same) == 1 and real.labels[same[0]] == label
    images.zero_()
    assert bool(real.images.any())


def test_only_usable_images_start_a_set_and_too_few_are_named() -> None:
    real = data()
    true = torch.where(torch.arange(60) < 45, (real.labels + 1) % 3, real.labels)
    hook = attach("oracle", labels=real.labels, data=real.images, true_labels=true)
    images, _ = initial_images(BaselineConfig(ipc=5), real, hook, torch.Generator().manual_seed(0))
    usable = {tuple(real.images[i].flatten().tolist()) for i in range(45, 60)}
    assert all(tuple(image.flatten().tolist()) in usable for image in images)
    with pytest.raises(
        NotEnoughSamplesError, match="at least IPC = 6 usable samples of class 0, but got 5. Lower --ipc"
    ):
        initial_images(BaselineConfig(ipc=6), real, hook, torch.Generator())


def test_noise_starts_from_the_generator() -> None:
    found = [
        initial_images(BaselineConfig(ipc=2, init="noise"), data(), None, torch.Generator().manual_seed(s))[0]
        for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2]) and found[0].shape == (6, 1, 8, 8)


def test_a_draw_is_the_same_with_and_without_a_hook() -> None:
    real = data()
    hook = attach("none", labels=real.labels, data=real.images)
    for c in range(3):
        assert torch.equal(class_pool(hook, real, c), class_pool(None, real, c))
        a, b = (draw_class(h, real, c, 7, torch.Generator().manual_seed(c)) for h in (hook, None))
        assert torch.equal(a, b) and len(a.unique()) == 7 and bool((real.labels[a] == c).all())


def test_every_baseline_has_a_name_settings_and_a_step() -> None:
    for name in BASELINES:
        cls = baseline_class(name)
        assert issubclass(cls, Baseline) and cls.name == name and cls.__doc__ and cls.step is not Baseline.step
        settings = cls.Config(ipc=1, iterations=1, lr_img=0.1, width=4)
        assert isinstance(settings, BaselineConfig)
    with pytest.raises(UnknownNameError, match="a baseline out of .*dm.*but got 'dmm'. Did you mean 'dm'"):
        baseline_class("dmm")


def test_a_class_without_a_step_is_named() -> None:
    start = SyntheticSet(*initial_images(BaselineConfig(ipc=1), data(), None, torch.Generator()), 3, PLAIN)
    with pytest.raises(TypeError, match="Baseline to define step"):
        Baseline(BaselineConfig(), data(), None, start, torch.Generator()).step(0)


@pytest.mark.parametrize("name", ["dm", "dc", "dsa", "idm"])
def test_a_class_with_fewer_samples_than_the_batch_gives_all_it_has_or_is_named(name: str) -> None:
    """All it has is what the public code does too, and what a method that sets samples aside needs."""
    real, cls = data(), baseline_class(name)
    for full in (False, True):
        settings = {"ipc": 1, "lr_img": 0.1, "width": 4, "batch_real": 21, "init": "real", "augment": "none"}
        config, generator = cls.Config(**settings, full_batches=full), torch.Generator().manual_seed(0)
        start = SyntheticSet(*cls.initial_images(config, real, None, generator), 3, PLAIN)
        loop = cls(config, real, None, start, generator)
        if full:
            with pytest.raises(NotEnoughSamplesError, match="21 usable samples of class 0 for a batch, but got 20"):
                loop.step(0)
        else:
            assert loop.step(0)["loss"] > 0


@pytest.mark.parametrize("given", [{"ipc": 0}, {"iterations": -1}, {"width": 0}, {"depth": -1}, {"init": "zeros"}])
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))} .*but got"):
        BaselineConfig(**given)


def test_a_loss_that_is_not_finite_is_named() -> None:
    check_loss(torch.tensor(1.0), 3)
    with pytest.raises(
        NonFiniteError, match="a finite matching loss, but got inf at iteration 3 in real, fake. Lower lr_img"
    ):
        check_loss(torch.tensor(float("inf")), 3, ["real", "fake"])
