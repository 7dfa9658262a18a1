"""ZCA whitening as the baselines use it. kornia computes the matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tad_plugin.errors import InvalidInputError, NonFiniteError, explain

__all__ = ["ZCA", "fit_zca"]


@dataclass(frozen=True, eq=False)
class ZCA:
    """A fitted whitening of images with D = C*H*W values each: x -> (x - mean) @ matrix.

    Attributes:
        mean: float [D], the mean image.
        matrix: float [D, D], symmetric: (covariance + eps I)^(-1/2).
        inverse_matrix: float [D, D], its inverse.

    Raises:
        InvalidInputError: shapes that do not fit each other.
    """

    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor

    def __post_init__(self) -> None:
        d = len(self.mean) if self.mean.ndim == 1 else -1
        shapes = [list(t.shape) for t in (self.mean, self.matrix, self.inverse_matrix)]
        if shapes != [[d], [d, d], [d, d]]:
            raise InvalidInputError(
                explain(
                    "a mean [D] and two matrices [D, D]",
                    f"shapes {shapes}",
                    "Pass the three tensors of one fit_zca() call",
                )
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images, float [N, C, H, W] as given; differentiable.

        Raises:
            InvalidInputError: images with another number of values than in the fit.
        """
        flat = self._flat(images)
        return ((flat - self.mean) @ self.matrix).reshape(images.shape)

    def inverse(self, images: Tensor) -> Tensor:
        """Undoes :meth:`__call__` up to rounding; images, float [N, C, H, W]; differentiable.

        Raises:
            InvalidInputError: images with another number of values than in the fit.
        """
        return (self._flat(images) @ self.inverse_matrix + self.mean).reshape(images.shape)

    def to(self, device: torch.device | str) -> ZCA:
        """The same whitening on another device."""
        return ZCA(self.mean.to(device), self.matrix.to(device), self.inverse_matrix.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The three tensors by name."""
        return {"mean": self.mean, "matrix": self.matrix, "inverse_matrix": self.inverse_matrix}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ZCA:
        """The inverse of :meth:`state_dict`; other keys are ignored.

        Raises:
            InvalidInputError: a tensor is missing, or shapes do not fit each other.
        """
        names = ("mean", "matrix", "inverse_matrix")
        missing = [name for name in names if name not in state]
        if missing:
            raise InvalidInputError(
                explain(
                    f"the tensors {', '.join(names)}",
                    f"none called {', '.join(missing)}",
                    "Pass the state of a fitted ZCA",
                )
            )
        return cls(*(state[name] for name in names))

    def _flat(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        if flat.shape[1] != len(self.mean):
            raise InvalidInputError(
                explain(
                    f"images with C*H*W = {len(self.mean)} values, as in the fit of the whitening",
                    f"shape {list(images.shape)}",
                    "Use images of the same dataset, or fit the whitening again",
                )
            )
        return flat


def fit_zca(images: Tensor, eps: float = 0.1) -> ZCA:
    """Fits ZCA whitening on real images with ``kornia.enhance.ZCAWhitening``, on their device.

    Time grows with D^3 and memory with D^2, D = C*H*W: at 3x64x64 each matrix has 604 MB.

    Args:
        images: float32 or float64 [N, C, H, W], N >= 2.
        eps: added to the covariance's eigenvalues; the baselines use 0.1. Smaller values whiten more fully and amplify
            directions in which the images hardly vary.

    Raises:
        InvalidInputError: images of another shape or type, fewer than two, or an eps below 0.
        NonFiniteError: NaN or infinite values in the images or in the result (eps = 0 and a constant direction).
    """
    # kornia takes seconds to import, and most runs do not whiten.
    from kornia.enhance import ZCAWhitening

    if images.ndim != 4 or len(images) < 2 or images.dtype not in (torch.float32, torch.float64):
        raise InvalidInputError(
            explain(
                "float32 or float64 images [N, C, H, W] with N >= 2",
                f"{images.dtype} of shape {list(images.shape)}",
                "Pass the real training images as one tensor",
            )
        )
    if eps < 0:
        raise InvalidInputError(explain("`eps` >= 0", str(eps), "Pass the baselines' 0.1 or a smaller positive number"))
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError(
            explain("finite images", "NaN or infinite values", "Check how they were loaded and normalised")
        )
    fitted = ZCAWhitening(eps=float(eps), compute_inv=True).fit(images)
    zca = ZCA(fitted.mean_vector.flatten(), fitted.transform_matrix, fitted.transform_inv)
    if not all(bool(torch.isfinite(t).all()) for t in zca.state_dict().values()):
        raise NonFiniteError(
            explain(
                "finite whitening matrices", "NaN or infinite values", "Raise eps: some direction does not vary at all"
            )
        )
    return zca
