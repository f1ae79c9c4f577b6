"""Interpolation and Gaussian blur of maps of any size, apart or as one step."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core.linear_algebra import KeepsDtype

__all__ = ["Blur", "Smoothing", "interpolate"]

_KEPT = 32  # matrices, of the latest sizes: a map of four scales takes eight


class Blur(KeepsDtype, GaussianBlur2d):
    """anomalib's, but that its kernel, which follows from the argument, is no part of a checkpoint."""

    def __init__(self, sigma: float) -> None:
        super().__init__(sigma=sigma)
        kernel = self.kernel
        del self.kernel
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_load_state_dict_pre_hook(Blur._adopt_earlier)
        self.padding = "valid"

    def forward(self, images: Tensor) -> Tensor:
        """Blur images of any size."""
        blurred: Tensor = super().forward(_reflected(images, (self.height // 2, self.width // 2)))
        return blurred

    def downwards(self, columns: Tensor) -> Tensor:
        """The same along the first of the two axes alone, shape ``(B, 1, L, 1)``."""
        kernel = self.kernel.sum(-1, keepdim=True)
        return functional.conv2d(_reflected(columns, (self.height // 2, 0)), kernel)

    def _adopt_earlier(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        """Leave what version 0.1 stored."""
        state.pop(f"{prefix}kernel", None)


class Smoothing:
    """Interpolation and Gaussian as one linear step along each axis; matrices of the latest sizes
    are kept.

    Args:
        blur (nn.Module): The Gaussian; anything but a :class:`Blur` is none.
    """

    def __init__(self, blur: nn.Module) -> None:
        self._blur = blur
        self._matrices: dict[tuple[int, int, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what can be made again."""
        return {**self.__dict__, "_matrices": {}}

    def __len__(self) -> int:
        """Number of matrices kept."""
        return len(self._matrices)

    def __call__(self, residuals: Tensor, size: Sequence[int]) -> Tensor:
        """Residuals ``(B, 1, h, w)`` at a height and a width, which an export may not know."""
        if not all(isinstance(length, int) for length in (*size, *residuals.shape[-2:])):
            blurred: Tensor = self._blur(interpolate(residuals, size))
            return blurred
        vertical, horizontal = (
            self._matrix(before, after, residuals.device)
            for before, after in zip(residuals.shape[-2:], size, strict=True)
        )
        return vertical @ residuals @ horizontal.T

    def _matrix(self, before: int, after: int, device: torch.device) -> Tensor:
        """What both do along one axis, shape ``(after, before)``."""
        key = (before, after, device)
        kept = self._matrices  # replaced, never changed: another thread may be reading it
        matrix = kept.get(key)
        if matrix is None:
            unit = torch.eye(before, dtype=torch.float32, device=device)[
                :, None, :, None
            ]  # a one in each place
            spread = interpolate(unit, (after, 1))
            if isinstance(self._blur, Blur):
                spread = self._blur.downwards(spread)
            matrix = spread[:, 0, :, 0].T.contiguous()
            self._matrices = dict([*kept.items(), (key, matrix)][-_KEPT:])
        return matrix


def interpolate(residuals: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of residuals ``(B, 1, h, w)`` to a height and a width."""
    return functional.interpolate(residuals, size=size, mode="bilinear", align_corners=False)


def _reflected(images: Tensor, reach: Sequence[int]) -> Tensor:
    """Continue images ``(B, C, H, W)`` by reflection; narrow ones as often as it takes, which
    PyTorch refuses.
    """
    padding = [reach[1], reach[1], reach[0], reach[0]]  # left, right, top, bottom
    for axis, at in ((-1, 0), (-2, 2)):
        length, wide = images.shape[axis], padding[at]
        if isinstance(length, int) and 0 < length <= wide:
            period = 2 * (length - 1)
            places = torch.arange(-wide, length + wide, device=images.device).abs() % max(1, period)
            images = images.index_select(axis, torch.minimum(places, period - places))
            padding[at : at + 2] = (0, 0)
    return functional.pad(images, padding, mode="reflect")
