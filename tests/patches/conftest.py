"""Fixtures for the tests of the patches."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.upstream import stand_ins, switches
from tad_plugin.upstream.checkout import apply
from tad_plugin.upstream.patch import load_patch
from tests.patches.foreign import any_checksum, copied, tiny_cifar10

__all__ = ["any_checksum"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small CIFAR-10."""
    return tiny_cifar10(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout named by the test module's CHECKOUT."""
    return copied(request.module.CHECKOUT, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def patched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched copy of the same checkout."""
    root = copied(request.module.CHECKOUT, tmp_path_factory.mktemp("patched"))
    apply(load_patch(request.module.CHECKOUT), root)
    return root


@pytest.fixture
def at_finish(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gets the local variables of the function that calls ``wandb.finish``, where a stand-in replaces wandb."""
    found: dict[str, Any] = {}
    original = stand_ins.silent_wandb

    @contextmanager
    def catching(name: str) -> Iterator[None]:
        with original(name):
            vars(sys.modules["wandb"])["finish"] = lambda: found.update(sys._getframe(1).f_locals)
            yield

    monkeypatch.setattr(stand_ins, "silent_wandb", catching)
    installed = importlib.util.find_spec
    monkeypatch.setattr(switches, "_installed", lambda module: module != "wandb" and installed(module) is not None)
    return found
