"""Compares torch's and the plugin's 2x2 average pooling, alone and after a ReLU.

python reproduce/benchmarks/pooling.py
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn

from tad_plugin.nn.pooling import HalvingAvgPool, ReluHalvingAvgPool


def main() -> None:
    """Prints the best of 20 alternating repetitions, and the differences of values and gradients."""
    torch.set_num_threads(1)
    x = torch.randn(64, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs: dict[str, dict[str, nn.Module]] = {
        "pooling": {"torch": nn.AvgPool2d(2, 2), "plugin": HalvingAvgPool()},
        "ReLU and pooling": {
            "torch": nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(2, 2)),
            "plugin": ReluHalvingAvgPool(),
        },
    }
    for what, layers in pairs.items():
        best = {(name, part): float("inf") for name in layers for part in ("forward", "forward + backward")}
        for _ in range(20):
            for name, layer in layers.items():
                for part in ("forward", "forward + backward"):
                    own = x.clone().requires_grad_(part != "forward")
                    taken = own + 0  # not the leaf, which an in-place ReLU may not touch
                    began = perf_counter()
                    y = layer(taken)
                    if part != "forward":
                        y.sum().backward()
                    best[name, part] = min(best[name, part], perf_counter() - began)
        results = []
        for layer in layers.values():
            own = x.clone().requires_grad_()
            y = layer(own + 0)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), own)))
        furthest = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
        print(f"{what}: values and gradients differ by at most {furthest:.1g}")
        for part in ("forward", "forward + backward"):
            ratio = best["torch", part] / best["plugin", part]
            times = ", ".join(f"{name} {1e3 * best[name, part]:.2f} ms" for name in layers)
            print(f"{part:20} {times}: {ratio:.1f}x")


if __name__ == "__main__":
    main()
