"""The README's code runs: each ```python block after a line ``<!-- test -->``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- test -->\s*\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks() -> list[str]:
    return BLOCK.findall(README.read_text(encoding="utf-8")) if README.exists() else []


@pytest.fixture
def global_rng_restored() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_the_readme_has_code_that_is_tested() -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    assert blocks(), "README.md needs a ```python block after a line <!-- test -->"


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, global_rng_restored: object
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[number], f"README.md block {number + 1}", "exec"), {"__name__": "__main__"})
