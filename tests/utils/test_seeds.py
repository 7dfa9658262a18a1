"""Seeds: the formulas are pinned, because changing one changes results."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tad_plugin.utils.seeds import (
    derived_seed,
    expert_generator,
    generator_of,
    method_seed,
    scorer_seed,
    seeded_generator,
)


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def test_the_formulas() -> None:
    assert derived_seed("noise", 3) == hashed("('noise', 3)") == 4_088_222_430_384_991_423
    assert generator_of(3, "loop").initial_seed() == hashed("(3, 'loop')") == 2_376_865_971_517_919_831
    assert [method_seed(3, position) for position in (0, 1)] == [3028, 3045]
    assert scorer_seed(3) == 23770
    assert expert_generator(0, 0).initial_seed() == hashed("expert 0 0") == 1_305_908_775_921_129_284
    assert expert_generator(3, -1).initial_seed() == hashed("expert 3 -1") == 4_291_613_062_916_242_794


@pytest.mark.parametrize("seed", [0, 2**31, 2**62, 2**63 - 1])
def test_every_seed_fits_a_generator(seed: int) -> None:
    for derived in (derived_seed(seed), method_seed(seed, 3), scorer_seed(seed)):
        assert 0 <= derived < 2**63
        assert seeded_generator(derived).initial_seed() == derived


def test_generators_are_the_callers_own(global_rng_untouched: None) -> None:
    first, second = seeded_generator(5), seeded_generator(5)
    assert first.device.type == "cpu" and torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    experts = [torch.rand(3, generator=expert_generator(0, number)) for number in range(2)]
    assert not torch.equal(*experts)
