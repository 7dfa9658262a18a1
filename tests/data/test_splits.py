"""Stratified draws against plain for-loops."""

from __future__ import annotations

import pytest
import torch

from tad_plugin.data.splits import class_members, dealt_evenly, rank_in_class, shuffled_classes, shuffled_groups

LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 0, 4, 1, 0, 2, 4])  # class 3 is empty
K = 5


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def members(c: int) -> list[int]:
    return [i for i, label in enumerate(LABELS.tolist()) if label == c]


@pytest.mark.parametrize("mask", [None, LABELS != 0, torch.arange(len(LABELS)) % 2 == 0])
@pytest.mark.parametrize("k", [K, 2**15 + 1])  # the second does not fit 16 bits
def test_class_members(mask: torch.Tensor | None, k: int) -> None:
    found = class_members(LABELS, k, mask)
    inside = [True] * len(LABELS) if mask is None else mask.tolist()
    for c in range(K):
        assert found[c].tolist() == [i for i in members(c) if inside[i]] and found[c].dtype == torch.int64
    assert len(found) == k and not any(len(own) for own in found[K:])


def test_rank_in_class() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 1.0, 3.0, -1.0, float("nan"), 0.0, 2.0, 0.5, 3.0, 0.0])
    rank = rank_in_class(values, LABELS, K)
    for c in range(K):
        ordered = sorted(members(c), key=lambda i: (values[i].isnan().item(), float(values[i].nan_to_num())))
        assert [int(rank[i]) for i in ordered] == list(range(len(ordered)))


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_classes(seed: int, global_rng_untouched: None) -> None:
    found = list(shuffled_classes(LABELS, K, gen(seed)))
    g = gen(seed)
    for c in range(K):
        own = members(c)
        order = torch.randperm(len(own), generator=g).tolist()
        assert found[c].tolist() == [own[i] for i in order] and found[c].dtype == torch.int64
    assert len(found) == K and len(found[3]) == 0


@pytest.mark.parametrize("mask", [None, LABELS != 0, torch.arange(len(LABELS)) % 2 == 0])
def test_shuffled_groups(mask: torch.Tensor | None, global_rng_untouched: None) -> None:
    found = shuffled_groups(LABELS, gen(), mask)
    order = torch.randperm(len(LABELS), generator=gen()).tolist()
    expected = []
    for group in sorted(set(LABELS.tolist())):
        for i in order:
            if LABELS[i] == group and (mask is None or bool(mask[i])):
                expected.append(i)
    assert found.tolist() == expected
    far = shuffled_groups(LABELS * 1000 - 7, gen(), mask)  # any group numbers
    assert torch.equal(far, found)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_dealt_evenly(parts: int, global_rng_untouched: None) -> None:
    found = dealt_evenly(LABELS, K, parts, gen())
    expected = [-1] * len(LABELS)
    g = gen()
    for c in range(K):
        own = members(c)
        for place, i in enumerate(torch.randperm(len(own), generator=g).tolist()):
            expected[own[i]] = place % parts
    assert found.tolist() == expected
    for c in range(K):
        sizes = [sum(1 for i in members(c) if expected[i] == part) for part in range(parts)]
        assert max(sizes) - min(sizes) <= 1
