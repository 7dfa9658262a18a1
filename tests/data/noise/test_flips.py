"""The random flips against loops, closed forms and expectations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tad_plugin.data.noise import flips
from tad_plugin.errors import InvalidInputError

K = 5


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(successes: int, trials: int, p: float) -> bool:
    """Whether a binomial count is plausible (two-sided p-value above 1e-4)."""
    return stats.binomtest(successes, trials, p).pvalue > 1e-4


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, K, (20_000,), generator=gen(9))


@pytest.mark.parametrize(("include_self", "wrong"), [(False, 0.4), (True, 0.4 * (K - 1) / K)])
def test_symmetric_rate_and_spread(labels: torch.Tensor, include_self: bool, wrong: float) -> None:
    noisy = flips.symmetric(labels, 0.4, K, include_self=include_self, generator=gen())
    changed = noisy != labels
    assert within(int(changed.sum()), len(labels), wrong)
    shift = (noisy - labels)[changed] % K
    assert stats.chisquare(torch.bincount(shift, minlength=K)[1:].numpy()).pvalue > 1e-4


def test_symmetric_extremes(labels: torch.Tensor) -> None:
    assert torch.equal(flips.symmetric(labels, 0.0, K, include_self=False, generator=gen()), labels)
    assert bool((flips.symmetric(labels, 1.0, K, include_self=False, generator=gen()) != labels).all())


def test_a_lower_rate_flips_a_subset(labels: torch.Tensor) -> None:
    low, high = (flips.symmetric(labels, r, K, include_self=False, generator=gen()) for r in (0.2, 0.5))
    changed = low != labels
    assert torch.equal(low[changed], high[changed])


def test_by_map_touches_only_its_classes(labels: torch.Tensor) -> None:
    noisy = flips.by_map(labels, 0.4, {1: 3, 3: 1}, generator=gen())
    for c, target in {0: 0, 1: 3, 2: 2, 3: 1, 4: 4}.items():
        seen = noisy[labels == c]
        assert set(seen.tolist()) <= {c, target}
        if target != c:
            assert within(int((seen == target).sum()), len(seen), 0.4)


def test_by_matrix_matches_a_loop_and_its_rows(labels: torch.Tensor) -> None:
    matrix = torch.rand(K, K, generator=gen(3), dtype=torch.float64)
    matrix[:, 2] = 0.0
    matrix[:, 4] = 0.0  # the last class is unreachable, whatever the rounding of the sums
    matrix /= matrix.sum(1, keepdim=True)
    noisy = flips.by_matrix(labels, matrix, generator=gen())
    u = torch.rand(len(labels), generator=gen(), dtype=torch.float64).numpy()
    edges = np.cumsum(matrix.numpy(), axis=1)
    loop = [int(np.searchsorted(edges[y], v, side="right")) for y, v in zip(labels.tolist(), u, strict=True)]
    assert noisy.tolist() == loop
    for c in range(K):
        counts = torch.bincount(noisy[labels == c], minlength=K).numpy()
        assert counts[2] == 0 and counts[4] == 0
        expected = matrix[c].numpy() * counts.sum()
        keep = expected > 0
        assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-4


def test_by_matrix_identity_and_short_sums(labels: torch.Tensor) -> None:
    assert torch.equal(flips.by_matrix(labels, torch.eye(K, dtype=torch.float64), generator=gen()), labels)
    short = torch.full((K, K), 0.0, dtype=torch.float64)
    short[:, 1] = 1 - 1e-7
    assert bool((flips.by_matrix(labels, short, generator=gen()) == 1).all())


def test_instance_flip_probability_is_the_truncated_normal() -> None:
    labels = torch.randint(0, K, (4000,), generator=gen(1))
    images = torch.rand(4000, 1, 6, 6, generator=gen(2))
    for rate, spread in ((0.4, 0.1), (0.05, 0.1), (0.9, 0.3)):
        mean = float(stats.truncnorm.mean(-rate / spread, (1 - rate) / spread, loc=rate, scale=spread))
        noisy = flips.instance_dependent(labels, images, rate, K, spread=spread, generator=gen())
        assert within(int((noisy != labels).sum()), 4000, mean)


def test_instance_matches_a_loop_over_samples() -> None:
    n, rate, spread = 60, 0.5, 0.2
    labels = torch.randint(0, K, (n,), generator=gen(1))
    images = torch.rand(n, 2, 3, 3, generator=gen(2))
    noisy = flips.instance_dependent(labels, images, rate, K, spread=spread, generator=gen(7))
    g = gen(7)
    u_rate = torch.rand(n, generator=g, dtype=torch.float64).numpy()
    u_draw = torch.rand(n, generator=g, dtype=torch.float64).numpy()
    w = [torch.randn(18, K, generator=g, dtype=torch.float64).numpy() for _ in range(K)]
    q = stats.truncnorm.ppf(u_rate, -rate / spread, (1 - rate) / spread, loc=rate, scale=spread)
    for i in range(n):
        x = images[i].double().flatten().numpy()
        x = (x - x.mean()) / x.std()
        y = int(labels[i])
        score = np.exp(x @ w[y] - (x @ w[y]).max())
        score[y] = 0
        p = q[i] * score / score.sum()
        p[y] = 1 - q[i]
        assert int(noisy[i]) == int(np.searchsorted(np.cumsum(p), u_draw[i], side="right"))


def test_instance_flips_of_equal_images_follow_their_softmax() -> None:
    n = 3000
    labels = torch.zeros(n, dtype=torch.int64)
    prototypes = torch.rand(2, 1, 6, 6, generator=gen(2))
    which = torch.arange(n) % 2
    noisy = flips.instance_dependent(labels, prototypes[which], 0.4, K, spread=0.1, generator=gen())
    g = gen()
    torch.rand(2 * n, generator=g, dtype=torch.float64)  # the flip rates and the draws come first
    projection = torch.randn(36, K, generator=g, dtype=torch.float64)
    for w in (0, 1):
        x = prototypes[w].double().flatten()
        p = ((x - x.mean()) / x.std(correction=0) @ projection)[1:].softmax(0).numpy()
        seen = noisy[(which == w) & (noisy != 0)]
        counts = torch.bincount(seen, minlength=K)[1:].numpy()
        likely = p * len(seen) > 5
        assert counts[~likely].sum() <= 15
        assert counts[likely].sum() > 0
        if likely.sum() > 1:
            expected = p[likely] / p[likely].sum() * counts[likely].sum()
            assert stats.chisquare(counts[likely], expected).pvalue > 1e-4


def test_instance_ignores_brightness_and_contrast() -> None:
    labels = torch.randint(0, K, (500,), generator=gen(1))
    images = torch.rand(500, 1, 6, 6, generator=gen(2))
    noisy = flips.instance_dependent(labels, images, 0.4, K, spread=0.1, generator=gen())
    dimmed = flips.instance_dependent(labels, images * 0.5 + 0.25, 0.4, K, spread=0.1, generator=gen())
    assert torch.equal(dimmed, noisy)


def test_instance_rejects_bad_images() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="2 images"):
        flips.instance_dependent(labels, torch.rand(2, 4), 0.1, K, spread=0.1, generator=gen())
    with pytest.raises(InvalidInputError, match="NaN"):
        flips.instance_dependent(labels, torch.full((3, 4), torch.nan), 0.1, K, spread=0.1, generator=gen())
