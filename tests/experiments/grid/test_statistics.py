"""Statistics and tables of a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tad_plugin.experiments.grid.statistics import grid_rows, paired_gain
from tad_plugin.experiments.grid.tables import (
    grid_markdown,
    grid_tables,
    plain_markdown,
    published_table,
    ways_table,
)


def result(arm: str, seed: int, accuracy: list[float], **more: Any) -> dict[str, Any]:
    return {
        "cell": "dm", "way": "bundled", "baseline": "dm", "dataset": "digits", "ipc": 1, "arm": arm, "seed": seed,
        "noise": {"text": "symmetric:0.4"}, "accuracy": {"last": accuracy, "best": accuracy}, **more,
    }  # fmt: skip


def test_the_gain_is_paired_by_seed() -> None:
    ours, theirs = {0: 31.0, 1: 35.0, 2: 30.5, 9: 99.0}, {0: 30.0, 1: 32.0, 2: 30.0, 7: 1.0}
    gain = paired_gain(ours, theirs)
    a, b = np.array([31.0, 35.0, 30.5]), np.array([30.0, 32.0, 30.0])
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert gain is not None and gain.seeds == 3
    assert gain.mean == pytest.approx((a - b).mean()) and gain.p == pytest.approx(test.pvalue)
    assert gain.low == pytest.approx(interval.low) and gain.high == pytest.approx(interval.high)


def test_gains_without_enough_seeds() -> None:
    assert paired_gain({0: 1.0}, {1: 1.0}) is None
    one = paired_gain({0: 3.0}, {0: 1.0})
    assert one is not None and (one.mean, one.low, one.high, one.p) == (2.0, None, None, None)
    same = paired_gain({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})
    assert same is not None and same.p is None and same.low == same.high == 2.0


RESULTS = [
    result("clean", 0, [90.0, 92.0]), result("clean", 1, [95.0]),
    result("noisy", 0, [80.0]), result("noisy", 1, [82.0]),
    result("random", 0, [70.0]), result("random", 1, [71.0]),
    result("tad", 0, [88.0], split={"auc": 0.9, "precision": math.nan}), result("tad", 1, [91.0], split={"auc": 0.8}),
]  # fmt: skip


def test_rows_average_networks_first_and_compare_by_seed() -> None:
    rows = {row.arm: row for row in grid_rows(RESULTS)}
    assert rows["clean"].last == (91.0, 95.0) and rows["tad"].mean == 89.5 and rows["tad"].auc == pytest.approx(0.85)
    assert rows["tad"].gain is not None and rows["tad"].gain.mean == 8.5 and rows["noisy"].gain is None
    assert rows["tad"].over_random is not None and rows["tad"].over_random.mean == 19.0
    assert rows["tad"].recovered == pytest.approx(100 * 8.5 / 12) and rows["tad"].precision is None


def test_tables_mark_the_best_and_all_within_its_error() -> None:
    near = [result("iwd", 0, [87.9]), result("iwd", 1, [90.0])]
    (table,) = grid_tables(grid_rows([*RESULTS, *near]))
    marked = {line.cells[table.header.index("arm")] for line in table.lines if line.best}
    assert marked == {"tad", "iwd"} and "memory" not in table.header
    text = grid_markdown(grid_rows(RESULTS))
    assert "**89.5 ± 2.1**" in text and "clean \\*" in text and "**93.0" not in text
    assert grid_markdown([]) == "No results."


def test_ways_stand_side_by_side_and_published_figures_apart() -> None:
    assert ways_table(grid_rows(RESULTS)) == []
    scripts = [
        {**result("clean", 0, [91.0]), "way": "upstream", "noise": {"text": "none"}},
        {**result("clean", 0, [91.0]), "way": "patched"},
        {**result("tad", 0, [89.0]), "way": "patched"},
    ]
    lines = ways_table(grid_rows([*RESULTS, *scripts]))
    assert lines[0] == ["baseline", "noise", "IPC", "arm", "bundled", "upstream", "patched"]
    assert ["dm", "none", "1", "clean", "93.0 ± 2.8", "91.0", "91.0"] in lines
    assert ["dm", "symmetric:0.4", "1", "tad", "89.5 ± 2.1", "-", "89.0"] in lines
    row = {"baseline": "dm", "dataset": "x|y", "noise": "none", "ipc": 10, "arm": "clean", "accuracy": 48.9}
    text = plain_markdown(published_table([{**row, "source": "a paper", "setting": ""}]))
    assert "| 48.9 | dm | x\\|y |" in text and plain_markdown(published_table([])) == ""
