"""Reads a checkout's .git without git."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["head_commit", "origin"]


def head_commit(checkout: str | Path) -> str | None:
    """Reads the checked-out commit from .git without git; None if there is none or it cannot be read."""
    git = Path(checkout) / ".git"
    try:
        if git.is_file():  # a worktree or submodule
            git = Path(checkout) / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        common = git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        name = head.removeprefix("ref:").strip()
        for place in (git / name, shared / name):
            if place.is_file():
                return _commit(place.read_text(encoding="utf-8").strip())
        for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return _commit(line.split(" ", 1)[0])
    except (OSError, UnicodeDecodeError):
        return None
    return None


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None


def origin(checkout: str | Path) -> str | None:
    """Reads the address that the checkout was cloned from; None if there is none or it cannot be read."""
    try:
        config = (Path(checkout) / ".git" / "config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    section = re.search(r'^\[remote "origin"\]$(.*?)(?=^\[|\Z)', config, re.MULTILINE | re.DOTALL)
    address = re.search(r"^\s*url\s*=\s*(\S+)\s*$", section[1], re.MULTILINE) if section else None
    return address[1].removesuffix(".git") if address else None
