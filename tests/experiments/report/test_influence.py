from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.cli import main
from tad_plugin.core.diagnostics import InfluenceDiagnostics, influence_quality
from tad_plugin.core.state import SampleState
from tad_plugin.errors import FileFormatError, InvalidInputError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.report.influence import (
    extremes,
    influence_table,
    plot_influence,
    report_influence,
    write_table,
)
from tad_plugin.experiments.run import run

LABELS = torch.arange(4).repeat_interleave(10)


def scored_state() -> SampleState:
    state = SampleState(LABELS, 4)
    state.register("influence", torch.arange(40).float() % 7 + torch.arange(40) / 100)
    state.register("influence_count", (torch.arange(40) % 10 != 9).long())
    state.register("influence_weight", torch.rand(40, generator=torch.Generator().manual_seed(0)))
    return state


def test_extremes_are_the_ends_of_the_ranking_of_scored_samples() -> None:
    state = scored_state()
    for c, (helpful, harmful) in enumerate(extremes(state, 3)):
        rows = [i for i in range(40) if LABELS[i] == c and state["influence_count"][i] > 0]
        by_score = sorted(rows, key=lambda i: float(state["influence"][i]))
        assert helpful.tolist() == by_score[:3] and harmful.tolist() == by_score[::-1][:3]
    for helpful, harmful in extremes(state, 100):
        assert len(helpful) == len(harmful) == 4 and not set(helpful.tolist()) & set(harmful.tolist())


def test_table_and_its_file(tmp_path: Path) -> None:
    state = scored_state()
    rows = influence_table(state, top=2, class_names=["a", "b", "c", "d"], true_labels=LABELS.flip(0))
    assert len(rows) == 4 * 2 * 2
    assert {r["kind"] for r in rows} == {"helpful", "harmful"} and rows[0]["rank"] == 1
    written = write_table(rows, tmp_path / "table")
    with open(written[0], newline="") as file:
        read = list(csv.DictReader(file))
    assert [int(r["index"]) for r in read] == [r["index"] for r in rows]
    first = read[0]
    assert float(first["influence"]) == pytest.approx(float(state["influence"][int(first["index"])]))
    assert first["name"] == "a" and int(first["true"]) == int(LABELS.flip(0)[int(first["index"])])
    assert "true" not in influence_table(state, top=2)[0]


def test_a_spreadsheet_runs_no_class_name(tmp_path: Path) -> None:
    names = ["=1+1", "+a", "-b", "@c"]
    rows = influence_table(scored_state(), top=2, class_names=names)
    with open(write_table(rows, tmp_path / "table")[0], newline="") as file:
        read = list(csv.DictReader(file))
    assert {r["name"] for r in read} == {f"'{name}" for name in names}
    assert [float(r["influence"]) for r in read] == [r["influence"] for r in rows]  # numbers keep their sign
    assert rows[0]["name"] == "=1+1"
    table = write_table([{"a": "\t=1", "b": "\r=1", "c": "x=1", "d": -1}], tmp_path / "other")[0]
    with open(table, newline="") as file:
        assert list(csv.reader(file))[1] == ["'\t=1", "'\r=1", "x=1", "-1"]


@pytest.mark.parametrize("channels", [1, 3])
def test_picture(tmp_path: Path, channels: int) -> None:
    images = torch.rand(40, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    path = plot_influence(images, scored_state(), tmp_path / "p.png", top=2, true_labels=LABELS.flip(0), max_classes=3)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InvalidInputError, match="5"):
        plot_influence(images[:5], scored_state(), tmp_path / "p.png")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        extremes(SampleState(LABELS, 4), 3)
    with pytest.raises(InvalidInputError, match="0"):
        extremes(scored_state(), 0)
    with pytest.raises(InvalidInputError):
        write_table([], tmp_path / "t.csv")
    with pytest.raises(FileFormatError, match=r"config\.yaml"):
        report_influence(tmp_path)
    assert main(["influence", str(tmp_path)]) == 2


def test_a_run_is_reported_from_its_folder_alone(tmp_path: Path, capsys: Any) -> None:
    config = RunConfig(noise="symmetric:0.4", ipc=1, iterations=2, width=4, eval_epochs=1, eval_runs=1, device="cpu")
    results = run(config, "iwd", tmp_path / "run")
    assert results["scoring_seconds"] > 0
    assert 0 < results["influence"]["auc"] < 1 and results["influence"]["clean_weight"] > 0
    assert main(["influence", str(tmp_path / "run"), "--top", "3"]) == 0
    printed = capsys.readouterr().out.split()
    assert str(tmp_path / "run" / "influence.csv") in printed and (tmp_path / "run" / "influence.png").is_file()
    with open(tmp_path / "run" / "influence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * 2 * 3
    run(config, "noisy", tmp_path / "plain")
    with pytest.raises(InvalidInputError):
        report_influence(tmp_path / "plain")


def test_quality_of_influences() -> None:
    observed, true = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    influence, count = torch.tensor([-1.0, 0.5, 1.0, -2.0, 9.0]), torch.tensor([1, 1, 1, 1, 0])
    usable, weight = torch.ones(5, dtype=torch.bool), torch.tensor([2.0, 1.0, 1.0, 4.0, 9.0])
    found = influence_quality(observed, influence, count, usable, true, weight)
    assert found == {"auc": 1.0, "clean_weight": 7 / 8}
    assert InfluenceDiagnostics().last is None
