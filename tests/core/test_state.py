"""SampleState: what it holds, what it refuses, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tad_plugin.core.state import SampleState
from tad_plugin.data.labels import check_labels, label_digest
from tad_plugin.data.real import RealData
from tad_plugin.errors import (
    EmptyClassError,
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    StateMismatchError,
    UnknownNameError,
)

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])


def state() -> SampleState:
    return SampleState(LABELS, 3)


def full_state() -> SampleState:
    made = state()
    made.update(target=LABELS.flip(0), trusted=torch.arange(9) % 4 > 0, trust=torch.linspace(0, 1, 9))
    made.set_weights("tad", torch.linspace(0.1, 2, 9))
    made.set_weights("iwd", torch.linspace(2, 0.3, 9))
    made.register("influence", torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))
    made.register("recalled", torch.zeros(9, dtype=torch.bool))
    return made


def same(a: SampleState, b: SampleState) -> bool:
    x, y = a.state_dict(), b.state_dict()
    flat = [(x[k], y[k]) for k in SampleState.FIELDS]
    flat += [(x[g][k], y[g][k]) for g in ("extra", "factors") for k in {*x[g], *y[g]}]
    return x["digest"] == y["digest"] and all(torch.equal(p, q) and p.dtype == q.dtype for p, q in flat)


# labels


@pytest.mark.parametrize(
    ("labels", "k", "error", "message"),
    [
        (
            torch.tensor([0, 1, 3]),
            3,
            InvalidLabelsError,
            "0 to 3 .*position 2",
        ),
        (torch.tensor([0, -1, 1]), 2, InvalidLabelsError, "-1 to 1 .*position 1"),
        (torch.tensor([0.0, 1.0]), 2, InvalidLabelsError, "float32"),
        (torch.tensor([True, False]), 2, InvalidLabelsError, "bool"),
        (torch.zeros(2, 2, dtype=torch.int64), 2, InvalidLabelsError, r"\[2, 2\]"),
        (torch.zeros(0, dtype=torch.int64), 2, InvalidLabelsError, "label"),
        (torch.tensor([0]), 0, InvalidInputError, "num_classes"),
        (torch.tensor([0, 2]), 3, EmptyClassError, "class 1"),
    ],
)
def test_bad_labels_are_named(labels: torch.Tensor, k: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SampleState(labels, k)


def test_a_wrong_length_is_named() -> None:
    with pytest.raises(InvalidLabelsError, match="4.* 3"):
        check_labels(torch.tensor([0, 1, 2]), 3, 4)


def test_any_integer_dtype_becomes_int64_and_hashes_alike() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32):
        found = check_labels(LABELS.to(dtype), 3)
        assert found.dtype == torch.int64 and label_digest(LABELS.to(dtype)) == label_digest(LABELS)
    assert label_digest(LABELS) != label_digest(LABELS.flip(0))


# starting values and fields


def test_the_start_is_the_baseline() -> None:
    made = state()
    assert torch.equal(made.target, LABELS) and bool(made.trusted.all())
    assert torch.equal(made.weight, torch.ones(9)) and torch.equal(made.trust, torch.ones(9))
    assert [made[n].dtype for n in ("observed", "target", "weight", "trusted", "trust")] == [
        torch.int64, torch.int64, torch.float32, torch.bool, torch.float32,
    ]  # fmt: skip
    assert made.summary() == {
        "samples": 9, "trusted": 9, "untrusted": 0, "relabelled": 0, "smallest_pool": 2, "effective_sample_size": 1.0,
    }  # fmt: skip
    assert [p.tolist() for p in made.pools()] == [[0, 3, 6, 8], [1, 4, 7], [2, 5]]
    assert "trusted=9" in repr(made) and len(made) == 9


def test_the_given_labels_are_copied() -> None:
    given = LABELS.clone()
    made = SampleState(given, 3)
    given.zero_()
    assert torch.equal(made.observed, LABELS)


def test_a_class_of_one_sample_can_be_drawn_and_weighted() -> None:
    made = SampleState(torch.tensor([0, 1, 1]), 2)
    made.set_weights("m", torch.tensor([0.2, 1.0, 3.0]))
    assert made.sample(0, 5, torch.Generator()).tolist() == [0]
    assert float(made.weight[0]) == 1.0


def test_update_replaces_and_checks() -> None:
    made = state()
    trusted = torch.arange(9) < 5
    made.update(target=LABELS.flip(0), trusted=trusted)
    assert torch.equal(made.pool(0), ((LABELS.flip(0) == 0) & trusted).nonzero().flatten())
    assert torch.equal(made.observed, LABELS)
    for target, value in ((LABELS + 1, " 3 "), (LABELS - 1, "-1"), (LABELS[:2], "2"), (LABELS.float(), "float32")):
        with pytest.raises(InvalidLabelsError, match=f"target.*{value}"):
            made.update(target=target)
    with pytest.raises(InvalidInputError, match=r"trusted.*\[3\]"):
        made.update(trusted=torch.ones(3, dtype=torch.bool))
    for bad in (torch.full((9,), 1.5), torch.full((9,), float("nan")), torch.full((9,), -0.1)):
        with pytest.raises(InvalidInputError, match="trust"):
            made.update(trust=bad)
    assert torch.equal(made.target, LABELS.flip(0)) and torch.equal(made.trust, torch.ones(9))


def test_writing_and_states_of_checked_data_do_not_check_labels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = RealData(torch.zeros(9, 2), LABELS.int(), 3)
    monkeypatch.setattr("tad_plugin.core.state.check_labels", None)  # a call would fail
    made = SampleState.of(data)
    assert torch.equal(made.observed, LABELS) and made.digest == label_digest(LABELS) and made.untouched()
    made.update(target=LABELS.flip(0).int(), trusted=LABELS.flip(0) != 3, trust=torch.linspace(0, 1, 9))
    made.set_weights("tad", torch.linspace(0.1, 2, 9))
    assert torch.equal(made.target, LABELS.flip(0)) and made.target.dtype == torch.int64
    with pytest.raises(EmptyClassError, match="class 1"):
        SampleState.of(data.subset(LABELS != 1))
    assert len(SampleState.of(data.subset(LABELS != 1), allow_empty=True)) == 6


def test_a_state_is_untouched_until_a_label_a_weight_or_the_trust_changes() -> None:
    made = state()
    made.set_weights("m", torch.full((9,), 0.5))
    made.update(trust=torch.zeros(9))
    assert made.untouched()
    made.update(trusted=torch.arange(9) > 0)
    assert not made.untouched()
    other = state()
    other.update(target=LABELS.flip(0))
    assert not other.untouched()
    third = state()
    third.set_weights("m", torch.arange(1.0, 10.0))
    assert not third.untouched()


def test_registered_tensors_keep_their_values_and_have_one_row_per_sample() -> None:
    made = state()
    stored = made.register("score", torch.arange(9.0))
    stored[0] = 7
    assert made.register("score", torch.zeros(9))[0] == 7 and made["score"][0] == 7 and "score" in made
    with pytest.raises(InvalidInputError, match="other.*9.*3"):
        made.register("other", torch.zeros(3))
    for name in ("weight", "observed", "a/b"):
        with pytest.raises(InvalidInputError, match=name):
            made.register(name, torch.zeros(9))
    with pytest.raises(UnknownNameError, match="'scores'.*'score'"):
        made["scores"]


# weights


def test_weights_are_the_product_of_the_factors_with_mean_one_over_each_class() -> None:
    made, (a, b) = state(), (torch.rand(9, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    trusted = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    made.update(trusted=trusted)
    made.set_weights("a", a)
    made.set_weights("b", b + 5)
    made.set_weights("b", b)  # replaced, not multiplied once more
    for c in range(3):
        members = [i for i in range(9) if LABELS[i] == c]
        inside = [i for i in members if trusted[i]]
        mean = sum(float(a[i] * b[i]) for i in inside) / len(inside)
        for i in members:
            assert float(made.weight[i]) == pytest.approx(float(a[i] * b[i]) / mean, rel=1e-5)


def test_a_batch_has_mean_one_in_each_of_its_classes() -> None:
    made = full_state()
    made.update(target=LABELS, trusted=torch.ones(9, dtype=torch.bool))
    batch = torch.tensor([0, 3, 8, 1, 4, 2])
    got = made.weights(batch)
    for c in range(3):
        rows = [k for k, i in enumerate(batch.tolist()) if LABELS[i] == c]
        mean = sum(float(made.weight[batch[k]]) for k in rows) / len(rows)
        for k in rows:
            assert float(got[k]) == pytest.approx(float(made.weight[batch[k]]) / mean, rel=1e-6)
    assert made.targets(batch).tolist() == [0, 0, 0, 1, 1, 2]


def test_untrusted_samples_weigh_nothing() -> None:
    made = state()
    made.update(trusted=torch.arange(9) != 0)
    w = made.weights(torch.arange(9))
    assert w[0] == 0
    for c in range(3):
        assert float(w[c == LABELS].mean()) == pytest.approx(1.0)
    # Alone with an untrusted sample a class drops out of the batch instead of counting it.
    assert made.weights(torch.tensor([0, 1]))[0] == 0 and made.weights(torch.tensor([0])).tolist() == [0.0]


def test_training_weights_are_the_weights_of_trusted_samples_and_not_rescaled() -> None:
    made = full_state()
    batch = torch.tensor([7, 8, 1, 4])
    found = made.training_weights(batch)
    assert found.dtype == torch.float32 and torch.equal(found, made.training_weights()[batch])
    assert found.tolist() == [float(made.weight[7]), 0.0, float(made.weight[1]), 0.0]


def test_equal_weights_are_exactly_one_and_vanished_classes_count_evenly() -> None:
    made = state()
    made.set_weights("m", torch.full((9,), 0.3))
    assert torch.equal(made.weight[:1], made.weights(torch.tensor([0])))
    assert torch.equal(made.weights(torch.arange(9)), torch.ones(9))
    made.set_weights("m", (LABELS != 1).float())
    assert torch.equal(made.weight, torch.ones(9))
    made.set_weights("m", torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1, 1]))
    assert torch.equal(made.weights(torch.tensor([0, 3, 1])), torch.ones(3))
    assert made.weights(torch.tensor([0, 6])).tolist() == [0.0, 2.0]


def test_samples_without_weight_leave_the_pool() -> None:
    made = state()
    made.set_weights("m", torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1]))
    assert made.pool(0).tolist() == [3, 6, 8]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_weights_are_named(bad: float) -> None:
    values = torch.ones(9)
    values[4] = bad
    with pytest.raises(InvalidInputError, match="position 4"):
        state().set_weights("m", values)


# drawing


def test_samples_are_drawn_without_replacement_from_the_pool(global_rng_untouched: None) -> None:
    made = state()
    for n in (1, 3, 4, 50):
        drawn = made.sample(0, n, torch.Generator().manual_seed(n))
        assert len(drawn) == len(drawn.unique()) == min(n, 4) and {*drawn.tolist()} <= {0, 3, 6, 8}
        order = torch.randperm(4, generator=torch.Generator().manual_seed(n))[:n]
        assert torch.equal(drawn, torch.tensor([0, 3, 6, 8])[order])


def test_bad_draws_are_named() -> None:
    made = state()
    with pytest.raises(InvalidInputError, match="3"):
        made.sample(3, 1, torch.Generator())
    with pytest.raises(InvalidInputError, match="0"):
        made.sample(0, 0, torch.Generator())
    for n in (1.0, "1", True):
        with pytest.raises(InvalidInputError):
            made.sample(0, n, torch.Generator())  # type: ignore[arg-type]
    for c in (-1, 0.0, "0", None):
        with pytest.raises(InvalidInputError):
            made.pool(c)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        made.sample(0, 1, None)  # type: ignore[arg-type]
    folds = SampleState(LABELS, 3, allow_empty=True)
    folds.update(trusted=LABELS != 2)
    with pytest.raises(EmptyClassError, match="class 2"):
        folds.sample(2, 1, torch.Generator())


# files


def test_a_saved_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = full_state()
    made.save(tmp_path / "s.safetensors", configs={"tad": {"warmup": 3}})
    for labels in (None, LABELS, LABELS.int()):
        assert same(SampleState.load(tmp_path / "s.safetensors", labels), made)
    header = SampleState.read_header(tmp_path / "s.safetensors")
    assert header["configs"] == {"tad": {"warmup": 3}} and header["digest"] == label_digest(LABELS)
    loaded = SampleState.load(tmp_path / "s.safetensors")
    assert [p.tolist() for p in loaded.pools()] == [p.tolist() for p in made.pools()]


def test_a_checkpoint_shares_nothing_with_the_state() -> None:
    made = full_state()
    kept, other = made.state_dict(), state()
    made.update(trust=torch.zeros(9), target=LABELS)
    other.load_state_dict(kept)
    assert same(other, full_state())
    other["influence"].zero_()
    assert bool(kept["extra"]["influence"].any())


def test_a_state_of_other_data_shows_both_hashes(tmp_path: Path) -> None:
    made, path = full_state(), tmp_path / "s.safetensors"
    made.save(path)
    # another order of the same labels, another length, another number of classes
    for labels, k in ((LABELS.flip(0), 3), (LABELS[:6], 3), (torch.cat([LABELS, torch.tensor([3])]), 4)):
        other = SampleState(labels, k)
        for act in (
            lambda labels=labels: SampleState.load(path, labels),
            lambda o=other: o.load_state_dict(made.state_dict()),
        ):
            with pytest.raises(StateMismatchError) as caught:
                act()
            assert label_digest(LABELS)[:16] in str(caught.value) and label_digest(labels)[:16] in str(caught.value)
    with pytest.raises(StateMismatchError, match="4 classes.* 3 classes"):
        SampleState(LABELS, 4, allow_empty=True).load_state_dict(made.state_dict())


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) - 20])
    elif how == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "garbage":
        path.write_bytes(bytes(range(256)) * 8)
    elif how == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        rewritten(path, how)


def rewritten(path: Path, how: str) -> None:
    with safe_open(path, framework="pt") as f:
        header: Any = json.loads(f.metadata()["tad_plugin"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    if how == "version":
        header["version"] = 99
    elif how == "format":
        header["format"] = "something.else"
    elif how == "list":
        header = [1, 2]
    elif how == "field":
        del tensors["trust"]
    elif how == "no digest":
        del header["digest"]
    elif how == "labels":
        tensors["observed"] = tensors["observed"].flip(0).contiguous()
    save_file(tensors, path, metadata={} if how == "no header" else {"tad_plugin": json.dumps(header)})


@pytest.mark.parametrize(
    "how",
    [
        "missing", "empty", "truncated", "half", "garbage", "flipped", "version", "format", "list", "field",
        "no digest", "labels", "no header",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.safetensors"
    full_state().save(path)
    damaged(path, how)
    with pytest.raises(FileFormatError, match=r"s\.safetensors"):
        SampleState.load(path, LABELS)


def test_saving_replaces_in_one_step_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    state().save(path)
    full_state().save(path)
    assert same(SampleState.load(path), full_state()) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_state_with_an_allowed_empty_class_can_be_saved(tmp_path: Path) -> None:
    made = SampleState(torch.tensor([0, 2]), 3, allow_empty=True)
    made.save(tmp_path / "s")
    assert SampleState.load(tmp_path / "s").num_classes == 3
