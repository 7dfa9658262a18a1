"""The pictures of a finished comparison, drawn from its run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tad_plugin.core.state import SampleState
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.launch import Task
from tad_plugin.experiments.loading import load_noisy, truth_known
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.report.comparison import plot_comparison
from tad_plugin.experiments.report.roles import methods_of
from tad_plugin.experiments.report.synthetic import plot_synthetic
from tad_plugin.experiments.report.tables import summarise
from tad_plugin.experiments.report.trust import plot_loss_histogram, plot_trusted_space
from tad_plugin.utils.write_errors import writing_to

__all__ = ["draw_comparison"]


def draw_comparison(results: list[dict[str, Any]], tasks: list[Task], out: Path) -> dict[str, Path]:
    """Draws all pictures that the finished run folders allow into ``out/pictures``.

    The first seed's synthetic sets are drawn for each arm and IPC. An arm whose method divided the data by loss
    (:meth:`~tad_plugin.core.callback.Callback.loss_division`) also gets its trusted space over the rounds and its loss
    histogram with the fitted mixture, both of its largest IPC.

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
    rows, found = summarise(results), {}
    if any(row.last is not None for row in rows):  # there are test images
        found["Accuracy by arm"] = plot_comparison(rows, folder / "accuracy.png")
    tasks = [t for t in tasks if RunFolder(t.folder).is_done()]
    first = min(t.config.seed for t in tasks)
    tasks = [t for t in tasks if t.config.seed == first]
    for task in tasks:
        found |= _draw_synthetic(task, folder)
    largest: dict[str, Task] = {}
    for task in tasks:
        if task.arm not in largest or task.config.ipc > largest[task.arm].config.ipc:
            largest[task.arm] = task
    for task in largest.values():
        found |= _draw_division(task, folder)
    return found


def _stem(arm: str) -> str:
    return arm.replace("+", "_")


def _draw_synthetic(task: Task, folder: Path) -> dict[str, Path]:
    ipc = task.config.ipc
    path = folder / f"synthetic-{_stem(task.arm)}-ipc{ipc}.png"
    synthetic = SyntheticSet.load(task.folder / "synthetic.safetensors")
    names = list(synthetic.class_names) or [str(c) for c in range(synthetic.num_classes)]
    inverse = synthetic.preprocessing.inverse
    plot_synthetic(synthetic.images, synthetic.hard_labels, path, inverse=inverse, class_names=names)
    return {f"Synthetic images: {task.arm}, IPC {ipc}": path}


def _draw_division(task: Task, folder: Path) -> dict[str, Path]:
    """The pictures of the first of the arm's methods that divided the data by loss; none if no method did."""
    methods = methods_of(task.arm)
    if not methods:
        return {}
    state = SampleState.load(task.folder / "state.safetensors")
    divisions = [method.loss_division(state) for method in methods]
    division = next((d for d in divisions if d is not None), None)
    if division is None:
        return {}
    losses, mixture = division
    plan = resolve(task.config, task.arm)
    labels = load_noisy(plan)[0].train_labels.cpu()
    wrong = state.observed != labels if len(labels) == len(state) and truth_known(plan) else None
    space, histogram = (folder / f"{name}-{_stem(task.arm)}.png" for name in ("trusted", "losses"))
    plot_trusted_space(RunFolder(task.folder).records(), space)
    plot_loss_histogram(losses, state.observed, mixture, histogram, true_wrong=wrong)
    return {f"Trusted space: {task.arm}": space, f"Losses and mixture: {task.arm}": histogram}
