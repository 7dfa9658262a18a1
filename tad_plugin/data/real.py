"""The real training data of a distillation loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.data.labels import check_labels, check_num_classes
from tad_plugin.data.origin import Origin
from tad_plugin.errors import InvalidInputError, explain
from tad_plugin.utils.arguments import holds_values, named_errors
from tad_plugin.utils.image_store import Images, ImageStore, image_rows
from tad_plugin.utils.whole_numbers import check_whole

__all__ = ["RealData"]


@dataclass
class RealData:
    """The real training data of a distillation loop, on one device.

    Attributes:
        images: float32 [N,C,H,W], normalised, finite; or an :class:`ImageStore`, which makes them a batch at a time.
        labels: int64 [N], observed labels.
        num_classes: K.
        true_labels: int64 [N] in controlled experiments, else None. Only oracles and diagnostics read them.
        dataset: name of the dataset, "" if unknown. It decides which augmentations keep the label.
        noise_rate: nominal share of wrong labels in controlled experiments, else None.
        ipc: images per class of the synthetic set, if known. A method may keep at least that many per class.
        origin: names of the samples, for files that name them; None where they are a dataset of their own.

    Raises:
        InvalidInputError: images that are no finite float tensor, or another value of a wrong kind or range.
        InvalidLabelsError: labels out of range, of another type, or not one per image.
    """

    images: Images
    labels: Tensor
    num_classes: int
    true_labels: Tensor | None = None
    dataset: str = ""
    noise_rate: float | None = None
    ipc: int | None = None
    origin: Origin | None = None

    @named_errors
    def __post_init__(self) -> None:
        images = self.images
        if not isinstance(images, Tensor | ImageStore) or images.ndim < 2 or not images.is_floating_point():
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            do = "Stack and normalise them, or pass an ImageStore of 8-bit pixels"
            raise InvalidInputError(explain("images as a float tensor [N,C,H,W]", got, do))
        if isinstance(images, Tensor):
            _check_finite(images)
        self.num_classes = check_num_classes(self.num_classes)
        if self.ipc is not None:
            self.ipc = check_whole("ipc", self.ipc, 1)
        rate = self.noise_rate
        if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            do = "Pass the share of wrong labels, or None if it is not known"
            raise InvalidInputError(explain("noise_rate in [0, 1]", repr(rate), do))
        if not isinstance(self.dataset, str):
            do = 'Pass its name, or "" if it is not known'
            raise InvalidInputError(explain("the name of the dataset", repr(self.dataset), do))
        self.labels = check_labels(self.labels, self.num_classes, len(self.images)).to(self.images.device)
        if self.true_labels is not None:
            self.true_labels = check_labels(self.true_labels, self.num_classes, len(self.images), "true_labels").to(
                self.images.device
            )

    def __len__(self) -> int:
        return len(self.images)

    @named_errors
    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (indices int64 [B], images [B,...]) over the data in order."""
        for start in range(0, len(self), size):
            images = self.images[start : start + size]
            yield torch.arange(start, start + len(images), device=images.device), images

    @named_errors
    def subset(self, indices: Tensor) -> RealData:
        """The same data restricted to ``indices`` (int64 [M] or bool [N]). Images [N,C,H,W] are not copied."""
        return RealData(
            image_rows(self.images, indices) if self.images.ndim == 4 else self.images[indices],
            self.labels[indices],
            self.num_classes,
            None if self.true_labels is None else self.true_labels[indices],
            self.dataset,
            self.noise_rate,
            self.ipc,
        )


def _check_finite(images: Tensor) -> None:
    if not images.numel() or not holds_values(images):
        return
    # aminmax passes a NaN on, and needs no tensor of flags as large as the images.
    if bool(torch.isfinite(torch.stack(images.detach().aminmax())).all()):
        return
    first = int((~torch.isfinite(images.detach().flatten(1)).all(1)).nonzero()[0])
    got, do = f"a NaN or infinite value in image {first}", "Leave out or repair this image"
    raise InvalidInputError(explain("finite images", got, do))
