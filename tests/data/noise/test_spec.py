"""NoiseSpec: checking, text form, files, conventions, determinism."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tad_plugin.data.noise.class_maps import CIFAR10_CLASSES, CIFAR100_SUPERCLASSES, asymmetric_map
from tad_plugin.data.noise.spec import KINDS, NoiseSpec, NoisyLabels
from tad_plugin.errors import ConfigError, FileFormatError, InvalidLabelsError, StateMismatchError

MATRIX = ((0.9, 0.1, 0.0), (0.0, 0.5, 0.5), (0.2, 0.2, 0.6))
EXAMPLES = [
    NoiseSpec("none"),
    NoiseSpec("symmetric", 0.4),
    NoiseSpec("symmetric", 0.1 + 0.2, seed=7, convention="all"),
    NoiseSpec("asymmetric", 0.4, seed=3),
    NoiseSpec("asymmetric", 0.4, class_map=((7, 1), (2, 7))),
    NoiseSpec("pair", 1.0),
    NoiseSpec("instance", 0.3, spread=0.2),
    NoiseSpec("matrix", matrix=MATRIX, seed=5),
    NoiseSpec("matrix", path="some/where,with=commas.npy"),
    NoiseSpec("human", key="worse"),
    NoiseSpec("human", key="random1", path="a@b,path=c.npz"),
]


def labels(n: int = 600, k: int = 10) -> torch.Tensor:
    return torch.arange(n) % k


@pytest.mark.parametrize("spec", EXAMPLES, ids=str)
def test_text_and_json_round_trip(spec: NoiseSpec, tmp_path: Path) -> None:
    assert NoiseSpec.parse(str(spec)) == spec
    assert NoiseSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    spec.save(tmp_path / "noise.json")
    assert NoiseSpec.load(tmp_path / "noise.json") == spec


@given(st.sampled_from(["symmetric", "asymmetric", "pair", "instance"]), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_any_rate_and_seed_round_trip(kind: str, rate: float, seed: int) -> None:
    spec = NoiseSpec(kind, rate, seed)
    assert NoiseSpec.parse(str(spec)) == spec


def test_every_kind_has_an_example() -> None:
    assert {spec.kind for spec in EXAMPLES} == set(KINDS)


def test_short_forms() -> None:
    assert str(NoiseSpec("symmetric", 0.4)) == "symmetric:0.4"
    assert str(NoiseSpec("asymmetric", 0.4, seed=3)) == "asymmetric:0.4@seed=3"
    assert NoiseSpec.parse(" human:worse ", path=Path("f.npz")) == NoiseSpec("human", key="worse", path="f.npz")
    assert NoiseSpec.parse("pair:0.2@seed=1", seed=4).seed == 4
    assert NoiseSpec("asymmetric", 0.1, class_map={7: 1, 2: 7}).class_map == ((2, 7), (7, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "symmetric", "symmetric:", "symmetric:x", "symmetric:1.5", "symmetric:-0.1", "symmetric:nan", "gaussian:0.1",
     "none:0.1", "matrix", "matrix:0.1", "human", "pair:0.1@", "pair:0.1@seed", "pair:0.1@seed=-1", "pair:0.1@seed=1.5",
     "pair:0.1@color=red", "pair:0.1@convention=all", "symmetric:0.1@convention=some", "pair:0.1@path=x",
     "asymmetric:0.1@map=7", "asymmetric:0.1@map=7-1/7-2", "matrix@rows=0.5:0.5", "matrix@rows=0.5:0.4/0:1",
     "matrix@rows=1.5:-0.5/0:1", "instance:0.1@spread=0", "symmetric:0.1@spread=0.2", "none@rows=1"],
)  # fmt: skip
def test_bad_text_names_the_accepted_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"symmetric:0\.4.*human:worse"):
        NoiseSpec.parse(text)


def test_other_versions_types_and_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="2"):
        NoiseSpec("none", version=2)
    with pytest.raises(ConfigError, match="much"):
        NoiseSpec("symmetric", rate="much")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="colour"):
        NoiseSpec.from_dict({"kind": "none", "colour": 1})
    with pytest.raises(ConfigError, match="kind"):
        NoiseSpec.from_dict({"rate": 0.1})


@pytest.mark.parametrize(
    ("kind", "takes"),
    [("none", ""), ("symmetric", "rate convention"), ("asymmetric", "rate class_map"), ("pair", "rate"),
     ("instance", "rate spread"), ("matrix", "matrix path"), ("human", "path key")],
)  # fmt: skip
def test_each_kind_takes_its_own_settings_only(kind: str, takes: str) -> None:
    needed: dict[str, dict[str, Any]] = {"matrix": {"matrix": MATRIX}, "human": {"key": "worse"}}
    values = {"rate": 0.1, "convention": "all", "class_map": ((0, 1),), "spread": 0.2, "matrix": MATRIX, "path": "f",
              "key": "worse"}  # fmt: skip
    for name, value in values.items():
        given = {**needed.get(kind, {}), name: value}
        if kind == "matrix" and name == "path":
            del given["matrix"]
        if name in takes.split():
            assert getattr(NoiseSpec(kind, **given), name) == value
        else:
            with pytest.raises(ConfigError, match=f"{name} for {kind}"):
                NoiseSpec(kind, **given)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("matrix", {"matrix": MATRIX, "path": "f.npy"}),
        ("asymmetric", {"class_map": ((0.5, 1),)}),
        ("asymmetric", {"class_map": ((0, 1, 2),)}),
        ("symmetric", {"rate": 10**400}),
        ("symmetric", {"seed": 1.0}),
        ("symmetric", {"seed": True}),
        ("matrix", {"matrix": ()}),
        ("matrix", {"matrix": ((float("nan"), 1.0), (0.0, 1.0))}),
        (["none"], {}),
    ],
)
def test_bad_values_are_config_errors(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NoiseSpec(kind, **values)


@pytest.mark.parametrize("text", ["none", "symmetric:0.4", "asymmetric:0.4", "pair:0.3", "instance:0.3"])
def test_record_of_what_came_out(text: str, global_rng_untouched: None) -> None:
    true = labels()
    images = torch.rand(len(true), 1, 4, 4, generator=torch.Generator().manual_seed(1))
    noisy = NoiseSpec.parse(text).apply(true, 10, images, dataset="digits")
    matrix = np.zeros((10, 10))
    for t, o in zip(true.tolist(), noisy.labels.tolist(), strict=True):
        matrix[t, o] += 1 / 60
    np.testing.assert_allclose(noisy.matrix.numpy(), matrix, atol=1e-12)
    assert noisy.realised_rate == pytest.approx(float((noisy.labels != true).double().mean()), abs=0)
    assert noisy.digest == hashlib.sha256(noisy.labels.numpy().astype("<i8").tobytes()).hexdigest()
    assert torch.equal(noisy.true_labels, true) and noisy.labels is not true
    again = NoiseSpec.parse(text).apply(true.to(torch.int32), 10, images, dataset="digits")
    assert again.digest == noisy.digest
    other = NoiseSpec.parse(text, seed=1).apply(true, 10, images, dataset="digits")
    assert (other.digest == noisy.digest) == (text == "none")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (NoiseSpec("symmetric", 0.5), "010301120312213020233113"),
        (NoiseSpec("symmetric", 0.5, convention="all"), "012301130322311131230133"),
        (NoiseSpec("pair", 0.5), "013301300230113012231133"),
        (NoiseSpec("instance", 0.5), "033321330123213101310131"),
        (NoiseSpec("matrix", matrix=tuple(tuple(0.7 if i == j else 0.1 for j in range(4)) for i in range(4))),
         "312301130121012301230113"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_labels_of_version_1_never_change(spec: NoiseSpec, expected: str) -> None:
    images = torch.arange(24 * 9).float().reshape(24, 1, 3, 3).mul(0.7).sin()
    noisy = spec.apply(torch.arange(24) % 4, 4, images)
    assert "".join(map(str, noisy.labels.tolist())) == expected


def test_pair_and_maps() -> None:
    true = labels()
    assert torch.equal(NoiseSpec("pair", 1.0).apply(true, 10).labels, (true + 1) % 10)
    full = NoiseSpec("asymmetric", 1.0)
    expected = {0: 0, 1: 1, 2: 0, 3: 5, 4: 7, 5: 3, 6: 6, 7: 7, 8: 8, 9: 1}
    for keywords in ({"dataset": "cifar10"}, {"dataset": "folder:x", "class_names": CIFAR10_CLASSES}):
        assert full.apply(true, 10, **keywords).labels.tolist() == [expected[c] for c in true.tolist()]  # type: ignore[arg-type]
    digits = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
    assert full.apply(true, 10, dataset="digits").labels.tolist() == [digits.get(c, c) for c in true.tolist()]
    own = NoiseSpec("asymmetric", 1.0, class_map=((0, 9),)).apply(true, 10)
    assert own.labels.tolist() == [9 if c == 0 else c for c in true.tolist()]


def test_cifar100_map_stays_in_the_superclass() -> None:
    assert sorted(c for group in CIFAR100_SUPERCLASSES for c in group) == list(range(100))
    mapping = asymmetric_map("cifar100", 100)
    home = {c: i for i, group in enumerate(CIFAR100_SUPERCLASSES) for c in group}
    assert sorted(mapping) == list(range(100)) == sorted(mapping.values())
    for c, target in mapping.items():
        assert home[c] == home[target] and c != target
        inside = [d for d in CIFAR100_SUPERCLASSES[home[c]] if d > c]
        assert target == (min(inside) if inside else min(CIFAR100_SUPERCLASSES[home[c]]))


def test_matrix_from_memory_and_files(tmp_path: Path) -> None:
    true = labels(300, 3)
    np.save(tmp_path / "t.npy", np.array(MATRIX))
    (tmp_path / "t.json").write_text(json.dumps(MATRIX))
    digests = {
        NoiseSpec("matrix", matrix=torch.tensor(MATRIX, dtype=torch.float64)).apply(true, 3).digest,  # type: ignore[arg-type]
        NoiseSpec.parse(f"matrix@path={tmp_path / 't.npy'}").apply(true, 3).digest,
        NoiseSpec.parse(f"matrix@path={tmp_path / 't.json'}").apply(true, 3).digest,
    }
    assert len(digests) == 1
    with pytest.raises(ConfigError, match="4"):
        NoiseSpec("matrix", matrix=MATRIX).apply(true, 4)
    for name, content in (("a.npy", b"junk"), ("b.json", b"{"), ("c.json", b"[1, 2]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError, match=name):
            NoiseSpec("matrix", path=str(tmp_path / name)).apply(true, 3)
    np.save(tmp_path / "o.npy", np.array([[None]]), allow_pickle=True)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "text.json").write_text('[["1", "0"], ["0", "1"]]')
    (tmp_path / "bool.json").write_text("[[true, false], [false, true]]")
    (tmp_path / "nan.json").write_text("[[NaN, 1], [0, 1]]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "head.npy").write_bytes(np.lib.format.magic(1, 0) + b"\x08\x00{'descr'")
    (tmp_path / "folder.npy").mkdir()
    broken = ("o.npy", "absent.npy", "deep.json", "text.json", "bool.json", "nan.json", "bytes.json", "head.npy")
    for name in (*broken, "folder.npy"):
        with pytest.raises(FileFormatError):
            NoiseSpec("matrix", path=str(tmp_path / name)).apply(true, 3)
    (tmp_path / "d.json").write_text("[[0.5, 0.4], [0, 1]]")
    with pytest.raises(ConfigError, match="0.9"):
        NoiseSpec("matrix", path=str(tmp_path / "d.json")).apply(labels(10, 2), 2)


def test_what_is_missing_is_named() -> None:
    true = labels()
    with pytest.raises(ConfigError, match="instance"):
        NoiseSpec("instance", 0.1).apply(true, 10)
    with pytest.raises(ConfigError, match="svhn"):
        NoiseSpec("asymmetric", 0.1).apply(true, 10, dataset="svhn")
    with pytest.raises(ConfigError, match="11"):
        NoiseSpec("asymmetric", 0.1).apply(true, 11, dataset="cifar10")
    with pytest.raises(ConfigError, match="0-10"):
        NoiseSpec("asymmetric", 0.1, class_map=((0, 10),)).apply(true, 10)
    with pytest.raises(ConfigError, match="path"):
        NoiseSpec("human", key="worse").apply(true, 10)
    with pytest.raises(ConfigError, match="1"):
        NoiseSpec("symmetric", 0.1).apply(torch.zeros(4, dtype=torch.int64), 1)
    with pytest.raises(InvalidLabelsError):
        NoiseSpec("symmetric", 0.1).apply(true, 9)
    with pytest.raises(InvalidLabelsError):
        NoiseSpec("symmetric", 0.1).apply(true.float(), 10)


def test_saved_description_recognises_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    noisy = NoiseSpec("symmetric", 0.4).apply(labels(), 10)
    noisy.save(path)
    assert NoiseSpec.load(path) == noisy.spec
    saved = json.loads(path.read_text())
    assert saved["realised_rate"] == noisy.realised_rate and saved["digest"] == noisy.digest
    NoiseSpec("symmetric", 0.4).apply(labels(), 10).check(path)
    with pytest.raises(StateMismatchError, match=noisy.digest[:16]):
        NoiseSpec("symmetric", 0.4, seed=1).apply(labels(), 10).check(path)
    for content in ("{", "[]", '{"format": "other"}', "[" * 100_000, "\udcff"):
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(FileFormatError):
            NoiseSpec.load(path)
    with pytest.raises(FileFormatError):
        noisy.check(tmp_path / "absent.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(FileFormatError):
            NoiseSpec.load(tmp_path / "pipe.json")


def test_empty_class_has_a_row_of_zeros() -> None:
    true = torch.tensor([0, 0, 2])
    measured = NoisyLabels.of(NoiseSpec("none"), torch.tensor([0, 2, 2]), true, 3)
    assert measured.matrix.tolist() == [[0.5, 0, 0.5], [0, 0, 0], [0, 0, 1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_labels() -> None:
    true = labels()
    images = torch.rand(len(true), 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for text in ("symmetric:0.4", "pair:0.4", "instance:0.3"):
        there = NoiseSpec.parse(text).apply(true.cuda(), 10, images.cuda())
        assert there.labels.is_cuda
        assert there.digest == NoiseSpec.parse(text).apply(true, 10, images).digest
