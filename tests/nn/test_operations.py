from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.autograd import gradcheck, gradgradcheck

from tad_plugin.nn import operations as ops

B, C, H, W = 4, 3, 8, 6


def images(dtype=torch.float32, n=B, height=H, width=W):
    return torch.randn(n, C, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


# One row per image; every operation takes the first row alone as shared by the batch.
CASES = {
    "brightness": (ops.brightness, torch.tensor([0.3, -0.5, 0.0, 0.2])),
    "saturation": (ops.saturation, torch.tensor([0.3, 2.0, 0.0, 1.0])),
    "contrast": (ops.contrast, torch.tensor([0.6, 1.4, 0.5, 1.0])),
    "crop": (ops.crop, torch.tensor([[2, -1], [0, 0], [-8, 6], [1, 3]])),
    "cutout": (lambda x, c: ops.cutout(x, c, (4, 3)), torch.tensor([[8, 0], [0, 5], [3, 3], [1, 4]])),
    "flip": (ops.flip, torch.tensor([True, False, True, False])),
    "scale": (ops.scale, torch.tensor([[0.8, 1.2], [1.0, 1.0], [1.1, 0.9], [1.2, 1.2]])),
    "scale, corners": (
        lambda x, f: ops.scale(x, f, align_corners=True),
        torch.tensor([[0.8, 1.2], [1.0, 1.0], [1.1, 0.9], [1.2, 1.2]]),
    ),
    "rotate": (ops.rotate, torch.tensor([0.2, -0.1, 0.0, 1.5])),
    "rotate, corners": (lambda x, a: ops.rotate(x, a, align_corners=True), torch.tensor([0.2, -0.1, 0.0, 1.5])),
}
EACH = pytest.mark.parametrize("function, values", CASES.values(), ids=list(CASES))


@EACH
def test_per_image_equals_one_by_one(function, values):
    x = images()
    each = torch.cat([function(x[i : i + 1], values[i : i + 1]) for i in range(B)])
    assert torch.allclose(function(x, values), each, atol=1e-6)


@EACH
def test_shared_equals_repeated(function, values):
    x = images()
    shared, repeated = function(x, values[:1]), function(x, values[:1].expand_as(values))
    assert torch.allclose(shared, repeated, atol=1e-6)
    assert shared.shape == x.shape and shared.dtype == x.dtype


@EACH
@pytest.mark.parametrize("rows", [1, 2])
def test_first_and_second_derivatives(function, values, rows):
    x = images(torch.float64, 2)[:, :2].requires_grad_()
    assert gradcheck(lambda x: function(x, values[:rows]), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda x: function(x, values[:rows]) ** 3, (x,))


@EACH
def test_forward_over_reverse_equals_reverse_over_reverse(function, values):
    x, v = images(torch.float64), torch.ones_like(images(torch.float64))

    def loss(x):
        return (function(x, values) ** 3).sum()

    _, forward = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (reverse,) = torch.autograd.grad((gradient * v).sum(), x)
    assert torch.allclose(forward, reverse)


@EACH
def test_works_under_vmap_and_leaves_its_input_alone(function, values):
    x = images()
    before = x.clone()
    stacked = torch.func.vmap(lambda x: function(x, values[:1]))(torch.stack((x, 2 * x)))
    assert torch.allclose(stacked[1], function(2 * x, values[:1]), atol=1e-6)
    assert torch.equal(x, before)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_type(function, values, dtype):
    x = images(torch.float64).to(dtype)
    for rows in (values, values[:1]):
        result, expected = function(x, rows), function(x.double(), rows)
        assert result.dtype == dtype
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= 16 * torch.finfo(dtype).eps


def test_color_by_hand():
    x = images()
    grey = x.mean(1, keepdim=True)
    assert torch.allclose(ops.brightness(x, torch.tensor([0.25])), x + 0.25)
    assert torch.allclose(ops.saturation(x, torch.tensor([0.0])), grey.expand_as(x), atol=1e-6)
    assert torch.allclose(ops.saturation(x, torch.tensor([2.0])), 2 * x - grey, atol=1e-6)
    flat = ops.contrast(x, torch.tensor([0.5, 1.0, 0.0, 2.0]))
    for i, factor in enumerate((0.5, 1.0, 0.0, 2.0)):
        assert torch.allclose(flat[i], x[i].mean() + factor * (x[i] - x[i].mean()), atol=1e-6)


def test_crop_by_loop():
    x, (_, offsets) = images(), CASES["crop"]
    expected = torch.zeros_like(x)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                row, column = i + int(offsets[b, 0]), j + int(offsets[b, 1])
                if 0 <= row < H and 0 <= column < W:
                    expected[b, :, i, j] = x[b, :, row, column]
    assert torch.equal(ops.crop(x, offsets), expected)


@pytest.mark.parametrize("offset", [(8, 0), (-8, 0), (20, -3), (1, -99)])
def test_a_crop_beside_the_image_is_zero(offset):
    far = torch.tensor([offset])
    assert not ops.crop(images(), far).any()
    assert not ops.crop(images(), far.expand(B, 2)).any()


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (8, 6), (0, 0)])
def test_cutout_by_loop(size):
    x, (_, centres) = images(), CASES["cutout"]
    expected = x.clone()
    for b in range(B):
        for i in range(size[0]):
            for j in range(size[1]):
                row, column = i + int(centres[b, 0]) - size[0] // 2, j + int(centres[b, 1]) - size[1] // 2
                if 0 <= row < H and 0 <= column < W:
                    expected[b, :, row, column] = 0
    assert torch.equal(ops.cutout(x, centres, size), expected)


def test_flip_by_loop():
    x, (_, flipped) = images(), CASES["flip"]
    assert torch.equal(ops.flip(x, flipped), torch.stack([x[i].flip(-1) if f else x[i] for i, f in enumerate(flipped)]))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kind", ["scale", "rotate"])
def test_resampling_agrees_with_scipy(kind, align_corners):
    x = images(torch.float64)
    values = CASES[kind][1]
    result = getattr(ops, kind)(x, values, align_corners=align_corners)
    # Pixel centres in [-1, 1], where -1 and 1 are pixel centres (align_corners) or the image's edges.
    spans = [(n - 1) / 2 if align_corners else n / 2 for n in (H, W)]
    v, u = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) / s for n, s in zip((H, W), spans, strict=True)], indexing="ij")
    for b in range(B):
        if kind == "scale":
            horizontal, vertical = values[b].tolist()
            u2, v2 = u * horizontal, v * vertical
        else:
            a = float(values[b])
            u2, v2 = math.cos(a) * u - math.sin(a) * v, math.sin(a) * u + math.cos(a) * v
        where = [v2 * spans[0] + (H - 1) / 2, u2 * spans[1] + (W - 1) / 2]
        for c in range(C):
            expected = ndimage.map_coordinates(x[b, c].numpy(), where, order=1, mode="grid-constant", cval=0.0)
            assert np.allclose(result[b, c].numpy(), expected, atol=1e-5)


def test_a_quarter_turn_is_anticlockwise():
    x = images(height=6)
    assert torch.allclose(ops.rotate(x, torch.tensor([math.pi / 2])), torch.rot90(x, 1, (2, 3)), atol=1e-5)


def test_resampling_has_the_gradient_of_grid_sample():
    x, angle = images().requires_grad_(), torch.tensor([0.3])
    weights = images()
    (ours,) = torch.autograd.grad((ops.rotate(x, angle) * weights).sum(), x)
    c, s = math.cos(0.3), math.sin(0.3)
    theta = torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]).expand(B, -1, -1)
    sampled = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    (theirs,) = torch.autograd.grad((sampled * weights).sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-6)
