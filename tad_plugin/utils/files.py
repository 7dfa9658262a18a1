"""Writing files so that a reader never sees half of one.

Everything that the package writes goes through :func:`atomic_save`: a temporary name in the same folder, then one
rename. A process that is killed while writing leaves the old file, or the new one, never a mixture.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tad_plugin.errors import FileFormatError, explain, missing_extra

__all__ = [
    "atomic_save",
    "atomic_write",
    "file_digest",
    "plain",
    "read_json",
    "read_yaml",
    "remove_temporaries",
    "yaml_text",
]

_TEMPORARY = ".tmp-"


def atomic_save(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Lets ``write`` make the file under a temporary name, then renames it to ``path``.

    The temporary name lies in the same folder and ends like ``path``, because some writers look at the suffix or
    append one. Missing parent folders are made. The contents are flushed to the disk before the rename. If ``write``
    raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: where the finished file shall be.
        write: called once with the temporary path, which does not exist yet.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def atomic_write(path: str | Path, content: bytes | str) -> Path:
    """Writes bytes, or text as UTF-8, to ``path`` in one step; see :func:`atomic_save`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    return atomic_save(path, lambda temporary: temporary.write_bytes(data))


def remove_temporaries(folder: str | Path) -> None:
    """Removes what killed writers left in ``folder``. Call it only where no other process is writing."""
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileFormatError: the file does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(_text(path))
    except OSError as error:
        raise FileFormatError(
            explain(f"a readable file at {path}", str(error.strerror or error), "Check the path and the permissions")
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:  # JSON and Unicode errors are ValueErrors
        raise FileFormatError(
            explain(f"JSON in {path}", f"text that does not parse ({error})", "Restore the file, or write it again")
        ) from error


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file; YAML 1.1 contains JSON.

    Raises:
        FileFormatError: the file does not exist, cannot be read, or is not YAML.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = _yaml(f"reading {path}")
    try:
        return yaml.safe_load(_text(path))
    except (OSError, ValueError, RecursionError, MemoryError, yaml.YAMLError) as error:
        got = str(getattr(error, "strerror", None) or error)
        raise FileFormatError(explain(f"YAML in {path}", got, "Check the path, or correct the file")) from error


def _text(path: str | Path) -> str:
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
        raise OSError("not a regular file")
    return path.read_text(encoding="utf-8")


def yaml_text(value: Any) -> str:
    """``value`` (see :func:`plain`) as YAML, keys in their order. Raises MissingExtraError without PyYAML."""
    text: str = _yaml("writing YAML").safe_dump(plain(value), sort_keys=False, allow_unicode=True)
    return text


def _yaml(what: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("yaml", "reproduce", what) from error
    return yaml


def plain(value: Any) -> Any:
    """``value`` in the types that JSON and YAML have: dict with str keys, list, str, int, float, bool, None.

    Dataclasses and mappings become dicts; tuples, sets (sorted), arrays and tensors become lists, or a number where
    they have no dimension; members of an Enum become their value; anything else (a path, a dtype) its ``str``.
    NaN and infinities stay floats, which Python's ``json`` writes as ``NaN`` and ``Infinity`` and reads back.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy's scalars
        return plain(value.tolist())
    return str(value)
