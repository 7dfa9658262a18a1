"""Statistics of a grid: means over seeds, paired gains with a confidence interval and a test. [standard]

Networks of one seed are averaged first: a seed is one measurement. Gains are paired, since a seed fixes noise, split,
initial images and networks for all arms alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

__all__ = ["Gain", "GridRow", "Key", "grid_rows", "paired_gain"]

CONFIDENCE = 0.95
_FIGURES = ("seconds_per_iteration", "scoring_seconds", "peak_memory_bytes")
_QUALITY = ("precision", "recall", "auc")


@dataclass(frozen=True)
class Gain:
    """A difference of two arms over the seeds that both have.

    Attributes:
        mean: mean difference, in points.
        low, high: its 95% confidence interval by Student's t; None with fewer than two seeds.
        p: two-sided p of the paired t test; None with fewer than two seeds or equal differences.
        seeds: number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int


@dataclass(frozen=True)
class Key:
    """What the rows of one table have in common.

    Attributes:
        cell, way: as in the grid.
        baseline, dataset, noise: as in results; the noise as a text.
        ipc: images per class.
    """

    cell: str
    way: str
    baseline: str
    dataset: str
    noise: str
    ipc: int


@dataclass(frozen=True)
class GridRow:
    """One arm in one setting.

    Attributes:
        key: the setting.
        arm: the arm.
        last: accuracy of the last synthetic set of each seed, in percent; the mean over networks.
        best: the same of the iterate that held-out data chose.
        gain: over the arm "noisy", or over "clean" where no label is wrong; None for that arm itself.
        over_random: gain over the arm "random", the improvement over random images; None without that arm.
        recovered: share of the gap between noisy and clean labels that is won back, in percent; None under half a
            point of gap.
        seconds_per_iteration, scoring_seconds, peak_memory_bytes: mean over seeds, or None.
        precision, recall, auc: quality of the division, mean over seeds, or None.
    """

    key: Key
    arm: str
    last: tuple[float, ...]
    best: tuple[float, ...]
    gain: Gain | None
    over_random: Gain | None
    recovered: float | None
    seconds_per_iteration: float | None
    scoring_seconds: float | None
    peak_memory_bytes: float | None
    precision: float | None
    recall: float | None
    auc: float | None

    @property
    def mean(self) -> float:
        """Mean accuracy of the last synthetic sets, in percent."""
        return statistics.fmean(self.last)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.last) if len(self.last) > 1 else None


def paired_gain(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gain | None:
    """Computes the gain of one arm over another on the seeds that both have; None without any.

    Args:
        ours, theirs: seed -> accuracy in percent.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    differences = [ours[s] - theirs[s] for s in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Gain(mean, None, None, None, len(seeds))
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)) * error
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if error > 0 else None
    return Gain(mean, mean - reach, mean + reach, p, len(seeds))


def grid_rows(results: Sequence[Mapping[str, Any]]) -> list[GridRow]:
    """Computes a row for each setting and arm, in the order of first appearance.

    Args:
        results: as in a grid's results.json, each with "cell" and "way".
    """
    settings: dict[Key, dict[str, list[Mapping[str, Any]]]] = {}
    for result in results:
        settings.setdefault(_key(result), {}).setdefault(str(result["arm"]), []).append(result)
    return [row for key, arms in settings.items() for row in _rows(key, arms)]


def _key(result: Mapping[str, Any]) -> Key:
    noise = result.get("noise") or {}
    text = str(noise.get("text") or "none").split("@")[0]
    return Key(
        str(result.get("cell", "")), str(result.get("way", "bundled")), str(result["baseline"]),
        str(result["dataset"]), text, int(result["ipc"]),
    )  # fmt: skip


def _rows(key: Key, arms: Mapping[str, list[Mapping[str, Any]]]) -> list[GridRow]:
    last = {arm: _by_seed(found, "last") for arm, found in arms.items()}
    reference = "noisy" if "noisy" in last else "clean"
    rows = []
    for arm, found in arms.items():
        recovered = None
        if "clean" in last and "noisy" in last:
            clean, noisy = statistics.fmean(last["clean"].values()), statistics.fmean(last["noisy"].values())
            if clean - noisy >= 0.5:
                recovered = 100 * (statistics.fmean(last[arm].values()) - noisy) / (clean - noisy)
        figures = {name: _mean([r.get(name) for r in found]) for name in _FIGURES}
        quality = {name: _mean([(r.get("split") or {}).get(name) for r in found]) for name in _QUALITY}
        gain = None if arm == reference or reference not in last else paired_gain(last[arm], last[reference])
        over_random = None if arm == "random" or "random" not in last else paired_gain(last[arm], last["random"])
        values, best = tuple(last[arm].values()), tuple(_by_seed(found, "best").values())
        rows.append(GridRow(key, arm, values, best, gain, over_random, recovered, **figures, **quality))
    return rows


def _by_seed(found: Sequence[Mapping[str, Any]], which: str) -> dict[int, float]:
    values = {int(r["seed"]): r["accuracy"].get(which) or [] for r in found}
    return {seed: statistics.fmean(v) for seed, v in sorted(values.items()) if v}


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if v is not None and not math.isnan(float(v))]
    return statistics.fmean(known) if known else None
