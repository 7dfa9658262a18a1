"""Datasets as images to score: their plain view, read in batches, leaving no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from tad_plugin.data.dataset_images import DatasetImages, plain_view
from tad_plugin.data.real import RealData
from tad_plugin.data.samples import hard_label, labels_of, part, with_index, with_label
from tad_plugin.errors import InvalidInputError
from tad_plugin.utils.image_store import ImageStore

IMAGES = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


class Noisy(Dataset):  # type: ignore[type-arg]
    """Augments with every global generator, through its ``transform``."""

    def __init__(self, transform: Any = None) -> None:
        self.targets = LABELS.tolist()
        self.transform = transform or (lambda x: x + torch.rand(1) + float(np.random.rand()))  # noqa: NPY002

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return self.transform(IMAGES[i]), self.targets[i]


def store(dataset: Any, **more: Any) -> ImageStore:
    return ImageStore(DatasetImages(dataset, prepare=lambda x: torch.as_tensor(x).float(), **more))


def test_an_image_is_the_same_in_every_pass_and_nothing_is_drawn(global_rng_untouched: None) -> None:
    images = store(Noisy(), seed=3)
    whole = images[:]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images[order], whole[order]) and torch.equal(images[3:5], whole[3:5])
    assert torch.equal(images[torch.arange(12) > 9], whole[10:]) and torch.equal(images[-1], whole[-1])
    assert not torch.equal(whole, IMAGES) and torch.equal(store(Noisy(), seed=3)[:], whole)
    assert images.shape == (12, 1, 4, 4) and images.ndim == 4 and len(images) == 12 and images.numel() == 192


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: Subset(d, range(12)),
        lambda d: ConcatDataset([Subset(d, range(5)), Subset(d, range(5, 12))]),
        lambda d: Subset(ConcatDataset([d, d]), range(12)),
    ],
)
def test_the_scoring_transform_takes_the_place_of_the_augmentation(wrap: Any) -> None:
    dataset = wrap(Noisy())
    assert torch.equal(store(dataset, transform=lambda x: 2 * x)[:], 2 * IMAGES)
    assert not torch.equal(dataset[0][0], IMAGES[0])  # the user's own still augments


def test_of_torchvisions_datasets_the_transform_is_replaced_too() -> None:
    train = FakeData(4, (3, 8, 8), 3, transform=v2.Compose([v2.PILToTensor(), v2.RandomErasing(1.0)]))
    plain = store(train, transform=v2.PILToTensor())
    assert torch.equal(plain[2], v2.functional.pil_to_tensor(FakeData(4, (3, 8, 8), 3)[2][0]).float())


def test_a_dataset_without_transform_is_transformed_afterwards() -> None:
    pairs = TensorDataset(IMAGES, LABELS)
    assert torch.equal(store(pairs, transform=lambda x: x[:, 1:3])[:], IMAGES[:, :, 1:3])
    with pytest.raises(InvalidInputError, match="only some"):
        plain_view(ConcatDataset([pairs, Noisy()]), lambda x: x)
    with pytest.raises(InvalidInputError, match="function"):
        store(pairs, transform=3)


def test_items_that_are_no_images_are_named() -> None:
    with pytest.raises(InvalidInputError, match="PIL|Image"):
        store(FakeData(4, (3, 8, 8), 3))
    bad: list[tuple[Tensor, int]] = [(IMAGES[0], 0), (IMAGES[0, :, :2], 0), (IMAGES[0] * float("nan"), 0)]
    for i in (1, 2):
        with pytest.raises(InvalidInputError, match=str(i)):
            store(bad)[i : i + 1]
    with pytest.raises(InvalidInputError, match="rows"):
        store(bad)[torch.zeros(1, 1)]
    with pytest.raises(InvalidInputError, match="picture"):
        store([{"picture": IMAGES[0]}])


def test_a_store_takes_the_place_of_a_tensor_in_the_real_data() -> None:
    real = RealData(store(Noisy(), transform=lambda x: x), LABELS, 3)
    for indices, images in real.batches(5):
        assert torch.equal(images, IMAGES[indices])
    assert torch.equal(real.subset(torch.tensor([2, 4])).images[:], IMAGES[[2, 4]])


# samples


def test_labels_are_found_without_reading_an_image() -> None:
    class Unread(Noisy):
        def __getitem__(self, i: int) -> Any:
            raise AssertionError("read")

    two = ConcatDataset([Unread(), Subset(Unread(), [4, 5])])
    assert labels_of(two).tolist() == [*LABELS.tolist(), 1, 2]  # type: ignore[union-attr]
    assert torch.equal(labels_of(TensorDataset(IMAGES, LABELS)), LABELS)  # type: ignore[arg-type]
    for unknown in ([1, 2], TensorDataset(IMAGES), TensorDataset(IMAGES, IMAGES), FakeData(4)):
        assert labels_of(unknown) is None


@pytest.mark.parametrize(
    "label", [2, np.int64(2), torch.tensor(2), np.array(2), torch.tensor([2]), torch.tensor([0, 0, 1.0]), np.eye(3)[2]]
)
def test_a_label_keeps_its_form(label: Any) -> None:
    sample = (IMAGES[0], label, "name")
    changed = with_label(sample, 1)
    assert changed[0] is sample[0] and changed[2] == "name" and type(changed[1]) is type(label)
    before, after = np.asarray(label), np.asarray(changed[1])
    assert after.tolist() == ([0, 1, 0] if before.size == 3 else np.full(before.shape, 1).tolist())
    assert hard_label(label) == (2 if before.size == 1 else None)
    assert with_index(changed, 7)[3] == 7 and sample[1] is label


def test_mappings_keep_what_they_hold() -> None:
    sample = {"pixel_values": IMAGES[0], "labels": 2, "text": "a"}
    assert part(sample, "image") is IMAGES[0] or torch.equal(part(sample, "image"), IMAGES[0])
    changed = with_index(with_label(sample, 0), 5)
    assert changed["labels"] == 0 and changed["index"] == 5 and sample["labels"] == 2 and "index" not in sample
    for bad in ({"text": "a"}, "ab", 3, (IMAGES[0],)):
        with pytest.raises(InvalidInputError):
            part(bad, "label")
