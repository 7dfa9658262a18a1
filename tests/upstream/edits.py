"""What people do to a checkout between cloning it and patching it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

Edit = Callable[[bytes], bytes]


def edited_help(content: bytes) -> bytes:
    """The last help text of the file says something else."""
    found = list(re.finditer(rb"help='[^'\n]*'", content))
    start, end = found[-1].span() if found else (0, 0)
    return content[:start] + b"help='my own words'" + content[end:] if found else content


def crlf(content: bytes) -> bytes:
    """As core.autocrlf=true leaves a file."""
    return content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def lf(content: bytes) -> bytes:
    """As core.autocrlf=input leaves a file."""
    return content.replace(b"\r\n", b"\n")


def stripped_newline(content: bytes) -> bytes:
    """No newline at the end of the file."""
    return content.rstrip(b"\r\n")


def own_comment(content: bytes) -> bytes:
    """A comment above the first function, and one at the end."""
    start = re.search(rb"^def ", content, re.MULTILINE)
    at = start.start() if start else 0
    ending = b"\r\n" if b"\r\n" in content else b"\n"
    open_end = b"" if content.endswith(b"\n") else ending
    return content[:at] + b"# mine" + ending + content[at:] + open_end + b"# the end" + ending


def byte_order_mark(content: bytes) -> bytes:
    """As some editors save a file."""
    return b"\xef\xbb\xbf" + content.removeprefix(b"\xef\xbb\xbf")


def trailing_spaces(content: bytes) -> bytes:
    """White space at the ends of all code lines."""
    return re.sub(rb"(?m)(?<=[\w)\]])(?=\r?$)", b"  ", content)


def unchanged(content: bytes) -> bytes:
    """No edit of the file."""
    return content


def own_commit(root: Path) -> None:
    """The checkout is at another commit."""
    head = root / ".git" / "HEAD"
    if head.is_file():
        head.write_text("c3" * 20 + "\n")


def no_git(root: Path) -> None:
    """A downloaded archive."""
    shutil.rmtree(root / ".git", ignore_errors=True)


#: case -> edit of every file, edit of the checkout, what apply did when the hash of the whole file and the commit
#: decided, and what it does
MATRIX: dict[str, tuple[Edit, Callable[[Path], None] | None, str, str]] = {
    "as cloned": (unchanged, None, "patched", "patched"),
    "own commit": (unchanged, own_commit, "refused", "patched"),
    "no .git": (unchanged, no_git, "patched", "patched"),
    "edited help": (edited_help, None, "refused", "patched and edited"),
    "autocrlf": (crlf, None, "refused", "patched"),
    "autocrlf=input": (lf, None, "refused", "patched"),
    "stripped newline": (stripped_newline, None, "refused", "patched"),
    "own comment": (own_comment, None, "refused", "patched and edited"),
    "byte order mark": (byte_order_mark, None, "refused", "patched"),
    "trailing spaces": (trailing_spaces, None, "refused", "patched and edited"),
}
