"""A region of interest: a picture of where to inspect, and what of it a model's input shows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

__all__ = ["read_roi", "roi_at_input"]

_EQUAL = 1e-5  # of two transformed pixels that differ by rounding alone


def read_roi(path: str | Path) -> Tensor:
    """Read a mask picture: a pixel is inside if it is brighter than half of white.

    Args:
        path (str | Path): The file.

    Returns:
        Tensor: Shape ``(H, W)``, ``bool``.

    Raises:
        ValueError: If it cannot be read, or nothing of it is inside.
    """
    try:
        with Image.open(path) as picture:
            deep = picture.mode.startswith("I")
            pixels = np.asarray(picture if deep else picture.convert("L"))
    except (OSError, ValueError, SyntaxError) as error:  # as Pillow's readers say it
        reason = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        msg = (
            f"roi '{path}' cannot be read: {reason}. It must be a picture, white where to inspect."
        )
        raise ValueError(msg) from error
    white = 65535 if deep else 255
    inside = torch.from_numpy(2 * pixels.astype(np.int64) > white)
    if not inside.any():
        msg = (
            f"roi '{path}' leaves nothing to inspect: its brightest pixel is {int(pixels.max())}, "
            f"inside is what is brighter than {white // 2}, and white is {white}."
        )
        raise ValueError(msg)
    return inside


def roi_at_input(inside: Tensor, pre_processor: Any, name: str = "roi") -> Tensor:  # noqa: ANN401
    """Pixels of a model's input that show nothing but what lies inside.

    The mask goes through the transform of the pictures, as their ground truth does. Resizing mixes
    neighbours: a pixel that a pixel outside contributes to lies outside.

    Args:
        inside (Tensor): Shape ``(H, W)``, ``bool``, of the pictures' own pixels.
        pre_processor (Any): anomalib's or one like it, or ``None``.
        name (str): For messages.

    Returns:
        Tensor: Shape of the model's input, ``uint8``.

    Raises:
        ValueError: If nothing is left inside.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return inside.to(torch.uint8)
    white = tv_tensors.Image(torch.ones(3, *inside.shape))
    marked = tv_tensors.Image(inside.expand(3, -1, -1).float())
    shown, region = transform(white, tv_tensors.Mask(inside.to(torch.uint8)))
    mixed = (shown - transform(marked)).abs().amax(0) > _EQUAL
    found = region.as_subclass(Tensor).bool() & ~mixed.as_subclass(Tensor)
    if not found.any():
        size = " x ".join(map(str, found.shape))
        msg = (
            f"{name}: nothing of its white is left at the model's input of {size} pixels: it is too"
            " small, or cropped."
        )
        raise ValueError(msg)
    return found.to(torch.uint8)
