"""One run: dataset, noise, an arm, a baseline, evaluation; resumable, in a run folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tad_plugin.callback import build_config
from tad_plugin.data.datasets import DataSplits, load_dataset
from tad_plugin.data.noise import NoiseSpec, NoisyLabels
from tad_plugin.diagnostics import split_quality
from tad_plugin.distill.loop import Baseline, baseline_class, initial_images
from tad_plugin.errors import ConfigError, explain, unknown_name
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tad_plugin.hook import Hook, attach
from tad_plugin.registry import available_methods
from tad_plugin.runs import RunFolder, command_line, peak_memory_bytes, versions
from tad_plugin.synthetic import SyntheticSet

__all__ = ["ARMS", "Arm", "RunConfig", "parse_arm", "run"]


@dataclass(frozen=True)
class Arm:
    """What is compared: which labels the loop sees and which method acts.

    Attributes:
        method: as in :func:`tad_plugin.attach`.
        true_labels: the loop sees the true labels instead of the noisy ones.
        distil: False leaves the initial real images as they are.
        about: one line for tables and help.
    """

    method: str = "none"
    true_labels: bool = False
    distil: bool = True
    about: str = ""


ARMS: dict[str, Arm] = {
    "clean": Arm(true_labels=True, about="true labels, no method: the upper reference"),
    "noisy": Arm(about="observed labels, no method: the baseline"),
    "random": Arm(distil=False, about="random real images with observed labels, no distillation"),
    "random-subset": Arm("random", about="a random part of the real data: the control for fewer samples"),
    "oracle": Arm("oracle", about="only the correctly labelled samples; needs the true labels"),
    "loss-prune": Arm("loss-prune", about="lowest-loss samples of each class; is told the nominal noise rate"),
    "el2n": Arm("el2n", about="EL2N pruning; is told the nominal noise rate"),
    "clean-then-distil": Arm("clean-then-distil", about="cross-validated confident learning, then the baseline"),
    "tad": Arm("tad", about="trust-aware diversion"),
    "iwd": Arm("iwd", about="influence-weighted distillation"),
    "tad+iwd": Arm("tad+iwd", about="both"),
}
"""Named arms; any other registered method, or several joined by "+", is an arm too."""


def parse_arm(name: str) -> Arm:
    """The arm called ``name``. Raises UnknownNameError."""
    if name in ARMS:
        return ARMS[name]
    known = available_methods()
    for part in name.split("+"):
        if part not in known:
            raise unknown_name("arm or method", part, [*ARMS, *known])
    return Arm(name, about="registered method")


# What suits a dataset where the user says nothing; digits are 8x8 and few, so everything is smaller.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "iterations": 200,
        "width": 32,
        "lr_img": 1.0,
        "loop": {"batch_real": 64},
        "eval_epochs": 200,
        "eval_runs": 3,
    },
    "": {"iterations": 1000, "width": 128, "lr_img": 1.0, "loop": {}, "eval_epochs": 1000, "eval_runs": 5},
}


@dataclass
class RunConfig:
    """Settings of one run. Every flag of the command line is one of these.

    Attributes:
        baseline: distillation algorithm.
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
        loop: further settings of the baseline by name, e.g. --loop.batch_real 128.
        methods: settings by method, e.g. --methods '{"tad": {"threshold": 0.6}}'; "scorer" sets the plugin's scorer.
        eval_network: architecture that is trained on the synthetic set, or several joined by ",".
        eval_epochs: its epochs; 0 takes the preset.
        eval_runs: networks per evaluation; 0 takes the preset.
        eval_lr: its learning rate.
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
        preset = PRESETS.get(self.dataset, PRESETS[""])
        filled = {k: preset[k] for k in preset if k != "loop" and not getattr(self, k)}
        device = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if self.candidates < 1:
            raise ConfigError(explain("candidates of at least 1", str(self.candidates), "Correct the setting"))
        return dataclasses.replace(self, **filled, loop={**preset["loop"], **self.loop}, device=device)

    def evaluation(self) -> EvaluateConfig:
        """The evaluation's settings."""
        return EvaluateConfig(width=self.width, runs=self.eval_runs, epochs=self.eval_epochs, lr=self.eval_lr)


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^62) from a description: arms that share the description get the same numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


def _generator(*parts: Any) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))


def load_noisy(config: RunConfig) -> tuple[DataSplits, NoisyLabels, NoisyLabels | None]:
    """The dataset, and the noisy labels of its training part and of its held-out part (None where that is empty).

    The held-out labels are as noisy as the rest: a user has no others to choose the best iterate with.
    """
    splits = load_dataset(
        config.dataset,
        config.root,
        per_class=config.per_class or None,
        holdout=config.holdout,
        seed=config.seed,
        device=config.device,
        zca=config.zca,
    )
    path = config.labels if config.labels and config.noise.startswith("human") else None
    spec = NoiseSpec.parse(config.noise, seed=None if "seed=" in config.noise else config.seed, path=path)
    return splits, *splits.apply_noise(spec)


class Run:
    """One arm of one seed in one folder. ``Run(config, arm, folder).execute()`` returns the results.

    Args:
        config: the settings.
        arm: a name of ``ARMS`` or a method.
        folder: run folder.
        progress: show progress bars.
        overwrite: start over what another configuration left there.
    """

    def __init__(
        self, config: RunConfig, arm: str, folder: str | Path, *, progress: bool = False, overwrite: bool = False
    ) -> None:
        self.config = config = config.resolved()
        self.arm_name, self.arm = arm, parse_arm(arm)
        self.folder = RunFolder(folder, overwrite=overwrite)
        self.progress = progress
        self.cls = baseline_class(config.baseline)
        self.loop_config = build_config(
            self.cls.Config,
            {
                "ipc": config.ipc,
                "iterations": config.iterations if self.arm.distil else 0,
                "lr_img": config.lr_img,
                "width": config.width,
                **config.loop,
            },
            f"the baseline {config.baseline!r}",
        )
        self.folder.write_config(
            {"arm": arm, **dataclasses.asdict(config)}, ignore=("device", "checkpoint_seconds", "root", "labels")
        )

    def execute(self) -> dict[str, Any]:
        """Runs, or resumes, to the end. A finished folder returns its results at once."""
        if self.folder.is_done():
            return self.folder.results()
        config = self.config
        splits, noisy, noisy_holdout = load_noisy(config)
        true, observed = splits.train_labels, noisy.labels
        holdout = (splits.holdout_images, noisy_holdout.labels if noisy_holdout else splits.holdout_labels)
        if self.arm.true_labels:
            observed, holdout = true, (splits.holdout_images, splits.holdout_labels)
        hook = attach(
            self.arm.method,
            labels=observed,
            data=splits.train_images,
            num_classes=splits.num_classes,
            seed=derived_seed(config.seed, "hook") % 2**31,
            config=_for_methods(config.methods, self.arm.method, config),
            true_labels=true,
            dataset=splits.name,
            ipc=config.ipc,
            noise_rate=_nominal_rate(config.noise),
            trains_on_real=self.cls.trains_on_real,
            log=self.folder.log,
            start=False,
        )
        progress = _Progress(self, hook)
        if torch.device(config.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loop = self._distil(splits, hook, progress)
        accuracy, chosen = self._evaluate(splits, loop, holdout, progress)
        self._keep(splits, hook, loop)
        results = {
            "arm": self.arm_name,
            "baseline": config.baseline,
            "dataset": splits.name,
            "per_class": config.per_class,
            "ipc": config.ipc,
            "iterations": self.loop_config.iterations,
            "noise": {
                "kind": config.noise.split(":")[0],
                "text": config.noise,
                "rate": _nominal_rate(config.noise),
                "seed": config.seed,
                "realised_rate": noisy.realised_rate,
            },
            "seed": config.seed,
            "accuracy": accuracy,
            "best_iteration": chosen,
            "seconds_per_iteration": progress.seconds / max(1, self.loop_config.iterations),
            "scoring_seconds": hook.scoring_seconds,
            "peak_memory_bytes": peak_memory_bytes(config.device),
            "split": _split(hook),
            "state": hook.state.summary(),
            "versions": versions(config.device),
            "command": command_line(),
        }
        self.folder.write_results(results)
        return self.folder.results()

    # -- stages --------------------------------------------------------------------------------------
    def _distil(self, splits: DataSplits, hook: Hook, progress: _Progress) -> Baseline:
        config = self.config
        saved = self.folder.load_checkpoint()
        if saved is not None:
            hook.load_state_dict(saved[0]["hook"])
            progress.load(saved[0]["progress"])
        hook.start(progress=self.progress, checkpoint=progress.after_scoring)
        if hook.data is None:
            raise ConfigError(explain("a hook with data", "none", "Attach with data=images"))
        generator = _generator(config.seed, "loop")
        images, labels = initial_images(self.loop_config, hook.data, hook, generator)
        start = SyntheticSet(
            images, labels, splits.num_classes, splits.preprocessing, splits.name, tuple(splits.class_names)
        )
        loop = self.cls(self.loop_config, hook.data, hook, start, generator)
        if saved is not None and saved[0]["loop"] is not None:
            loop.load_state_dict(saved[0]["loop"])
        progress.restore_candidates(loop)
        progress.loop = loop
        total = self.loop_config.iterations
        bar = _bar(range(progress.iteration, total), f"{self.arm_name} ipc {config.ipc}", self.progress, total)
        for iteration in bar:
            began = perf_counter()
            record = loop.step(iteration)
            progress.seconds += perf_counter() - began
            progress.iteration = iteration + 1
            if progress.iteration % max(1, total // 50) == 0 or progress.iteration == total:
                self.folder.log({"event": "iteration", "iteration": progress.iteration, **record})
            if progress.iteration in self._candidate_iterations():
                progress.candidates[progress.iteration] = loop.result()
            progress.maybe_save()
        if not progress.finished:
            hook.finish()
            progress.finished = True
            progress.save()
        return loop

    def _candidate_iterations(self) -> list[int]:
        total, parts = self.loop_config.iterations, self.config.candidates
        return sorted({round(total * (k + 1) / parts) for k in range(parts)})

    def _evaluate(
        self, splits: DataSplits, loop: Baseline, holdout: tuple[Tensor, Tensor], progress: _Progress
    ) -> tuple[dict[str, Any], int]:
        """Accuracy of the last and of the best iterate; the best is chosen on held-out real data, never on test data."""
        config, settings = self.config, self.config.evaluation()
        last = loop.result()
        candidates: dict[int, SyntheticSet] = {**progress.candidates, self.loop_config.iterations: last}
        done = progress.evaluated
        test = (splits.test_images, splits.test_labels)

        def once(key: str, synthetic: SyntheticSet, on: tuple[Tensor, Tensor], network: str, run: int) -> float:
            if key not in done:
                part = key.split("/")[0]
                found = evaluate(
                    synthetic,
                    on,
                    settings,
                    preprocessing=splits.preprocessing,
                    network=network,
                    runs=1,
                    generator=_generator(
                        config.seed, "evaluation", "choose" if part == "choose" else "test", network, run
                    ),
                )
                done[key] = found.accuracies[0]
                progress.maybe_save()
            return done[key]

        networks = [n.strip() for n in config.eval_network.split(",")]
        chosen = self.loop_config.iterations
        if len(candidates) > 1 and len(holdout[1]):
            scores = {i: once(f"choose/{i}", s, holdout, networks[0], 0) for i, s in candidates.items()}
            chosen = max(scores, key=lambda i: (scores[i], i))
        self.folder.log({"event": "chosen", "iteration": chosen})
        table: dict[str, Any] = {}
        tasks = _bar(range(config.eval_runs * len(networks)), "evaluate", self.progress)
        for task in tasks:
            network, run = networks[task // config.eval_runs], task % config.eval_runs
            value = once(f"last/{network}/{run}", last, test, network, run)
            best = value if chosen == self.loop_config.iterations else None
            if best is None:
                best = once(f"best/{network}/{run}", candidates[chosen], test, network, run)
            target = table if network == networks[0] else table.setdefault("networks", {}).setdefault(network, {})
            target.setdefault("last", []).append(value)
            target.setdefault("best", []).append(best)
        progress.save()
        return table, chosen

    def _keep(self, splits: DataSplits, hook: Hook, loop: Baseline) -> None:
        loop.result().save(self.folder.path / "synthetic.safetensors")
        hook.save_state(self.folder.path / "state.safetensors")


class _Progress:
    """Where a run stands, and its checkpoint."""

    def __init__(self, run: Run, hook: Hook) -> None:
        self.run, self.hook = run, hook
        self.loop: Baseline | None = None
        self.iteration = 0
        self.seconds = 0.0
        self.finished = False
        self.candidates: dict[int, SyntheticSet] = {}
        self.evaluated: dict[str, float] = {}
        self._saved_at = perf_counter()
        self._pending: dict[int, tuple[Tensor, Tensor, float | None]] = {}

    def after_scoring(self) -> None:
        self.maybe_save()

    def maybe_save(self) -> None:
        if perf_counter() - self._saved_at > self.run.config.checkpoint_seconds:
            self.save()

    def save(self) -> None:
        tree = {
            "hook": self.hook.state_dict(),
            "loop": self.loop.state_dict() if self.loop is not None else None,
            "progress": {
                "iteration": self.iteration,
                "seconds": self.seconds,
                "finished": self.finished,
                "evaluated": dict(self.evaluated),
                "candidates": {str(i): [s.images, s.labels, s.learning_rate] for i, s in self.candidates.items()},
            },
        }
        self.run.folder.save_checkpoint(tree, self.iteration)
        self._saved_at = perf_counter()

    def load(self, saved: Mapping[str, Any]) -> None:
        self.iteration = int(saved["iteration"])
        self.seconds = float(saved["seconds"])
        self.finished = bool(saved["finished"])
        self.evaluated = dict(saved["evaluated"])
        self._pending = {int(i): tuple(v) for i, v in saved["candidates"].items()}

    def restore_candidates(self, loop: Baseline) -> None:
        """Candidates of a loaded checkpoint become synthetic sets again, with the loop's preprocessing and names."""
        where = loop.synthetic.images.device
        for i, (images, labels, rate) in self._pending.items():
            self.candidates[i] = dataclasses.replace(
                loop.result(), images=images.to(where), labels=labels.to(where), learning_rate=rate
            )
        self._pending = {}


def run(
    config: RunConfig, arm: str, folder: str | Path, *, progress: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Runs (or resumes, or returns) one arm; see :class:`Run`."""
    return Run(config, arm, folder, progress=progress, overwrite=overwrite).execute()


def _for_methods(settings: Mapping[str, Any], method: str, config: RunConfig) -> dict[str, Any]:
    """The settings that concern this arm's methods: one --methods serves all arms of a comparison."""
    names = set(method.split("+")) | {"scorer"}
    known = {*available_methods(), "scorer"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(explain(f"settings for {', '.join(sorted(known))}", ", ".join(unknown), "Correct --methods"))
    return {k: v for k, v in settings.items() if k in names}


def _nominal_rate(noise: str) -> float | None:
    spec = NoiseSpec.parse(noise)
    return spec.rate if spec.kind not in ("none", "human", "matrix") else None


def _split(hook: Hook) -> dict[str, float] | None:
    """Quality of the final division: of the state as it is, whatever method made it."""
    if not hook.enabled or hook.data is None or hook.data.true_labels is None:
        return None
    s = hook.state
    return split_quality(s.observed, s.target, s.trusted, s.trust, hook.data.true_labels)


def _bar(items: range, name: str, show: bool, total: int | None = None) -> Any:
    if not show or len(items) == 0:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=name, leave=False, initial=items.start, total=total)
