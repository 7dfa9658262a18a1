"""What every write to a SampleState keeps: finite weights of mean 1, no empty pool, nothing shared with the caller."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.core.state import SampleState
from tad_plugin.errors import EmptyClassError, InvalidInputError, InvalidLabelsError
from tests.core.test_state import LABELS, full_state, same, state


def test_pools_of_imagenet_size_are_those_of_masks_and_take_no_time() -> None:
    n, k, generator = 1_300_000, 1000, torch.Generator().manual_seed(0)
    made = SampleState(torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)]), k)
    trusted = torch.rand(n, generator=generator) < 0.7
    trusted[:k] = True
    made.update(trusted=trusted, target=made.observed.flip(0).roll(k))  # every class keeps its first sample
    before, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        pools = made.pools()
    finally:
        torch.set_num_threads(before)
    assert time.process_time() - start < 0.5  # one mask for each class: 14 s
    assert sum(map(len, pools)) == int(trusted.sum())
    for c in (0, 1, 499, 999):
        assert torch.equal(pools[c], (made.usable() & (made.target == c)).nonzero().flatten())


def in_every_class(made: SampleState) -> None:
    """Checks that weights are finite with mean 1, and that no pool is empty."""
    assert bool(torch.isfinite(made.weight).all() and (made.weight >= 0).all())
    assert min(len(p) for p in made.pools()) > 0
    for c in range(made.num_classes):
        rows = (made.target == c) & made.trusted
        assert float(made.weight[rows].double().mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "factors",
    [
        [1e38],
        [1e-45],
        [1e30, 1e30],
        [1e-30, 1e-30, 1e-30],
        [1e38] * 12,
        [1e300, 1e300],
        [1e-320],
        [1.0, 1e-45, 3e38],
    ],
)
def test_factors_of_any_size_give_the_weights_of_exact_numbers(factors: list[float]) -> None:
    made, shape = state(), torch.tensor([1.0, 2, 1, 4, 2, 2, 3, 6, 8], dtype=torch.float64)
    for number, size in enumerate(factors):
        made.set_weights(str(number), size * (shape if number == 0 and size > 1e-40 else torch.ones_like(shape)))
    expected = shape if factors[0] > 1e-40 else torch.ones_like(shape)
    for c in range(3):
        rows = c == LABELS
        torch.testing.assert_close(
            made.weight[rows].double(), expected[rows] / expected[rows].mean(), rtol=1e-6, atol=0
        )
    in_every_class(made)
    other = state()
    other.load_state_dict(made.state_dict())
    assert same(made, other)


def test_a_weight_that_vanishes_beside_others_stays_above_zero() -> None:
    made = state()
    made.set_weights("m", torch.where(torch.arange(9) == 0, 1e-45, 1e38))
    made.set_weights("n", torch.where(torch.arange(9) == 0, 1e-45, 1e38))
    assert made.pool(0).tolist() == [0, 3, 6, 8] and float(made.weight[0]) < 1e-30
    made.update(trusted=torch.arange(9) != 3)
    made.set_weights("m", torch.where(torch.arange(9) == 3, 3e38, 1e-45))  # only the untrusted one is large
    made.set_weights("n", torch.ones(9))
    in_every_class(made)


def test_ordinary_factors_keep_the_bits_of_one_float32_pass() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(4, (500,), generator=generator)
    made = SampleState(labels, 4)
    trusted = torch.rand(500, generator=generator) < 0.8
    made.update(trusted=trusted)
    a, b = (torch.rand(500, generator=generator) * s for s in (1, 300))
    made.set_weights("a", a)
    made.set_weights("b", b)
    product = a * b
    total = torch.zeros(4).index_add_(0, labels[trusted], product[trusted])
    count = torch.zeros(4).index_add_(0, labels[trusted], torch.ones(int(trusted.sum())))
    assert torch.equal(made.weight, product * (count / total)[labels])


def test_large_classes_have_mean_one_as_well() -> None:
    labels = torch.arange(2_000_000) % 2
    made = SampleState(labels, 2)
    made.set_weights("m", torch.rand(len(labels), generator=torch.Generator().manual_seed(0)))
    in_every_class(made)


def test_every_write_of_labels_or_trust_scales_the_weights_anew() -> None:
    made = state()
    made.set_weights("m", torch.arange(1.0, 10.0))
    for change in ({"target": LABELS.flip(0)}, {"trusted": torch.arange(9) % 4 > 0}, {"trust": torch.zeros(9)}):
        made.update(**change)  # type: ignore[arg-type]
        in_every_class(made)


def test_a_write_that_empties_a_class_is_refused_and_changes_nothing() -> None:
    made = full_state()
    before = made.state_dict()
    trust = torch.full((9,), 0.5)
    for trusted in (torch.zeros(9), made.target != 1):
        with pytest.raises(EmptyClassError, match="1"):
            made.update(trusted=trusted, trust=trust)
    with pytest.raises(EmptyClassError, match=r"2\."):
        made.update(target=LABELS.clamp(max=1), trust=trust)
    other = state()
    other.load_state_dict(before)
    assert same(made, other)
    folds = SampleState(LABELS, 4, allow_empty=True)
    folds.update(trusted=LABELS != 1)
    assert [len(p) for p in folds.pools()] == [4, 0, 2, 0]


@pytest.mark.parametrize("bad", [float("nan"), 0.5, 2.0, -1.0])
def test_trusted_is_true_or_false(bad: float) -> None:
    trusted = torch.ones(9)
    trusted[2] = bad
    with pytest.raises(InvalidInputError, match="position 2"):
        state().update(trusted=trusted)
    made = state()
    made.update(trusted=torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1]))
    assert made.summary()["untrusted"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.full((9,), -1.0)},
        {"weight": torch.full((9,), float("inf"))},
        {"weight": torch.full((9,), 0.5)},
        {"weight": torch.ones(1)},
        {"weight": torch.tensor(1.0)},
        {"trust": torch.full((9,), float("nan"))},
        {"trust": torch.full((9,), 1.5)},
        {"target": torch.full((9,), 99)},
        {"target": torch.zeros(9)},
        {"target": torch.zeros(9, dtype=torch.int64)},
        {"trusted": torch.zeros(9, dtype=torch.bool)},
        {"trusted": torch.full((9,), float("nan"))},
        {"factors": {"tad": torch.full((9,), -1.0)}},
        {"extra": {"influence": torch.zeros(3)}},
        {"weight": "many"},
    ],
)
def test_a_state_that_breaks_a_promise_is_refused_whole(change: dict[str, Any]) -> None:
    made = full_state()
    before = made.state_dict()
    with pytest.raises(InvalidInputError):
        made.load_state_dict({**before, "trust": torch.zeros(9), **change})
    for lost in before:
        with pytest.raises(InvalidInputError, match=lost):
            made.load_state_dict({k: v for k, v in before.items() if k != lost})
    other = state()
    other.load_state_dict(before)
    assert same(made, other)


# shared storage, indices and labels


def test_writing_into_what_was_returned_changes_nothing() -> None:
    made, generator = full_state(), torch.Generator()
    everything = torch.arange(9)

    def results() -> list[Any]:
        drawn = [made.sample(c, 9, generator.manual_seed(1)) for c in range(3)]
        values = [made.weights(everything), made.training_weights(), made.targets(everything)]
        return [*made.pools(), *drawn, *values, made.pool(1)]

    first = [x.clone() for x in results()]
    for tensor in results():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


BAD_INDICES = [
    [], [0.0], torch.tensor([0.5]), [-1], [9], torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64), "ab", None,
    torch.ones(9, dtype=torch.uint8), torch.ones(4, dtype=torch.bool), torch.zeros(9, dtype=torch.bool), [2**70],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_INDICES)))
def test_bad_indices_are_named(number: int) -> None:
    made = state()
    for handle in (made.weights, made.targets, *([made.training_weights] if BAD_INDICES[number] is not None else [])):
        with pytest.raises(InvalidInputError):
            handle(BAD_INDICES[number])  # type: ignore[operator]


def test_indices_may_be_a_list_an_array_or_a_mask() -> None:
    made, mask = full_state(), torch.arange(9) < 4
    for given in ([0, 1, 2, 3], np.arange(4), np.arange(4, dtype=np.int8), range(4), mask, mask.tolist()):
        assert torch.equal(made.weights(given), made.weights(torch.arange(4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [["cat", "dog"], [None, 1], [[0], [1, 2]], [True, False], [0.0, 1.0], 3, 2**70])
def test_labels_that_are_no_integers_are_named(labels: Any) -> None:
    with pytest.raises(InvalidLabelsError):
        SampleState(labels, 2)


@pytest.mark.parametrize("k", [2**31, "3", 3.0, True, None, -1, 2**70, float("nan")])
def test_numbers_of_classes_that_are_none_are_named(k: Any) -> None:
    with pytest.raises(InvalidInputError):
        SampleState(LABELS, k)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5])
def test_devices_that_do_not_exist_are_named(device: Any) -> None:
    with pytest.raises(InvalidInputError):
        SampleState(LABELS, 3, device=device)


def test_labels_of_every_width_are_taken() -> None:
    for dtype in (np.uint16, np.uint32, np.uint64, np.int8):
        assert torch.equal(SampleState(LABELS.numpy().astype(dtype), 3).observed, LABELS)  # type: ignore[arg-type]
