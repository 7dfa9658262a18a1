"""The handles for scripts that only gain lines: identities with no method, weighted means and gradients with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tad_plugin import attach
from tad_plugin.core.callback import Callback
from tad_plugin.core.events import Match
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.errors import InvalidInputError

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
K = 3


class Weigh(Callback):
    """Weights 1, 2, 3, ... or all the same, with a graph if asked."""

    name = "weigh"
    needs_graph = True

    def __init__(self, graph: bool = False, even: bool = False) -> None:
        super().__init__()
        self.graph, self.even = graph, even
        self.seen: list[Match] = []

    def on_start(self, *, state: SampleState, data: Any) -> None:
        state.set_weights(self.name, torch.ones(len(state)) if self.even else torch.arange(1.0, len(state) + 1))

    def wants_graph(self, iteration: int) -> bool:
        return self.graph

    def on_match(self, *, state: SampleState, match: Match) -> None:
        self.seen.append(match)


def hooked(callback: Callback) -> Hook:
    made = attach("none", labels=LABELS, data=torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1)))
    return Hook(made.state, made.data, [callback]).start()


def network() -> nn.Module:
    made = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, K)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return made


def test_off_every_handle_gives_back_what_it_got() -> None:
    hook = attach("none", labels=LABELS)
    rows, loss, gradient = torch.ones(3, 2), torch.ones(()), [torch.ones(2), torch.ones(3)]
    hook.drawn(np.array([1, 2]))  # the wrong number of them: nobody looks
    assert hook.reweight(rows) is rows and hook.weighted_loss(loss, rows, LABELS[:3]) is loss
    same = hook.matched_gradient(gradient, nn.Identity(), rows, LABELS[:3])
    assert all(a is b for a, b in zip(same, gradient, strict=True)) and not hook.batches.noted


def test_pools_are_made_anew_only_after_a_write() -> None:
    hook = hooked(Weigh())
    first = hook.pools()
    assert first == [[0, 1, 2], [3, 4, 5], [6, 7]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook.state, "pools", None)  # a call would fail
        first[0].clear()
        first.clear()
        assert hook.pools() == [[0, 1, 2], [3, 4, 5], [6, 7]]
    hook.state.update(trusted=torch.arange(8) != 4)
    assert hook.pools() == [[0, 1, 2], [3, 5], [6, 7]]


def test_rows_find_the_indices_of_the_latest_draws() -> None:
    hook = hooked(Weigh())
    hook.drawn([7, 6, 5, 4])  # an earlier batch
    for draw in (np.array([2, 0]), torch.tensor([5, 3]), [7]):
        hook.drawn(draw)
    rows = torch.ones(5, 2)
    assert torch.equal(hook.reweight(rows), hook.reweight(rows, [2, 0, 5, 3, 7]))
    # class 0 drew weights 3 and 1, class 1 drew 6 and 4
    torch.testing.assert_close(hook.reweight(rows)[:, 0], torch.tensor([1.5, 0.5, 1.2, 0.8, 1.0]))
    assert torch.equal(hook.reweight(rows[:1]), hook.reweight(rows[:1], [7]))


def test_a_draw_of_which_only_some_rows_are_kept() -> None:
    hook = hooked(Weigh())
    for draw, rows in (
        (np.array([0, 1, 2]), torch.tensor([2, 0])),
        ([3, 5, 4], torch.tensor([True, False, True])),
        (torch.tensor([6, 7]), [1]),
    ):
        hook.drawn(draw)
        hook.kept(rows)
    rows = torch.ones(5, 2)
    assert torch.equal(hook.reweight(rows), hook.reweight(rows, [2, 0, 3, 4, 7]))
    attach("none", labels=LABELS).kept([5])  # nothing was noted


def test_matches_of_one_iteration_hold_their_own_samples() -> None:
    callback = Weigh(graph=True)
    hook = hooked(callback)
    s = torch.ones(2, 2, requires_grad=True)
    for indices, last in (([0, 1], False), ([3, 5], True)):
        hook.drawn(indices)
        loss = (hook.reweight(torch.ones(2, 2)).mean(0) - s.mean(0)).square().sum()
        hook.before_update(loss, s, nn.Linear(2, 2), last=last)
    first, second = callback.seen
    assert (first.last, second.last, first.iteration, second.iteration, hook.iteration) == (False, True, 0, 0, 1)
    assert first.indices.tolist() == [0, 1] and second.indices.tolist() == [3, 5]
    assert first.weights is not second.weights


def test_draws_that_do_not_fit_are_named() -> None:
    hook = hooked(Weigh())
    with pytest.raises(InvalidInputError, match=r"2.* 0.*hook\.drawn"):
        hook.reweight(torch.ones(2, 1))
    hook.drawn([0, 1, 2])
    with pytest.raises(InvalidInputError, match="2.* 3.* 1"):
        hook.reweight(torch.ones(2, 1))
    with pytest.raises(InvalidInputError, match="2.* 3"):
        hook.reweight(torch.ones(2, 1), [0, 1, 2])
    hook.before_update(torch.zeros(()), torch.zeros(1), nn.Identity())
    with pytest.raises(InvalidInputError, match="3.* 0"):
        hook.reweight(torch.ones(3, 1))


def batch() -> tuple[Tensor, Tensor, list[int]]:
    return torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(3)).double(), torch.ones(3).long(), [3, 5, 4]


def test_a_weighted_loss_is_the_weighted_mean_and_with_ones_the_same_object() -> None:
    images, labels, indices = batch()
    logits = network()(images)
    plain = F.cross_entropy(logits, labels)
    hook = hooked(Weigh())
    hook.drawn(np.array(indices))
    w = np.array([4.0, 6.0, 5.0])
    rows = [-float(logits[i].log_softmax(0)[1].detach()) for i in range(3)]
    assert float(hook.weighted_loss(plain, logits, labels).detach()) == pytest.approx(
        float((w * rows).sum() / w.sum()), rel=1e-6
    )
    assert hooked(Weigh(even=True)).weighted_loss(plain, logits, labels, indices) is plain


def test_a_matched_gradient_keeps_its_values_and_gains_the_derivative_in_the_weights() -> None:
    images, labels, indices = batch()
    net, callback = network(), Weigh(graph=True)
    hook = hooked(callback)
    hook.drawn(indices)
    parameters = list(net.parameters())
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(4)).double() for p in parameters]

    def gradient(weights: Tensor) -> list[Tensor]:
        loss = (weights * F.cross_entropy(net(images), labels, reduction="none")).mean()
        return list(torch.autograd.grad(loss, parameters))

    def along(found: list[Tensor]) -> Tensor:
        return torch.stack([(f * d).sum() for f, d in zip(found, direction, strict=True)]).sum()

    logits = net(images)
    given = torch.autograd.grad(hook.weighted_loss(F.cross_entropy(logits, labels), logits, labels), parameters)
    found = hook.matched_gradient([g.detach().clone() for g in given], net, images, labels)
    assert all(torch.equal(f, g) for f, g in zip(found, given, strict=True))
    hook.before_update(along(found), torch.zeros(1), net, kind="gradient")
    (match,) = callback.seen
    (slope,) = torch.autograd.grad(match.loss, match.weights)
    assert match.indices.tolist() == indices and match.kind == "gradient"
    w, eps = hook.state.weights(torch.tensor(indices)).double(), 1e-4
    for place, index in enumerate(indices):
        step = torch.zeros(3).double()
        step[place] = eps
        difference = float(along(gradient(w + step)) - along(gradient(w - step))) / (2 * eps)
        assert float(slope[index]) == pytest.approx(difference, rel=1e-4)
    assert int((slope != 0).sum()) == 3


def test_a_matched_gradient_without_a_graph_to_make_is_what_was_given() -> None:
    images, labels, indices = batch()
    net = network()
    given = [torch.zeros_like(p) for p in net.parameters()]
    kept = hooked(Weigh()).matched_gradient(given, net, images, labels, indices)
    assert all(a is b for a, b in zip(kept, given, strict=True))
    with pytest.raises(InvalidInputError, match="4.* 3"):
        hooked(Weigh(graph=True)).matched_gradient(given[1:], net, images, labels, indices)


def test_a_network_spread_over_devices_is_shown_as_it_is() -> None:
    callback, net = Weigh(), network()
    hooked(callback).before_update(torch.zeros(()), torch.zeros(1), nn.DataParallel(net))
    assert callback.seen[0].network is net
