"""Atomic writes, JSON, YAML and digests of files.

The package writes every file through :func:`atomic_save`: under a temporary name in the same folder, then one rename.
A process that is killed while writing leaves the old file or the new one, never a mixture.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tad_plugin.errors import FileFormatError, explain, missing_extra
from tad_plugin.utils.seals import BrokenSeal, unsealed_json, unsealed_yaml
from tad_plugin.utils.write_errors import names_write_errors

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


@names_write_errors
def atomic_save(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Calls ``write`` with a temporary path, then renames that file to ``path``.

    The temporary file is in the same folder and has the same suffix, because some writers look at the suffix or append
    one. Missing parent folders are created. The contents are flushed to the disk before the rename. If ``write``
    raises, the temporary file is removed and ``path`` is unchanged. Permissions follow the umask, whatever the writer
    sets.

    Args:
        path: path of the finished file.
        write: called once with the temporary path, where no file exists yet.

    Returns:
        ``path``.

    Raises:
        DiskSpaceError, FileWriteError, InvalidInputError: the file cannot be written; see
            :func:`tad_plugin.utils.write_errors.named_write_error`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}{path.suffix}")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode
        temporary.unlink()
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def atomic_write(path: str | Path, content: bytes | str) -> Path:
    """Writes bytes, or text as UTF-8, to ``path`` atomically; see :func:`atomic_save`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    return atomic_save(path, lambda temporary: temporary.write_bytes(data))


def remove_temporaries(folder: str | Path) -> None:
    """Removes the temporary files of killed writers in ``folder``. No other process may be writing there."""
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """Sha256 of a file, 64 hexadecimal digits. Reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. A seal (:func:`tad_plugin.utils.seals.sealed_json`) is checked and left out.

    Raises:
        FileFormatError: the file does not exist, cannot be read, is not JSON, or was changed after it was sealed.
    """
    try:
        return unsealed_json(_text(path))
    except OSError as error:
        raise FileFormatError(
            explain(f"a readable file at {path}", str(error.strerror or error), "Check the path and the permissions")
        ) from error
    except BrokenSeal as error:
        raise _changed(path, error) from error
    except (ValueError, RecursionError, MemoryError) as error:  # JSON and Unicode errors are ValueErrors
        raise FileFormatError(
            explain(f"JSON in {path}", f"text that does not parse ({error})", "Restore the file, or write it again")
        ) from error


def read_yaml(path: str | Path) -> Any:
    """Reads a YAML file. JSON files are YAML files too. A seal is checked.

    Raises:
        FileFormatError: the file does not exist, cannot be read, is not YAML, or was changed after it was sealed.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = _yaml(f"reading {path}")
    try:
        return yaml.safe_load(unsealed_yaml(_text(path)))
    except BrokenSeal as error:
        raise _changed(path, error) from error
    except (OSError, ValueError, RecursionError, MemoryError, yaml.YAMLError) as error:
        got = str(getattr(error, "strerror", None) or error)
        raise FileFormatError(explain(f"YAML in {path}", got, "Check the path, or correct the file")) from error


def _changed(path: str | Path, error: BrokenSeal) -> FileFormatError:
    return FileFormatError(explain(f"{path} as it was written", str(error), "Restore the file, or write it again"))


def _text(path: str | Path) -> str:
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device would be read for ever
        raise OSError("not a regular file")
    return path.read_text(encoding="utf-8")


def yaml_text(value: Any) -> str:
    """``value`` as YAML text, after :func:`plain`; keys keep their order.

    Raises:
        MissingExtraError: PyYAML is not installed.
    """
    text: str = _yaml("writing YAML").safe_dump(plain(value), sort_keys=False, allow_unicode=True)
    return text


def _yaml(what: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("yaml", "reproduce", what) from error
    return yaml


def plain(value: Any) -> Any:
    """Converts ``value`` to the types of JSON and YAML: dict with str keys, list, str, int, float, bool, None.

    Dataclasses and mappings become dicts. Tuples, sets (sorted), arrays and tensors become lists, or a number if they
    have no dimension. Members of an Enum become their value. Anything else (a path, a dtype) becomes its ``str``.
    NaN and infinity stay floats, which Python's ``json`` writes as ``NaN`` and ``Infinity`` and reads back.
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
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy scalars
        return plain(value.tolist())
    return str(value)
