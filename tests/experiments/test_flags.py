"""Flags without effect, close names, plain switches, and the flags that messages name."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.cli import _parser, main
from tad_plugin.core.hook.attach import add_arguments
from tad_plugin.data.noise.spec import KINDS
from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import ConfigError, MissingExtraError, UnknownNameError, unknown_name
from tad_plugin.experiments.arms import ARMS
from tad_plugin.experiments.config import VERDICT, RunConfig
from tad_plugin.experiments.flags import (
    NOT_FOR_EVALUATION,
    check_distill_flags,
    check_evaluate_flags,
    check_expert_flags,
)
from tad_plugin.experiments.parser import flags_of, with_switches
from tests import ROOT

TAD, IWD, SCORER = {"tad": {"warmup": 1}}, {"iwd": {"every": 2}}, {"scorer": {"epochs": 9}}
MTT = {"baseline": "mtt"}


@pytest.mark.parametrize(
    ("change", "without", "with_effect"),
    [
        ({"root": "/data"}, {}, {"dataset": "cifar10"}),
        ({"root": "/data"}, {"dataset": "digits"}, {"dataset": "folder:x"}),
        ({"methods": TAD}, {"arms": ["noisy", "iwd"]}, {"arms": ["noisy", "tad+iwd"]}),
        ({"methods": IWD}, {"arms": ["tad"]}, {"arms": ["iwd"]}),
        ({"methods": SCORER}, {"arms": ["noisy", "oracle"]}, {"arms": ["loss-prune"]}),
        ({"methods": SCORER}, {"arms": ["tad"], **MTT}, {"arms": ["tad"]}),
        ({"iterations": 3}, {"arms": ["random"]}, {"arms": ["random", "noisy"]}),
        ({"lr_img": 3.0}, {"arms": ["random"]}, {}),
        ({"loop": {"momentum": 0.1}}, {"arms": ["random"]}, {}),
        ({"candidates": 5}, {"holdout": 0.0}, {"holdout": 0.2}),
        ({"candidates": 5}, {"arms": ["random"]}, {}),
        ({"eval_lr": 0.1}, MTT, {}),
        ({"loop": {"buffer": "b", "experts": {"lr": 0.1}}, **MTT}, {}, {"arms": ["iwd"]}),
        ({"loop": {"experts": {"pilots": 2}}, **MTT}, {"arms": ["noisy"]}, {"arms": ["tad"]}),
        ({"shared": "s"}, {"arms": ["noisy", "clean", "iwd"]}, {"arms": ["noisy", "tad"]}),
        ({"shared": "s"}, {"arms": ["random"]}, {"arms": ["noisy"], **MTT}),
        ({"shared": "s", "methods": {"scorer": {"refresh_every": 2}}}, {"arms": ["tad"]}, {"arms": ["tad"], **MTT}),
    ],
)
def test_a_setting_without_effect_is_refused(change: Any, without: Any, with_effect: Any) -> None:
    def check(**given: Any) -> None:
        arms, shared = given.pop("arms", ["noisy"]), given.pop("shared", "")
        check_distill_flags(RunConfig(**given), arms, shared)

    with pytest.raises(ConfigError):
        check(**{**change, **without})
    if "refresh_every" in str(change):  # there the loop's own networks decide, and the scorer's settings go
        change = {"shared": "s"}
    check(**{**change, **with_effect})


def test_flags_of_experts_and_of_evaluations() -> None:
    for config, experts, arm in (
        (RunConfig(ipc=3), ExpertConfig(), "noisy"),
        (RunConfig(ipc=3), ExpertConfig(), "oracle"),
        (RunConfig(), ExpertConfig(pilots=2), "iwd"),
        (RunConfig(), ExpertConfig(alpha=0.1), "tad"),
        (RunConfig(), ExpertConfig(adaptive=False), "tad"),
        (RunConfig(methods=SCORER), ExpertConfig(), "tad"),
    ):
        with pytest.raises(ConfigError):
            check_expert_flags(config, experts, arm)
    check_expert_flags(RunConfig(ipc=3), ExpertConfig(pilots=2, rho=0.1, alpha=0.1), "tad")
    for config, rate in ((RunConfig(per_class=5), None), (RunConfig(eval_lr=0.1), 0.01), (RunConfig(root="x"), None)):
        with pytest.raises(ConfigError):
            check_evaluate_flags(config, rate)
    check_evaluate_flags(RunConfig(dataset="folder:x", per_class=5, eval_lr=0.1), None)


def test_every_setting_is_decided() -> None:
    """A new setting must be looked at: either a rule above concerns it, or it always has an effect."""
    ruled = {"root", "methods", "iterations", "lr_img", "loop", "candidates", "eval_lr", "labels", *VERDICT}
    always = {
        "baseline", "dataset", "per_class", "holdout", "noise", "zca", "image_size", "ipc", "width", "eval_network",
        "eval_epochs", "eval_runs", "seed", "device", "checkpoint_seconds", "storage",
        "memory_budget", "precision", "compile",
    }  # fmt: skip
    names = {f.name for f in dataclasses.fields(RunConfig)}
    assert names == ruled | always and names > NOT_FOR_EVALUATION


# names


@pytest.mark.parametrize(
    ("argv", "close"),
    [
        (["distil", "--out", "x"], "'distill'"),
        (["distill", "--iteration", "3", "--out", "x"], "'--iterations'"),
        (["compare", "--arm", "tad", "--out", "x"], "'--arms'"),
        (["distill", "--arm", "tdd", "--out", "x"], "'tad'"),
        (["distill", "--noise", "symetric:0.4", "--out", "x"], "'symmetric'"),
        (["distill", "--loop.batch_reel", "3", "--out", "x"], "'batch_real'"),
        (["distill", "--methods", '{"tad": {"warmpu": 3}}', "--arm", "tad", "--out", "x"], "'warmup'"),
        (["evaluate", "x", "--noise", "none"], "no effect"),
    ],
)
def test_close_names_are_suggested(argv: list[str], close: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert close in err and err.count("\n") == 1


def test_a_close_key_of_a_file_is_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("iteration: 3\n")
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])
    assert caught.value.code == 2 and "'iterations'" in capsys.readouterr().err


def test_unknown_names_are_listed_once_with_their_article() -> None:
    text = str(unknown_name("arm", "zzz", [*ARMS, "tad", "halves"]))
    assert text.startswith("Expected an arm out of ") and text.count("halves") == 1
    assert text.split(" but got")[0].split(", ").count("tad") == 1 and "install" not in text
    assert "install" in str(unknown_name("method", "zzz", ["tad"]))
    assert isinstance(unknown_name("kind", "x", KINDS), UnknownNameError)


def test_switches_need_no_value() -> None:
    given = ["distill", "--zca", "--overwrite", "--out", "x", "--loop.full_batches", "--pictures", "false"]
    assert with_switches(given) == [
        "distill", "--zca", "true", "--overwrite", "true", "--out", "x", "--loop.full_batches", "true",
        "--pictures", "false",
    ]  # fmt: skip
    assert with_switches(["--overwrite"]) == ["--overwrite", "true"]
    assert with_switches(["evaluate", "--decay", "FILE", "--zca=false"])[1:] == [
        "--decay",
        "true",
        "FILE",
        "--zca=false",
    ]
    values = _parser().parse_args(with_switches(["distill", "--zca", "--overwrite", "--out", "x"]))["distill"]
    assert values.zca is True and values.overwrite is True


# packages


@pytest.mark.parametrize(
    ("package", "more"), [("matplotlib", ()), ("jinja2", ()), ("cleanlab", ("--arms", "clean-then-distil"))]
)
def test_a_missing_package_is_named_before_anything_runs(
    package: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    for module in ("flags", "plan"):
        name = f"tad_plugin.experiments.{module}.find_spec"
        monkeypatch.setattr(name, lambda p: None if p == package else original(p))
    monkeypatch.setattr("tad_plugin.experiments.compare.compare", None)
    seen: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *a, **_: seen.append(str(a[0])))
    assert main(["compare", "--out", str(tmp_path / "out"), *more]) == 2
    assert package in seen[0] and "tad_plugin[reproduce]" in seen[0] and not (tmp_path / "out").exists()
    assert issubclass(MissingExtraError, ImportError)


# messages


def strings(path: Path) -> list[str]:
    """All texts of a module, docstrings included; the parts of an f-string one by one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_every_flag_that_a_text_names_exists() -> None:
    import argparse

    parser = _parser()
    scripts = set(flags_of(add_arguments(argparse.ArgumentParser())))
    scripts |= {"--upstream", "--seed", "--with", "--without", "--patches", "--long"}
    scripts |= {"--files", "--edited", "--repository", "--commit"}  # of tad-plugin patch
    # of other programs: git, pip, and the public codebases' own
    foreign = {"--no-ext-diff", "--no-textconv", "--c"}  # --c0: a colour of a picture
    scripts |= {"--help_all", "--loop.help", "--print_"}  # answered before the parser, and not shown
    known = set(flags_of(parser)) | scripts
    loops = {f"--loop.{name}" for name in loop_settings()}
    wrong = []
    for path in sorted((ROOT / "tad_plugin").rglob("*.py")):
        for text in strings(path):
            for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", text):
                flag = flag.rstrip(".-")
                if flag not in known | loops | foreign | {"--loop", "--methods", "--loop.experts"}:
                    wrong.append(f"{path.relative_to(ROOT)}: {flag}")
    assert not wrong


def loop_settings() -> set[str]:
    from tad_plugin.distill.baseline import BASELINES, baseline_class

    return {f.name for name in BASELINES for f in dataclasses.fields(baseline_class(name).Config)} | {"preset"}


def test_every_flag_of_a_verbs_own_message_is_that_verbs() -> None:
    """Commands that a text spells out whole, "tad-plugin VERB ... --flag": each flag is one of the verb's."""
    parser, wrong = _parser(), []
    for path in [*(ROOT / "tad_plugin").rglob("*.py"), *(ROOT / "tad_plugin").rglob("*.md"), ROOT / "README.md"]:
        for verb, rest in re.findall(
            r"tad-plugin (distill|experts|compare|evaluate|influence) ([^\n`\"]*)", path.read_text()
        ):
            known = flags_of(parser, verb)
            found = re.findall(r"(?<![\w-])--[A-Za-z]\w*(?![\w.])", rest)
            wrong += [f"{path.name}: {verb} {flag}" for flag in found if flag not in known]
    assert not wrong
