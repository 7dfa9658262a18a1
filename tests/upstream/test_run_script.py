"""Running scripts of other codebases: as from their own folder, repeatably, and without a trace."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tad_plugin.errors import InvalidInputError, PatchError
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tests.upstream.scripts import script


def test_a_script_runs_as_from_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
        import os, sys, helper
        assert __name__ == "__main__" and sys.path[0] == os.getcwd()
        print(helper.name, sys.argv[1:], os.path.basename(sys.argv[0]), os.path.basename(os.getcwd()))
        sys.exit(3)
    """
    found = script(tmp_path, text, "deep/main.py")
    (tmp_path / "deep" / "helper.py").write_text("name = 'own'\n")
    before = (list(sys.argv), list(sys.path), os.getcwd())
    assert run_script(found, ["--a", "1"]) == 3
    assert capsys.readouterr().out == "own ['--a', '1'] main.py deep\n"
    assert before == (sys.argv, sys.path, os.getcwd()) and "helper" not in sys.modules
    other = script(tmp_path / "other", "import helper; assert helper.name == 'another'", helper="name = 'another'")
    assert run_script(other) == 0
    assert run_script(script(tmp_path, "exit('unknown dataset')")) == 1
    assert capsys.readouterr().err == "unknown dataset\n"
    with pytest.raises(ZeroDivisionError):
        run_script(script(tmp_path, "1 / 0"))
    assert before == (sys.argv, sys.path, os.getcwd())


def test_folders_of_the_same_name_are_each_scripts_own(tmp_path: Path) -> None:
    """Found through a relative entry of the path, and without an __init__.py, as DATM has it."""
    text = "import sys\nsys.path.append('../')\nfrom shared.tools import name\nsys.exit(name)\n"
    for status in (3, 4):
        root = tmp_path / str(status)
        found = script(root, text, "deep/main.py")
        (root / "shared").mkdir()
        (root / "shared" / "tools.py").write_text(f"name = {status}\n")
        assert run_script(found) == status
    assert "shared" not in sys.modules and "shared.tools" not in sys.modules


DRAWS = """
    import random, sys, time
    import numpy as np, torch, helper
    torch.random.manual_seed(int(time.time() * 1000) % 100000)
    a = torch.rand(2).tolist()
    torch.random.manual_seed(int(helper.now() * 1000) % 100000)
    print(a, torch.rand(2).tolist(), np.random.rand(), random.random())
"""


def test_a_seeded_run_repeats_itself_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], global_rng_untouched: None
) -> None:
    found = script(tmp_path, DRAWS, helper="import time\ndef now():\n    return time.time()\n")
    out = []
    clock = time.time
    for seed in (0, 0, 1):
        run_script(found, seed=seed)
        out.append(capsys.readouterr().out)
        assert time.time is clock
    assert out[0] == out[1] != out[2]
    first, second = out[0].split("] [")
    assert first.strip("[") != second.split("]")[0]  # the clock goes on


def test_the_clock_of_others_goes_on(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    found = script(tmp_path / "root", "import other, time\nassert abs(other.now() - time.time()) > 1e6\n")
    script(outside, "pass", other="import time\ndef now():\n    return time.time()\n")
    sys.path.insert(0, str(outside))
    try:
        assert run_script(found, seed=0) == 0
    finally:
        sys.path.remove(str(outside))
        sys.modules.pop("other", None)


def test_the_random_state_of_this_process_survives_a_script_that_seeds(tmp_path: Path) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    run_script(script(tmp_path, "import random, torch\nrandom.seed(9)\ntorch.manual_seed(9)\n"), seed=4)
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


def test_bad_input_is_named(tmp_path: Path) -> None:
    found = script(tmp_path, "pass")
    with pytest.raises(InvalidInputError, match="-1"):
        run_script(found, seed=-1)
    with pytest.raises(PatchError, match="nothing.py"):
        Script.find(tmp_path, "nothing.py")


def test_a_script_outside_the_checkout_is_refused(tmp_path: Path) -> None:
    script(tmp_path, "pass", name="other.py")
    root = tmp_path / "checkout"
    script(root, "pass")
    (root / "link.py").symlink_to(tmp_path / "other.py")
    for name in ("../other.py", str(tmp_path / "other.py"), "link.py"):
        with pytest.raises(PatchError, match=r"other\.py"):
            Script.find(root, name)
    assert Script.find(root, "main.py").path == (root / "main.py").resolve()
