"""Compatibility switches: each one alone, on only if it is needed, and gone afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import scipy.ndimage  # noqa: F401 - it may import its old name itself, so this comes before the tests
import torch

from tad_plugin.cli import main
from tad_plugin.errors import UnknownNameError
from tad_plugin.upstream import switches
from tad_plugin.upstream.run_script import run_script
from tad_plugin.upstream.script import Script
from tad_plugin.upstream.switches import SWITCHES, needed_switches
from tests.upstream.scripts import needed, script


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_an_ordinary_script_needs_no_switch_and_any_can_be_forced(tmp_path: Path) -> None:
    found = script(tmp_path, "import torch\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'\n")
    assert needed(found) == [] and needed(found, on=["cpu", "scipy"]) == ["cpu", "scipy"]
    moving = script(tmp_path, "net.cuda()\n")
    assert needed(moving) == ["cpu"] and needed(moving, off=["cpu"]) == []
    for wrong in ({"on": ["cup"]}, {"off": ["cup"]}):
        with pytest.raises(UnknownNameError, match="cup"):
            needed(found, **wrong)
    # an environment inside the checkout is not part of its sources
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
    monkeypatch.setattr(switches, "_installed", lambda _: True)
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
    monkeypatch.setattr(switches, "_installed", lambda _: False)
    monkeypatch.setenv("WANDB_API_KEY", "x")  # an account does not help without the package
    found, before = script(tmp_path, text), sys.modules.get("wandb")
    assert needed(found) == ["wandb"] and run_script(found, switches=needed_switches(found)) == 0
    assert sys.modules.get("wandb") is before


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


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tmp_path, "import sys\nprint(sys.argv[1:])\nx = [0]\nif 0:\n    x[:] = x[0]\nsys.exit(5)\n")
    given = ["run", "--upstream", str(tmp_path)]
    assert main([*given, "--", "main.py", "--ipc", "1", "--", "--seed"]) == 5
    printed = capsys.readouterr()
    assert printed.out == "['--ipc', '1', '--', '--seed']\n" and "switch broadcast: t[:] = t[0] copies" in printed.err
    assert main([*given, "--seed", "1", "--without", "broadcast", "--with", "cpu", "--", "main.py"]) == 5
    assert capsys.readouterr().err.count("switch") == 1
    for rest, message in (
        ([], "--"),
        (["--"], "--"),
        (["--", "x.py"], "x.py"),
    ):
        assert main([*given, *rest]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SWITCHES)
