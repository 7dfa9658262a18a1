"""Seals: the sha256 of a file in the file itself, so that reading finds a single changed bit.

A seal is the last thing in the file and covers every byte before it. JSON objects and lines end with the entry
``"seal"``, YAML with a comment, files of ``torch.save`` with the comment of their zip archive. Other readers ignore it.
A file without a seal is foreign, or of an earlier version. It is accepted.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["BrokenSeal", "check_archive", "save_sealed", "sealed_json", "sealed_yaml", "unsealed_json", "unsealed_yaml"]

_KEY = "seal"
_DIGITS = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
_JSON_END = re.compile(r'(,\n |, )"seal": "([0-9a-f]+)"\n?\}\n?\Z')
_YAML_END = re.compile(r"^# seal: ([0-9a-f]{64})\n\Z", re.MULTILINE)
# A seal in which a bit was changed: the end of the line before it, its mark, or its last character.
_YAML_REMNANT = re.compile(r"[0-9a-f]{64}.?\Z", re.DOTALL)
_MARK = b"tad_plugin sha256 "
_NO_COMMENT = b"\0\0"


class BrokenSeal(ValueError):
    """A file holds other contents than were sealed."""

    def __init__(self) -> None:
        super().__init__("contents that do not match their seal: the file was changed after it was written")


def sealed_json(values: Mapping[str, Any], *, line: bool = False) -> str:
    """``values`` as JSON with a seal, ending in a newline.

    Args:
        values: at least one entry of JSON values.
        line: one line with a seal of 16 digits; otherwise one entry per line and a seal of 64 digits.
    """
    if line:
        body = json.dumps(values)[:-1]
        return f'{body}, "{_KEY}": "{_sha256(body)[:16]}"}}\n'
    body = json.dumps(values, indent=1)[:-2]
    return f'{body},\n "{_KEY}": "{_sha256(body)}"\n}}\n'


def unsealed_json(text: str) -> Any:
    """The value of a JSON text, without its seal.

    Raises:
        BrokenSeal: other contents than were sealed.
        ValueError: not JSON.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or not values:
        return values
    last, value = next(reversed(values.items()))
    # The length instead of the name, because the changed bit may be in the name.
    if _KEY not in values and not (len(last) == len(_KEY) and isinstance(value, str) and _DIGITS.fullmatch(value)):
        return values
    found = _JSON_END.search(text)
    if found is None or not _DIGITS.fullmatch(found[2]) or not _sha256(text[: found.start()]).startswith(found[2]):
        raise BrokenSeal
    del values[_KEY]
    return values


def sealed_yaml(text: str) -> str:
    """A YAML text with a seal. It must end in a newline."""
    return f"{text}# seal: {_sha256(text)}\n"


def unsealed_yaml(text: str) -> str:
    """Returns ``text``. Raises BrokenSeal if it has other contents than were sealed."""
    found = _YAML_END.search(text)
    if (found is None and _YAML_REMNANT.search(text)) or (found and _sha256(text[: found.start()]) != found[1]):
        raise BrokenSeal
    return text


def save_sealed(tree: Any, path: str | Path) -> None:
    """``torch.save`` with a seal. Equal trees give equal bytes, whatever the path."""
    # Given a path, torch writes the name into the file.
    with open(path, "wb+") as file:
        torch.save(tree, file)
        file.seek(-len(_NO_COMMENT), 2)
        file.write((len(_MARK) + 64).to_bytes(2, "little") + _MARK)
        file.flush()
        digest = _sha256_of_first(path, file.tell())
        file.write(digest.encode("ascii"))


def check_archive(path: str | Path) -> None:
    """Checks a file of ``torch.save`` before it is read: its seal, or the zip's own CRCs if it has none.

    Files of torch before 1.6 are not zip archives and have neither.

    Raises:
        BrokenSeal, ValueError, OSError, zipfile.BadZipFile: the file is damaged. Other errors of :mod:`zipfile` can
            occur.
    """
    length = len(_MARK) + 64
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length))
        end = file.read()
    if _MARK in end:  # not at its beginning where the file was cut off
        if not end.startswith(_MARK) or _sha256_of_first(path, size - 64).encode("ascii") != end[len(_MARK) :]:
            raise BrokenSeal
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"a checksum that does not match in {damaged!r}: the file is damaged")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256_of_first(path: str | Path, count: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while count > 0 and (piece := file.read(min(count, 1 << 20))):
            digest.update(piece)
            count -= len(piece)
    return digest.hexdigest()
