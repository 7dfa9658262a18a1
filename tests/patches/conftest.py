"""Fixtures of the tests of patches."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tad_plugin import compatibility, standins


@pytest.fixture
def at_finish(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Filled with the local variables of the function that ends the run of wandb, in whose place a stand-in logs."""
    found: dict[str, Any] = {}
    original = standins.silent_wandb

    @contextmanager
    def catching(name: str) -> Iterator[None]:
        with original(name):
            vars(sys.modules["wandb"])["finish"] = lambda: found.update(sys._getframe(1).f_locals)
            yield

    monkeypatch.setattr(standins, "silent_wandb", catching)
    installed = importlib.util.find_spec
    monkeypatch.setattr(compatibility, "_installed", lambda module: module != "wandb" and installed(module) is not None)
    return found
