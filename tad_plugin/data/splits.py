"""The samples of each class: who they are, their ranks, and stratified draws. All by sorting, whatever K is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["class_members", "dealt_evenly", "rank_in_class", "shuffled_classes", "shuffled_groups", "sorted_in_class"]


def class_members(labels: Tensor, num_classes: int, mask: Tensor | None = None) -> list[Tensor]:
    """The indices of each class, ascending: K tensors int64 that share one storage.

    One stable sort finds them. A mask for each class would take N x K comparisons.

    Args:
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        mask: bool [N], the samples that take part; None for all.
    """
    # Samples that take no part form a last class of their own. Narrow integers sort several times faster.
    own = labels if mask is None else torch.where(mask, labels, num_classes)
    counts = torch.bincount(own, minlength=num_classes + 1).tolist()
    return list(_narrow(own, num_classes + 1).argsort(stable=True).split(counts))[:num_classes]


def sorted_in_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Indices int64 [N] by class, and by rising value [N] inside each class; ties by index. NaN comes last.

    Args:
        values: float [N].
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
    """
    order = torch.argsort(values, stable=True)
    return order[_narrow(labels[order], num_classes).argsort(stable=True)]


def rank_in_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Position int64 [N] of each sample in its class by rising value [N], ties by index. NaN comes last.

    Args:
        values: float [N].
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    order = sorted_in_class(values, labels, num_classes)
    start = (counts.cumsum(0) - counts)[labels[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start
    return rank


def _narrow(labels: Tensor, num_classes: int) -> Tensor:
    """Labels in the narrowest integers that hold them: they sort alike, and faster."""
    return labels.to(torch.int16 if num_classes <= 2**15 else torch.int32)


def shuffled_classes(labels: Tensor, num_classes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields for each class its indices, int64, in random order; one permutation is drawn per class.

    Args:
        labels: int64 [N] in [0, num_classes).
        num_classes: K.
        generator: CPU generator, so that every device gets the same draw.
    """
    for members in class_members(labels, num_classes):
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
