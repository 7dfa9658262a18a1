"""What a round of TAD holds at once, by the resident memory of this process (Linux)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData
from tad_plugin.tad import feature_model, geometry, method, proposals

PEAK = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not PEAK.exists(), reason="the peak is read from /proc")
@pytest.mark.filterwarnings("ignore::tad_plugin.errors.UnimodalClassWarning")
def test_a_round_holds_at_most_two_tensors_of_n_times_k(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, d, generator = 40_000, 400, 16, torch.Generator().manual_seed(0)
    for module in (geometry, feature_model, method):
        monkeypatch.setattr(module, "CHUNK", 1024)  # as small beside N as at a million samples
    monkeypatch.setattr(proposals, "_TEMPERATURE_SAMPLES", 300)
    labels = torch.arange(n) % k
    centres = 3 * torch.randn(k, d, generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.3
    features = centres[torch.where(wrong, (labels + 7) % k, labels)] + torch.randn(n, d, generator=generator)
    network = nn.Linear(d, k)
    with torch.no_grad():
        network.weight.copy_(centres)
        network.bias.copy_(-centres.square().sum(1) / 2)
    data = RealData(features, labels, k)
    state, tad = SampleState.of(data), method.TAD(method.TADConfig(warmup=0))
    tad.on_start(state=state, data=data)
    PEAK.write_text("5")
    before = resident("VmRSS")
    tad.on_scorer_epoch(state=state, network=network, data=data)
    assert int((state.target != labels).sum()) > n // 10  # the round recalled: it went through all of its steps
    # The heap of a process that ran other tests adds some MB; a third tensor would add 64.
    assert resident("VmHWM") - before <= 2 * 4 * n * k + 24 * 2**20
