"""Every derived seed and generator.

A run has one seed. Its noise, its split, its networks and each of its methods get seeds of their own from it. The
formulas differ for historical reasons. Changing one would change results.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tad_plugin.utils.whole_numbers import check_whole

__all__ = [
    "check_seed",
    "derived_seed",
    "expert_generator",
    "generator_of",
    "global_generators_kept",
    "method_seed",
    "scorer_seed",
    "seeded_generator",
]

_LARGEST = 2**63


def check_seed(seed: Any) -> int:
    """Checks a seed and returns it as an int.

    Raises:
        InvalidInputError: no whole number in [-2^63, 2^64).
    """
    return check_whole("a seed", seed, -_LARGEST, 2 * _LARGEST)


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator with this seed. Raises InvalidInputError for a seed that is no whole number."""
    return torch.Generator().manual_seed(check_seed(seed))


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Gives the global CPU generators of torch, NumPy and random back as they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        random.setstate(kept[2])


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^62) from the ``repr`` of a description. Equal descriptions give equal seeds."""
    return _hashed(repr(parts))


def generator_of(*parts: Any) -> torch.Generator:
    """A CPU generator seeded with :func:`derived_seed` of these parts."""
    return seeded_generator(derived_seed(*parts))


def method_seed(seed: int, position: int) -> int:
    """Seed in [0, 2^63) of the method at this position of a name such as "a+b", from the hook's seed."""
    return (seed * 1009 + 17 * position + 1) % _LARGEST


def scorer_seed(seed: int) -> int:
    """Seed in [0, 2^63) of the plugin's own scorer, from the hook's seed."""
    return (seed * 7919 + 13) % _LARGEST


def expert_generator(seed: int, number: int) -> torch.Generator:
    """CPU generator of expert ``number``. Experts can be trained in any order and by any process."""
    return seeded_generator(_hashed(f"expert {seed} {number}"))


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
