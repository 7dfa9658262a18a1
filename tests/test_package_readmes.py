"""The examples of the package's own documentation run: each ```python block after a line ``<!-- test -->``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.test_readme import BLOCK

PAGES = sorted((ROOT / "tad_plugin").rglob("*.md"))
EXAMPLES = [
    pytest.param(block, f"{page.relative_to(ROOT)} example {number}", id=f"{page.parent.name}-{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
@pytest.mark.parametrize("code, name", EXAMPLES)
def test_an_example_runs(code: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "distill"], ids=lambda p: p.stem)
def test_a_page_has_an_example(page: Path) -> None:
    assert BLOCK.search(page.read_text(encoding="utf-8"))
