"""One run in one folder: data, noise, an arm, a baseline, evaluation. It resumes after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from tad_plugin.core.diagnostics import influence_quality, split_quality
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.datasets import DataSplits
from tad_plugin.data.noise.spec import NoisyLabels
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Baseline, Place
from tad_plugin.distill.experts.source import expert_config
from tad_plugin.distill.experts.train import STATE_FILE
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.evaluate import evaluate
from tad_plugin.experiments.arm_hook import arm_hook, nominal_rate
from tad_plugin.experiments.config import MAY_DIFFER, RunConfig
from tad_plugin.experiments.doubts import doubts
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.held_out import NO_ACCURACY, held_out
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import Plan, resolve
from tad_plugin.experiments.run_state import RunState
from tad_plugin.experiments.sharing import shared_decisions, shared_experts, shared_state
from tad_plugin.nn.passes import memory_budget
from tad_plugin.utils.image_store import Images
from tad_plugin.utils.machine import command_line, reset_peak_memory, versions
from tad_plugin.utils.precision import network_precision
from tad_plugin.utils.progress import bar
from tad_plugin.utils.seeds import derived_seed, generator_of

__all__ = ["FILES", "Run", "run"]

FILES = ("synthetic.safetensors", STATE_FILE)
"""Files of a finished run, whose sha256 its results hold."""


class Run:
    """One arm of one seed in one folder. ``Run(plan, folder).execute()`` returns the results.

    Args:
        plan: what to run.
        folder: run folder.
        progress: show progress bars.
        overwrite: start over and remove what an earlier run left in the folder.
        shared: folder in which runs share decisions and experts (:mod:`tad_plugin.experiments.sharing`); None makes
            the run's own. No effect with a given replay buffer.

    Raises:
        ResumeError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        plan: Plan,
        folder: str | Path,
        *,
        progress: bool = False,
        overwrite: bool = False,
        shared: str | Path | None = None,
    ) -> None:
        self.plan = plan
        self.folder = RunFolder(folder)
        self.overwrite = overwrite
        self.progress = progress
        self.shared = None if plan.buffer else shared

    def execute(self) -> dict[str, Any]:
        """Runs, or resumes, to the end. A finished folder returns its results at once."""
        with self.folder.claimed():
            if self.overwrite:
                self.folder.clear()
                self.plan.baseline.discard(self.folder.path)
            found = self.folder.check_config(self.plan.record, self._identity(), FILES, ignore=MAY_DIFFER)
            if found is not None:
                return found
            with memory_budget(self.plan.memory_budget):
                return self._run()

    def _identity(self) -> dict[str, Any]:
        """What tells the results of this run from those of another one."""
        plan = self.plan
        found = {"arm": plan.name, "baseline": plan.record["baseline"], "ipc": plan.loop.ipc, "seed": plan.seed}
        # The name of a folder's data is known only after it is read; its path stands in the configuration.
        return found if plan.dataset.startswith("folder:") else {**found, "dataset": plan.dataset}

    def _run(self) -> dict[str, Any]:
        plan = self.plan
        reset_peak_memory(plan.device)
        splits, noisy, noisy_holdout = load_noisy(plan)
        plan.baseline.check_images(plan.loop, splits.train_images)
        # Only now, so that data that cannot be loaded leave no folder that a corrected command would not fit.
        self.folder.write_config(plan.record, ignore=MAY_DIFFER)
        holdout = (splits.holdout_images, noisy_holdout.labels if noisy_holdout else splits.holdout_labels)
        if plan.arm.true_labels:
            holdout = (splits.holdout_images, splits.holdout_labels)
        hook = arm_hook(plan, splits, noisy, experts=self._own_experts(), log=self.folder.log)
        state = RunState(self.folder, hook, device=plan.device, every=plan.checkpoint_seconds)
        with network_precision(plan.precision, plan.device):
            loop = self._distil(splits, noisy, hook, state)
        judges = (splits.test_images, splits.test_labels) if splits.tested else holdout
        accuracy, chosen = self._evaluate(splits, loop, judges, holdout, state)
        self._keep(hook, loop)
        odd = doubts(loop.result().images, splits, accuracy, judges[1], plan, loop.doubt())
        results = self._results(splits, noisy, hook, loop, state, chosen)
        results |= {"accuracy": accuracy, "doubts": odd, "curve": state.curve()}
        results["class_accuracy"] = state.class_accuracy(plan.evaluation.networks[0], splits.num_classes)
        if not splits.tested:
            results |= {"accuracy": NO_ACCURACY, "heldout": held_out(accuracy, len(judges[1]), plan)}
        self.folder.write_results(results, FILES)
        return self.folder.results()

    # -- stages --------------------------------------------------------------------------------------
    def _distil(self, splits: DataSplits, noisy: NoisyLabels, hook: Hook, state: RunState) -> Baseline:
        plan, cls = self.plan, self.plan.baseline
        saved = self.folder.load_checkpoint(log_bytes=cls.logged(self.folder.path))
        if saved is not None:
            hook.load_state_dict(saved[0]["hook"])
            state.load(saved[0]["progress"], saved[0]["loop"])
        shared = self._shared(splits, noisy, hook)
        hook.start(progress=self.progress, checkpoint=state.maybe_save)
        data = hook.data
        assert data is not None  # arm_hook attaches with data
        place = self._place(splits, state, shared)
        # The cost of shared experts already includes that of their methods.
        before = hook.scoring_seconds if shared is None else 0.0
        prepared = cls.prepare(plan.loop, data, hook, place) if plan.arm.distil else None
        if state.before is None:
            state.before = before + getattr(prepared, "seconds", 0.0)
        extra = () if prepared is None else (prepared,)
        generator = generator_of(plan.seed, "loop")
        images, labels = cls.initial_images(plan.loop, data, hook, generator, *extra)
        start = SyntheticSet(
            images, labels, splits.num_classes, splits.preprocessing, splits.name, tuple(splits.class_names)
        )
        loop = cls(plan.loop, data, hook, start, generator, *extra)
        if saved is not None and saved[0]["loop"] is not None:
            loop.load_state_dict(saved[0]["loop"])
        if plan.compile:
            loop.compile()
        state.restore_candidates(loop)
        state.loop = loop
        total, kept = plan.loop.iterations, self._candidate_iterations()
        steps = range(state.iteration, total)
        title, shown = f"{plan.name} ipc {plan.loop.ipc}", self.progress and bool(steps)
        for iteration in bar(steps, title, shown, total, state.iteration):
            began = perf_counter()
            record = loop.step(iteration)
            state.seconds += perf_counter() - began
            state.iteration = iteration + 1
            if state.iteration % max(1, total // 50) == 0 or state.iteration == total:
                self.folder.log({"event": "iteration", "iteration": state.iteration, **record})
            if state.iteration in kept:
                state.candidates[state.iteration] = loop.result()
            state.maybe_save()
        if not state.finished:
            hook.finish()
            state.finished = True
            state.save()
        return loop

    def _own_experts(self) -> ExpertConfig | None:
        """Settings of the experts; None if the loop has none."""
        return expert_config(self.plan.loop) if self.plan.baseline.trains_on_real else None

    def _shared(self, splits: DataSplits, noisy: NoisyLabels, hook: Hook) -> Path | None:
        """Makes or finds what runs share, and adopts its decisions. Returns the buffer of shared experts, if any."""
        if self.shared is None or not self.plan.arm.distil:
            return None
        root, own = Path(self.shared), self._own_experts()
        if own is not None:
            folder: Path | None = shared_experts(self.plan, own, root, progress=self.progress)
        else:
            folder = shared_decisions(self.plan, splits, noisy, root, progress=self.progress)
        state = None if folder is None else shared_state(self.plan, folder)
        if folder is not None and state is not None and not hook.decided:
            found = RunFolder(folder)
            hook.adopt(state)
            hook.scoring_seconds += found.results()["scoring_seconds"]
            for record in found.records():
                self.folder.log(record)
        return folder if own is not None else None

    def _place(self, splits: DataSplits, state: RunState, experts: Path | None) -> Place:
        return Place(
            self.folder.path,
            derived_seed(self.plan.seed, "experts"),
            splits.preprocessing,
            self.plan.checkpoint_seconds,
            self.progress,
            self.folder.log,
            experts,
            begin=state.save,
            log_bytes=self.folder.log_bytes,
        )

    def _candidate_iterations(self) -> list[int]:
        total = self.plan.loop.iterations
        parts = min(self.plan.candidates, total)  # more than one for each iteration would be the same ones
        return sorted({round(total * (k + 1) / parts) for k in range(parts)})

    def _evaluate(
        self,
        splits: DataSplits,
        loop: Baseline,
        test: tuple[Images, Tensor],
        holdout: tuple[Images, Tensor],
        state: RunState,
    ) -> tuple[dict[str, Any], int]:
        """Accuracies on ``test`` of the last and of the best iterate, and the iteration of the best.

        The best is chosen on held-out real data, never on test data. Without images in ``test`` there are none.
        """
        settings, seed, final = self.plan.evaluation, self.plan.seed, self.plan.loop.iterations
        last = loop.result()
        candidates: dict[int, SyntheticSet] = {**state.candidates, final: last}
        done = state.evaluated

        def once(key: str, synthetic: SyntheticSet, on: tuple[Images, Tensor], network: str, run: int) -> float:
            if key not in done:
                choosing = key.startswith("choose/")
                part = "choose" if choosing else "test"
                found = evaluate(
                    synthetic,
                    on,
                    settings,
                    preprocessing=splits.preprocessing,
                    network=network,
                    runs=1,
                    also=test if choosing and len(test[1]) and test is not holdout else None,
                    generator=generator_of(seed, "evaluation", part, network, run),
                )
                done[key] = found.accuracies[0]
                if choosing and found.also:  # for the curve alone: test data choose nothing
                    done[key.replace("choose/", "curve/")] = found.also[0]
                if key.startswith("last/"):
                    shares = enumerate(found.per_class[0])
                    done.update((f"classes/{network}/{run}/{c}", share) for c, share in shares if not math.isnan(share))
                state.maybe_save()
            return done[key]

        networks = settings.networks
        chosen = final if state.chosen is None else state.chosen
        if state.chosen is None:
            if len(candidates) > 1 and len(holdout[1]):
                scores = {i: once(f"choose/{i}", s, holdout, networks[0], 0) for i, s in candidates.items()}
                chosen = max(scores, key=lambda i: (scores[i], i))
            state.chosen = chosen
            self.folder.log({"event": "chosen", "iteration": chosen})
        table: dict[str, Any] = {}
        tasks = settings.runs * len(networks) if len(test[1]) else 0
        for task in bar(range(tasks), "evaluate", self.progress):
            network, run = networks[task // settings.runs], task % settings.runs
            value = once(f"last/{network}/{run}", last, test, network, run)
            best = value if chosen == final else once(f"best/{network}/{run}", candidates[chosen], test, network, run)
            target = table if network == networks[0] else table.setdefault("networks", {}).setdefault(network, {})
            target.setdefault("last", []).append(value)
            target.setdefault("best", []).append(best)
        state.save()
        return table, chosen

    def _keep(self, hook: Hook, loop: Baseline) -> None:
        loop.result().save(self.folder.path / FILES[0])
        hook.save_state(self.folder.path / STATE_FILE)

    def _results(
        self,
        splits: DataSplits,
        noisy: NoisyLabels,
        hook: Hook,
        loop: Baseline,
        state: RunState,
        chosen: int,
    ) -> dict[str, Any]:
        plan = self.plan
        return {
            "arm": plan.name,
            "baseline": plan.record["baseline"],
            "dataset": splits.name,
            "per_class": plan.per_class,
            "ipc": plan.loop.ipc,
            "iterations": plan.loop.iterations,
            "noise": {
                "kind": noisy.spec.kind,
                "key": noisy.spec.key,
                "text": plan.record["noise"],
                "rate": nominal_rate(noisy),
                "seed": noisy.spec.seed,
                "realised_rate": noisy.realised_rate if truth_known(plan) else None,
            },
            "seed": plan.seed,
            "best_iteration": chosen,
            "seconds_per_iteration": state.seconds / max(1, plan.loop.iterations),
            "scoring_seconds": hook.scoring_seconds,
            "expert_seconds": loop.expert_seconds,
            "total_seconds": (state.before or 0.0) + state.seconds,
            "peak_memory_bytes": state.peak_memory(),
            "split": _split(hook),
            "influence": _influence(hook),
            "state": hook.state.summary(),
            "versions": versions(plan.device),
            "command": command_line(),
            "config_sha256": self.folder.config_digest(plan.record, ignore=MAY_DIFFER),
        }


def run(config: RunConfig, arm: str, folder: str | Path, **options: Any) -> dict[str, Any]:
    """Runs one arm, resumes it, or returns its results if it is finished.

    Args:
        config: the user's settings.
        arm: a name of ``ARMS`` or a method.
        folder: run folder.
        options: see :class:`Run`.

    Returns:
        The contents of results.json.

    Raises:
        UnknownNameError, ConfigError: see :func:`tad_plugin.experiments.plan.resolve`; the folder is not touched then.
        ResumeError: the folder holds a run with other settings.
    """
    return Run(resolve(config, arm), folder, **options).execute()


def _split(hook: Hook) -> dict[str, float] | None:
    """Quality of the final division, whichever method made it; None without methods or true labels."""
    if not hook.enabled or hook.data is None or hook.data.true_labels is None:
        return None
    s = hook.state
    return split_quality(s.observed, s.target, s.trusted, s.trust, hook.data.true_labels)


def _influence(hook: Hook) -> dict[str, float] | None:
    """Quality of the final influences; None without influences or true labels."""
    s = hook.state
    if hook.data is None or hook.data.true_labels is None or "influence" not in s:
        return None
    return influence_quality(s.target, s["influence"], s["influence_count"], s.trusted, hook.data.true_labels, s.weight)
