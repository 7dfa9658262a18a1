"""Settings of a run as the user gives them: command-line flags, lines of a YAML file, or keyword arguments."""

# no postponed annotations: jsonargparse reads the types of the settings below

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tad_plugin.data.datasets import STORAGES
from tad_plugin.evaluate import EvaluateConfig
from tad_plugin.utils.precision import PRECISIONS
from tad_plugin.utils.settings import Settings, setting

__all__ = ["MAY_DIFFER", "PRESETS", "VERDICT", "RunConfig"]

PRESETS: dict[str, dict[str, Any]] = {
    # 8x8 images, 1,442 of them: everything is smaller.
    "digits": {
        "iterations": 200,
        "width": 32,
        "loop": {"batch_real": 64},
        # Chosen by the bias of the matched class means on training data (tad/README.md), not by test accuracy.
        "methods": {"scorer": {"epochs": 20, "width": 64}, "tad": {"warmup": 17, "weighting": "hard"}},
        "eval_epochs": 200,
        "eval_runs": 3,
    },
    "": {"iterations": 1000},
}
"""Dataset presets, as fields of :class:`RunConfig`; "" is for all datasets without one of their own."""

VERDICT = {
    "verdict": "file",
    "order": "order",
    "verdict_means": "means",
    "verdict_column": "column",
    "verdict_share": "share",
}
"""Settings of :class:`RunConfig` that are settings of the method "verdict", by their names there."""

MAY_DIFFER = ("device", "checkpoint_seconds", "root", "labels", "storage", "memory_budget")
"""Settings of :class:`RunConfig` that may change when a run is resumed, because they do not change its result."""


@dataclass
class RunConfig(Settings):
    """Settings of one run. Each is a flag of the command line.

    None means "not given": a published preset (``loop={"preset": ...}``), the baseline's protocol, the dataset's preset
    or a default decides, in this order; see :func:`tad_plugin.experiments.plan.resolve`.

    Attributes:
        baseline: distillation algorithm, one of those that `tad-plugin methods` lists at the end.
        dataset: digits, cifar10, cifar100, svhn, tinyimagenet, or folder:PATH of an image folder or a zip of one.
        root: folder of downloaded datasets, and of decoded images where the place beside a folder cannot be written.
        per_class: use only the first N training images of each class; 0 uses all.
        holdout: share of the real training data that is held out to choose the best iterate.
        noise: label noise, e.g. symmetric:0.4, asymmetric:0.4, pair:0.4, instance:0.4, human:worse, none.
        labels: label file for human noise (npz, or the published .pt).
        zca: whiten the images (ZCA) instead of only normalising them.
        image_size: bring the images to this height and width in pixels; by default (or 0 on the command line) theirs.
        storage: float32 keeps the images as floats in memory, uint8 as 8-bit pixels (those of folders in a file that is
            mapped into memory); auto takes floats up to 2 GiB. Results are the same.
        memory_budget: memory that the run may use, e.g. 16GB; it decides how many images go through a network in one
            pass. By default what the machine has.
        ipc: synthetic images per class.
        iterations: updates of the synthetic set; by default (or 0 on the command line) from the preset.
        lr_img: learning rate of the images; by default (or 0 on the command line) from the preset.
        width: channels of the ConvNet, in distillation and evaluation; by default (or 0 on the command line) from the
            preset.
        loop: further settings of the baseline by name, e.g. --loop.batch_real 128; --loop.preset NAME takes published
            ones, if the baseline has them.
        methods: settings by method, e.g. --methods '{"tad": {"threshold": 0.6}}'; "scorer" sets the plugin's scorer.
        eval_network: architecture that is trained on the synthetic set, or several joined by ",".
        eval_epochs: epochs of each evaluation network; by default (or 0 on the command line) from the preset.
        eval_runs: number of evaluation networks; by default (or 0 on the command line) from the preset.
        eval_lr: learning rate of the evaluation networks; it drops to a tenth halfway.
        candidates: number of iterates (evenly spaced, the last one included) from which held-out data choose the best.
        seed: seed of everything: noise, split, initial images, networks.
        verdict: file of a verdict on the samples that was made elsewhere, for the arm "verdict": csv, json, npz or pt.
        order: order of a --verdict that names no samples: published, train (held-out ones included) or given (the run).
        verdict_means: what unnamed values of --verdict are: keep, drop, labels, weights, quality, difficulty, verdict.
        verdict_column: the column of --verdict that decides, where there are several.
        verdict_share: share of each class to keep where --verdict has scores, in (0, 1].
        device: auto, cpu or cuda.
        precision: of the networks that are matched and trained on real data: fp32, tf32 (on CUDA) or bf16. Scores of
            the methods and evaluations are fp32 in any case.
        compile: compile the networks that are matched (torch.compile), in loops without second derivatives: dm, idm.
        checkpoint_seconds: seconds between checkpoints.

    Raises:
        ConfigError: a value of a wrong type or out of range. Settings of the loop and of the evaluation are checked
            when the run is resolved.
    """

    baseline: str = "dm"
    dataset: str = "digits"
    root: str = "data"
    per_class: int = setting(0, at_least=0)
    holdout: float = setting(0.1, at_least=0, below=1)
    noise: str = "none"
    labels: str = ""
    zca: bool | None = None
    image_size: int | None = setting(None, at_least=1)
    storage: str = setting("auto", one_of=STORAGES)
    memory_budget: str = ""
    ipc: int = 10
    iterations: int | None = None
    lr_img: float | None = None
    width: int | None = None
    loop: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    eval_network: str = EvaluateConfig.network
    eval_epochs: int | None = None
    eval_runs: int | None = None
    eval_lr: float = EvaluateConfig.lr
    candidates: int = setting(3, at_least=1)
    seed: int = setting(0, at_least=0)
    verdict: str = ""
    order: str = ""
    verdict_means: str = ""
    verdict_column: str = ""
    verdict_share: float = setting(0.0, at_least=0, at_most=1)
    device: str = "auto"
    precision: str = setting("fp32", one_of=PRECISIONS)
    compile: bool = False
    checkpoint_seconds: float = setting(20.0, at_least=0)

    def check(self) -> None:
        """See :class:`Settings`."""
        super().check()
        for name, own in self.methods.items():
            do = """Write for example --methods '{"tad": {"threshold": 0.6}}'"""
            self.require(isinstance(own, Mapping), f"a mapping of settings of {name!r}", repr(own), do)

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> "RunConfig":
        """Settings from the command line, where 0 in a field without a default means "not given"."""
        preset = {f.name for f in fields(cls) if f.default is None}
        values: dict[str, Any] = dict(given)
        for name in preset & set(values):
            if values[name] == 0 and values[name] is not False:
                values[name] = None
        return cls(**values)
