"""MTT and DATM beside the public code: same experts, batches and augmentation give the same loss and gradients.

The checkouts are those that TAD_UPSTREAM_MTT and TAD_UPSTREAM_DATM name; their own main() reads a buffer of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin.data.real import RealData
from tad_plugin.distill.datm import correctly_predicted, initial_logits, upper_bound
from tad_plugin.distill.student import FORMS, Student, flat_parameters, matching_loss
from tad_plugin.nn.augment import DEFAULT_STRATEGY, Augmentation
from tad_plugin.nn.networks import make_network
from tests.distill.experts.problems import trained
from tests.distill.upstream_distill import CLASSES, SIDE, WIDTH, Record, run_upstream

pytestmark = pytest.mark.filterwarnings("ignore")  # the public code's own
SMALL: dict[str, Any] = {
    "syn_steps": 4, "expert_epochs": 1, "batch_syn": 4, "lr_img": 1.0, "lr_lr": 1e-4, "lr_teacher": 0.02,
}  # fmt: skip


def problem() -> tuple[Tensor, Tensor, list[Any]]:
    """Images with a pattern for each class, and two experts of two epochs on them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(8)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = patterns.repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)
    images = patterns[labels] + 0.5 * torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    return images, labels, trained(RealData(images, labels, CLASSES), width=WIDTH, epochs=2, batch_train=8)


def agree(record: Record, expert: Any, strategy: str) -> None:
    """Loss and every gradient of every update within 1e-5 of theirs, relative to the largest entry."""
    network = make_network(
        "convnet", in_channels=3, num_classes=CLASSES, image_size=SIDE, width=WIDTH, generator=torch.Generator()
    )
    student = Student(network, Augmentation(strategy or "none", align_corners=True), chunk=3)
    start, target = (flat_parameters(expert[e]) for e in (0, 1))
    assert len(record.updates) == 2
    for update in record.updates:
        for form in FORMS:
            leaves = {name: value.clone().requires_grad_() for name, value in update.values.items()}
            hard = torch.arange(CLASSES).repeat_interleave(2)
            loss = matching_loss(
                student, start, target, leaves["images"], leaves.get("logits", hard), leaves["rate"], update.steps,
                form=form,
            )  # fmt: skip
            assert float(loss.detach()) == pytest.approx(update.loss, rel=1e-5)
            found = torch.autograd.grad(loss, list(leaves.values()))
            for name, gradient in zip(leaves, found, strict=True):
                theirs = update.gradients[name]
                assert float((gradient - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()) > 0, name


@pytest.mark.parametrize("strategy", ["", *DEFAULT_STRATEGY.split("_"), DEFAULT_STRATEGY])
def test_mtt(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, experts = problem()
    record = run_upstream("mtt", tmp_path, images, labels, experts[:1], strategy, SMALL, monkeypatch)
    agree(record, experts[0], strategy)
    assert "logits" not in record.updates[0].gradients


@pytest.mark.parametrize("init", ["real", "samples_predicted_correctly"])
def test_datm(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, experts = problem()
    settings = {**SMALL, "pix_init": init}
    record = run_upstream("datm", tmp_path, images, labels, experts[:1], DEFAULT_STRATEGY, settings, monkeypatch)
    agree(record, experts[0], DEFAULT_STRATEGY)
    assert record.updates[0].gradients["logits"].shape == (2 * CLASSES, CLASSES)


def test_datm_starts_from_the_same_images_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, experts = problem()
    settings = {**SMALL, "pix_init": "samples_predicted_correctly"}
    record = run_upstream("datm", tmp_path, images, labels, experts, "", settings, monkeypatch)
    network = make_network(
        "convnet", in_channels=3, num_classes=CLASSES, image_size=SIDE, width=WIDTH, generator=torch.Generator()
    )

    def logits(expert: Any, x: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(flat_parameters(expert[-1]), network.parameters())
        return network(x).detach()

    chosen = [
        correctly_predicted(pool, [logits(e, images[pool]).argmax(1) for e in experts], c, 2)
        for c, pool in enumerate(record.pools)
    ]
    start = record.updates[0].values
    assert torch.equal(start["images"], images[torch.cat(chosen)])
    expected = initial_logits(
        torch.stack([logits(e, start["images"]) for e in experts]), torch.arange(CLASSES).repeat_interleave(2)
    )
    torch.testing.assert_close(start["logits"], expected, atol=1e-5, rtol=1e-5)


def test_datm_draws_segments_from_the_same_growing_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, _ = problem()
    experts = trained(RealData(images, labels, CLASSES), width=WIDTH, epochs=7, batch_train=24, count=1)
    settings = {
        **SMALL, "syn_steps": 1, "Sequential_Generation": True, "current_max_start_epoch": 2, "max_start_epoch": 6,
        "min_start_epoch": 1, "expansion_end_epoch": 5, "Iteration": 7,
    }  # fmt: skip
    record = run_upstream("datm", tmp_path, images, labels, experts, "", settings, monkeypatch)
    assert record.start_ranges == [(1, upper_bound(i, 2, 6, 5)) for i in range(8)]
