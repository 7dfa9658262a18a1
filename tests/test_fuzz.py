"""Random calls of the public API end in finite results or in named errors. ``python -m tests.fuzz`` makes more."""

from __future__ import annotations

import pytest

from tad_plugin.errors import InvalidInputError
from tests import fuzz
from tests.fuzz_calls import CALLS
from tests.fuzz_values import Draw


@pytest.mark.parametrize("part", range(4))
def test_random_calls_give_results_or_named_errors(part: int) -> None:
    assert not fuzz.run(75, first=1000 + 75 * part)


@pytest.mark.parametrize("group", sorted(CALLS))
def test_calls_with_nothing_broken_give_results(group: str) -> None:
    function, arguments = CALLS[group](Draw(3))
    function(**arguments)


def test_the_fuzzer_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(function: object) -> list[tuple[int, str, str]]:
        monkeypatch.setitem(CALLS, "state", lambda draw: (function, {}))
        return fuzz.run(1, only="state")

    def endless() -> None:
        while True:
            pass

    def raises(error: type[Exception]) -> object:
        def fails() -> None:
            raise error("no")

        return fails

    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert put(endless)[0][1].startswith("over")
    assert put(raises(IndexError))[0][1] == "raw IndexError" and put(lambda: {"a": [float("nan")]})[0][1] == "NaN in 0"
    assert not put(raises(InvalidInputError)) and not put(lambda: 1.0)
