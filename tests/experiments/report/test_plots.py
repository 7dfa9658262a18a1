from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from tad_plugin.errors import InvalidInputError, MissingExtraError
from tad_plugin.experiments.report.comparison import plot_comparison
from tad_plugin.experiments.report.synthetic import plot_synthetic
from tad_plugin.experiments.report.tables import Row, summarise
from tad_plugin.experiments.report.trust import plot_loss_histogram, plot_trusted_space
from tests.warm import start_program

Drawn = list[Figure]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The figures that the test saves."""
    figures: Drawn = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def rows(ipcs: tuple[int, ...] = (1, 10), seeds: int = 3, noises: tuple[str, ...] = ("symmetric",)) -> list[Row]:
    means = {"clean": 90.0, "noisy": 70.0, "loss-prune": 80.0, "tad": 88.0}
    return summarise(
        {
            "arm": arm,
            "baseline": "dm",
            "dataset": "digits",
            "ipc": ipc,
            "noise": {"kind": noise, "rate": 0.4},
            "seed": seed,
            "accuracy": {"last": [mean - 10 / ipc + seed], "best": []},
        }
        for noise in noises
        for ipc in ipcs
        for arm, mean in means.items()
        for seed in range(seeds)
    )


def test_comparison_shows_every_arm_seed_and_reference(tmp_path: Path, drawn: Drawn) -> None:
    path = plot_comparison(rows(), tmp_path / "c.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(drawn[0].axes) == 2
    first = drawn[0].axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["clean", "noisy", "loss-prune", "tad"]
    seeds = [np.asarray(c.get_offsets())[:, 0] for c in first.collections if len(c.get_offsets()) == 3]
    assert np.allclose(sorted(seeds[3]), [78.0, 79.0, 80.0])
    references = [line.get_xdata()[0] for line in first.lines if list(line.get_ydata()) == [0, 1]]
    assert references == pytest.approx([81.0, 61.0])  # clean, noisy at IPC 1
    assert [text.get_text() for text in first.texts] == ["81.0 ± 1.0", "61.0 ± 1.0", "71.0 ± 1.0", "79.0 ± 1.0"]


def test_comparison_of_several_settings_and_one_seed(tmp_path: Path, drawn: Drawn) -> None:
    plot_comparison(rows((10,), 1, ("symmetric", "asymmetric")), tmp_path / "c.svg")
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == [
        "DM, digits, symmetric 40%, IPC 10",
        "DM, digits, asymmetric 40%, IPC 10",
    ]
    assert drawn[0].axes[0].texts[0].get_text() == "89.0"


def test_comparison_needs_an_accuracy(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="best"):
        plot_comparison(rows(), tmp_path / "c.png", which="best")


def canvas_of(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_synthetic_images_stand_in_their_class_row_denormalised(tmp_path: Path, drawn: Drawn) -> None:
    value = torch.tensor([0.8, 0.2, 0.4, 1.5])  # the last is out of range: clamped
    images = ((value - 0.5) / 0.25).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    plot_synthetic(images, torch.tensor([3, 1, 3, 1]), tmp_path / "s.png", inverse=lambda x: x * 0.25 + 0.5,
                   class_names=["a", "b", "c", "d"], title="T")  # fmt: skip
    canvas = canvas_of(drawn[0])
    assert canvas.shape == (33, 33, 3)  # two rows and two columns of 16, a gap of 1
    corners = canvas[[0, 0, 17, 17], [0, 17, 0, 17], 0]
    assert np.allclose(corners, [0.2, 1.0, 0.8, 0.4], atol=1e-6)
    assert np.allclose(canvas[16], 1.0) and np.allclose(canvas[:, 16], 1.0)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["b", "d"]


def test_synthetic_takes_soft_labels_and_says_what_it_leaves_out(tmp_path: Path, drawn: Drawn) -> None:
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    soft = torch.eye(4).repeat_interleave(3, dim=0)
    plot_synthetic(images, soft, tmp_path / "s.png", title="T", max_classes=2, max_per_class=2)
    assert drawn[0].axes[0].get_title(loc="left") == "T (first 2 of 4 classes, first 2 of 3 per class)"
    assert canvas_of(drawn[0]).shape == (17, 17, 3)
    low, high = images.min(), images.max()  # without an inverse all images share one scale
    assert np.allclose(canvas_of(drawn[0])[:8, :8], ((images[0] - low) / (high - low)).permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, dtype=torch.long), None, r"\[2, 2, 4, 4\]"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), None, r"\[0, 1, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3, dtype=torch.long), None, "2 .* 3"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 5]), ["a"], "6 .* 1"),
        (torch.full((1, 1, 4, 4), math.nan), torch.tensor([0]), None, "NaN"),
    ],
)
def test_synthetic_names_bad_input(
    tmp_path: Path, images: Tensor, labels: Tensor, names: list[str] | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        plot_synthetic(images, labels, tmp_path / "s.png", class_names=names)
    assert not (tmp_path / "s.png").exists()


def test_trusted_space_reads_rounds_and_the_split_records_after_them(tmp_path: Path, drawn: Drawn) -> None:
    log = [
        {"event": "split", "precision": 0.1, "recall": 0.1},  # before the first round, so it is ignored
        {"event": "round", "trusted": 60, "untrusted": 40, "recalled": 0, "returned": 0},
        {"event": "split", "precision": 0.9, "recall": 0.5},
        {"iteration": 3, "loss": 1.0},
        {"event": "round", "trusted": 70, "untrusted": 30, "relabelled": 12, "recalled": 12, "returned": 2},
        {"event": "split", "precision": 0.8, "recall": None},
    ]
    plot_trusted_space(log, tmp_path / "t.png")
    lines = {line.get_label(): np.asarray(line.get_ydata()) for axis in drawn[0].axes for line in axis.lines}
    stacked = {"trusted as labelled": [60, 58], "and relabelled": [60, 70], "and untrusted": [100, 100]}
    assert set(lines) == {*stacked, "recalled", "returned", "precision", "recall"}
    assert {name: lines[name].tolist() for name in stacked} == stacked
    assert lines["recalled"].tolist() == [0, 12] and lines["returned"].tolist() == [0, 2]
    assert lines["precision"].tolist() == [90, 80] and lines["recall"][0] == 50 and math.isnan(lines["recall"][1])


def test_trusted_space_leaves_out_what_is_not_there(tmp_path: Path, drawn: Drawn) -> None:
    plot_trusted_space([{"trusted": 5}], tmp_path / "t.png")
    assert len(drawn[0].axes) == 1
    with pytest.raises(InvalidInputError, match="trusted"):
        plot_trusted_space([{"loss": 1.0}, {"trusted": True}], tmp_path / "t.png")


class Normals:
    """Two normals with proportions 0.6 and 0.4, the same for each class."""

    def density(self, index: int, grid: Tensor) -> Tensor:
        parts = [torch.distributions.Normal(mean, 0.3).log_prob(grid).exp() for mean in (1.0, 4.0)]
        return torch.stack([0.6 * parts[0], 0.4 * parts[1]], dim=1)


def sample(generator: torch.Generator, classes: int, n: int = 6000) -> tuple[Tensor, Tensor, Tensor]:
    wrong = torch.rand(n, generator=generator) < 0.4
    losses = torch.where(wrong, 4.0, 1.0) + 0.3 * torch.randn(n, generator=generator)
    return losses, torch.randint(classes, (n,), generator=generator), wrong


def test_loss_histogram_counts_every_sample_and_the_curves_have_its_scale(
    tmp_path: Path, drawn: Drawn, generator: torch.Generator
) -> None:
    losses, labels, wrong = sample(generator, 3)
    plot_loss_histogram(losses, labels, Normals(), tmp_path / "h.png", true_wrong=wrong, class_names=["x", "y", "z"])
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == ["All classes", "x", "y", "z"]
    for position, axis in enumerate(drawn[0].axes):
        mask = torch.ones_like(wrong) if position == 0 else labels == position - 1
        correct, bad = axis.containers
        assert sum(bar.get_height() for bar in correct) == int((~wrong & mask).sum())
        assert sum(bar.get_height() for bar in bad) == int((wrong & mask).sum())
        tops = np.array([bar.get_y() + bar.get_height() for bar in bad])
        centres = np.array([bar.get_x() + bar.get_width() / 2 for bar in bad])
        curves = sum(np.interp(centres, line.get_xdata(), line.get_ydata()) for line in axis.lines)
        # the mixture is the truth here: the bars scatter around the curves like counts
        assert curves.sum() == pytest.approx(int(mask.sum()), rel=0.01)
        assert np.all(np.abs(tops - curves) < 6 * np.sqrt(curves + 1) + 0.06 * curves.max())


def test_loss_histogram_without_true_labels_and_with_many_classes(
    tmp_path: Path, drawn: Drawn, generator: torch.Generator
) -> None:
    losses, labels, _ = sample(generator, 30, 600)
    plot_loss_histogram(losses, labels, Normals(), tmp_path / "h.png")
    assert len(drawn[0].axes) == 11
    assert any("first 10 of 30 classes" in text.get_text() for text in drawn[0].texts)
    names = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert names == ["low-loss component", "high-loss component", "samples"]


def test_loss_histogram_of_equal_losses_and_of_one_class(tmp_path: Path, drawn: Drawn) -> None:
    plot_loss_histogram(torch.ones(5), torch.zeros(5, dtype=torch.long), Normals(), tmp_path / "h.png")
    assert len(drawn[0].axes) == 1
    assert sum(bar.get_height() for bar in drawn[0].axes[0].containers[0]) == 5


@pytest.mark.parametrize(
    ("losses", "labels", "wrong", "message"),
    [
        (torch.ones(3), torch.zeros(2, dtype=torch.long), None, "3 .* 2"),
        (torch.ones(2), torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.bool), "true_wrong"),
        (torch.ones(0), torch.zeros(0, dtype=torch.long), None, "0 .* 0"),
        (torch.tensor([1.0, math.inf]), torch.zeros(2, dtype=torch.long), None, "infinite"),
    ],
)
def test_loss_histogram_names_bad_input(
    tmp_path: Path, losses: Tensor, labels: Tensor, wrong: Tensor | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        plot_loss_histogram(losses, labels, Normals(), tmp_path / "h.png", true_wrong=wrong)


def all_pictures(folder: Path, suffix: str) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    losses, labels, wrong = sample(generator, 4, 200)
    draw: list[Callable[[Path], Path]] = [
        lambda path: plot_comparison(rows(), path),
        lambda path: plot_synthetic(torch.rand(4, 1, 8, 8, generator=generator), torch.arange(4), path),
        lambda path: plot_trusted_space([{"trusted": 5, "recalled": 1}, {"trusted": 6, "recalled": 2}], path),
        lambda path: plot_loss_histogram(losses, labels, Normals(), path, true_wrong=wrong),
    ]
    return [function(folder / f"{index}{suffix}") for index, function in enumerate(draw)]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.usefixtures("global_rng_untouched")
def test_the_same_picture_gives_the_same_file_and_nothing_is_left_behind(
    tmp_path: Path, suffix: str, magic: bytes
) -> None:
    import matplotlib

    settings = dict(matplotlib.rcParams)
    first = [path.read_bytes() for path in all_pictures(tmp_path / "a", suffix)]
    second = [path.read_bytes() for path in all_pictures(tmp_path / "b", suffix)]
    assert first == second and all(content.startswith(magic) for content in first)
    assert len(list((tmp_path / "a").iterdir())) == 4
    assert dict(matplotlib.rcParams) == settings


def test_no_text_is_cut_off_or_covers_other_text(tmp_path: Path, drawn: Drawn) -> None:
    all_pictures(tmp_path, ".png")
    for figure in drawn[::2] + drawn[3::4]:  # the one cut tightly to its contents cannot cut anything off
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        width, height = figure.bbox.size
        boxes = []
        for axis in figure.axes:
            low, high = sorted(axis.get_ylim())  # labels of ticks outside exist but are not drawn
            ticks = [tick.label1 for tick in axis.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts = [*axis.texts, axis._left_title, axis.xaxis.label, axis.yaxis.label, *ticks]
            boxes += [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]
        for index, box in enumerate(boxes):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[index + 1 :])


def test_pdf_is_written_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    assert plot_trusted_space([{"trusted": 5}], tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(InvalidInputError, match="c.gif"):
        plot_comparison(rows(), tmp_path / "c.gif")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"tad_plugin\[reproduce\]"):
        plot_comparison(rows(), tmp_path / "c.png")


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; assert 'matplotlib' not in sys.modules; import tad_plugin.experiments.report.trust as p; "
        f"p.plot_trusted_space([{{'trusted': 5}}], r'{tmp_path / 't.png'}'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    process = start_program("tests.warm", code, output=tmp_path / "output")
    assert process.wait() == 0, (tmp_path / "output").read_text()
