"""Normalisation and whitening of images, as an object that is kept beside everything made with it.

Synthetic images that were learnt under one normalisation and tested under another give 10% accuracy and no message.
:meth:`Preprocessing.check_same` makes that an error. The definitions are [ours]; the statistics of known datasets are
those of the field's codebases.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tad_plugin.data.whitening import ZCA
from tad_plugin.errors import FileFormatError, InvalidInputError, PreprocessingMismatchError, explain
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import PixelSource

__all__ = ["KNOWN_STATISTICS", "Preprocessing", "channel_statistics"]

# (mean, std) per channel of images in [0, 1]. Digits: computed over the training part of the fixed split.
KNOWN_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3051,), (0.3762,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tinyimagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_PREFIX = "preprocessing/zca_"


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Per-channel normalisation, then ZCA whitening if given.

    Attributes:
        mean: C floats, subtracted from images in [0, 1].
        std: C floats > 0, divided by.
        zca: whitening of the normalised images, or None.

    Raises:
        InvalidInputError: lengths differ, or a value is not finite, or a std is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: ZCA | None = None

    @named_errors
    def __post_init__(self) -> None:
        """Normalises the types and checks the values."""
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        fits = len(self.mean) == len(self.std) > 0
        if not fits or not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            got = f"mean {self.mean}, std {self.std}"
            do = "Give one mean and one std per channel, and std 1 for a constant channel"
            raise InvalidInputError(explain("finite means and stds above 0, one per channel", got, do))

    @named_errors
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images. ``images``: float [N, C, H, W] in [0, 1]; the result has their dtype and device.

        Raises:
            InvalidInputError: another shape, number of channels, or integer images.
        """
        mean, std = self._statistics(images)
        images = (images - mean) / std
        return images if self.zca is None else self.zca.to(images.device)(images)

    @named_errors
    def inverse(self, images: Tensor) -> Tensor:
        """Images in [0, 1] from normalised ones. Not clamped, so synthetic images may lie outside.

        Args:
            images: float [N, C, H, W].

        Raises:
            InvalidInputError: another shape, number of channels, or integer images.
        """
        mean, std = self._statistics(images)
        if self.zca is not None:
            images = self.zca.to(images.device).inverse(images)
        return images * std + mean

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        c = len(self.mean)
        if images.ndim != 4 or images.shape[1] != c or not images.is_floating_point():
            do = "Add the batch dimension, and divide 8-bit images by 255 first"
            got = f"{images.dtype} {list(images.shape)}"
            raise InvalidInputError(explain(f"float images [N, {c}, H, W]", got, do))
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(1, c, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(1, c, 1, 1)
        return mean, std

    # -- identity and files ------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """The whitening's tensors on the CPU, by names for a safetensors file; empty without ZCA."""
        if self.zca is None:
            return {}
        return {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in self.zca.state_dict().items()}

    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over the statistics and the whitening. Equal means the same network input."""
        digest = hashlib.sha256(json.dumps([self.mean, self.std]).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def to_header(self) -> dict[str, Any]:
        """Plain values for a JSON header, without the tensors of :meth:`tensors`."""
        values = {"mean": list(self.mean), "std": list(self.std), "zca": self.zca is not None}
        return values | {"fingerprint": self.fingerprint()}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Preprocessing:
        """The inverse of :meth:`to_header` and :meth:`tensors`.

        Args:
            header: the values.
            tensors: at least those of :meth:`tensors`; others are ignored.

        Raises:
            FileFormatError: a value is missing, of another type, or does not fit the fingerprint.
        """
        do = "Use the file as it was written, or write it again"
        try:
            kinds = {"mean": list, "std": list, "zca": bool, "fingerprint": str}
            wrong = [f"{name} = {header[name]!r}" for name, kind in kinds.items() if type(header[name]) is not kind]
            wrong += [repr(v) for v in (*header["mean"], *header["std"]) if type(v) not in (int, float)]
            if wrong:
                raise TypeError(", ".join(wrong)[:200])
            zca = None
            if header["zca"]:
                own = {name.removeprefix(_PREFIX): t for name, t in (tensors or {}).items() if name.startswith(_PREFIX)}
                zca = ZCA.from_state_dict(own)
            made = cls(tuple(header["mean"]), tuple(header["std"]), zca)
            expected = header["fingerprint"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            got = f"{type(error).__name__}: {error}"
            raise FileFormatError(explain("a complete description of the preprocessing", got, do)) from error
        if made.fingerprint() != expected:
            got = f"values with {made.fingerprint()}"
            raise FileFormatError(explain(f"values with fingerprint {expected}", got, do))
        return made

    @named_errors
    def check_same(self, other: Preprocessing) -> None:
        """Checks that ``other`` gives the same network input.

        Raises:
            PreprocessingMismatchError: it does not. Both fingerprints and statistics are shown.
        """
        if self.fingerprint() == other.fingerprint():
            return
        do = (
            "Load the data with the preprocessing of the synthetic set (load_dataset(..., preprocessing=...)),"
            " or distil again"
        )
        raise PreprocessingMismatchError(explain(f"images prepared with {self}", str(other), do))

    def __str__(self) -> str:
        def row(values: tuple[float, ...]) -> str:
            return ", ".join(f"{v:.4f}" for v in values)

        zca = "ZCA" if self.zca is not None else "no ZCA"
        return f"fingerprint {self.fingerprint()} (mean {row(self.mean)}; std {row(self.std)}; {zca})"


def channel_statistics(
    images: Tensor | PixelSource, scale: float, count: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel of 8-bit images, in units of ``scale``.

    Exact: the sums are integers, so the result does not depend on the number of threads.

    Args:
        images: uint8 [N, C, H, W], N at least 1; read some at a time.
        scale: the value that stands for 1 (255 for ordinary images).
        count: only the first so many images; None takes all.
    """
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    total = images.shape[0] if count is None else count
    for start in range(0, total, 512):
        part = images[start : min(start + 512, total)]
        for c in range(channels):
            counts[c] += torch.bincount(part[:, c].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.int64)
    n = counts.sum(1).tolist()
    first = (counts * values).sum(1).tolist()
    second = (counts * values.square()).sum(1).tolist()
    mean = [a / m for a, m in zip(first, n, strict=True)]
    # Integer arithmetic until the division: no cancellation in the variance.
    std = [math.sqrt(b * m - a * a) / m for a, b, m in zip(first, second, n, strict=True)]
    return tuple(v / scale for v in mean), tuple(v / scale for v in std)
