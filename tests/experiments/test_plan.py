"""The plan of a run: what fills a setting that is not given, what is refused, and what config.yaml says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.distill.dm import DMConfig
from tad_plugin.errors import ConfigError, ResumeError, UnknownNameError
from tad_plugin.evaluate import EvaluateConfig
from tad_plugin.experiments.arms import ARMS, parse_arm
from tad_plugin.experiments.config import PRESETS, RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import resolve, settings_of
from tad_plugin.experiments.run import run
from tad_plugin.utils.seals import sealed_yaml
from tests.experiments.killed_runs import CONFIG

SMALL = dataclasses.replace(CONFIG, iterations=3, eval_runs=1, checkpoint_seconds=60.0)


# what fills a setting that is not given


def test_the_dataset_preset_fills_what_is_not_given() -> None:
    plan = resolve(RunConfig(loop={"momentum": 0.9}, iterations=7), "noisy")
    preset = PRESETS["digits"]
    assert isinstance(plan.loop, DMConfig)
    assert (plan.loop.iterations, plan.loop.width, plan.loop.momentum) == (7, preset["width"], 0.9)
    assert plan.loop.batch_real == preset["loop"]["batch_real"] and plan.loop.lr_img == DMConfig.lr_img
    assert (plan.evaluation.epochs, plan.evaluation.runs) == (preset["eval_epochs"], preset["eval_runs"])
    assert plan.evaluation.width == preset["width"] and plan.methods == preset["methods"]


def test_without_a_preset_the_defaults_of_loop_and_evaluation_hold() -> None:
    plan = resolve(RunConfig(dataset="cifar10"), "noisy")
    assert plan.loop == DMConfig(iterations=PRESETS[""]["iterations"])
    assert plan.evaluation == EvaluateConfig() and plan.methods == {} and plan.zca is False
    assert plan.device in ("cpu", "cuda")


def test_the_user_overrides_a_preset_also_with_false() -> None:
    named = RunConfig(baseline="mtt", dataset="cifar10", loop={"preset": "cifar10"})
    assert resolve(named, "noisy").zca is True
    assert resolve(dataclasses.replace(named, zca=False, lr_img=2.0), "noisy").record["zca"] is False
    assert resolve(dataclasses.replace(named, lr_img=2.0), "noisy").loop.lr_img == 2.0


def test_zero_on_the_command_line_means_not_given() -> None:
    open_fields = ("iterations", "lr_img", "width", "eval_epochs", "eval_runs")
    given = RunConfig.from_flags({**dict.fromkeys(open_fields, 0), "per_class": 0, "zca": False, "seed": 0})
    assert all(getattr(given, name) is None for name in open_fields)
    assert given.zca is False and given.per_class == 0 and given.seed == 0
    assert dataclasses.replace(given, zca=None) == RunConfig()


def test_a_resolved_record_resolves_to_itself() -> None:
    for config in (SMALL, RunConfig(baseline="mtt", dataset="cifar10", loop={"preset": "cifar10"}), RunConfig()):
        plan = resolve(config, "tad")
        record = dict(plan.record)
        again = resolve(RunConfig(**{k: v for k, v in record.items() if k != "arm"}), record["arm"])
        assert again == plan and None not in record.values()


def test_a_plan_shares_nothing_mutable_with_the_settings() -> None:
    config = RunConfig(loop={"momentum": 0.9}, methods={"tad": {"warmup": 2}})
    plan = resolve(config, "tad")
    config.loop["momentum"] = 0.1
    config.methods["tad"]["warmup"] = 9
    assert plan.record["loop"]["momentum"] == 0.9 and plan.methods["tad"]["warmup"] == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1  # type: ignore[misc]


def test_an_arm_without_distillation_keeps_real_images() -> None:
    plan = resolve(RunConfig(baseline="dc"), "random")
    assert (plan.loop.iterations, plan.loop.init) == (0, "real")
    assert plan.record["iterations"] == PRESETS["digits"]["iterations"]


def test_named_arms_and_methods_are_arms() -> None:
    assert parse_arm("noisy") is ARMS["noisy"] and parse_arm("clean").true_labels and not parse_arm("random").distil
    assert parse_arm("loss-prune+iwd").method == "loss-prune+iwd"
    with pytest.raises(UnknownNameError, match="'tadd'.*'tad'"):
        parse_arm("iwd+tadd")


def test_one_set_of_settings_serves_all_arms() -> None:
    given = {"scorer": {"epochs": 5}, "tad": {"warmup": 1}, "clean-then-distil": {"scorer": {"width": 8}}}
    assert settings_of(given, "none") == {"scorer": {"epochs": 5}}
    assert settings_of(given, "tad+iwd") == {"scorer": {"epochs": 5}, "tad": {"warmup": 1}}
    # a rival that trains its own networks
    assert settings_of(given, "clean-then-distil")["clean-then-distil"] == {"scorer": {"epochs": 5, "width": 8}}
    with pytest.raises(ConfigError, match="tda"):
        settings_of({"tda": {}}, "tad")


# what is refused


@pytest.mark.parametrize(
    ("change", "arm", "error", "value"),
    [
        ({}, "nosy", UnknownNameError, "'nosy'.*'noisy'"),
        ({"baseline": "dmm"}, "noisy", UnknownNameError, "'dmm'"),
        ({"dataset": "digit"}, "noisy", UnknownNameError, "'digit'.*'digits'"),
        ({"eval_network": "convnet,mpl"}, "noisy", UnknownNameError, "'mpl'.*'mlp'"),
        ({"noise": "symetric:0.4"}, "noisy", ConfigError, "symetric"),
        ({"noise": "symmetric:1.4"}, "noisy", ConfigError, "1.4"),
        ({"loop": {"batch": 3}}, "noisy", ConfigError, "'dm'.*batch"),
        ({"loop": {"batch_real": 0}}, "noisy", ConfigError, "batch_real"),
        ({"methods": {"tad": 3}}, "tad", ConfigError, "'tad'.*3"),
        ({"methods": {"tda": {}}}, "noisy", ConfigError, "tda"),
        ({"methods": {"tad": {"warm": 1}}}, "tad", ConfigError, "warm"),
        ({"ipc": 0}, "noisy", ConfigError, "ipc"),
        ({"iterations": -1}, "noisy", ConfigError, "iterations"),
        ({"candidates": 0}, "noisy", ConfigError, "candidates"),
        ({"seed": -1}, "noisy", ConfigError, "seed"),
        ({"per_class": -1}, "noisy", ConfigError, "per_class"),
        ({"holdout": 1.0}, "noisy", ConfigError, "holdout"),
        ({"checkpoint_seconds": -1.0}, "noisy", ConfigError, "checkpoint_seconds"),
        ({"eval_epochs": -1}, "noisy", ConfigError, "epochs"),
        ({"eval_lr": 0.0}, "noisy", ConfigError, "lr"),
        ({"seed": "0"}, "noisy", ConfigError, "seed"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_loaded(
    change: dict[str, Any], arm: str, error: type[Exception], value: str
) -> None:
    with pytest.raises(error, match=value):
        resolve(dataclasses.replace(SMALL, **change), arm)


def test_no_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        resolve(RunConfig(device="cuda"), "noisy")
    for name in ("gpu", "1e-9", "7", "meta", ""):
        with pytest.raises(ConfigError, match="--device"):
            resolve(RunConfig(device=name), "noisy")
    assert resolve(RunConfig(), "noisy").device == "cpu"


# config.yaml

# as written before there was a plan
OLD = """\
arm: tad
baseline: dm
dataset: digits
root: data
per_class: 16
holdout: 0.1
noise: symmetric:0.4
labels: ''
zca: false
ipc: 1
iterations: 3
lr_img: 1.0
width: 32
loop:
  batch_real: 8
methods:
  scorer:
    epochs: 4
    width: 4
    batch_size: 32
    refresh_every: 4
  tad:
    warmup: 1
    weighting: hard
    history: 2
eval_network: convnet
eval_epochs: 2
eval_runs: 1
eval_lr: 0.01
candidates: 3
seed: 0
device: cpu
checkpoint_seconds: 60.0
"""


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
def test_a_folder_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, width=None)
    RunFolder(tmp_path / "new").write_config(resolve(config, "tad").record)
    assert (tmp_path / "new" / "config.yaml").read_text() == sealed_yaml(OLD)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(OLD)
    with pytest.raises(ResumeError, match="width: there 32, now 31"):
        run(dataclasses.replace(config, width=31), "tad", tmp_path / "old")
    small = OLD.replace("width: 32", "width: 4")
    (tmp_path / "old" / "config.yaml").write_text(small)
    assert run(SMALL, "tad", tmp_path / "old")["iterations"] == 3
    assert (tmp_path / "old" / "config.yaml").read_text() == small


@pytest.mark.parametrize(("baseline", "arm"), [("mtt", "iwd"), ("datm", "tad+iwd")])
def test_influence_along_experts_needs_a_norm_without_batches(baseline: str, arm: str) -> None:
    with pytest.raises(ConfigError, match="--loop.norm batch"):
        resolve(RunConfig(baseline=baseline, loop={"norm": "batch"}), arm)
    for fine in (("dm", arm, "batch"), (baseline, "tad", "batch"), (baseline, arm, "instance")):
        assert resolve(RunConfig(baseline=fine[0], loop={"norm": fine[2]}), fine[1]).loop.norm == fine[2]
