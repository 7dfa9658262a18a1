"""Stratified draws: samples shuffled inside each class, and divided evenly into parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["dealt_evenly", "shuffled_classes", "shuffled_groups"]


def shuffled_classes(labels: Tensor, num_classes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields for each class its indices, int64, in random order; one permutation is drawn per class.

    Args:
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        generator: CPU generator, so that every device gets the same draw.
    """
    for c in range(num_classes):
        members = (labels == c).nonzero().flatten()
        yield members[torch.randperm(len(members), generator=generator).to(labels.device)]


def shuffled_groups(groups: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """Indices int64 sorted by group, in random order inside each group; one permutation of N is drawn.

    Args:
        groups: int64 [N], any group numbers.
        generator: CPU generator.
        mask: bool [N], the samples that take part; None for all.
    """
    order = torch.randperm(len(groups), generator=generator).to(groups.device)
    if mask is not None:
        order = order[mask[order]]
    return order[groups[order].sort(stable=True).indices]


def dealt_evenly(labels: Tensor, num_classes: int, parts: int, generator: torch.Generator) -> Tensor:
    """The part of each sample, int64 [N] in [0, parts): each class is shuffled and divided evenly."""
    part = torch.empty_like(labels)
    for members in shuffled_classes(labels, num_classes, generator):
        part[members] = torch.arange(len(members), device=labels.device) % parts
    return part
