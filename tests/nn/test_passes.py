"""The size of a pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tad_plugin.nn.passes import (
    LARGE_PASS,
    batch_statistics,
    chunk_size,
    embed_in_passes,
    pass_size,
    with_fixed_statistics,
)


def test_passes_are_small_on_a_cpu_and_large_elsewhere() -> None:
    assert chunk_size(torch.device("cpu")) == 64
    assert chunk_size(torch.device("cuda")) == pass_size(torch.empty(1, 3, 32, 32, device="meta"), 128) == LARGE_PASS


@pytest.mark.parametrize(("side", "width", "size"), [(32, 128, 16), (32, 32, 64), (8, 4, 8192), (1024, 512, 1)])
def test_a_pass_with_a_backward_pass_fits_the_cache(side: int, width: int, size: int) -> None:
    assert pass_size(torch.empty(1, 3, side, side), width) == size


@pytest.mark.parametrize(("size", "passes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_embeddings_in_passes_are_those_of_one_pass(size: int, passes: list[int]) -> None:
    seen: list[int] = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1).sin()

    images = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = embed_in_passes(embed, images, size)
    assert seen == passes and torch.equal(found, images.flatten(1).sin())
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(gradient, images.detach().cos())


def test_only_a_batch_norm_without_running_statistics_needs_whole_batches() -> None:
    assert batch_statistics(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2)))
    assert not batch_statistics(nn.BatchNorm2d(2).eval()) and not batch_statistics(nn.GroupNorm(2, 2))
    assert batch_statistics(nn.BatchNorm2d(2, track_running_stats=False).eval())


def test_fixed_statistics_are_those_of_the_given_images() -> None:
    images = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    for tracked in (True, False):
        network = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=tracked), nn.Dropout())
        fixed = with_fixed_statistics(network, images)
        assert not batch_statistics(fixed) and batch_statistics(network) and fixed[1].training
        mean = images.transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(fixed[0].running_mean, mean)
        assert not tracked or torch.equal(network[0].running_mean, torch.zeros(2))
        assert with_fixed_statistics(fixed, images) is fixed
