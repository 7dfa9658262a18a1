"""Label files that name the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.data.noise.label_files import human_labels
from tad_plugin.data.noise.named_labels import plain_path, read_named_labels
from tad_plugin.errors import (
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    UnknownNameError,
)

PATHS = ["train/cat/x.png", "train/dog/1.png", "train/cat/a b.png"]
TRUE = torch.tensor([0, 1, 0])
NAMES = ("cat", "dog", "emu")


def labels(path: Path, key: str = "label", **changed: Any) -> list[int]:
    values = {"source_paths": PATHS, "class_names": NAMES, "true_labels": TRUE, **changed}
    return human_labels(path, key, values.pop("true_labels"), 3, **values).tolist()


@pytest.mark.parametrize("values", [("2", "0", "1"), ("emu", "cat", "dog")])
@pytest.mark.parametrize("top", ["train/", "", "./train/", ".\\train\\"])
def test_csv(tmp_path: Path, values: tuple[str, ...], top: str) -> None:
    """In another order than the images, with files that are not loaded, and a byte order mark."""
    paths = [top + p.removeprefix("train/") for p in PATHS]
    rows = [(paths[2], values[2]), ("test/cat/0.png", values[0]), (paths[0], values[0]), (paths[1], values[1])]
    text = "path,label\r\n" + "".join(f'"{path}",{value}\r\n' for path, value in rows)
    (tmp_path / "l.csv").write_bytes(text.encode("utf-8-sig"))
    assert labels(tmp_path / "l.csv") == [2, 0, 1]


def test_json_records_and_mapping(tmp_path: Path) -> None:
    given = dict(zip(PATHS, (2, 0, 1), strict=True))
    (tmp_path / "l.json").write_text(json.dumps(given))
    assert labels(tmp_path / "l.json") == [2, 0, 1]
    records = [{"path": p, "worse_label": v, "clean": c} for (p, v), c in zip(given.items(), [0, 1, 0], strict=True)]
    (tmp_path / "l.json").write_text(json.dumps(records))
    assert labels(tmp_path / "l.json", "worse") == labels(tmp_path / "l.json", "worse_label") == [2, 0, 1]
    with pytest.raises(UnknownNameError, match="clean, worse"):
        labels(tmp_path / "l.json", "label")
    with pytest.raises(StateMismatchError, match="2 of 3"):
        labels(tmp_path / "l.json", "worse", true_labels=torch.tensor([1, 1, 1]))


def test_class_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{p},{v}\n" for p, v in zip(PATHS, "352", strict=True)))
    assert labels(tmp_path / "l.csv", class_names=("2", "3", "5")) == [1, 2, 0]


def test_what_does_not_fit_the_images(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("path,label\n" + "".join(f"{p},0\n" for p in PATHS[:2]))
    with pytest.raises(StateMismatchError, match="a b.png"):
        labels(path)
    with pytest.raises(StateMismatchError):
        labels(path, source_paths=None)
    with pytest.raises(InvalidInputError, match="source_paths"):
        labels(path, source_paths=PATHS[:2])
    for bad in ("3", "-1", "cow", "1.0", "", "9" * 5000):
        path.write_text("path,label\n" + "".join(f"{p},{v}\n" for p, v in zip(PATHS, ("0", "1", bad), strict=True)))
        with pytest.raises(InvalidLabelsError, match="label"):
            labels(path)
    for value in (True, 1.0, None, [1], {"a": 1}):
        (tmp_path / "l.json").write_text(json.dumps({**dict.fromkeys(PATHS, 0), PATHS[0]: value}))
        with pytest.raises(InvalidLabelsError):
            labels(tmp_path / "l.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""), ("b.csv", b"path,label\n"), ("c.csv", b"label,other\n1,2\n"), ("d.csv", b"path\nx.png\n"),
        ("e.csv", b"path,label\nx.png,1,2\n"), ("f.csv", b"path,label\nx.png\n"), ("g.csv", b"path,label\n\xff,1\n"),
        ("h.csv", b"path,label\nx.png,1\nx.png,2\n"), ("i.csv", b"path,label\nx.png,1\ntrain/x.png,2\n"),
        ("j.csv", b"path,label,label\nx.png,1,2\n"), ("k.csv", b'path,label\n"x.png,1\n'),
        ("a.json", b""), ("b.json", b"[]"), ("c.json", b"{}"), ("d.json", b"[1, 2]"), ("e.json", b"3"),
        ("f.json", b'[{"path": "x", "label": 1}, {"path": "y"}]'), ("g.json", b'[{"path": 1, "label": 1}]'),
        ("h.json", b'{"x.png": 1, "x.png": 2}'), ("i.json", b"[" * 100_000), ("j.json", b"\xff"),
        ("k.json", b'[{"label": 1}]'), ("l.json", b'[{"path": "x", "label": 1, "label": 2}]'),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name):
        read_named_labels(tmp_path / name)


def test_plain_path() -> None:
    assert {plain_path(p) for p in ("train/a/0.png", "a/0.png", "./train/a/0.png", "train\\a\\0.png")} == {"a/0.png"}
    assert plain_path("test/a/0.png") == "test/a/0.png"
