"""A path, a Pillow picture or an array, read as RGB between 0 and 1 at its true range, or refused by name."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.pictures.files import Stored, header, is_misread, more_than_8_bits, naming, stored, upright

__all__ = ["ROUNDING", "picture", "require_depth", "tell_of_pages"]

logger = logging.getLogger(__name__)

_CHANNELS = (1, 3, 4)
ROUNDING = 1e-3  # what rounding may have added to 1


def require_depth(bit_depth: int | None) -> None:
    """Refuse what is no depth.

    Raises:
        ValueError: If ``bit_depth`` is neither ``None`` nor between 8 and 16.
    """
    if bit_depth is not None and not (isinstance(bit_depth, int) and 8 <= bit_depth <= 16):  # noqa: PLR2004
        msg = f"bit_depth must be an integer from 8 to 16, got {bit_depth!r}."
        raise ValueError(msg)


def picture(source: Any, bit_depth: int = 8) -> NDArray[np.float32]:  # noqa: ANN401
    """Read a picture.

    Those of 8 bits come out as anomalib reads them, but upright: turned as their EXIF orientation says, whatever the
    format. A value of more bits is divided by what the file says is white; if it does not say, by the largest number of
    ``bit_depth`` bits. Of a file of several pages or frames the first is read, and a warning names the file.

    Args:
        source (Any): A path, a Pillow picture, or an array or tensor: grey, RGB or RGBA, ``(H, W)``, ``(H, W, C)`` or
            ``(C, H, W)``, of integers, booleans, or floats between 0 and 1.
        bit_depth (int): Bits that the camera gives, from 8 to 16.

    Returns:
        NDArray[np.float32]: Shape ``(H, W, 3)``, between 0 and 1.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If values are out of range, or the shape is not a picture's.
        TypeError: If it is something else.
    """
    if isinstance(source, str | Path):
        found = header(source)
        if found.has_pages:
            tell_of_pages(str(source))
        if found.is_deep:
            return _unit(stored(source), bit_depth, str(source))
        return _eight_bits_of(source)
    if isinstance(source, Image.Image):
        return _pillow(source, bit_depth)
    values = _array(source)
    return _unit(Stored(_channels_last(values)), bit_depth, "the picture")


@lru_cache(1024)  # once a file
def tell_of_pages(name: str) -> None:
    """Warn that a file holds more pictures than the one that is read."""
    logger.warning("%s holds several pages or frames: the first is read, the others are not inspected.", name)


def _eight_bits_of(path: str | Path) -> NDArray[np.float32]:
    # from an open file, since Pillow misreads some turned TIFF files that it maps into memory by their path
    with naming(path), Path(path).open("rb") as file, Image.open(file) as opened:
        if more_than_8_bits(opened):
            msg = (
                f"{path}: of {opened.format} pictures those of 8 bits are read: save it as PNG or TIFF, which keep all "
                "of its bits."
            )
            raise ValueError(msg)
        return _eight_bits(opened)


def _eight_bits(image: Image.Image) -> NDArray[np.float32]:
    # by multiplication, as torchvision does, to the last bit
    values = np.asarray(image.convert("RGB"), np.float32) * np.float32(1.0 / 255.0)
    return np.ascontiguousarray(upright(values, image))


def _pillow(image: Any, bit_depth: int) -> NDArray[np.float32]:  # noqa: ANN401
    if is_misread(image):
        return picture(image.filename, bit_depth)
    if image.mode.startswith(("I", "F")):
        return _unit(Stored(upright(np.asarray(image), image)), bit_depth, "the picture")
    if more_than_8_bits(image):
        msg = "Pillow keeps 8 of this file's bits: pass its path, and it is read whole."
        raise ValueError(msg)
    return _eight_bits(image)


def _array(source: Any) -> NDArray[Any]:  # noqa: ANN401
    if hasattr(source, "detach"):  # a tensor of PyTorch, which is not imported here
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    values = np.asarray(source)
    if values.dtype.kind not in "biuf":
        msg = f"pass a path, a Pillow picture, or an array of numbers, not {type(source).__name__}."
        raise TypeError(msg)
    return values[0] if values.ndim == 4 and len(values) == 1 else values  # noqa: PLR2004


def _channels_last(values: NDArray[Any]) -> NDArray[Any]:
    """Shape ``(H, W)`` or ``(H, W, C)`` of what may be ``(C, H, W)``."""
    if values.ndim == 2 and values.size:  # noqa: PLR2004
        return values
    if values.ndim == 3 and values.size:  # noqa: PLR2004
        last, first = values.shape[2] in _CHANNELS, values.shape[0] in _CHANNELS
        if last != first:
            return values if last else np.moveaxis(values, 0, -1)
    msg = f"one picture has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, got {values.shape}."
    raise ValueError(msg)


def _unit(found: Stored, bit_depth: int, name: str) -> NDArray[np.float32]:
    """RGB between 0 and 1."""
    values = found.values
    kind, width = values.dtype.kind, values.dtype.itemsize
    lowest, highest = values.min(), values.max()
    if kind == "b":
        unit = values.astype(np.float32)
    elif kind == "f":
        if not (lowest >= 0.0 and highest <= 1.0 + ROUNDING):
            msg = (
                f"{name} holds floats from {lowest:.6g} to {highest:.6g}: pass them between 0 and 1, divided by the "
                "value of white and not normalised; or integers."
            )
            raise ValueError(msg)
        unit = values.astype(np.float32)
    elif kind == "u" and width == 1:
        unit = values.astype(np.float32) * np.float32(1.0 / 255.0)
    else:
        full = found.full or (1 << bit_depth) - 1
        if lowest < 0:
            msg = f"{name} holds negative values, down to {lowest}: pass them from 0, for black, to white."
            raise ValueError(msg)
        if highest > full:
            raise ValueError(_too_large(name, int(highest), found.full, bit_depth))
        unit = (values / np.float64(full)).astype(np.float32)
    unit = unit[..., None] if unit.ndim == 2 else unit[..., :3]  # noqa: PLR2004  # without alpha, as Pillow does
    return np.ascontiguousarray(unit if unit.shape[2] == 3 else np.repeat(unit, 3, 2))  # noqa: PLR2004


def _too_large(name: str, highest: int, full: int | None, bit_depth: int) -> str:
    if full is not None:
        return f"{name} holds values up to {highest}, and says that {full} is white: the file is damaged."
    bits = highest.bit_length()
    if bits > 16:  # noqa: PLR2004
        return f"{name} holds values up to {highest}, more than 16 bits: save it with 16, or as floats between 0 and 1."
    needed = bits + bits % 2
    return (
        f"{name} holds values up to {highest}, more than the {bit_depth} bits that are read here: "
        f"pass bit_depth={needed} (--model.bit_depth {needed}), and fit again if the model learnt pictures of "
        f"{bit_depth} bits as such."
    )
