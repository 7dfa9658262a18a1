"""The short help, methods explained, and ten typical mistakes with their suggestions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tad_plugin.cli import main
from tad_plugin.core.registry import available_methods
from tad_plugin.errors import FileFormatError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.evaluated import evaluated
from tad_plugin.utils.files import yaml_text

VERBS = ["distill", "compare", "experts", "evaluate", "influence", "audit", "export", "reproduce", "report", "methods"]


@pytest.mark.parametrize("verb", [[], *([v] for v in [*VERBS, "patch", "run"])], ids=lambda v: "-".join(v) or "top")
def test_help_fits_a_screen_and_names_the_first_flags(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    for word in {"distill": ["--arm", "--out"], "compare": ["--arms", "--seeds"], "audit": ["--fix"]}.get(
        "".join(verb), []
    ):
        assert word in text
    if not verb:
        assert all(name in text for name in VERBS)


@pytest.mark.parametrize("name", available_methods())
def test_methods_are_explained_setting_by_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0
    text = capsys.readouterr().out
    if name == "tad":
        assert "threshold = 0.5; in (0, 1)" in text and "weighting = 'soft'; out of hard, soft" in text
        assert "posterior above which a sample is trusted" in text
    assert text.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["distil", "--out", "x"], "distill"),
        (["compare", "--arm", "tad", "--out", "x"], "--arms"),
        (["distill", "--itertions", "5", "--out", "x"], "--iterations"),
        (["distill", "--arm", "tda", "--out", "x"], "'tad'"),
        (["compare", "--arms", "noisy,clean-then-distill", "--out", "x"], "clean-then-distil"),
        (["distill", "--dataset", "cifar-10", "--out", "x"], "cifar10"),
        (["distill", "--noise", "symetric:0.4", "--out", "x"], "symmetric"),
        (["distill", "--baseline", "dmm", "--out", "x"], "dm"),
        (["distill", "--eval_network", "convnt", "--out", "x"], "convnet"),
        (["methods", "tadd"], "tad"),
        (["reproduce", "reproduce/tad_cifar10.yaml", "--size", "smok"], "smoke"),
        (["evaluate", "x", "--overwite"], "evaluate"),
    ],
)
def test_typical_mistakes_are_answered_with_what_was_meant(
    argv: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert suggestion in error and "Traceback" not in error and not Path("x").exists()


def test_a_run_folder_brings_its_own_settings(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"synthetic\.safetensors"):
        evaluated(RunConfig(), tmp_path)
    (tmp_path / "synthetic.safetensors").write_bytes(b"")
    (tmp_path / "config.yaml").write_text(yaml_text({"dataset": "svhn", "width": 16, "eval_epochs": 7, "ipc": 3}))
    config, file = evaluated(RunConfig(eval_epochs=9), tmp_path)
    assert (config.dataset, config.width, config.eval_epochs) == ("svhn", 16, 9) and config.ipc == RunConfig.ipc
    assert file == tmp_path / "synthetic.safetensors"
    assert evaluated(RunConfig(), file) == (RunConfig(), file)
