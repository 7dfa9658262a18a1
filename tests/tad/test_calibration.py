"""The calibrated threshold: its curve against a loop, and what the correction is worth on simulated noise."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from tad_plugin.errors import InvalidInputError, UnimodalClassWarning
from tad_plugin.tad.calibration import calibrate_threshold
from tad_plugin.tad.feature_model import fit_features
from tad_plugin.tad.geometry import principal_axes
from tad_plugin.tad.mixture import fit_class_mixture
from tad_plugin.tad.proposals import propose, reliability, reliability_score
from tad_plugin.tad.threshold import divide


def simulate(seed, *, rate=0.4, gap=2.0, classes=10, each=200, dims=32):
    """A scorer (softmax regression) trained on symmetric noise: features, true and observed labels, logits, trusted."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dims, generator=generator) * gap / math.sqrt(2 * dims)
    true = torch.arange(classes).repeat_interleave(each)
    spread = 0.25 + 0.75 * torch.rand(len(true), 1, generator=generator)
    features = centres[true] + spread * torch.randn(len(true), dims, generator=generator)
    flipped = torch.rand(len(true), generator=generator) < rate
    other = (true + torch.randint(1, classes, (len(true),), generator=generator)) % classes
    observed = torch.where(flipped, other, true)
    weight = torch.zeros(dims + 1, classes, requires_grad=True)
    inputs = torch.cat([features, torch.ones(len(true), 1)], dim=1)
    optimiser = torch.optim.Adam([weight], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(inputs @ weight, observed).backward()
        optimiser.step()
    logits = (inputs @ weight).detach()
    losses = torch.nn.functional.cross_entropy(logits, observed, reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnimodalClassWarning)
        trusted = divide(losses, observed, fit_class_mixture(losses, observed, classes), classes).trusted
    return features, true, observed, logits, trusted


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def recalled(features, observed, trusted, logits, calibration):
    result = reliability(features, observed, trusted, logits, 10, temperature=calibration.temperature)
    return (result.proposal >= 0) & (result.score >= calibration.threshold), result.proposal


def test_curve_equals_a_loop_over_the_two_halves():
    features, _, observed, logits, trusted = simulate(0, classes=10, each=40)
    calibration = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), corrected=False)
    # The split is redrawn here by its definition: shuffled, then alternating inside (target, trusted).
    order = torch.randperm(len(observed), generator=seeded()).tolist()
    order.sort(key=lambda i: (int(observed[i]), bool(trusted[i])))
    side = {i: position % 2 for position, i in enumerate(order)}
    half = torch.tensor([side[i] for i in range(len(observed))])
    found = []
    for own in (0, 1):
        model = fit_features(features, observed, trusted & (half != own), 10)
        rows = (half == own).nonzero().flatten()
        distance, similar = model.measure(features[rows])
        proposal = propose(distance, similar, logits[rows])
        score = reliability_score(distance, similar, proposal, calibration.temperature)
        found += [
            (float(s), bool(trusted[i]), int(p) == int(observed[i]))
            for i, p, s in zip(rows.tolist(), proposal.tolist(), score.tolist(), strict=True)
            if p >= 0
        ]
    assert len(calibration.scores) == len({s for s, _, _ in found})
    for m in range(0, len(calibration.scores), 17):
        limit = float(calibration.scores[m])
        inside = [right for s, sure, right in found if sure and s >= limit]
        assert int(calibration.support[m]) == len(inside)
        assert int(calibration.candidates[m]) == sum(s >= limit and not sure for s, sure, _ in found)
        assert float(calibration.precision[m]) == pytest.approx(sum(inside) / max(len(inside), 1))
    good = (calibration.precision >= 0.9) & (calibration.support >= 20)
    assert calibration.threshold == float(calibration.scores[good].min())


@pytest.mark.parametrize(("rate", "gap"), [(0.4, 2.0), (0.2, 2.0), (0.4, 1.5), (0.4, 3.0)])
def test_the_correction_comes_closer_to_the_promised_precision(rate, gap):
    """Recalled labels of 3 draws: trusted samples alone promise 0.9 and deliver less."""
    totals = {False: [0, 0], True: [0, 0]}
    for seed in range(3):
        features, true, observed, logits, trusted = simulate(seed, rate=rate, gap=gap, each=400)
        for corrected in totals:
            calibration = calibrate_threshold(
                features, observed, trusted, logits, 10, generator=seeded(), corrected=corrected
            )
            chosen, proposal = recalled(features, observed, trusted, logits, calibration)
            totals[corrected][0] += int((proposal == true)[chosen].sum())
            totals[corrected][1] += int(chosen.sum())
    literal, kept = (right / count for right, count in totals.values())
    assert kept > literal
    assert kept >= (0.84 if gap > 1.5 else 0.75)


@pytest.mark.parametrize(("rate", "gap"), [(0.4, 2.0), (0.2, 2.0), (0.4, 1.5)])
def test_the_corrected_curve_is_closer_to_the_truth(rate, gap):
    ours, literal = [], []
    for seed in range(3):
        features, true, observed, logits, trusted = simulate(seed, rate=rate, gap=gap, each=400)
        calibration = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded())
        result = reliability(features, observed, trusted, logits, 10, temperature=calibration.temperature)
        for share in (0.25, 0.5, 0.75, 1.0):
            m = int(share * (len(calibration.scores) - 1))
            chosen = (result.proposal >= 0) & (result.score >= calibration.scores[m])
            actual = float((result.proposal == true)[chosen].double().mean())
            ours.append(abs(float(calibration.corrected[m]) - actual))
            literal.append(abs(float(calibration.precision[m]) - actual))
        assert calibration.noise_rate == pytest.approx(rate, abs=0.06)
    assert sum(ours) < 0.7 * sum(literal)


def test_a_known_noise_rate_is_used():
    features, _, observed, logits, trusted = simulate(2)
    low = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), noise_rate=0.05)
    known = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), noise_rate=0.4)
    assert known.noise_rate == 0.4 and low.threshold >= known.threshold
    hopeless = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), noise_rate=0.95)
    assert hopeless.threshold == math.inf and not bool(hopeless.corrected.any())


def test_a_precision_that_is_not_reached_gives_infinity():
    generator = torch.Generator().manual_seed(0)
    features, observed = torch.randn(400, 8, generator=generator), torch.randint(0, 4, (400,), generator=generator)
    predictions = torch.randint(0, 4, (400,), generator=generator)
    trusted = torch.arange(400) % 2 == 0
    for corrected in (False, True):
        calibration = calibrate_threshold(
            features, observed, trusted, predictions, 4, generator=seeded(), corrected=corrected
        )
        assert calibration.threshold == math.inf
    none = calibrate_threshold(features, observed, torch.zeros_like(trusted), predictions, 4, generator=seeded())
    assert none.threshold == math.inf and len(none.scores) == 0


def test_few_trusted_proposals_are_no_evidence():
    features, true, _, _, _ = simulate(0, gap=8.0)
    trusted = torch.arange(len(true)) % 10 == 0
    options = {"generator": seeded(), "corrected": False}
    assert calibrate_threshold(features, true, trusted, true, 10, **options, min_support=20).threshold < 1
    assert calibrate_threshold(features, true, trusted, true, 10, **options, min_support=201).threshold == math.inf


def test_split_is_drawn_by_the_generator_only_and_recalled_labels_are_judged_by_observed_ones():
    features, true, observed, logits, trusted = simulate(0)
    before = torch.get_rng_state()
    first = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    again = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(3))
    assert first.threshold == again.threshold and torch.equal(first.corrected, again.corrected)
    # Samples that were recalled have their new target, and still count as contradicting their observed label.
    target = torch.where(trusted, observed, true)
    after = calibrate_threshold(
        features, target, torch.ones_like(trusted), logits, 10, generator=seeded(3), observed=observed
    )
    wrong = float((target != observed).float().mean())
    assert 0.8 * wrong < after.noise_rate <= wrong + 1e-6 and int(after.candidates.sum()) == 0


def test_wide_features():
    features, _, observed, logits, trusted = simulate(0)
    calibration = calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), max_dim=16)
    assert 0 < calibration.threshold < 1 and calibration.temperature >= 1
    assert calibration.axes is not None
    torch.testing.assert_close(calibration.axes, principal_axes(features[trusted], 16))


@pytest.mark.parametrize(
    "options",
    [
        {"recall_precision": 0.0},
        {"recall_precision": 1.1},
        {"min_support": 0},
        {"noise_rate": 1.0},
        {"temperature": 0.0},
        {"max_dim": 0},
        {"axes": torch.zeros(3, 2)},
    ],
)
def test_bad_options(options):
    features, _, observed, logits, trusted = simulate(0, each=10)
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        calibrate_threshold(features, observed, trusted, logits, 10, generator=seeded(), **options)
