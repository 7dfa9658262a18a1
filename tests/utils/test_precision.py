"""Networks in bfloat16 and compiled: what changes and what does not, the losses of every loop, and named errors."""

from __future__ import annotations

import shutil

import pytest
import torch

from tad_plugin.errors import ConfigError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.plan import resolve
from tad_plugin.nn.networks import make_network
from tad_plugin.utils.precision import current_precision, network_precision
from tad_plugin.utils.torch_modes import default_modes
from tests.loops import LOOPS, Problem

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
SMALL = Problem("cpu", 3, 8, (1, 8, 8), width=4, batch_real=4)


def small_network() -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    return make_network("convnet", in_channels=1, num_classes=3, image_size=8, width=8, depth=2, generator=generator)


def test_networks_round_to_bfloat16_and_give_float32(generator: torch.Generator) -> None:
    network, x = small_network(), torch.randn(4, 1, 8, 8, generator=generator)
    exact = network(x)
    with network_precision("bf16"):
        rounded = network(x)
        assert current_precision() == "bf16"
        with default_modes():  # scores of the methods
            assert torch.equal(network(x), exact)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.05)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert current_precision() == "fp32" and torch.equal(network(x), exact)


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_runs_in_bfloat16_with_nearly_the_same_loss(name: str) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        with network_precision(precision):
            loop = SMALL.loop(name)
            found[precision] = [loop.step(i)["loss"] for i in range(2)]
            assert loop.result().images.dtype == torch.float32
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.2)


def test_what_a_device_or_a_loop_cannot_do_is_named() -> None:
    for name in ("tf32", "fp8"):
        with pytest.raises(ConfigError, match="--precision"), network_precision(name):
            pass
    with pytest.raises(ConfigError, match="--compile"):
        resolve(RunConfig(baseline="dc", compile=True), "noisy")
    with pytest.raises(ConfigError, match="precision"):
        resolve(RunConfig(precision="fp8"), "noisy")
    plan = resolve(RunConfig(precision="bf16", compile=True), "noisy")
    assert (plan.precision, plan.compile) == ("bf16", True)
    assert {"precision", "compile"} <= set(plan.record) and "precision" not in resolve(RunConfig(), "noisy").record


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph and its derivative, but without the code generator, which takes long."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: original(*a, **{**k, "backend": "aot_eager"}))
    plain, compiled = SMALL.loop("dm"), SMALL.loop("dm")
    compiled.compile()
    with network_precision("bf16"):
        a, b = ([loop.step(i)["loss"] for i in range(2)] for loop in (plain, compiled))
    assert a == pytest.approx(b, rel=1e-3)
    assert torch.allclose(plain.result().images, compiled.result().images, atol=1e-3)
