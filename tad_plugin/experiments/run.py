"""One run: dataset, noise, an arm, a baseline, evaluation; resumable, in a run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from tad_plugin.core.diagnostics import influence_quality, split_quality
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, Place, baseline_class
from tad_plugin.distill.experts.source import expert_config
from tad_plugin.distill.experts.train import STATE_FILE
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, explain
from tad_plugin.evaluate import evaluate
from tad_plugin.experiments.arm_hook import arm_hook, nominal_rate
from tad_plugin.experiments.arms import ARMS, Arm, parse_arm
from tad_plugin.experiments.config import MAY_DIFFER, PRESETS, RunConfig, check_config, load_noisy
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.run_state import Progress
from tad_plugin.experiments.sharing import shared_decisions, shared_experts
from tad_plugin.utils.machine import command_line, reset_peak_memory, versions
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import derived_seed, generator_of

__all__ = ["ARMS", "PRESETS", "Arm", "Run", "RunConfig", "check_config", "load_noisy", "parse_arm", "run"]


class Run:
    """One arm of one seed in one folder. ``Run(config, arm, folder).execute()`` returns the results.

    Args:
        config: the settings.
        arm: a name of ``ARMS`` or a method.
        folder: run folder.
        progress: show progress bars.
        overwrite: start over, removing what an earlier run left there.
        shared: folder in which runs share divisions and experts (see :mod:`tad_plugin.experiments.sharing`); None
            makes the run's own. Without effect where the settings name a buffer.

    Raises:
        UnknownNameError, ConfigError: see :func:`check_config`; the folder is not touched then.
        ResumeError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        config: RunConfig,
        arm: str,
        folder: str | Path,
        *,
        progress: bool = False,
        overwrite: bool = False,
        shared: str | Path | None = None,
    ) -> None:
        self.config = config = config.resolved()
        self.arm_name, self.arm = arm, parse_arm(arm)
        self.cls = baseline_class(config.baseline)
        self.loop_config = check_config(config, arm)
        self.folder = RunFolder(folder, overwrite=overwrite)
        if overwrite:
            self.cls.discard(self.folder.path)
        self.progress = progress
        self.shared = None if getattr(self.loop_config, "buffer", "") else shared
        if self.folder.config_path.exists():
            self._write_config()

    def _write_config(self) -> None:
        self.folder.write_config(
            {"arm": self.arm_name, **dataclasses.asdict(self.config)},
            ignore=MAY_DIFFER,
        )

    def execute(self) -> dict[str, Any]:
        """Runs, or resumes, to the end. A finished folder returns its results at once."""
        if self.folder.is_done():
            return self.folder.results()
        config = self.config
        reset_peak_memory(config.device)
        splits, noisy, noisy_holdout = load_noisy(config)
        self.cls.check_images(self.loop_config, splits.train_images)
        # Only now: data that cannot be loaded leave no folder behind that a corrected command would not fit.
        self._write_config()
        holdout = (splits.holdout_images, noisy_holdout.labels if noisy_holdout else splits.holdout_labels)
        if self.arm.true_labels:
            holdout = (splits.holdout_images, splits.holdout_labels)
        hook = arm_hook(
            config,
            self.arm_name,
            splits,
            noisy,
            experts=self._own_experts(),
            buffer=getattr(self.loop_config, "buffer", ""),
            trains_on_real=self.cls.trains_on_real,
            log=self.folder.log,
        )
        progress = Progress(self.folder, hook, device=config.device, every=config.checkpoint_seconds)
        loop = self._distil(splits, noisy, hook, progress)
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
                "kind": noisy.spec.kind,
                "key": noisy.spec.key,
                "text": config.noise,
                "rate": nominal_rate(noisy),
                "seed": noisy.spec.seed,
                "realised_rate": noisy.realised_rate,
            },
            "seed": config.seed,
            "accuracy": accuracy,
            "best_iteration": chosen,
            "seconds_per_iteration": progress.seconds / max(1, self.loop_config.iterations),
            "scoring_seconds": hook.scoring_seconds,
            "expert_seconds": loop.expert_seconds,
            "total_seconds": (progress.before or 0.0) + progress.seconds,
            "peak_memory_bytes": progress.peak_memory(),
            "split": _split(hook),
            "influence": _influence(hook),
            "state": hook.state.summary(),
            "versions": versions(config.device),
            "command": command_line(),
        }
        self.folder.write_results(results)
        return self.folder.results()

    # -- stages --------------------------------------------------------------------------------------
    def _distil(self, splits: DataSplits, noisy: NoisyLabels, hook: Hook, progress: Progress) -> Baseline:
        config = self.config
        saved = self.folder.load_checkpoint()
        if saved is not None:
            hook.load_state_dict(saved[0]["hook"])
            progress.load(saved[0]["progress"])
        shared = self._shared(splits, noisy, hook)
        hook.start(progress=self.progress, checkpoint=progress.maybe_save)
        if hook.data is None:
            raise ConfigError(explain("a hook with data", "none", "Attach with data=images"))
        place = self._place(splits, progress, shared)
        # What shared experts cost contains what their methods did.
        before = hook.scoring_seconds if shared is None else 0.0
        prepared = self.cls.prepare(self.loop_config, hook.data, hook, place) if self.arm.distil else None
        if progress.before is None:
            progress.before = before + getattr(prepared, "seconds", 0.0)
        extra = () if prepared is None else (prepared,)
        generator = generator_of(config.seed, "loop")
        images, labels = self.cls.initial_images(self.loop_config, hook.data, hook, generator, *extra)
        start = SyntheticSet(
            images, labels, splits.num_classes, splits.preprocessing, splits.name, tuple(splits.class_names)
        )
        loop = self.cls(self.loop_config, hook.data, hook, start, generator, *extra)
        if saved is not None and saved[0]["loop"] is not None:
            loop.load_state_dict(saved[0]["loop"])
        progress.restore_candidates(loop)
        progress.loop = loop
        total = self.loop_config.iterations
        steps = range(progress.iteration, total)
        for iteration in bar(
            steps, f"{self.arm_name} ipc {config.ipc}", self.progress and bool(steps), total, progress.iteration
        ):
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

    def _own_experts(self) -> ExpertConfig | None:
        """Settings of the experts, in trajectory matching."""
        return expert_config(self.loop_config) if self.cls.trains_on_real else None

    def _shared(self, splits: DataSplits, noisy: NoisyLabels, hook: Hook) -> Path | None:
        """Takes over what other runs have in common with this one; gives the buffer, where it has experts."""
        if self.shared is None or not self.arm.distil:
            return None
        root, own = Path(self.shared), self._own_experts()
        if own is not None:
            folder: Path | None = shared_experts(self.config, own, self.arm_name, root, progress=self.progress)
        else:
            folder = shared_decisions(self.config, self.arm_name, splits, noisy, root, progress=self.progress)
        if folder is not None and hook.enabled and not hook.decided and (folder / STATE_FILE).exists():
            found = RunFolder(folder)
            hook.adopt(folder / STATE_FILE)
            hook.scoring_seconds += found.results()["scoring_seconds"]
            for record in found.records():
                self.folder.log(record)
        return folder if own is not None else None

    def _place(self, splits: DataSplits, progress: Progress, experts: Path | None) -> Place:
        config = self.config

        def log(record: dict[str, Any]) -> None:
            self.folder.log(record)
            # A run that is killed goes on with the log as it was at its last checkpoint.
            progress.save()

        seed, every = derived_seed(config.seed, "experts"), config.checkpoint_seconds
        return Place(self.folder.path, seed, splits.preprocessing, every, self.progress, log, experts)

    def _candidate_iterations(self) -> list[int]:
        total, parts = self.loop_config.iterations, self.config.candidates
        return sorted({round(total * (k + 1) / parts) for k in range(parts)})

    def _evaluate(
        self, splits: DataSplits, loop: Baseline, holdout: tuple[Tensor, Tensor], progress: Progress
    ) -> tuple[dict[str, Any], int]:
        """Accuracy of the last and of the best iterate, and which that is.

        The best is chosen on held-out real data, never on test data.
        """
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
                    generator=generator_of(
                        config.seed, "evaluation", "choose" if part == "choose" else "test", network, run
                    ),
                )
                done[key] = found.accuracies[0]
                progress.maybe_save()
            return done[key]

        networks = config.networks()
        chosen = self.loop_config.iterations if progress.chosen is None else progress.chosen
        if progress.chosen is None:
            if len(candidates) > 1 and len(holdout[1]):
                scores = {i: once(f"choose/{i}", s, holdout, networks[0], 0) for i, s in candidates.items()}
                chosen = max(scores, key=lambda i: (scores[i], i))
            progress.chosen = chosen
            self.folder.log({"event": "chosen", "iteration": chosen})
        table: dict[str, Any] = {}
        for task in bar(range(config.eval_runs * len(networks)), "evaluate", self.progress):
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


def run(config: RunConfig, arm: str, folder: str | Path, **options: Any) -> dict[str, Any]:
    """Runs (or resumes, or returns) one arm; ``options`` are those of :class:`Run`."""
    return Run(config, arm, folder, **options).execute()


def _split(hook: Hook) -> dict[str, float] | None:
    """Quality of the final division: of the state as it is, whatever method made it."""
    if not hook.enabled or hook.data is None or hook.data.true_labels is None:
        return None
    s = hook.state
    return split_quality(s.observed, s.target, s.trusted, s.trust, hook.data.true_labels)


def _influence(hook: Hook) -> dict[str, float] | None:
    """Quality of the influences at the end; None where nothing was scored."""
    s = hook.state
    if hook.data is None or hook.data.true_labels is None or "influence" not in s:
        return None
    return influence_quality(s.target, s["influence"], s["influence_count"], s.trusted, hook.data.true_labels, s.weight)
