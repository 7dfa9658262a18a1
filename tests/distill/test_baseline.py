"""The base of the loops: settings, initial images, draws, and loops found by name."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import torch

from tad_plugin import attach
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill import baseline as module
from tad_plugin.distill.baseline import (
    BASELINES,
    GROUP,
    Baseline,
    BaselineConfig,
    baseline_class,
    baseline_names,
    check_loss,
    initial_images,
)
from tad_plugin.distill.dm import DM
from tad_plugin.errors import ConfigError, NonFiniteError, NotEnoughSamplesError, UnknownNameError
from tests.problems import PLAIN, blobs, plain_hook


def data() -> RealData:
    images, labels = blobs()
    return RealData(images, labels, 3)


# -- initial images and draws ------------------------------------------------------------------------


def test_initial_images_are_real_ones_of_their_class(global_rng_untouched: None) -> None:
    real = data()
    images, labels = initial_images(BaselineConfig(ipc=4), real, plain_hook(real), torch.Generator().manual_seed(0))
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
    with pytest.raises(NotEnoughSamplesError, match="IPC = 6 .*class 0.* 5"):
        initial_images(BaselineConfig(ipc=6), real, hook, torch.Generator())


def test_noise_starts_from_the_generator() -> None:
    real = data()
    hook, config = plain_hook(real), BaselineConfig(ipc=2, init="noise")
    found = [initial_images(config, real, hook, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2]) and found[0].shape == (6, 1, 8, 8)


def test_a_draw_without_a_method_is_one_permutation_of_the_class() -> None:
    real = data()
    start = SyntheticSet(real.images[:3], real.labels[:3], 3, PLAIN)
    for c in range(3):
        loop = Baseline(BaselineConfig(), real, plain_hook(real), start, torch.Generator().manual_seed(c))
        members = (real.labels == c).nonzero().flatten()
        expected = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(c))[:7]]
        assert torch.equal(loop.draw(c, 7), expected)


@pytest.mark.parametrize("name", ["dm", "dc", "dsa", "idm"])
def test_a_class_with_fewer_samples_than_the_batch_gives_all_it_has_or_is_named(name: str) -> None:
    """The first is what the public code does, and what a method that sets samples aside needs."""
    real, cls = data(), baseline_class(name)
    hook = plain_hook(real)
    for full in (False, True):
        settings = {"ipc": 1, "lr_img": 0.1, "width": 4, "batch_real": 21, "init": "real", "augment": "none"}
        config, generator = cls.Config(**settings, full_batches=full), torch.Generator().manual_seed(0)
        start = SyntheticSet(*cls.initial_images(config, real, hook, generator), 3, PLAIN)
        loop = cls(config, real, hook, start, generator)
        if full:
            with pytest.raises(NotEnoughSamplesError, match="21 .*class 0.* 20"):
                loop.step(0)
        else:
            assert loop.step(0)["loss"] > 0


# -- loops by name -----------------------------------------------------------------------------------


def test_every_bundled_baseline_has_a_name_settings_and_a_step() -> None:
    for name in BASELINES:
        cls = baseline_class(name)
        assert issubclass(cls, Baseline) and cls.name == name and cls.__doc__ and cls.step is not Baseline.step
        settings = cls.Config(ipc=1, iterations=1, lr_img=0.1, width=4)
        assert isinstance(settings, BaselineConfig)
        if "lr_img" in cls.preset:
            assert cls.preset["lr_img"] == cls.Config().lr_img
    with pytest.raises(UnknownNameError, match="'dmm'.*'dm'"):
        baseline_class("dmm")


class Foreign(Baseline):
    """A loop of another package."""

    name = "foreign"


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of another package: one that works, one that cannot be imported, one of another class, a clash."""
    package = types.ModuleType("foreign_package")
    package.Foreign = Foreign  # type: ignore[attr-defined]
    package.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_package", package)
    values = {"foreign": "foreign_package:Foreign", "gone": "no_such_package:Loop", "number": "foreign_package:number"}
    values["dm"] = "foreign_package:Foreign"
    added = [EntryPoint(name, value, GROUP) for name, value in values.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: [*entry_points(group=group), *added])


def test_a_loop_of_another_package_is_found_by_its_name(foreign: None) -> None:
    assert baseline_class("foreign") is Foreign
    assert [*BASELINES, "foreign", "gone", "number"] == baseline_names()
    assert baseline_class("dm") is DM


@pytest.mark.parametrize("name, value", [("gone", "no_such_package"), ("number", "3")])
def test_a_broken_entry_point_is_named(name: str, value: str, foreign: None) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*{value}"):
        baseline_class(name)


# -- mistakes ----------------------------------------------------------------------------------------


def test_a_class_without_a_step_is_named() -> None:
    real = data()
    start = SyntheticSet(real.images[:3], real.labels[:3], 3, PLAIN)
    with pytest.raises(TypeError, match="step"):
        Baseline(BaselineConfig(), real, plain_hook(real), start, torch.Generator()).step(0)


@pytest.mark.parametrize(
    "given", [{"ipc": 0}, {"iterations": -1}, {"width": 0}, {"depth": -1}, {"lr_img": -1.0}, {"init": "zeros"}]
)
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        BaselineConfig(**given)


def test_a_loss_that_is_not_finite_is_named() -> None:
    check_loss(torch.tensor(1.0), 3)
    with pytest.raises(NonFiniteError, match="inf at iteration 3"):
        check_loss(torch.tensor(float("inf")), 3)
