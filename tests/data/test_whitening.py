from __future__ import annotations

import numpy as np
import pytest
import torch

from tad_plugin.data.whitening import ZCA, fit_zca
from tad_plugin.errors import InvalidInputError, NonFiniteError


def images(n: int = 400, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Correlated images [n, 2, 3, 4]."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(n, 24, generator=generator, dtype=torch.float64)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64) + 2.0
    return (white @ mix + 1.0).reshape(n, 2, 3, 4).to(dtype)


def test_the_covariance_becomes_the_identity():
    x = images()
    white = fit_zca(x, eps=1e-9)(x)
    assert white.shape == x.shape and white.dtype == x.dtype
    assert np.allclose(white.flatten(1).mean(0), 0.0, atol=1e-8)
    assert np.allclose(np.cov(white.flatten(1).numpy(), rowvar=False), np.eye(24), atol=1e-5)


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_matrix_is_the_inverse_root_of_the_regularised_covariance(eps):
    x = images()
    zca = fit_zca(x, eps)
    values, vectors = np.linalg.eigh(np.cov(x.flatten(1).numpy(), rowvar=False))
    expected = (vectors / np.sqrt(values + eps)) @ vectors.T
    assert np.allclose(zca.matrix, expected, atol=1e-8)
    assert np.allclose(zca.inverse_matrix, np.linalg.inv(expected), rtol=1e-6, atol=1e-6)
    assert np.allclose(zca.mean, x.flatten(1).mean(0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_inverse_undoes_it_also_on_other_images(dtype, tolerance):
    zca, other = fit_zca(images(dtype=dtype)), images(500, dtype)[400:]
    assert torch.allclose(zca.inverse(zca(other)), other, atol=tolerance)
    assert torch.allclose(zca(zca.inverse(other)), other, atol=tolerance)


def test_agrees_with_kornia():
    from kornia.enhance import ZCAWhitening

    x = images()
    theirs, ours = ZCAWhitening(eps=0.1, compute_inv=True).fit(x), fit_zca(x, 0.1)
    assert torch.allclose(ours(x), theirs(x))
    assert torch.allclose(ours.inverse(x), theirs.inverse_transform(x))


def test_differentiable_in_the_images():
    zca, x = fit_zca(images()), images(2).requires_grad_()
    assert torch.autograd.gradcheck(zca, (x,))
    assert torch.autograd.gradcheck(zca.inverse, (x,))


def test_state_comes_back(tmp_path):
    zca = fit_zca(images())
    torch.save(zca.state_dict(), tmp_path / "zca.pt")
    again = ZCA.from_state_dict(torch.load(tmp_path / "zca.pt", weights_only=True))
    assert torch.equal(again(images()), zca(images()))
    assert torch.equal(zca.to("cpu").matrix, zca.matrix)
    with pytest.raises(InvalidInputError, match="inverse_matrix"):
        ZCA.from_state_dict({"matrix": zca.matrix})


def test_what_cannot_be_whitened():
    zca, x = fit_zca(images()), images()
    with pytest.raises(InvalidInputError, match="24"):
        zca(x[:, :1])
    with pytest.raises(InvalidInputError):
        fit_zca(x[:1])
    with pytest.raises(InvalidInputError, match="uint8"):
        fit_zca(x.to(torch.uint8))
    with pytest.raises(InvalidInputError, match="eps"):
        fit_zca(x, eps=-1.0)
    with pytest.raises(NonFiniteError):
        fit_zca(torch.full_like(x, float("nan")))
    with pytest.raises(NonFiniteError, match="eps"):
        fit_zca(torch.zeros_like(x), eps=0.0)
    with pytest.raises(InvalidInputError, match="24"):
        ZCA(zca.mean, zca.matrix[:3], zca.inverse_matrix)
