"""How good a division is: against scikit-learn and a count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tad_plugin.core.diagnostics import SplitDiagnostics, area_under_roc, average_precision, split_quality
from tad_plugin.core.observer import StateView
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_area_under_roc_is_scikit_learns_ties_included(pairs: list[tuple[int, bool]]) -> None:
    score = torch.tensor([float(s) for s, _ in pairs])
    positive = torch.tensor([p for _, p in pairs])
    found = area_under_roc(score, positive)
    if bool(positive.all()) or not bool(positive.any()):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()))


def test_split_quality_is_that_of_a_count_by_hand() -> None:
    true = torch.tensor([0, 0, 0, 1, 1, 1])
    observed = torch.tensor([0, 1, 1, 1, 1, 0])
    target = torch.tensor([0, 0, 1, 1, 1, 0])  # the second is relabelled right
    trusted = torch.tensor([True, True, True, True, False, False])
    trust = torch.tensor([0.9, 0.2, 0.6, 0.8, 0.7, 0.1])
    found = split_quality(observed, target, trusted, trust, true)
    assert found["precision"] == pytest.approx(3 / 4)  # of 0, 1, 2, 3 only 2 has a wrong target
    assert found["recall"] == pytest.approx(2 / 3)  # clean: 0, 3, 4; kept with the true target: 0, 3
    assert found["auc"] == pytest.approx(roc_auc_score((observed == true).numpy(), trust.numpy()))
    assert (found["relabel_accuracy"], found["relabelled"]) == (1.0, 1.0)


def test_empty_groups_give_nan() -> None:
    y = torch.tensor([0, 1])
    nobody = torch.tensor([False, False])
    found = split_quality(y, y, nobody, torch.ones(2), y)
    assert math.isnan(found["precision"]) and math.isnan(found["auc"]) and math.isnan(found["relabel_accuracy"])
    assert found["recall"] == 0 and found["relabelled"] == 0


def test_the_observer_reports_only_where_the_true_labels_are_known() -> None:
    y = torch.tensor([0, 1, 0])
    state, watcher = SampleState(y, 2), SplitDiagnostics()
    view, images = StateView(state), torch.zeros(3, 4)
    assert watcher.on_scorer_epoch(state=view, data=RealData(images, y, 2)) is None and watcher.last is None
    record = watcher.on_scorer_epoch(state=view, data=RealData(images, y, 2, torch.tensor([0, 1, 1])))
    assert record is not None and record["event"] == "split" and watcher.last is not None
    assert record["precision"] == pytest.approx(2 / 3) == watcher.last["precision"]


def test_where_all_are_trusted_alike_trust_ranks_nothing() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    found = split_quality(labels, labels, torch.ones(4, dtype=torch.bool), torch.ones(4), torch.tensor([0, 1, 1, 1]))
    assert math.isnan(found["auc"]) and found["precision"] == 0.75 and found["recall"] == 1.0


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    score, positive = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.3
    expected = metrics.average_precision_score(positive.numpy(), score.numpy())
    assert average_precision(score, positive) == pytest.approx(expected)
    assert average_precision(score, torch.zeros(50, dtype=torch.bool)) == 0.0
