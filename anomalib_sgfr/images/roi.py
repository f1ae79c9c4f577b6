"""Region of interest: a mask image, white where to inspect, at the model's input size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

__all__ = ["mask_at_input", "read_defect_mask", "read_roi", "roi_at_input"]

_COVERED = 0.1  # share of a pixel inside a mask, of a pixel that counts as inside
# a mask may have grey edges, a photograph has grey anywhere
_MOST_GREY = 0.1  # share of pixels
_MOST_LEVELS = 16
_ROUNDING = 1e-5  # difference of two transformed pixels by rounding alone


def read_roi(path: str | Path) -> Tensor:
    """Read a region of interest: a pixel is inside if it is brighter than half of white.

    Args:
        path (str | Path): The file.

    Returns:
        Tensor: Shape ``(H, W)``, ``bool``.

    Raises:
        ValueError: If it cannot be read, is a photograph, or no pixel is inside.
    """
    inside, found = _read(path, "roi", "where to inspect")
    if not inside.any():
        msg = f"roi '{path}' leaves nothing to inspect: {found}"
        raise ValueError(msg)
    return inside


def read_defect_mask(path: str | Path) -> Tensor:
    """Read the mask of a defect: a pixel shows it if it is brighter than half of white.

    Args:
        path (str | Path): The file.

    Returns:
        Tensor: Shape ``(H, W)``, ``bool``.

    Raises:
        ValueError: If it cannot be read, is a photograph, or no pixel shows the defect.
    """
    inside, found = _read(path, "mask", "on the defect")
    if not inside.any():
        msg = f"mask '{path}' shows no defect: {found}"
        raise ValueError(msg)
    return inside


def _read(path: str | Path, name: str, white_is: str) -> tuple[Tensor, str]:
    """Mask of a file, and a sentence on what was found in it."""
    try:
        with Image.open(path) as opened:
            is_16_bits = opened.mode.startswith("I")
            pixels = np.asarray(opened if is_16_bits else opened.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow's readers
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"{type(error).__name__}: {error}"
        msg = f"{name} '{path}' cannot be read: {reason}. It must be an image, white {white_is}."
        raise ValueError(msg) from error
    white = 65535 if is_16_bits else 255
    grey = pixels[(pixels > white // 10) & (pixels < white - white // 10)]
    if grey.size > _MOST_GREY * pixels.size and len(np.unique(grey)) > _MOST_LEVELS:
        msg = (
            f"{name} '{path}' is no mask: {100 * grey.size / pixels.size:.0f}% of its pixels are"
            f" grey. It must be black, and white {white_is}."
        )
        raise ValueError(msg)
    inside = torch.from_numpy(2 * pixels.astype(np.int64) > white)
    found = (
        f"its brightest pixel is {int(pixels.max())}, inside is what is brighter than {white // 2},"
        f" and white is {white}."
    )
    return inside, found


def roi_at_input(inside: Tensor, pre_processor: Any, name: str = "roi") -> Tensor:  # noqa: ANN401
    """Region of interest in pixels of the model's input.

    The mask is transformed as anomalib transforms masks of the ground truth. A pixel that resizing
    mixes with a pixel outside lies outside.

    Args:
        inside (Tensor): Shape ``(H, W)``, ``bool``, in pixels of the image file.
        pre_processor (Any): anomalib's or one like it, or ``None``.
        name (str): For messages.

    Returns:
        Tensor: Shape of the model's input, ``uint8``.

    Raises:
        ValueError: If no pixel is left inside.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return inside.to(torch.uint8)
    white = tv_tensors.Image(torch.ones(3, *inside.shape))
    masked = tv_tensors.Image(inside.expand(3, -1, -1).float())
    white, region = transform(white, tv_tensors.Mask(inside.to(torch.uint8)))
    mixed = (white - transform(masked)).abs().amax(0) > _ROUNDING
    found = region.as_subclass(Tensor).bool() & ~mixed.as_subclass(Tensor)
    if not found.any():
        size = " x ".join(map(str, found.shape))
        msg = (
            f"{name}: nothing of its white is left at the model's input of {size} pixels: it is too"
            " small, or cropped."
        )
        raise ValueError(msg)
    return found.to(torch.uint8)


def mask_at_input(inside: Tensor, pre_processor: Any) -> Tensor:  # noqa: ANN401
    """Mask of a defect in pixels of the model's input, also of one that is less than a pixel.

    Args:
        inside (Tensor): Shape ``(H, W)``, ``bool``, in pixels of the image file.
        pre_processor (Any): anomalib's or one like it, or ``None``.

    Returns:
        Tensor: Shape of the model's input, ``bool``; none inside if the defect is cropped.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return inside
    black, white, mask = (
        transform(tv_tensors.Image(values.expand(3, -1, -1))).as_subclass(Tensor)[0]
        for values in (torch.zeros(inside.shape), torch.ones(inside.shape), inside.float())
    )
    span = white - black  # zero where a pre-processor pads
    share = (mask - black) / torch.where(span == 0, torch.ones_like(span), span)
    return share > min(_COVERED, float(share.amax()) / 2) if bool((share > 0).any()) else share > 0
