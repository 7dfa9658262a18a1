"""The size of a pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tad_plugin.core.scorer import score_all
from tad_plugin.data.real import RealData
from tad_plugin.errors import MemoryBudgetError, TadPluginWarning
from tad_plugin.evaluate import accuracy
from tad_plugin.nn.derivatives.mean_gradient import mean_gradient
from tad_plugin.nn.passes import (
    LARGE_PASS,
    batch_statistics,
    chunk_size,
    embed_in_passes,
    forward_size,
    graph_bytes,
    memory_budget,
    pass_size,
    set_memory_budget,
    with_fixed_statistics,
)


def test_passes_are_small_on_a_cpu_and_large_elsewhere() -> None:
    assert chunk_size(torch.device("cpu")) == 64
    with memory_budget(80 * 10**9):
        assert pass_size(torch.empty(1, 3, 32, 32, device="meta"), 128) == LARGE_PASS
    assert chunk_size(torch.device("cuda")) == LARGE_PASS


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


# bytes and lack of memory


@pytest.fixture(autouse=True)
def own_budget() -> Iterator[None]:
    """Each test begins and ends without a budget."""
    set_memory_budget(None)
    yield
    set_memory_budget(None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("side", "width"), [(32, 128), (224, 128), (224, 8)])
@pytest.mark.parametrize("budget", [2**30, 16 * 10**9, 80 * 10**9])
def test_passes_fit_half_of_the_budget(device: str, side: int, width: int, budget: int) -> None:
    images, network = torch.empty(1, 3, side, side, device=device), nn.Conv2d(3, width, 3)
    one_map = 4 * width * side * side
    with memory_budget(budget):
        forward, both = forward_size(images, network), pass_size(images, width)
        assert 3 * one_map * forward <= budget / 2 and graph_bytes(images, width) * both <= budget / 2
        # Not much smaller than what would fit, and never larger than without a limit.
        assert forward == chunk_size(images.device) or 3 * one_map * forward > budget / 8
        assert device == "cpu" or both == LARGE_PASS or graph_bytes(images, width) * both > budget / 8
    assert pass_size(torch.empty(1, 3, side, side), width) == max(1, 2**23 // one_map)


def test_sizes_of_shapes_that_fit_stay_what_they_were() -> None:
    network = nn.Conv2d(3, 128, 3)
    with memory_budget(2 * 10**9):
        assert forward_size(torch.empty(1, 3, 32, 32), network) == 64
    with memory_budget(80 * 10**9):
        assert forward_size(torch.empty(1, 3, 32, 32, device="meta"), network) == LARGE_PASS
        assert pass_size(torch.empty(1, 3, 32, 32, device="meta"), 128) == LARGE_PASS
    assert forward_size(torch.empty(5, 12), nn.Linear(12, 2)) == 64
    assert pass_size(torch.empty(1, 3, 4096, 4096), 4096) == 1


class Limited:
    """Fails for passes of more than ``most`` images, as an allocator does."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, [0]

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.error
        return images.flatten(1).sin()


ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError("no room"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_lack_of_memory_halves_the_pass_goes_on_and_is_said_once(error: Exception) -> None:
    images = torch.randn(37, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embed = Limited(5, error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = embed_in_passes(embed, images, 32)
        assert embed.sizes == [0, 32, 16, 8, *[4] * 9, 1]
        embed.sizes.clear()
        assert torch.equal(embed_in_passes(embed, images, 32), found)  # from now on at once
    assert embed.sizes == [*[4] * 9, 1]
    assert [type(w.message) for w in said] == [TadPluginWarning] and "32" in str(said[0].message)
    assert torch.equal(found, images.flatten(1).sin())
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(gradient, images.detach().cos())


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
def test_one_image_that_does_not_fit_and_other_errors_are_named() -> None:
    with pytest.raises(MemoryBudgetError, match="one image.*out of memory"):
        embed_in_passes(Limited(0, ERRORS[0]), torch.zeros(4, 1, 2, 2), 4)
    with pytest.raises(RuntimeError, match="shapes"):
        embed_in_passes(Limited(0, RuntimeError("shapes")), torch.zeros(4, 1, 2, 2), 4)


class Tight(nn.Module):
    """A network that runs out of memory above 3 images, also in its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 3:
            raise ERRORS[0]
        return self.layer(images.flatten(1))


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
def test_gradients_and_accuracies_survive_lack_of_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(50, 1, 2, 2, generator=generator), torch.arange(50) % 3
    network = Tight()
    loss = nn.functional.cross_entropy(network.layer(images.flatten(1)), labels)
    wanted = torch.autograd.grad(loss, list(network.parameters()))
    for found, expected in zip(mean_gradient(network, list(network.parameters()), images, labels), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    right = (network.layer(images.flatten(1)).argmax(1) == labels).float().mean()
    assert accuracy(network, images, labels) == pytest.approx(100 * float(right))
    scores = score_all(network, RealData(images, labels, 3))
    torch.testing.assert_close(scores.logits, network.layer(images.flatten(1)).detach())
