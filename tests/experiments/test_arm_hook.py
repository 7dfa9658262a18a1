"""The settings with which methods decide on experts: a warm-up of most of a pilot, or what a buffer was made with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tad_plugin.distill.experts.trainer import ExpertConfig
from tad_plugin.errors import StateMismatchError
from tad_plugin.experiments.arm_hook import buffer_settings, nominal_rate, pilot_settings
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.expert_run import run_experts
from tad_plugin.experiments.loading import load_noisy
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tests.distill.killed_trajectories import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")


@pytest.mark.parametrize(
    ("change", "warmup"),
    [({}, 17), ({"pilot_epochs": 8}, 5), ({"epochs": 2}, 1), ({"pilots": 0, "rounds": "all"}, None)],
)
def test_a_warmup_that_is_not_set_leaves_the_last_rounds_of_a_pilot(change: dict[str, int], warmup: int | None) -> None:
    experts = ExpertConfig(**{"epochs": 20, **change})
    found = pilot_settings({"tad": {"threshold": 0.6}, "iwd": {"ess": 0.5}}, "tad+iwd", experts)
    assert found["tad"] == ({"threshold": 0.6} if warmup is None else {"threshold": 0.6, "warmup": warmup})
    assert found["iwd"] == {"ess": 0.5}  # IWD's warm-up counts refreshes


def test_a_warmup_that_is_set_stays_and_methods_without_one_get_none() -> None:
    experts = ExpertConfig(epochs=20)
    assert pilot_settings({"tad": {"warmup": 2}}, "tad", experts) == {"tad": {"warmup": 2}}
    assert pilot_settings({}, "iwd", experts) == pilot_settings({}, "none", experts) == {}
    assert pilot_settings({}, "oracle", experts) == {}


def test_a_run_with_a_buffer_takes_the_settings_that_decided_on_it(tmp_path: Path) -> None:
    given = dataclasses.replace(CONFIG, methods={}, iterations=1, eval_runs=1, candidates=1, checkpoint_seconds=60.0)
    own = {k: v for k, v in CONFIG.loop["experts"].items() if k != "experts"}
    run_experts(given, ExpertConfig(epochs=7, experts=1, **own), "tad", tmp_path / "buffer")
    assert buffer_settings({}, "tad+iwd", tmp_path / "buffer")["tad"]["warmup"] == 4
    loop = {**CONFIG.loop, "buffer": str(tmp_path / "buffer")}
    found = run(dataclasses.replace(given, loop=loop), "tad", tmp_path / "run")
    assert found["split"]["precision"] > 0
    wanted = dataclasses.replace(given, loop=loop, methods={"tad": {"warmup": 2}})
    with pytest.raises(StateMismatchError, match="warmup"):
        run(wanted, "tad", tmp_path / "other")


def test_a_buffer_of_no_method_changes_no_settings(tmp_path: Path) -> None:
    assert buffer_settings({"iwd": {"ess": 0.5}}, "iwd", tmp_path) == {"iwd": {"ess": 0.5}}


def test_the_nominal_rate_is_known_where_it_was_set() -> None:
    config = RunConfig(per_class=20, device="cpu")
    assert nominal_rate(load_noisy(resolve(config, "noisy"))[1]) is None
    noisy = load_noisy(resolve(dataclasses.replace(config, noise="symmetric:0.3"), "noisy"))[1]
    assert nominal_rate(noisy) == 0.3
