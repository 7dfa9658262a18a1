"""The command line, as a user meets it."""

from __future__ import annotations

import builtins
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tad_plugin import __version__
from tad_plugin.cli import main
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.expert_run import NOT_FOR_EXPERTS
from tad_plugin.experiments.flags import NOT_FOR_EVALUATION
from tad_plugin.experiments.folder import RunFolder

TINY = [
    "--noise", "symmetric:0.4", "--per_class", "16", "--iterations", "2", "--eval_epochs", "2", "--eval_runs", "1",
    "--width", "4", "--loop.batch_real", "8",
]  # fmt: skip
METHODS = ["--methods", '{"tad": {"warmup": 1}, "scorer": {"epochs": 4, "width": 4, "batch_size": 32}}']
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


def helped(capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help_all"])
    assert caught.value.code == 0
    return capsys.readouterr().out


# help


def test_help_shows_what_a_newcomer_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    for word in (
        "distill",
        "evaluate",
        "compare",
        "methods",
        "--config",
        "patch",
        "run",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("verb", "own"),
    [
        ("distill", ["--arm", "--out", "--overwrite", "--ipc", "--seed", "clean-then-distil"]),
        ("experts", ["--arm", "--out", "--jobs", "--overwrite", "--epochs", "--pilots"]),
        ("evaluate", ["synthetic", "--out"]),
        ("compare", ["--arms", "--seeds", "--ipc", "--jobs", "--launcher", "--out", "--pictures", "loss-prune"]),
    ],
)
def test_help_of_every_verb_names_and_explains_its_flags(
    verb: str, own: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(capsys, verb)
    skipped = {"compare": {"ipc", "seed"}, "experts": NOT_FOR_EXPERTS, "evaluate": NOT_FOR_EVALUATION}.get(verb, set())
    flags = [f"--{f.name}" for f in dataclasses.fields(RunConfig) if f.name not in skipped]
    for word in (*flags, *own, "--config", f"usage: tad-plugin {verb}"):
        assert word in text
    # every flag has an explanation, not its type alone
    words = " ".join(text.split())
    for flag in flags:
        after = words.split(f"{flag} ", 1)[1].split("(type:", 1)[0]
        assert len(after.split()) > 3, flag


def test_methods_lists_every_method_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for word in ("tad: ", "iwd: ", "oracle: ", "loss-prune: ", "recall_precision = 0.9", "folds = 4", "baselines: dm"):
        assert word in text
    helped(capsys, "methods")


def test_the_version_is_told_and_a_module_run_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.strip() == f"tad_plugin {__version__}"
    command = [sys.executable, "-m", "tad_plugin.cli", "compare", "--arms", "nosy", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "'noisy'" in done.stderr and "Traceback" not in done.stderr


# runs


def test_compare_writes_everything_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", *TINY, *METHODS, "--arms", "noisy,tad", "--seeds", "1", "--ipc", "1", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    for name in ("results.json", "table.txt", "table.md", "index.html"):
        assert (out / name).stat().st_size > 100
    pictures = {p.name for p in (out / "pictures").iterdir()}
    assert pictures >= {
        "accuracy-ipc1.svg", "classes.svg", "synthetic-ipc1.svg", "trusted-tad.svg", "losses-tad.svg", "noise.svg",
    }  # fmt: skip
    assert 'href="tad/ipc1/seed0/"' in (out / "index.html").read_text()
    assert (out / "table.txt").read_text().strip() in text
    found = json.loads((out / "results.json").read_text())
    assert [r["arm"] for r in found] == ["noisy", "tad"] and all(r["iterations"] == 2 for r in found)
    for r in found:
        assert len(r["class_accuracy"]) == 10 and all(0 <= share <= 100 for share in r["class_accuracy"])
        assert r["curve"] is None or len(r["curve"]["test"]) == len(r["curve"]["heldout"]) > 1
    assert main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    assert 'href="../out/tad/ipc1/seed0/"' in (tmp_path / "again" / "index.html").read_text()
    assert RunFolder(out / "tad" / "ipc1" / "seed0").config()["loop"]["batch_real"] == 8
    before = (out / "noisy" / "ipc1" / "seed0" / "results.json").stat().st_mtime_ns
    assert main([*command[:-6], "--seeds", "0,1", "--ipc", "1", "--out", str(out), "--pictures", "false"]) == 0
    assert (out / "noisy" / "ipc1" / "seed0" / "results.json").stat().st_mtime_ns == before
    assert len(json.loads((out / "results.json").read_text())) == 4


def test_a_failed_run_is_printed_and_the_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    blocked = out / "tad" / "ipc1" / "seed0"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("arm: other\n")
    command = ["compare", *TINY, *METHODS, "--arms", "random,tad", "--seeds", "1", "--ipc", "1", "--out", str(out)]
    assert main([*command, "--pictures", "false"]) == 1
    captured = capsys.readouterr()
    assert "arm tad, IPC 1, seed 0: " in captured.err and "there 'other'" in captured.err
    assert "1 of 2 runs" in captured.err and str(out / "failures.txt") in captured.err
    assert "1 of 2 runs" not in captured.out
    assert "random" in captured.out and (out / "failures.txt").is_file()
    assert [r["arm"] for r in json.loads((out / "results.json").read_text())] == ["random"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "run"
    assert main(["distill", *TINY, "--arm", "noisy", "--ipc", "1", "--seed", "4", "--out", str(folder)]) == 0
    return folder


def test_distill_then_evaluate(distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = RunFolder(distilled).results()
    assert found["seed"] == 4 and found["noise"]["realised_rate"] > 0.2
    flags = ["--eval_network", "mlp,convnet", "--eval_epochs", "2", "--eval_runs", "2", "--width", "4"]
    path = tmp_path / "found.json"
    assert main(["evaluate", str(distilled / "synthetic.safetensors"), *flags, "--out", str(path)]) == 0
    text = capsys.readouterr().out
    values = json.loads(path.read_text())
    assert set(values) == {"mlp", "convnet"} and len(values["mlp"]["accuracies"]) == 2
    assert f"{values['mlp']['mean']:.2f}" in text and "2 networks" in text


def test_evaluating_on_other_data_is_an_error_not_a_low_accuracy(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = distilled / "synthetic.safetensors"
    assert main(["evaluate", str(path), "--dataset", "cifar10"]) == 2
    assert "'cifar10'" in (err := capsys.readouterr().err) and "--dataset digits" in err
    folder = dataclasses.replace(SyntheticSet.load(path), dataset="folder:flowers")
    folder.save(tmp_path / "f.safetensors")
    assert main(["evaluate", str(tmp_path / "f.safetensors"), "--dataset", "folder:/elsewhere/birds.zip"]) == 2
    assert "'folder:flowers'" in (err := capsys.readouterr().err)
    assert "'folder:birds'" in err and "--dataset folder:PATH" in err
    (tmp_path / "garbage").write_bytes(b"\0" * 64)
    for bad in ("garbage", "nothing"):
        assert main(["evaluate", str(tmp_path / bad)]) == 2
        assert bad in capsys.readouterr().err


def test_the_same_folder_with_other_flags_is_refused(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", *TINY, "--arm", "noisy", "--ipc", "1", "--out", str(distilled)]
    assert main([*command, "--seed", "5"]) == 2
    assert "seed: there 4, now 5" in (err := capsys.readouterr().err) and "--overwrite" in err
    assert main([*command, "--seed", "4"]) == 0
    assert "synthetic set:" in capsys.readouterr().out


def test_settings_come_from_yaml_and_flags_after_it_win(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "noise": "pair:0.3", "per_class": 16, "iterations": 1, "eval_epochs": 1, "eval_runs": 1, "width": 4, "ipc": 1,
        "arm": "tad", "loop": {"momentum": 0.1}, "methods": {"tad": {"warmup": 2}}, "seed": 3,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    assert main(["distill", "--config", str(tmp_path / "c.yaml"), "--seed", "7", "--out", str(out)]) == 0
    found = RunFolder(out).config()
    assert found["seed"] == 7 and found["noise"] == "pair:0.3" and found["arm"] == "tad"
    assert found["loop"]["momentum"] == 0.1 and found["methods"]["tad"]["warmup"] == 2
    assert NoiseSpec.parse(found["noise"]).kind == "pair"


def test_zero_takes_the_preset_and_a_loop_setting_reaches_the_loop(tmp_path: Path) -> None:
    flags = ["--iterations", "1", "--width", "0", "--lr_img", "0", "--loop.batch_real", "8", "--per_class", "16"]
    flags += ["--eval_epochs", "1", "--eval_runs", "1", "--ipc", "1"]
    assert main(["distill", *flags, "--arm", "noisy", "--out", str(tmp_path)]) == 0
    found = RunFolder(tmp_path).config()
    assert (found["width"], found["lr_img"], found["loop"]) == (32, 1.0, {"batch_real": 8})


# mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "nosy"], "'noisy'"),
        (["--seeds", "many"], "--seeds"),
        (["--seeds", "0"], "--seeds"),
        (["--ipc", "ten"], "--ipc"),
        (["--dataset", "digit"], "'digits'"),
        (["--baseline", "dmm"], "'dmm'"),
        (["--noise", "symetric:0.4"], "symetric"),
        (["--loop.batch", "3"], "'dm'"),
        (["--methods", '{"tad": {"warm": 3}}'], "warm"),
        (["--eval_network", "mpl"], "'mlp'"),
        (["--launcher", "slurm"], "--launcher"),
        (["--iterations", "-1"], "iterations"),
        (["--eval_runs", "-1"], "runs"),
        (["--holdout", "1.5"], "holdout"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *TINY, *METHODS, "--arms", "tad", "--out", str(tmp_path / "out"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tad-plugin: ") and message in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["compare"], ["compare", "--out", "x", "--iterations", "few"], []])
def test_what_the_parser_refuses_is_status_2_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "error" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("jsonargparse"):
            raise ImportError(name)
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["methods"]) == 2
    assert "pip install 'tad_plugin[reproduce]'" in capsys.readouterr().err


def test_an_interruption_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tad_plugin.experiments.run.load_noisy", interrupted)
    assert main(["distill", *TINY, "--out", str(tmp_path / "run")]) == 130
    assert "the same command" in capsys.readouterr().err


def test_nothing_was_drawn_from_the_global_generator_by_the_parser(global_rng_untouched: None) -> None:
    assert torch.get_rng_state().shape and main(["methods"]) == 0
