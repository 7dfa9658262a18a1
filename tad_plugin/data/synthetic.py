"""The synthetic set: images, labels, and the preprocessing that its pixels went through, in one file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.errors import FileFormatError, InvalidInputError, explain
from tad_plugin.utils.tensor_file import TensorFile

__all__ = ["SyntheticSet"]

_FILE = TensorFile(
    "tad_plugin.synthetic",
    "a synthetic set",
    "Pass the synthetic.safetensors of a finished run",
    tensors=("images", "labels"),
)


@dataclass
class SyntheticSet:
    """A distilled set of M images.

    Attributes:
        images: float32 [M,C,H,W], in the space that ``preprocessing`` maps to.
        labels: int64 [M], or soft labels float32 [M,K] (logits of the teachers are not accepted: rows sum to 1).
        num_classes: K.
        preprocessing: how real images in [0,1] were mapped; test images must be mapped the same way.
        dataset: name of the real dataset.
        class_names: K names, or empty.
        learning_rate: the learned rate of trajectory matching, to be used when training on the set; else None.
        decode: how the images become training images: "" as they are, "partition:F" each is F x F images (IDM).

    Raises:
        InvalidInputError: images of another shape, or not one label for each, or soft labels of another width.
        InvalidLabelsError: hard labels out of range or of another type.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    preprocessing: Preprocessing
    dataset: str = ""
    class_names: tuple[str, ...] = ()
    learning_rate: float | None = None
    decode: str = ""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise InvalidInputError(
                explain(
                    "images [M,C,H,W] with one label each",
                    f"images {list(self.images.shape)} and labels {list(self.labels.shape)}",
                    "Pass as many labels as images",
                )
            )
        if self.labels.ndim == 1:
            check_labels(self.labels, self.num_classes)
        elif self.labels.ndim != 2 or self.labels.shape[1] != self.num_classes:
            raise InvalidInputError(
                explain(
                    f"soft labels [M,{self.num_classes}]",
                    f"{list(self.labels.shape)}",
                    "Pass one probability per class",
                )
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hard_labels(self) -> Tensor:
        """int64 [M]: the labels, or the likeliest class of soft ones."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def detached(self) -> SyntheticSet:
        """A copy whose tensors share nothing with this one's."""
        return replace(self, images=self.images.detach().clone(), labels=self.labels.detach().clone())

    def to(self, device: torch.device | str) -> SyntheticSet:
        """The set with its tensors on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (atomic) with everything that is needed to use or undo the images."""
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
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> SyntheticSet:
        """Reads what :meth:`save` wrote.

        Raises:
            FileFormatError: missing, truncated, or another format.
        """
        header, tensors = _FILE.read(path)
        prefix = "preprocessing/"
        stats = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            return cls(
                tensors["images"],
                tensors["labels"],
                int(header["num_classes"]),
                Preprocessing.from_header(header["preprocessing"], stats),
                header["dataset"],
                tuple(header["class_names"]),
                header["learning_rate"],
                header["decode"],
            ).to(device)
        except (KeyError, TypeError, InvalidInputError) as error:
            got = f"{path} with {type(error).__name__}: {error}"
            raise FileFormatError(explain("all fields of a synthetic set", got, _FILE.way_out)) from error
