"""Running means of the most likely classes against the full ones."""

from __future__ import annotations

import pytest
import torch

from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError
from tad_plugin.tad.consistency import TemporalEnsemble
from tad_plugin.tad.method import TAD, TADConfig
from tad_plugin.tad.top_predictions import TopEnsemble

N, K = 9, 30


def visits(steps: int, sharpness: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(N, K, generator=generator)
    found = []
    for _ in range(steps):
        indices = torch.randint(N, (6,), generator=generator)  # some twice
        logits = sharpness * (centre[indices] + 0.1 * torch.randn(6, K, generator=generator))
        found.append((indices, logits.softmax(1)))
    return found


@pytest.mark.parametrize(("top", "sharpness", "beta"), [(3, 4.0, 0.6), (10, 2.0, 0.9), (29, 1.0, 0.0)])
def test_rows_differ_from_the_full_mean_by_the_bound_at_most(top: int, sharpness: float, beta: float) -> None:
    full = TemporalEnsemble(N, K, beta, dtype=torch.float32)
    few = TopEnsemble(N, K, beta, top=top, dtype=torch.float32)
    every, spread, plain = torch.arange(N), 0.0, 0.0
    for indices, new in visits(12, sharpness):
        full.update(indices, new)
        few.update(indices, new)
        row, expected = few.ensemble(every), full.ensemble(every)
        assert torch.equal(row.sum(1) > 0, few.count > 0) and torch.equal(few.count, full.count)
        assert torch.allclose(row.sum(1)[few.count > 0], torch.ones(1), atol=1e-5)
        spread = max(spread, float((1 - few.mean[few.count > 0].sum(1)).max()))
        plain = max(plain, float((row - expected).abs().sum(1).max()))
    assert plain <= 2 * spread / (1 - beta) + 1e-5
    assert spread < 0.5 and 0 < plain < 0.5


def test_predictions_of_few_classes_are_kept_whole() -> None:
    full, few = TemporalEnsemble(N, K, 0.7, dtype=torch.float32), TopEnsemble(N, K, 0.7, top=4, dtype=torch.float32)
    for indices, new in visits(10, 1.0):
        narrow = torch.zeros_like(new)
        narrow[:, 5:8] = new[:, 5:8] / new[:, 5:8].sum(1, keepdim=True)
        full.update(indices, narrow)
        few.update(indices, narrow)
    every = torch.arange(N)
    torch.testing.assert_close(few.ensemble(every), full.ensemble(every), atol=1e-6, rtol=0)


def test_it_takes_four_bytes_for_each_kept_class_and_resumes_with_the_same_bits() -> None:
    few = TopEnsemble(N, K, 0.6, top=5)
    assert few.mean.nbytes + few.classes.nbytes == N * 5 * 4
    assert TopEnsemble(2, 40_000, 0.6, top=5).classes.dtype == torch.int32
    batches = visits(6, 2.0)
    for indices, new in batches[:3]:
        few.update(indices, new)
    other = TopEnsemble(N, K, 0.6, top=5)
    other.load_state_dict(few.state_dict())
    for indices, new in batches[3:]:
        few.update(indices, new)
        other.update(indices, new)
    assert torch.equal(few.ensemble(torch.arange(N)), other.ensemble(torch.arange(N)))
    with pytest.raises(InvalidInputError, match="top"):
        TopEnsemble(N, K, top=K)


@pytest.mark.parametrize(("top", "kind"), [(0, TemporalEnsemble), (5, TopEnsemble), (K, TemporalEnsemble)])
def test_the_callback_keeps_what_its_settings_say(top: int, kind: type) -> None:
    state = SampleState(torch.arange(2 * K) % K, K)
    tad = TAD(TADConfig(consistency_top=top))
    for indices, new in visits(4, 1.0):
        tad.on_scorer_batch(state=state, indices=indices, logits=new.log(), loss=torch.zeros(()))
    again = TAD(TADConfig(consistency_top=top))
    again.load_state_dict(tad.state_dict())
    assert type(tad.ensemble) is kind is type(again.ensemble)
    every = torch.arange(2 * K)
    assert torch.equal(again.ensemble.ensemble(every), tad.ensemble.ensemble(every))
    assert float(tad.ensemble.ensemble(every).sum()) == pytest.approx(float((tad.ensemble.count > 0).sum()), rel=1e-2)
