"""DC and DSA against a loop by hand, their bits with methods that change nothing, influence, and resume."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.distill.dc import DC, DSA, LOOPS, PRESETS, DCConfig, DSAConfig, RealBatch
from tad_plugin.distill.gradient_distance import layerwise_distance
from tad_plugin.errors import ConfigError, EmptyClassError, NonFiniteError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.nn.networks import reinitialise
from tests.distill.problems import Scales, dc_loop, hook_with
from tests.problems import blobs, distilled, flip

# -- what a step computes ----------------------------------------------------------------------------


def test_four_steps_are_those_of_a_loop_by_hand(global_rng_untouched: None) -> None:
    """A new network every third update, trained on the synthetic set in between. Momentum SGD on the images."""
    images, labels = blobs()
    settings = {"outer": 3, "inner": 2, "batch_train": 4, "lr_net": 0.05, "lr_img": 0.7, "momentum": 0.5}
    loop = dc_loop(images, labels, 3, None, **settings)
    generator = torch.Generator()
    generator.set_state(loop.generator.get_state())
    network, synthetic = copy.deepcopy(loop.network), loop.synthetic.images.detach().clone()
    own_labels, velocity = torch.arange(3).repeat_interleave(2), torch.zeros_like(synthetic)
    parameters, start = list(network.parameters()), synthetic.clone()
    for iteration in range(4):
        if iteration % 3 == 0:
            reinitialise(network, generator)
        else:
            for _ in range(2):
                order = torch.randperm(6, generator=generator)
                for part in (order[:4], order[4:]):
                    slope = torch.autograd.grad(F.cross_entropy(network(synthetic[part]), own_labels[part]), parameters)
                    with torch.no_grad():
                        for p, g in zip(parameters, slope, strict=True):
                            p -= 0.05 * g
        leaf = synthetic.clone().requires_grad_()
        loss = torch.zeros(())
        for c in range(3):
            pool = (labels == c).nonzero().flatten()
            batch = images[pool[torch.randperm(len(pool), generator=generator)[:8]]]
            real = torch.autograd.grad(F.cross_entropy(network(batch), torch.full((8,), c)), parameters)
            fake_loss = F.cross_entropy(network(leaf[2 * c : 2 * c + 2]), torch.full((2,), c))
            loss = loss + layerwise_distance(torch.autograd.grad(fake_loss, parameters, create_graph=True), real)
        (gradient,) = torch.autograd.grad(loss, leaf)
        velocity = gradient + (0.5 * velocity if iteration else 0)
        synthetic = synthetic - 0.7 * velocity
        assert loop.step(iteration)["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        torch.testing.assert_close(loop.result().images, synthetic, atol=1e-5, rtol=1e-4)
    assert float((synthetic - start).norm()) > 0.1


def test_real_and_synthetic_images_share_one_augmentation() -> None:
    """If the synthetic images equal the real ones, Siamese augmentation leaves nothing to match."""
    images, labels = blobs(2)
    settings = {"cls": DSA, "augment": "color_crop_flip", "batch_real": 2, "outer": 1}
    loop = dc_loop(images, labels, 3, None, **settings)
    with torch.no_grad():
        loop.synthetic.images.copy_(torch.cat([images[labels == c] for c in range(3)]))
    assert abs(float(loop.step(0)["loss"])) < 1e-3
    assert float(dc_loop(images, labels, 3, None, **settings, init="noise").step(0)["loss"]) > 0.5


@pytest.mark.parametrize("distance", ["layerwise", "mse", "cosine"])
def test_the_matching_loss_falls(distance: str) -> None:
    images, labels = blobs()
    settings = {"init": "noise", "outer": 1, "width": 8, "batch_real": 20, "distance": distance}
    loop = dc_loop(images, labels, 3, None, **settings, lr_img={"mse": 5.0, "cosine": 5.0, "layerwise": 1.0}[distance])
    losses = [loop.step(i)["loss"] for i in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_batch_norm_holds_statistics_of_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = blobs()
    loop = dc_loop(images, labels, 3, None, norm="batch", batch_train=4)
    modes: list[list[bool]] = []
    original = loop._class_loss

    def watched(c: int, own: Tensor, batch: RealBatch) -> Tensor:
        modes.append([m.training for m in loop.network.modules() if isinstance(m, torch.nn.BatchNorm2d)])
        return original(c, own, batch)

    monkeypatch.setattr(loop, "_class_loss", watched)
    before = loop.network.state_dict()["features.1.running_mean"].clone()
    loop.step(0)
    first = loop.network.state_dict()["features.1.running_mean"].clone()
    loop.step(1)
    assert modes == [[False, False]] * 6
    # one update from 3 x 16 real images; training on the synthetic set moves them on
    assert not torch.equal(before, first) and not torch.equal(
        first, loop.network.state_dict()["features.1.running_mean"]
    )


def test_passes_of_any_size_are_one_batch_also_for_batch_norm() -> None:
    """Statistics of batch norm come from the whole synthetic batch, not from a chunk."""
    images, labels = blobs()
    for norm in ("instance", "batch"):
        loops = [dc_loop(images, labels, 3, None, norm=norm, lr_net=0.1) for _ in range(2)]
        loops[1]._chunk = 2
        a, b = (distilled(loop, 3) for loop in loops)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# -- with a hook -------------------------------------------------------------------------------------


class Recorder(Callback):
    """A method that computes the explicit influence of each batch on a fixed linear target."""

    name: ClassVar[str] = "recorder"
    needs_graph: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.slope: Tensor | None = None

    def on_match(self, *, state: SampleState, match: Match) -> None:
        if self.slope is None:
            generator = torch.Generator().manual_seed(9)
            self.slope = torch.randn(match.synthetic[0].shape, generator=generator).to(match.synthetic[0].dtype)
        assert match.kind == "gradient" and match.fresh_network is not None
        self.found.append(explicit_influence(match.loss, match.weights, match.synthetic[0], self.slope))


@pytest.mark.parametrize("cls", [DC, DSA])
def test_the_bits_are_the_baselines_while_nothing_is_weighted(cls: type[DC]) -> None:
    images, labels = blobs()
    expected = distilled(dc_loop(images, labels, 3, None, cls=cls), 4)
    assert not torch.equal(expected, distilled(dc_loop(images, labels, 3, None, cls=cls), 3))
    for hook in (
        attach("none", labels=labels, data=images),
        attach("oracle", labels=labels, data=images, true_labels=labels),
        hook_with(images, labels, Recorder()),
    ):
        for form in ("forward", "graph"):
            loop = dc_loop(images, labels, 3, hook, cls=cls, weight_derivative=form)
            assert torch.equal(distilled(loop, 4), expected)


def test_untrusted_samples_take_no_part() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    kept = hook.state.trusted
    subset = dc_loop(images[kept], true[kept], 3, None)
    expected = distilled(subset, 4)
    assert torch.equal(distilled(dc_loop(images, hook.state.observed, 3, hook), 4), expected)


def test_weights_enter_as_a_weighted_mean_of_real_losses() -> None:
    images, labels = blobs()
    hook = hook_with(images, labels, Scales())
    loop = dc_loop(images, labels, 3, hook, outer=1, batch_real=8)
    generator = torch.Generator()
    generator.set_state(loop.generator.get_state())
    start = loop.synthetic.images.detach().clone()
    logged = loop.step(0)["loss"]
    torch.randint(0, 2**63 - 1, (1,), generator=generator)  # the network's
    parameters, expected = list(loop.network.parameters()), 0.0
    for c in range(3):
        pool = (labels == c).nonzero().flatten()
        drawn = pool[torch.randperm(len(pool), generator=generator)[:8]]
        w = hook.state.weight[drawn]
        losses = F.cross_entropy(loop.network(images[drawn]), labels[drawn], reduction="none")
        real = torch.autograd.grad((w * losses).sum() / w.sum(), parameters)
        fake = F.cross_entropy(loop.network(start[2 * c : 2 * c + 2]), torch.full((2,), c))
        expected += float(layerwise_distance(torch.autograd.grad(fake, parameters), real))
    assert logged == pytest.approx(expected, rel=1e-4)
    assert logged != pytest.approx(float(dc_loop(images, labels, 3, None, outer=1).step(0)["loss"]), rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_influence_through_the_real_gradient_is_that_of_finite_differences(weighted: bool) -> None:
    """In float64: the change of <slope, grad_S L> when the weight of one sample is raised."""
    images, labels = blobs(6)
    others = (Scales(),) if weighted else ()
    settings: dict[str, Any] = {
        "cls": DSA,
        "dtype": torch.float64,
        "outer": 1,
        "batch_real": 4,
        "augment": "color_crop",
    }
    found = {}
    for form in ("forward", "graph"):
        recorder = Recorder()
        hook = hook_with(images.double(), labels, *others, recorder)
        loop = dc_loop(images, labels, 3, hook, weight_derivative=form, **settings)
        loop.step(0)
        found[form] = recorder.found[0]
        slope = recorder.slope
        assert slope is not None
    torch.testing.assert_close(found["forward"], found["graph"], rtol=1e-4, atol=1e-8)
    drawn = found["forward"].nonzero().flatten()
    assert len(drawn) == 12

    class Raised(Hook):
        """Raises the weight of one sample, without a graph."""

        raised: Tensor

        def weights(self, indices: Any) -> Tensor:
            return self.state.weights(indices).double() + self.raised[indices]

    for i in drawn[:5]:
        moved = []
        for sign in (1, -1):
            hook = Raised(SampleState(labels, 3), RealData(images.double(), labels, 3), others or (Scales(),))
            if weighted:
                hook.start()
            hook.raised = torch.zeros(len(labels), dtype=torch.float64)
            hook.raised[i] = sign * 1e-5
            loop = dc_loop(images, labels, 3, hook, **settings)
            loop.step(0)
            assert loop.synthetic.images.grad is not None
            moved.append(float((slope * loop.synthetic.images.grad).sum()))
        # influence is -d/dw <slope, grad_S L>
        assert float(found["forward"][i]) == pytest.approx(-(moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-7)


def test_only_a_method_that_asks_pays_for_a_graph() -> None:
    images, labels = blobs()
    seen: list[tuple[bool, bool]] = []

    class Watcher(Callback):
        name: ClassVar[str] = "watcher"

        def on_match(self, *, state: SampleState, match: Match) -> None:
            seen.append((match.loss.requires_grad, match.weights.requires_grad))

    dc_loop(images, labels, 3, hook_with(images, labels, Watcher())).step(0)
    dc_loop(images, labels, 3, hook_with(images, labels, Watcher(), Recorder())).step(0)
    assert seen == [(False, False), (True, True)]


def test_iwd_in_the_batch_weights_the_samples() -> None:
    images, labels = blobs()
    settings = {"mode": "batch", "warmup": 2, "held_out": 0.2, "ess": 0.5, "saturate": 0.0}
    hook = attach("iwd", labels=flip(labels, 3, 0.3), data=images, num_classes=3, config={"iwd": settings})
    loop = dc_loop(images, hook.state.observed, 3, hook, batch_real=20)
    plain = distilled(dc_loop(images, hook.state.observed, 3, None, batch_real=20), 5)
    assert not torch.equal(distilled(loop, 5), plain)
    assert int((hook.state["influence_count"] > 0).sum()) > 40 and float(hook.state.weight.std()) > 0.1


# -- resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, settings", [(DC, {}), (DSA, {}), (DC, {"norm": "batch"}), (DC, {"distance": "mse"})])
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_loop_resumes_with_the_same_bits(
    cls: type[DC], settings: dict[str, Any], killed_after: int, tmp_path: Path
) -> None:
    """Killed in the middle of a network's training, at its end, and before the next one. Resumes from a file."""
    images, labels = blobs()
    expected = distilled(dc_loop(images, labels, 3, None, cls=cls, **settings), 6)
    half = dc_loop(images, labels, 3, None, cls=cls, **settings)
    distilled(half, killed_after)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    again = dc_loop(images, labels, 3, None, cls=cls, seed=8, **settings)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(distilled(again, 6 - killed_after, killed_after), expected)


# -- settings and mistakes ---------------------------------------------------------------------------


def test_published_settings_are_the_defaults() -> None:
    for name, config, cls in (("dc", DCConfig, DC), ("dsa", DSAConfig, DSA)):
        assert set(PRESETS[name]) == set(LOOPS) and cls.Config is config
        for ipc, preset in PRESETS[name].items():
            published = config(**preset)
            assert (published.lr_img, published.momentum, published.lr_net, published.width) == (0.1, 0.5, 0.01, 128)
            assert (published.batch_real, published.batch_train) == (256, 256)
            assert published.loops == LOOPS[ipc] and published.iterations == 1000 * published.outer
            named = RunConfig(baseline=name, ipc=ipc, loop={"preset": "published"}, device="cpu")
            assert resolve(named, "clean").loop == published
            default = config(ipc=ipc, iterations=published.iterations)
            assert dataclasses.replace(default, outer=default.loops[0], inner=default.loops[1]) == published
    assert (DCConfig().init, DCConfig().augment, DSAConfig().init, DSAConfig().augment) == (
        "noise",
        "none",
        "real",
        "auto",
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ({"batch_real": 0}, "batch_real"),
        ({"batch_train": 0}, "batch_train"),
        ({"outer": -1}, "outer"),
        ({"inner": -1}, "inner"),
        ({"lr_net": 0.0}, "lr_net"),
        ({"momentum": 1.0}, "momentum"),
        ({"distance": "cosin"}, "cosin"),
        ({"weight_derivative": "reverse"}, "reverse"),
        ({"lr_img": -0.1}, "lr_img"),
        ({"init": "zeros"}, "init"),
        ({"ipc": 5}, "outer 0"),
        ({"ipc": 5, "outer": 10}, "outer 10 and inner 0"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DCConfig(**given)


def test_counts_of_its_own_serve_any_ipc() -> None:
    assert DCConfig(ipc=5, outer=4, inner=3).loops == (4, 3)
    assert DCConfig(ipc=5, outer=1).loops == (1, 0)
    assert DCConfig(ipc=10, inner=3).loops == (10, 3)


def test_bad_data_are_named() -> None:
    images, labels = blobs()
    with pytest.raises(EmptyClassError, match="class 2"):
        dc_loop(images[labels < 2], labels[labels < 2], 3, None, init="noise").step(0)
    loop = dc_loop(images, labels, 3, None, batch_real=20, init="noise")
    loop.data.images[5] = float("nan")  # attach() refuses such images
    with pytest.raises(NonFiniteError, match="nan at iteration 0"):
        loop.step(0)


def test_a_class_smaller_than_the_batch_gives_all_it_has() -> None:
    images, labels = blobs(5)
    whole, larger = (dc_loop(images, labels, 3, None, batch_real=n) for n in (5, 500))
    assert torch.equal(distilled(whole, 2), distilled(larger, 2))


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
@pytest.mark.parametrize("baseline", ["dc", "dsa"])
def test_a_run_on_digits(baseline: str, tmp_path: Path) -> None:
    config = RunConfig(
        baseline=baseline,
        per_class=16,
        noise="symmetric:0.4",
        ipc=1,
        iterations=2,
        width=4,
        loop={"batch_real": 8},
        methods={"iwd": {"mode": "batch"}},
        eval_epochs=2,
        eval_runs=1,
        device="cpu",
    )
    plan = resolve(config, "noisy")
    assert plan.loop.lr_img == 0.1 and resolve(dataclasses.replace(config, lr_img=0.3), "noisy").loop.lr_img == 0.3
    assert plan.evaluation.augment == ("none" if baseline == "dc" else "auto")
    for arm in ("noisy", "iwd", "random"):
        found = run(config, arm, tmp_path / arm)
        assert found["baseline"] == baseline and found["iterations"] == (0 if arm == "random" else 2)


def test_the_arm_without_distillation_shows_real_images_whatever_the_baseline_starts_from() -> None:
    config = RunConfig(baseline="dc", loop={"init": "noise"})
    assert resolve(config, "noisy").loop.init == "noise" and resolve(config, "random").loop.init == "real"
