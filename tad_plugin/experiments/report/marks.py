"""What tables mark: arms that know something, and the best arms. Also the meaning of each column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tad_plugin.experiments.report.roles import knows_truth, told_rate

__all__ = ["COLUMNS", "MARKED", "leaders", "marked", "marks_note"]

_Item = TypeVar("_Item")

COLUMNS = {
    "IPC": "images per class: synthetic images for each class",
    "arm": "which labels the loop sees, and which method decides what counts",
    "n": "seeds",
    "seeds": "runs with other random numbers; ± is the sample standard deviation over them",
    "last": "test accuracy of the last synthetic set, %; the mean over networks of one seed, then over seeds",
    "best": "the same of the iterate that a held-out part of the real training data chose",
    "held out": "accuracy on held-out training images, by labels that may be wrong themselves",
    "gain": "over the noisy arm (clean, where there is none) seed by seed, 95% interval, p of a paired t test",
    "over random": "gain over random real images without distillation",
    "recovered": "share of the gap between noisy and clean labels that is won back",
    "s/iter": "seconds per update of the synthetic set",
    "scoring s": "seconds spent on scoring real samples",
    "cost": "time of scoring, experts and distillation, as a multiple of the noisy arm's",
    "memory": "peak memory of the run",
    "precision": "share of right labels among trusted samples, relabelled ones included",
    "recall": "share of rightly labelled samples that are trusted",
    "AUC": "area under the ROC curve of the trust for right labels: 0.5 is chance, 1 is perfect",
}
"""Name of a column -> its meaning."""
MARKED = "bold: the highest last accuracy of an IPC among arms without *, and all within its standard error."
_MARKS = {"*": "knows the true labels", "†": "is told the rate of wrong labels"}


def marked(arm: str) -> str:
    """The arm's name with its marks: * knows the true labels, † is told how many labels are wrong."""
    if knows_truth(arm):
        return f"{arm} *"
    return f"{arm} †" if told_rate(arm) else arm


def marks_note(arms: Iterable[str]) -> str:
    """Explains the marks that stand beside these arms; empty if there are none."""
    shown = {marked(arm)[-1] for arm in arms}
    return " ".join(f"{mark} {meaning}." for mark, meaning in _MARKS.items() if mark in shown)


def leaders(items: Sequence[tuple[_Item, str, float, float | None, int]]) -> list[_Item]:
    """The items with the highest mean, and all others within the standard error of that mean.

    Args:
        items: (item, its arm, mean, sample standard deviation or None, number of seeds) of one IPC.

    Returns:
        Those among the arms that do not know the true labels; empty if there is none.
    """
    fair = [entry for entry in items if not knows_truth(entry[1])]
    if not fair:
        return []
    _, _, top, spread, count = max(fair, key=lambda entry: entry[2])
    error = (spread or 0.0) / count**0.5
    return [item for item, _, mean, _, _ in fair if mean >= top - error]
