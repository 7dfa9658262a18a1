"""Replay buffers: the trajectories of experts on disk, in the format of the public codebases, with a description.

A buffer is a folder of ``replay_buffer_0.pt``, ``replay_buffer_1.pt``, ... A file is a list of experts, an expert a
list over epochs (0 is the start), an epoch the list of parameters in the order of ``network.parameters()``. We add
``buffer.json``, which names the network, the labels and the settings of the experts. A folder without it is a foreign
buffer: it can be read, but only the shapes of its parameters can be checked.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tad_plugin.data.labels import label_digest
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.errors import (
    DiskSpaceError,
    FileFormatError,
    InvalidInputError,
    PreprocessingMismatchError,
    StateMismatchError,
    explain,
)
from tad_plugin.nn.networks import make_network
from tad_plugin.utils.files import atomic_save, atomic_write, read_json
from tad_plugin.utils.seals import check_archive, save_sealed, sealed_json

__all__ = [
    "BufferInfo",
    "Trajectory",
    "buffer_files",
    "buffer_path",
    "check_buffer",
    "check_free_disk",
    "clear_buffer",
    "predicted_bytes",
    "read_buffer",
    "room_for",
    "write_buffer",
]

Trajectory = list[list[Tensor]]
"""One expert: its parameters at the start and after each epoch, float32 on the CPU."""

VERSION = 1
SIDE_FILE = "buffer.json"
_AGAIN = "Train the experts again into an empty folder, or pass the right folder"
# Bytes that torch.save adds to each tensor (record header, padding to 64 bytes, pickle); measured and rounded up.
_OVERHEAD = 340


@dataclass
class BufferInfo:
    """Description of a buffer, stored in ``buffer.json``.

    Attributes:
        architecture: name of the network, a key of :data:`tad_plugin.nn.networks.NETWORKS`.
        width: width of the network.
        depth: depth of the network.
        norm: normalisation of the network.
        in_channels: image channels C.
        image_size: (height, width) in pixels.
        num_classes: K.
        dataset: name of the dataset.
        labels: :func:`tad_plugin.data.labels.label_digest` of the observed labels in the experts' training.
        preprocessing: :meth:`Preprocessing.fingerprint` of the images, "" if unknown.
        epochs: E; a trajectory has E + 1 entries.
        lr: learning rate of the experts.
        momentum: momentum of the experts.
        weight_decay: L2 penalty of the experts.
        sharpness_aware: trained with sharpness-aware steps (FTD).
        experts: number of experts in all files.
        experts_per_file: number of experts in a file; the last file may hold fewer.
        half: stored in half precision, which only this package reads back.
        method: the method attached in training, or "none".
        state_file: file name of the SampleState in the folder, "" if there is none.
        versions: versions of Python and the packages, and the device.
    """

    architecture: str
    width: int
    depth: int
    norm: str
    in_channels: int
    image_size: tuple[int, int]
    num_classes: int
    dataset: str
    labels: str
    preprocessing: str
    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    sharpness_aware: bool
    experts: int
    experts_per_file: int
    half: bool = False
    method: str = "none"
    state_file: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path) -> Path:
        """Writes ``buffer.json`` atomically; returns its path."""
        return atomic_write(Path(folder) / SIDE_FILE, sealed_json({"version": VERSION, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, folder: str | Path) -> BufferInfo | None:
        """Reads ``buffer.json``; None for a foreign buffer, which has none.

        Raises:
            FileFormatError: the file is not JSON, of another version, or lacks a field.
        """
        path = Path(folder) / SIDE_FILE
        if not path.exists():
            return None
        values = read_json(path)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            got = f"version {values.get('version')!r}" if isinstance(values, dict) else type(values).__name__
            raise FileFormatError(explain(f"a buffer description of version {VERSION} in {path}", got, _AGAIN))
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if k in known}
        lost = sorted(known - set(given))
        if lost or not isinstance(given["image_size"], list):
            got = f"one without {', '.join(lost)}" if lost else f"image_size {given['image_size']!r}"
            raise FileFormatError(explain(f"a complete buffer description in {path}", got, _AGAIN))
        height, width = given["image_size"]
        return cls(**{**given, "image_size": (int(height), int(width))})


def buffer_path(folder: str | Path, n: int) -> Path:
    """Path of the n-th file of a buffer."""
    return Path(folder) / f"replay_buffer_{n}.pt"


def buffer_files(folder: str | Path) -> list[Path]:
    """The files of a buffer, ordered by number.

    Raises:
        FileFormatError: there are no files, or their numbers have a gap.
    """
    found = {p.name: p for p in Path(folder).glob("replay_buffer_*.pt")}
    paths: list[Path] = []
    while (name := buffer_path(folder, len(paths)).name) in found:
        paths.append(found.pop(name))
    if not paths or found:
        got = f"{len(paths)} up to a gap before {min(found)}" if found else "none"
        do = "Run tad-plugin experts with that folder as --out, or pass the folder that holds the files"
        raise FileFormatError(explain(f"files replay_buffer_0.pt, replay_buffer_1.pt, ... in {folder}", got, do))
    return paths


def clear_buffer(folder: str | Path) -> None:
    """Removes the files of a buffer, the description first: a half removed buffer must not look finished."""
    (Path(folder) / SIDE_FILE).unlink(missing_ok=True)
    for path in Path(folder).glob("replay_buffer_*.pt"):
        path.unlink(missing_ok=True)


def write_buffer(folder: str | Path, n: int, trajectories: Sequence[Trajectory], *, half: bool = False) -> Path:
    """Writes the n-th file of a buffer atomically: if writing fails, the old file stays.

    Args:
        folder: folder of the buffer; created if it does not exist.
        n: number of the file, from 0.
        trajectories: at least one, one per expert.
        half: store float16. :func:`read_buffer` gives float32 back; the public codebases expect float32 on disk.

    Raises:
        InvalidInputError: no trajectory was given.
        DiskSpaceError: the disk is full.
    """
    if not trajectories:
        raise InvalidInputError(explain("at least one trajectory", "none", "Train an expert first"))
    dtype = torch.float16 if half else torch.float32
    # Clones, because a view would be stored with the whole vector that it is part of.
    plain = [[[p.detach().to("cpu", dtype).clone() for p in entry] for entry in expert] for expert in trajectories]
    path = buffer_path(folder, n)
    with room_for(str(path)):
        return atomic_save(path, lambda temporary: save_sealed(plain, temporary))


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Context for writing ``what`` (in words): raises DiskSpaceError if the write fails."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        do = "Make room and run the same command again; it resumes"
        raise DiskSpaceError(explain(f"room for {what}", f"a write that failed ({error})", do)) from error


def read_buffer(path: str | Path) -> list[Trajectory]:
    """Reads one file of a buffer, ours or a foreign one: trajectories, float32 on the CPU.

    Our files have a seal, which is checked; of others the zip's own CRCs are.

    Raises:
        FileFormatError: the file is missing, damaged by as little as one bit, or not a list of experts over epochs of
            parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(explain("a file of a replay buffer", f"nothing at {path}", _AGAIN))
    try:
        check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise whatever the bytes provoke
        got = f"one that cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise FileFormatError(explain(f"a replay buffer in {path}", got, f"The file is damaged. {_AGAIN}")) from error
    expected = f"a list of experts, each a list over epochs of lists of parameters, in {path}"
    if not isinstance(found, list) or not found:
        raise FileFormatError(explain(expected, "an empty list" if found == [] else type(found).__name__, _AGAIN))
    shapes: list[torch.Size] | None = None
    for number, expert in enumerate(found):
        if not isinstance(expert, list) or not expert or not all(isinstance(entry, list) for entry in expert):
            raise FileFormatError(explain(expected, f"{type(expert).__name__} as expert {number}", _AGAIN))
        for epoch, entry in enumerate(expert):
            good = entry and all(isinstance(p, Tensor) and p.is_floating_point() for p in entry)
            mine = [p.shape for p in entry] if good else None
            shapes = shapes or mine
            if mine is None or mine != shapes:
                got = f"other contents in expert {number}, epoch {epoch}"
                raise FileFormatError(explain(expected, got, _AGAIN))
    return [[[p.detach().float() for p in entry] for entry in expert] for expert in found]


def check_buffer(
    given: BufferInfo | Trajectory,
    network: nn.Module,
    labels: Tensor | None = None,
    need_epochs: int | None = None,
    *,
    info: BufferInfo | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Checks that a buffer fits a run.

    Args:
        given: the description of the buffer, or one trajectory.
        network: the network of the run.
        labels: int64 [N], the observed labels of the run.
        need_epochs: epochs that every trajectory must have (max_start_epoch + expert_epochs).
        info: the description that goes with a trajectory; None for a foreign buffer.
        preprocessing: preprocessing of the run's images.

    Raises:
        StateMismatchError: the experts have another architecture, or were trained with other labels.
        PreprocessingMismatchError: the experts were trained with other normalisation or whitening.
        InvalidInputError: the trajectories have too few epochs.
    """
    if isinstance(given, BufferInfo):
        info, epochs, theirs = given, given.epochs, _shapes_of(given)
    else:
        epochs, theirs = len(given) - 1, [tuple(p.shape) for p in given[0]]
    _check_shapes(theirs, [tuple(p.shape) for p in network.parameters()], info)
    if labels is not None and info is not None and info.labels and label_digest(labels) != info.labels:
        expected = f"experts trained with the labels of this run (hash {label_digest(labels)[:16]})"
        got = f"experts trained with other labels (hash {info.labels[:16]})"
        do = "Use the data, noise and seed of the experts, or train experts for these labels"
        raise StateMismatchError(explain(expected, got, do))
    if preprocessing is not None and info is not None and info.preprocessing not in ("", preprocessing.fingerprint()):
        expected = f"experts trained with the preprocessing of this run ({preprocessing.fingerprint()})"
        do = "Use the same normalisation and --zca as for the experts, or train experts for these images"
        raise PreprocessingMismatchError(explain(expected, info.preprocessing, do))
    if need_epochs is not None and epochs < need_epochs:
        expected = f"trajectories of at least max_start_epoch + expert_epochs = {need_epochs} epochs"
        do = "Lower max_start_epoch or expert_epochs, or train the experts for more epochs"
        raise InvalidInputError(explain(expected, f"{epochs}", do))


def predicted_bytes(network: nn.Module, epochs: int, experts: int, half: bool = False) -> int:
    """Bytes on disk of a buffer: ``epochs`` + 1 copies of the parameters for each expert."""
    shapes = [p.numel() for p in network.parameters()]
    return experts * (epochs + 1) * (sum(shapes) * (2 if half else 4) + len(shapes) * _OVERHEAD)


def check_free_disk(folder: str | Path, needed: int) -> None:
    """Checks before the training that a buffer fits on the disk of ``folder``.

    Args:
        folder: folder of the buffer; it need not exist yet.
        needed: bytes, from :func:`predicted_bytes`.

    Raises:
        DiskSpaceError: fewer bytes are free.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        expected = f"{_megabytes(needed)} free in {folder} for the trajectories"
        do = "Make room, choose another --out, store --half, or train fewer experts or epochs"
        raise DiskSpaceError(explain(expected, _megabytes(free), do))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _check_shapes(theirs: list[tuple[int, ...]], own: list[tuple[int, ...]], info: BufferInfo | None) -> None:
    if theirs == own:
        return
    fewer = min(len(theirs), len(own))
    first = next((i for i in range(fewer) if theirs[i] != own[i]), fewer)
    expected, got = [
        f"{len(shapes)} parameters, number {first} of shape {list(shapes[first]) if first < len(shapes) else None}"
        for shapes in (own, theirs)
    ]
    if info is not None:
        got += f" ({info.architecture}, width {info.width}, depth {info.depth}, norm {info.norm})"
    do = f"Use the network settings of the experts, or train experts with these settings. {_AGAIN}"
    raise StateMismatchError(explain(f"experts with the network of this run: {expected}", got, do))


def _shapes_of(info: BufferInfo) -> list[tuple[int, ...]]:
    network = make_network(
        info.architecture,
        in_channels=info.in_channels,
        num_classes=info.num_classes,
        image_size=info.image_size,
        width=info.width,
        depth=info.depth,
        norm=info.norm,
        generator=torch.Generator(),
    )
    return [tuple(p.shape) for p in network.parameters()]
