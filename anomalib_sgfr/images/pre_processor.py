"""Pre-processing that an exported model does exactly as the Engine does."""

from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    Grayscale,
    Identity,
    Normalize,
    Pad,
    Resize,
    ToDtype,
    Transform,
)

from anomalib_sgfr.images.bit_depth import read_tensor

__all__ = [
    "ExactResize",
    "SgfrPreProcessor",
    "geometric_steps",
    "output_size",
    "read_prepared",
    "resize_matrix",
]

_MOVE_NO_PIXEL = (Normalize, ToDtype, Identity, Grayscale)
_TRIED_SIZES = ((31, 47), (64, 50))


class SgfrPreProcessor(PreProcessor):
    """anomalib's pre-processor, with antialiased resizing in exported models too.

    anomalib turns antialiasing off in what it exports, so that images larger than the model's input
    score differently after an export. Bilinear resizing to a given height and width is exported as
    :class:`ExactResize`; all else is as in anomalib.

    Args:
        transform (Transform | None): As anomalib's pre-processor takes it.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._make_exact()

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore as anomalib does."""
        super().load_checkpoint_config(config)
        self._make_exact()

    def _make_exact(self) -> None:
        if isinstance(self.transform, Compose) and isinstance(self.export_transform, Compose):
            pairs = zip(self.transform.transforms, self.export_transform.transforms, strict=True)
            self.export_transform = Compose([_exact(*pair) for pair in pairs])
        else:
            self.export_transform = _exact(self.transform, self.export_transform)


def _exact(original: Any, exported: Any) -> Any:  # noqa: ANN401
    """Transform to export: exact resizing where it gives the same as the original."""
    if not isinstance(original, Resize) or not original.antialias:
        return exported
    size = original.size
    # an enumeration, its value or PIL's number, by torchvision's version and the caller
    bilinear = getattr(original.interpolation, "value", original.interpolation) in {"bilinear", 2}
    if not bilinear or size is None or len(size) != 2:  # noqa: PLR2004
        return exported
    return ExactResize((size[0], size[1]))


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
        for axis, after in zip((-2, -1), self.size, strict=True):
            before = images.shape[axis]
            if isinstance(before, int) and before == after:
                continue
            matrix = resize_matrix(before, after, images.device).to(images.dtype)
            matrix = matrix if images.ndim == 4 else matrix[0, 0]  # noqa: PLR2004
            images = matrix @ images if axis == -2 else images @ matrix.mT  # noqa: PLR2004
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


def read_prepared(path: str, pre_processor: Any, bit_depth: int = 8) -> Tensor:  # noqa: ANN401
    """Read an image file and pre-process it as the Engine does.

    Args:
        path (str): The file.
        pre_processor (Any): anomalib's or one like it, or ``None``.
        bit_depth (int): Bits of the camera.

    Returns:
        Tensor: Shape ``(3, H, W)``.
    """
    image = read_tensor(path, bit_depth)
    transform = getattr(pre_processor, "transform", None)
    return image if transform is None else transform(image)


def output_size(pre_processor: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Size of a pre-processor's output.

    Args:
        pre_processor (Any): anomalib's or one like it, or ``None``.

    Returns:
        tuple[int, int] | None: Height and width; ``None`` if they depend on the image.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return None
    try:
        sizes = {tuple(transform(torch.zeros(3, *size)).shape[-2:]) for size in _TRIED_SIZES}
    except (RuntimeError, TypeError, ValueError):  # not a transform of images
        return None
    return sizes.pop() if len(sizes) == 1 else None


def geometric_steps(transform: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
    """Resizing, cropping and padding of a transform, in order.

    Args:
        transform (Any): torchvision's, or ``None``.

    Returns:
        list[tuple[Any, ...]]: As :func:`~anomalib_sgfr.images.frame_geometry.frame_transform` takes
        them.

    Raises:
        ValueError: If the transform moves pixels in any other way.
    """
    if transform is None or isinstance(transform, _MOVE_NO_PIXEL):
        return []
    if isinstance(transform, Compose):
        return [step for part in transform.transforms for step in geometric_steps(part)]
    match transform:
        case Resize(size=[height, width]) | ExactResize(size=(height, width)):
            return [("resize", int(height), int(width))]
        case Resize(size=[shorter]):
            return [("shorter", int(shorter), transform.max_size)]
        case CenterCrop(size=(height, width)):
            return [("crop", int(height), int(width))]
        case Pad(padding_mode="constant", padding=padding):
            sides = padding if isinstance(padding, list | tuple) else [padding]
            return [("pad", *(list(map(int, sides)) * 4)[:4])]
    name = type(transform).__name__
    msg = (
        f"the pre-processor's {name} moves pixels in a way that cannot be followed back: use"
        " Resize, CenterCrop or Pad."
    )
    raise ValueError(msg)
