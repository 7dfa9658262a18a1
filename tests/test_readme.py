"""The README: its code runs (each ```python block after a line ``<!-- test -->``), and it names every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- test -->\s*\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks() -> list[str]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def test_the_layout_names_every_folder_and_file_of_the_root_package() -> None:
    layout = README.read_text(encoding="utf-8").split("## Layout")[1]
    for path in (ROOT / "tad_plugin").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in layout, path.name


@pytest.fixture
def global_rng_restored() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_the_readme_has_code_that_is_tested() -> None:
    assert len(blocks()) >= 3, "README.md needs ```python blocks after a line <!-- test -->"


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, global_rng_restored: object
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[number], f"README.md block {number + 1}", "exec"), {"__name__": "__main__"})
