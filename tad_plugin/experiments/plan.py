"""The plan of one run: the user's settings with all presets and defaults filled in, checked once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tad_plugin.core.registry import available_methods, load_method, make_callbacks, method_names
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.sources import DATASETS
from tad_plugin.distill.baseline import Baseline, BaselineConfig, baseline_class
from tad_plugin.errors import ConfigError, FileFormatError, InvalidInputError, explain, missing_extra, unknown_name
from tad_plugin.evaluate import EvaluateConfig
from tad_plugin.experiments.arms import Arm, parse_arm
from tad_plugin.experiments.config import PRESETS, VERDICT, RunConfig
from tad_plugin.nn.networks import NETWORKS
from tad_plugin.utils.files import file_digest
from tad_plugin.utils.machine import byte_count, check_device
from tad_plugin.utils.precision import check_precision
from tad_plugin.utils.settings import build_config

__all__ = ["Plan", "resolve", "settings_of"]


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know. Made by :func:`resolve`; not changed afterwards.

    Attributes:
        name: the arm's name, as in folders and results.
        arm: the arm.
        baseline: class of the distillation loop.
        loop: settings of the loop.
        evaluation: settings of the evaluation, with the protocol's fixed ones.
        methods: settings by method, for all arms of a comparison; "scorer" holds those of the plugin's scorer.
        noise: label noise, with its seed.
        dataset: name of the dataset.
        root: folder of downloaded datasets.
        per_class: training images per class; 0 for all.
        holdout: share of the real training data that is held out, in [0, 1).
        zca: whether images are whitened.
        image_size: height and width of the images in pixels; None keeps theirs.
        storage: how the images are kept: "auto", "float32" or "uint8".
        memory_budget: bytes that the run may use; None for what the machine has.
        seed: seed of the run.
        device: "cpu" or a CUDA device.
        precision: precision of the networks that are matched and trained on real data.
        compile: whether the networks that are matched are compiled.
        candidates: number of iterates from which held-out data choose the best.
        checkpoint_seconds: seconds between checkpoints.
        record: the same as plain values, for config.yaml: "arm", then the fields of :class:`RunConfig`.
    """

    name: str
    arm: Arm
    baseline: type[Baseline]
    loop: BaselineConfig
    evaluation: EvaluateConfig
    methods: Mapping[str, Any]
    noise: NoiseSpec
    dataset: str
    root: str
    per_class: int
    holdout: float
    zca: bool
    image_size: int | None
    storage: str
    memory_budget: int | None
    seed: int
    device: str
    precision: str
    compile: bool
    candidates: int
    checkpoint_seconds: float
    record: Mapping[str, Any]

    @property
    def buffer(self) -> str:
        """Folder of a given replay buffer; "" if the loop has none or trains its own experts."""
        found: str = getattr(self.loop, "buffer", "")
        return found


def resolve(config: RunConfig, arm: str) -> Plan:
    """Fills in presets and defaults and checks everything that can be checked before data are loaded.

    Args:
        config: the user's settings.
        arm: a name of ``ARMS`` or a method.

    Raises:
        UnknownNameError: no such arm, method, baseline, preset, dataset or network.
        ConfigError: an unknown setting, one out of range, or a CUDA device that is not available.
    """
    chosen, baseline = parse_arm(arm), baseline_class(config.baseline)
    if config.dataset not in DATASETS and not config.dataset.startswith("folder:"):
        raise unknown_name("dataset", config.dataset, [*DATASETS, "folder:PATH"])
    preset = _preset(config, baseline)
    said = dataclasses.asdict(config)
    # They stand among the methods' settings.
    verdict = {own: value for name, own in VERDICT.items() if (value := said.pop(name))}
    said["methods"] = _with_verdict(said["methods"], verdict)
    device = _device(config.device)
    check_precision(config.precision, device)
    if config.compile and chosen.distil and not baseline.compiles:
        do = "Leave --compile out, or choose --baseline dm or idm"
        got = f"--baseline {config.baseline}, which differentiates twice"
        raise ConfigError(explain("a loop whose networks can be compiled", got, do))
    methods = {
        k: {**preset["methods"].get(k, {}), **said["methods"].get(k, {})} for k in preset["methods"] | said["methods"]
    }
    record = {
        "arm": arm,
        # Without later settings where they are not given: folders of versions that lacked them can be resumed.
        **{k: preset[k] if v is None else v for k, v in said.items() if (k, v) not in _LATER},
        "loop": preset["loop"] | {k: v for k, v in said["loop"].items() if k != "preset"},
        "methods": methods,
        "device": device,
    }
    make_callbacks(chosen.method, settings_of(methods, chosen.method))
    noise = _noise(config)
    _check_needs(config, chosen, noise)
    values = {k: record[k] for k in ("ipc", "iterations", "lr_img", "width")} | record["loop"]
    values |= {} if chosen.distil else {"iterations": 0, "init": "real"}
    loop = build_config(baseline.Config, values, f"the baseline {config.baseline!r}")
    _check_norm(loop, config.baseline, chosen)
    return Plan(
        name=arm,
        arm=chosen,
        baseline=baseline,
        loop=loop,
        evaluation=_evaluation(record, baseline),
        methods=methods,
        noise=noise,
        dataset=config.dataset,
        root=config.root,
        per_class=config.per_class,
        holdout=config.holdout,
        zca=record["zca"],
        image_size=config.image_size,
        storage=config.storage,
        memory_budget=byte_count(config.memory_budget, "--memory_budget") if config.memory_budget else None,
        seed=config.seed,
        device=device,
        precision=config.precision,
        compile=config.compile,
        candidates=config.candidates,
        checkpoint_seconds=config.checkpoint_seconds,
        record=record,
    )


# Settings that came later, with the values that change nothing.
_LATER = (
    ("image_size", None), ("precision", "fp32"), ("compile", False), ("storage", "auto"), ("memory_budget", ""),
)  # fmt: skip


def settings_of(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings that concern the methods of one arm, out of those for all arms of a comparison.

    A rival with networks of its own (a field ``scorer``) gets the settings of the plugin's scorer for them.

    Args:
        settings: settings by method, and "scorer".
        method: as in :func:`tad_plugin.attach`.

    Raises:
        ConfigError: settings of an unknown method.
    """
    names = set(method.split("+")) | {"scorer"}
    known = {*available_methods(), "scorer"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(explain(f"settings for {', '.join(sorted(known))}", ", ".join(unknown), "Correct --methods"))
    chosen: dict[str, Any] = {k: v for k, v in settings.items() if k in names}
    for name in names & set(known) - {"scorer"}:
        config = load_method(name).Config
        if "scorer" in settings and config is not None and any(f.name == "scorer" for f in dataclasses.fields(config)):
            own = dict(chosen.get(name, {}))
            chosen[name] = {**own, "scorer": {**settings["scorer"], **own.get("scorer", {})}}
    return chosen


def _with_verdict(methods: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the methods, with those of a verdict and the sha256 of its file."""
    own = {**methods.get("verdict", {}), **given}
    if not own:
        return dict(methods)
    if not own.get("file"):
        got = ", ".join(f"{name} {value!r}" for name, value in own.items())
        raise ConfigError(explain("--verdict FILE", f"only {got}", "Name the file, or leave these settings out"))
    path = Path(os.path.expanduser(str(own["file"])))
    if not path.is_file():
        raise FileFormatError(explain("a file of verdicts", f"no file at {path.absolute()}", "Correct --verdict"))
    return {**methods, "verdict": {**own, "sha256": own.get("sha256") or file_digest(path)}}


def _preset(config: RunConfig, baseline: type[Baseline]) -> dict[str, Any]:
    """A value for every field that the user may leave open: defaults, dataset, protocol, published settings."""
    known = {f.name for f in dataclasses.fields(baseline.Config)}
    preset: dict[str, Any] = {
        "zca": False,
        "lr_img": baseline.Config.lr_img,
        "width": baseline.Config.width,
        "loop": {},
        "methods": {},
        "eval_epochs": EvaluateConfig.epochs,
        "eval_runs": EvaluateConfig.runs,
        **PRESETS.get(config.dataset, PRESETS[""]),
        **baseline.preset,
    }
    # A dataset's preset serves all baselines; some have no such setting.
    preset["loop"] = {k: v for k, v in preset["loop"].items() if k in known}
    if baseline.trains_on_real:
        # Presets of the methods were chosen for the plugin's own scorer. Here the loop's networks take its place.
        preset["methods"] = {k: v for k, v in preset["methods"].items() if k == "scorer"}
    if "preset" in config.loop:
        named = baseline.published(str(config.loop["preset"]), config.ipc)
        preset |= {**named, "loop": {**preset["loop"], **named.get("loop", {})}}
    return preset


def _evaluation(record: Mapping[str, Any], baseline: type[Baseline]) -> EvaluateConfig:
    found = EvaluateConfig(
        network=record["eval_network"],
        width=record["width"],
        runs=record["eval_runs"],
        epochs=record["eval_epochs"],
        lr=record["eval_lr"],
        **baseline.evaluation,
    )
    for name in found.networks:
        if name not in NETWORKS:
            raise unknown_name("network", name, list(NETWORKS))
    return found


def _noise(config: RunConfig) -> NoiseSpec:
    """Seeded with the run's seed unless the text names one; human labels come from ``labels``."""
    spec = NoiseSpec.parse(config.noise, seed=None if "seed=" in config.noise else config.seed)
    if not config.labels:
        return spec
    if spec.kind != "human":
        do = "Add --noise human:KEY with a label set of the file, or leave --labels out"
        raise ConfigError(explain("human noise, because a label file is given", f"noise {config.noise!r}", do))
    if spec.path is not None:
        do = "Leave --labels out, or the path in --noise"
        raise ConfigError(explain("one label file", f"labels {config.labels!r} and noise {config.noise!r}", do))
    return dataclasses.replace(spec, path=config.labels)


def _check_needs(config: RunConfig, arm: Arm, noise: NoiseSpec) -> None:
    """Whether the methods of an arm get what they need: packages, and true labels."""
    for name in method_names(arm.method):
        method = load_method(name)
        for package in method.packages:
            if find_spec(package) is None:
                raise missing_extra(package, "reproduce", f"the method {name!r}")
        if name == "verdict" and not config.verdict and not config.methods.get(name, {}).get("file"):
            do = "Add --verdict FILE: csv, json, npz or pt"
            raise ConfigError(explain("the file of the arm 'verdict'", "none", do))
        if method.needs_true_labels and config.dataset.startswith("folder:") and noise.kind == "none":
            do = "Put noise on labels that are right (--noise symmetric:0.4), or leave this arm out"
            expected = f"known true labels, which the method {name!r} needs"
            raise ConfigError(explain(expected, "a folder, whose own labels may be wrong", do))


def _check_norm(loop: BaselineConfig, baseline: str, arm: Arm) -> None:
    """Influence on an expert's segment takes the gradient of each sample, and batch norm mixes samples."""
    names = [name for name in method_names(arm.method) if load_method(name).needs_graph]
    if names and arm.distil and loop.norm == "batch" and hasattr(loop, "experts"):
        expected = f"a norm under which samples have gradients of their own, which {names[0]!r} needs in {baseline}"
        raise ConfigError(explain(expected, "--loop.norm batch", "Use --loop.norm instance, or leave this arm out"))


def _device(name: str) -> str:
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise ConfigError(explain("a CUDA device", f"{name!r}, and none is available", "Use --device cpu"))
    try:
        check_device(name)
    except InvalidInputError as error:
        raise ConfigError(explain("a device (auto, cpu or cuda)", repr(name), "Correct --device")) from error
    return name
