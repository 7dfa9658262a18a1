"""Decisions and experts that runs share: which runs, with the same bits as their own, also after a stop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tad_plugin.core.scorer import Scorer
from tad_plugin.distill.experts.trainer import ExpertTrainer
from tad_plugin.distill.mtt import MTT
from tad_plugin.errors import FileFormatError, UnknownNameError
from tad_plugin.experiments.compare import compare
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.run import run
from tad_plugin.experiments.sharing import deciding_arm
from tests.distill.killed_trajectories import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
SMALL = dataclasses.replace(CONFIG, iterations=4, candidates=1, checkpoint_seconds=60.0)


@pytest.mark.parametrize(
    ("arm", "experts"),
    [
        ("clean", "clean"),
        ("noisy", "noisy"),
        ("iwd", "noisy"),
        ("tad", "tad"),
        ("tad+iwd", "tad"),
        ("oracle", "oracle"),
        ("oracle+iwd", "oracle"),
        ("iwd+tad", "iwd+tad"),
    ],
)
def test_an_arm_uses_the_experts_of_the_methods_that_decide_before(arm: str, experts: str) -> None:
    assert deciding_arm(arm) == experts


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(UnknownNameError, match="tda"):
        deciding_arm("tda")


def buffers(folder: Path) -> list[str]:
    return sorted(p.parent.name.rsplit("-", 1)[0] for p in folder.glob("*/buffer.json"))


def synthetic(folder: Path) -> bytes:
    return (folder / "synthetic.safetensors").read_bytes()


def test_a_comparison_trains_what_its_runs_have_in_common_once(tmp_path: Path, workers_as_forks: None) -> None:
    arms = ["noisy", "iwd", "tad", "tad+iwd", "oracle"]
    # Both IPC leave TAD the same minimum, so they share its experts.
    both = dataclasses.replace(SMALL, methods={**SMALL.methods, "tad": {**SMALL.methods["tad"], "min_per_class": 2}})
    results = compare(both, arms=arms, seeds=[0], ipcs=[1, 2], out=tmp_path / "mtt", jobs=2, progress=False)
    assert len(results) == 10
    assert buffers(tmp_path / "mtt" / "shared") == ["experts-noisy-seed0", "experts-oracle-seed0", "experts-tad-seed0"]
    assert not list((tmp_path / "mtt").glob("*/ipc*/seed*/experts"))
    # What the experts cost counts for each run that uses them, and so does what the method cost there.
    found = {(r["arm"], r["ipc"]): r for r in results}
    assert found["noisy", 1]["expert_seconds"] == found["noisy", 2]["expert_seconds"] > 0
    assert found["iwd", 1]["expert_seconds"] > found["noisy", 1]["expert_seconds"]  # its second phase
    assert found["tad", 1]["scoring_seconds"] > 0
    before = {k: r["total_seconds"] - r["iterations"] * r["seconds_per_iteration"] for k, r in found.items()}
    assert before["noisy", 1] == pytest.approx(before["iwd", 2]) == pytest.approx(found["noisy", 1]["expert_seconds"])
    assert before["tad", 1] == pytest.approx(before["tad+iwd", 2])
    assert before["tad", 1] > before["noisy", 1]  # the pilot and its rounds
    assert len({json.dumps(found[a, i]["split"]) for a, i in (("tad", 1), ("tad", 2), ("tad+iwd", 1))}) == 1
    # DATM finds them too, where it is told the folder and its segments need experts as long.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mtt" / "shared").glob("*/replay_buffer_0.pt")}
    datm = dataclasses.replace(SMALL, baseline="datm", loop={**SMALL.loop, "init": "real", "threshold": 10.0})
    common = tmp_path / "mtt" / "shared"
    datm.loop["experts"] = {**SMALL.loop["experts"], "rho": 0.0}
    compare(datm, arms=["noisy"], seeds=[0], ipcs=[1], out=tmp_path / "datm", progress=False, shared=common)
    assert {p: p.stat().st_mtime_ns for p in common.glob("*/replay_buffer_0.pt")} == before
    # Starting over starts with the experts.
    again = compare(SMALL, arms=["noisy"], seeds=[0], ipcs=[1], out=tmp_path / "mtt", progress=False, overwrite=True)
    assert buffers(common) == ["experts-noisy-seed0"]
    assert again[0]["accuracy"] == found["noisy", 1]["accuracy"]


@pytest.mark.parametrize("arm", ["clean", "noisy", "tad", "iwd", "oracle"])
def test_shared_experts_give_the_bits_of_a_runs_own(arm: str, tmp_path: Path) -> None:
    run(SMALL, arm, tmp_path / "own")
    run(SMALL, arm, tmp_path / "shared", shared=tmp_path / "experts")
    assert (tmp_path / "own" / "experts" / "buffer.json").exists()
    assert not (tmp_path / "shared" / "experts").exists()
    assert synthetic(tmp_path / "own") == synthetic(tmp_path / "shared")


@pytest.mark.parametrize("arm", ["tad+iwd", "iwd"])
def test_a_run_that_was_stopped_goes_on_with_them(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, checkpoint_seconds=0.0)
    run(config, arm, tmp_path / "whole", shared=tmp_path / "a")

    def stop_at(owner: type, name: str, call: int) -> None:
        original, calls = getattr(owner, name), [0]

        def counted(*given: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise KeyboardInterrupt
            return original(*given, **more)

        monkeypatch.setattr(owner, name, counted)

    for owner, name, call in ((ExpertTrainer, "run_epoch", 3), (MTT, "step", 2), (ExpertTrainer, "run_epoch", 2)):
        stop_at(owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            # The second and the third stop of an arm without a second phase would never come.
            run(config, arm, tmp_path / "stopped", shared=tmp_path / "b")
            raise KeyboardInterrupt
        monkeypatch.undo()
    run(config, arm, tmp_path / "stopped", shared=tmp_path / "b")
    assert synthetic(tmp_path / "whole") == synthetic(tmp_path / "stopped")


def test_other_settings_get_other_experts(tmp_path: Path) -> None:
    for change in ({}, {"noise": "symmetric:0.2"}, {"seed": 1}, {"width": 5}, {"lr_img": 1.0}, {"eval_epochs": 1}):
        run(dataclasses.replace(SMALL, iterations=1, **change), "noisy", tmp_path / str(change), shared=tmp_path / "e")
    assert buffers(tmp_path / "e") == [*["experts-noisy-seed0"] * 3, "experts-noisy-seed1"]


def test_a_buffer_that_is_named_and_loops_without_experts_share_nothing(tmp_path: Path) -> None:
    run(SMALL, "noisy", tmp_path / "own")
    named = dataclasses.replace(SMALL, loop={**SMALL.loop, "buffer": str(tmp_path / "own" / "experts")})
    run(named, "noisy", tmp_path / "named", shared=tmp_path / "e")
    loop = RunConfig(per_class=12, ipc=1, iterations=1, width=4, eval_epochs=1, eval_runs=1, device="cpu")
    run(loop, "noisy", tmp_path / "dm", shared=tmp_path / "e")
    assert not (tmp_path / "e").exists()  # nothing is decided before the first update of a plain loop
    assert json.loads((tmp_path / "named" / "results.json").read_text())["expert_seconds"] == 0.0


PLAIN = RunConfig(
    per_class=30,
    noise="symmetric:0.4",
    ipc=2,
    iterations=4,
    width=4,
    methods={"scorer": {"epochs": 3, "width": 4}, "tad": {"warmup": 1}, "iwd": {"every": 2, "early": 0, "warmup": 0}},
    eval_epochs=1,
    eval_runs=1,
    candidates=1,
    device="cpu",
    checkpoint_seconds=60.0,
)


def states(folder: Path) -> list[str]:
    return sorted(p.parent.name.rsplit("-", 1)[0] for p in folder.glob("*/state.safetensors"))


def test_loops_without_experts_share_the_division(tmp_path: Path) -> None:
    arms = ["clean", "noisy", "iwd", "tad", "tad+iwd", "loss-prune", "oracle"]
    both = dataclasses.replace(PLAIN, methods={**PLAIN.methods, "tad": {"warmup": 1, "min_per_class": 2}})
    results = compare(both, arms=arms, seeds=[0], ipcs=[1, 2], out=tmp_path / "dm", progress=False)
    common = tmp_path / "dm" / "shared"
    # loss-prune keeps at least IPC samples of a class, so each IPC has its own division; the oracle looks at none
    assert states(common) == [*["state-loss-prune-seed0"] * 2, "state-oracle-seed0", "state-tad-seed0"]
    found = {(r["arm"], r["ipc"]): r for r in results}
    assert found["tad", 1]["scoring_seconds"] == pytest.approx(found["tad", 2]["scoring_seconds"], abs=0.01)
    assert found["tad+iwd", 1]["scoring_seconds"] > found["tad", 1]["scoring_seconds"]
    spent = found["tad", 1]["iterations"] * found["tad", 1]["seconds_per_iteration"]
    assert found["tad", 1]["total_seconds"] == pytest.approx(spent + found["tad", 1]["scoring_seconds"], abs=0.01)
    # The folder's name has a hash of the settings; another name would orphan the folders of earlier versions.
    noisy = {"noise": "symmetric:0.4", "per_class": 16, "methods": {"tad": {"warmup": 1}, "scorer": {"epochs": 2}}}
    old = dataclasses.replace(PLAIN, **noisy, ipc=10, iterations=1, eval_runs=1)
    run(old, "tad+iwd", tmp_path / "old", shared=tmp_path / "named")
    assert (tmp_path / "named" / "state-tad-seed0-0bafacca").is_dir()
    # Another loop finds it as well, and each run's log tells how the division came about.
    other = dataclasses.replace(both, baseline="dc", loop={"outer": 2, "inner": 1})
    compare(other, arms=["tad"], seeds=[0], ipcs=[1], out=tmp_path / "dc", progress=False, shared=common)
    assert len(list(common.glob("state-tad-*/state.safetensors"))) == 1
    logs = [(tmp_path / p / "log.jsonl").read_text() for p in ("dm/tad/ipc1/seed0", "dc/tad/ipc1/seed0")]
    assert all('"event": "division"' in log or '"event": "split"' in log for log in logs), logs[0][:2000]


@pytest.mark.parametrize("ipc", [1, 3])
def test_sharing_keeps_as_few_samples_as_a_run_alone(ipc: int, tmp_path: Path) -> None:
    """On digits, 20 a class: shared decisions once kept at least 10 of a class, and runs alone as many as the IPC."""
    config = dataclasses.replace(PLAIN, per_class=20, ipc=ipc, methods={"scorer": PLAIN.methods["scorer"]})
    alone = run(config, "tad", tmp_path / "alone")
    beside = run(config, "tad", tmp_path / "beside", shared=tmp_path / "common")
    assert synthetic(tmp_path / "alone") == synthetic(tmp_path / "beside")
    assert alone["state"] == beside["state"] and alone["split"] == beside["split"]


@pytest.mark.parametrize("name", ["state.safetensors", "results.json"])
def test_a_lost_or_changed_shared_file_is_an_error_or_made_again(name: str, tmp_path: Path) -> None:
    run(PLAIN, "tad", tmp_path / "whole", shared=tmp_path / "common")
    (folder,) = (tmp_path / "common").glob("state-*-[0-9a-f]*[0-9a-f]")
    (folder / name).unlink()
    if name == "results.json":  # not finished: it goes on, with the same decisions
        run(PLAIN, "tad", tmp_path / "again", shared=tmp_path / "common")
        assert synthetic(tmp_path / "whole") == synthetic(tmp_path / "again")
        return
    with pytest.raises(FileFormatError, match="state.safetensors"):
        run(PLAIN, "tad", tmp_path / "again", shared=tmp_path / "common")
    assert not (tmp_path / "again").exists()
    (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="state.safetensors"):
        run(PLAIN, "tad", tmp_path / "again", shared=tmp_path / "common")


def test_a_lost_state_of_shared_experts_is_an_error(tmp_path: Path) -> None:
    run(SMALL, "tad", tmp_path / "whole", shared=tmp_path / "common")
    (folder,) = (p.parent for p in (tmp_path / "common").glob("*/buffer.json"))
    (folder / "state.safetensors").unlink()
    with pytest.raises(FileFormatError, match="state.safetensors is missing"):
        run(SMALL, "tad", tmp_path / "again", shared=tmp_path / "common")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("arm", ["tad", "tad+iwd", "iwd", "oracle", "clean-then-distil", "random"])
def test_a_shared_division_gives_the_bits_of_a_runs_own(arm: str, tmp_path: Path) -> None:
    run(PLAIN, arm, tmp_path / "own")
    run(PLAIN, arm, tmp_path / "one", shared=tmp_path / "common")
    run(PLAIN, arm, tmp_path / "two", shared=tmp_path / "common")
    assert synthetic(tmp_path / "one") == synthetic(tmp_path / "two") == synthetic(tmp_path / "own")


def test_a_division_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(PLAIN, checkpoint_seconds=0.0)
    run(config, "tad", tmp_path / "whole", shared=tmp_path / "a")
    original, calls = Scorer.run_epoch, [0]

    def counted(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        original(*given)

    monkeypatch.setattr(Scorer, "run_epoch", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config, "tad", tmp_path / "stopped", shared=tmp_path / "b")
    run(config, "tad", tmp_path / "stopped", shared=tmp_path / "b")
    assert calls == [2 + 2]  # one epoch done, one cut short, two to come
    assert synthetic(tmp_path / "whole") == synthetic(tmp_path / "stopped")


def test_a_scorer_that_goes_on_learning_is_nobody_elses(tmp_path: Path) -> None:
    methods = {**PLAIN.methods, "scorer": {"epochs": 2, "width": 4, "refresh_every": 2}}
    run(dataclasses.replace(PLAIN, methods=methods), "tad", tmp_path / "run", shared=tmp_path / "common")
    assert not states(tmp_path / "common")
