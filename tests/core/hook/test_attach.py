"""attach(): settings, flags, label noise, checks and bad input."""

from __future__ import annotations

import argparse
import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tad_plugin
from tad_plugin import add_arguments, attach
from tad_plugin.data.labels import check_labels
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import (
    ConfigError,
    EmptyClassError,
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    MissingExtraError,
    UnknownNameError,
)
from tests.problems import blobs, flip

SMALL = {"scorer": {"epochs": 3, "width": 4, "batch_size": 32}, "tad": {"warmup": 1}}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


# noise, settings and flags


def test_noise_corrupts_the_labels_and_keeps_the_true_ones_for_oracles() -> None:
    images, labels = blobs()
    for noise in ("symmetric:0.4@seed=3", NoiseSpec("symmetric", 0.4, 3)):
        hook = attach("oracle", labels=labels, data=images, noise=noise)
        expected = NoiseSpec("symmetric", 0.4, 3).apply(labels, 3).labels
        assert torch.equal(hook.state.observed, expected) and torch.equal(hook.state.trusted, expected == labels)
        assert hook.data is not None and hook.data.noise_rate == 0.4
    clean = attach("none", labels=labels, noise="none")
    assert torch.equal(clean.state.observed, labels)


def test_what_is_known_reaches_methods_without_images() -> None:
    _, labels = blobs()
    hook = attach("random", labels=labels, ipc=15, config={"random": {"keep": 0.1}})
    assert hook.state.summary()["smallest_pool"] == 15 and hook.data is None
    assert bool(attach("oracle", labels=labels, true_labels=labels).state.trusted.all())


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_settings_come_from_a_file(tmp_path: Path, suffix: str) -> None:
    _, labels = blobs()
    path = tmp_path / f"s.{suffix}"
    path.write_text(json.dumps({"random": {"keep": 0.5}}))
    assert attach("random", labels=labels, config=path).state.summary()["trusted"] == 30
    path.write_text("")
    if suffix == "yaml":
        assert attach("random", labels=labels, config=str(path)).state.summary()["trusted"] == 36
    path.write_text('{"random": {"keep": 5e-1}}')  # a number in JSON, text in YAML 1.1
    if suffix == "json":
        assert attach("random", labels=labels, config=path).state.summary()["trusted"] == 30
    for text, error in (("[1, 2]", ConfigError), ("{a: [", FileFormatError)):
        path.write_text(text)
        with pytest.raises(error, match=path.name):
            attach("random", labels=labels, config=path)
    path.unlink()
    with pytest.raises(FileFormatError, match=path.name):
        attach("random", labels=labels, config=path)


def test_flags_of_a_script(tmp_path: Path) -> None:
    _, labels = blobs()
    parser = add_arguments(argparse.ArgumentParser())
    plain = parser.parse_args([])
    assert not attach(args=plain, labels=labels).enabled
    (tmp_path / "c.json").write_text('{"random": {"keep": 0.5}}')
    flags = ["--tad_method", "random", "--tad_config", str(tmp_path / "c.json"), "--tad_noise", "pair:0.5"]
    given = parser.parse_args([*flags, "--tad_state", str(tmp_path / "s")])
    hook = attach(args=given, labels=labels)
    assert hook.method == "random" and hook.state.summary()["trusted"] == 30
    assert not torch.equal(hook.state.observed, labels)
    hook.finish()
    assert (tmp_path / "s").is_file()
    assert not attach("none", args=given, labels=labels, config={}, state=tmp_path / "t").enabled


# checks


def test_attach_checks_each_label_vector_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, true = blobs(spread=0.8)
    labels = flip(true, 3, 0.3)
    checked: list[Tensor] = []

    def counted(given: Tensor, *args: Any, **more: Any) -> Tensor:
        checked.append(given)
        return check_labels(given, *args, **more)

    for module in ("data.real", "data.noise.spec", "core.state"):
        monkeypatch.setattr(f"tad_plugin.{module}.check_labels", counted)
    attach("none", labels=labels)
    attach("random", labels=labels, data=images)
    assert [torch.equal(c, labels) for c in checked] == [True, True]
    checked.clear()
    hook = attach("none", labels=labels, data=images, true_labels=true)
    assert [torch.equal(c, t) for c, t in zip(checked, (labels, true), strict=True)] == [True, True]
    checked.clear()
    hook.save_state(tmp_path / "s")
    hook = attach("none", labels=labels, data=images, state=tmp_path / "s")
    assert [torch.equal(c, labels) for c in checked] == [True]
    checked.clear()
    hook.state.update(target=true, trusted=true == labels, trust=torch.ones(60))
    hook.state.set_weights("m", torch.ones(60))
    assert not checked


# bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, InvalidInputError, "labels"),
        ({"labels": torch.arange(60) % 6, "num_classes": 3}, InvalidLabelsError, "0 to 5"),
        ({"labels": torch.arange(60) % 2 * 2}, EmptyClassError, "class 1"),
        ({"labels": torch.tensor([0, 1, 2])}, InvalidLabelsError, "60.* 3"),
        ({"labels": torch.zeros(0)}, InvalidLabelsError, "labels"),
        ({"true_labels": torch.tensor([0, 1])}, InvalidLabelsError, "true_labels.*60.* 2"),
        ({"data": torch.zeros(60, 1, 8, 8, dtype=torch.complex64)}, InvalidInputError, "complex"),
        ({"data": 3}, InvalidInputError, "int"),
        ({"method": "tadd"}, UnknownNameError, "'tad'"),
        ({"data": None}, ConfigError, "'tad'.*trains_on_real=True"),
        ({"method": "el2n", "data": None}, ConfigError, r"data=images \[N,C,H,W\]\.$"),
        ({"method": "el2n", "data": None, "trains_on_real": True}, ConfigError, "'el2n'"),
        ({"method": "oracle"}, ConfigError, "true_labels.*'oracle'"),
        ({"config": {"tad": {"threshhold": 1}}}, ConfigError, "'tad'.*threshhold"),
        ({"config": {"scorer": {"epoch": 1}}}, ConfigError, "scorer.*epoch"),
        ({"config": {"scorer": {"epochs": 0}}}, ConfigError, "scorer.epochs.* 0"),
        ({"noise": "symetric:0.4"}, ConfigError, "symetric"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], error: type, message: str) -> None:
    images, labels = blobs()
    given: dict[str, Any] = {"method": "tad", "labels": labels, "data": images, **change}
    with pytest.raises(error, match=message):
        attach(given.pop("method"), **given)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = blobs()
    (tmp_path / "c.yaml").write_text("tad: {}\n")
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name in ("tqdm", "yaml"):
            raise ImportError(name)
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"'tqdm'.*\[reproduce\]"):
        attach("tad", labels=labels, data=images, progress=True)
    with pytest.raises(MissingExtraError, match="'yaml'"):
        attach("tad", labels=labels, data=images, config=tmp_path / "c.yaml")


def test_the_public_names_are_there() -> None:
    assert {"attach", "Hook", "SampleState", "Callback", "TAD", "IWD", "NoiseSpec", "add_arguments"} <= set(
        tad_plugin.__all__
    )
    assert all(hasattr(tad_plugin, name) for name in tad_plugin.__all__) and callable(tad_plugin.attach)
