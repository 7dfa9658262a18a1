"""Scripts that the tests write, and the switches that they need."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import needed_switches


def script(folder: Path, text: str, name: str = "main.py", **others: str) -> Script:
    """Writes a script and further modules (name -> text) into ``folder``."""
    for file, content in {name: text, **{f"{k}.py": v for k, v in others.items()}}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(textwrap.dedent(content))
    return Script.find(folder, name)


def needed(found: Script, **given: Any) -> list[str]:
    """Names of the switches that a script needs."""
    return [s.name for s in needed_switches(found, **given)]
