"""Samplers and index lists that follow the pools, and draws by weight."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tad_plugin import attach
from tad_plugin.core.hook.samplers import drawn_by_weight
from tad_plugin.errors import ConfigError, InvalidInputError
from tests.core.hook.indexed_cases import LABELS, Items, K, N, decide, made


def test_the_indices_of_a_class_are_those_of_today(global_rng_untouched: None) -> None:
    hook = made()
    lists = [hook.class_indices(c) for c in range(K)]
    for shift in (0, 3):
        decide(hook.state, shift)
        for c, found in enumerate(lists):
            pool = hook.pool(c).tolist()
            assert list(found) == pool and len(found) == len(pool) and found[0] == pool[0] and found[1:3] == pool[1:3]
            assert np.asarray(found).tolist() == pool and found[np.array([0, -1])] == [pool[0], pool[-1]]
            assert sorted(np.random.default_rng(0).permutation(found)) == pool
            assert set(random.Random(0).sample(found, 2)) <= set(pool) and torch.as_tensor(found).tolist() == pool
    with pytest.raises(InvalidInputError):
        hook.class_indices(K)


@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, False), (True, True), (False, False)])
def test_without_a_method_batches_are_those_of_a_plain_loader(shuffle: bool, drop_last: bool) -> None:
    hook, data = attach("none", labels=LABELS), TensorDataset(torch.arange(N))
    found = []
    for sampler in (hook.batch_sampler(8, shuffle=shuffle, drop_last=drop_last), None):
        how = {"batch_size": 8, "shuffle": shuffle, "drop_last": drop_last} if sampler is None else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            loader = DataLoader(data, batch_sampler=sampler, **how)
            found.append([[b[0].tolist() for b in loader] for _ in range(2)])
            assert len(loader) == len(found[-1][0])
    assert found[0] == found[1]


def test_batches_hold_todays_usable_samples_once_each() -> None:
    hook = made()
    sampler = hook.batch_sampler(8, generator=torch.Generator().manual_seed(0))
    for shift in (0, 3):
        decide(hook.state, shift)
        seen = list(chain.from_iterable(sampler))
        assert sorted(seen) == hook.state.usable().nonzero().flatten().tolist() and len(sampler) == -(-len(seen) // 8)
    for bad in (0, 1.5, "8"):
        with pytest.raises(InvalidInputError):
            hook.batch_sampler(bad)  # type: ignore[arg-type]


def test_class_batches_follow_a_change_in_the_middle_of_a_pass() -> None:
    hook = made()
    sampler = hook.class_sampler(3, batches=40, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(hook.dataset(Items()), batch_sampler=sampler)
    assert len(loader) == 40
    counts: Counter[int] = Counter()
    for number, (_, labels, idx) in enumerate(loader):
        if number == 20:
            decide(hook.state, shift=3)
            counts.clear()
            continue
        usable = hook.state.usable()
        assert labels.tolist() == [c for c in range(K) for _ in range(3)] and bool(usable[idx].all())
        if number < 20:
            counts.update(idx.tolist())
        if number == 19:  # each class is gone through evenly
            for c in range(K):
                per_sample = [counts[i] for i in hook.pool(c).tolist()]
                assert max(per_sample) - min(per_sample) <= 1
    alone = hook.class_sampler(2, classes=[1])
    assert len(alone) == -(-len(hook.pool(1)) // 2)
    assert set(chain.from_iterable(alone)) == set(hook.pool(1).tolist())
    for bad in ({"classes": [K]}, {"classes": [1, 1]}, {"classes": []}, {"batches": 0}):
        with pytest.raises(InvalidInputError):
            hook.class_sampler(2, **bad)


# draws by weight


def test_a_draw_by_weight_has_the_weighted_mean_as_expectation() -> None:
    pool, weight = torch.tensor([3, 5, 8]), torch.tensor([1.0, 0.0, 3.0])
    drawn = drawn_by_weight(pool, weight, 40_000, torch.Generator().manual_seed(0))
    shares = [float((drawn == i).float().mean()) for i in pool]
    assert shares == pytest.approx([0.25, 0.0, 0.75], abs=0.01)


def test_drawing_by_weight_takes_the_place_of_weighting() -> None:
    hook, generator = made(draw="weighted"), torch.Generator().manual_seed(0)
    pool = hook.pool(2)
    drawn = torch.cat([hook.sample(2, 50, generator) for _ in range(200)])
    w = hook.state.weight[pool]
    for i, share in zip(pool.tolist(), (w / w.sum()).tolist(), strict=True):
        assert float((drawn == i).float().mean()) == pytest.approx(share, abs=0.02)
    rows = torch.randn(50, 3)
    assert torch.equal(hook.reweight(rows, drawn[:50]), rows)
    idx = hook.sample(2, 50, generator)
    logits = torch.randn(50, K)
    plain = torch.nn.functional.cross_entropy(logits, hook.targets(idx))
    assert float(hook.loss(logits, hook.targets(idx), idx)) == pytest.approx(float(plain), rel=1e-6)
    counts = Counter(i for _ in range(300) for i in chain.from_iterable(hook.batch_sampler(8, generator=generator)))
    usable = hook.state.usable().nonzero().flatten()
    total = float(hook.state.weight[usable].sum())
    for i in usable.tolist():
        expected = float(hook.state.weight[i]) / total
        assert counts[i] / counts.total() == pytest.approx(expected, abs=0.006)
    of_class = Counter(chain.from_iterable(hook.class_sampler(50, classes=[2], batches=200, generator=generator)))
    assert of_class[int(pool[0])] / of_class.total() == pytest.approx(float(w[0] / w.sum()), abs=0.02)
    with pytest.raises(ConfigError):
        hook.batch_sampler(8, shuffle=False)


def test_equal_weights_draw_as_without_them() -> None:
    for draw in ("uniform", "weighted"):
        hook = attach("check", labels=LABELS, draw=draw)
        same = attach("none", labels=LABELS)
        one, two = (h.sample(1, 5, torch.Generator().manual_seed(3)) for h in (hook, same))
        assert torch.equal(one, two)
    with pytest.raises(InvalidInputError, match="weighted"):
        attach("none", labels=LABELS, draw="heavy")
