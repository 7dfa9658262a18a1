"""A corrected copy of an image folder. The original is never changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tad_plugin.data.image_tree import open_tree
from tad_plugin.errors import ConfigError, explain, unknown_name
from tad_plugin.experiments.audit.table import COLUMNS
from tad_plugin.utils.csv_file import write_csv
from tad_plugin.utils.files import atomic_save, atomic_write
from tad_plugin.utils.write_errors import writing_to

__all__ = ["FIXES", "check_fix", "write_corrected"]

FIXES = ("link", "copy", "move", "csv")
"""link: symbolic links to the kept and relabelled images. copy: copies of them. move: as copy, and the doubtful images
in a folder of their own beside them. csv: only a list of the corrected labels."""
_MARKER = "corrected.txt"


def check_fix(kind: str, to: str, dataset: str) -> None:
    """Checks the flags before anything runs.

    Raises:
        UnknownNameError: no such kind.
        ConfigError: no folder, one inside the original or around it, one that holds other files, or no image folder.
    """
    if kind not in FIXES:
        raise unknown_name("--fix", kind, FIXES)
    if not to:
        raise ConfigError(explain("--to FOLDER with --fix", "none", "Name the folder for the corrected images"))
    if not dataset.startswith("folder:"):
        do = "Use --dataset folder:PATH, or read suspects.csv"
        raise ConfigError(explain("an image folder with --fix", repr(dataset), do))
    source = Path(os.path.expanduser(dataset.removeprefix("folder:"))).resolve()
    target = Path(os.path.expanduser(to)).resolve()
    if target == source or source in target.parents or target in source.parents:
        do = "Choose a folder beside the original, which is never changed"
        raise ConfigError(explain(f"--to outside of {source}", str(target), do))
    if kind == "link" and source.is_file():
        raise ConfigError(explain("a folder with --fix link", f"the archive {source}", "Use --fix copy"))
    if target.is_dir() and any(target.iterdir()) and not (target / _MARKER).exists():
        do = "Pass another --to; files of others are not touched"
        raise ConfigError(explain(f"a new or empty folder {target}", "one with other files", do))


def write_corrected(rows: Sequence[Mapping[str, Any]], dataset: str, to: str, kind: str) -> dict[str, int]:
    """Writes the corrected dataset. A second call writes what is missing.

    Kept images stay in their class, relabelled ones go to the proposed class, dropped and unsure ones are left out.

    Args:
        rows: from :func:`tad_plugin.experiments.audit.table.suspect_rows`, with paths.
        dataset: "folder:PATH".
        to: folder for the result.
        kind: of ``FIXES``.

    Returns:
        Images written, by verdict.
    """
    source, target = Path(os.path.expanduser(dataset.removeprefix("folder:"))), Path(os.path.expanduser(to))
    counts: dict[str, int] = {}
    with writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        atomic_write(target / _MARKER, "Made by tad-plugin audit. The original images were not changed.\n")
    if kind == "csv":
        labelled = [_corrected(row) for row in rows if row["verdict"] in ("keep", "relabel")]
        for known in labelled:
            counts[known["verdict"]] = counts.get(known["verdict"], 0) + 1
        write_csv(labelled, COLUMNS, target / "labels.csv")
        return counts
    taken: set[str] = set()
    with open_tree(source) as tree:
        for row in sorted(rows, key=lambda row: str(row["path"])):
            place = _place(row, kind)
            if place is None:
                continue
            path = _free(target, place, int(row["index"]), taken)
            counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
            if path.exists() or path.is_symlink():
                continue
            with writing_to(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            file = row["path"] if not tree.flat else f"train/{row['path']}"
            if kind == "link":
                path.symlink_to((Path(tree.source) / tree.place(file)).resolve())
            else:

                def save(temporary: Path, name: str = file) -> None:
                    with tree.open(name) as read, open(temporary, "wb") as write:
                        shutil.copyfileobj(read, write)

                atomic_save(path, save)
    return counts


def _corrected(row: Mapping[str, Any]) -> dict[str, Any]:
    relabelled = row["verdict"] == "relabel"
    return {**row, "label": row["proposed"], "class": row["proposed_class"]} if relabelled else dict(row)


def _place(row: Mapping[str, Any], kind: str) -> PurePosixPath | None:
    """Where a row's image goes below the target; None leaves it out."""
    name = PurePosixPath(row["path"]).name
    if row["verdict"] == "keep":
        return PurePosixPath("train", row["class"], name)
    if row["verdict"] == "relabel":
        return PurePosixPath("train", row["proposed_class"], name)
    return PurePosixPath("doubtful", row["class"], name) if kind == "move" else None


def _free(target: Path, place: PurePosixPath, index: int, taken: set[str]) -> Path:
    """The path of an image; a name that another image has gets the sample's index."""
    if str(place) in taken:
        place = place.with_name(f"{place.stem}-{index}{place.suffix}")
    taken.add(str(place))
    return target / place
