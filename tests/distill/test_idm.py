"""IDM against a loop over classes by hand, its bits with methods that change nothing, influence, and resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Learning, Match
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.mosaic import decode, expand
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.idm import IDM, PRESETS, IDMConfig
from tad_plugin.errors import ConfigError, NonFiniteError
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run
from tad_plugin.iwd.explicit import explicit_influence
from tad_plugin.iwd.implicit_networks import learned_influence
from tad_plugin.iwd.scoring import Fold, score_on_network
from tad_plugin.iwd.targets import target_gradient
from tests.distill.problems import Scales, hook_with
from tests.problems import PLAIN, blobs, distilled, flip, plain_hook

SMALL: dict[str, Any] = {
    "ipc": 2,
    "width": 4,
    "batch_real": 8,
    "augment": "color_crop",
    "start_networks": 1,
    "max_networks": 3,
    "network_interval": 2,
    "trained_networks": 2,
    "train_steps": 2,
    "batch_train": 16,
    "lr_net": 0.05,
    "accuracy_window": 4,
}


def idm_loop(
    images: Tensor, labels: Tensor, hook: Hook | None, *, seed: int = 3, dtype: torch.dtype = torch.float32, **more: Any
) -> IDM:
    """A loop of width 4 with 2 mosaics per class, at most 3 networks, 2 of them trained in 2 steps per iteration.

    None as hook stands for :func:`tests.problems.plain_hook`.
    """
    config, generator = IDMConfig(**{**SMALL, **more}), torch.Generator().manual_seed(seed)
    data = RealData(images.to(dtype), labels, 3)
    hook = hook or plain_hook(data)
    start = SyntheticSet(*IDM.initial_images(config, data, hook, generator), 3, PLAIN)
    loop = IDM(config, data, hook, start, generator)
    for learner in loop.queue:
        learner.network.to(dtype)
    return loop


class ByHand:
    """The public loop as written there: for each class in turn, one SGD step over all images."""

    def __init__(self, loop: IDM) -> None:
        self.config, self.data, self.loop = loop.config, loop.data, loop
        self.generator = torch.Generator()
        self.generator.set_state(loop.generator.get_state())
        self.images = loop.synthetic.images.detach().clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.images], lr=self.config.lr_img, momentum=self.config.momentum)
        self.queue = [(copy.deepcopy(learner.network), [0, 0]) for learner in loop.queue]
        self.optimizers = [self._sgd(network) for network, _ in self.queue]

    def _sgd(self, network: Any) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.SGD(
            network.parameters(), config.lr_net, config.net_momentum, weight_decay=config.net_weight_decay
        )

    def step(self, iteration: int) -> float:
        config, images, labels = self.config, self.data.images, self.data.labels
        if iteration and iteration % config.accuracy_window == 0:
            self.queue = [(network, [0, 0]) for network, _ in self.queue]
        if iteration % config.network_interval == 0:
            if len(self.queue) == config.max_networks:
                del self.queue[0], self.optimizers[0]
            self.queue.append((self.loop.fresh_network(self.generator), [0, 0]))
            self.optimizers.append(self._sgd(self.queue[-1][0]))
        order = torch.randperm(len(self.queue), generator=self.generator)
        network, (hits, seen) = self.queue[int(order[0])]
        total, pools = 0.0, [(labels == c).nonzero().flatten() for c in range(3)]
        for c in range(3):
            drawn = pools[c][torch.randperm(len(pools[c]), generator=self.generator)[: config.batch_real]]
            own = self.images[c * config.ipc : (c + 1) * config.ipc]
            tiles = [own[:, :, i : i + 4, j : j + 4] for j in (0, 4) for i in (0, 4)]
            shown = torch.cat([F.interpolate(t, scale_factor=2, mode="bilinear") for t in tiles])
            real = network.embed(images[drawn]).mean(0).detach()
            loss = (real - network.embed(shown).mean(0)).square().sum()
            accuracy = 100 * hits / seen if seen else 0.0
            ce = F.cross_entropy(network(shown), torch.full((len(shown),), c))
            loss = loss + config.ce_weight * accuracy * ce
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += float(loss.detach())
        everything = torch.cat(pools)
        order = torch.randperm(len(self.queue), generator=self.generator)
        for number in order[: config.trained_networks].tolist():
            network, counts = self.queue[number]
            for _ in range(config.train_steps):
                drawn = everything[torch.randperm(len(everything), generator=self.generator)[: config.batch_train]]
                logits = network(images[drawn])
                loss = F.cross_entropy(logits, labels[drawn])
                self.optimizers[number].zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizers[number].step()
                counts[0] += int((logits.argmax(1) == labels[drawn]).sum())
                counts[1] += len(drawn)
        return total


def test_six_steps_are_those_of_the_loop_over_classes_by_hand(global_rng_untouched: None) -> None:
    """The queue grows and drops its oldest network, accuracies are reset, and momentum moves the other classes."""
    images, labels = blobs()
    loop = idm_loop(images, labels, None, augment="none")
    hand, start, networks = ByHand(loop), loop.synthetic.images.detach().clone(), []
    for iteration in range(6):
        logged = loop.step(iteration)
        assert logged["loss"] == pytest.approx(hand.step(iteration), rel=1e-4)
        torch.testing.assert_close(loop.synthetic.images.detach(), hand.images.detach(), atol=1e-4, rtol=1e-4)
        networks.append(logged["networks"])
    assert networks == [2, 2, 3, 3, 3, 3] and float((hand.images - start).norm().detach()) > 0.1
    for learner, (network, _) in zip(loop.queue, hand.queue, strict=True):
        for mine, theirs in zip(learner.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_passes_and_groups_of_any_size_are_the_class_by_class_form() -> None:
    images, labels = blobs()
    loops = [idm_loop(images, labels, None) for _ in range(3)]
    loops[1].passes, loops[1].classes = 3, 1
    loops[2].passes, loops[2].classes = 64, 2
    found = [distilled(loop, 4) for loop in loops]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_initial_mosaics_hold_images_of_their_class_and_the_set_says_how_to_decode_it() -> None:
    images, labels = blobs(spread=0.0)
    loop = idm_loop(images, labels, None)
    shown, own = decode(loop.synthetic.images.detach(), loop.synthetic.labels, 2)
    patterns = torch.stack([images[labels == c][0] for c in range(3)])
    # a shrunk and enlarged pattern stays closest to its own class
    nearest = (shown[:, None] - patterns).square().flatten(2).sum(2).argmin(1)
    assert torch.equal(nearest, own)
    assert loop.result().decode == "partition:2"
    assert idm_loop(images, labels, None, factor=1).result().decode == ""
    whole = idm_loop(images, labels, None, mosaic=False).synthetic.images.detach()
    assert all(any(torch.equal(image, real) for real in images) for image in whole)


def test_the_matching_loss_falls() -> None:
    images, labels = blobs()
    settings = {"init": "noise", "augment": "none", "width": 8, "ce_weight": 0.0, "network_interval": 100}
    loop = idm_loop(images, labels, None, **settings, trained_networks=0, lr_img=2.0, batch_real=20)
    losses = [loop.step(i)["loss"] for i in range(30)]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_one_whole_image_per_class_is_matched_with_the_easiest_real_ones() -> None:
    """IPC 1 without partition: ranked by the targets of the images that were drawn."""
    images, labels = blobs()
    loop = idm_loop(images, labels, None, ipc=1, factor=1, easiest=5, augment="none", ce_weight=1.0)
    loop.step(0)
    learner, generator = loop.queue[-1], torch.Generator()
    generator.set_state(loop.generator.get_state())
    network = learner.matching()
    means, draws = loop.real_means(network)
    for c in range(3):
        pool = (labels == c).nonzero().flatten()
        drawn = images[pool[torch.randperm(len(pool), generator=generator)[:8]]]
        losses = F.cross_entropy(network(drawn), torch.full((8,), c), reduction="none")
        torch.testing.assert_close(means[c], network.embed(drawn[losses.argsort()[:5]]).mean(0))  # type: ignore[operator]
    own = loop.synthetic.images.detach()
    alone = loop._class_losses(network, 0.0, own[:, None], means, draws, 0)
    with_ce = loop._class_losses(network, 2.0, own[:, None], means, draws, 0)
    logits = network(own)
    extra = 2 * F.cross_entropy(logits, torch.arange(3), reduction="none") * (logits.argmax(1) != torch.arange(3))
    torch.testing.assert_close(with_ce - alone, extra, atol=1e-4, rtol=1e-4)
    assert not IDMConfig(ipc=1).narrowed and not IDMConfig(ipc=1, factor=1, easiest=0).narrowed


def test_the_ranking_of_the_public_code_differs_only_where_targets_do() -> None:
    images, labels = blobs()
    hook = attach("none", labels=labels, data=images)
    settings = {"ipc": 1, "factor": 1, "easiest": 4}
    plain, theirs = (idm_loop(images, labels, hook, **settings, observed_labels=o) for o in (False, True))
    assert torch.equal(distilled(plain, 2), distilled(theirs, 2))
    hook.state.update(target=(labels + 1) % 3)
    plain, theirs = (idm_loop(images, labels, hook, **settings, observed_labels=o) for o in (False, True))
    assert not torch.equal(distilled(plain, 2), distilled(theirs, 2))


# -- with a hook -------------------------------------------------------------------------------------


class Recorder(Callback):
    """A method that computes the explicit influence of each batch on a fixed linear target."""

    name: ClassVar[str] = "recorder"
    needs_graph: ClassVar[bool] = True

    def __init__(self, slope: Tensor | None = None) -> None:
        super().__init__()
        self.slope, self.found = slope, torch.zeros(0)
        self.match: Match | None = None

    def on_match(self, *, state: SampleState, match: Match) -> None:
        slope = torch.ones_like(match.synthetic[0]) if self.slope is None else self.slope
        self.found, self.match = explicit_influence(match.loss, match.weights, match.synthetic[0], slope), match


def test_the_bits_are_the_baselines_while_nothing_is_weighted() -> None:
    images, labels = blobs()
    expected = distilled(idm_loop(images, labels, None), 5)
    hooks = [
        attach("none", labels=labels, data=images),
        attach("oracle", labels=labels, data=images, true_labels=labels),
    ]
    for hook in hooks:
        assert torch.equal(distilled(idm_loop(images, labels, hook), 5), expected)
    # one graph over all classes: the same values, in one pass more or less
    graph = distilled(idm_loop(images, labels, hook_with(images, labels, Recorder())), 5)
    torch.testing.assert_close(graph, expected, atol=1e-5, rtol=1e-5)


def test_untrusted_samples_take_no_part() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    kept = hook.state.trusted
    expected = distilled(idm_loop(images[kept], true[kept], None), 5)
    assert torch.equal(distilled(idm_loop(images, hook.state.observed, hook), 5), expected)


def test_weights_enter_the_means_and_the_training_of_the_networks() -> None:
    images, labels = blobs()
    hook = hook_with(images, labels, Scales())
    loop = idm_loop(images, labels, hook, augment="none")
    network, generator = copy.deepcopy(loop.queue[0].network), torch.Generator()
    generator.set_state(loop.generator.get_state())
    drawn = torch.cat(hook.state.pools())[torch.randperm(60, generator=generator)[:16]]
    w = hook.state.weights(drawn)
    (w * F.cross_entropy(network(images[drawn]), labels[drawn], reduction="none")).mean().backward()  # type: ignore[no-untyped-call]
    loop._learn(loop.queue[0], 0)
    for mine, theirs in zip(loop.queue[0].network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    generator.set_state(loop.generator.get_state())
    network = loop.queue[0].matching()
    means, _ = loop.real_means(network)
    for c in range(3):
        pool = (labels == c).nonzero().flatten()
        drawn = pool[torch.randperm(len(pool), generator=generator)[:8]]
        w = hook.state.weight[drawn]
        rows = network.embed(images[drawn])  # type: ignore[operator]
        torch.testing.assert_close(means[c], (w[:, None] * rows).sum(0) / w.sum(), atol=1e-5, rtol=1e-4)


def test_the_networks_learn_the_targets_and_the_methods_see_their_batches() -> None:
    images, labels = blobs()
    seen: list[Tensor] = []

    class Watcher(Callback):
        name: ClassVar[str] = "watcher"

        def on_scorer_batch(self, *, state: SampleState, indices: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
            torch.testing.assert_close(loss, F.cross_entropy(logits, state.target[indices]))
            seen.append(indices)
            return loss * 0

    hook = hook_with(images, labels, Watcher())
    hook.state.update(target=(labels + 1) % 3)
    loop = idm_loop(images, labels, hook, net_weight_decay=0.0, score_every=5)
    before = [copy.deepcopy(learner.network.state_dict()) for learner in loop.queue]
    distilled(loop, 1)
    # the oldest network only; what they return is what is minimised: a loss of zero leaves it where it was
    assert [len(s) for s in seen] == [16] * 2
    after = [learner.network.state_dict() for learner in loop.queue]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    distilled(idm_loop(images, labels, hook), 1)
    assert len(seen) == 2


def test_the_oldest_network_is_shown_every_so_often() -> None:
    images, labels = blobs()
    shown: list[Any] = []

    class Watcher(Callback):
        name: ClassVar[str] = "watcher"

        def on_scorer_epoch(self, *, state: SampleState, network: Any, data: RealData) -> None:
            shown.append(network)

    loop = idm_loop(images, labels, hook_with(images, labels, Watcher()), score_every=2)
    oldest = loop.queue[0].network
    distilled(loop, 4)
    assert len(shown) == 2 and shown[0] is oldest
    distilled(idm_loop(images, labels, hook_with(images, labels, Watcher())), 4)
    assert len(shown) == 2


# -- influence ---------------------------------------------------------------------------------------


def test_influence_in_the_batch_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, through partition and expansion: the change of <slope, grad_S L> when one weight is raised."""
    images, labels = blobs(6)
    slope = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings: dict[str, Any] = {"dtype": torch.float64, "batch_real": 4, "network_interval": 100}
    recorder = Recorder(slope)

    def update(hook: Hook) -> IDM:
        loop = idm_loop(images, labels, hook, **settings)
        loop._update(loop.queue[0], 0)
        return loop

    update(hook_with(images.double(), labels, recorder))
    drawn = recorder.found.nonzero().flatten()
    assert len(drawn) == 12

    for i in drawn[:4]:
        moved = []
        for sign in (1, -1):
            hook = Hook(SampleState(labels, 3), RealData(images.double(), labels, 3), [Scales()])
            raised = torch.zeros(len(labels), dtype=torch.float64)
            raised[i] = sign * 1e-5  # one weight, without a graph

            def weights(indices: Tensor, state: SampleState = hook.state, raised: Tensor = raised) -> Tensor:
                return state.weights(indices).double() + raised[indices]

            monkeypatch.setattr(hook.batches, "weights", weights)
            gradient = update(hook).synthetic.images.grad
            assert gradient is not None
            moved.append(float((slope * gradient).sum()))
        assert float(recorder.found[i]) == pytest.approx(-(moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("target", ["validation", "matching"])
def test_scores_of_all_samples_at_once_are_those_of_the_loss(target: str) -> None:
    """Mode "all" of IWD, through the expansion: against the loss with its graph, over all samples as one batch."""
    images, labels = blobs(8)
    images = images.double()
    loop = idm_loop(images, labels, None, dtype=torch.float64)
    network = loop.queue[0].matching().requires_grad_(True)
    fold = Fold(torch.arange(6), torch.arange(6, 24))
    own = loop.synthetic.images.detach().clone().requires_grad_()

    def expanded(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return decode(x, y, 2)

    found = score_on_network(
        network, images, labels, fold, own, loop.synthetic.labels, 3, target=target, expand=expanded, chunk_size=7
    )
    _, slope = target_gradient(
        target, [network], own, loop.synthetic.labels, images[:6], labels[:6], 3, expand=expanded
    )
    weights = torch.ones(18, dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for c in range(3):
        inside = labels[6:] == c
        rows = network.embed(images[6:][inside]) * weights[inside][:, None]  # type: ignore[operator]
        mean = rows.sum(0) / weights[inside].sum()
        tiles = expand(own[2 * c : 2 * c + 2], 2)
        loss = loss + (mean - network.embed(tiles).mean(0)).square().sum()  # type: ignore[operator]
    torch.testing.assert_close(found.influence, explicit_influence(loss, weights, own, slope), rtol=1e-6, atol=1e-12)


def test_the_gradient_of_the_target_goes_through_the_expansion() -> None:
    """Against finite differences of M in one direction."""
    images, labels = blobs(8)
    loop = idm_loop(images.double(), labels, None, dtype=torch.float64)
    own, real, k = loop.synthetic.images.detach(), (images.double()[:9], labels[:9]), loop.synthetic.labels
    direction = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(x: Tensor) -> tuple[float, Tensor]:
        network = loop.queue[0].network.requires_grad_(True)
        return target_gradient("validation", [network], x, k, *real, 3, alpha=0.5, expand=lambda a, b: decode(a, b, 2))

    ahead, behind = value(own + 1e-5 * direction)[0], value(own - 1e-5 * direction)[0]
    assert float((value(own)[1] * direction).sum()) == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_influence_by_way_of_the_network_is_that_of_finite_differences() -> None:
    """In float64: the change of <grad M, grad_S L> after a network step with one weight raised."""
    images, labels = blobs(6)
    images, learning = images.double(), Learning(0.3, 8, lambda _: network)
    loop = idm_loop(images, labels, None, dtype=torch.float64)
    network: Any = loop.queue[0].network.requires_grad_(True)
    own, own_labels = decode(loop.synthetic.images.detach(), loop.synthetic.labels, 2)
    slope = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = torch.rand(18, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    given = (images, labels, own, own_labels, slope, 3, learning)
    found = learned_influence(network, network.embed, *given, weights=w, chunk_size=5)

    def moved() -> float:
        leaf, loss = own.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
        for c in range(3):
            inside = labels == c
            mean = (w[inside, None] * network.embed(images[inside])).sum(0) / w[inside].sum()
            loss = loss + (mean - network.embed(leaf[own_labels == c]).mean(0)).square().sum()
        return -float((torch.autograd.grad(loss, leaf)[0] * slope).sum())

    parameters = list(network.parameters())
    for i in range(0, 18, 4):
        gradient = torch.autograd.grad(F.cross_entropy(network(images[i : i + 1]), labels[i : i + 1]), parameters)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for p, g in zip(parameters, gradient, strict=True):
                    p -= sign * 1e-4 * learning.rate / learning.batch * g
            values.append(moved())
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                p -= 1e-4 * learning.rate / learning.batch * g
        assert float(found[i]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4, abs=1e-9)


def test_the_two_paths_of_influence_add_up_and_can_be_switched_off() -> None:
    images, labels = blobs(8)
    scores = {}
    for explicit, learned in ((True, True), (True, False), (False, True)):
        settings = {"explicit": explicit, "learned": learned, "networks": 1, "held_out": 2, "warmup": 5}
        hook = attach("iwd", labels=labels, data=images, config={"iwd": settings})
        seen: list[Any] = []
        hook.callbacks[0]._add = lambda *given, seen=seen: seen.append(given)  # type: ignore[attr-defined]
        idm_loop(images, labels, hook).step(0)
        scores[explicit, learned] = seen[0][2]
    assert not torch.allclose(scores[True, True], scores[True, False])
    assert not torch.allclose(scores[False, True], scores[True, False])
    hook = attach("iwd", labels=labels, data=images, config={"iwd": {"explicit": False}})
    with pytest.raises(ConfigError, match="iwd.explicit"):
        idm_loop(images, labels, hook).step(0)


@pytest.mark.parametrize("mode", ["all", "batch"])
def test_iwd_weights_the_samples(mode: str) -> None:
    images, labels = blobs()
    settings = {"mode": mode, "every": 1, "warmup": 2, "held_out": 0.2, "ess": 0.5}
    hook = attach("iwd", labels=flip(labels, 3, 0.3), data=images, num_classes=3, config={"iwd": settings})
    observed = hook.state.observed
    loop = idm_loop(images, observed, hook, batch_real=20)
    plain = distilled(idm_loop(images, observed, None, batch_real=20), 5)
    assert not torch.equal(distilled(loop, 5), plain)
    assert int((hook.state["influence_count"] > 0).sum()) > 40 and float(hook.state.weight.std()) > 0.1


# -- resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_loop_resumes_with_the_same_bits(killed_after: int, tmp_path: Path) -> None:
    """Killed before and after the queue changes, and where accuracies are reset. Resumes from a file."""
    images, labels = blobs()
    expected = distilled(idm_loop(images, labels, None), 7)
    half = idm_loop(images, labels, None)
    distilled(half, killed_after)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    again = idm_loop(images, labels, None, seed=8)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(distilled(again, 7 - killed_after, killed_after), expected)


# -- settings, runs and mistakes ---------------------------------------------------------------------


def test_published_settings() -> None:
    assert {name: sorted(of) for name, of in PRESETS.items()} == {name: [1, 10, 50] for name in PRESETS}
    built: dict[str, dict[int, Any]] = {
        name: {
            ipc: resolve(RunConfig(baseline="idm", ipc=ipc, loop={"preset": name}, device="cpu"), "tad").loop
            for ipc in of
        }
        for name, of in PRESETS.items()
    }
    assert built["cifar10"][10] == IDMConfig(iterations=20_000)
    assert built["cifar100"][1].batch_real == 5000 and built["cifar100"][1].network_interval == 5
    assert (built["tinyimagenet"][50].ce_weight, built["tinyimagenet"][50].train_steps) == (0.8, 50)
    assert all(c.mosaic is (name != "tinyimagenet") for name, of in built.items() for c in of.values())


@pytest.mark.filterwarnings("ignore::tad_plugin.errors.UnimodalClassWarning")
def test_a_run_divides_the_data_before_the_first_image_is_drawn(tmp_path: Path) -> None:
    methods = {"scorer": {"epochs": 3, "width": 4}, "tad": {"warmup": 1}}
    loop = {k: v for k, v in SMALL.items() if k not in ("ipc", "width", "augment")}
    config = RunConfig(
        baseline="idm",
        per_class=16,
        noise="symmetric:0.3",
        ipc=1,
        iterations=3,
        width=4,
        loop={**loop, "score_every": 2},
        methods=methods,
        eval_epochs=2,
        eval_runs=1,
        candidates=1,
        device="cpu",
    )
    results = run(config, "tad", tmp_path / "run")
    assert results["baseline"] == "idm" and 0 < results["state"]["trusted"] < results["state"]["samples"]
    assert SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors").decode == "partition:2"
    rounds = [r for r in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"round"' in r]
    assert len(rounds) == 4  # three epochs of the scorer, and one network of the queue


@pytest.mark.parametrize(
    "given, words",
    [
        ({"factor": 0}, "factor"),
        ({"batch_train": 0}, "batch_train"),
        ({"network_interval": 0}, "network_interval"),
        ({"momentum": 1.0}, "momentum"),
        ({"net_momentum": -0.1}, "net_momentum"),
        ({"lr_net": 0.0}, "lr_net"),
        ({"ce_weight": -1.0}, "ce_weight"),
        ({"score_every": -1}, "score_every"),
        ({"start_networks": 5, "max_networks": 4}, "start_networks.*max_networks"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        IDMConfig(**given)


def test_images_that_the_factor_does_not_divide_are_named_before_any_work(tmp_path: Path) -> None:
    images, labels = blobs()
    with pytest.raises(ConfigError, match="8x8"):
        idm_loop(images, labels, None, factor=3)
    config = RunConfig(baseline="idm", per_class=4, ipc=1, loop={"factor": 3}, device="cpu")
    with pytest.raises(ConfigError, match="3"):
        run(config, "tad", tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_losses_that_are_not_numbers_stop_the_loop() -> None:
    images, labels = blobs()
    loop = idm_loop(images, labels, None, batch_real=20, init="noise")
    loop.data.images[5] = float("nan")  # attach() refuses such images
    with pytest.raises(NonFiniteError, match="nan at iteration 0"):
        loop.step(0)
    images, labels = blobs()
    loop = idm_loop(images, labels, None, lr_net=1e30)
    with pytest.raises(NonFiniteError):
        distilled(loop, 5)


def test_several_matched_networks_are_one_iteration_of_the_methods() -> None:
    images, labels = blobs()
    hook = attach("iwd", labels=labels, data=images, config={"iwd": {"networks": 1, "held_out": 2}})
    loop = idm_loop(images, labels, hook, matched_networks=2)
    distilled(loop, 2)
    assert hook.iteration == 2 and hook.callbacks[0].refreshes == 1  # type: ignore[attr-defined]
    plain = idm_loop(images, labels, None, matched_networks=2)
    assert torch.equal(distilled(plain, 2), loop.result().images)
