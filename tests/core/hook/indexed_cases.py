"""What the tests of indexed training share: a weighted, relabelled state, datasets, and the loss in a for-loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tad_plugin.core.callback import Callback
from tad_plugin.core.hook.hook import Hook
from tad_plugin.core.state import SampleState
from tad_plugin.data.real import RealData

K, N = 4, 60
IMAGES = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(K, (N,), generator=torch.Generator().manual_seed(1))
LABELS[:K] = torch.arange(K)


def decide(state: SampleState, shift: int = 0) -> None:
    """Relabels, distrusts and weights some samples; which ones depends on ``shift``."""
    n = torch.arange(len(state)) + shift
    target = torch.where(n % 5 == 4, (state.observed + 1) % state.num_classes, state.observed)
    state.update(target=target, trusted=n % 7 > 0)
    state.set_weights("some", 1.0 + n % 4)


class Some(Callback):
    """Weights, distrusts and relabels some samples."""

    name = "some"

    def on_start(self, *, state: SampleState, data: RealData) -> None:
        decide(state)


def made(*, draw: str = "uniform", labels: Tensor = LABELS, source: Any = None) -> Hook:
    return Hook(SampleState(labels, K), None, [Some()], draw=draw, source=source).start()


class Items(Dataset):  # type: ignore[type-arg]
    """Samples of one form. The first value of an image tells which sample it is."""

    def __init__(self, form: str = "tuple", labels: Tensor = LABELS, transform: Any = None) -> None:
        self.form, self.labels, self.transform = form, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        image, label = torch.cat([torch.tensor([float(i)]), IMAGES[i, 1:]]), int(self.labels[i])
        image = image if self.transform is None else self.transform(image)
        if self.form == "dict":
            return {"image": image, "label": label}
        if self.form == "soft":
            return image, torch.nn.functional.one_hot(torch.tensor(label), K).float()
        return [image, torch.tensor(label)] if self.form == "list" else (image, label)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Linear(6, K)


def by_hand(
    state: SampleState,
    logits: Tensor,
    rows: list[int],
    partner: list[int] | None = None,
    share: float = 1.0,
    smoothing: float = 0.0,
    drawn: bool = False,
) -> float:
    """The loss of a batch of these samples, in a for-loop in double precision."""
    top = bottom = 0.0
    for r, i in enumerate(rows):
        logs = [float(v) for v in logits[r].detach().double().log_softmax(0)]
        for sample, part in ((i, share), *([] if partner is None else [(partner[r], 1 - share)])):
            loss = -(1 - smoothing) * logs[int(state.target[sample])] - smoothing * sum(logs) / K
            w = part * (1.0 if drawn else float(state.weight[sample])) * float(state.trusted[sample])
            top, bottom = top + w * loss, bottom + w
    return top / bottom


def ahead(batches: Any, depth: int) -> Iterator[Any]:
    """A prefetcher: takes ``depth`` batches before it gives the first."""
    kept: deque[Any] = deque()
    for batch in batches:
        kept.append(batch)
        if len(kept) > depth:
            yield kept.popleft()
    yield from kept
