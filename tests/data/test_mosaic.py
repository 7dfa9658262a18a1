"""Partition and expand against resizing each tile by itself, and the decoder of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tad_plugin.data.mosaic import check_factor, decode, expand, mosaic
from tad_plugin.data.synthetic import DECODERS, SyntheticSet
from tad_plugin.errors import ConfigError, InvalidInputError
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tests.problems import PLAIN, blobs


@pytest.mark.parametrize("factor, size", [(2, (8, 8)), (2, (6, 4)), (3, (9, 6))])
def test_each_tile_is_resized_by_itself(factor: int, size: tuple[int, int]) -> None:
    """Column by column: the tile below the first comes second."""
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    h, w = size[0] // factor, size[1] // factor
    found = expand(images, factor).unflatten(0, (-1, 5))
    for column in range(factor):
        for row in range(factor):
            tile = images[:, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
            alone = F.interpolate(tile, size=size, mode="bilinear", align_corners=False)
            assert torch.equal(found[column * factor + row], alone)


def test_a_mosaic_holds_the_shrunk_images_where_expand_finds_them() -> None:
    parts = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole = mosaic(parts, 2)
    torch.testing.assert_close(whole[:, :, 4:, :4], F.avg_pool2d(parts[1], 2))
    flat = [torch.full((4, 3, 8, 8), float(i)) for i in range(4)]
    assert torch.equal(expand(mosaic(flat, 2), 2), torch.cat(flat))
    assert mosaic(parts[:1], 1) is parts[0] and expand(whole, 1) is whole


def test_expansion_is_linear_and_differentiable() -> None:
    """What influence through it relies on."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(expand(2 * a - b, 2), 2 * expand(a, 2) - expand(b, 2))
    assert torch.autograd.gradcheck(lambda x: expand(x, 2), a.requires_grad_())


def test_decoding_repeats_hard_and_soft_labels() -> None:
    images, labels = torch.randn(2, 1, 4, 4), torch.tensor([3, 1])
    shown, repeated = decode(images, labels, 2)
    assert len(shown) == 8 and repeated.tolist() == [3, 1] * 4
    assert torch.equal(decode(images, torch.eye(2), 2)[1], torch.eye(2).repeat(4, 1))


def test_an_evaluation_trains_on_the_tiles_and_the_file_says_so(tmp_path: Path) -> None:
    images, labels = blobs(4)
    order = labels[:12].argsort()
    own = mosaic([images[:12][order]] * 4, 2)
    synthetic = SyntheticSet(own, labels[:12][order], 3, PLAIN, decode="partition:2")
    synthetic.save(tmp_path / "set.safetensors")
    read = SyntheticSet.load(tmp_path / "set.safetensors")
    shown, repeated = read.training_pairs()
    assert len(shown) == 48 and torch.equal(repeated[:12], repeated[12:24])
    settings = EvaluateConfig(width=4, runs=1, epochs=2, augment="none")

    def score(of: SyntheticSet) -> float:
        return evaluate(of, (images, labels), settings, generator=torch.Generator().manual_seed(0)).mean

    spelled_out = replace(synthetic, images=shown, labels=repeated, decode="")
    assert score(read) == score(spelled_out)
    assert replace(synthetic, decode="").training_pairs()[0] is synthetic.images
    assert set(DECODERS) == {"partition"}


@pytest.mark.parametrize("decode", ["tiles:2", "partition", "partition:x"])
def test_a_decoder_that_does_not_exist_is_named(decode: str) -> None:
    synthetic = SyntheticSet(torch.zeros(1, 1, 4, 4), torch.tensor([0]), 1, PLAIN, decode=decode)
    with pytest.raises(ConfigError, match="partition"):
        synthetic.training_pairs()


def test_images_that_cannot_be_cut_are_named() -> None:
    with pytest.raises(ConfigError, match=r"3.*8x8.*\[1, 2, 4, 8\]"):
        check_factor((8, 8), 3)
    with pytest.raises(ConfigError, match="0"):
        expand(torch.zeros(1, 1, 4, 4), 0)
    with pytest.raises(InvalidInputError, match="4.*3"):
        mosaic([torch.zeros(1, 1, 4, 4)] * 3, 2)
