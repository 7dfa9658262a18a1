"""The pictures of a finished comparison, drawn from its run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tad_plugin.core.state import SampleState
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.experiments.compare import Task
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.loading import load_noisy
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.report.comparison import plot_comparison
from tad_plugin.experiments.report.synthetic import plot_synthetic
from tad_plugin.experiments.report.tables import summarise
from tad_plugin.experiments.report.trust import plot_loss_histogram, plot_trusted_space
from tad_plugin.tad.mixture import fit_class_mixture

__all__ = ["draw_comparison"]


def draw_comparison(results: list[dict[str, Any]], tasks: list[Task], out: Path) -> dict[str, Path]:
    """Draws everything that the finished run folders allow into ``out/pictures``; returns title -> file.

    The first seed's synthetic sets per arm and IPC, and for arms that divided the data by loss the trusted space over
    the rounds and the loss histogram with the fitted mixture.
    """
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    found = {"Accuracy by arm": folder / "accuracy.png"}
    plot_comparison(summarise(results), found["Accuracy by arm"])
    tasks = [t for t in tasks if RunFolder(t.folder).is_done()]
    first = min(t.config.seed for t in tasks)
    for task in (t for t in tasks if t.config.seed == first):
        label = f"{task.arm}, IPC {task.config.ipc}"
        stem = f"{task.arm.replace('+', '_')}-ipc{task.config.ipc}"
        synthetic = SyntheticSet.load(task.folder / "synthetic.safetensors")
        path = found[f"Synthetic images: {label}"] = folder / f"synthetic-{stem}.png"
        names = list(synthetic.class_names) or [str(c) for c in range(synthetic.num_classes)]
        plot_synthetic(
            synthetic.images, synthetic.hard_labels, path, inverse=synthetic.preprocessing.inverse, class_names=names
        )
    for task in _dividing(tasks, first):
        records = RunFolder(task.folder).records()
        stem = task.arm.replace("+", "_")
        path = found[f"Trusted space: {task.arm}"] = folder / f"trusted-{stem}.png"
        plot_trusted_space(records, path)
        state = SampleState.load(task.folder / "state.safetensors")
        losses = state["tad_loss"]
        mixture = fit_class_mixture(losses, state.observed, state.num_classes)
        wrong: torch.Tensor | None = None
        splits = load_noisy(resolve(task.config, task.arm))[0]
        if len(splits.train_labels) == len(state):
            wrong = state.observed != splits.train_labels.cpu()
        path = found[f"Losses and mixture: {task.arm}"] = folder / f"losses-{stem}.png"
        plot_loss_histogram(losses, state.observed, mixture, path, true_wrong=wrong)
    return found


def _dividing(tasks: list[Task], seed: int) -> list[Task]:
    """One run per arm (the largest IPC of that seed) whose state holds the losses of a division."""
    chosen: dict[str, Task] = {}
    for task in tasks:
        if task.config.seed == seed and "tad" in task.arm.split("+"):
            best = chosen.get(task.arm)
            if best is None or task.config.ipc > best.config.ipc:
                chosen[task.arm] = task
    return list(chosen.values())
