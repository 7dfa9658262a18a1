"""What attach() makes of images, labels, indices and PyTorch's modes: the right thing, or a named error."""

from __future__ import annotations

import contextlib
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tad_plugin import Hook, attach
from tad_plugin.errors import (
    ConfigError,
    FileFormatError,
    InvalidInputError,
    InvalidLabelsError,
    TadPluginError,
    TadPluginWarning,
)
from tests.problems import blobs, flip

IMAGES, TRUE = blobs(spread=0.8)
LABELS = flip(TRUE, 3, 0.3)
SMALL = {"scorer": {"epochs": 3, "width": 4, "batch_size": 32}, "tad": {"warmup": 1}}
METHODS = ("none", "random", "tad")
pytestmark = pytest.mark.filterwarnings("ignore::tad_plugin.errors.UnimodalClassWarning")


def made(method: str = "none", data: Any = IMAGES, labels: Any = LABELS, **more: Any) -> Hook:
    config = {name: values for name, values in SMALL.items() if name in ("scorer", method)}
    return attach(method, labels=labels, data=data, num_classes=3, config=config, **more)


class Pairs(Dataset):  # type: ignore[type-arg]
    """Items are made by a function; each one draws from the global generators."""

    def __init__(self, item: Any = lambda i: (IMAGES[i], int(LABELS[i]))) -> None:
        self.item = item
        self.read = 0

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        return self.item(i)


# images


@pytest.mark.parametrize("method", ("none", "random"))
@pytest.mark.parametrize(
    "given",
    [
        IMAGES,
        IMAGES.double(),
        IMAGES.numpy(),
        IMAGES.double().numpy(),
        IMAGES.flip(0).numpy()[::-1],
        list(IMAGES),
        tuple(IMAGES),
        [x.numpy() for x in IMAGES],
        IMAGES.tolist(),
        IMAGES[:, 0],
        IMAGES[:, 0].numpy(),
        [x[0] for x in IMAGES],
        IMAGES.clone().requires_grad_(),
    ],
)
def test_images_of_every_kind_are_the_same_images(method: str, given: Any) -> None:
    hook = made(method, given)
    assert hook.data is not None and torch.equal(hook.data.images, IMAGES)
    assert hook.data.images.dtype == torch.float32 and not hook.data.images.requires_grad
    assert torch.equal(hook.state.weight, made(method).state.weight)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("none", torch.float16), ("random", torch.bfloat16), ("none", torch.float64), ("tad", torch.float16)],
)
def test_other_float_dtypes_are_cast(method: str, dtype: torch.dtype) -> None:
    hook = made(method, IMAGES.to(dtype))
    assert hook.data is not None and torch.equal(hook.data.images, IMAGES.to(dtype).float())
    assert torch.equal(hook.state.weight, made(method, IMAGES.to(dtype).float()).state.weight)


@pytest.mark.parametrize("method", ["random", "tad"])
def test_a_dataset_is_read_once_and_draws_nothing_that_stays(method: str, global_rng_untouched: None) -> None:
    given = Pairs()
    hook = made(method, given)
    assert hook.data is not None and torch.equal(hook.data.images, IMAGES) and given.read == 60
    hook = made(method, Pairs(lambda i: (IMAGES[i].numpy(), 0, "more")))
    assert hook.data is not None and torch.equal(hook.data.images, IMAGES)
    pairs = [(x, 0) for x in IMAGES]
    assert torch.equal(made(method, pairs).data.images, IMAGES)  # type: ignore[union-attr]


def test_none_reads_no_dataset(global_rng_untouched: None) -> None:
    given = Pairs()
    hook = made("none", given)
    assert given.read == 0 and hook.data is None and not hook.enabled
    assert made("none", Pairs(), noise="symmetric:0.2").data is None
    with pytest.raises(InvalidInputError, match="59.* 60"):
        attach("none", labels=LABELS[:59], data=given)
    corrupted = made("none", given, noise="instance:0.2")  # this noise depends on the images
    assert given.read == 60 and corrupted.data is not None


class Endless(IterableDataset):  # type: ignore[type-arg]
    """No positions."""

    def __iter__(self) -> Any:
        return iter([(IMAGES[0], 0)])


BAD_DATA = [
    3, "folder", {}, {i: (IMAGES[i], 0) for i in range(60)}, [], Endless(), object(),
    IMAGES.flatten(1), IMAGES[:, None], IMAGES[0, 0, 0], torch.zeros(60, 0), torch.zeros(60, 1, 0, 8),
    IMAGES.to(torch.complex64), np.zeros((60, 8, 8), dtype="U1"), np.empty((60, 8, 8), dtype=object),
    [torch.zeros(1, 8, 8)] * 59 + [torch.zeros(1, 8, 9)], ["a"] * 60, [None] * 60, IMAGES[:59], IMAGES[:59].numpy(),
    torch.zeros(60, 32, 32, 3), np.zeros((60, 32, 32, 1)), (IMAGES, LABELS),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", range(len(BAD_DATA)))
def test_data_that_are_no_images_are_named(method: str, number: int) -> None:
    with pytest.raises(InvalidInputError):
        made(method, BAD_DATA[number])


BAD_ITEMS = [
    lambda i: IMAGES[i], lambda i: IMAGES[i].numpy(), lambda i: {"picture": IMAGES[i]}, lambda i: (), lambda i: [1, 2],
    lambda i: ("path.png", 0), lambda i: None, lambda i: 1 / 0, lambda i: (torch.zeros(1, 8, 8 + i // 59), 0),
    lambda i: (torch.zeros(64), 0),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_ITEMS)))
def test_a_dataset_without_pairs_is_named(number: int) -> None:
    with pytest.raises(InvalidInputError):
        made("random", Pairs(BAD_ITEMS[number]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_named(method: str, bad: float) -> None:
    images = IMAGES.clone()
    images[7, 0, 3, 3] = bad
    with pytest.raises(InvalidInputError, match="image 7"):
        made(method, images)


BYTES = ((IMAGES - IMAGES.min()) / (IMAGES.max() - IMAGES.min()) * 255).to(torch.uint8)


@pytest.mark.parametrize("method", ("none", "random"))
@pytest.mark.parametrize("given", [BYTES, BYTES.numpy(), BYTES.float(), BYTES.float() / 255, list(BYTES)])
def test_images_that_are_not_normalised_give_a_warning_with_mean_and_range(method: str, given: Any) -> None:
    high = float(torch.as_tensor(given[0]).max()) > 1
    with pytest.warns(TadPluginWarning, match=r"mean .*from 0 to 255" if high else r"mean .*from 0 to 1\.") as caught:
        hook = made(method, given)
    assert any(w.filename == __file__ for w in caught)
    assert hook.data is not None and torch.equal(hook.data.images, BYTES.float() / (1 if high else 255))


def test_a_dataset_of_bytes_gives_the_warning_too() -> None:
    with pytest.warns(TadPluginWarning, match="255"):
        made("random", Pairs(lambda i: (BYTES[i], 0)))


def test_normalised_images_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TadPluginWarning)
        for given in (IMAGES, IMAGES * 3, IMAGES.clamp(-1, 1), torch.zeros(60, 1, 8, 8)):
            made("none", given)


def test_writing_into_the_given_labels_changes_nothing() -> None:
    labels, true = LABELS.clone(), TRUE.clone()
    hook = made("random", IMAGES, labels, true_labels=true)
    labels.zero_(), true.zero_()
    assert hook.data is not None and torch.equal(hook.data.labels, LABELS)
    assert torch.equal(hook.data.true_labels, TRUE)  # type: ignore[arg-type]


# modes


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize(
    ("method", "mode"), [*((m, mode) for m in METHODS for mode in MODES), ("loss-prune", "no_grad")]
)
def test_the_state_does_not_depend_on_the_callers_modes(method: str, mode: str) -> None:
    expected = made(method).state
    with MODES[mode]():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside = made(method, IMAGES.clone(), LABELS.clone())
        after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert before == after
        late = made(method, start=False)
        state = late.start().state
        weights = inside.weights([0, 1, 2])
        assert weights.dtype == torch.float32 and inside.state.summary() == expected.summary()
    for found in (inside.state, state):
        for name in expected.FIELDS:
            assert torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
    inside.state.update(trust=torch.zeros(60))  # and it can be written afterwards


@pytest.mark.parametrize("mode", sorted(MODES))
def test_networks_of_the_loop_are_scored_alike_in_every_mode(mode: str) -> None:
    def scored(context: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        hook = made("tad", trains_on_real=True)
        with context:
            for _ in range(3):
                hook.epoch_end(network)
        return hook.state.weight

    assert torch.equal(scored(contextlib.nullcontext()), scored(MODES[mode]()))


# indices, labels, numbers


BAD_INDICES = [
    [], [0.0, 1.0], torch.tensor([0.5]), [-1], [60], torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64), "ab",
    torch.ones(60, dtype=torch.uint8), np.ones(60, dtype=np.uint8), torch.ones(4, dtype=torch.bool), [2**70], [[0], 1],
]  # fmt: skip


@pytest.mark.parametrize("method", ["none", "random"])
@pytest.mark.parametrize("number", range(len(BAD_INDICES)))
def test_every_handle_names_bad_indices(method: str, number: int) -> None:
    hook, bad, net = made(method), BAD_INDICES[number], nn.Linear(3, 3)
    rows, loss = torch.ones(2, 3), torch.zeros(())
    for handle in (
        lambda: hook.weights(bad),
        lambda: hook.targets(bad),
        lambda: hook.drawn(bad),
        lambda: hook.reweight(rows, bad),
        lambda: hook.weighted_loss(loss, rows, LABELS[:2], bad),
        lambda: hook.matched_gradient([torch.zeros(3, 3), torch.zeros(3)], net, rows, LABELS[:2], bad),
    ):
        with pytest.raises(InvalidInputError):
            handle()
    with pytest.raises(InvalidInputError):
        hook.reweight(rows, [0, 1, 2])
    if number not in (4, 9, 10):  # without a draw nothing says how many rows there are
        with pytest.raises(InvalidInputError):
            hook.kept(bad)


def test_indices_of_other_samples_are_refused_where_the_labels_tell() -> None:
    hook = made("random")
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = nn.functional.cross_entropy(logits, LABELS[:2])
    right = hook.targets([0, 1])
    other = [int((hook.state.target != right[0]).nonzero()[0]), 1]
    hook.weighted_loss(loss, logits, right, [0, 1])
    with pytest.raises(InvalidInputError, match="row 0"):
        hook.weighted_loss(loss, logits, right, other)
    hook.drawn(other)
    for labels in (right, right.float(), right[:1], torch.zeros(2, 3)):
        with pytest.raises(InvalidInputError):
            hook.weighted_loss(loss, logits, labels)


@pytest.mark.parametrize("method", ["none", "random"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels": ["cat"] * 60}, InvalidLabelsError),
        ({"labels": (LABELS > 0).tolist()}, InvalidLabelsError),
        ({"labels": LABELS > 0}, InvalidLabelsError),
        ({"labels": LABELS.double()}, InvalidLabelsError),
        ({"labels": [None] * 60}, InvalidLabelsError),
        ({"labels": LABELS[:, None]}, InvalidLabelsError),
        ({"labels": [10**9] * 60, "num_classes": None}, InvalidInputError),
        ({"true_labels": ["cat"] * 60}, InvalidLabelsError),
        ({"num_classes": 2**31}, InvalidInputError),
        ({"num_classes": "3"}, InvalidInputError),
        ({"num_classes": 3.0}, InvalidInputError),
        ({"num_classes": True}, InvalidInputError),
        ({"seed": 1.5}, InvalidInputError),
        ({"seed": "1"}, InvalidInputError),
        ({"seed": None}, InvalidInputError),
        ({"seed": 2**64}, InvalidInputError),
        ({"device": "gpu"}, InvalidInputError),
        ({"device": "cuda:99"}, InvalidInputError),
        ({"device": "meta"}, InvalidInputError),
        ({"device": 3.5}, InvalidInputError),
        ({"method": 3}, InvalidInputError),
        ({"noise": 0.4}, InvalidInputError),
        ({"config": 3}, InvalidInputError),
        ({"config": {3: {}}}, ConfigError),
        ({"config": {"random": 3}}, ConfigError),
        ({"config": "nowhere.yaml"}, FileFormatError),
        ({"ipc": "1"}, InvalidInputError),
        ({"ipc": 0}, InvalidInputError),
        ({"noise_rate": 1.5}, InvalidInputError),
        ({"noise_rate": "high"}, InvalidInputError),
        ({"dataset": 3}, InvalidInputError),
    ],
)
def test_values_of_wrong_kinds_are_named(method: str, change: dict[str, Any], error: type[TadPluginError]) -> None:
    given: dict[str, Any] = {"method": method, "labels": LABELS, "data": IMAGES, "num_classes": 3, **change}
    with pytest.raises(error):
        attach(given.pop("method"), **given)


def test_labels_and_seeds_of_every_width_are_taken() -> None:
    expected = made("random", seed=3).state
    for dtype in (np.uint16, np.uint8, np.int32, np.uint64):
        hook = made("random", labels=LABELS.numpy().astype(dtype), seed=np.int64(3))
        assert torch.equal(hook.state.observed, LABELS) and torch.equal(hook.state.trusted, expected.trusted)
