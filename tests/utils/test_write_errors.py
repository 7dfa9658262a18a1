"""Errors of files that cannot be written: each gets a name."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from tad_plugin.errors import DiskSpaceError, FileWriteError, InvalidInputError, TadPluginError
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.write_errors import check_path, named_write_error, writing_to
from tests.warm import start_program

# Each writer under a limit of 4 KiB per file, as on a full disk: torch and safetensors raise errors of their own.
LIMITED = """
import resource, sys, torch
from pathlib import Path
from tad_plugin.errors import DiskSpaceError
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import atomic_write
from tad_plugin.utils.tensor_file import TensorFile
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder, big = Path(sys.argv[1]), torch.zeros(10_000)
for write in (
    lambda: CheckpointSlots(folder / "c").save({"x": big}, 1),
    lambda: TensorFile("f", "a file", "none").write(folder / "t.safetensors", {"x": big}, {}),
    lambda: atomic_write(folder / "text", "x" * 10_000),
):
    try:
        write()
    except DiskSpaceError as error:
        print("named")
print(sorted(p.name for p in folder.rglob("*") if p.is_file()))
"""


def test_every_writer_names_a_full_disk_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    process = start_program("tests.warm", LIMITED, str(tmp_path / "files"), output=tmp_path / "output")
    assert process.wait() == 0 and (tmp_path / "output").read_text().splitlines() == ["named"] * 3 + ["[]"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096  # only there


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.ENOSPC, DiskSpaceError),
        (errno.EDQUOT, DiskSpaceError),
        (errno.EFBIG, DiskSpaceError),
        (errno.EROFS, FileWriteError),
        (errno.EACCES, FileWriteError),
        (errno.EIO, FileWriteError),
        (errno.ENAMETOOLONG, InvalidInputError),
        (errno.ENOTDIR, InvalidInputError),
    ],
)
def test_each_fault_has_its_name(number: int, named: type[TadPluginError], tmp_path: Path) -> None:
    with pytest.raises(named) as caught, writing_to(tmp_path / "x"):
        raise OSError(number, "reason", "x")
    assert str(tmp_path / "x") in str(caught.value) and "reason" in str(caught.value)


def test_other_errors_keep_theirs(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), ValueError("no"), KeyError("x"), TimeoutError("late")):
        assert named_write_error(error, tmp_path) is None
        with pytest.raises(type(error)), writing_to(tmp_path):
            raise error


def test_paths_that_cannot_exist(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "x/" * 3000 + "y"):
        with pytest.raises(InvalidInputError):
            atomic_write(tmp_path / name, "text")
    for text in ("", "  ", "a\0b"):
        with pytest.raises(InvalidInputError, match="--out"):
            check_path(text, "--out")
    assert check_path("runs", "--out") == Path("runs")
