"""Two processes decide what one decides. They are started once for all tests."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tad_plugin.core.distributed import ALONE, Ranks, agree, barrier, gather_rows, ranks, shard
from tad_plugin.core.state import SampleState
from tests.core import rank_program
from tests.warm import start_program

Found = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found, Path]:
    """What a single process found, what each of two found, and the folder of the two."""
    folder, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    started = [
        start_program("tests.core.rank_program", str(rank), "2", str(folder), output=folder / f"out{rank}")
        for rank in range(2)
    ]
    with warnings.catch_warnings():
        single = rank_program.everything(alone)
    for rank, process in enumerate(started):
        assert process.wait(60) == 0, (folder / f"out{rank}").read_text()
    both = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return single, both[0], both[1], folder


@pytest.mark.parametrize("what", ["division", "all", "batch"])
def test_all_ranks_hold_one_state_and_it_is_that_of_one_process(what: str, runs: Any) -> None:
    single, first, second, _ = (run[what] if isinstance(run, dict) else run for run in runs)
    for name, expected in single.items():
        assert torch.equal(first[name], second[name]), name
        if expected.is_floating_point():
            assert torch.allclose(first[name], expected, rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(first[name], expected), name


def test_the_division_and_the_scores_are_not_trivial(runs: Any) -> None:
    single = runs[0]
    trusted, wrong = single["division"]["trusted"], rank_program.OBSERVED != rank_program.TRUE
    assert 60 < int(trusted.sum()) < 123 and int((single["division"]["target"] != rank_program.OBSERVED).sum()) > 5
    assert int(wrong.sum()) > 20
    for mode in ("all", "batch"):
        assert float(single[mode]["influence"].abs().max()) > 0.5 and float(single[mode]["weight"].std()) > 0.1


def test_training_with_ddp_divides_as_one_process_and_shares_the_running_means(runs: Any) -> None:
    single, first, second, _ = (run["trained"] if isinstance(run, dict) else run for run in runs)
    assert 40 < int(single["trusted"].sum()) < 123
    for name in ("trust", "trusted", "mean", "count"):
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(first["trusted"], single["trusted"])
    assert torch.allclose(first["trust"], single["trust"], atol=1e-4)  # gradients are summed in another order
    assert first["count"].tolist() == [2] * 120
    assert torch.allclose(first["mean"].float(), single["mean"].float(), atol=2e-3)  # stored in half precision


def test_only_the_first_rank_writes(runs: Any) -> None:
    folder = runs[3]
    loaded = SampleState.load(folder / "state", rank_program.OBSERVED)
    assert torch.equal(loaded.trusted, runs[1]["division"]["trusted"])
    assert {path.name for path in folder.iterdir()} <= {"state", "store", "out0", "out1", "rank0.pt", "rank1.pt"}


def test_rows_are_gathered_merged_and_broadcast(runs: Any) -> None:
    for found in (runs[1]["parts"], runs[2]["parts"]):
        assert found["gathered"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert found["uneven"].tolist() == [0, 1, 2]
        assert found["flags"].tolist() == [True, True] and found["flags"].dtype == torch.bool
        assert found["visits"].tolist() == [2, 1, 3, 0]
        assert bool(found["raised"])  # labels that differ between the ranks
    # Of rows visited equally often each process keeps its own.
    assert runs[1]["parts"]["rows"].tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert runs[2]["parts"]["rows"].tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize(("length", "size"), [(10, 3), (3, 5), (0, 2), (7, 1), (1_300_000, 8)])
def test_shards_cover_everything_once(length: int, size: int) -> None:
    shards = [shard(length, Ranks(rank, size)) for rank in range(size)]
    assert shards[0].start == 0 and shards[-1].stop == length
    assert all(a.stop == b.start for a, b in pairwise(shards))
    sizes = [s.stop - s.start for s in shards]
    assert max(sizes) - min(sizes) <= 1 and sorted(sizes, reverse=True) == sizes


def test_one_process_is_left_alone() -> None:
    rows = torch.arange(3)
    assert ranks() == ALONE and ALONE.first and gather_rows(rows) is rows
    agree("anything", "x")
    barrier()
