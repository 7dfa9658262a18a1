"""Small float64 problems for the tests of influence: handwritten digits and tiny networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tad_plugin.nn.networks import make_network


@dataclass(frozen=True)
class Problem:
    """Real batch, synthetic set and held-out samples of the digits 0..9, normalised, float64."""

    real: Tensor
    real_labels: Tensor
    synthetic: Tensor
    synthetic_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float64).reshape(-1, 1, 8, 8) / 16.0
    return (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)


def digits_problem(real: int = 64, held_out: int = 100, seed: int = 0) -> Problem:
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    first = torch.stack([(y[real + held_out :] == c).nonzero()[0, 0] + real + held_out for c in range(10)])
    return Problem(
        x[:real], y[:real], x[first], y[first], x[real : real + held_out], y[real : real + held_out]
    )  # fmt: skip


def convnet(
    norm: str = "instance", *, width: int = 8, depth: int = 2, activation: str = "relu", seed: int = 0
) -> nn.Module:
    network = make_network(
        "convnet",
        in_channels=1,
        num_classes=10,
        image_size=8,
        width=width,
        depth=depth,
        norm=norm,
        activation=activation,
        generator=torch.Generator().manual_seed(seed),
    )
    return network.double()


class LinearModel(nn.Module):
    """Logits of a linear classifier over flattened images."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def correlation_and_slope(found: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Pearson correlation, and the least-squares slope of ``found`` on ``oracle`` (1 = same scale)."""
    a, b = found - found.mean(), oracle - oracle.mean()
    return float(a @ b / (a.norm() * b.norm())), float(a @ b / b.square().sum())
