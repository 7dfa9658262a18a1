"""Derived seeds and generators."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["derived_seed", "generator_of"]


def derived_seed(*parts: Any) -> int:
    """A seed in [0, 2^62) from a description: arms that share the description get the same numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


def generator_of(*parts: Any) -> torch.Generator:
    """A CPU generator with :func:`derived_seed` of these parts."""
    return torch.Generator().manual_seed(derived_seed(*parts))
