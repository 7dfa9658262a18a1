"""A folder or a zip archive as a tree of regular files. A zip is read in place, nothing is unpacked."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tad_plugin.errors import FileFormatError, explain

__all__ = ["Tree", "TreeFile", "open_tree", "suffix_of"]

_LARGEST = 256 * 2**20
_NOT_REGULAR = "not a regular file"
_LOOP = "link to a folder above it"
_TWICE = "twice in the archive"


@dataclass(frozen=True)
class TreeFile:
    """A regular file of a tree.

    Attributes:
        size: bytes, uncompressed.
        identity: device and inode, equal for two links to one file; None in a zip.
        stamp: changes with the contents: the time of the last change in nanoseconds, in a zip the checksum.
    """

    size: int
    identity: tuple[int, int] | None = None
    stamp: int = 0


@dataclass(frozen=True)
class Tree:
    """The regular files of a folder or a zip archive, without hidden ones (".name", "__MACOSX").

    Attributes:
        source: the path, for messages.
        files: by relative name with "/", in the order of the names.
        folders: relative names of the folders. A zip knows only those that have an entry of their own.
        skipped: how many entries were passed over, by reason.
        open: opens a file for reading.
        prefix: what stands before the names in ``source``; "" if nothing does.
        flat: True if the class folders lie at the top, without a folder ``train``, which the names have all the same.
    """

    source: str
    files: Mapping[str, TreeFile]
    folders: tuple[str, ...]
    skipped: Mapping[str, int]
    open: Callable[[str], IO[bytes]]
    prefix: str = ""
    flat: bool = False

    def place(self, name: str) -> str:
        """Where the file ``name`` lies below ``source``."""
        return self.prefix + (name.split("/", 1)[1] if self.flat else name)

    def has(self, top: str) -> bool:
        """Whether a file or a folder lies below the folder ``top``."""
        return any(name.startswith(top + "/") for name in (*self.files, *self.folders))

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileFormatError: it cannot be read, or is larger than 256 MiB.
        """
        if (size := self.files[name].size) > _LARGEST:
            got = f"{size / 2**20:.0f} MiB in {self.source}:{name}"
            raise FileFormatError(explain(f"files of at most {_LARGEST >> 20} MiB", got, "Shrink or remove the file"))
        try:
            with self.open(name) as file:
                return file.read()
        except Exception as error:  # the decompressors raise whatever the bytes provoke
            do = "Restore the file. Unpack an encrypted archive first"
            raise FileFormatError(explain("a readable file", f"{self.source}:{name}: {error}", do)) from error


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, or "no suffix"."""
    return PurePosixPath(name).suffix.lower() or "no suffix"


@contextmanager
def open_tree(path: str | Path, marker: str = "train") -> Iterator[Tree]:
    """Opens the tree whose top holds the folder ``marker``: ``path`` itself, or the single folder in it.

    Links are followed, except links to a folder above them.

    Raises:
        FileFormatError: missing, neither a folder nor a zip, unreadable, or without ``marker``.
    """
    path = Path(path)
    if path.is_dir():
        files, folders, skipped = _walk(path)
        yield _rooted(Tree(str(path), files, tuple(folders), skipped, lambda name: (path / name).open("rb")), marker)
        return
    if not path.is_file():
        do = "Check the path. It is relative to the working directory"
        raise FileFormatError(explain("an image folder or a zip of one", f"no folder or file at {path.absolute()}", do))
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # the parser raises whatever the bytes provoke
        do = "Pass a folder or a zip. Download the zip again if it is cut off"
        raise FileFormatError(explain("an image folder or a zip of one", f"{path}: {error}", do)) from error
    with archive:
        files, folders, skipped = _entries(archive)
        yield _rooted(Tree(str(path), files, tuple(folders), skipped, archive.open), marker)


def _hidden(part: str) -> bool:
    # Finder and Explorer leave files of their own in folders and archives.
    return part.startswith((".", "__MACOSX"))


def _walk(folder: Path) -> tuple[dict[str, TreeFile], list[str], Counter[str]]:
    files: dict[str, TreeFile] = {}
    folders: list[str] = []
    skipped: Counter[str] = Counter()

    def visit(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if _hidden(entry.name):
                    continue
                try:
                    found = os.stat(entry.path)
                except OSError:  # a link that leads nowhere
                    skipped[_NOT_REGULAR] += 1
                    continue
                identity = (found.st_dev, found.st_ino)
                if stat.S_ISREG(found.st_mode):
                    files[name] = TreeFile(found.st_size, identity, found.st_mtime_ns)
                elif not stat.S_ISDIR(found.st_mode):
                    skipped[_NOT_REGULAR] += 1
                elif identity in above:
                    skipped[_LOOP] += 1
                else:
                    folders.append(name)
                    visit(entry.path, name + "/", above | {identity})

    try:
        top = os.stat(folder)
        visit(str(folder), "", frozenset({(top.st_dev, top.st_ino)}))
    except (OSError, RecursionError) as error:
        do = "Check the permissions and the links"
        raise FileFormatError(explain(f"readable folders below {folder}", str(error), do)) from error
    return files, folders, skipped


def _entries(archive: zipfile.ZipFile) -> tuple[dict[str, TreeFile], list[str], Counter[str]]:
    files: dict[str, TreeFile] = {}
    folders: list[str] = []
    skipped: Counter[str] = Counter()
    for entry in archive.infolist():
        name = entry.filename.rstrip("/")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if any(map(_hidden, name.split("/"))):
            continue
        if entry.is_dir():
            folders.append(name)
        elif kind not in (0, stat.S_IFREG):
            skipped[_NOT_REGULAR] += 1
        else:
            skipped[_TWICE] += name in files
            files[name] = TreeFile(entry.file_size, None, entry.CRC)  # reading takes the last entry of a name
    return files, folders, skipped


def _rooted(tree: Tree, marker: str) -> Tree:
    """The same tree seen from the folder that holds ``marker``."""
    every = [*tree.files, *(folder + "/" for folder in tree.folders)]
    tops = {name.split("/", 1)[0] for name in every if "/" in name}
    prefix = ""
    if marker not in tops and _is_flat(tree, tops):
        files = {f"{marker}/{n}": file for n, file in tree.files.items() if "/" in n}
        skipped = Counter(tree.skipped) + Counter(suffix_of(n) for n in tree.files if "/" not in n)
        folders = tuple(f"{marker}/{f}" for f in tree.folders)
        return Tree(tree.source, files, folders, skipped, lambda name: tree.open(name.split("/", 1)[1]), "", True)
    if marker not in tops:
        below = {n.split("/", 2)[0] for n in every if n.count("/") >= 2 and n.split("/", 2)[1] == marker}
        if len(below) != 1:
            found = ", ".join(sorted(tops)[:8]) or "no folder"
            do = "Arrange the images as <class>/*, or as train/<class>/* and test/<class>/*"
            raise FileFormatError(explain(f"a folder '{marker}' in {tree.source}", found, do))
        prefix = below.pop() + "/"
    skipped = Counter(tree.skipped)
    skipped.update(suffix_of(name) for name in tree.files if not name.startswith(prefix))
    files = {n.removeprefix(prefix): tree.files[n] for n in sorted(tree.files) if n.startswith(prefix)}
    folders = tuple(sorted(f.removeprefix(prefix) for f in tree.folders if f.startswith(prefix)))
    return Tree(tree.source, files, folders, +skipped, lambda name: tree.open(prefix + name), prefix)


def _is_flat(tree: Tree, tops: Collection[str]) -> bool:
    """Whether the class folders lie at the top: at least two, each with files of its own, and none named as a split."""
    own = {name.split("/")[0] for name in tree.files if name.count("/") == 1}
    return len(tops) > 1 and set(tops) == own and not set(tops) & {"train", "test", "val"}
