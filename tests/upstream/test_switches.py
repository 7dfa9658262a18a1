"""Running scripts of other codebases: each switch alone, only where it is needed, and gone afterwards."""

from __future__ import annotations

import os
import random
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage  # noqa: F401 - it may import its old name itself, and shall have done so before the tests look
import torch

from tad_plugin.cli import main
from tad_plugin.errors import InvalidInputError, PatchError, UnknownNameError
from tad_plugin.upstream import switches as compatibility
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.switches import SWITCHES, Script, needed_switches


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def script(folder: Path, text: str, name: str = "main.py", **others: str) -> Script:
    for file, content in {name: text, **{f"{k}.py": v for k, v in others.items()}}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(textwrap.dedent(content))
    return Script.find(folder, name)


def needed(found: Script, **given: Any) -> list[str]:
    return [s.name for s in needed_switches(found, **given)]


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


def test_an_ordinary_script_needs_no_switch_and_any_can_be_forced(tmp_path: Path) -> None:
    found = script(tmp_path, "import torch\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'\n")
    assert needed(found) == [] and needed(found, on=["cpu", "scipy"]) == ["cpu", "scipy"]
    moving = script(tmp_path, "net.cuda()\n")
    assert needed(moving) == ["cpu"] and needed(moving, off=["cpu"]) == []
    for wrong in ({"on": ["cup"]}, {"off": ["cup"]}):
        with pytest.raises(UnknownNameError, match="switch"):
            needed(found, **wrong)
    # an environment inside the checkout is none of its sources
    script(tmp_path, "net.cuda()", "venv/lib/site-packages/other.py")
    script(tmp_path, "net.cuda()", ".hidden/other.py")
    assert needed(script(tmp_path, "pass")) == []


def test_without_a_gpu_everything_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        import torch
        t, net = torch.ones(2), torch.nn.Linear(2, 2)
        assert t.cuda() is t and net.cuda() is net and net.to("cuda:0") is net
        assert t.to(torch.device("cuda")).device.type == "cpu" and t.to(device="cuda").device.type == "cpu"
        assert t.to(torch.float64).dtype == torch.float64 and t.to("cuda", torch.float16).dtype == torch.float16
    """
    found = script(tmp_path, text)
    assert needed(found) == ["cpu"]
    before = (torch.Tensor.to, torch.nn.Module.cuda)
    assert run_script(found, switches=needed_switches(found)) == 0
    assert before == (torch.Tensor.to, torch.nn.Module.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needed(Script.find(tmp_path, "main.py")) == []


def test_without_a_gpu_a_saved_epoch_is_a_copy(tmp_path: Path) -> None:
    text = """
        import torch
        net = torch.nn.Linear(2, 2)
        saved = [p.detach().cpu() for p in net.parameters()]
        with torch.no_grad():
            net.weight += 1
        assert not torch.equal(saved[0], net.weight)
    """
    found = script(tmp_path, text)
    assert needed(found) == ["cpu-copies"]
    with pytest.raises(AssertionError):
        run_script(found)
    assert run_script(found, switches=needed_switches(found)) == 0


def test_a_batch_of_one_can_be_broadcast_onto_itself(tmp_path: Path) -> None:
    text = """
        import torch
        def spread(x):
            x[:] = x[0]
            return x
        assert spread(torch.full((1, 1, 1, 1), 3.0)).item() == 3
        assert spread(torch.arange(3.0).view(1, 3)).tolist() == [[0, 1, 2]]
        assert spread(torch.arange(4.0).view(2, 2)).tolist() == [[0, 1], [0, 1]]
        a = torch.ones(2, requires_grad=True)
        b = a * 2
        b[1] = a[0] * 5
        b[:1] = b[1]
        b.sum().backward()
        assert a.grad.tolist() == [10, 0]
    """
    found = script(tmp_path, text)
    assert needed(found) == ["broadcast"]
    with pytest.raises(RuntimeError, match="single memory location"):
        run_script(found)
    assert run_script(found, switches=needed_switches(found)) == 0
    with pytest.raises(RuntimeError, match="single memory location"):
        run_script(found)


def test_wandb_is_disabled_unless_somebody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = script(tmp_path, "import os\nprint(os.environ['WANDB_MODE'])\ntry:\n  import wandb\nexcept Exception: 0\n")
    monkeypatch.setattr(compatibility, "_installed", lambda _: True)
    assert needed(found) == ["wandb"]
    assert run_script(found, switches=needed_switches(found)) == 0 and "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert needed(found) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert needed(found) == ["wandb"]
    with SWITCHES["wandb"].on(found):
        assert os.environ["WANDB_NAME"] == "main" and os.environ["WANDB_MODE"] == "offline"
    assert "WANDB_NAME" not in os.environ and os.environ["WANDB_MODE"] == "offline"


def test_where_wandb_is_missing_a_stand_in_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        import argparse
        import wandb
        wandb.init(project="x", config=argparse.Namespace(ipc=1, tad_state="s"))
        assert wandb.config._items == {"ipc": 1, "tad_state": "s"} and wandb.run.name == "main"
        wandb.log({"a": wandb.Histogram([1.0])}, step=3)
        wandb.finish()
    """
    monkeypatch.setattr(compatibility, "_installed", lambda _: False)
    monkeypatch.setenv("WANDB_API_KEY", "x")  # an account is of no use without the package
    found, before = script(tmp_path, text), sys.modules.get("wandb")
    assert needed(found) == ["wandb"] and run_script(found, switches=needed_switches(found)) == 0
    assert sys.modules.get("wandb") is before


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


def test_an_old_name_of_scipy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from scipy.ndimage.interpolation import rotate\nimport scipy.ndimage\nassert rotate is scipy.ndimage.rotate\n"
    )
    found = script(tmp_path, text)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert needed(found) == ["scipy"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert needed(found) == []
    before = sys.modules.get("scipy.ndimage.interpolation")
    assert run_script(found, switches=[SWITCHES["scipy"]]) == 0
    assert sys.modules.get("scipy.ndimage.interpolation") is before


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


def test_bad_input_is_named(tmp_path: Path) -> None:
    found = script(tmp_path, "pass")
    with pytest.raises(InvalidInputError, match="a seed in"):
        run_script(found, seed=-1)
    with pytest.raises(PatchError, match="the script nothing.py in .*, but got no such file"):
        Script.find(tmp_path, "nothing.py")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tmp_path, "import sys\nprint(sys.argv[1:])\nx = [0]\nif 0:\n    x[:] = x[0]\nsys.exit(5)\n")
    given = ["run", "--upstream", str(tmp_path)]
    assert main([*given, "--", "main.py", "--ipc", "1", "--", "--seed"]) == 5
    printed = capsys.readouterr()
    assert printed.out == "['--ipc', '1', '--', '--seed']\n" and "switch broadcast: t[:] = t[0] copies" in printed.err
    assert main([*given, "--seed", "1", "--without", "broadcast", "--with", "cpu", "--", "main.py"]) == 5
    assert capsys.readouterr().err.count("switch") == 1
    for rest, message in (
        ([], "a script after --"),
        (["--"], "a script after --"),
        (["--", "x.py"], "the script x.py"),
    ):
        assert main([*given, *rest]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SWITCHES)


def test_the_random_state_of_this_process_survives_a_script_that_seeds(tmp_path: Path) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    run_script(script(tmp_path, "import random, torch\nrandom.seed(9)\ntorch.manual_seed(9)\n"), seed=4)
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())
