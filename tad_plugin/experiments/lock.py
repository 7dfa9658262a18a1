"""One process at a time in a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tad_plugin.errors import FileWriteError, FolderInUseError, explain
from tad_plugin.utils.write_errors import writing_to

__all__ = ["LOCK_FILES", "claimed_folder"]

LOCK_FILES = (".lock", ".lock.pid")
"""Files of a claim: the lock itself, and the process that holds it."""


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it, for the length of a with block.

    The lock belongs to the process, so one that was killed holds nothing. Folders that this call made are removed
    afterwards if nothing is in them.

    Raises:
        FolderInUseError: another process is in it; the message has its number.
        InvalidInputError, FileWriteError, DiskSpaceError: the folder or the lock cannot be written.
    """
    made = [p for p in (folder, *folder.parents) if not _exists(p)]
    lock, holder = FileLock(str(folder / LOCK_FILES[0])), folder / LOCK_FILES[1]
    try:
        try:
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
        except Timeout:
            do = "Wait for it or stop it, or choose another --out"
            raise FolderInUseError(explain(f"{folder} for this process alone", _holder(holder), do)) from None
        except NotImplementedError as error:  # a disk without locks
            do = "Choose an --out on a disk that has them"
            raise FileWriteError(explain(f"a disk with file locks at {folder}", str(error), do)) from error
        try:
            with writing_to(holder):
                holder.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            if made and folder.is_dir() and {p.name for p in folder.iterdir()} <= set(LOCK_FILES):
                (folder / LOCK_FILES[0]).unlink(missing_ok=True)
            lock.release()
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # something is in it
                break


def _exists(path: Path) -> bool:
    with writing_to(path):
        return path.exists()


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        text = ""
    return f"a folder in which process {text or 'of unknown number'} is working"
