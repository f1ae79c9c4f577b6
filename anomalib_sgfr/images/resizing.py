"""Resizing of images: to a fixed size or to the image's aspect ratio, and the same in exports."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import Compose, Resize
from torchvision.transforms.v2.functional import get_size

from anomalib_sgfr.images.frame_geometry import (
    aspect_bounds,
    aspect_sizes,
    shortest_side,
    size_of_aspect,
)

__all__ = [
    "AspectResize",
    "ExactAspectResize",
    "ExactResize",
    "GridResize",
    "adaptable",
    "exportable",
    "plain",
    "resize_matrix",
]


class AspectResize(Resize):
    """Bilinear resizing with antialiasing, to one size, or of each image to its own aspect ratio.

    A fit chooses which of the two. anomalib's data modules resize with this very object, so that a
    choice reaches their images too.

    Args:
        size (Sequence[int]): Height and width; those of the square, where ``rule`` is given.
        rule (tuple[int, int] | None): Side and step of
            :func:`~anomalib_sgfr.images.frame_geometry.size_of_aspect`, by which each image is
            resized; ``None`` to resize all of them to ``size``.
    """

    def __init__(self, size: Sequence[int], rule: tuple[int, int] | None = None) -> None:
        super().__init__(list(size), antialias=True)
        self.rule = rule

    def choose(self, size: Sequence[int], rule: tuple[int, int] | None = None) -> None:
        """Resize otherwise from now on.

        Args:
            size (Sequence[int]): As the constructor's.
            rule (tuple[int, int] | None): As the constructor's.
        """
        self.size, self.rule = list(size), rule

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401
        """Resize images or batches of them, and masks with them."""
        if self.rule is None:
            return super().forward(*inputs)
        first = next(item for item in inputs if isinstance(item, Tensor | Image.Image))
        size = size_of_aspect(*get_size(first), *self.rule)
        return Resize(size, antialias=True)(*inputs)


def adaptable(transform: Any) -> Any:  # noqa: ANN401
    """Transform with an :class:`AspectResize` in place of a bilinear resizing to one size.

    Args:
        transform (Any): torchvision's, or ``None``.

    Returns:
        Any: A transform that does the same.
    """
    if isinstance(transform, Compose):
        return Compose([adaptable(part) for part in transform.transforms])
    is_adaptable = type(transform) is Resize and _is_exact(transform)
    return AspectResize(transform.size) if is_adaptable else transform


def plain(transform: Any) -> Any:  # noqa: ANN401
    """Transform with torchvision's ``Resize`` in place of each :class:`AspectResize`."""
    if isinstance(transform, Compose):
        return Compose([plain(part) for part in transform.transforms])
    return Resize(transform.size) if isinstance(transform, AspectResize) else transform


def exportable(original: Any, exported: Any) -> Any:  # noqa: ANN401
    """Transform to export: exact resizing where it gives the same as the original.

    Args:
        original (Any): torchvision's transform, or ``None``.
        exported (Any): What anomalib makes of it.

    Returns:
        Any: A transform, or ``None``.
    """
    if isinstance(original, Compose) and isinstance(exported, Compose):
        pairs = zip(original.transforms, exported.transforms, strict=True)
        return Compose([exportable(*pair) for pair in pairs])
    if not isinstance(original, Resize) or not _is_exact(original):
        return exported
    if isinstance(original, AspectResize) and original.rule:
        return ExactAspectResize(*original.rule)
    return ExactResize((original.size[0], original.size[1]))


def _is_exact(resize: Resize) -> bool:
    """Whether an :class:`ExactResize` gives the same."""
    # an enumeration, its value or PIL's number, by torchvision's version and the caller
    bilinear = getattr(resize.interpolation, "value", resize.interpolation) in {"bilinear", 2}
    return bool(resize.antialias) and bilinear and len(resize.size or ()) == 2  # noqa: PLR2004


class ExactResize(nn.Module):
    """Antialiased bilinear resizing by two matrix products, the same in every runtime.

    Args:
        size (tuple[int, int]): Height and width of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize images of shape ``(..., H, W)``."""
        return _resized(images, self.size)


class ExactAspectResize(nn.Module):
    """As :class:`ExactResize`, to the size nearest to the images' aspect ratio.

    A traced graph cannot choose a size by that of its input and infer the sizes of what follows. So
    for sizes that are unknown it takes a grid, with a cell for each ``step`` pixels of a side but
    for the first ``margin`` ones, enlarges that, and the export puts a :class:`GridResize` before
    it, whose images replace the enlarged ones. A trace tries grids of two cells a side.

    Args:
        side (int): As in :func:`~anomalib_sgfr.images.frame_geometry.size_of_aspect`.
        step (int): As there.
    """

    def __init__(self, side: int, step: int) -> None:
        super().__init__()
        self.rule = (side, step)

    def forward(self, images: Tensor) -> Tensor:
        """Resize images of shape ``(..., H, W)``, or enlarge a grid of unknown size."""
        height, width = images.shape[-2:]
        if isinstance(height, int) and isinstance(width, int):
            return _resized(images, size_of_aspect(height, width, *self.rule))
        margin, step = _margin(self.rule[1]), self.rule[1]
        size = tuple(margin + length * step for length in (height, width))
        return functional.interpolate(images, size=size, mode="nearest")


class GridResize(nn.Module):
    """What an exported file does to an image first, see :class:`ExactAspectResize`.

    Args:
        side (int): As there.
        step (int): As there.
    """

    bounds: Tensor
    sizes: Tensor

    def __init__(self, side: int, step: int) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("bounds", torch.from_numpy(aspect_bounds(side, step)))
        self.register_buffer("sizes", torch.tensor(aspect_sizes(side, step)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Resize images ``(B, 3, H, W)``; also returns a pixel for each cell of the grid."""
        height, width = (
            torch.scalar_tensor(length, dtype=torch.int64) for length in images.shape[-2:]
        )
        passed = height * self.bounds[:, 1] > width * self.bounds[:, 0]
        rows, columns = self.sizes[passed.sum()]
        size = rows.item(), columns.item()
        margin = _margin(self.step)
        for length in size:
            torch._check(length >= margin + 2 * self.step)  # noqa: SLF001  # tells a trace
        resized = _resized(images, size)
        return resized, resized[..., margin :: self.step, margin :: self.step]


def _margin(step: int) -> int:
    return shortest_side(step) - 2 * step


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    for axis, after in zip((-2, -1), size, strict=True):
        before = images.shape[axis]
        if isinstance(before, int) and before == after:
            continue
        matrix = resize_matrix(before, after, images.device).to(images.dtype)
        matrix = matrix if images.ndim == 4 else matrix[0, 0]  # noqa: PLR2004
        # the matrix first along both axes: OpenVINO (2026.4) cannot compile a product by a constant
        # behind it that a subtraction follows
        images = matrix @ images if axis == -2 else (matrix @ images.mT).mT  # noqa: PLR2004
    return images


def resize_matrix(before: int, after: int, device: torch.device | None = None) -> Tensor:
    """Bilinear interpolation with antialiasing along one axis, as a matrix.

    Triangle weights, as wide as a pixel of the coarser of the two grids, each row normalised to a
    sum of one: ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``. Positions and
    their differences are integers: a runtime that computes in bfloat16 would round a position such
    as 255.5, and sample beside the pixel.

    Args:
        before (int): Pixels of the image; may be unknown while exporting.
        after (int): Pixels of the result.
        device (torch.device | None): Device of the matrix.

    Returns:
        Tensor: Shape ``(1, 1, after, before)``, ``float32``.
    """
    # in units of 1 / (2 * after) of a pixel the centres of both grids' pixels are integers
    numbers = torch.arange(before, device=device)[None, None, None]
    count = numbers[..., -1:] + 1  # a tensor, so that an export does not fix it
    centres = (2 * torch.arange(after, device=device)[:, None] + 1) * count
    width = 2 * count.clamp_min(after)
    weights = (width - ((2 * numbers + 1) * after - centres).abs()).clamp_min(0).float()
    weights = weights * 2.0**-8  # exact, and the sums fit half precision
    # OpenVINO decomposes a division, and loses its precision setting; not so that of a power
    root = weights.sum(-1, keepdim=True).pow(-0.5)
    return weights * root * root
