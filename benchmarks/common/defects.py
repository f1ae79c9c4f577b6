"""Made images, and defects of a known size drawn into them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

__all__ = ["draw_defect", "surface"]

_CONTRAST = (0.15, 0.35)


def draw_defect(
    image: Tensor, size: int, rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Draw a spot, a scratch or a smudge into an image.

    Args:
        image (Tensor): Shape ``(3, H, W)``, between 0 and 1.
        size (int): Width in pixels of a spot or smudge; length of a scratch, an eighth as wide, at
            least 2.
        rng (np.random.Generator): Chooses kind, place, direction and contrast.

    Returns:
        tuple[Tensor, NDArray[np.bool_]]: The image and the mask of the defect, shape ``(H, W)``.
    """
    height, width = image.shape[1:]
    rows, columns = np.mgrid[:height, :width].astype(float)
    margin = min(size // 2 + 2, height // 2 - 1, width // 2 - 1)
    row, column = rng.integers(margin, height - margin), rng.integers(margin, width - margin)
    angle = rng.uniform(0, np.pi)
    along = (columns - column) * np.cos(angle) + (rows - row) * np.sin(angle)
    across = (rows - row) * np.cos(angle) - (columns - column) * np.sin(angle)
    kind = rng.integers(3)
    if kind == 0:  # spot
        strength = (np.hypot(along, across) <= size / 2).astype(float)
    elif kind == 1:  # scratch
        strength = ((np.abs(along) <= size / 2) & (np.abs(across) <= max(1.0, size / 16))).astype(
            float
        )
    else:  # smudge
        strength = np.exp(-2.0 * (along**2 + (1.5 * across) ** 2) / (size / 2) ** 2)
    amount = rng.uniform(*_CONTRAST) * rng.choice([-1.0, 1.0])
    changed = (image + amount * torch.from_numpy(strength).float()).clamp(0.0, 1.0)
    return changed, strength > 0.3  # noqa: PLR2004


def surface(rng: np.random.Generator, size: Sequence[int]) -> NDArray[np.float32]:
    """Make an image of a good part: a brushed surface under uneven light.

    Args:
        rng (np.random.Generator): Draws grain and light.
        size (Sequence[int]): Height and width.

    Returns:
        NDArray[np.float32]: Shape ``(H, W)``, between 0 and 1.
    """
    found = np.full(size, 0.5)
    for spread, strength in (((1.0, 20.0), 0.02), ((2.5, 2.5), 0.01), ((0.7, 0.7), 0.01)):
        part = ndimage.gaussian_filter(rng.normal(size=size), spread)
        found += strength * part / part.std()
    light = torch.from_numpy(rng.normal(0.0, 0.03, (1, 1, 5, 6)))
    found += functional.interpolate(light, tuple(size), mode="bicubic")[0, 0].numpy()
    return np.clip(found, 0.0, 1.0).astype(np.float32)
