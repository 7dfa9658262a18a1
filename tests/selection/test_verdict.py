"""The method that applies a verdict from a file: by attach, by flags of a script, and on the command line."""

from __future__ import annotations

import argparse
import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tad_plugin
from tad_plugin.cli import main
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.noise.spec import NoiseSpec
from tad_plugin.errors import ConfigError, NotEnoughSamplesError, StateMismatchError
from tad_plugin.experiments.folder import RunFolder

N, K = 60, 3
LABELS = torch.arange(N) % K
KEPT = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.6
FIXED = torch.where(KEPT, LABELS, (LABELS + 1) % K)


def started(method: str = "verdict", **more: object) -> Hook:
    return tad_plugin.attach(method, labels=LABELS, num_classes=K, **more)  # type: ignore[arg-type]


class Python(tad_plugin.Callback):
    """The same verdict, set in Python."""

    name = "python"

    def on_start(self, *, state: SampleState, data: object) -> None:
        state.update(trusted=KEPT)
        state.set_weights(self.name, KEPT.float())


class Relabelled(tad_plugin.Callback):
    name = "relabelled"

    def on_start(self, *, state: SampleState, data: object) -> None:
        state.update(target=FIXED)


def by_python(callback: tad_plugin.Callback) -> Hook:
    return Hook(SampleState(LABELS, K), None, [callback]).start()


def same(a: Hook, b: Hook) -> None:
    for name in ("trusted", "target", "weight"):
        assert torch.equal(getattr(a.state, name), getattr(b.state, name)), name
    for c in range(K):
        draws = [hook.sample(c, 5, torch.Generator().manual_seed(c)) for hook in (a, b)]
        assert torch.equal(*draws)


def test_cleanlab_a_list_of_indices_and_a_label_tensor_equal_the_same_verdict_in_python(tmp_path: Path) -> None:
    # Probabilities of which cleanlab finds exactly the samples that are not kept.
    probabilities = torch.full((N, K), 0.01)
    probabilities[torch.arange(N), FIXED] = 0.98
    issues = ~KEPT
    if find_spec("cleanlab") is not None:
        from cleanlab.filter import find_label_issues

        found = find_label_issues(LABELS.numpy(), probabilities.numpy(), n_jobs=1, filter_by="predicted_neq_given")
        assert found.tolist() == issues.tolist()
    with open(tmp_path / "cleanlab.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "is_label_issue", "label_quality", "given_label", "predicted_label"])
        for i in range(N):
            quality = float(probabilities[i, LABELS[i]])
            writer.writerow([i, bool(issues[i]), quality, int(LABELS[i]), int(FIXED[i])])
    same(started(verdict=tmp_path / "cleanlab.csv"), by_python(Python()))
    (tmp_path / "list.json").write_text(json.dumps(KEPT.nonzero().flatten().tolist()))
    config = {"verdict": {"means": "keep"}}
    same(started(verdict=tmp_path / "list.json", config=config), by_python(Python()))
    torch.save(FIXED, tmp_path / "labels.pt")
    config = {"verdict": {"order": "given"}}
    same(started(verdict=tmp_path / "labels.pt", config=config), by_python(Relabelled()))


def test_weights_reach_the_hook(tmp_path: Path) -> None:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.save({"weight": weights, "index": torch.arange(N)}, tmp_path / "w.pt")
    found = started(verdict=tmp_path / "w.pt").state.weight
    for c in range(K):
        own = weights[c == LABELS]
        torch.testing.assert_close(found[c == LABELS], own / own.mean())


def test_a_script_takes_it_by_a_flag(tmp_path: Path) -> None:
    torch.save({"keep": KEPT, "index": torch.arange(N)}, tmp_path / "v.pt")
    parser = tad_plugin.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--tad_verdict", str(tmp_path / "v.pt")])
    same(tad_plugin.attach(args=args, labels=LABELS, num_classes=K), by_python(Python()))
    args = parser.parse_args(["--tad_verdict", str(tmp_path / "v.pt"), "--tad_method", "iwd"])
    with pytest.raises(ConfigError, match=r"verdict\+iwd"):
        tad_plugin.attach(args=args, labels=LABELS, num_classes=K)
    args = parser.parse_args([])
    assert tad_plugin.attach(args=args, labels=LABELS, num_classes=K).method == "none"


def test_a_verdict_that_leaves_a_class_empty_or_names_no_file_is_refused(tmp_path: Path) -> None:
    torch.save({"keep": LABELS != 1, "index": torch.arange(N)}, tmp_path / "v.pt")
    with pytest.raises(NotEnoughSamplesError, match="class 1"):
        started(verdict=tmp_path / "v.pt")
    with pytest.raises(ConfigError, match="--verdict"):
        started()


TINY = [
    "--per_class", "16", "--iterations", "2", "--eval_epochs", "2", "--eval_runs", "1", "--width", "4", "--ipc", "1",
    "--loop.batch_real", "8", "--noise", "symmetric:0.4",
]  # fmt: skip


def test_the_arm_verdict_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_dataset("digits", per_class=16, holdout=0.1)
    noisy, held = splits.apply_noise(NoiseSpec.parse("symmetric:0.4", seed=0))
    right = noisy.labels == splits.train_labels
    assert held is not None
    everything = torch.cat([splits.source_index, splits.holdout_source_index])
    file = tmp_path / "v.csv"
    with open(file, "w", newline="") as out:  # the held-out samples are judged too
        writer = csv.writer(out)
        writer.writerow(["index", "label", "verdict"])
        labels = torch.cat([noisy.labels, held.labels]).tolist()
        words = ["keep" if r else "drop" for r in right] + ["keep"] * len(held.labels)
        writer.writerows(zip(everything.tolist(), labels, words, strict=True))
    run = [*TINY, "--arm", "verdict", "--out", str(tmp_path / "run")]
    assert main(["distill", *run, "--verdict", str(file)]) == 0
    state = SampleState.load(tmp_path / "run" / "state.safetensors")
    assert torch.equal(state.trusted, right)
    assert RunFolder(tmp_path / "run").results()["split"]["precision"] == 1.0
    file.write_text(file.read_text().replace("drop", "unsure"))  # a run does not go on with another file
    assert main(["distill", *run, "--verdict", str(file)]) == 2
    assert "sha256" in capsys.readouterr().err
    for arguments, word in (
        (["--arm", "noisy", "--verdict", str(file)], "verdict+iwd"),
        (["--arm", "verdict"], "--verdict FILE"),
        (["--arm", "verdict", "--verdict", str(tmp_path / "absent.csv")], "absent.csv"),
        (["--arm", "verdict", "--order", "train"], "--verdict FILE"),
    ):
        assert main(["distill", *TINY, *arguments, "--out", str(tmp_path / "no")]) == 2
        assert word in capsys.readouterr().err
    other = [*TINY[:-1], "symmetric:0.2", "--arm", "verdict", "--verdict", str(file), "--out", str(tmp_path / "o")]
    assert main(["distill", *other]) == 2  # judged other labels
    assert "observed labels" in capsys.readouterr().err


def test_another_verdict_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    torch.save({"keep": KEPT, "index": torch.arange(N)}, tmp_path / "v.pt")
    with pytest.raises(StateMismatchError, match="contents"):
        started(verdict=tmp_path / "v.pt", config={"verdict": {"sha256": "0" * 64}})
