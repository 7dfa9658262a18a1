"""Every derived seed and generator.

A run has one seed. Its noise, its split, its networks and each of its methods get seeds of their own from it. The
formulas differ for historical reasons. Changing one would change results.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["derived_seed", "expert_generator", "generator_of", "method_seed", "scorer_seed", "seeded_generator"]

_LARGEST = 2**63


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


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
