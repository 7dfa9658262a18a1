"""2x2 average pooling: torch's kernel against the plugin's strided sums, side by side, forward and backward.

python reproduce/benchmarks/pooling.py
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn

from tad_plugin.nn.blocks import HalvingAvgPool


def main() -> None:
    """Prints the best of 20 alternating repetitions and whether the bits agree."""
    torch.set_num_threads(1)
    x = torch.randn(64, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    layers = {"torch": nn.AvgPool2d(2, 2), "plugin": HalvingAvgPool()}
    best = {(name, part): float("inf") for name in layers for part in ("forward", "forward + backward")}
    for _ in range(20):
        for name, layer in layers.items():
            for part in ("forward", "forward + backward"):
                own = x.clone().requires_grad_(part != "forward")
                began = perf_counter()
                y = layer(own)
                if part != "forward":
                    y.sum().backward()
                best[name, part] = min(best[name, part], perf_counter() - began)
    print("equal bits:", torch.equal(layers["torch"](x), layers["plugin"](x)))
    for part in ("forward", "forward + backward"):
        ratio = best["torch", part] / best["plugin", part]
        times = ", ".join(f"{name} {1e3 * best[name, part]:.2f} ms" for name in layers)
        print(f"{part:20} {times}: {ratio:.1f}x")


if __name__ == "__main__":
    main()
