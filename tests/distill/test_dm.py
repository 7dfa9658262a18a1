"""DM against a loop by hand, its bits with methods that change nothing, and its resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tad_plugin import attach
from tad_plugin.distill.dm import DMConfig, distribution_losses
from tad_plugin.errors import ConfigError, NonFiniteError
from tad_plugin.nn.networks import reinitialise
from tests.problems import blobs, distilled, dm_loop, flip


def test_the_loss_is_that_of_a_loop_over_classes_and_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    real = [torch.randn(n, 4, generator=generator) for n in (3, 5)]
    fake = [torch.randn(2, 4, generator=generator) for _ in range(2)]
    expected = []
    for r, s in zip(real, fake, strict=True):
        expected.append(0.0)
        for d in range(4):
            expected[-1] += (sum(float(x[d]) for x in r) / len(r) - sum(float(x[d]) for x in s) / len(s)) ** 2
    found = distribution_losses(torch.stack([r.mean(0) for r in real]), torch.stack(fake))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_two_steps_are_momentum_sgd_on_the_matching_loss_of_fresh_networks(global_rng_untouched: None) -> None:
    """Class by class, without augmentation: the draws, the network, the loss, the update."""
    images, labels = blobs()
    loop = dm_loop(images, labels, 3, None, augment="none", lr_img=0.7, momentum=0.5)
    generator = torch.Generator()
    generator.set_state(loop.generator.get_state())
    network, synthetic = copy.deepcopy(loop.network), loop.synthetic.images.detach().clone()
    start, velocity = synthetic.clone(), torch.zeros_like(synthetic)
    for iteration in range(2):
        logged = loop.step(iteration)["loss"]
        reinitialise(network, generator)
        synthetic.requires_grad_(True)
        loss = torch.zeros(())
        for c in range(3):
            pool = (labels == c).nonzero().flatten()
            batch = images[pool[torch.randperm(len(pool), generator=generator)[:8]]]
            real = network.embed(batch).mean(0).detach()  # type: ignore[operator]
            loss = loss + (real - network.embed(synthetic[2 * c : 2 * c + 2]).mean(0)).square().sum()  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(loss, synthetic)
        velocity = gradient + (0.5 * velocity if iteration else 0)
        synthetic = synthetic.detach() - 0.7 * velocity
        assert logged == pytest.approx(float(loss.detach()), rel=1e-4)
        torch.testing.assert_close(loop.result().images, synthetic, atol=1e-5, rtol=1e-4)
    assert float((synthetic - start).norm()) > 0.1


def test_real_and_synthetic_images_share_one_augmentation() -> None:
    """If the synthetic images equal the real ones, Siamese augmentation leaves nothing to match."""
    images, labels = blobs(2)
    loop = dm_loop(images, labels, 3, None, augment="color_crop_flip", batch_real=2)
    with torch.no_grad():
        loop.synthetic.images.copy_(torch.cat([images[labels == c] for c in range(3)]))
    assert float(loop.step(0)["loss"]) < 1e-8
    loop = dm_loop(images, labels, 3, None, augment="none", batch_real=2, init="noise")
    assert float(loop.step(0)["loss"]) > 1e-2


def test_the_matching_loss_falls() -> None:
    images, labels = blobs()
    loop = dm_loop(images, labels, 3, None, init="noise", augment="none", lr_img=5.0, width=8)
    losses = [loop.step(i)["loss"] for i in range(40)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_passes_of_any_size_give_the_same_update(norm: str) -> None:
    """With batch norm all real images share one pass, and all synthetic images another: the same bits."""
    images, labels = blobs()
    found = []
    for stream, classes in ((1, 1), (7, 2), (1000, 3)):
        loop = dm_loop(images, labels, 3, None, norm=norm)
        loop.stream, loop.classes = stream, classes
        found.append(distilled(loop, 2))
    tolerance = 0.0 if norm == "batch" else 1e-5
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=tolerance, rtol=tolerance)


def test_batch_norm_takes_the_statistics_of_all_real_images() -> None:
    """The loss by hand: one pass over the real batches of all classes, one over the synthetic images."""
    images, labels = blobs()
    loop = dm_loop(images, labels, 3, None, augment="none", norm="batch")
    loop.stream = loop.classes = 1
    generator = torch.Generator()
    generator.set_state(loop.generator.get_state())
    network, synthetic = copy.deepcopy(loop.network), loop.synthetic.images.detach().clone()
    logged = loop.step(0)["loss"]
    reinitialise(network, generator)
    pools = [(labels == c).nonzero().flatten() for c in range(3)]
    drawn = torch.cat([pool[torch.randperm(len(pool), generator=generator)[:8]] for pool in pools])
    real, own = (network.embed(x).unflatten(0, (3, -1)).mean(1) for x in (images[drawn], synthetic))  # type: ignore[operator]
    assert logged == pytest.approx(float((real - own).square().sum()), rel=1e-4)


def test_weights_enter_as_a_weighted_mean_of_real_embeddings() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    alone = attach("none", labels=true, data=images)
    # where every drawn sample is trusted, the oracle's loop is the baseline's on those samples alone
    kept = hook.state.trusted
    subset = dm_loop(images[kept], true[kept], 3, None)
    assert torch.equal(distilled(dm_loop(images, hook.state.observed, 3, hook), 4), distilled(subset, 4))
    assert not torch.equal(distilled(dm_loop(images, true, 3, alone), 4), distilled(subset, 4))


def test_a_loop_resumes_with_the_same_bits() -> None:
    images, labels = blobs()
    whole, half = (dm_loop(images, labels, 3, None) for _ in range(2))
    expected = distilled(whole, 6)
    distilled(half, 2)
    again = dm_loop(images, labels, 3, None, seed=8)
    again.load_state_dict(half.state_dict())
    assert torch.equal(distilled(again, 4, 2), expected)


def test_real_images_that_are_not_numbers_stop_the_loop() -> None:
    images, labels = blobs()
    loop = dm_loop(images, labels, 3, None, batch_real=20)
    loop.data.images[5] = float("nan")  # attach() refuses such images
    with pytest.raises(NonFiniteError, match="nan at iteration 0"):
        loop.step(0)


@pytest.mark.parametrize("given", [{"batch_real": 0}, {"momentum": 1.0}, {"lr_img": -1.0}])
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        DMConfig(**given)
