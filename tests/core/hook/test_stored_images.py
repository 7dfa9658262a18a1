"""Images that attach() does not copy: stores, mapped arrays, and datasets that are too large to be read at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tad_plugin import Hook, attach
from tad_plugin.core.hook import images as given
from tad_plugin.data import ImageStore, Preprocessing
from tad_plugin.errors import InvalidInputError, TadPluginWarning
from tests.problems import blobs, flip

FLOATS, TRUE = blobs(spread=0.8)
LABELS = flip(TRUE, 3, 0.3)
PIXELS = (40 * FLOATS + 128).clamp(0, 255).byte()
MEAN, STD = (0.5,), (0.16,)
IMAGES = Preprocessing(MEAN, STD)(PIXELS.float().div(255))
SMALL = {"scorer": {"epochs": 3, "width": 4, "batch_size": 32}, "tad": {"warmup": 1}}
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.UnimodalClassWarning")


def made(method: str, data: Any) -> Hook:
    config = {name: values for name, values in SMALL.items() if method != "none"}
    return attach(method, labels=LABELS, data=data, num_classes=3, config=config)


def mapped(folder: Path, pixels: torch.Tensor) -> np.memmap:
    (folder / "pixels").write_bytes(pixels.numpy().tobytes())
    return np.memmap(folder / "pixels", pixels.numpy().dtype, "r", 0, tuple(pixels.shape))


def test_tad_divides_a_store_as_it_divides_a_tensor(tmp_path: Path, global_rng_untouched: None) -> None:
    expected = made("tad", IMAGES).state
    for pixels in (PIXELS, mapped(tmp_path, PIXELS)):
        store = ImageStore(pixels, MEAN, STD)
        hook = made("tad", store)
        assert hook.data is not None and hook.data.images is store
        for name, values in expected.state_dict().items():
            if isinstance(values, torch.Tensor):
                assert torch.equal(hook.state.state_dict()[name], values), name
    none = made("none", store)
    assert none.data is not None and none.data.images is store


@pytest.mark.parametrize("axes", [4, 3])
def test_a_mapped_array_stays_in_its_file(tmp_path: Path, axes: int) -> None:
    pixels = PIXELS if axes == 4 else PIXELS[:, 0]
    with pytest.warns(TadPluginWarning, match="ImageStore"):  # values as they are: not normalised
        hook = made("none", mapped(tmp_path, pixels))
    assert hook.data is not None and isinstance(hook.data.images, ImageStore)
    assert torch.equal(hook.data.images[:], PIXELS.float())
    hook = made("none", mapped(tmp_path, IMAGES))
    assert hook.data is not None and isinstance(hook.data.images, ImageStore)
    assert torch.equal(hook.data.images[:], IMAGES)


def test_eight_bit_tensors_are_floats_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "FLOAT_BYTES", 4 * PIXELS.numel())
    for kind, limit in ((torch.Tensor, 4 * PIXELS.numel()), (ImageStore, 4 * PIXELS.numel() - 1)):
        monkeypatch.setattr(given, "FLOAT_BYTES", limit)
        with pytest.warns(TadPluginWarning):
            hook = made("none", PIXELS)
        assert hook.data is not None and isinstance(hook.data.images, kind)
        assert torch.equal(hook.data.images[:], PIXELS.float())


class Pairs(Dataset):  # type: ignore[type-arg]
    """Counts what is read, and draws from the global generator."""

    def __init__(self, images: list[Any]) -> None:
        self.images, self.read = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        torch.rand(1)
        return self.images[i], 0


def test_a_large_dataset_is_read_when_it_is_needed(global_rng_untouched: None) -> None:
    data = Pairs(list(IMAGES))
    store = given.as_images(data, 60, keep_bytes=1000)
    assert isinstance(store, ImageStore) and data.read == 60  # looked at: at most 64
    assert torch.equal(store[torch.tensor([4, 2])], IMAGES[[4, 2]]) and data.read == 62
    hook = made("tad", store)
    assert hook.data is not None and hook.data.images is store
    assert torch.equal(hook.state.weight, made("tad", IMAGES).state.weight)
    small = given.as_images(Pairs(list(IMAGES)), 60)
    assert isinstance(small, torch.Tensor) and torch.equal(small, IMAGES)


@pytest.mark.parametrize("bad", [torch.zeros(1, 8, 9), torch.full((1, 8, 8), torch.nan), torch.zeros(2, 8, 8)])
def test_items_that_do_not_fit_are_named_when_they_are_read(bad: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "_FEW", 5)
    store = given.as_images(Pairs([*IMAGES[:7], bad, *IMAGES[8:]]), 60, keep_bytes=1000)
    assert store is not None
    with pytest.raises(InvalidInputError, match="7"):
        made("tad", store)


def test_a_store_of_another_length_is_named() -> None:
    with pytest.raises(InvalidInputError):
        made("none", ImageStore(PIXELS[:59], MEAN, STD))
