"""Verdicts, the transition matrix, the table and the corrected folder."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.core.registry import load_method
from tad_plugin.errors import ConfigError, NotEnoughSamplesError, UnknownNameError
from tad_plugin.experiments.audit.correct import check_fix, write_corrected
from tad_plugin.experiments.audit.cross_fit import draw_folds
from tad_plugin.experiments.audit.table import COLUMNS, summary, suspect_rows
from tad_plugin.experiments.audit.verdicts import WORDS, decide, transition_matrix
from tad_plugin.utils.csv_file import write_csv

OBSERVED = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
#: the first three samples of each class agree with their label; the last two do not
PROBABILITIES = torch.tensor(
    [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7], [0.05, 0.95], [0.55, 0.45]]
)
TRUST = torch.tensor([0.99, 0.9, 0.3, 0.9, 0.99, 0.8, 0.0, 0.2])


def test_each_sample_gets_its_verdict() -> None:
    found = decide(PROBABILITIES, OBSERVED, TRUST)
    words = [WORDS[i] for i in found.verdict]
    # the third is distrusted, but the networks agree with its label; 0.95 reaches the mean of kept samples of class 1
    # (0.8), 0.55 does not reach that of class 0 (0.8), and its trust is under 1/4
    assert words == ["keep", "keep", "keep", "keep", "keep", "keep", "relabel", "drop"]
    assert found.proposed.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert found.loss[0] == pytest.approx(-torch.tensor(0.9).log().item())
    assert found.order.tolist()[:3] == [6, 7, 2]
    assert [WORDS[i] for i in decide(PROBABILITIES, OBSERVED, TRUST.clamp_min(0.3)).verdict[6:]] == [
        "relabel",
        "unsure",
    ]


def test_doubt_is_the_loss_and_half_of_the_rival() -> None:
    p = torch.tensor([[0.4, 0.6, 0.0], [0.001, 0.999, 0.0], [0.2, 0.4, 0.4], [0.2, 0.8, 0.0]])
    found = decide(p, torch.tensor([0, 0, 0, 0]), torch.ones(4))
    assert found.order.tolist() == [1, 3, 2, 0]
    own, other = p[:, 0].double(), p[:, 1:].max(1).values.double()
    assert torch.allclose(found.doubt, 0.5 * other.log() - own.log())


def test_no_label_is_replaced_by_an_improbable_one() -> None:
    p = torch.tensor([[0.45, 0.3, 0.25], [0.1, 0.46, 0.44], [0.1, 0.44, 0.46], [0.02, 0.49, 0.49]])
    assert [WORDS[i] for i in decide(p, torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0])).verdict] == [
        "keep", "keep", "keep", "drop"
    ]  # fmt: skip


def test_the_transition_matrix_counts_right_labels_in_rows() -> None:
    found = decide(PROBABILITIES, OBSERVED, TRUST)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for verdict, proposed, label in zip(found.verdict, found.proposed, OBSERVED, strict=True):
        expected[label if verdict == 0 else proposed, label] += 1
    expected /= expected.sum(1, keepdim=True)
    expected[2] = torch.tensor([0.0, 0.0, 1.0])
    assert torch.equal(transition_matrix(found, OBSERVED, 3), expected)
    plain = summary(found, OBSERVED, ["a", "b"])
    assert plain["verdicts"] == {"keep": 6, "relabel": 1, "drop": 1, "unsure": 0}
    assert plain["noise_rate"] == pytest.approx(1 - float(TRUST.mean()))
    assert plain["classes"][1]["noise_rate"] == pytest.approx((0.1 + 0.01 + 0.2 + 0.8) / 4)


def test_tad_judges_by_its_mixture_and_confident_learning_by_its_flags() -> None:
    generator = torch.Generator().manual_seed(0)
    observed = torch.arange(2).repeat(100)
    wrong = torch.rand(200, generator=generator) < 0.3
    own = torch.where(wrong, 0.05 + 0.1 * torch.rand(200, generator=generator), 0.8 + 0.15 * torch.rand(200))
    p = torch.empty(200, 2).scatter_(1, observed[:, None], own[:, None])
    p.scatter_(1, 1 - observed[:, None], 1 - own[:, None])
    trust = load_method("tad").judge(p, observed, 2)
    assert trust is not None and torch.equal(trust > 0.5, ~wrong)
    pytest.importorskip("cleanlab")
    theirs = load_method("clean-then-distil").judge(p, observed, 2)
    assert theirs is not None and torch.equal(theirs > 0.5, ~wrong)
    assert load_method("iwd").judge(p, observed, 2) is None


def test_folds_deal_every_class_evenly() -> None:
    labels = torch.tensor([0] * 9 + [1] * 6)
    folds = draw_folds(labels, 2, 3, 0)
    for c, each in ((0, 3), (1, 2)):
        assert torch.bincount(folds[labels == c]).tolist() == [each] * 3
    assert torch.equal(folds, draw_folds(labels, 2, 3, 0)) and not torch.equal(folds, draw_folds(labels, 2, 3, 1))
    with pytest.raises(NotEnoughSamplesError, match="--folds"):
        draw_folds(labels, 2, 7, 0)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Verdicts on eight files of two classes; two have one name."""
    paths = [f"train/{'ab'[y]}/{i % 7}.png" for i, y in enumerate(OBSERVED.tolist())]
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(f"image {i}".encode())
    return suspect_rows(decide(PROBABILITIES, OBSERVED, TRUST), OBSERVED, torch.arange(8), ["a", "b"], paths)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.suffix == ".png"}


@pytest.mark.parametrize("kind", ["link", "copy", "move"])
def test_the_corrected_folder_has_the_right_images_and_the_original_stays(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "photos", tmp_path / "fixed"
    found = rows(source)
    before = contents(source)
    for _ in range(2):  # a second call changes nothing
        counts = write_corrected(found, f"folder:{source}", str(target), kind)
        assert counts == {"keep": 6, "relabel": 1} | ({"drop": 1} if kind == "move" else {})
        expected = {p: b for p, b in before.items() if b not in (b"image 6", b"image 7")} | {
            "train/b/6.png": b"image 6"
        }
        expected |= {"doubtful/b/0.png": b"image 7"} if kind == "move" else {}
        assert contents(target) == expected and contents(source) == before
    assert (target / "train" / "a" / "0.png").is_symlink() == (kind == "link")


def test_names_that_meet_in_one_class_are_kept_apart(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    found = rows(source)
    for row in found:
        row["verdict"], row["proposed_class"] = "relabel", "a"
    write_corrected(found, f"folder:{source}", str(tmp_path / "fixed"), "copy")
    assert sorted(contents(tmp_path / "fixed").values()) == sorted(contents(source).values())


def test_images_of_an_archive_are_copied_out(tmp_path: Path) -> None:
    found = rows(tmp_path / "photos")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path, content in contents(tmp_path / "photos").items():
            archive.writestr(path, content)
    write_corrected(found, f"folder:{tmp_path / 'photos.zip'}", str(tmp_path / "fixed"), "copy")
    assert len(contents(tmp_path / "fixed")) == 7
    with pytest.raises(ConfigError, match="--fix copy"):
        check_fix("link", str(tmp_path / "other"), f"folder:{tmp_path / 'photos.zip'}")


def test_the_table_and_the_corrected_labels(tmp_path: Path) -> None:
    found = rows(tmp_path / "photos")
    found[0]["path"] = "=HYPERLINK()"
    write_csv(found, COLUMNS, tmp_path / "suspects.csv")
    with open(tmp_path / "suspects.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS and read[0]["path"] == "'=HYPERLINK()" and len(read) == 8
    assert read[0]["verdict"] == "relabel" and read[0]["proposed_class"] == "b"
    assert write_corrected(found, f"folder:{tmp_path / 'photos'}", str(tmp_path / "fixed"), "csv")["relabel"] == 1
    with open(tmp_path / "fixed" / "labels.csv", newline="") as file:
        labels = {row["index"]: row["class"] for row in csv.DictReader(file)}
    assert labels["6"] == "b" and "7" not in labels


@pytest.mark.parametrize(
    ("kind", "to", "dataset", "error"),
    [
        ("copi", "x", "folder:photos", UnknownNameError),
        ("copy", "", "folder:photos", ConfigError),
        ("copy", "x", "digits", ConfigError),
        ("copy", "photos", "folder:photos", ConfigError),
        ("copy", "photos/inside", "folder:photos", ConfigError),
        ("copy", ".", "folder:photos", ConfigError),
        ("copy", "full", "folder:photos", ConfigError),
    ],
)
def test_places_that_would_touch_other_files_are_refused(
    kind: str, to: str, dataset: str, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    with pytest.raises(error):
        check_fix(kind, to, dataset)
    check_fix("copy", "new", "folder:photos")


@pytest.mark.parametrize("above", ["", "inside/"])
def test_links_lead_to_the_originals_wherever_the_classes_lie(above: str, tmp_path: Path) -> None:
    """Without a folder train/, and in a folder around it."""
    source = tmp_path / "photos"
    found = rows(source / above if above else tmp_path / "made")
    if not above:  # class folders at the top
        (tmp_path / "made" / "train").rename(source)
        found = [{**row, "path": row["path"].removeprefix("train/")} for row in found]
    write_corrected(found, f"folder:{source}", str(tmp_path / "fixed"), "link")
    links = list((tmp_path / "fixed").rglob("*.png"))
    assert len(links) == 7 and all(p.is_symlink() and p.resolve().is_file() for p in links)
