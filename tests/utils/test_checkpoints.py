from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tad_plugin.errors import FileFormatError, InvalidInputError, TadPluginWarning
from tad_plugin.utils.checkpoints import CheckpointSlots
from tad_plugin.utils.files import file_digest, read_json
from tad_plugin.utils.seals import sealed_json
from tests.warm import start_program


def test_a_whole_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
    parameter.sum().backward()
    optimizer.step()
    tree = {
        "images": torch.randn(2, 3, generator=generator),
        "half": torch.randn(4, generator=generator).half(),
        "labels": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "optimizer": optimizer.state_dict(),
        "network": torch.nn.Linear(2, 2).state_dict(),
        "generator": generator.get_state(),
        "nested": [1, 2.5, "x", None, (True, torch.Size([1, 2])), OrderedDict(a=torch.float16)],
        0: float("inf"),
    }
    slots = CheckpointSlots(tmp_path / "checkpoint")
    slots.save(tree, 7, log_bytes=11)
    found = CheckpointSlots(tmp_path / "checkpoint").load()
    assert found is not None and (found.step, found.log_bytes) == (7, 11)
    assert_equal(found.tree, tree)
    again = torch.Generator()
    again.set_state(found.tree["generator"])
    assert torch.equal(torch.rand(4, generator=again), torch.rand(4, generator=generator))


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [0, np.float64(1.0)]}, r"numpy\.float64 at tree\['a'\]\[1\]"),
        ({"a": defaultdict(int)}, r"collections\.defaultdict at tree\['a'\]"),
        ({"path": Path("x")}, r"tree\['path'\]"),
        ({np.int64(1): 0}, "a key of tree"),
        (np.zeros(2), "numpy.ndarray at tree"),
    ],
)
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CheckpointSlots(tmp_path).save(tree, 1)
    assert CheckpointSlots(tmp_path).load() is None


def test_slots_alternate_and_the_newest_wins_also_across_processes(tmp_path: Path) -> None:
    for step in range(1, 6):
        CheckpointSlots(tmp_path).save({"step": step}, step)  # a new object each time, as after a restart
        found = CheckpointSlots(tmp_path).load()
        assert found is not None and found.step == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.json", "A.pt", "B.json", "B.pt"]
    steps = {json.loads((tmp_path / f"{slot}.json").read_text())["step"] for slot in "AB"}
    assert steps == {4, 5}


def test_the_newest_is_the_one_written_last_even_at_a_lower_step(tmp_path: Path) -> None:
    slots = CheckpointSlots(tmp_path)
    slots.save({}, 100)
    slots.save({}, 5)
    found = CheckpointSlots(tmp_path).load()
    assert found is not None and found.step == 5


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    """The data files of the newer (step 2) and the older (step 1) of two checkpoints."""
    slots = CheckpointSlots(folder)
    slots.save({"x": torch.zeros(100)}, 1)
    slots.save({"x": torch.ones(100)}, 2)
    return folder / "B.pt", folder / "A.pt"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def remove(path: Path) -> None:
    path.unlink()


def spoil_side(path: Path) -> None:
    path.with_suffix(".json").write_text('{"step": 2')


def other_version(path: Path) -> None:
    side = path.with_suffix(".json")
    side.write_text(sealed_json({**read_json(side), "version": 99}))


@pytest.mark.parametrize("damage", [truncate, flip, remove, spoil_side, other_version])
def test_a_damaged_newest_falls_back_to_the_older_with_a_warning(tmp_path: Path, damage: Any) -> None:
    newer, _ = two_checkpoints(tmp_path)
    damage(newer)
    slots = CheckpointSlots(tmp_path)
    with pytest.warns(TadPluginWarning, match=r"step 1.*B\."):
        found = slots.load()
    assert found is not None and found.step == 1 and torch.equal(found.tree["x"], torch.zeros(100))
    slots.save({"x": torch.full((1,), 3.0)}, 3)  # must take the damaged slot, not the only good one
    assert json.loads((tmp_path / "A.json").read_text())["step"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CheckpointSlots(tmp_path).load()
    assert found is not None and found.step == 3


@pytest.mark.parametrize("damage", [truncate, flip, remove, spoil_side, other_version])
def test_two_damaged_slots_are_an_error(tmp_path: Path, damage: Any) -> None:
    for data in two_checkpoints(tmp_path):
        damage(data)
    with pytest.raises(FileFormatError, match="--overwrite"):
        CheckpointSlots(tmp_path).load()


def test_saving_without_loading_spares_the_good_slot(tmp_path: Path) -> None:
    newer, older = two_checkpoints(tmp_path)
    truncate(newer)
    CheckpointSlots(tmp_path).save({}, 3)
    assert older.exists() and json.loads(older.with_suffix(".json").read_text())["step"] == 1


def test_a_slot_without_side_information_is_unfinished_not_damaged(tmp_path: Path) -> None:
    newer, older = two_checkpoints(tmp_path)
    newer.with_suffix(".json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CheckpointSlots(tmp_path).load()
        assert found is not None and found.step == 1
        older.with_suffix(".json").unlink()
        assert CheckpointSlots(tmp_path).load() is None


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    """A checkpoint is a file from outside as well: one that carries code must not run it."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    slots = CheckpointSlots(tmp_path / "c")
    slots.save({}, 1)
    torch.save(Evil(), tmp_path / "c" / "A.pt")
    data = tmp_path / "c" / "A.pt"
    side = data.with_suffix(".json")
    information = {**read_json(side), "bytes": data.stat().st_size, "sha256": file_digest(data)}
    side.write_text(sealed_json(information))
    with pytest.raises(FileFormatError, match="A.pt"):
        CheckpointSlots(tmp_path / "c").load()
    assert not (tmp_path / "executed").exists()


def test_clear_removes_both(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    slots = CheckpointSlots(tmp_path)
    slots.clear()
    assert slots.load() is None and list(tmp_path.iterdir()) == []


KILLER = """
import os, random, signal, sys, time, warnings
import torch
from tad_plugin.experiments.folder import RunFolder

torch.set_num_threads(1)
warnings.simplefilter("error")  # a kill must not look like damage either
folder, rng, last = sys.argv[1], random.Random(0), 0


def write():
    run = RunFolder(folder)
    found = run.load_checkpoint()
    tree, step = found if found else ({"x": torch.zeros(50_000)}, 0)
    while True:
        step += 1
        tree["x"] += 1
        run.log({"step": step})
        run.save_checkpoint(tree, step)


for _ in range(25):
    child = os.fork()
    if child == 0:
        write()
    time.sleep(rng.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
    run = RunFolder(folder)
    found = run.load_checkpoint()
    tree, step = found if found else (None, 0)
    assert step >= last
    assert step == 0 or torch.equal(tree["x"], torch.full((50_000,), float(step)))
    assert [record["step"] for record in run.records()] == list(range(1, step + 1))
    last = step
print(last)
"""


def test_killed_at_any_moment_there_is_a_valid_checkpoint_and_a_matching_log(tmp_path: Path) -> None:
    process = start_program("tests.warm", KILLER, str(tmp_path / "run"), output=tmp_path / "output")
    assert process.wait() == 0, (tmp_path / "output").read_text()
    assert int((tmp_path / "output").read_text()) > 0
