"""Runs on a device: resume from checkpoints that were loaded to the CPU, and evaluation with labels on the CPU.

Each test runs on the emulated device, and on a real GPU where there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.experts.source import Experts
from tad_plugin.distill.experts.trainer import ExpertConfig, ExpertTrainer
from tad_plugin.evaluate import EvaluateConfig, accuracy, evaluate
from tad_plugin.utils.checkpoints import moved
from tad_plugin.utils.seeds import expert_generator
from tests.distill.experts.problems import TRAINING, loop_of, run
from tests.emulated_device import DEVICE, MixedDevicesError, emulated_device
from tests.problems import PLAIN, blobs, distilled, dm_loop, flip

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")

SETTINGS: dict[str, Any] = {
    "tad": {"warmup": 1, "min_per_class": 4, "recall": False},
    "iwd": {"every": 2, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2, "networks": 1},
}
SCORER: dict[str, Any] = {"epochs": 2, "width": 4, "batch_size": 20, "augment": "", "refresh_every": 2}
METHODS = ("tad", "iwd", "tad+iwd")


@dataclass
class There:
    """The device of a test and small data on it: images [24,1,8,8], noisy labels [24]."""

    device: torch.device
    images: Tensor
    labels: Tensor

    def hook(self, method: str, *, start: bool = True, **more: Any) -> Hook:
        names = method.split("+")
        config = {name: SETTINGS[name] for name in names} | ({"scorer": SCORER} if "tad" in names else {})
        given = {"labels": self.labels, "data": self.images, "num_classes": 3, "config": config}
        return attach(method, **given, start=start, **more)


_REAL = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


PLACES = ["emulated", _REAL]


@contextlib.contextmanager
def entered(place: str) -> Iterator[There]:
    """The emulated or the real device, with data on it."""
    images, true = blobs(8)
    emulated = place == "emulated"
    device = DEVICE if emulated else torch.device("cuda:0")
    with emulated_device() if emulated else contextlib.nullcontext():
        yield There(device, images.to(device), flip(true, 3, 0.3).to(device))


@pytest.fixture(params=PLACES)
def there(request: pytest.FixtureRequest) -> Iterator[There]:
    with entered(request.param) as found:
        yield found


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree of dicts and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same tensors, to the last bit and on the same devices."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return len(pairs) > 0 and all(x.device == y.device and torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def test_the_emulation_refuses_what_a_device_refuses() -> None:
    with emulated_device():
        x = torch.arange(3.0).to(DEVICE)
        assert x.device == DEVICE and (x + 1).device == DEVICE and (x * 2).tolist() == [0.0, 2.0, 4.0]
        assert x.cpu().device.type == "cpu" and torch.equal((x + torch.tensor(1.0)).cpu(), torch.arange(1.0, 4.0))
        assert x[torch.tensor([2, 0])].tolist() == [2.0, 0.0] and int(x.sum()) == 3
        y = torch.zeros(3, device=DEVICE, requires_grad=True)
        (y * x).sum().backward()  # type: ignore[no-untyped-call]
        assert y.grad is not None and y.grad.tolist() == [0.0, 1.0, 2.0]
        for wrong in (
            lambda: x + torch.zeros(3),
            lambda: torch.zeros(3)[x.long()] + x.cpu(),
            lambda: torch.cat([x, torch.zeros(1)]),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
            lambda: torch.empty(3, device=DEVICE).normal_(generator=torch.Generator()),
        ):
            with pytest.raises(MixedDevicesError):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


@pytest.mark.parametrize("method", METHODS)
def test_dm_resumes_from_a_checkpoint_on_the_cpu(there: There, method: str) -> None:
    def loop(hook: Hook, seed: int = 3) -> Any:
        return dm_loop(there.images, there.labels, 3, hook, seed=seed, batch_real=4, augment="none")

    whole = there.hook(method)
    first = loop(whole)
    distilled(first, 2)
    saved = moved({"hook": whole.state_dict(), "loop": first.state_dict()}, "cpu")
    expected = distilled(first, 2, 2)
    again = there.hook(method, start=False)
    again.load_state_dict(saved["hook"])
    again.start()
    resumed = loop(again, seed=8)
    resumed.load_state_dict(saved["loop"])
    found = distilled(resumed, 2, 2)
    assert found.device == there.device and same(found, expected)
    assert same(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_resumes_from_a_checkpoint_on_the_cpu(there: There, method: str) -> None:
    """Stopped between two rounds of TAD: loss history and running means are in use."""
    config = ExpertConfig(epochs=3, width=4, batch_train=12, augment="none")

    def trainer(hook: Hook) -> ExpertTrainer:
        return ExpertTrainer(config, RealData(there.images, there.labels, 3), hook, expert_generator(0, 0))

    def train(expert: ExpertTrainer, hook: Hook, epochs: int) -> None:
        for _ in range(epochs):
            expert.run_epoch()
            hook.epoch_end(expert.network)

    whole = there.hook(method, trains_on_real=True)
    expected = trainer(whole)
    train(expected, whole, 2)
    saved = moved({"hook": whole.state_dict(), "trainer": expected.state_dict()}, "cpu")
    train(expected, whole, 1)
    again = there.hook(method, trains_on_real=True, start=False)
    again.load_state_dict(saved["hook"])
    again.start()
    resumed = trainer(again)
    resumed.load_state_dict(saved["trainer"])
    train(resumed, again, 1)
    assert same(resumed.state_dict(), expected.state_dict())
    assert same(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_mtt_resumes_from_a_checkpoint_on_the_cpu(there: There, method: str) -> None:
    """Stopped between two refreshes of IWD, with momentum in use."""
    whole = there.hook(method, trains_on_real=True)
    assert whole.data is not None
    whole.begin_expert()
    expert = ExpertTrainer(ExpertConfig(**TRAINING), whole.data, whole, expert_generator(0, 0))
    for _ in range(3):
        expert.run_epoch()
        whole.epoch_end(expert.network)
    whole.settle()
    experts = Experts([[expert.trajectory]])
    first = loop_of(there.images, there.labels, 3, whole, experts)
    run(first, 1)
    saved = moved({"hook": whole.state_dict(), "loop": first.state_dict()}, "cpu")
    expected = run(first, 2, 1)
    again = there.hook(method, trains_on_real=True, start=False)
    again.load_state_dict(saved["hook"])
    again.start()
    again.settle()
    resumed = loop_of(there.images, there.labels, 3, again, experts, seed=8)
    resumed.load_state_dict(saved["loop"])
    assert same(run(resumed, 2, 1), expected)
    assert same(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("place", PLACES)
def test_a_run_on_the_cpu_goes_on_on_the_device(place: str) -> None:
    """Every tensor that a method holds moves to the device of the sample state, with its values."""
    images, true = blobs(8)
    here = There(images.device, images, flip(true, 3, 0.3)).hook("tad+iwd")
    distilled(dm_loop(images, here.state.observed, 3, here, batch_real=4, augment="none"), 1)
    with entered(place) as there:
        again = there.hook("tad+iwd", start=False)
        again.load_state_dict(here.state_dict())
        assert same(again.state.state_dict(), moved(here.state.state_dict(), there.device))
        for now, before in zip(again.callbacks, here.callbacks, strict=True):
            found, given = ({**c.state_dict(), "generator": None} for c in (now, before))
            assert same(found, moved(given, there.device))


def test_evaluation_takes_labels_of_another_device(there: There) -> None:
    config = EvaluateConfig(width=4, runs=1, epochs=2, augment="none")
    results = []
    for images, labels, test in (
        (there.images, there.labels, (there.images, there.labels)),
        (there.images, there.labels, (there.images, there.labels.cpu())),
        (there.images.cpu(), there.labels.cpu(), (there.images, there.labels.cpu())),
        (there.images, there.labels.cpu(), (there.images, there.labels)),
    ):
        synthetic = SyntheticSet(images, labels, 3, PLAIN)
        generator = torch.Generator().manual_seed(0)
        results.append(evaluate(synthetic, test, config, generator=generator).accuracies)
    assert len(set(results)) == 1
    network = torch.nn.Flatten()
    share = accuracy(network, there.images, there.images.flatten(1).argmax(1).cpu())
    assert share == 100.0
