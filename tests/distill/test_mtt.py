"""MTT: its updates, the order of experts, methods in it, the guards, resume, and whole runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from tad_plugin import attach
from tad_plugin.core.hook.hook import Hook
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.real import RealData
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.distill.baseline import Place
from tad_plugin.distill.experts.buffer import BufferInfo, buffer_files, read_buffer, write_buffer
from tad_plugin.distill.experts.source import PHASES, ExpertCycle, Experts, expert_config, expert_phase
from tad_plugin.distill.experts.train import train_experts
from tad_plugin.distill.mtt import MTT, PRESETS, MTTConfig
from tad_plugin.distill.student import StudentStep, flat_parameters, matching_loss
from tad_plugin.errors import (
    ConfigError,
    FileFormatError,
    InvalidInputError,
    NonFiniteError,
    PreprocessingMismatchError,
    StateMismatchError,
    TadPluginWarning,
    UnknownNameError,
)
from tad_plugin.experiments.config import RunConfig
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.experiments.plan import resolve
from tad_plugin.experiments.run import run as run_experiment
from tests.distill.experts.problems import loop_of, run, same, trained
from tests.distill.killed_trajectories import CONFIG, PLAN
from tests.problems import blobs, flip, plain_hook
from tests.warm import start_program

pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.TadPluginWarning")
SOON = {"every": 2, "early": 0, "warmup": 0, "ess": 0.5, "held_out": 2}


def real(images: Tensor, labels: Tensor) -> RealData:
    return RealData(images, labels, 3)


def plain(images: Tensor, labels: Tensor) -> Hook:
    return plain_hook(real(images, labels))


# -- the loop ----------------------------------------------------------------------------------------


def test_updates_are_momentum_sgd_on_the_matching_loss(global_rng_untouched: None) -> None:
    """Images and rate, two iterations on a single expert, with the start epochs that the loop drew."""
    images, labels = blobs()
    experts = Experts([trained(real(images, labels), count=1)])
    loop = loop_of(
        images, labels, 3, plain(images, labels), experts, augment="none", batch_syn=0, syn_steps=2, lr_lr=1e-3
    )
    parameters = [loop.synthetic.images.detach().clone(), loop.rate.detach().clone()]
    velocities = [torch.zeros_like(p) for p in parameters]
    steps = [StudentStep(torch.arange(6))] * 2
    for iteration in range(2):
        logged = loop.step(iteration)
        ends = [flat_parameters(experts.read(0)[0][logged["start_epoch"] + e]) for e in (0, 1)]
        leaves = [p.clone().requires_grad_() for p in parameters]
        loss = matching_loss(loop.student, *ends, leaves[0], loop.synthetic.labels, leaves[1], steps, form="plain")
        assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        for i, (gradient, lr) in enumerate(zip(torch.autograd.grad(loss, leaves), (1.0, 1e-3), strict=True)):
            velocities[i] = gradient + 0.5 * velocities[i]
            parameters[i] = parameters[i] - lr * velocities[i]
    torch.testing.assert_close(loop.result().images, parameters[0], atol=1e-5, rtol=1e-4)
    assert loop.result().learning_rate == pytest.approx(float(parameters[1]), rel=1e-5)


def test_the_matching_loss_falls() -> None:
    images, labels = blobs()
    loop = loop_of(
        images, labels, 3, plain(images, labels), init="noise", augment="none", lr_img=20.0, syn_steps=5, batch_syn=0
    )
    losses = [loop.step(i)["loss"] for i in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_both_forms_distil_the_same_set() -> None:
    images, labels = blobs()
    found = [run(loop_of(images, labels, 3, plain(images, labels), form=form), 3) for form in ("constant", "plain")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_method_that_trusts_every_sample_changes_no_bit() -> None:
    images, labels = blobs()
    alone = run(loop_of(images, labels, 3, plain(images, labels)), 4)
    hook = attach("oracle", labels=labels, data=images, true_labels=labels)
    assert hook.enabled and same(run(loop_of(images, labels, 3, hook), 4), alone)


def test_a_loop_resumes_with_the_same_bits(tmp_path: Path) -> None:
    images, labels = blobs()
    write_buffer(tmp_path, 0, trained(real(images, labels)))
    write_buffer(tmp_path, 1, trained(real(images, labels), first=2, count=1))
    whole, half = (loop_of(images, labels, 3, plain(images, labels), Experts.of(tmp_path)) for _ in range(2))
    expected = run(whole, 8)
    for first, stop in ((0, 1), (1, 3), (3, 4)):  # in the middle of a file, and between two
        run(half, stop - first, first)
        again = loop_of(images, labels, 3, plain(images, labels), Experts.of(tmp_path), seed=8)
        again.load_state_dict(copy.deepcopy(half.state_dict()))
        assert same(run(again, 8 - stop, stop), expected)


# -- the order of experts ----------------------------------------------------------------------------


def test_each_expert_of_a_file_comes_once_before_the_next_file() -> None:
    files = [[[[torch.tensor([10.0 * f + e])]] for e in range(3)] for f in range(4)]
    cycle = ExpertCycle(Experts(files))
    generator = torch.Generator().manual_seed(0)
    seen = [cycle.next(generator) for _ in range(24)]
    assert all(int(t[0][0]) == 10 * (n // 3) + n % 3 for n, t in seen)
    for start in (0, 12):
        order = [n for n, _ in seen[start : start + 12]]
        assert sorted(order) == list(range(12))
        assert all(len({n // 3 for n in order[i : i + 3]}) == 1 for i in range(0, 12, 3))
    assert [n for n, _ in seen[:12]] != [n for n, _ in seen[12:]]
    few = ExpertCycle(Experts(files), max_files=2, max_experts=1)
    assert {few.next(generator)[0] for _ in range(8)} == {0, 3}


# -- methods -----------------------------------------------------------------------------------------


def test_initial_images_are_trusted_ones() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    config = MTTConfig(ipc=5)
    found, labels = MTT.initial_images(config, real(images, hook.state.observed), hook, torch.Generator(), None)
    for image, label in zip(found, labels, strict=True):
        place = (images == image).flatten(1).all(1).nonzero()
        assert bool(hook.state.trusted[place]) and int(true[place]) == int(label)


def iwd_loop(again: bool = True, **settings: Any) -> tuple[Any, Hook, list[int]]:
    images, true = blobs()
    hook = attach("iwd", labels=flip(true, 3, 0.4), data=images, config={"iwd": SOON}, trains_on_real=True)
    data = real(images, hook.state.observed)
    calls: list[int] = []

    def renew() -> Experts:
        calls.append(1)
        return Experts([trained(data, hook)], seconds=2.0)

    experts = Experts([trained(data, hook)], again=renew if again else None, seconds=1.0)
    return loop_of(images, hook.state.observed, 3, hook, experts, **settings), hook, calls


def test_influence_is_the_same_in_both_forms() -> None:
    found = []
    for form in ("constant", "plain"):
        loop, hook, _ = iwd_loop(form=form, second_phase=1.0)
        run(loop, 3)
        assert int(hook.state["influence_count"].sum()) > 0 and float(hook.state["influence_weight"].std()) > 0
        found.append(hook.state["influence"].clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_experts_are_trained_anew_once_under_the_new_weights() -> None:
    loop, _, calls = iwd_loop()
    run(loop, 4)
    assert not calls and loop.expert_seconds == 1.0
    first = loop._experts()
    loop.step(4)  # half of 8 iterations
    assert len(calls) == 1 and loop.second and loop._experts() is not first and loop.expert_seconds == 3.0
    assert not torch.equal(first.read(0)[0][1][0], loop._experts().read(0)[0][1][0])
    assert torch.equal(first.read(0)[0][0][0], loop._experts().read(0)[0][0][0])  # the same start
    run(loop, 3, 5)
    assert len(calls) == 1
    saved = loop.state_dict()
    resumed, *_ = iwd_loop()
    resumed.load_state_dict(saved)
    assert resumed.second and resumed.expert_seconds == 3.0
    for settings in ({"second_phase": 1.0}, {"again": False}):
        other, _, calls = iwd_loop(**settings)
        run(other, 6)
        assert not calls


def test_a_method_that_decided_before_has_no_second_phase() -> None:
    images, true = blobs()
    hook = attach("oracle", labels=flip(true, 3, 0.4), data=images, true_labels=true)
    data = real(images, hook.state.observed)
    experts = Experts([trained(data, hook)], again=lambda: pytest.fail("nothing has changed"))
    run(loop_of(images, data.labels, 3, hook, experts), 6)


# -- guards ------------------------------------------------------------------------------------------


def told(loop: MTT, iterations: int) -> list[str]:
    """Warnings of the loop in so many updates."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TadPluginWarning)
        run(loop, iterations)
    return [str(w.message) for w in caught if issubclass(w.category, TadPluginWarning)]


def test_images_that_leave_the_range_of_real_ones_are_told_once() -> None:
    images, labels = blobs()
    loop = loop_of(images, labels, 3, plain(images, labels), lr_lr=0.0)
    with torch.no_grad():
        loop.synthetic.images.mul_(30)
    (found,) = told(loop, 3)
    assert f"lr_img (now {loop.config.lr_img:g})" in found
    assert not told(loop_of(images, labels, 3, plain(images, labels), lr_lr=0.0), 3)


@pytest.mark.parametrize(("name", "value"), [("lr_img", 1e6), ("lr_lr", 1e6)])
def test_a_learning_rate_that_does_not_fit_the_experts_is_lowered(name: str, value: float) -> None:
    images, labels = blobs()
    settings = {"lr_img": 1.0, "lr_lr": 0.0, name: value}
    loop = loop_of(images, labels, 3, plain(images, labels), **settings)
    found = told(loop, 8)
    assert len([w for w in found if f"{name} 1e+06" in w]) == 1
    assert 0 < float(loop.rate.detach()) <= 5
    assert float(loop.synthetic.images.detach().std()) < 5 * float(images.std())
    lowered = [o.param_groups[0]["lr"] for o in loop.optimizers]
    assert lowered[("lr_img", "lr_lr").index(name)] < 1e4
    again = loop_of(images, labels, 3, plain(images, labels), **settings)
    again.load_state_dict(loop.state_dict())
    assert [o.param_groups[0]["lr"] for o in again.optimizers] == lowered


def test_a_synthetic_learning_rate_out_of_range_stops_the_run() -> None:
    images, labels = blobs()
    loop = loop_of(images, labels, 3, plain(images, labels), lr_lr=0.0)
    with torch.no_grad():
        loop.rate.fill_(6.0)  # 100 times lr_teacher is 5
    with pytest.raises(NonFiniteError, match=r"\(0, 5\].* 6 "):
        run(loop, 1)
    loop = loop_of(images, labels, 3, plain(images, labels), lr_lr=0.0)
    run(loop, 2)
    assert float(loop.rate.detach()) == pytest.approx(0.05)


def test_a_loss_or_gradient_that_is_not_a_number_stops_the_run() -> None:
    images, labels = blobs()
    loop = loop_of(images, labels, 3, plain(images, labels))
    with torch.no_grad():
        loop.synthetic.images[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="nan at iteration 0"):
        run(loop, 2)
    loop = loop_of(images, labels, 3, plain(images, labels))
    with torch.no_grad():
        loop.synthetic.images.fill_(1e30)
    with pytest.raises(NonFiniteError):
        run(loop, 3)


def test_no_step_without_experts() -> None:
    images, labels = blobs()
    loop = loop_of(images, labels, 3, plain(images, labels))
    alone = type(loop)(loop.config, loop.data, loop.hook, loop.synthetic, loop.generator)
    assert alone.result().learning_rate is None and alone.state_dict()["cycle"] is None
    with pytest.raises(ConfigError, match="prepared"):
        alone.step(0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"syn_steps": 0}, "syn_steps"),
        ({"lr_teacher": 0.0}, "lr_teacher"),
        ({"lr_lr": -1e-5}, "lr_lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"form": "tesla"}, "tesla"),
        ({"rate_limit": 1.0}, "rate_limit"),
        ({"second_phase": 0.0}, "second_phase"),
        ({"experts": [1]}, "experts"),
        ({"experts": {"width": 3}}, "width"),
        ({"experts": {"epochs": 4}}, "28"),
        ({"experts": {"speed": 4}}, "speed"),
        ({"init": "correct"}, "init"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MTTConfig(**settings)


# -- buffers -----------------------------------------------------------------------------------------


def small(**settings: Any) -> MTTConfig:
    return MTTConfig(**{"ipc": 1, "width": 4, "expert_epochs": 1, "max_start_epoch": 2, "augment": "none", **settings})


def buffer(folder: Path, *, method: str = "none", preprocessing: Preprocessing | None = None) -> tuple[RealData, Hook]:
    """Writes a buffer; returns the data and the hook of its training."""
    images, true = blobs()
    settings = {"tad": {"warmup": 0, "history": 1}} if method == "tad" else None
    hook = attach(method, labels=flip(true, 3, 0.3), data=images, trains_on_real=True, config=settings)
    data = real(images, hook.state.observed)
    config = dataclasses.replace(expert_config(small()), experts=2, lr=0.1, batch_train=16)
    train_experts(data, config, folder, hook=hook, preprocessing=preprocessing)
    return data, hook


def test_a_given_buffer_is_checked(tmp_path: Path) -> None:
    data, _ = buffer(tmp_path / "b", preprocessing=Preprocessing((0.0,), (2.0,)))
    place = Place(tmp_path / "run")
    config = small(buffer=str(tmp_path / "b"))
    experts = expert_phase(config, data, plain_hook(data), place)
    assert experts.info is not None and experts.info.experts == 2 and not (tmp_path / "run").exists()
    with pytest.raises(PreprocessingMismatchError):
        loop_of(data.images, data.labels, 3, plain_hook(data), experts)
    experts.info.preprocessing = ""
    assert run(loop_of(data.images, data.labels, 3, plain_hook(data), experts), 1)
    with pytest.raises(StateMismatchError, match="labels"):
        loop_of(data.images, data.labels.flip(0), 3, plain_hook(data), experts)
    with pytest.raises(StateMismatchError, match="network"):
        loop_of(data.images, data.labels, 3, plain_hook(data), experts, width=5)
    with pytest.raises(InvalidInputError, match="5"):
        loop_of(data.images, data.labels, 3, plain_hook(data), experts, max_start_epoch=4)
    with pytest.raises(FileFormatError, match="replay_buffer_0"):
        expert_phase(small(buffer=str(tmp_path / "nothing")), data, plain_hook(data), place)
    with pytest.raises(InvalidInputError):
        loop_of(data.images, data.labels, 3, plain_hook(data), Experts([]))


def test_a_foreign_buffer_is_checked_by_its_shapes(tmp_path: Path) -> None:
    data, _ = buffer(tmp_path)
    (tmp_path / "buffer.json").unlink()
    experts = expert_phase(small(buffer=str(tmp_path)), data, plain_hook(data), Place(tmp_path))
    assert experts.info is None and run(loop_of(data.images, data.labels, 3, plain_hook(data), experts), 1)
    with pytest.raises(StateMismatchError):
        loop_of(data.images, data.labels, 3, plain_hook(data), experts, width=5)
    path = buffer_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match="replay_buffer_0"):
        loop_of(data.images, data.labels, 3, plain_hook(data), experts)


def test_the_state_comes_with_the_buffer(tmp_path: Path) -> None:
    data, before = buffer(tmp_path / "tad", method="tad")
    settings = {"tad": {"warmup": 0, "history": 1}}
    hook = attach("tad", labels=data.labels, data=data.images, trains_on_real=True, config=settings)
    expert_phase(small(buffer=str(tmp_path / "tad")), data, hook, Place(tmp_path))
    assert hook.decided and torch.equal(hook.state.trusted, before.state.trusted) and not bool(hook.state.trusted.all())
    data, _ = buffer(tmp_path / "none")
    hook = attach("tad", labels=data.labels, data=data.images, trains_on_real=True, config=settings)
    with pytest.raises(ConfigError, match="tad"):
        expert_phase(small(buffer=str(tmp_path / "none")), data, hook, Place(tmp_path))
    hook = attach("iwd", labels=data.labels, data=data.images, trains_on_real=True)
    assert expert_phase(small(buffer=str(tmp_path / "none")), data, hook, Place(tmp_path)).again is not None


# -- whole runs --------------------------------------------------------------------------------------


def test_a_run_trains_its_experts_first(tmp_path: Path) -> None:
    results = run_experiment(CONFIG, "tad", tmp_path)
    assert results["expert_seconds"] > 0 and results["split"]["recall"] < 1 and results["iterations"] == 8
    info = BufferInfo.read(tmp_path / PHASES[0])
    assert info is not None and info.method == "tad" and info.epochs == 4 and not (tmp_path / PHASES[1]).exists()
    assert len(read_buffer(buffer_files(tmp_path / PHASES[0])[0])) == 2
    synthetic = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    assert synthetic.learning_rate is not None and synthetic.learning_rate != 0.02
    again = run_experiment(dataclasses.replace(CONFIG, seed=1), "tad", tmp_path, overwrite=True)
    assert again["seed"] == 1  # its experts are others, so those of the first run are gone
    random = run_experiment(CONFIG, "random", tmp_path / "random")
    assert random["expert_seconds"] == 0 and not (tmp_path / "random" / PHASES[0]).exists()


def test_a_published_preset_fills_what_is_not_said() -> None:
    config = RunConfig(baseline="mtt", dataset="cifar10", ipc=10, loop={"preset": "cifar10", "syn_steps": 7})
    plan = resolve(config, "noisy")
    assert plan.zca and plan.loop.iterations == 5000 and plan.loop.lr_img == 1e3 and plan.evaluation.width == 128
    assert plan.record["loop"] == {**PRESETS["cifar10"][10]["loop"], "syn_steps": 7}
    for name, value in plan.record["loop"].items():
        assert getattr(plan.loop, name) == value
    with pytest.raises(UnknownNameError, match="preset"):
        resolve(RunConfig(baseline="mtt", loop={"preset": "mnist"}), "noisy")
    with pytest.raises(ConfigError, match="1, 10, 50"):
        resolve(RunConfig(baseline="mtt", ipc=3, loop={"preset": "cifar10"}), "noisy")
    for name, by_ipc in PRESETS.items():
        for ipc in by_ipc:
            plan = resolve(RunConfig(baseline="mtt", dataset=name, ipc=ipc, loop={"preset": name}), "noisy")
            assert isinstance(plan.loop, MTTConfig) and plan.loop.ipc == ipc


def test_settings_that_suit_the_plugins_own_scorer_are_not_taken() -> None:
    digits = resolve(RunConfig(baseline="mtt", dataset="digits"), "tad")
    assert set(digits.methods) == {"scorer"} and digits.record["loop"] == {} and digits.loop.lr_img == 1000
    given = RunConfig(baseline="mtt", methods={"tad": {"warmup": 5}})
    assert resolve(given, "tad").methods["tad"] == {"warmup": 5}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    if not hasattr(os, "fork"):
        pytest.skip("attempts are forks")
    folder = tmp_path_factory.mktemp("killed")
    process = start_program("tests.distill.killed_trajectories", str(folder), output=folder / "output")
    lines = (folder / "output").read_text().splitlines() if process.wait() == 0 else []
    assert lines, (folder / "output").read_text()
    return folder, {r.pop("arm"): r for r in map(json.loads, lines)}


@pytest.mark.parametrize("arm", ["mtt/tad+iwd", "datm/iwd"])
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(arm: str, killed: Any) -> None:
    folder, found = killed
    statuses = dict(found[arm])
    assert statuses.pop("last") == 0
    assert set(statuses) == set(PLAN) and set(statuses.values()) == {-signal.SIGKILL}
    whole, broken = RunFolder(folder / arm / "whole"), RunFolder(folder / arm / "killed")
    assert (whole.path / PHASES[1]).exists()
    a, b = (SyntheticSet.load(f.path / "synthetic.safetensors") for f in (whole, broken))
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.learning_rate == b.learning_rate
    compared = ("accuracy", "best_iteration", "state")
    assert {k: whole.results()[k] for k in compared} == {k: broken.results()[k] for k in compared}
    # one log, without a line twice or missing
    logs = [[{k: v for k, v in r.items() if "seconds" not in k} for r in f.records()] for f in (whole, broken)]
    assert json.dumps(logs[0]) == json.dumps(logs[1])
    assert {r["event"] for r in logs[0]} >= {"expert", "iteration", "chosen"}


@pytest.mark.parametrize("baseline", ["mtt", "datm"])
def test_default_rates_run_on_a_small_folder_of_ones_own(baseline: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 3)):
        for c, name in enumerate("ab"):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (3, 8, 8), generator=generator)
                pixels[c] += 100
                to_pil_image(pixels.to(torch.uint8)).save(tmp_path / "own" / part / name / f"{i}.png")
    config = RunConfig(
        baseline=baseline, dataset=f"folder:{tmp_path / 'own'}", ipc=1, iterations=6, width=4, eval_epochs=2,
        eval_runs=1, candidates=1, device="cpu",
        loop={"max_start_epoch": 2, "expert_epochs": 1, "syn_steps": 2, "experts": {"experts": 2}},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TadPluginWarning)
        results = run_experiment(config, "noisy", tmp_path / "run")
    assert results["iterations"] == 6
    synthetic = SyntheticSet.load(tmp_path / "run" / "synthetic.safetensors")
    assert synthetic.learning_rate is not None and synthetic.learning_rate > 0
