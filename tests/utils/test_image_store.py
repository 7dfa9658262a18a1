"""Images that need not fit memory: indexed like a tensor, with the bits of a tensor."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.errors import FileFormatError, InvalidInputError
from tad_plugin.utils import image_store
from tad_plugin.utils.image_store import ImageStore, MappedPixels, image_rows, in_parts

GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
WHOLE = Preprocessing(MEAN, STD)(PIXELS.float().div(255))
ORDER = torch.randperm(37, generator=GENERATOR)


def stores(folder: Path) -> list[ImageStore]:
    """The same images from memory, from a tensor over a file, from a mapped file, and in another order."""
    path = folder / "pixels"
    path.write_bytes(b"head" + PIXELS.numpy().tobytes())
    mapped = np.memmap(path, np.uint8, "r", 4, tuple(PIXELS.shape))
    shuffled = PIXELS[ORDER]
    return [
        ImageStore(PIXELS, MEAN, STD),
        ImageStore(PIXELS.numpy(), MEAN, STD),
        ImageStore(mapped, MEAN, STD),
        ImageStore(mapped[:], MEAN, STD),
        ImageStore(shuffled, MEAN, STD, rows=ORDER.argsort()),
        ImageStore(PIXELS, MEAN, STD).select(ORDER).select(ORDER.argsort()),
    ]


@pytest.mark.parametrize("number", range(6))
def test_batches_have_the_bits_of_images_that_are_normalised_at_once(number: int, tmp_path: Path) -> None:
    store = stores(tmp_path)[number]
    assert store.shape == WHOLE.shape and store.dtype == WHOLE.dtype and store.ndim == 4 and len(store) == 37
    assert store.numel() == WHOLE.numel() and store.element_size() == 4 and store.is_floating_point()
    mask = torch.arange(37) % 3 == 0
    indices: list[Any] = [
        slice(3, 9),
        slice(None),
        slice(30, 99),
        slice(None, None, 5),
        mask,
        ORDER[:7],
        ORDER[:0],
        -1,
        4,
    ]
    for index in [*indices, torch.tensor([-1, 0, -37])]:
        assert torch.equal(store[index], WHOLE[index])
    assert torch.equal(torch.cat(list(store.split(10))), WHOLE) and torch.equal(torch.cat(list(in_parts(store))), WHOLE)
    assert torch.equal(torch.cat(list(store)), WHOLE.flatten(0, 1))
    assert torch.equal(store.select(mask)[1:], WHOLE[mask][1:])
    for wrong in (37, -38):
        with pytest.raises(IndexError):
            store[wrong]


def test_resized_images_have_the_bits_of_images_that_are_resized_at_once() -> None:
    large = F.interpolate(PIXELS.float().div(16), size=(13, 13), mode="bilinear", antialias=True)
    store = ImageStore(PIXELS, scale=16, size=(13, 13))
    assert store.shape == large.shape
    for rows in (slice(5, 9), ORDER, ORDER[:0]):
        assert torch.equal(store[rows], large[rows])


def test_a_selection_of_a_tensor_copies_nothing_and_keeps_its_type() -> None:
    images = WHOLE.double()
    found = image_rows(images, ORDER)
    assert found.source is images and found.dtype == torch.float64
    assert torch.equal(found[3:8], images[ORDER[3:8]]) and torch.equal(
        found.select(ORDER[:2])[:], images[ORDER][ORDER[:2]]
    )


def test_a_mapped_file_travels_by_its_name(tmp_path: Path) -> None:
    store = stores(tmp_path)[2]
    assert isinstance(store.source, MappedPixels)
    packed = pickle.dumps(store.source)
    assert len(packed) < 1000  # no pixel
    again = ImageStore(pickle.loads(packed), MEAN, STD)
    assert torch.equal(again[ORDER], WHOLE[ORDER])


def test_pages_are_given_back_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "_READ_BYTES", PIXELS[:5].numel())
    store = stores(tmp_path)[2]
    for _ in range(3):
        kept = [store[i : i + 4] for i in range(0, 37, 4)]
        assert torch.equal(torch.cat(kept), WHOLE)


def test_a_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pixels"
    path.write_bytes(bytes(100))
    for where in (path, tmp_path / "none"):
        with pytest.raises(FileFormatError, match=where.name):
            MappedPixels(where, (3, 3, 8, 8))


@pytest.mark.parametrize(
    ("pixels", "more"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), {}),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), {}),
        ([1, 2], {}),
        (PIXELS, {"mean": (0.5,)}),
        (PIXELS, {"std": (1.0, 0.0, 1.0)}),
        (PIXELS, {"mean": (0.0, float("nan"), 0.0)}),
        (PIXELS, {"scale": 0}),
    ],
)
def test_what_is_no_store_is_named(pixels: Any, more: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        ImageStore(pixels, **more)


def test_other_sources_are_read_by_position() -> None:
    class Squares:
        shape, dtype = torch.Size((50, 1, 2, 2)), torch.float32

        def __getitem__(self, rows: Any) -> Tensor:
            values = torch.arange(50.0)[rows].square()
            return values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    store = ImageStore(Squares()).select(torch.arange(10, 20))
    assert store[torch.tensor([0, 3])][:, 0, 0, 0].tolist() == [100, 169] and store[1:2].max() == 121
