"""Fixtures and settings that all tests share."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import ROOT
from tests.warm import FORK, WITH_WORKERS

# The same examples on every machine, and no deadline: a busy machine is no failure.
settings.register_profile(
    "tad_plugin", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tad_plugin")

# The tensors here are small, and several test workers may share the machine.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fails a test that draws from, or seeds, the global generators of torch, NumPy or random."""
    before = (torch.get_rng_state(), np.random.get_state()[1:3], random.getstate())  # noqa: NPY002
    yield
    after = (torch.get_rng_state(), np.random.get_state()[1:3], random.getstate())  # noqa: NPY002
    assert torch.equal(before[0], after[0]), "torch's global generator was used"
    same = np.array_equal(before[1][0], after[1][0]) and before[1][1] == after[1][1]
    assert same, "NumPy's global generator was used"
    assert before[2] == after[2], "Python's global generator was used"


@pytest.fixture
def workers_as_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts worker processes as forks: in milliseconds, where a fresh interpreter imports for seconds."""
    if FORK is not None:
        for module in WITH_WORKERS:
            monkeypatch.setattr(importlib.import_module(module), "SPAWN", FORK)


@pytest.fixture
def shared_data() -> Path:
    """The folder with real files beside the repository; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real files in {folder}")
    return folder
