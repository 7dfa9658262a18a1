"""The pictures of a finished comparison, drawn from its run folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tad_plugin.core.state import SampleState
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.launch import Task
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.report.comparison import plot_comparison
from tad_plugin.experiments.report.decisions import plot_distrusted, plot_noise_matrix, plot_weights
from tad_plugin.experiments.report.progress import plot_class_accuracy, plot_curves
from tad_plugin.experiments.report.roles import knows_truth, methods_of
from tad_plugin.experiments.report.synthetic import plot_arms
from tad_plugin.experiments.report.tables import summarise
from tad_plugin.experiments.report.trust import plot_loss_histogram, plot_trusted_space
from tad_plugin.utils.write_errors import writing_to

__all__ = ["draw_comparison", "run_links"]


def draw_comparison(results: list[dict[str, Any]], tasks: list[Task], out: Path) -> dict[str, Path]:
    """Draws all pictures that the finished run folders allow into ``out/pictures``.

    For each IPC: accuracies, their course over the iterations, and the synthetic images of all arms side by side. For
    the largest IPC: the accuracy on each class. Of the first seed: the noise matrix, and what each arm with a method
    decided on the real samples.

    Args:
        results: dicts as in results.json.
        tasks: the runs of the comparison; those that are not finished are left out.
        out: folder of the comparison.

    Returns:
        Title -> file, in the order of the page.
    """
    folder = out / "pictures"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tasks = [t for t in tasks if RunFolder(t.folder).is_done()]
    first = min(t.config.seed for t in tasks)
    tasks = [t for t in tasks if t.config.seed == first]
    found = _draw_accuracies(results, _class_names(tasks[0]), folder)
    for ipc in sorted({t.config.ipc for t in tasks}):
        path = folder / f"synthetic-ipc{ipc}.svg"
        found[f"Synthetic images, IPC {ipc}"] = _draw_synthetic([t for t in tasks if t.config.ipc == ipc], path)
    largest: dict[str, Task] = {}
    for task in tasks:
        if task.arm not in largest or task.config.ipc > largest[task.arm].config.ipc:
            largest[task.arm] = task
    plan = resolve(tasks[-1].config, tasks[-1].arm)
    if not plan.arm.true_labels and truth_known(plan):
        splits, noisy, _ = load_noisy(plan)
        names = list(splits.class_names)
        path = plot_noise_matrix(noisy.matrix, folder / "noise.svg", class_names=names)
        found["Noise: observed labels of each true class, %"] = path
    for task in largest.values():
        found |= _draw_decisions(task, folder)
    return found


def run_links(tasks: list[Task], out: Path) -> dict[str, str]:
    """Name of each finished run -> its folder, relative to a page in ``out``."""
    done = [t for t in tasks if RunFolder(t.folder).is_done()]
    return {
        f"{t.arm}, IPC {t.config.ipc}, seed {t.config.seed}": Path(os.path.relpath(t.folder, out)).as_posix() + "/"
        for t in done
    }


def _draw_accuracies(results: list[dict[str, Any]], names: list[str], folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    rows = summarise(results)
    ipcs = sorted({row.ipc for row in rows})
    for ipc in ipcs:
        of_ipc = [row for row in rows if row.ipc == ipc]
        if any(row.last is not None for row in of_ipc):  # there are test images
            found[f"Accuracy by arm, IPC {ipc}"] = plot_comparison(of_ipc, folder / f"accuracy-ipc{ipc}.svg")
    for ipc in ipcs:
        of = [r for r in results if r["ipc"] == ipc]
        if drawn := plot_curves(of, folder / f"curve-ipc{ipc}.svg"):
            found[f"Accuracy over the iterations, IPC {ipc} (mean over seeds, one network each)"] = drawn
    of = [r for r in results if r["ipc"] == ipcs[-1]]
    if drawn := plot_class_accuracy(of, folder / "classes.svg", class_names=names):
        found[f"Accuracy on each class, IPC {ipcs[-1]}, %"] = drawn
    return found


def _stem(arm: str) -> str:
    return arm.replace("+", "_")


def _class_names(task: Task) -> list[str]:
    synthetic = SyntheticSet.load(task.folder / "synthetic.safetensors")
    return list(synthetic.class_names) or [str(c) for c in range(synthetic.num_classes)]


def _draw_synthetic(tasks: list[Task], path: Path) -> Path:
    sets = {}
    for task in tasks:
        synthetic = SyntheticSet.load(task.folder / "synthetic.safetensors")
        sets[task.arm] = synthetic.preprocessing.inverse(synthetic.images), synthetic.hard_labels
    return plot_arms(sets, path, class_names=_class_names(tasks[0]))


def _draw_decisions(task: Task, folder: Path) -> dict[str, Path]:
    """What an arm decided on the real samples; nothing if it has no method, or one that is given the truth."""
    methods = methods_of(task.arm)
    if not methods or knows_truth(task.arm):
        return {}
    state = SampleState.load(task.folder / "state.safetensors")
    plan = resolve(task.config, task.arm)
    splits = load_noisy(plan)[0]
    labels, names = splits.train_labels.cpu(), list(splits.class_names)
    if len(labels) != len(state):
        return {}
    true = labels if truth_known(plan) else None
    stem, found = _stem(task.arm), dict[str, Path]()
    division = next((d for d in (method.loss_division(state) for method in methods) if d is not None), None)
    if division is not None:
        space = plot_trusted_space(RunFolder(task.folder).records(), folder / f"trusted-{stem}.svg")
        found[f"{task.arm}: samples trusted, relabelled and untrusted over the rounds"] = space
        wrong = None if true is None else state.observed != true
        losses, mixture = division
        path = folder / f"losses-{stem}.svg"
        plot_loss_histogram(losses, state.observed, mixture, path, true_wrong=wrong)
        found[f"{task.arm}: losses and mixture"] = path
    inverse = splits.preprocessing.inverse
    path = folder / f"distrusted-{stem}.svg"
    if plot_distrusted(splits.train_images, state, path, class_names=names, true_labels=true, inverse=inverse):
        framed = "" if true is None else "; framed: its label was right"
        found[f"{task.arm}: most doubted samples of each class, with their new label{framed}"] = path
    path = folder / f"weights-{stem}.svg"
    if plot_weights(state, path, true_labels=true):
        found[f"{task.arm}: weights of the samples"] = path
    return found
