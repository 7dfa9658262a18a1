"""Several experts: the buffer, what methods decide for them, resume, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tad_plugin import attach
from tad_plugin.cli import main
from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.labels import label_digest
from tad_plugin.data.real import RealData
from tad_plugin.distill.experts import train as module
from tad_plugin.distill.experts.buffer import BufferInfo, buffer_files, check_buffer, read_buffer
from tad_plugin.distill.experts.train import STATE_FILE, train_experts
from tad_plugin.distill.experts.trainer import ExpertTrainer, expert_network
from tad_plugin.errors import DiskSpaceError, ResumeError, StateMismatchError, TadPluginWarning
from tad_plugin.experiments.folder import RunFolder
from tad_plugin.utils.seeds import expert_generator
from tests.distill.experts.training import Even, all_of, config, data, hook_of, plain, same
from tests.problems import PLAIN, blobs, flip
from tests.warm import start_program


def test_no_method_is_bit_identical_to_a_method_that_changes_nothing_and_draws_nothing(
    tmp_path: Path, global_rng_untouched: None
) -> None:
    real = data()
    decided = hook_of(real, Even())
    decided.settle()
    train_experts(real, config(), tmp_path / "with", decided, preprocessing=PLAIN)
    hook = plain(real)
    before = hook.generator.get_state()
    train_experts(real, config(), tmp_path / "without", hook, preprocessing=PLAIN)
    assert torch.equal(hook.generator.get_state(), before) and not (tmp_path / "without" / STATE_FILE).exists()
    for name in ("replay_buffer_0.pt", "replay_buffer_1.pt"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


# -- several, as a buffer ----------------------------------------------------------------------------


def test_a_buffer_holds_every_expert_once_with_its_description(tmp_path: Path) -> None:
    real, records = data(), []
    seen: list[int] = []
    info = train_experts(
        real, config(), tmp_path, plain(real), preprocessing=PLAIN, log=records.append,
        watch=lambda n, _: seen.append(n) or {"x": n},
    )  # fmt: skip
    assert [p.name for p in buffer_files(tmp_path)] == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    assert [len(read_buffer(p)) for p in buffer_files(tmp_path)] == [2, 1]
    assert BufferInfo.read(tmp_path) == info and info.labels == label_digest(real.labels) and info.state_file == ""
    assert (info.architecture, info.width, info.depth, info.epochs, info.experts) == ("convnet", 4, 2, 3, 3)
    found = all_of(tmp_path)
    assert not torch.equal(found[0][0][0], found[1][0][0])
    for number, expert in enumerate(found):
        network = expert_network(config(), real, expert_generator(0, number))
        assert same(expert[0], [p.detach() for p in network.parameters()])
        check_buffer(expert, network, real.labels, 3, info=info, preprocessing=PLAIN)
    assert seen == [0, 1, 2] and [r["expert"] for r in records] == [r["x"] for r in records] == [0, 1, 2]


def test_experts_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    train_experts(data(), config(), tmp_path / "many", plain(data()))
    train_experts(data(), config(experts=1, experts_per_file=5), tmp_path / "one", plain(data()))
    assert same(all_of(tmp_path / "many")[:1], all_of(tmp_path / "one"))


def test_a_finished_buffer_is_returned_as_it_is(tmp_path: Path) -> None:
    info = train_experts(data(), config(), tmp_path, plain(data()))
    before = {p.name: p.read_bytes() for p in buffer_files(tmp_path)}
    records: list[Any] = []
    assert train_experts(data(), config(), tmp_path, plain(data()), log=records.append) == info
    assert {p.name: p.read_bytes() for p in buffer_files(tmp_path)} == before and not records


# -- methods -----------------------------------------------------------------------------------------


class Drop(Callback):
    """Distrusts the wrong labels after the second epoch of the first network; notes its events."""

    name: ClassVar[str] = "drop"
    needs_scorer: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.rounds = 0

    def on_scorer_start(self, *, state: SampleState) -> None:
        self.events.append("start")

    def on_scorer_epoch(self, *, state: SampleState, network: nn.Module, data: RealData) -> None:
        self.events.append("epoch")
        self.rounds += 1
        assert data.true_labels is not None
        if self.rounds == 2:
            state.update(trusted=state.observed == data.true_labels)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.rounds = int(state["rounds"])


@pytest.mark.parametrize(("pilots", "rounds"), [(0, "all"), (1, "all"), (1, "pilots"), (2, "pilots")])
def test_experts_share_what_was_decided_and_pilots_are_not_kept(tmp_path: Path, pilots: int, rounds: str) -> None:
    real, method = data(), Drop()
    hook = hook_of(real, method)
    info = train_experts(real, config(pilots=pilots, rounds=rounds), tmp_path / "all", hook=hook)
    asked = pilots if rounds == "pilots" else 3 + pilots
    assert method.events == ["start", "epoch", "epoch", "epoch"] * asked
    assert (
        hook.decided and info.method == "test" and info.state_file == STATE_FILE and len(all_of(tmp_path / "all")) == 3
    )
    saved = SampleState.load(tmp_path / "all" / STATE_FILE, real.labels)
    assert torch.equal(saved.trusted, real.labels == real.true_labels)
    # With a pilot the state was known from the first step of expert 0 on, and without one from its third epoch on.
    known = hook_of(real, Even())
    if pilots:
        known.state.update(trusted=real.labels == real.true_labels)
    train_experts(real, config(experts=1), tmp_path / "first", hook=known)
    mine, other = all_of(tmp_path / "all")[0], all_of(tmp_path / "first")[0]
    assert same(mine[:3], other[:3]) and same(mine[3], other[3]) == bool(pilots)


def test_pilots_can_be_longer_than_experts(tmp_path: Path) -> None:
    method = Drop()
    train_experts(data(), config(epochs=1, pilot_epochs=4), tmp_path, hook=hook_of(data(), method))
    assert method.events == ["start"] + ["epoch"] * 4 and len(all_of(tmp_path)[0]) == 2


def test_a_decided_state_is_used_and_no_method_asked(tmp_path: Path) -> None:
    real, method = data(), Drop()
    hook = hook_of(real, method)
    hook.settle()
    train_experts(real, config(experts=1, rho=0.05), tmp_path, hook=hook)
    assert method.events == []
    assert ExpertTrainer(config(rho=0.05), real, hook, expert_generator(0, 0)).events == (None, None)


def test_tad_decides_in_the_expert_phase(tmp_path: Path) -> None:
    images, true = blobs(per_class=60, spread=0.4)
    observed = flip(true, 3, 0.4)
    settings = {"tad": {"warmup": 2, "history": 2}}
    hook = attach("tad", labels=observed, data=images, true_labels=true, trains_on_real=True, config=settings)
    assert hook.data is not None
    train_experts(hook.data, config(experts=1, pilot_epochs=15, width=8, augment="none"), tmp_path, hook=hook)
    right = (hook.state.target == true)[hook.state.trusted]
    assert len(right) > 100 and float(right.float().mean()) > 0.95 and float((observed == true).float().mean()) < 0.6


def test_a_method_that_never_decided_is_named(tmp_path: Path) -> None:
    real = data()
    hook = attach("tad", labels=real.labels, data=real.images, trains_on_real=True, config={"tad": {"warmup": 3}})
    with pytest.warns(TadPluginWarning, match="tad.* 3 epochs"):
        train_experts(real, config(experts=1), tmp_path, hook=hook)


def test_an_owner_who_restored_the_hook_keeps_it(tmp_path: Path) -> None:
    real = data()
    train_experts(real, config(), tmp_path, hook=hook_of(real, Drop()))
    fresh = hook_of(real, Drop())
    train_experts(real, config(), tmp_path, hook=fresh)
    assert fresh.decided and bool((~fresh.state.trusted).any())
    later = hook_of(real, Drop())
    later.settle()
    train_experts(real, config(), tmp_path, hook=later)
    assert bool(later.state.trusted.all())


# -- resume ------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize(("method", "rounds"), [("none", "all"), ("tad", "all"), ("tad", "pilots")])
def test_stopped_anywhere_it_ends_with_the_same_bits(
    tmp_path: Path, method: str, rounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = data()

    def once(folder: Path) -> Hook:
        settings = {"tad": {"warmup": 1, "history": 2}} if method == "tad" else None
        hook = attach(method, labels=real.labels, data=real.images, trains_on_real=True, config=settings, start=False)
        train_experts(real, config(momentum=0.5, rounds=rounds), folder, hook=hook, every=0.0)
        return hook

    whole = once(tmp_path / "whole")
    calls = {"epoch": 0, "save": 0, "write": 0}
    limits = dict.fromkeys(calls, 0)

    def stopping(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **more: Any) -> Any:
            result = original(*args, **more)
            calls[name] += 1
            if calls[name] == limits[name]:
                raise Killed
            return result

        monkeypatch.setattr(owner, attribute, wrapped)

    stopping("epoch", ExpertTrainer, "run_epoch")
    stopping("save", module.BufferStore, "save_checkpoint")
    stopping("write", module, "write_buffer")
    stops = 0
    for name in ("epoch", "save", "write", "epoch", "save", "write", "write"):
        calls.update(dict.fromkeys(calls, 0))
        limits.update({**dict.fromkeys(limits, 0), name: 2 if name != "write" else 1})
        try:
            again = once(tmp_path / "cut")
        except Killed:
            stops += 1
    assert stops >= 6
    limits.update(dict.fromkeys(limits, 0))
    again = once(tmp_path / "cut")
    assert same(all_of(tmp_path / "whole"), all_of(tmp_path / "cut"))
    for field in SampleState.FIELDS:
        assert torch.equal(getattr(whole.state, field), getattr(again.state, field))


def test_killed_in_the_middle_of_an_expert_the_command_line_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    process = start_program("tests.distill.experts.killed_experts", str(tmp_path), output=tmp_path / "output")
    assert process.wait() == 0, (tmp_path / "output").read_text()
    statuses = json.loads((tmp_path / "output").read_text().splitlines()[-1])
    assert statuses == {
        "in the first expert": -9,
        "writing a file": -9,
        "in the last expert": -9,
        "the end": -9,
        "last": 0,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for path in buffer_files(whole):
        assert path.read_bytes() == (killed / path.name).read_bytes()
    assert (whole / "state.safetensors").read_bytes() == (killed / "state.safetensors").read_bytes()
    lines = [
        [{k: v for k, v in record.items() if "seconds" not in k} for record in RunFolder(f).records()]
        for f in (whole, killed)
    ]
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    results = [json.loads((f / "results.json").read_text()) for f in (whole, killed)]
    assert results[0]["accuracy"] == results[1]["accuracy"] and len(results[0]["accuracy"]["experts"]) == 3
    assert results[0]["state"] == results[1]["state"]


# -- bad input ---------------------------------------------------------------------------------------


def test_other_settings_or_labels_do_not_continue_a_buffer(tmp_path: Path) -> None:
    train_experts(data(), config(), tmp_path, plain(data()))
    with pytest.raises(ResumeError, match="epochs.*3.*4.*seed.*0.*1"):
        train_experts(data(), config(epochs=4), tmp_path, plain(data()), seed=1)
    real = dataclasses.replace(data(), labels=(data().labels + 1) % 3)
    with pytest.raises(ResumeError, match=f"labels.*{label_digest(data().labels)}"):
        train_experts(real, config(), tmp_path, plain(real))


def test_a_foreign_buffer_is_not_written_over(tmp_path: Path) -> None:
    train_experts(data(), config(), tmp_path / "a", plain(data()))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "replay_buffer_0.pt", tmp_path / "b")
    with pytest.raises(ResumeError, match="replay_buffer_0.pt"):
        train_experts(data(), config(), tmp_path / "b", plain(data()))


def test_a_hook_of_other_labels_is_named(tmp_path: Path) -> None:
    real = data()
    hook = attach("none", labels=(real.labels + 1) % 3, data=real.images, trains_on_real=True)
    with pytest.raises(StateMismatchError, match=hook.state.digest[:16]):
        train_experts(real, config(), tmp_path, hook=hook)


def test_too_small_a_disk_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 1000))
    monkeypatch.setattr(ExpertTrainer, "run_epoch", lambda _: pytest.fail("trained"))
    with pytest.raises(DiskSpaceError, match="MB"):
        train_experts(data(), config(), tmp_path / "new", plain(data()))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails_at", [2, 5, 9, 14, 20])
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    train_experts(data(), config(), tmp_path / "whole", plain(data()), every=0.0)
    count, save = [0], torch.save

    def filling(tree: Any, where: Any) -> None:
        count[0] += 1
        if count[0] >= fails_at:
            if isinstance(where, Path):
                where.write_bytes(b"the rest does not fit")
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        save(tree, where)

    monkeypatch.setattr(torch, "save", filling)
    failed = False
    try:
        train_experts(data(), config(), tmp_path / "cut", plain(data()), every=0.0)
    except DiskSpaceError as error:
        failed = True
        assert "file write failed" in str(error)
    assert failed == (fails_at <= count[0])
    monkeypatch.setattr(torch, "save", save)
    train_experts(data(), config(), tmp_path / "cut", plain(data()), every=0.0)
    assert same(all_of(tmp_path / "whole"), all_of(tmp_path / "cut"))
    assert not list((tmp_path / "cut").rglob(".tmp-*"))


# -- the command line --------------------------------------------------------------------------------


def test_the_command_trains_a_buffer_and_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "b")
    small = ["--per_class", "16", "--width", "4", "--epochs", "2", "--batch_train", "32", "--noise", "symmetric:0.4"]
    command = ["experts", *small, "--arm", "oracle", "--out", out]
    assert main([*command, "--experts", "2"]) == 0
    text = capsys.readouterr().out
    assert "2 experts, 2 epochs" in text and f"replay buffer: {out}" in text
    info = BufferInfo.read(out)
    assert info is not None and (info.width, info.method, info.dataset) == (4, "oracle", "digits")
    assert len(all_of(Path(out))) == 2 and RunFolder(out).results()["split"]["precision"] == 1.0
    assert main([*command, "--experts", "2"]) == 0  # finished: returned at once
    assert main([*command, "--experts", "3"]) == 2
    assert "expert.experts: there 2, now 3" in capsys.readouterr().err
    assert main([*command, "--experts", "1", "--overwrite", "true"]) == 0
    assert len(all_of(Path(out))) == 1
    fresh = [*command[:-1], str(tmp_path / "new")]
    for flags, message in ((["--epochs", "0"], "epochs of at least 1"), (["--arm", "nosy"], "'noisy'")):
        assert main([*fresh, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
