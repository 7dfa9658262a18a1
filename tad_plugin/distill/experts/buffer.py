"""Replay buffers: the trajectories of experts on disk, in the field's format and with what that format leaves out.

A buffer is a folder of ``replay_buffer_0.pt``, ``replay_buffer_1.pt``, ... as the public trajectory-matching codebases
write and read them: each a list of experts, each a list over epochs (0 is the start) of the parameters in the order of
``network.parameters()``. Beside them stands ``buffer.json``: which network, labels and settings they were trained with.
A folder without it is a foreign buffer: it can be read, and only the shapes of its parameters can be checked.
"""

from __future__ import annotations

import dataclasses
import json
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
from tad_plugin.utils.files import atomic_save, atomic_write, read_json

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
"""One expert: for each epoch, the start included, its parameters float32 on the CPU."""

VERSION = 1
SIDE_FILE = "buffer.json"
_AGAIN = "Train the experts again into an empty folder, or pass the right one"
# What torch.save adds to each tensor (record header, padding to 64 bytes, pickle), rounded up from measured files.
_OVERHEAD = 340


@dataclass
class BufferInfo:
    """What ``buffer.json`` says of a buffer.

    Attributes:
        architecture: network's name, as :func:`tad_plugin.nn.networks.make_network` knows it.
        width: its width.
        depth: its depth.
        norm: its normalisation.
        in_channels: image channels C.
        image_size: (height, width) in pixels.
        num_classes: K.
        dataset: name of the dataset.
        labels: :func:`tad_plugin.data.labels.label_digest` of the observed labels that the experts were trained with.
        preprocessing: :meth:`Preprocessing.fingerprint` of the images, "" if unknown.
        epochs: E; a trajectory has E + 1 entries.
        lr: learning rate of the experts.
        momentum: their momentum.
        weight_decay: their L2 penalty.
        sharpness_aware: trained with gradient surgery at perturbed parameters (FTD).
        experts: how many there are in all files.
        experts_per_file: how many a file holds; the last may hold fewer.
        half: stored in half precision, which only this package reads back.
        method: the method that decided on the samples, "none" without any.
        state_file: name of the SampleState beside the buffer, "" if there is none.
        versions: of python and torch.
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
        """Writes ``buffer.json`` (atomically replaced); returns its path."""
        text = json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1)
        return atomic_write(Path(folder) / SIDE_FILE, text + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> BufferInfo | None:
        """The side file of a buffer, or None for a foreign buffer, which has none.

        Raises:
            FileFormatError: it is not JSON, of another version, or lacks a field.
        """
        path = Path(folder) / SIDE_FILE
        if not path.exists():
            return None
        values = read_json(path)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            got = f"version {values.get('version')!r}" if isinstance(values, dict) else type(values).__name__
            raise FileFormatError(explain(f"version {VERSION} of a buffer's description in {path}", got, _AGAIN))
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if k in known}
        lost = sorted(known - set(given))
        if lost or not isinstance(given["image_size"], list):
            got = f"one without {', '.join(lost)}" if lost else f"image_size {given['image_size']!r}"
            raise FileFormatError(explain(f"a whole description of a buffer in {path}", got, _AGAIN))
        height, width = given["image_size"]
        return cls(**{**given, "image_size": (int(height), int(width))})


def buffer_path(folder: str | Path, n: int) -> Path:
    """Path of the n-th file of a buffer."""
    return Path(folder) / f"replay_buffer_{n}.pt"


def buffer_files(folder: str | Path) -> list[Path]:
    """The files of a buffer in the order of their numbers, from 0 on without a gap.

    Raises:
        FileFormatError: there is none, or one is missing before another.
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
    """Removes a buffer's files, the side file first: what is half removed is no finished buffer."""
    (Path(folder) / SIDE_FILE).unlink(missing_ok=True)
    for path in Path(folder).glob("replay_buffer_*.pt"):
        path.unlink(missing_ok=True)


def write_buffer(folder: str | Path, n: int, trajectories: Sequence[Trajectory], *, half: bool = False) -> Path:
    """Writes the n-th file of a buffer (atomically replaced: a write that fails leaves what was there).

    Args:
        folder: of the buffer; made if it does not exist.
        n: number of the file, from 0.
        trajectories: one per expert.
        half: store float16. :func:`read_buffer` gives float32 back; the public codebases expect float32 on disk.

    Raises:
        InvalidInputError: no trajectory.
        DiskSpaceError: the disk is full.
    """
    if not trajectories:
        raise InvalidInputError(explain("at least one trajectory", "none", "Train an expert first"))
    dtype = torch.float16 if half else torch.float32
    # A tensor's own storage, without its neighbours in a flat vector, and one that nobody writes to any more.
    plain = [[[p.detach().to("cpu", dtype).clone() for p in entry] for entry in expert] for expert in trajectories]
    path = buffer_path(folder, n)
    with room_for(str(path)):
        return atomic_save(path, lambda temporary: _save(plain, temporary))


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Around a write of ``what`` (in words): a failure is raised as DiskSpaceError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
        do = "Make room and run the same command again: it goes on from what is finished"
        raise DiskSpaceError(explain(f"room for {what}", f"a write that failed ({error})", do)) from error


def read_buffer(path: str | Path) -> list[Trajectory]:
    """The trajectories in one file of a buffer, float32 on the CPU, whoever wrote it.

    Raises:
        FileFormatError: missing, truncated, or not a list of experts over epochs of parameter tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(explain("a file of a replay buffer", f"nothing at {path}", _AGAIN))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and more for what it cannot read
        got = f"one that torch cannot load ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
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
    """Checks that a buffer fits what it shall be used for.

    Args:
        given: the side file, or one trajectory (of a foreign buffer, or to check the tensors themselves).
        network: the network that will be matched on.
        labels: int64 [N], the observed labels of this run; compared with those of the experts.
        need_epochs: epochs that every trajectory must reach (max_start_epoch + expert_epochs).
        info: side file that goes with a trajectory, for the messages; None for a foreign buffer.
        preprocessing: that of this run's images.

    Raises:
        StateMismatchError: experts of another architecture, or trained with other labels.
        PreprocessingMismatchError: other normalisation or whitening.
        InvalidInputError: too few epochs.
    """
    own = [tuple(p.shape) for p in network.parameters()]
    if isinstance(given, BufferInfo):
        info, epochs = given, given.epochs
        description = {name: getattr(given, name) for name in ("architecture", "width", "depth", "norm")}
        theirs = _shapes_of(given)
        says = ", ".join(f"{k} {v}" for k, v in description.items())
    else:
        epochs, theirs = len(given) - 1, [tuple(p.shape) for p in given[0]]
        says = "a trajectory" if info is None else f"{info.architecture} of width {info.width}, depth {info.depth}"
    if theirs != own:
        first = next(
            (i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(map(len, (theirs, own)))
        )
        shown = [str(list(s[first])) if first < len(s) else "none" for s in (own, theirs)]
        do = f"Pass the network's settings that the experts were trained with, or train experts with these. {_AGAIN}"
        expected = (
            f"experts of the network that is matched on ({len(own)} parameters, number {first} of shape {shown[0]})"
        )
        got = f"{says} ({len(theirs)} parameters, number {first} of shape {shown[1]})"
        raise StateMismatchError(explain(expected, got, do))
    if labels is not None and info is not None and info.labels and label_digest(labels) != info.labels:
        expected = f"experts trained with the labels of this run (hash {label_digest(labels)[:16]})"
        got = f"experts trained with others (hash {info.labels[:16]})"
        do = "Use the data, noise and seed of the experts, or train experts for these labels"
        raise StateMismatchError(explain(expected, got, do))
    if preprocessing is not None and info is not None and info.preprocessing not in ("", preprocessing.fingerprint()):
        expected = f"experts trained on images preprocessed as here ({preprocessing.fingerprint()})"
        do = "Use the same normalisation and --zca as for the experts, or train experts for these images"
        raise PreprocessingMismatchError(explain(expected, f"others ({info.preprocessing})", do))
    if need_epochs is not None and epochs < need_epochs:
        expected = f"trajectories of at least max_start_epoch + expert_epochs = {need_epochs} epochs"
        do = "Lower max_start_epoch or expert_epochs, or train the experts for more epochs"
        raise InvalidInputError(explain(expected, f"{epochs}", do))


def predicted_bytes(network: nn.Module, epochs: int, experts: int, half: bool = False) -> int:
    """Bytes that the files of a buffer take: E + 1 copies of the parameters for each expert."""
    shapes = [p.numel() for p in network.parameters()]
    return experts * (epochs + 1) * (sum(shapes) * (2 if half else 4) + len(shapes) * _OVERHEAD)


def check_free_disk(folder: str | Path, needed: int) -> None:
    """Checks before anything is trained that a buffer will fit on the disk of ``folder``.

    Args:
        folder: where it will be written; need not exist yet.
        needed: bytes, from :func:`predicted_bytes`.

    Raises:
        DiskSpaceError: less is free.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        expected = f"{_megabytes(needed)} free in {folder} for the experts' trajectories"
        do = "Make room, choose another --out, store --half, or train fewer experts or epochs"
        raise DiskSpaceError(explain(expected, _megabytes(free), do))


def _save(tree: object, path: Path) -> None:
    # Given a path, torch writes its name into the file, and the same trajectories would not be the same bytes.
    with open(path, "wb") as file:
        torch.save(tree, file)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _shapes_of(info: BufferInfo) -> list[tuple[int, ...]]:
    from tad_plugin.nn.networks import make_network

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
