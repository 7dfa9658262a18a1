"""Checkouts of the public codebases, for the tests that compare with them number for number.

A checkout is named by an environment variable: TAD_UPSTREAM_DM, TAD_UPSTREAM_MTT, TAD_UPSTREAM_DATM, TAD_UPSTREAM_IDM,
TAD_UPSTREAM_IDC. Without it the test that asks for the checkout is skipped.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from tad_plugin.nn.augment import Augmentation, Draw
from tad_plugin.upstream.run_script import forget_modules

_counter = 0


def upstream(name: str) -> Path:
    """Folder of the checkout called ``name`` (dm, mtt, datm, idm); skips the test where none is given."""
    variable = f"TAD_UPSTREAM_{name.upper()}"
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: no checkout of {name} to compare with")
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        pytest.fail(f"{variable} is {value!r}, which is not a folder")
    return path


@contextmanager
def isolated_imports(*folders: Path) -> Iterator[None]:
    """Imports inside find ``folders`` first, and what they import from there is forgotten afterwards.

    Several codebases have modules of the same name (utils, networks); each caller gets those of its own folders.
    """
    local = {p.stem for folder in folders for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] in local and not _is_ours(n)}
    path = list(sys.path)
    for name in hidden:
        del sys.modules[name]
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = path
        for folder in folders:
            forget_modules(folder)
        sys.modules.update(hidden)


def import_upstream(name: str, file: str, *search: str, missing: tuple[str, ...] = ()) -> types.ModuleType:
    """The module ``file`` (a path inside the checkout ``name``), loaded without a trace in ``sys.modules``.

    Args:
        name: dm, mtt, datm or idm.
        file: such as "networks.py" or "utils/utils_baseline.py".
        search: folders inside the checkout, besides the file's own and the root, where its imports are looked for.
        missing: packages that it imports and that are stubbed where they are not installed (wandb, torchnet...).
    """
    global _counter
    root = upstream(name)
    path = root / file
    _counter += 1
    private = f"_tad_upstream_{_counter}_{path.stem}"
    stubs = [m for m in (*missing, "scipy.ndimage.interpolation") if not _installed(m)]
    with isolated_imports(path.parent, root, *(root / s for s in search)):
        for stub in stubs:
            sys.modules[stub] = _stub(stub)
        try:
            spec = importlib.util.spec_from_file_location(private, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[private] = module  # dataclasses look their module up while it is executed
            spec.loader.exec_module(module)
        finally:
            for extra in (private, *stubs):
                sys.modules.pop(extra, None)
    return module


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters by position, checking that there are as many and of the same shapes."""
    ours, theirs = list(target.parameters()), list(source.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for mine, yours in zip(ours, theirs, strict=True):
            mine.copy_(yours)


def upstream_draw(
    augmentation: Augmentation, image_size: tuple[int, int], *, seed: int, n: int = 1, siamese: bool = True
) -> Draw:
    """What the public code draws on a CPU with ``DiffAugment(..., seed=seed)``, as a :class:`Draw` of ours.

    Args:
        augmentation: strategy, mode and strengths.
        image_size: (height, width).
        seed: its ``seed`` argument; with ``siamese=False`` the global seed before a call with ``seed=-1``.
        n: number of images; only used with ``siamese=False``.
        siamese: whether it reseeds before every number, and uses the first for all images.
    """
    latest = seed
    count = 1 if siamese else n
    values: dict[str, torch.Tensor] = {}

    def reseed() -> None:
        nonlocal latest
        if siamese:
            torch.manual_seed(latest)
            latest += 1

    def uniform() -> torch.Tensor:
        reseed()
        return torch.rand(count)

    def integer(low: int, high: int) -> torch.Tensor:
        reseed()
        return torch.randint(low, high, (count,))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        strategies = augmentation.strategies
        if augmentation.mode == "S":
            reseed()
            strategies = (strategies[int(torch.randint(0, len(strategies), (1,)))],)
        for strategy in strategies:
            if strategy == "color":
                values["brightness"] = (uniform() - 0.5) * augmentation.brightness
                values["saturation"] = uniform() * augmentation.saturation
                values["contrast"] = uniform() + augmentation.contrast
            elif strategy == "crop":
                reach = [int(side * augmentation.ratio_crop_pad + 0.5) for side in image_size]
                values["crop"] = torch.stack([integer(-r, r + 1) for r in reach], dim=1)
            elif strategy == "cutout":
                sizes = [int(side * augmentation.ratio_cutout + 0.5) for side in image_size]
                bounds = [side + 1 - size % 2 for side, size in zip(image_size, sizes, strict=True)]
                values["cutout"] = torch.stack([integer(0, bound) for bound in bounds], dim=1)
            elif strategy == "flip":
                values["flip"] = uniform() < augmentation.prob_flip
            elif strategy == "scale":
                low, high = 1 / augmentation.ratio_scale, augmentation.ratio_scale
                values["scale"] = torch.stack([uniform() * (high - low) + low for _ in range(2)], dim=1)
            else:
                values["rotate"] = (uniform() - 0.5) * 2 * math.radians(augmentation.ratio_rotate)
    return Draw.of(*strategies, siamese=siamese, **{k: v[0] if siamese else v for k, v in values.items()})


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in ("tests", "tad_plugin")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _stub(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__getattr__ = lambda _: MagicMock()  # type: ignore[method-assign]
    return module
