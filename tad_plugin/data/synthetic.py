"""The synthetic set: images, labels and their preprocessing, in one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tad_plugin.data import mosaic
from tad_plugin.data.labels import check_labels, check_num_classes
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.errors import ConfigError, FileFormatError, InvalidInputError, NonFiniteError, explain
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.tensor_file import TensorFile

__all__ = ["DECODERS", "SyntheticSet"]

DECODERS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {"partition": mosaic.decode}
"""Decoders by the name before ":" in ``SyntheticSet.decode``: (images, labels, factor) -> (images, labels)."""

_FILE = TensorFile(
    "tad_plugin.synthetic",
    "a synthetic set",
    "Pass the synthetic.safetensors of a finished run",
    tensors=("images", "labels"),
    fields=("num_classes", "dataset", "class_names", "learning_rate", "decode", "preprocessing"),
)
_TYPES = {"num_classes": int, "dataset": str, "class_names": list, "decode": str, "preprocessing": dict}


@dataclass
class SyntheticSet:
    """A distilled set of M images.

    Attributes:
        images: float32 [M,C,H,W], normalised by ``preprocessing``.
        labels: int64 [M], or soft labels float32 [M,K] whose rows sum to 1 (probabilities, not logits).
        num_classes: K.
        preprocessing: maps images in [0,1] to network input. Test images must be mapped the same way.
        dataset: name of the real dataset.
        class_names: K names, or empty.
        learning_rate: the learned rate of trajectory matching, for training on the set; else None.
        decode: how the images become training images: "" as they are, "partition:F" each is F x F images (IDM).

    Raises:
        InvalidInputError: images of another shape or type, not one label for each, soft labels of another width or
            type, not K class names, or a rate that is not finite.
        InvalidLabelsError: hard labels out of range or of another type.
        NonFiniteError: an image holds a NaN or an infinite value.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    preprocessing: Preprocessing
    dataset: str = ""
    class_names: tuple[str, ...] = ()
    learning_rate: float | None = None
    decode: str = ""

    @named_errors
    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not self.images.is_floating_point() or len(self.images) != len(self.labels):
            got = f"images {self.images.dtype} {list(self.images.shape)} and labels {list(self.labels.shape)}"
            raise InvalidInputError(
                explain("float images [M,C,H,W] with one label each", got, "Pass as many labels as images")
            )
        if not bool(torch.isfinite(self.images.detach()).all()):
            do = "Lower the learning rate of the run that made them"
            raise NonFiniteError(explain("finite synthetic images", "a NaN or infinite value", do))
        self.num_classes = check_num_classes(self.num_classes)
        if self.labels.ndim == 1:
            check_labels(self.labels, self.num_classes)
        elif self.labels.shape[1:] != (self.num_classes,) or not self.labels.is_floating_point():
            got = f"{self.labels.dtype} {list(self.labels.shape)}"
            raise InvalidInputError(
                explain(f"soft labels, float [M,{self.num_classes}]", got, "Pass one probability per class")
            )
        if not isinstance(self.preprocessing, Preprocessing):
            got, do = type(self.preprocessing).__name__, "Pass that of the real data"
            raise InvalidInputError(explain("`preprocessing` as a Preprocessing", got, do))
        if not _is_rate(self.learning_rate):
            do = "Pass the rate that was learned, or None"
            raise InvalidInputError(explain("a finite `learning_rate`", repr(self.learning_rate), do))
        if len(self.class_names) not in (0, self.num_classes):
            got = str(len(self.class_names))
            raise InvalidInputError(explain(f"{self.num_classes} class names", got, "Pass one per class, or none"))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hard_labels(self) -> Tensor:
        """int64 [M]: the labels, or the likeliest class of soft ones."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def training_pairs(self) -> tuple[Tensor, Tensor]:
        """The (images, labels) that a network is trained on, decoded if the set names a decoder.

        Returns:
            Images float32 [N,C,H,W], normalised, and labels as those of the set. N is M, or F^2 M for a mosaic.

        Raises:
            ConfigError: the set names an unknown decoder, or a factor that does not fit its images.
        """
        if not self.decode:
            return self.images, self.labels
        name, _, factor = self.decode.partition(":")
        if name not in DECODERS or not factor.isdecimal():
            known = f'a decoder out of {", ".join(DECODERS)} with a factor, e.g. "partition:2"'
            raise ConfigError(explain(known, repr(self.decode), "Use the version that wrote this set"))
        return DECODERS[name](self.images, self.labels, int(factor))

    def as_dataset(self, *, pixels: bool = False) -> TensorDataset:
        """The set as a PyTorch dataset of (image, label), for a DataLoader.

        Mosaics come as their training images. The tensors have no gradients and are copies.

        Args:
            pixels: images in [0, 1], with normalisation and whitening undone, and not clamped. By default they are
                network input, prepared as ``preprocessing`` does.

        Returns:
            A TensorDataset of images float32 [N,C,H,W], and labels int64 [N] or float32 [N,K].

        Raises:
            ConfigError: see :meth:`training_pairs`.
            InvalidInputError: the preprocessing does not fit the images.
        """
        images, labels = (part.detach().clone() for part in self.training_pairs())
        return TensorDataset(self.preprocessing.inverse(images) if pixels else images, labels)

    def detached(self) -> SyntheticSet:
        """A copy with tensors of its own, without gradients."""
        return replace(self, images=self.images.detach().clone(), labels=self.labels.detach().clone())

    @named_errors
    def to(self, device: torch.device | str) -> SyntheticSet:
        """The set with images and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @named_errors
    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (atomically replaced): images, labels, and all attributes."""
        header: dict[str, Any] = {
            "num_classes": self.num_classes,
            "dataset": self.dataset,
            "class_names": list(self.class_names),
            "learning_rate": self.learning_rate,
            "decode": self.decode,
            "preprocessing": self.preprocessing.to_header(),
        }
        tensors = {"images": self.images, "labels": self.labels}
        tensors |= {f"preprocessing/{k}": v for k, v in self.preprocessing.tensors().items()}
        _FILE.write(path, tensors, header)

    @classmethod
    @named_errors
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> SyntheticSet:
        """Reads a file of :meth:`save`.

        Raises:
            FileFormatError: missing, truncated, of another format, or with a value of another type.
        """
        header, tensors = _FILE.read(path)
        prefix = "preprocessing/"
        stats = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            _check_types(header)
            found = cls(
                tensors["images"],
                tensors["labels"],
                header["num_classes"],
                Preprocessing.from_header(header["preprocessing"], stats),
                header["dataset"],
                tuple(header["class_names"]),
                header["learning_rate"],
                header["decode"],
            )
            found.preprocessing.inverse(found.images[:1])  # raises for other channels or another size
        except (TypeError, RuntimeError, InvalidInputError) as error:
            got = f"{path} with {type(error).__name__}: {error}"
            raise FileFormatError(explain("the fields of a synthetic set", got, _FILE.way_out)) from error
        return found.to(device)


def _is_rate(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _check_types(header: Mapping[str, Any]) -> None:
    wrong = [f"{name} = {header[name]!r}" for name, kind in _TYPES.items() if type(header[name]) is not kind]
    wrong += (
        [f"class name {name!r}" for name in header["class_names"] if not isinstance(name, str)] if not wrong else []
    )
    if not _is_rate(header["learning_rate"]):
        wrong.append(f"learning_rate = {header['learning_rate']!r}")
    if wrong:
        raise TypeError(", ".join(wrong)[:200])
