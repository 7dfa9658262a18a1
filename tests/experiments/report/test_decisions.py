"""Pictures of decisions, curves and the grid of arms: what they show is what the state and the results hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tad_plugin.core.state import SampleState
from tad_plugin.experiments.report.decisions import most_doubted, plot_distrusted, plot_noise_matrix, plot_weights
from tad_plugin.experiments.report.progress import plot_class_accuracy, plot_curves
from tad_plugin.experiments.report.synthetic import plot_arms


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def decided() -> SampleState:
    """Two classes of four samples. Of class 0, sample 1 is dropped and sample 3 relabelled; weights differ."""
    state = SampleState(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2)
    target, trusted = state.target.clone(), torch.ones(8, dtype=torch.bool)
    target[3], trusted[1] = 1, False
    state.update(target=target, trusted=trusted, trust=torch.tensor([0.9, 0.3, 0.8, 0.1, 1.0, 1.0, 1.0, 1.0]))
    state.set_weights("own", torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]))
    return state


def test_the_most_doubted_are_dropped_or_relabelled_lowest_trust_first(tmp_path: Path, drawn: list[Figure]) -> None:
    state = decided()
    assert [rows.tolist() for rows in most_doubted(state, 5)] == [[3, 1], []]
    images, true = torch.rand(8, 1, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    path = plot_distrusted(images, state, tmp_path / "d.svg", class_names=["a", "b"], true_labels=true)
    assert path is not None
    axes = drawn[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["b", "dropped"]
    assert np.allclose(axes[0].images[0].get_array()[..., 0], images[3, 0])
    assert [axis.spines["left"].get_visible() for axis in axes] == [False, True]  # the label of sample 1 was right
    assert plot_distrusted(images, SampleState(torch.arange(8) % 2, 2), tmp_path / "e.svg") is None


def test_weights_are_counted_by_correctness(tmp_path: Path, drawn: list[Figure]) -> None:
    state, true = decided(), torch.tensor([0, 1, 0, 1, 1, 1, 1, 1])
    assert plot_weights(state, tmp_path / "w.svg", true_labels=true)
    counts = [sum(bar.get_height() for bar in axis.patches) for axis in drawn[0].axes]
    assert counts == [6, 2] and "1 of them with weight 0" in drawn[0].axes[1].get_title(loc="left")
    assert plot_weights(SampleState(torch.arange(8) % 2, 2), tmp_path / "e.svg") is None


def test_the_noise_matrix_names_percent_of_the_true_class(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_noise_matrix(torch.tensor([[0.75, 0.25], [0.0, 1.0]]), tmp_path / "n.svg", class_names=["a", "b"])
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["75", "25", "", "100"]


def result(arm: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "ipc": 1, **more}


def test_curves_are_means_over_seeds_of_test_accuracy_where_it_is_known(tmp_path: Path, drawn: list[Figure]) -> None:
    curve = {"iterations": [5, 10], "heldout": [1.0, 2.0], "test": [50.0, 60.0]}
    other = {**curve, "test": [70.0, 90.0]}
    found = [result("tad", 0, curve=curve), result("tad", 1, curve=other), result("random", 0, curve=None)]
    assert plot_curves(found, tmp_path / "c.svg")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xdata().tolist() == [5, 10] and line.get_ydata().tolist() == [60.0, 75.0]
    held = [result("tad", 0, curve={**curve, "test": [None, None]})]
    assert plot_curves(held, tmp_path / "h.svg") and drawn[1].axes[0].lines[0].get_ydata().tolist() == [1.0, 2.0]
    assert plot_curves([result("tad", 0)], tmp_path / "n.svg") is None


def test_class_accuracies_are_means_over_seeds(tmp_path: Path, drawn: list[Figure]) -> None:
    found = [result("tad", s, class_accuracy=[10.0 + 20 * s, None, 50.0]) for s in (0, 1)]
    assert plot_class_accuracy([*found, result("noisy", 0)], tmp_path / "p.svg", class_names=["a", "b", "c"])
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["20", "-", "50"]
    assert plot_class_accuracy([result("noisy", 0)], tmp_path / "q.svg") is None


@pytest.mark.parametrize("ipc", [1, 3])
def test_arms_are_rows_at_one_image_per_class_and_blocks_otherwise(
    ipc: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    values = torch.linspace(0, 1, 4 * ipc)
    sets = {
        arm: (values.view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * scale, torch.arange(4).repeat_interleave(ipc))
        for arm, scale in (("noisy", 1.0), ("tad", 0.5))
    }
    plot_arms(sets, tmp_path / "s.svg", class_names=["a", "b", "c", "d"])
    axes = drawn[0].axes
    assert len(axes) == (1 if ipc == 1 else 2)
    sheet = np.asarray(axes[0].images[0].get_array())
    assert sheet.shape[:2] == ((10, 20) if ipc == 1 else (20, 15))
    assert np.allclose(sheet[::5, ::5, 0].flatten()[:4], values[:4])
    if ipc == 1:
        assert np.allclose(sheet[5, ::5, 0], values / 2)
        assert [label.get_text() for label in axes[0].get_yticklabels()] == ["noisy", "tad"]


def test_an_svg_follows_the_mode_of_the_reader(tmp_path: Path) -> None:
    text = plot_noise_matrix(torch.eye(2), tmp_path / "n.svg").read_text()
    assert "prefers-color-scheme:dark" in text
    body = text.split("</style>", 1)[1]
    assert "fill: var(--c" in body and "#1b1f24" not in body and "#ffffff" not in body
