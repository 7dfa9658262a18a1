"""The user's script of ``reproduce/own_loop``: TAD by at most four changed lines, and it runs with two workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tad_plugin
from reproduce.own_loop import compare, train, train_tad

SMALL = {"scorer": {"epochs": 2, "width": 2, "batch_size": 256}, "tad": {"warmup": 1}}


def test_the_script_gets_tad_by_at_most_four_changed_lines() -> None:
    assert 1 <= compare.changed_lines() <= 4


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
def test_it_runs_and_tad_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[tad_plugin.Hook] = []

    def small(*args: Any, **more: Any) -> Any:
        found = tad_plugin.core.hook.attach.attach_dataset(*args, **more, config=SMALL)
        hooks.append(found[1])
        return found

    monkeypatch.setattr(tad_plugin, "attach_dataset", small)
    with torch.random.fork_rng(devices=[]):
        assert 0 <= train_tad.main(epochs=1) <= 100
        left_out = range(0, 1297, 2)
        assert train.main(epochs=1, leave_out=left_out, predict=torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    (hook,) = hooks
    assert not hook.state.untouched() and hook.usage.samples["loss"] == len(hook.state) == 1297
