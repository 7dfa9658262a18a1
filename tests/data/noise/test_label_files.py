"""Human label files: mapping by position and by rank, and files that must not be trusted."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.data.noise import array_files
from tad_plugin.data.noise.label_files import human_labels, read_label_file
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import (
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    UnknownNameError,
)

K, M = 4, 60
RNG = np.random.default_rng(0)
CLEAN = RNG.integers(0, K, M)
WORSE = RNG.integers(0, K, M)
RANK = np.array([int((CLEAN[:i] == CLEAN[i]).sum()) for i in range(M)])


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "labels.npz"
    np.savez(path, clean=CLEAN.astype(np.uint8), worse=WORSE.astype(np.uint8), rank_in_class=RANK.astype(np.uint16))
    return path


def published(dtype: str = "int64") -> dict[str, Any]:
    return {"clean_label": CLEAN.astype(dtype), "worse_label": WORSE.astype(dtype), "random_label1": CLEAN.copy()}


def rewritten(data: bytes, old: bytes, new: bytes) -> bytes:
    """A torch zip archive with the pickle's text replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(old, new))
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_published_pt_of_any_numpy(tmp_path: Path, dtype: str, zipped: bool, module: bytes) -> None:
    buffer = io.BytesIO()
    torch.save(published(dtype), buffer, _use_new_zipfile_serialization=zipped)
    own = np.zeros(1).__reduce__()[0].__module__.encode()  # type: ignore[union-attr]
    replace = rewritten if zipped else bytes.replace
    path = tmp_path / "CIFAR-10_human.pt"
    path.write_bytes(replace(buffer.getvalue(), own, module))
    sets = read_label_file(path)
    assert set(sets) == {"clean", "worse", "random1"}
    assert sets["worse"].tolist() == WORSE.tolist() and sets["worse"].dtype == torch.int64


def test_pt_with_tensors_or_lists(tmp_path: Path) -> None:
    torch.save({"clean": torch.from_numpy(CLEAN), "worse": WORSE.tolist()}, tmp_path / "a.pt")
    assert read_label_file(tmp_path / "a.pt")["worse"].tolist() == WORSE.tolist()
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    whole[whole.index(CLEAN.tobytes())] ^= 1  # one bit of the first label
    (tmp_path / "a.pt").write_bytes(whole)
    with pytest.raises(FileFormatError, match="checksum"):
        read_label_file(tmp_path / "a.pt")


class Trap:
    """Would make a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"clean_label": CLEAN, "worse_label": Trap(sprung)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"clean_label": Trap(sprung)}, protocol=2))
    np.savez(tmp_path / "c.npz", clean=np.array([Trap(sprung)], dtype=object))
    for name in ("a.pt", "b.pt", "c.npz"):
        with pytest.raises(FileFormatError, match=name):
            read_label_file(tmp_path / name)
    assert not sprung.exists()


def test_reading_arrays_allows_them_nowhere_else(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "a.pt")
    read_label_file(tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_bad_files(tmp_path: Path, npz: Path) -> None:
    np.savez(tmp_path / "floats.npz", clean=CLEAN.astype(float))
    np.savez(tmp_path / "square.npz", clean=CLEAN.reshape(6, 10))
    np.savez(tmp_path / "negative.npz", clean=CLEAN - 1)
    np.savez(tmp_path / "noclean.npz", worse=WORSE)
    np.savez(tmp_path / "lengths.npz", clean=CLEAN, worse=WORSE[:-1])
    (tmp_path / "cut.npz").write_bytes(npz.read_bytes()[:200])
    (tmp_path / "text.npz").write_text("labels")
    (tmp_path / "text.pt").write_text("labels")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"clean": {"a": 1}}, tmp_path / "nested.pt")
    (tmp_path / "labels.csv").write_text("1,2")
    bad = ["floats.npz", "square.npz", "negative.npz", "noclean.npz", "lengths.npz", "cut.npz", "text.npz", "text.pt"]
    for name in [*bad, "empty.pt", "list.pt", "nested.pt", "labels.csv", "absent.npz"]:
        with pytest.raises(FileFormatError, match=name):
            read_label_file(tmp_path / name)


def npy(header: bytes, data: bytes = b"") -> bytes:
    head = header + b" " * (53 - len(header) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


@pytest.mark.parametrize(
    "member",
    [
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }"),
        npy(b"{'descr': '<i8', 'shape': (3,"),
        npy(b"((" * 3000),
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"),
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-3,), }"),
        npy(b"{'descr': '\xff\xfe', 'fortran_order': False, 'shape': (3,), }"),
        b"\x93NUMPY\x09\x00",
        b"no array",
    ],
    ids=["huge", "cut header", "nested header", "objects", "negative", "unicode", "version", "text"],
)
def test_npz_with_a_broken_member(tmp_path: Path, member: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "l.npz", "w") as archive:
        archive.writestr("clean.npy", member)
    with pytest.raises(FileFormatError, match=r"l\.npz"):
        read_label_file(tmp_path / "l.npz")


def test_npz_with_any_damaged_byte(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "good.npz", clean=CLEAN, worse=WORSE)
    whole = (tmp_path / "good.npz").read_bytes()
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 0xFF
        (tmp_path / "l.npz").write_bytes(data)
        try:
            found = read_label_file(tmp_path / "l.npz")
        except FileFormatError:
            continue
        assert found["clean"].tolist() == CLEAN.tolist()  # a byte that is not read, such as a date


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_that_are_too_large_double_or_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", clean=np.zeros(10**6, dtype=np.int64))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        for labels in (CLEAN, WORSE):
            buffer = io.BytesIO()
            np.save(buffer, labels)
            archive.writestr("clean.npy", buffer.getvalue())
    with pytest.raises(FileFormatError, match="twice"):
        read_label_file(tmp_path / "twice.npz")
    torch.save({"clean": torch.zeros(10**6)}, tmp_path / "zeros.pt")
    np.savez(tmp_path / "far.npz", clean=np.full(3, 2**64 - 1, dtype=np.uint64))
    with pytest.raises(FileFormatError, match="clean"):
        read_label_file(tmp_path / "far.npz")
    monkeypatch.setattr(array_files, "_LARGEST", 10**5)
    for name in ("zeros.npz", "zeros.pt"):
        with pytest.raises(FileFormatError, match=name):
            read_label_file(tmp_path / name)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.npz")
        with pytest.raises(FileFormatError, match=r"pipe\.npz"):
            read_label_file(tmp_path / "pipe.npz")


def test_the_home_folder_is_expanded(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(npz.parent))
    monkeypatch.setenv("USERPROFILE", str(npz.parent))
    noisy = NoiseSpec.parse("human:worse@path=~/labels.npz").apply(torch.from_numpy(CLEAN), K)
    assert noisy.labels.tolist() == WORSE.tolist()


def test_a_label_set_that_is_not_there_is_named_with_those_that_are(npz: Path) -> None:
    with pytest.raises(UnknownNameError, match="clean, worse.*'aggre'.*human:NAME"):
        human_labels(npz, "aggre", torch.from_numpy(CLEAN), K)


def test_mapping_by_position(npz: Path) -> None:
    index = torch.tensor([5, 0, 59, 7])
    true = torch.from_numpy(CLEAN)[index]
    assert human_labels(npz, "worse", true, K, source_index=index).tolist() == WORSE[index.numpy()].tolist()
    assert human_labels(npz, "worse_label", torch.from_numpy(CLEAN), K).tolist() == WORSE.tolist()


@pytest.mark.parametrize("stored", [True, False])
def test_mapping_by_rank(npz: Path, tmp_path: Path, stored: bool) -> None:
    """As an image folder has it: class by class, the first seven of each; the rank may be stored or counted."""
    if not stored:
        np.savez(tmp_path / "plain.npz", clean=CLEAN, worse=WORSE)
        npz = tmp_path / "plain.npz"
    positions = np.concatenate([np.flatnonzero(c == CLEAN)[:7] for c in range(K)])
    ranks = torch.arange(7).repeat(K)
    spec = NoiseSpec("human", key="worse", path=str(npz))
    noisy = spec.apply(torch.from_numpy(CLEAN[positions]), K, source_rank=ranks, source_index=torch.arange(28))
    assert noisy.labels.tolist() == WORSE[positions].tolist()
    assert noisy.realised_rate == pytest.approx(float((WORSE[positions] != CLEAN[positions]).mean()))


def test_wrong_mappings_are_errors(npz: Path, tmp_path: Path) -> None:
    true = torch.from_numpy(CLEAN)
    with pytest.raises(StateMismatchError, match="of 60"):
        human_labels(npz, "worse", true.roll(1), K)
    with pytest.raises(StateMismatchError, match="60"):
        human_labels(npz, "worse", true[:3], K, source_index=torch.tensor([0, 1, 60]))
    with pytest.raises(StateMismatchError, match="60"):
        human_labels(npz, "worse", torch.cat([true, true]), K)
    for rank in (-1, 1000):
        with pytest.raises(StateMismatchError, match=f"{rank} of class"):
            human_labels(npz, "worse", true[:1], K, source_rank=torch.tensor([rank]))
    with pytest.raises(StateMismatchError, match="3"):
        human_labels(npz, "worse", torch.zeros(5, dtype=torch.int64), 3)
    with pytest.raises(InvalidInputError, match="source_index"):
        human_labels(npz, "worse", true, K, source_index=torch.arange(3))
    with pytest.raises(UnknownNameError, match="'worse'"):
        human_labels(npz, "worst", true, K)
    with pytest.raises(UnknownNameError):
        human_labels(npz, "rank_in_class", true, K)
    np.savez(tmp_path / "wide.npz", clean=CLEAN, worse=WORSE + K)
    with pytest.raises(InvalidLabelsError, match="worse"):
        human_labels(tmp_path / "wide.npz", "worse", true, K)
    np.savez(tmp_path / "ranks.npz", clean=CLEAN, rank_in_class=RANK + 10**12)
    with pytest.raises(FileFormatError, match="rank_in_class"):
        human_labels(tmp_path / "ranks.npz", "clean", true, K, source_rank=torch.from_numpy(RANK))


def test_the_published_labels(shared_data: Path) -> None:
    path = shared_data / "cifar10n-labels.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    clean = read_label_file(path)["clean"]
    rates = {}
    for key in ("aggre", "worse", "random1", "random2", "random3"):
        rates[key] = NoiseSpec("human", key=key, path=str(path)).apply(clean, 10).realised_rate
    assert rates["aggre"] == pytest.approx(0.0901, abs=5e-4)
    assert rates["worse"] == pytest.approx(0.4021, abs=5e-4)
    assert all(0.17 <= rates[f"random{i}"] <= 0.185 for i in (1, 2, 3))
