"""Every patch of the project: added lines only, few of them, none of the codebase's own, and described."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path

import pytest

from tad_plugin.upstream.added_lines import format_diff, parse_diff
from tad_plugin.upstream.patch import available_patches, load_patch, patches_folder

NAMES = available_patches()


def test_the_patches_are_there() -> None:
    assert "dm" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_there_is_nothing_but_added_lines_and_few_of_them(name: str) -> None:
    text = (patches_folder() / name / f"{name}.patch").read_text()
    for line in text.splitlines():
        header = line.startswith(("--- a/", "+++ b/", "@@ -"))
        assert header or line.startswith("+"), line
        assert not line.startswith("-") or line.startswith("--- a/"), line
    assert format_diff(dict(parse_diff(text))) == text
    for file in load_patch(name).files:
        assert 1 <= file.added <= 12, file.path


@pytest.mark.parametrize("name", NAMES)
def test_every_added_line_is_a_statement_of_ours(name: str) -> None:
    for file in load_patch(name).files:
        for insertion in file.insertions:
            for line in insertion.lines:
                ast.parse(textwrap.dedent(line))
                assert re.search(r"\b(tad_plugin|hook)\b", line), line
                assert line == line.rstrip()


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_pins_commit_and_contents(name: str) -> None:
    patch = load_patch(name)
    assert re.fullmatch(r"[0-9a-f]{40}", patch.commit) and patch.repository.startswith("https://github.com/")
    for file in patch.files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.before) and re.fullmatch(r"[0-9a-f]{64}", file.after)
        assert file.before != file.after
    known = {"format", "repository", "commit", "files"}
    assert set(json.loads((patches_folder() / name / "manifest.json").read_text())) == known


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_names_commit_files_and_commands(name: str) -> None:
    patch, text = load_patch(name), Path(patches_folder() / name / "README.md").read_text()
    assert patch.commit in text and patch.repository in text and f"tad-plugin patch apply {name}" in text
    for file in patch.files:
        assert file.path in text
        for insertion in file.insertions:
            for line in insertion.lines:
                handle = re.search(r"(?:hook|tad_plugin)\.(\w+)\(", line)
                assert handle is None or handle[1] in text, line
