"""DATM: the growing range of start epochs, initial images and labels from experts, the threshold, averages, resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tad_plugin import attach
from tad_plugin.data.real import RealData
from tad_plugin.distill.datm import DATM, PRESETS, DATMConfig, correctly_predicted, initial_logits, upper_bound
from tad_plugin.distill.experts.source import Experts, expert_config
from tad_plugin.distill.student import StudentStep, flat_parameters, matching_loss
from tad_plugin.errors import ConfigError, InvalidInputError, NotEnoughSamplesError
from tad_plugin.evaluate import EvaluateConfig, evaluate
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.plan import resolve
from tests.distill.experts.problems import TRAINING, loop_of, run, same, trained
from tests.problems import blobs, flip, plain_hook


def datm(hook: Any = None, labels: Any = None, experts: Experts | None = None, **settings: Any) -> Any:
    images, true = blobs()
    labels = true if labels is None else labels
    hook = hook or plain_hook(RealData(images, labels, 3))
    return loop_of(images, labels, 3, hook, experts, cls=DATM, **settings)


# -- difficulty --------------------------------------------------------------------------------------


def test_the_upper_bound_grows_to_its_end() -> None:
    bounds = [upper_bound(i, 10, 20, 1000) for i in range(1500)]
    assert bounds[0] == 10 and bounds[99] == 10 and bounds[100] == 11 and bounds[999] == 19
    assert bounds[1000:] == [20] * 500 and sorted(bounds) == bounds
    assert upper_bound(0, 25, 25, 1) == 25


def test_segments_start_inside_the_range() -> None:
    settings = {"min_start_epoch": 1, "current_max_start_epoch": 2, "max_start_epoch": 4, "expansion_end_epoch": 6}
    images, labels = blobs()
    experts = Experts([trained(RealData(images, labels, 3), epochs=5)])
    loop = datm(experts=experts, **settings)
    seen = [loop.step(i)["start_epoch"] for i in range(20)]
    assert seen[:3] == [1, 1, 1] and all(e in (1, 2) for e in seen[3:6]) and set(seen[6:]) == {1, 2, 3}
    assert datm(max_start_epoch=2).start_range(0) == (0, 2)


def test_a_segment_above_the_threshold_updates_nothing() -> None:
    loop = datm(threshold=1e-6, ema_decay=0.5)
    before = copy.deepcopy(loop.state_dict())
    logged = loop.step(0)
    assert not logged["kept"] and logged["loss"] > 1e-6
    after = loop.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("images", "rate", "logits")) and after["averaged"] == 0
    assert datm(threshold=10.0).step(0)["kept"]


def test_a_threshold_that_refuses_nearly_all_segments_is_a_doubt() -> None:
    loop = datm(threshold=1e-6)
    assert loop.doubt() is None  # nothing was done yet
    losses = [loop.step(i)["loss"] for i in range(2)]
    again = datm(threshold=1e-6)
    again.load_state_dict(loop.state_dict())
    losses.append(again.step(2)["loss"])
    message = again.doubt()
    assert message is not None and "0 of 3" in message and f"--loop.threshold above {min(losses):.3g}" in message
    right = datm(threshold=10.0)
    assert right.step(0)["kept"] and right.doubt() is None


# -- initial images and labels -----------------------------------------------------------------------


def test_images_are_the_first_experts_hits_then_the_nexts() -> None:
    pool = torch.tensor([40, 41, 42, 43, 44, 45])
    predictions = [torch.tensor(p) for p in ([0, 1, 0, 1, 0, 2], [1, 1, 0, 0, 2, 1])]
    assert correctly_predicted(pool, predictions, 1, 2).tolist() == [41, 43]
    assert correctly_predicted(pool, predictions, 1, 4).tolist() == [41, 43, 40, 45]
    with pytest.raises(NotEnoughSamplesError, match="4 of 6"):
        correctly_predicted(pool, predictions, 1, 5)


def test_labels_are_means_over_the_experts_that_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 4, 3, generator=generator), torch.tensor([0, 1, 2, 0])
    expected = []
    for m in range(4):
        hits = [logits[e, m] for e in range(5) if int(logits[e, m].argmax()) == int(labels[m])]
        expected.append(sum(hits) / len(hits) if hits else None)
    assert all(e is not None for e in expected)
    torch.testing.assert_close(initial_logits(logits, labels), torch.stack(expected))  # type: ignore[arg-type]
    logits[:, 1, 1] = -9.0
    with pytest.raises(InvalidInputError, match="1 of 4 .*image 1"):
        initial_logits(logits, labels)


def test_the_set_starts_from_samples_that_experts_classify_correctly(global_rng_untouched: None) -> None:
    images, true = blobs()
    labels = flip(true, 3, 0.3)
    experts = Experts([trained(RealData(images, true, 3), epochs=4)])
    loop = datm(labels=labels, experts=experts, init="correct")
    network = loop.student.network
    last = [t[-1] for t in experts.read(0)]

    def logits_of(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(flat_parameters(parameters), network.parameters())
        return network(x).detach()

    hard = torch.arange(3).repeat_interleave(2)
    found = torch.stack([logits_of(p, loop.synthetic.images.detach()) for p in last])
    assert bool((found.argmax(2) == hard).any(0).all())
    for image, label in zip(loop.synthetic.images.detach(), hard, strict=True):
        assert int(labels[(images == image).flatten(1).all(1)]) == int(label)
    torch.testing.assert_close(loop.synthetic.labels, initial_logits(found, hard).softmax(1))
    torch.testing.assert_close(loop.training_labels().softmax(1), loop.synthetic.labels)
    one = datm(labels=labels, experts=experts, init="real")
    torch.testing.assert_close(one.synthetic.labels, logits_of(last[0], one.synthetic.images.detach()).softmax(1))
    with pytest.raises(InvalidInputError, match="label_epoch = 9"):
        datm(experts=experts, init="correct", label_epoch=9)
    with pytest.raises(NotEnoughSamplesError, match="20"):
        datm(labels=labels, experts=experts, init="correct", ipc=20)


def test_initial_images_are_trusted_ones() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    data = RealData(images, hook.state.observed, 3)
    loop = datm(hook, data.labels, Experts([trained(data, hook)]), init="correct")
    for image, label in zip(loop.synthetic.images.detach(), torch.arange(3).repeat_interleave(2), strict=True):
        assert int(true[(images == image).flatten(1).all(1)]) == int(label)


# -- updates -----------------------------------------------------------------------------------------


def test_label_logits_are_learned_by_momentum_sgd() -> None:
    images, labels = blobs()
    experts = Experts([trained(RealData(images, labels, 3), count=1)])
    settings = {"augment": "none", "batch_syn": 0, "syn_steps": 2, "lr_y": 3.0, "momentum_y": 0.7}
    loop = datm(experts=experts, **settings)
    logits, velocity = loop.synthetic.labels.log(), torch.zeros(6, 3)
    for iteration in range(2):
        images, rate = loop.synthetic.images.detach().clone(), loop.rate.detach().clone()
        logged = loop.step(iteration)
        ends = [flat_parameters(experts.read(0)[0][logged["start_epoch"] + e]) for e in (0, 1)]
        leaf = logits.clone().requires_grad_()
        loss = matching_loss(loop.student, *ends, images, leaf, rate, [StudentStep(torch.arange(6))] * 2, form="plain")
        velocity = torch.autograd.grad(loss, leaf)[0] + 0.7 * velocity
        logits = logits - 3.0 * velocity
    torch.testing.assert_close(loop.result().labels, logits.softmax(1), atol=1e-5, rtol=1e-4)
    assert not torch.equal(loop.result().labels, loop.synthetic.labels)


def test_the_result_can_be_an_average_of_the_iterates() -> None:
    loop, plain = datm(ema_decay=0.8), datm()
    assert torch.equal(loop.result().images, plain.result().images)
    iterates = []
    for iteration in range(4):
        loop.step(iteration)
        plain.step(iteration)
        iterates.append([*(t.detach().clone() for t in plain._learned())])
    weights = torch.tensor([0.8**k for k in (3, 2, 1, 0)])
    images, rate, logits = (
        sum(w * it[i] for w, it in zip(weights / weights.sum(), iterates, strict=True)) for i in range(3)
    )
    torch.testing.assert_close(loop.result().images, images)
    torch.testing.assert_close(loop.result().labels, logits.softmax(1))
    assert loop.result().learning_rate == pytest.approx(float(rate))


def test_a_method_that_trusts_every_sample_changes_no_bit() -> None:
    images, labels = blobs()
    hook = attach("oracle", labels=labels, data=images, true_labels=labels)
    assert hook.enabled and same(run(datm(hook), 3), run(datm(), 3))


def test_a_loop_resumes_with_the_same_bits() -> None:
    whole, half, again = datm(ema_decay=0.5), datm(ema_decay=0.5), datm(ema_decay=0.5, seed=8)
    expected = run(whole, 5)
    run(half, 2)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    assert same(run(again, 3, 2), expected)


def test_a_set_with_soft_labels_and_a_learned_rate_is_evaluated() -> None:
    images, labels = blobs()
    loop = datm()
    run(loop, 2)
    found = loop.result()
    assert found.labels.shape == (6, 3) and torch.allclose(found.labels.sum(1), torch.ones(6))
    assert torch.equal(found.hard_labels, F.softmax(loop.logits.detach(), 1).argmax(1))
    config = EvaluateConfig(width=4, epochs=20, runs=1, augment="none")
    accuracy = evaluate(found, (images, labels), config, generator=torch.Generator().manual_seed(0)).mean
    found.learning_rate = 1e-9
    assert accuracy > evaluate(found, (images, labels), config, generator=torch.Generator().manual_seed(0)).mean


# -- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"min_start_epoch": 25}, "min_start_epoch below 25"),
        ({"min_start_epoch": 5, "current_max_start_epoch": 5}, "min_start_epoch below 5"),
        ({"min_start_epoch": -1}, "min_start_epoch"),
        ({"current_max_start_epoch": 26}, "current_max_start_epoch"),
        ({"expansion_end_epoch": 0}, "expansion_end_epoch"),
        ({"lr_y": -1.0}, "lr_y"),
        ({"threshold": 0.0}, "threshold"),
        ({"label_epoch": -2}, "label_epoch"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"momentum_y": -0.1}, "momentum_y"),
        ({"init": "easy"}, "init"),
        ({"experts": {"epochs": 4}}, "27"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DATMConfig(**settings)


def test_its_experts_are_those_of_flat_trajectories() -> None:
    assert expert_config(DATMConfig()).rho == 0.01 and expert_config(DATMConfig(experts={"rho": 0.0})).rho == 0
    assert expert_config(DATMConfig()).epochs == 27
    assert TRAINING["epochs"] == 3


def test_published_presets() -> None:
    for name, by_ipc in PRESETS.items():
        for ipc in by_ipc:
            plan = resolve(RunConfig(baseline="datm", dataset=name, ipc=ipc, loop={"preset": name}), "noisy")
            assert isinstance(plan.loop, DATMConfig) and plan.loop.ipc == ipc
            assert plan.zca and plan.loop.iterations == 10_000 and plan.loop.expert_epochs in (2, 3)
    assert plan.evaluation.batch_size == 128
