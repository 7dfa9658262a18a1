"""Texts for users: their code runs (each ```python block after a line ``<!-- test -->``), and figures are current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- test -->\s*\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


TEXTS = ("README.md", "CONTRIBUTING.md")  # test_package_readmes.py runs the others


def blocks() -> list[tuple[str, str]]:
    """(text, code) of every tested block."""
    return [(name, code) for name in TEXTS for code in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))]


def test_the_readme_is_short_and_its_table_and_links_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "reproduce" / "readme_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PART.findall(text) == [module.table()]
    titles = re.findall("^## (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https:"):
            assert (ROOT / target).is_file(), target


def test_the_layout_names_every_folder_and_file_of_the_root_package() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout")[1]
    for path in (ROOT / "tad_plugin").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in layout, path.name


@pytest.fixture
def global_rng_restored() -> object:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_each_text_has_code_that_is_tested() -> None:
    assert {name for name, _ in blocks()} == set(TEXTS)


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, global_rng_restored: object
) -> None:
    monkeypatch.chdir(tmp_path)
    name, code = blocks()[number]
    exec(compile(code, f"{name}, block {number + 1}", "exec"), {"__name__": "__main__"})
