"""Random command lines end in results or in named errors. ``python -m tests.fuzz_command_line`` makes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz_command_line import Fuzzer


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_random_lines_end_in_results_or_named_errors(fuzzer: Fuzzer) -> None:
    found = [fuzzer.one(seed) for seed in range(20)]
    assert not [f for f in found if not f[0].isdigit()]
    assert {"0", "2"} <= {outcome for outcome, _ in found}


@pytest.mark.parametrize(
    ("words", "status", "printed", "told", "outcome"),
    [
        (["distill"], 0, "IPC 1: 50.0", "", "0"),
        (["distill"], 0, "IPC 1: NaN", "", "NaN printed"),
        (["distill"], 2, "", "tad-plugin: Expected", "2"),
        (["distill"], 2, "", "", "no message"),
        (["distill"], 1, "", "failed", "status 1"),
        (["compare"], 1, "", "arm noisy, IPC 1, seed 0: Expected", "1"),
        (["compare"], 1, "", "arm noisy, IPC 1, seed 0: ZeroDivisionError: no", "a raw error of a run"),
        (["distill"], 2, "", "Traceback (most recent call last)", "a traceback"),
        (["distill"], None, "", "", "status None"),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(words: list[str], status: int, printed: str, told: str, outcome: str) -> None:
    assert Fuzzer.judged(words, status, printed, told)[0] == outcome


def test_a_raw_error_is_seen(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise IndexError(words)

    monkeypatch.setattr("tests.fuzz_command_line.main", broken)
    assert fuzzer.one(0)[0] == "raw IndexError"
    assert Path.cwd() != fuzzer.place
