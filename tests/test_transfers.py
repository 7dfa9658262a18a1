"""How often a loop waits for its device: counted on the emulated device, whatever the number of classes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tad_plugin.core.dispatch import CallbackList
from tests.emulated_device import DEVICE, counted, emulated_device
from tests.loops import LOOPS, Problem

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")

CLASSES = 5  # more than a loop may wait in an iteration
SMALL = Problem(DEVICE, CLASSES, 6, (1, 8, 8), width=2, batch_real=4)


@pytest.fixture(autouse=True)
def there() -> Iterator[None]:
    with emulated_device():
        yield


CASES = [*((name, "tad", 2) for name in LOOPS), ("dm", "none", 1), ("idm", "none", 2), ("dm", "iwd", 1)]


@pytest.mark.parametrize(("name", "method", "most"), CASES)
def test_a_loop_waits_as_often_for_many_classes_as_for_few(name: str, method: str, most: int) -> None:
    loop = SMALL.loop(name, method)
    loop.step(0)
    loop.step(1)  # the first after IWD has set weights
    with counted() as found:  # DC draws a network
        loop.step(2)
        loop.step(3)
    assert found.kernels > 0 and sum(found.queued.values()) > 0
    assert sum(found.waiting.values()) <= 2 * most, found.waiting


@pytest.mark.parametrize("name", ["dm", "mtt"])
def test_a_refresh_waits_as_often_for_many_classes_as_for_few(name: str) -> None:
    loop = SMALL.loop(name, "iwd")
    loop.step(0)
    loop.hook.iteration = 2000
    with counted() as found:
        loop.step(1)
    assert loop.hook.callbacks[0].refreshes == 2  # type: ignore[attr-defined]
    assert sum(found.waiting.values()) <= 20, found.waiting


@pytest.mark.parametrize("rho", [0.0, 0.01])
def test_steps_of_an_expert_do_not_wait(rho: float) -> None:
    """Once for the loss of the epoch, once for its parameters; TAD is on."""
    hook = SMALL.hook("tad", trains=True)
    expert = SMALL.expert(hook, epochs=1, batch_train=4, rho=rho, augment="auto")
    with counted() as found:
        expert.run_epoch()
    assert sum(found.waiting.values()) == 2, found.waiting


def test_steps_of_the_scorer_do_not_wait() -> None:
    hook = SMALL.hook("tad")
    scorer, quiet = hook.scorer, CallbackList(hook.callbacks)
    assert scorer is not None
    quiet.scorer_epoch = lambda *_: None  # type: ignore[method-assign]
    with counted() as found:
        scorer.run_epoch(hook.state, quiet)
    assert sum(found.waiting.values()) == 1, found.waiting


def test_the_counter_counts() -> None:
    with counted() as found:
        x = torch.ones(3).to(DEVICE)
        x = x + torch.arange(3.0).to(DEVICE, non_blocking=True)
        assert float(x.sum()) == 6 and bool((x > 0).all()) and x.cpu()[0] == 1 and x[x > 1].tolist() == [2, 3]
        assert int(x.long().bincount()[1]) == 1
    assert sum(found.queued.values()) == 1
    # one up, three reads, one down, a mask with its list, a bincount with its number
    assert sum(found.waiting.values()) == 1 + 2 + 1 + 2 + 2, found.waiting
