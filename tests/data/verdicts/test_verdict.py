"""Files of verdicts: every accepted form gives the verdict that its author meant, and every other is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tad_plugin.data.labels import label_digest
from tad_plugin.data.origin import Origin
from tad_plugin.data.verdicts.verdict import read_verdict
from tad_plugin.errors import ConfigError, FileFormatError, InvalidInputError, InvalidLabelsError, StateMismatchError

N, K = 40, 4
NAMES = ("ant", "bee", "cat", "dog")
OBSERVED = torch.arange(N) % K
KEPT = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.7
FIXED = torch.where(KEPT, OBSERVED, (OBSERVED + 1) % K)
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1
PATHS = tuple(f"{NAMES[i % K]}/{i}.png" for i in range(N))


def write(path: Path, content: Any) -> Path:
    """Writes columns or values in the format that the suffix names."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(content)
            writer.writerows(zip(*content.values(), strict=True))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = content if isinstance(content, dict) else {"arr_0": content}
        np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    else:
        torch.save(content, path)
    return path


def read(path: Path, **more: Any) -> Any:
    return read_verdict(path, OBSERVED, K, **more)


def same(found: Any, kept: Tensor = KEPT, target: Tensor = OBSERVED, weight: Tensor | None = None) -> None:
    assert torch.equal(found.kept, kept) and torch.equal(found.target, target)
    torch.testing.assert_close(found.weight, torch.ones(N) if weight is None else weight)


INDEX, ISSUE = list(range(N)), (~KEPT).tolist()
CLEANLAB: dict[str, list[Any]] = {
    "": INDEX,
    "is_label_issue": ISSUE,
    "label_quality": WEIGHTS.tolist(),
    "given_label": OBSERVED.tolist(),
    "predicted_label": FIXED.tolist(),
}
AUDIT = {
    "path": [""] * N,
    "index": INDEX,
    "label": OBSERVED.tolist(),
    "class": [NAMES[i % K] for i in INDEX],
    "trust": WEIGHTS.clamp(max=1).tolist(),
    "proposed": [""] * N,
    "verdict": ["keep" if kept else ("drop", "unsure")[i % 2] for i, kept in enumerate(KEPT.tolist())],
}
NAMED: dict[str, tuple[str, Any]] = {
    # cleanlab: a data frame's to_csv, to_json; find_label_issues' mask in a dictionary
    "cleanlab csv": ("a.csv", CLEANLAB),
    "cleanlab records": ("a.json", [{"index": i, "is_label_issue": ISSUE[i], "label_score": 0.5} for i in INDEX[::-1]]),
    "pandas json": ("a.json", {n: {str(i): v for i, v in enumerate(CLEANLAB[n])} for n in list(CLEANLAB)[1:]}),
    "mask npz": ("a.npz", {"keep": KEPT.numpy(), "index": np.arange(N)}),
    "mask pt": ("a.pt", {"trusted": KEPT, "index": torch.arange(N)}),
    "audit": ("a.csv", AUDIT),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_mask_by_name(name: str, tmp_path: Path) -> None:
    file, content = NAMED[name]
    same(read(write(tmp_path / file, content)))


def test_paths_name_samples_and_others_may_be_in_the_file(tmp_path: Path) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)).tolist()
    columns = {"path": [f"train/{PATHS[i]}" for i in order], "keep": [int(KEPT[i]) for i in order]}
    columns = {
        name: [*values, extra] for (name, values), extra in zip(columns.items(), ("ant/999.png", 1), strict=True)
    }
    file = write(tmp_path / "a.csv", columns)
    same(read(file, origin=Origin(torch.arange(N), paths=PATHS)))
    with pytest.raises(StateMismatchError, match="no file names"):
        read(file)
    lost = write(tmp_path / "b.csv", {"path": PATHS[1:], "keep": KEPT[1:].tolist()})
    with pytest.raises(StateMismatchError, match="1 of 40"):
        read(lost, origin=Origin(torch.arange(N), paths=PATHS))


@pytest.mark.parametrize("suffix", [".json", ".npz", ".pt"])
def test_bare_values_with_what_they_mean(suffix: str, tmp_path: Path) -> None:
    def bare(values: Tensor) -> Any:
        return values.tolist() if suffix == ".json" else values.numpy() if suffix == ".npz" else values

    file = tmp_path / f"a{suffix}"
    write(file, bare(KEPT))
    same(read(file, means="keep", order="given"))
    same(read(file, means="drop", order="given"), ~KEPT)
    write(file, bare((~KEPT).nonzero().flatten()))
    same(read(file, means="drop"))  # indices, as find_label_issues returns them
    same(read(file, means="keep"), ~KEPT)
    write(file, bare(FIXED))
    same(read(file, order="given"), torch.ones(N, dtype=torch.bool), FIXED)
    write(file, bare(WEIGHTS))
    same(read(file, order="given", means="weights"), torch.ones(N, dtype=torch.bool), weight=WEIGHTS)
    for means, sign in (("quality", -1), ("difficulty", 1)):
        found = read(file, order="given", means=means, share=0.7)
        for c in range(K):
            best = (sign * WEIGHTS).masked_fill(c != OBSERVED, 9).argsort()[:7]
            assert set(found.kept.nonzero().flatten().tolist()) & set(range(c, N, K)) == set(best.tolist())


@pytest.mark.parametrize("names", [False, True])
def test_relabelled_samples_get_the_proposed_label(names: bool, tmp_path: Path) -> None:
    def label(values: Tensor) -> list[Any]:
        return [NAMES[v] for v in values.tolist()] if names else values.tolist()

    words = ["keep" if kept else "relabel" for kept in KEPT.tolist()]
    words[0] = "unsure"
    columns = {"index": INDEX, "label": label(OBSERVED), "proposed": label(FIXED), "verdict": words}
    kept = torch.ones(N, dtype=torch.bool)
    kept[0] = False
    target = torch.where(torch.tensor([word == "relabel" for word in words]), FIXED, OBSERVED)
    origin = Origin(torch.arange(N), class_names=NAMES)
    same(read(write(tmp_path / "a.csv", columns), origin=origin), kept, target)
    columns = {"index": INDEX, "corrected_label": label(FIXED)}
    same(read(write(tmp_path / "b.csv", columns), origin=origin), torch.ones(N, dtype=torch.bool), FIXED)


def test_the_three_orders_of_a_dataset_with_held_out_samples(tmp_path: Path) -> None:
    """Samples 3, 6, 9, ... of a published order; every eighth training sample is held out."""
    every = torch.arange(1, 46) * 3
    held = every[::9]
    index = every[~torch.isin(every, held)]
    assert len(index) == N and len(held) == 5
    origin = Origin(index, held)
    published, train = torch.zeros(200, dtype=torch.bool), torch.zeros(45, dtype=torch.bool)
    published[index] = KEPT
    train[~torch.isin(every, held)] = KEPT
    for order, values in (("published", published), ("train", train), ("given", KEPT)):
        mask = write(tmp_path / f"{order}.pt", values)
        same(read(mask, origin=origin, order=order, means="keep"))
        listed = write(tmp_path / f"{order}.json", values.nonzero().flatten().tolist())
        same(read(listed, origin=origin, order=order, means="keep"))
        with pytest.raises(FileFormatError, match="--order"):  # a place could mean three samples
            read(listed, origin=origin, means="keep")
        with pytest.raises(FileFormatError, match="--order"):
            read(mask, origin=origin, means="keep")
    for order, wrong in (("train", KEPT), ("given", train), ("published", train)):
        with pytest.raises(StateMismatchError):
            read(write(tmp_path / "w.pt", wrong), origin=origin, order=order, means="keep")
    column = write(tmp_path / "c.csv", {"index": index.tolist(), "keep": KEPT.tolist()})
    same(read(column, origin=origin))  # an index column is a place in the published order


OTHER = label_digest(FIXED)
REFUSED: dict[str, tuple[str, Any, dict[str, Any], type[Exception]]] = {
    "a mask without a meaning": ("a.json", KEPT.tolist(), {"order": "given"}, FileFormatError),
    "indices without a meaning": ("a.json", [1, 5, 7], {}, FileFormatError),
    "scores without a meaning": ("a.json", WEIGHTS.tolist(), {"order": "given"}, FileFormatError),
    "labels without an order": ("a.pt", FIXED, {}, FileFormatError),
    "scores without a share": ("a.csv", {"index": INDEX, "el2n": WEIGHTS.tolist()}, {}, ConfigError),
    "two columns": ("a.csv", {"index": INDEX, "keep": KEPT.tolist(), "weight": WEIGHTS.tolist()}, {}, FileFormatError),
    "strange columns": ("a.csv", {"index": INDEX, "a": INDEX, "b": INDEX}, {}, FileFormatError),
    "other labels": ("a.csv", {**CLEANLAB, "given_label": FIXED.tolist()}, {}, StateMismatchError),
    "another hash": ("a.json", {"keep": ISSUE, "label_sha256": OTHER}, {"order": "given"}, StateMismatchError),
    "another length": ("a.pt", FIXED[1:], {"order": "given", "means": "labels"}, StateMismatchError),
    "another order": ("a.pt", (OBSERVED + 1) % K, {"order": "given"}, StateMismatchError),
    "an index too large": ("a.json", [1, N], {"means": "drop"}, StateMismatchError),
    "an index twice": ("a.csv", {"index": [0, *INDEX[:-1]], "keep": KEPT.tolist()}, {}, FileFormatError),
    "no truth value": ("a.csv", {"index": INDEX, "keep": ["maybe"] * N}, {}, FileFormatError),
    "no verdict": ("a.csv", {"index": INDEX, "verdict": ["fine"] * N}, {}, FileFormatError),
    "no class": ("a.csv", {"index": INDEX, "corrected_label": [K] * N}, {}, InvalidLabelsError),
    "a negative weight": ("a.csv", {"index": INDEX, "weight": [-1] * N}, {}, FileFormatError),
    "not a number": ("a.json", {"index": INDEX, "weight": [float("nan")] * N}, {}, FileFormatError),
    "relabelled without labels": ("a.csv", {"index": INDEX, "verdict": ["relabel"] * N}, {}, FileFormatError),
    "several lengths": ("a.json", {"index": INDEX, "keep": [True]}, {}, FileFormatError),
    "a matrix": ("a.pt", torch.zeros(N, 2), {"order": "given", "means": "weights"}, FileFormatError),
    "nothing": ("a.json", [], {"means": "drop"}, FileFormatError),
    "an unknown meaning": ("a.json", [1], {"means": "remove"}, ConfigError),
    "an unknown order": ("a.json", [1], {"means": "drop", "order": "mine"}, ConfigError),
    "an unknown column": ("a.csv", {"index": INDEX, "keep": INDEX}, {"column": "kep"}, ConfigError),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_or_of_other_data_is_refused(name: str, tmp_path: Path) -> None:
    file, content, more, error = REFUSED[name]
    with pytest.raises(error):
        read(write(tmp_path / file, content), **more)


def test_a_column_can_be_chosen(tmp_path: Path) -> None:
    columns = {"index": INDEX, "keep": KEPT.tolist(), "Weight": WEIGHTS.tolist(), "mine": FIXED.tolist()}
    file = write(tmp_path / "a.csv", columns)
    same(read(file, column="keep"))
    same(read(file, column="weight"), torch.ones(N, dtype=torch.bool), weight=WEIGHTS)
    same(read(file, column="mine", means="labels"), torch.ones(N, dtype=torch.bool), FIXED)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.mkdir, (Path("/nowhere"),)  # type: ignore[return-value]


def test_files_run_no_code_and_broken_ones_are_named(tmp_path: Path) -> None:
    torch.save(Evil(), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", keep=np.array([Evil()], dtype=object))
    (tmp_path / "c.json").write_text('{"keep": [true], "keep": [false]}')
    (tmp_path / "d.csv").write_text("index,keep\n1\n")
    (tmp_path / "e.txt").write_text("1")
    for name in ("a.pt", "b.npz", "c.json", "d.csv", "e.txt", "absent.csv"):
        with pytest.raises(FileFormatError):
            read(tmp_path / name)


def test_names_of_samples_are_checked() -> None:
    with pytest.raises(InvalidInputError):
        Origin(torch.tensor([0, 0]))
    with pytest.raises(InvalidInputError):
        Origin(torch.tensor([0, 1]), paths=("a",))
