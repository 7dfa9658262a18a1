"""The settings of one run: what a flag of the command line or a line of a YAML file can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tad_plugin.core.registry import available_methods, load_method, make_callbacks
from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise.spec import NoiseSpec, NoisyLabels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.sources import DATASETS
from tad_plugin.distill.baseline import BaselineConfig, baseline_class
from tad_plugin.errors import ConfigError, explain, unknown_name
from tad_plugin.evaluate import EvaluateConfig
from tad_plugin.experiments.arms import parse_arm
from tad_plugin.nn.networks import NETWORKS
from tad_plugin.utils.settings import build_config

__all__ = ["MAY_DIFFER", "PRESETS", "RunConfig", "check_config", "load_noisy", "load_splits", "settings_of"]

# What suits a dataset where the user says nothing; digits are 8x8 and few, so everything is smaller.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "iterations": 200,
        "width": 32,
        "lr_img": 1.0,
        "loop": {"batch_real": 64},
        # Chosen by the bias of the matched class means on training data (tad/README.md), not by test accuracy.
        "methods": {"scorer": {"epochs": 20, "width": 64}, "tad": {"warmup": 17, "weighting": "hard"}},
        "eval_epochs": 200,
        "eval_runs": 3,
    },
    "": {
        "iterations": 1000,
        "width": 128,
        "lr_img": 1.0,
        "loop": {},
        "methods": {},
        "eval_epochs": 1000,
        "eval_runs": 5,
    },
}


MAY_DIFFER = ("device", "checkpoint_seconds", "root", "labels")
"""Settings of :class:`RunConfig` that may change when a run is resumed: they do not change what it computes."""


@dataclass
class RunConfig:
    """Settings of one run. Every flag of the command line is one of these.

    Attributes:
        baseline: distillation algorithm, one of those that `tad-plugin methods` lists at the end.
        dataset: digits, cifar10, cifar100, svhn, tinyimagenet, or folder:PATH of an image folder or a zip of one.
        root: folder of downloaded datasets.
        per_class: use only the first N training images of each class; 0 uses all.
        holdout: share of the real training data that is held out to choose the best iterate.
        noise: label noise, e.g. symmetric:0.4, asymmetric:0.4, pair:0.4, instance:0.4, human:worse, none.
        labels: label file for human noise (npz, or the published .pt).
        zca: whiten the images (ZCA) instead of only normalising them.
        ipc: synthetic images per class.
        iterations: steps of distillation; 0 takes the dataset's preset.
        lr_img: learning rate of the images; 0 takes the preset.
        width: channels of the ConvNet, in distillation and evaluation; 0 takes the preset.
        loop: further settings of the baseline by name, e.g. --loop.batch_real 128; for mtt and datm --loop.preset NAME
            takes the published ones of that dataset and IPC.
        methods: settings by method, e.g. --methods '{"tad": {"threshold": 0.6}}'; "scorer" sets the plugin's scorer.
        eval_network: architecture that is trained on the synthetic set, or several joined by ",".
        eval_epochs: epochs of each network that is trained on the synthetic set; 0 takes the preset.
        eval_runs: how many networks are trained on it and tested; 0 takes the preset.
        eval_lr: learning rate of these networks; halfway it drops to a tenth.
        candidates: iterates (evenly spaced, the last one included) among which the held-out data choose the best.
        seed: of everything: noise, split, initial images, networks.
        device: auto, cpu or cuda.
        checkpoint_seconds: seconds between checkpoints.
    """

    baseline: str = "dm"
    dataset: str = "digits"
    root: str = "data"
    per_class: int = 0
    holdout: float = 0.1
    noise: str = "none"
    labels: str = ""
    zca: bool = False
    ipc: int = 10
    iterations: int = 0
    lr_img: float = 0.0
    width: int = 0
    loop: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    eval_network: str = "convnet"
    eval_epochs: int = 0
    eval_runs: int = 0
    eval_lr: float = 0.01
    candidates: int = 3
    seed: int = 0
    device: str = "auto"
    checkpoint_seconds: float = 20.0

    def resolved(self) -> RunConfig:
        """The same settings with the dataset's preset in place of every 0, and the device decided."""
        cls = baseline_class(self.baseline)
        known = {f.name for f in dataclasses.fields(cls.Config)}
        preset = {**PRESETS.get(self.dataset, PRESETS[""]), **cls.preset}
        # A dataset's preset serves all baselines, some of which have no such setting.
        preset["loop"] = {k: v for k, v in preset["loop"].items() if k in known}
        if cls.trains_on_real:
            # Its settings of methods were chosen for the plugin's own scorer; the loop's networks take its place.
            preset["methods"] = {k: v for k, v in preset["methods"].items() if k == "scorer"}
        given = dict(self.loop)
        if "preset" in given:
            named = cls.published(str(given.pop("preset")), self.ipc)
            preset |= {**named, "loop": {**preset["loop"], **named.get("loop", {})}}
        filled = {k: preset[k] for k in preset if k not in ("loop", "methods") and not getattr(self, k)}
        for name, settings in self.methods.items():
            if not isinstance(settings, Mapping):
                do = """Write --methods '{"tad": {"threshold": 0.6}}'"""
                raise ConfigError(explain(f"a mapping of settings of {name!r}", repr(settings), do))
        methods = {
            k: {**preset["methods"].get(k, {}), **self.methods.get(k, {})}
            for k in {**preset["methods"], **self.methods}
        }
        device = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if self.candidates < 1:
            raise ConfigError(explain("candidates of at least 1", str(self.candidates), "Correct the setting"))
        if self.seed < 0:
            raise ConfigError(explain("a seed of at least 0", str(self.seed), "Correct the setting"))
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(explain("a CUDA device", f"{device!r}, and none is available", "Use --device cpu"))
        return dataclasses.replace(self, **filled, loop={**preset["loop"], **given}, methods=methods, device=device)

    def noise_spec(self) -> NoiseSpec:
        """The label noise: seeded with ``seed`` unless its text says otherwise, human labels from ``labels``."""
        path = self.labels if self.labels and self.noise.startswith("human") else None
        return NoiseSpec.parse(self.noise, seed=None if "seed=" in self.noise else self.seed, path=path)

    def networks(self) -> list[str]:
        """The architectures of ``eval_network``."""
        return [name.strip() for name in self.eval_network.split(",")]

    def evaluation(self) -> EvaluateConfig:
        """The evaluation's settings, with what the baseline's protocol fixes."""
        fixed = baseline_class(self.baseline).evaluation
        return EvaluateConfig(width=self.width, runs=self.eval_runs, epochs=self.eval_epochs, lr=self.eval_lr, **fixed)


def load_splits(config: RunConfig, preprocessing: Preprocessing | None = None) -> DataSplits:
    """The dataset of these settings, under ``preprocessing`` instead of its own where that is given."""
    return load_dataset(
        config.dataset,
        config.root,
        per_class=config.per_class or None,
        holdout=config.holdout,
        seed=config.seed,
        device=config.device,
        zca=config.zca and preprocessing is None,
        preprocessing=preprocessing,
    )


def load_noisy(config: RunConfig) -> tuple[DataSplits, NoisyLabels, NoisyLabels | None]:
    """The dataset, and the noisy labels of its training part and of its held-out part (None where that is empty).

    The held-out labels are as noisy as the rest: a user has no others to choose the best iterate with.
    """
    splits = load_splits(config)
    return splits, *splits.apply_noise(config.noise_spec())


def check_config(config: RunConfig, arm: str) -> BaselineConfig:
    """Finds what is wrong with the settings before anything is loaded; returns the baseline's own.

    Args:
        config: resolved settings.
        arm: a name of ``ARMS`` or a method.

    Raises:
        UnknownNameError: no such arm, method, baseline, dataset or network.
        ConfigError: an unknown setting, or one out of range.
    """
    chosen = parse_arm(arm)
    baseline = baseline_class(config.baseline)
    if config.dataset not in DATASETS and not config.dataset.startswith("folder:"):
        raise unknown_name("dataset", config.dataset, [*DATASETS, "folder:PATH"])
    for name in config.networks():
        if name not in NETWORKS:
            raise unknown_name("network", name, list(NETWORKS))
    config.noise_spec()
    config.evaluation()
    make_callbacks(chosen.method, settings_of(config.methods, chosen.method))
    values = {
        "ipc": config.ipc,
        "iterations": config.iterations,
        "lr_img": config.lr_img,
        "width": config.width,
        **config.loop,
        **({} if chosen.distil else {"iterations": 0, "init": "real"}),
    }
    found: BaselineConfig = build_config(baseline.Config, values, f"the baseline {config.baseline!r}")
    return found


def settings_of(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that concern this arm's methods: one --methods serves all arms of a comparison."""
    names = set(method.split("+")) | {"scorer"}
    known = {*available_methods(), "scorer"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(explain(f"settings for {', '.join(sorted(known))}", ", ".join(unknown), "Correct --methods"))
    chosen: dict[str, Any] = {k: v for k, v in settings.items() if k in names}
    for name in names & set(known) - {"scorer"}:
        # A rival that trains networks of its own gets the same settings for them as the plugin's scorer.
        config = load_method(name).Config
        if "scorer" in settings and config is not None and any(f.name == "scorer" for f in dataclasses.fields(config)):
            own = dict(chosen.get(name, {}))
            chosen[name] = {**own, "scorer": {**settings["scorer"], **own.get("scorer", {})}}
    return chosen
