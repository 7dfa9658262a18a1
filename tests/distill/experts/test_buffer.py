"""Replay buffers: what is written, what is read back, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tad_plugin.data.labels import label_digest
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.distill.experts import buffer as buffers
from tad_plugin.distill.experts.buffer import (
    BufferInfo,
    Trajectory,
    buffer_files,
    buffer_path,
    check_buffer,
    check_free_disk,
    predicted_bytes,
    read_buffer,
    write_buffer,
)
from tad_plugin.errors import (
    DiskSpaceError,
    FileFormatError,
    InvalidInputError,
    PreprocessingMismatchError,
    StateMismatchError,
)
from tad_plugin.nn.networks import make_network
from tad_plugin.utils.files import read_json
from tests.problems import PLAIN

LABELS = torch.tensor([0, 1, 2, 1])


def network(width: int = 4, depth: int = 2, classes: int = 3) -> nn.Module:
    return make_network(
        "convnet",
        in_channels=1,
        num_classes=classes,
        image_size=8,
        width=width,
        depth=depth,
        generator=torch.Generator().manual_seed(0),
    )


def trajectory(epochs: int = 2, seed: int = 0, of: nn.Module | None = None) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in (of or network()).parameters()]
    return [[torch.randn(s, generator=generator) for s in shapes] for _ in range(epochs + 1)]


def information(**changes: Any) -> BufferInfo:
    info = BufferInfo(
        architecture="convnet",
        width=4,
        depth=2,
        norm="instance",
        in_channels=1,
        image_size=(8, 8),
        num_classes=3,
        dataset="digits",
        labels=label_digest(LABELS),
        preprocessing=PLAIN.fingerprint(),
        epochs=2,
        lr=0.01,
        momentum=0.0,
        weight_decay=0.0,
        sharpness_aware=False,
        experts=2,
        experts_per_file=2,
        versions={"torch": "2"},
    )
    return dataclasses.replace(info, **changes)


def assert_same(found: list[Trajectory], expected: list[Trajectory]) -> None:
    assert len(found) == len(expected)
    for mine, yours in zip(found, expected, strict=True):
        assert len(mine) == len(yours)
        for a, b in zip(mine, yours, strict=True):
            assert [p.dtype for p in a] == [torch.float32] * len(b)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    experts = [trajectory(seed=0), trajectory(seed=1)]
    path = write_buffer(tmp_path / "new" / "folder", 3, experts)
    assert path == buffer_path(tmp_path / "new" / "folder", 3) and path.name == "replay_buffer_3.pt"
    assert_same(read_buffer(path), experts)
    assert write_buffer(tmp_path, 0, experts).read_bytes() == path.read_bytes()
    raw = torch.load(path, weights_only=True)
    assert type(raw) is list and type(raw[0]) is list and type(raw[0][0]) is list  # what the public codebases index


def test_parameters_and_views_are_stored_as_plain_tensors_of_their_own(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    entry: list[Tensor] = [flat[:4].view(2, 2), nn.Parameter(flat[4:7].clone())]
    write_buffer(tmp_path, 0, [[entry, entry]])
    flat.zero_()
    first, second = read_buffer(buffer_path(tmp_path, 0))[0]
    assert torch.equal(first[0], torch.arange(4.0).view(2, 2)) and type(second[1]) is Tensor
    assert len(first[0].untyped_storage()) == 16
    assert first[0].data_ptr() != second[0].data_ptr()


def test_half_precision_takes_half_the_room_and_comes_back_as_float32(tmp_path: Path) -> None:
    wide = network(width=64)
    experts = [trajectory(of=wide)]
    whole = write_buffer(tmp_path, 0, experts).stat().st_size
    half = write_buffer(tmp_path, 1, experts, half=True).stat().st_size
    assert half < 0.6 * whole
    found = read_buffer(buffer_path(tmp_path, 1))
    assert_same(found, [[[p.half().float() for p in entry] for entry in experts[0]]])


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("half", [False, True])
def test_the_size_is_predicted(tmp_path: Path, width: int, half: bool) -> None:
    net = network(width)
    size = write_buffer(tmp_path, 0, [trajectory(5, seed, net) for seed in range(3)], half=half).stat().st_size
    predicted = predicted_bytes(net, 5, 3, half)
    assert size <= predicted <= size * 1.4


def test_files_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for n in range(11):
        buffer_path(tmp_path, n).touch()
    assert buffer_files(tmp_path) == [buffer_path(tmp_path, n) for n in range(11)]
    buffer_path(tmp_path, 4).unlink()
    with pytest.raises(FileFormatError, match="4 .*replay_buffer_10.pt"):
        buffer_files(tmp_path)
    with pytest.raises(FileFormatError, match="nothing"):
        buffer_files(tmp_path / "nothing")


# -- damaged and foreign files -----------------------------------------------------------------------


def test_a_missing_and_a_truncated_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="replay_buffer_0.pt"):
        read_buffer(tmp_path / "replay_buffer_0.pt")
    path = write_buffer(tmp_path, 0, [trajectory()])
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="replay_buffer_0.pt"):
            read_buffer(path)


def test_a_changed_bit_is_found_in_our_files_and_in_foreign_ones(tmp_path: Path) -> None:
    path = write_buffer(tmp_path, 0, [trajectory()])
    torch.save([trajectory()], tmp_path / "foreign.pt")
    assert_same(read_buffer(tmp_path / "foreign.pt"), [trajectory()])
    for place in (path, tmp_path / "foreign.pt"):
        whole = bytearray(place.read_bytes())
        at = whole.index(bytes(trajectory()[0][0][0].numpy().tobytes()))
        whole[at + 5] ^= 4
        place.write_bytes(whole)
        assert not torch.equal(torch.load(place, weights_only=True)[0][0][0], trajectory()[0][0])
        with pytest.raises(FileFormatError, match=place.name):
            read_buffer(place)


def test_a_changed_description_is_found(tmp_path: Path) -> None:
    path = information().write(tmp_path)
    assert BufferInfo.read(tmp_path) == information()
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(FileFormatError, match=r"buffer\.json"):
        BufferInfo.read(tmp_path)


@pytest.mark.parametrize(
    "contents",
    [
        {"a": 1},
        [],
        torch.zeros(3),
        [torch.zeros(3)],
        [[]],
        [[[]]],
        [[[torch.zeros(2, dtype=torch.int64)]]],
        [[["text"]]],
        [[[torch.zeros(2)], [torch.zeros(3)]]],
        [[[torch.zeros(2)]], [[torch.zeros(2), torch.zeros(1)]]],
    ],
)
def test_other_contents_are_refused(tmp_path: Path, contents: Any) -> None:
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(contents, path)
    with pytest.raises(FileFormatError, match="replay_buffer_0.pt"):
        read_buffer(path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_code_in_a_file_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "replay_buffer_0.pt"
    torch.save([[[Evil()]]], path)
    with pytest.raises(FileFormatError, match="replay_buffer_0.pt"):
        read_buffer(path)
    assert "executed" not in capsys.readouterr().out


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [trajectory(seed=0)]
    path = write_buffer(tmp_path, 0, before)

    def full(_tree: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(buffers.torch, "save", full)
    with pytest.raises(DiskSpaceError, match=r"replay_buffer_0.pt.*No space left"):
        write_buffer(tmp_path, 0, [trajectory(seed=1)])
    assert_same(read_buffer(path), before)
    assert [p.name for p in tmp_path.iterdir()] == ["replay_buffer_0.pt"]


def test_too_little_room_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**6))
    check_free_disk(tmp_path / "not" / "there" / "yet", 10**6)
    with pytest.raises(DiskSpaceError, match=r"1\.5 MB.*1\.0 MB"):
        check_free_disk(tmp_path / "not" / "there" / "yet", 1_500_000)


def test_an_empty_buffer_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        write_buffer(tmp_path, 0, [])


# -- the side file -----------------------------------------------------------------------------------


def test_the_side_file_comes_back_and_a_foreign_buffer_has_none(tmp_path: Path) -> None:
    assert BufferInfo.read(tmp_path) is None
    info = information(half=True, method="tad", state_file="state.safetensors")
    assert info.write(tmp_path).name == "buffer.json"
    assert BufferInfo.read(tmp_path) == info


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda v: "{", "JSON"),
        (lambda v: "[]", "version 1"),
        (lambda v: json.dumps({**v, "version": 2}), "version 2"),
        (lambda v: json.dumps({k: x for k, x in v.items() if k not in ("labels", "epochs")}), "without epochs, labels"),
        (lambda v: json.dumps({**v, "image_size": 8}), "image_size 8"),
    ],
)
def test_a_damaged_side_file_is_named(tmp_path: Path, damage: Any, says: str) -> None:
    path = information().write(tmp_path)
    path.write_text(damage(read_json(path)))
    with pytest.raises(FileFormatError, match=says):
        BufferInfo.read(tmp_path)


# -- whether it fits ---------------------------------------------------------------------------------


def test_a_buffer_that_fits_passes() -> None:
    info = information()
    check_buffer(info, network(), LABELS, 2, preprocessing=PLAIN)
    check_buffer(trajectory(), network(), LABELS, 2, info=info, preprocessing=PLAIN)
    check_buffer(trajectory(), network(), LABELS, 2, preprocessing=PLAIN)  # foreign: nothing but shapes to compare


@pytest.mark.parametrize("other", [{"width": 8}, {"depth": 1}, {"classes": 4}])
def test_another_architecture_is_named(other: dict[str, int]) -> None:
    for given in (information(), trajectory()):
        with pytest.raises(StateMismatchError, match=r"parameters, number \d.*parameters, number \d"):
            check_buffer(given, network(**other))
    with pytest.raises(StateMismatchError, match="convnet, width 4, depth 2"):
        check_buffer(information(), network(**other))


def test_other_labels_are_named_with_both_hashes_and_the_way_out() -> None:
    others = torch.tensor([0, 1, 2, 2])
    for given, info in ((information(), None), (trajectory(), information())):
        with pytest.raises(StateMismatchError) as caught:
            check_buffer(given, network(), others, info=info)
        text = str(caught.value)
        assert label_digest(others)[:16] in text and label_digest(LABELS)[:16] in text


def test_other_preprocessing_is_named() -> None:
    with pytest.raises(PreprocessingMismatchError, match=PLAIN.fingerprint()):
        check_buffer(information(), network(), preprocessing=Preprocessing((0.5,), (1.0,)))


def test_too_few_epochs_are_named() -> None:
    for given in (information(), trajectory()):
        with pytest.raises(InvalidInputError, match="3 epochs.* 2"):
            check_buffer(given, network(), need_epochs=3)
