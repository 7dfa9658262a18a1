"""Datasets as float tensors on a device, with a held-out part of the real training data.

The best iterate of a run is chosen on the held-out part, never on the test part. The normalisation is kept beside the
tensors (:class:`tad_plugin.data.preprocessing.Preprocessing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from tad_plugin.data.noise.spec import NoiseSpec, NoisyLabels
from tad_plugin.data.preparation import PublishedPixels, float_images, pixel_blocks, pixel_stores, stays_8_bit
from tad_plugin.data.preprocessing import KNOWN_STATISTICS, Preprocessing, channel_statistics
from tad_plugin.data.sources import RawSplits, read_source
from tad_plugin.data.splits import shuffled_classes
from tad_plugin.data.whitening import fit_zca
from tad_plugin.errors import ConfigError, InvalidInputError, NotEnoughSamplesError, explain, unknown_name
from tad_plugin.utils.arguments import named_errors
from tad_plugin.utils.image_store import Images, ImageStore
from tad_plugin.utils.seeds import seeded_generator

__all__ = ["STORAGES", "DataSplits", "load_dataset", "stratified_holdout"]

STORAGES = ("auto", "float32", "uint8")
"""How images are kept; see :func:`load_dataset`."""


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A dataset in three parts, on one device. Labels are the true ones; :meth:`apply_noise` gives observed ones.

    Attributes:
        name: the dataset's name; for a folder "folder:" and its last path component.
        num_classes: number of classes K.
        class_names: K names in label order.
        shape: (C, H, W) of an image.
        train_images: float32 [N, C, H, W], normalised; the part that is distilled. Data that are large stay 8-bit in an
            :class:`ImageStore`, which is indexed like a tensor; so do the other two parts then.
        train_labels: int64 [N].
        holdout_images: float32 [V, C, H, W], normalised; split from the real training data, V may be 0.
        holdout_labels: int64 [V].
        test_images: float32 [M, C, H, W], normalised; M is 0 for a folder without test/ and val/.
        test_labels: int64 [M].
        preprocessing: maps images in [0, 1] to these.
        source_index: int64 [N], position of each training sample in the published order.
        holdout_source_index: int64 [V].
        source_rank: int64 [N], number of each sample in its class, for image folders whose file names are such
            numbers; else None.
        holdout_source_rank: int64 [V], or None.
        pixel_scale: the published pixels are whole numbers from 0 to this (255; digits 16).
        source_paths: N file names below the dataset's top ("train/cat/7.png"), for image folders; else None.
        holdout_source_paths: V file names, or None.
        skipped: how many files were passed over, by suffix or reason, for image folders.
        constant_channels: channels with one value in all training pixels. Their std is taken as 1.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    train_images: Images
    train_labels: Tensor
    holdout_images: Images
    holdout_labels: Tensor
    test_images: Images
    test_labels: Tensor
    preprocessing: Preprocessing
    source_index: Tensor
    holdout_source_index: Tensor
    source_rank: Tensor | None = None
    holdout_source_rank: Tensor | None = None
    pixel_scale: float = 255.0
    source_paths: tuple[str, ...] | None = None
    holdout_source_paths: tuple[str, ...] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    constant_channels: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = f"train={len(self.train_labels)}, holdout={len(self.holdout_labels)}, test={len(self.test_labels)}"
        return f"DataSplits({self.name!r}, K={self.num_classes}, shape={self.shape}, {parts})"

    def summary(self) -> str:
        """One line: numbers of images and classes, the smallest class, and what was passed over."""
        labels = torch.cat([self.train_labels, self.holdout_labels])
        counts = torch.bincount(labels, minlength=self.num_classes)
        smallest = int(counts.argmin())
        text = (
            f"{self.name}: {len(labels)} training images ({len(self.holdout_labels)} held out),"
            f" {len(self.test_labels)} test images, {self.num_classes} classes,"
            f" smallest class {self.class_names[smallest]} with {int(counts[smallest])}"
        )
        if total := sum(self.skipped.values()):
            parts = ", ".join(f"{name} {n}" for name, n in sorted(self.skipped.items(), key=lambda item: -item[1]))
            text += f"; skipped {total} files ({parts})"
        if self.constant_channels:
            text += f"; the same value in all pixels of channel {', '.join(map(str, self.constant_channels))}"
        return text

    @property
    def tested(self) -> bool:
        """Whether there are test images."""
        return len(self.test_labels) > 0

    def apply_noise(self, spec: NoiseSpec) -> tuple[NoisyLabels, NoisyLabels | None]:
        """Noisy labels of the training part and of the held-out part (None where that is empty).

        The noise is drawn over the real training data as a whole, in the published order, so a sample's label does not
        depend on how much is held out, nor on which samples. Instance-dependent noise sees the published whole
        pixels, so it does not depend on normalisation, whitening or device (resized images are rounded to them).

        Raises:
            ConfigError, FileFormatError, StateMismatchError, UnknownNameError: see :meth:`NoiseSpec.apply`.
        """
        n = len(self.train_labels)
        index = torch.cat([self.source_index, self.holdout_source_index])
        order = index.argsort()
        true = torch.cat([self.train_labels, self.holdout_labels])
        rank = paths = None
        if self.source_rank is not None and self.holdout_source_rank is not None:
            rank = torch.cat([self.source_rank, self.holdout_source_rank])[order]
        if self.source_paths is not None and self.holdout_source_paths is not None:
            both = self.source_paths + self.holdout_source_paths
            paths = [both[i] for i in order.tolist()]
        images: Images | None = None
        if spec.kind == "instance":
            parts = (self.train_images, self.holdout_images)
            published = PublishedPixels(parts, self.preprocessing, self.pixel_scale, order.cpu())
            images = ImageStore(published) if isinstance(self.train_images, ImageStore) else published[:]
        whole = spec.apply(
            true[order],
            self.num_classes,
            images,
            dataset=self.name,
            class_names=self.class_names,
            source_index=index[order],
            source_rank=rank,
            source_paths=paths,
        )
        labels = torch.empty_like(true)
        labels[order] = whole.labels
        train = NoisyLabels.of(spec, labels[:n], self.train_labels, self.num_classes)
        if len(self.holdout_labels) == 0:
            return train, None
        return train, NoisyLabels.of(spec, labels[n:], self.holdout_labels, self.num_classes)


@named_errors
def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    per_class: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    zca: bool = False,
    image_size: int | None = None,
    download: bool = True,
    preprocessing: Preprocessing | None = None,
    storage: str = "auto",
) -> DataSplits:
    """Loads a dataset, with its images as tensors on a device or, where they are large, in a file.

    Images that take at most 2 GiB as float32 become tensors. Above that they stay 8-bit and are normalised per batch,
    with the same bits. Image folders and Tiny ImageNet are then decoded once, to a file that is mapped into memory: in
    the folder ``.NAME.pixels`` beside the dataset, or below ``root`` if that cannot be written. Every load checks its
    sha256, and a load that was killed goes on. Such a file can be removed at any time.

    Normalisation: the field's statistics for the named datasets, those of the training images for folders. A channel
    with the same value in every pixel gets std 1, so that it becomes 0. With ``zca``, whitening is fitted on the
    images in [0, 1] without normalisation, as MTT's code does [ours: on the real training images after ``per_class``,
    held-out ones included, so that it does not depend on ``seed``].

    Args:
        name: "digits" (8x8, 1,442 training and 355 test images), "cifar10", "cifar100", "svhn", "tinyimagenet", or
            "folder:PATH" for an image folder or a zip of one (``train/<class>/*``, and ``test/<class>/*`` or ``val/``,
            which may be missing).
            A relative PATH starts at the working directory.
        root: torchvision's root, or the folder of Tiny ImageNet; "data" by default. "~" is the home folder.
        per_class: take the first so many training samples of each class, before the split; None takes all.
        holdout: share of each class that is held out, in [0, 1); above 0 at least one sample per class.
        seed: of the split.
        device: where the tensors go.
        zca: fit whitening.
        image_size: height and width in pixels to bring the images to; None keeps theirs.
        download: whether torchvision may download what is missing.
        preprocessing: use this one and compute none (evaluation of a saved synthetic set).
        storage: "float32" (tensors), "uint8" (8-bit pixels), or "auto", which decides by size as above.

    Raises:
        UnknownNameError: no such dataset.
        MissingExtraError: digits without scikit-learn.
        FileFormatError: files are missing, corrupt, too large, or laid out in another way.
        EmptyClassError: a class without images, in training or test data.
        NotEnoughSamplesError: ``per_class`` is more than a class has, or nothing would be left beside the holdout.
        InvalidInputError: an argument out of range, images of several sizes, a preprocessing that does not fit.
        ConfigError: ``zca`` with a ``preprocessing`` that has none; whitening of images that stay 8-bit.
        FileWriteError, DiskSpaceError: the file of decoded images cannot be written.
    """
    _check_arguments(per_class, holdout, image_size, zca, preprocessing, storage)
    raw = read_source(name, root, per_class=per_class, image_size=image_size, download=download, storage=storage)
    device = torch.device(device)
    kept = raw.mapped is not None or stays_8_bit(raw, image_size, storage)
    if kept and (zca or (preprocessing is not None and preprocessing.zca is not None)):
        do = "Leave whitening out (--zca false), use smaller images, or pass --storage float32 if memory is enough"
        raise ConfigError(explain("images as floats in memory for ZCA whitening", f"{len(raw.train)} large ones", do))
    constant: tuple[int, ...] = ()
    if preprocessing is None:
        preprocessing, constant = _fit(raw, zca, image_size, device)
    train, held = stratified_holdout(raw.train_labels, len(raw.class_names), holdout, seed)
    images: tuple[Images, Images, Images]
    if kept:
        images = pixel_stores(raw, train, held, image_size, preprocessing, device)
    else:
        parts = (pixel_blocks(raw.train), pixel_blocks(raw.test))
        # The pixels are dropped as they become floats, so that memory holds little more than the floats.
        raw = replace(raw, train=raw.train.new_empty(0), test=raw.test.new_empty(0))
        given = (raw.scale, image_size, preprocessing, device)
        images = (*float_images(parts[0], (train, held), *given), *float_images(parts[1], (None,), *given))  # type: ignore[assignment]
    channels, height, width = images[2].shape[1:]
    return DataSplits(
        name=raw.name,
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        shape=(channels, height, width),
        train_images=images[0],
        train_labels=raw.train_labels[train].to(device),
        holdout_images=images[1],
        holdout_labels=raw.train_labels[held].to(device),
        test_images=images[2],
        test_labels=raw.test_labels.to(device),
        preprocessing=preprocessing,
        source_index=raw.index[train].to(device),
        holdout_source_index=raw.index[held].to(device),
        source_rank=None if raw.rank is None else raw.rank[train].to(device),
        holdout_source_rank=None if raw.rank is None else raw.rank[held].to(device),
        pixel_scale=raw.scale,
        source_paths=None if raw.paths is None else tuple(raw.paths[i] for i in train.tolist()),
        holdout_source_paths=None if raw.paths is None else tuple(raw.paths[i] for i in held.tolist()),
        skipped=raw.skipped,
        constant_channels=constant,
    )


def stratified_holdout(labels: Tensor, num_classes: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits samples class by class.

    Args:
        labels: int64 [N] in [0, K).
        num_classes: K.
        fraction: share of each class that is held out, in [0, 1), rounded half up; above 0 at least one sample.
        seed: of the CPU generator that chooses.

    Returns:
        (indices kept, indices held out), int64, each ascending.

    Raises:
        NotEnoughSamplesError: a class would keep no sample.
    """
    labels = labels.cpu()
    generator = seeded_generator(seed)
    out = torch.zeros(len(labels), dtype=torch.bool)
    if fraction > 0:
        for c, members in enumerate(shuffled_classes(labels, num_classes, generator)):
            count = max(1, int(fraction * len(members) + 0.5))
            if count >= len(members):
                got = f"{len(members)} in class {c}, of which {count} would be held out"
                do = "Lower holdout (0 holds nothing out) or raise per_class"
                raise NotEnoughSamplesError(explain("more samples in each class than are held out", got, do))
            out[members[:count]] = True
    return (~out).nonzero().flatten(), out.nonzero().flatten()


def _check_arguments(
    per_class: int | None,
    holdout: float,
    image_size: int | None,
    zca: bool,
    preprocessing: Preprocessing | None,
    storage: str,
) -> None:
    for name, value in (("per_class", per_class), ("image_size", image_size)):
        if value is not None and value < 1:
            raise InvalidInputError(explain(f"`{name}` of at least 1", str(value), "Leave it out for the default"))
    if not 0.0 <= holdout < 1.0:
        raise InvalidInputError(explain("`holdout` in [0, 1)", str(holdout), "Pass a share such as 0.1, or 0 for none"))
    if storage not in STORAGES:
        raise unknown_name("storage", storage, STORAGES)
    if zca and preprocessing is not None and preprocessing.zca is None:
        do = "Leave zca out, or pass a preprocessing with whitening"
        raise ConfigError(explain("a preprocessing with ZCA, because zca is on", str(preprocessing), do))


def _fit(
    raw: RawSplits, zca: bool, image_size: int | None, device: torch.device
) -> tuple[Preprocessing, tuple[int, ...]]:
    """The preprocessing, and the channels that are constant."""
    channels = raw.train.shape[1]
    if zca:
        plain = Preprocessing((0.0,) * channels, (1.0,) * channels)
        (images,) = float_images([raw.train], (None,), raw.scale, image_size, plain, device)
        return replace(plain, zca=fit_zca(images)), ()
    if raw.name in KNOWN_STATISTICS:
        return Preprocessing(*KNOWN_STATISTICS[raw.name]), ()
    # Of a mapped file the pages are given back as they are read.
    mean, std = channel_statistics(raw.train if raw.mapped is None else raw.mapped, raw.scale, len(raw.train))
    constant = tuple(c for c, s in enumerate(std) if s == 0)
    return Preprocessing(mean, tuple(s or 1.0 for s in std)), constant
