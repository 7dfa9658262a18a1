"""Named errors for files and folders that cannot be written."""

from __future__ import annotations

import errno
import functools
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tad_plugin.errors import DiskSpaceError, FileWriteError, InvalidInputError, TadPluginError, explain

__all__ = ["check_path", "named_write_error", "names_write_errors", "writing_to"]

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, *(getattr(errno, name) for name in ("EDQUOT",) if hasattr(errno, name))}
_F = TypeVar("_F", bound=Callable[..., Any])
# What torch and safetensors say, whose errors are no OSErrors.
_FOREIGN = re.compile("PytorchStreamWriter|inline_container|write failed|I/O error|iostream|open file failed|os error")
_NUMBER = re.compile(r"os error (\d+)")


def check_path(path: str | Path, name: str) -> Path:
    """``path`` as a Path, if it can be one.

    Args:
        path: given by the user.
        name: its flag or argument, for the message.

    Raises:
        InvalidInputError: it is empty, or holds a NUL character.
    """
    text = str(path)
    if not text or text.isspace():
        raise InvalidInputError(explain(f"a path in {name}", repr(text), "Name a folder or file, as in runs/first"))
    if "\0" in text:
        raise InvalidInputError(explain(f"a path in {name}", repr(text), "Remove the NUL character"))
    return Path(path)


def named_write_error(error: BaseException, path: str | Path, do: str = "write") -> TadPluginError | None:
    """The named error for one that was raised while ``path`` was written; None if it is about something else.

    Args:
        error: what was raised.
        path: what was written.
        do: what was done to it, for the message.

    Returns:
        A DiskSpaceError (full disk, no inodes left, quota, file size limit), an InvalidInputError (a path that cannot
        exist) or a FileWriteError (no permission, a read-only disk, a fault of the disk).
    """
    if isinstance(error, (TadPluginError, TimeoutError)):
        return None
    if isinstance(error, ValueError) and "null" in str(error):
        return InvalidInputError(explain("a path without a NUL character", repr(str(path)), "Correct the path"))
    if isinstance(error, OSError):
        number, reason = error.errno, str(error.strerror or error)
    elif (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") and _FOREIGN.search(str(error)):
        found = _NUMBER.search(str(error))
        number = int(found.group(1)) if found else _try_folder(Path(path).parent)
        reason = os.strerror(number) if number else str(error).split("\n", 1)[0][:200]
    else:
        return None
    expected = f"to {do} {path}"
    if number in _NO_ROOM:
        do = "Free space or inodes on that disk, or raise the limit (ulimit -f, quota); the same command goes on"
        return DiskSpaceError(explain(expected, reason, do))
    if number in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL):
        return InvalidInputError(explain(expected, reason, "Choose another path"))
    do = "Check permissions and disk, or choose another path"
    return FileWriteError(explain(expected, reason, do))


def _try_folder(folder: Path) -> int | None:
    """The number of the error that a small file in ``folder`` gives; None if it can be written."""
    probe = folder / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        with open(probe, "wb", buffering=0) as file:
            for _ in range(64):
                if file.write(b"\0" * 65536) < 65536:
                    return errno.ENOSPC
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        probe.unlink(missing_ok=True)
    return None


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Raises errors of the block by their name; see :func:`named_write_error`."""
    try:
        yield
    except Exception as error:
        named = named_write_error(error, path)
        if named is None:
            raise
        raise named from error


def names_write_errors(function: _F) -> _F:
    """A decorator: :func:`writing_to` around a function whose first argument is the path that it writes."""

    @functools.wraps(function)
    def wrapped(path: str | Path, *args: Any, **more: Any) -> Any:
        with writing_to(path):
            return function(path, *args, **more)

    return wrapped  # type: ignore[return-value]
