"""Evaluation: the training recipe against a loop by hand, accuracies against a count, mismatches as errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tad_plugin.data.datasets import load_dataset
from tad_plugin.data.preprocessing import Preprocessing
from tad_plugin.data.synthetic import SyntheticSet
from tad_plugin.errors import (
    ConfigError,
    InvalidInputError,
    InvalidLabelsError,
    NonFiniteError,
    PreprocessingMismatchError,
    UnknownNameError,
)
from tad_plugin.evaluate import EvaluateConfig, Evaluation, accuracy, evaluate, train_on_synthetic
from tests.problems import PLAIN, blobs

SMALL = EvaluateConfig(width=4, runs=2, epochs=4, batch_size=8, augment="none")


def small_set(per_class: int = 6) -> SyntheticSet:
    images, labels = blobs(per_class)
    return SyntheticSet(images, labels, 3, PLAIN)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(5)) * 0.1)
    return network


@pytest.fixture(autouse=True)
def keep_global_rng() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def test_training_is_the_fields_recipe() -> None:
    """SGD with momentum and weight decay written out, the rate a tenth after half of the epochs."""
    given, config = small_set(), EvaluateConfig(epochs=5, batch_size=7, lr=0.1, augment="none")
    found = train_on_synthetic(linear(), given, config, seeded())
    weight, bias = (p.detach().clone() for p in linear().parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    generator = seeded()
    for epoch in range(5):
        rate = 0.1 if epoch <= 2 else 0.01
        order = torch.randperm(18, generator=generator)
        for start in range(0, 18, 7):
            rows = order[start : start + 7]
            x, y = given.images[rows].flatten(1), F.one_hot(given.labels[rows], 3).float()
            error = ((x @ weight.T + bias).softmax(1) - y) / len(rows)
            for i, (p, g) in enumerate(((weight, error.T @ x), (bias, error.sum(0)))):
                velocity[i] = 0.9 * velocity[i] + g + 5e-4 * p
                p -= rate * velocity[i]
    for a, b in zip(found.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(a.detach(), b, atol=1e-4, rtol=1e-4)
    assert not found.training


def test_soft_labels_of_one_class_train_as_hard_ones() -> None:
    hard = small_set()
    soft = replace(hard, labels=torch.eye(3)[hard.labels])
    a, b = (train_on_synthetic(linear(), s, SMALL, seeded()) for s in (hard, soft))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_learned_rate_wins_over_the_settings() -> None:
    given = small_set()
    a = train_on_synthetic(linear(), replace(given, learning_rate=0.05), SMALL, seeded())
    b = train_on_synthetic(linear(), given, replace(SMALL, lr=0.05), seeded())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for rate in (-0.1, 0.0, float("nan")):
        with pytest.raises(InvalidInputError, match=str(rate)):
            train_on_synthetic(linear(), replace(given, learning_rate=rate), SMALL, seeded())


def test_accuracy_counts_hits_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = blobs()
    network = linear()
    hits = sum(int(network(x[None]).argmax()) == int(y) for x, y in zip(images, labels, strict=True))
    for size in (1000, 7):
        monkeypatch.setattr("tad_plugin.evaluate.forward_size", lambda images, network, size=size: size)
        assert accuracy(network, images, labels) == pytest.approx(100 * hits / 60)


def test_separable_classes_are_learnt_from_few_images(global_rng_untouched: None) -> None:
    found = evaluate(small_set(), blobs(seed=0), replace(SMALL, epochs=40, lr=0.05, width=8), generator=seeded())
    assert found.mean > 95 and len(found.accuracies) == 2


def test_mean_and_std_are_numpys_and_the_generator_decides() -> None:
    results = [evaluate(small_set(2), blobs(spread=2.0), SMALL, generator=seeded(s)) for s in (0, 0, 1)]
    assert results[0] == results[1] and results[0].accuracies != results[2].accuracies
    values = (50.0, 60.0, 75.5)
    found = Evaluation(values)
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values))


def test_other_architectures_and_numbers_of_runs() -> None:
    found = evaluate(small_set(), blobs(), SMALL, network="mlp", runs=1, generator=seeded())
    assert found.network == "mlp" and len(found.accuracies) == 1
    with pytest.raises(UnknownNameError, match="'resnet19'.*'resnet18'"):
        evaluate(small_set(), blobs(), SMALL, network="resnet19", generator=seeded())


def test_test_images_prepared_in_another_way_are_an_error() -> None:
    own = load_dataset("digits", per_class=3, preprocessing=Preprocessing((0.5,), (0.5,)))
    given = SyntheticSet(own.train_images, own.train_labels, 10, load_dataset("digits", per_class=3).preprocessing)
    with pytest.raises(PreprocessingMismatchError, match="0.3051.*0.5000"):
        evaluate(
            given, (own.test_images, own.test_labels), SMALL, preprocessing=own.preprocessing, generator=seeded()
        )  # fmt: skip
    evaluate(
        given, (own.test_images[:9], own.test_labels[:9]), SMALL, preprocessing=given.preprocessing, generator=seeded()
    )


def test_bad_input_is_named() -> None:
    images, labels = blobs()
    with pytest.raises(InvalidInputError, match=r"\[1, 8, 8\].*\[1, 4, 4\]"):
        evaluate(small_set(), (images[..., :4, :4], labels), SMALL, generator=seeded())
    with pytest.raises(InvalidLabelsError, match="test labels"):
        evaluate(small_set(), (images, labels + 1), SMALL, generator=seeded())
    with pytest.raises(InvalidLabelsError, match="60.*59"):
        evaluate(small_set(), (images, labels[1:]), SMALL, generator=seeded())
    broken = small_set()
    broken.images[0] = float("nan")
    with pytest.raises(NonFiniteError):
        evaluate(broken, (images, labels), SMALL, generator=seeded())
    with pytest.raises(ConfigError, match="'puzzle:2'"):
        replace(small_set(), decode="puzzle:2").training_pairs()


@pytest.mark.parametrize(
    "given",
    [{"runs": 0}, {"epochs": 0}, {"batch_size": 0}, {"width": 0}, {"lr": 0.0}, {"lr": math.nan}, {"momentum": 1.0}],
)
def test_bad_settings_are_named(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"evaluation.{name}"):
        EvaluateConfig(**given)


def test_several_architectures_are_joined_by_commas() -> None:
    assert EvaluateConfig().networks == ["convnet"] and EvaluateConfig(network="mlp, vgg11").networks == [
        "mlp",
        "vgg11",
    ]


def test_accuracies_of_classes_make_up_the_whole_and_further_images_change_nothing() -> None:
    synthetic, (images, labels) = small_set(), blobs(spread=2.0)
    part = (labels != 1).nonzero().flatten()[:21]
    images, labels, few = images[:50], labels[:50], (images[part], labels[part])
    sizes = torch.bincount(labels).double()
    found = evaluate(synthetic, (images, labels), SMALL, generator=seeded())
    for whole, shares in zip(found.accuracies, found.per_class, strict=True):
        assert whole == pytest.approx(float((torch.tensor(shares).double() * sizes).sum() / sizes.sum()))
    both = evaluate(synthetic, (images, labels), SMALL, also=few, generator=seeded())
    alone = evaluate(synthetic, few, SMALL, generator=seeded())
    assert both.accuracies == found.accuracies and both.also == alone.accuracies and found.also == ()
    assert [math.isnan(share) for share in alone.per_class[0]] == [False, True, False]  # class 1 has no images
