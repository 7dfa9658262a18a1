"""IWD in loops whose network has batch norm: scores do not depend on the size of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tad_plugin import attach
from tests.distill.problems import dc_loop
from tests.problems import blobs, dm_loop

SOON = {"every": 1, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2, "networks": 1}


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (dm_loop, {"target": "validation"}),
        (dm_loop, {"target": "matching"}),
        (dm_loop, {"mode": "batch"}),
        (dc_loop, {"statistic": "loop"}),
    ],
)
def test_influence_does_not_depend_on_passes(make: Any, own: dict[str, Any]) -> None:
    images, labels = blobs()
    found = []
    for size in (4, 1000):
        config = {"iwd": {**SOON, **own, "chunk_size": size}}
        hook = attach("iwd", labels=labels, data=images, num_classes=3, config=config)
        make(images, labels, 3, hook, norm="batch", augment="none").step(0)
        found.append(hook.state["influence"].clone())
    assert float(found[0].abs().max()) > 0.1
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
