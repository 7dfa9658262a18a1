"""A script of a public codebase, and which files belong to that codebase."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tad_plugin.errors import PatchError, explain

__all__ = ["Script", "belongs"]


@dataclass(frozen=True)
class Script:
    """A script of a checkout.

    Attributes:
        root: folder of the checkout, absolute.
        path: the script, absolute.
        sources: text of all Python files of the checkout; switches search it.
        gpu: True if torch can use a GPU of this machine.
    """

    root: Path
    path: Path
    sources: str
    gpu: bool

    @classmethod
    def find(cls, root: str | Path, script: str) -> Script:
        """Finds ``script``, a path inside the checkout ``root``.

        Raises:
            PatchError: it does not exist, or is outside or a link that leads there.
        """
        folder = Path(root).expanduser().resolve()
        path = (folder / script).resolve()
        if not path.is_relative_to(folder):
            do = "Pass the checkout's folder with --upstream, and a path inside it after --"
            raise PatchError(explain(f"a script inside the checkout {folder}", f"{path}", do))
        if not path.is_file():
            do = "Pass the checkout's folder with --upstream, and a path inside it after --"
            raise PatchError(explain(f"the script {script} in {folder}", "no such file", do))
        files = sorted(p for p in folder.rglob("*.py") if belongs(p, folder))
        text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in (path, *files))
        return cls(folder, path, text, torch.cuda.is_available())


def belongs(path: Path, root: Path) -> bool:
    """True if the file ``path`` is part of the codebase in ``root``.

    Files in hidden folders and in environments below ``root`` are not part of it. Both paths are absolute.
    """
    if not path.is_relative_to(root) or path.is_relative_to(Path(__file__).resolve().parent):
        return False
    return not any(p.startswith(".") or p in ("site-packages", "dist-packages") for p in path.relative_to(root).parts)
