"""Residual maps of all scales to an anomaly map and a score map."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.core.linear_algebra import KeepsDtype
from anomalib_sgfr.core.patch_grid import patches_in_region
from anomalib_sgfr.features.layers import Scale

__all__ = ["AnomalyMapGenerator", "GaussianBlur", "ScoreMaps"]

_MAX_MATRICES = 32  # of the latest sizes: a map of four scales takes eight
_MIN_WEIGHT = 1e-12  # of the patches around a pixel that has none inside the region


class ScoreMaps(NamedTuple):
    """Anomaly map and score map of a batch, and the residuals that they come from.

    Attributes:
        anomaly_map (Tensor): Sum over the scales of the map, shape ``(B, 1, H, W)``.
        score_map (Tensor): Weighted sum over the scales of the score, of the same shape; its
            maximum is the image score.
        residuals (list[Tensor]): Residual of each patch over the bank's residual scale, of each
            scale of shape ``(B, 1, h, w)``, the finest first; zero outside the region.
    """

    anomaly_map: Tensor
    score_map: Tensor
    residuals: list[Tensor]

    @property
    def pred_score(self) -> Tensor:
        """Image scores, shape ``(B,)``; NaN and infinity become the largest finite number."""
        score = self.score_map.amax(dim=(1, 2, 3))
        most = torch.finfo(score.dtype).max
        return torch.where(score < most, score, most)  # NaN is not less

    @property
    def peak(self) -> Tensor:
        """Row and column of the largest value of each score map, shape ``(B, 2)``, ``int64``."""
        highest = self.score_map.flatten(1).argmax(1)
        columns = self.score_map.shape[-1]
        return torch.stack((highest // columns, highest % columns), 1)

    @property
    def prediction(self) -> InferenceBatch:
        """Map and score in anomalib's type."""
        return InferenceBatch(anomaly_map=self.anomaly_map, pred_score=self.pred_score)


class GaussianBlur(KeepsDtype, GaussianBlur2d):
    """anomalib's Gaussian, for images of any size and with a kernel that no checkpoint stores.

    Args:
        sigma (float): Standard deviation in pixels.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__(sigma=sigma)
        kernel = self.kernel
        del self.kernel
        self.register_buffer("kernel", kernel, persistent=False)
        self.padding = "valid"

    def forward(self, images: Tensor) -> Tensor:
        """Blur images ``(B, 1, H, W)``."""
        blurred: Tensor = super().forward(_reflected(images, (self.height // 2, self.width // 2)))
        return blurred

    def blur_columns(self, columns: Tensor) -> Tensor:
        """The same along the first of the two axes alone, shape ``(B, 1, L, 1)``."""
        kernel = self.kernel.sum(-1, keepdim=True)
        return functional.conv2d(_reflected(columns, (self.height // 2, 0)), kernel)

    def _adopt_earlier(self, *_: object) -> None:
        """Hook that pickles of version 0.2 name."""


class AnomalyMapGenerator(nn.Module):
    """Sums over scales of the interpolated (bilinear) and blurred residual maps.

    Interpolation and blur are one linear step along each axis, whose matrices are kept for the
    latest sizes.

    Args:
        scales (Sequence[Scale]): Scales of the residual maps.
        sigma (float): Standard deviation of the Gaussian, in pixels of the map; ``0`` for none.

    Raises:
        ValueError: If ``sigma`` is negative or not finite.
    """

    def __init__(self, scales: Sequence[Scale], sigma: float) -> None:
        super().__init__()
        if not 0.0 <= sigma < float("inf"):
            msg = f"blur must be a finite number of pixels, at least 0, got {sigma}."
            raise ValueError(msg)
        self.scales = list(scales)
        self.blur: nn.Module = GaussianBlur(sigma) if sigma > 0 else nn.Identity()
        self._matrices: dict[tuple[int, int, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the matrices."""
        return {**self.__dict__, "_matrices": {}}

    def forward(
        self, residuals: Sequence[Tensor], size: Sequence[int], region: Tensor
    ) -> ScoreMaps:
        """Make maps of the residuals of all scales.

        Args:
            residuals (Sequence[Tensor]): Of each scale, shape ``(B, 1, h, w)``, ``float32``.
            size (Sequence[int]): Height and width ``(H, W)`` of the maps.
            region (Tensor): Pixels to inspect, shape ``(H, W)``; empty for all.

        Returns:
            ScoreMaps: Maps of shape ``(B, 1, H, W)``.
        """
        lengths = [*size, *(length for part in residuals for length in part.shape[-2:])]
        if region.numel() or all(isinstance(length, int) for length in lengths):
            anomaly_map, score_map = self._sums(self.upsample(residuals, size, region))
        else:  # sizes are unknown in an export: one blur of each sum
            sums = self._sums([_interpolate(part, size) for part in residuals])
            anomaly_map, score_map = (self.blur(part) for part in sums)
        return ScoreMaps(anomaly_map, score_map, list(residuals))

    def upsample(
        self, residuals: Sequence[Tensor], size: Sequence[int], region: Tensor
    ) -> list[Tensor]:
        """Interpolate and blur the residual map of each scale.

        With a region, each pixel is an average over patches inside it alone, and zero outside.

        Args:
            residuals (Sequence[Tensor]): As :meth:`forward`; so for ``size`` and ``region``.
            size (Sequence[int]): Height and width.
            region (Tensor): Pixels to inspect.

        Returns:
            list[Tensor]: Of each scale, shape ``(B, 1, H, W)``.
        """
        with torch.autocast(residuals[0].device.type, enabled=False):
            maps = [self._upsample(part, size) for part in residuals]
            inside = self.patches_inside([part.shape[-2:] for part in residuals], region)
            if inside is None:
                return maps
            weights = [self._upsample(mask[None, None].float(), size) for mask in inside]
            means = [
                part / weight.clamp_min(_MIN_WEIGHT)
                for part, weight in zip(maps, weights, strict=True)
            ]
            return [torch.where(region > 0, mean, torch.zeros_like(mean)) for mean in means]

    def patches_inside(self, grids: Sequence[Sequence[int]], region: Tensor) -> list[Tensor] | None:
        """Mask of the patches of each scale that have a pixel in the region.

        Args:
            grids (Sequence[Sequence[int]]): Rows and columns of each scale.
            region (Tensor): Pixels to inspect.

        Returns:
            list[Tensor] | None: Masks of the grids, ``bool``; ``None`` without a region.
        """
        if not region.numel():
            return None
        return [
            patches_in_region(region, grid, scale.stride)
            for grid, scale in zip(grids, self.scales, strict=True)
        ]

    def _sums(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over the scales of the map, and weighted sum over those of the score."""
        anomaly_map = reduce(
            torch.add, [part for part, scale in zip(maps, self.scales, strict=True) if scale.in_map]
        )
        if all(float(scale.in_map) == scale.score_weight for scale in self.scales):
            return anomaly_map, anomaly_map
        score = [
            part if scale.score_weight == 1.0 else scale.score_weight * part
            for part, scale in zip(maps, self.scales, strict=True)
            if scale.score_weight
        ]
        return anomaly_map, reduce(torch.add, score)

    def _upsample(self, residuals: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolate and blur maps ``(B, 1, h, w)``; an export may not know the sizes."""
        if not all(isinstance(length, int) for length in (*size, *residuals.shape[-2:])):
            blurred: Tensor = self.blur(_interpolate(residuals, size))
            return blurred
        vertical, horizontal = (
            self._matrix(before, after, residuals.device)
            for before, after in zip(residuals.shape[-2:], size, strict=True)
        )
        return vertical @ residuals @ horizontal.T

    def _matrix(self, before: int, after: int, device: torch.device) -> Tensor:
        """Interpolation and blur along one axis, shape ``(after, before)``."""
        key = (before, after, device)
        kept = self._matrices  # replaced, never changed: another thread may be reading it
        matrix = kept.get(key)
        if matrix is None:
            unit = torch.eye(before, dtype=torch.float32, device=device)[:, None, :, None]
            response = _interpolate(unit, (after, 1))
            if isinstance(self.blur, GaussianBlur):
                response = self.blur.blur_columns(response)
            matrix = response[:, 0, :, 0].T.contiguous()
            self._matrices = dict([*kept.items(), (key, matrix)][-_MAX_MATRICES:])
        return matrix


def _interpolate(residuals: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(residuals, size=size, mode="bilinear", align_corners=False)


def _reflected(images: Tensor, reach: Sequence[int]) -> Tensor:
    """Pad images ``(B, C, H, W)`` by reflection, narrow ones repeatedly, which PyTorch refuses."""
    padding = [reach[1], reach[1], reach[0], reach[0]]  # left, right, top, bottom
    for axis, at in ((-1, 0), (-2, 2)):
        length, wide = images.shape[axis], padding[at]
        if isinstance(length, int) and 0 < length <= wide:
            period = 2 * (length - 1)
            index = torch.arange(-wide, length + wide, device=images.device).abs() % max(1, period)
            images = images.index_select(axis, torch.minimum(index, period - index))
            padding[at : at + 2] = (0, 0)
    return functional.pad(images, padding, mode="reflect")
