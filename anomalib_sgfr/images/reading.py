"""Images as RGB between 0 and 1, at their full bit depth and upright, without PyTorch.

Pillow alone clips images of more than 8 bits a value, or drops bits, and does not turn most formats
as their EXIF orientation says.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from anomalib_sgfr.images.headers import (
    ORIENTATION,
    SIDEWAYS,
    TIFF_SIGNATURES,
    UPRIGHT,
    apply_orientation,
    has_high_bit_depth,
    orientation_of,
    read_header,
    warn_of_pages,
)

__all__ = [
    "ROUNDING",
    "RawImage",
    "image_list",
    "read_image",
    "read_raw",
    "upright_size",
    "why_unreadable",
]

ROUNDING = 1e-3  # floats may exceed 1 by this much
_CONTAINER_BITS = 16
_UINT16_MAX = 65535
_CHANNELS = (1, 3, 4)


class RawImage(NamedTuple):
    """Values as a file holds them, upright.

    Attributes:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``, of any dtype.
        white (int | None): Value of white; ``None`` if the file does not tell.
        significant_bits (int): Bits that the camera gave at least; 0 if the file does not tell.
    """

    values: NDArray[Any]
    white: int | None = None
    significant_bits: int = 0


def read_image(source: Any, bit_depth: int = 8) -> NDArray[np.float32]:  # noqa: ANN401
    """Read an image as RGB between 0 and 1.

    Images of 8 bits are as anomalib reads them, but turned as their EXIF orientation says, whatever
    the format. A value of more bits is divided by the file's value of white; if the file does not
    tell it, by the largest number of ``bit_depth`` bits. The first page or frame of a file is read;
    a warning names files that have more.

    Args:
        source (Any): A path, a Pillow image, or an array or tensor: grey, RGB or RGBA, shape ``(H,
            W)``, ``(H, W, C)`` or ``(C, H, W)``, of integers, booleans, or floats between 0 and 1.
        bit_depth (int): Bits of the camera, from 8 to 16. Defaults to 8.

    Returns:
        NDArray[np.float32]: Shape ``(H, W, 3)``, between 0 and 1.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If values are out of range, or the shape is not that of an image.
        TypeError: If ``source`` is something else.
    """
    if isinstance(source, str | Path):
        with _errors_name(source):
            header = read_header(source)
        if header.has_more_pages:
            warn_of_pages(str(source))
        if header.high_bit_depth:
            return _to_rgb(read_raw(source), bit_depth, str(source))
        return _read_8_bits(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source, bit_depth)
    return _to_rgb(RawImage(_to_array(source)), bit_depth, "the image")


def read_raw(path: Path | str) -> RawImage:
    """Read a file of more than 8 bits a value.

    Args:
        path (Path | str): The file.

    Returns:
        RawImage: Its values.

    Raises:
        OSError: If it cannot be read.
        ValueError: If its kind is not supported, or the package that reads it is not installed.
    """
    with _errors_name(path):
        try:
            with Image.open(path) as opened:
                found = _read_by_pillow(path, opened)
            if found is not None:
                return found
        except UnidentifiedImageError:
            with Path(path).open("rb") as file:
                if not file.read(4).startswith(TIFF_SIGNATURES):
                    raise
        return _read_tiff(path)


def image_list(images: Iterable[str | Path], argument: str) -> list[str]:
    """Image files that a caller passed, as text and each once.

    Args:
        images (Iterable[str | Path]): The files.
        argument (str): What the caller passed them as.

    Raises:
        TypeError: If it is one file, whose letters would be taken for files.
    """
    if isinstance(images, str | Path):
        msg = f"{argument} must be a list of image files, got '{images}'."
        raise TypeError(msg)
    return list(dict.fromkeys(map(str, images)))


def upright_size(path: Path | str) -> tuple[int, int]:
    """Height and width of an image file as :func:`read_image` returns it.

    No pixel is decoded if Pillow knows the kind of file.

    Args:
        path (Path | str): The file.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its kind is not supported, or the package that reads it is not installed.
    """
    try:
        with Image.open(path) as opened:
            height, width = opened.height, opened.width
            if isinstance(opened, TiffImagePlugin.TiffImageFile):
                # some versions of Pillow give the size before the orientation is applied
                height = opened.tag_v2[TiffImagePlugin.IMAGELENGTH]
                width = opened.tag_v2[TiffImagePlugin.IMAGEWIDTH]
            sideways = read_header(path).oriented and orientation_of(opened) in SIDEWAYS
    except UnidentifiedImageError:
        height, width = read_raw(path).values.shape[:2]
        return height, width
    return (width, height) if sideways else (height, width)


def why_unreadable(path: Path | str, error: Exception) -> str:
    """Reason that an image file cannot be read, to follow its name and "cannot be read".

    Args:
        path (Path | str): The file.
        error (Exception): Of :func:`read_image`.
    """
    return f"{type(error).__name__}: {str(error).removeprefix(f'{path} cannot be read: ')}"


@contextmanager
def _errors_name(path: Path | str) -> Iterator[None]:
    """Raise errors of image readers as ``OSError`` with the file's name."""
    try:
        yield
    except UnidentifiedImageError as error:
        msg = f"{path} cannot be read: it is not an image, or it is damaged"
        raise UnidentifiedImageError(msg) from error
    except (OSError, SyntaxError, ValueError) as error:
        if str(path) in str(error):
            raise
        msg = f"{path} cannot be read: {error}"
        raise OSError(msg) from error


def _read_by_pillow(path: Path | str, opened: Image.Image) -> RawImage | None:
    """Values of PNG, PNM and upright grey TIFF; ``None`` for any other kind."""
    if opened.format == "PPM":
        return _read_pnm(path, opened)
    grey = opened.mode.startswith("I;16")
    if opened.format == "PNG":
        values = np.array(opened) if grey else _read_colour_png(path)
        values = apply_orientation(values, orientation_of(opened))
        return RawImage(values, significant_bits=read_header(path).significant_bits)
    tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    if not (tags and grey and tags.get(ORIENTATION, UPRIGHT) == UPRIGHT):
        return None
    _require_photometric(path, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1))
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (_CONTAINER_BITS,))[0]
    return RawImage(np.array(opened), _white_of(bits))


def _white_of(bits: int) -> int | None:
    """Value of white of TIFF; 16 bits are the container's, and tell nothing about the camera."""
    return (1 << bits) - 1 if bits < _CONTAINER_BITS else None


def _read_pnm(path: Path | str, opened: Image.Image) -> RawImage:
    """Values of PGM, PPM and PFM: Pillow rescales the integers of the first two, or to 8 bits."""
    if opened.mode == "F":
        return RawImage(np.array(opened))
    decoder, _, offset, arguments = opened.tile[0]  # type: ignore[attr-defined]
    white = arguments[-1] if isinstance(arguments, tuple) else _UINT16_MAX
    content = Path(path).read_bytes()[offset:]
    shape = opened.height, opened.width, 3 if opened.mode == "RGB" else 1
    count = int(np.prod(shape))
    if decoder == "ppm_plain":
        values = np.array(re.sub(rb"#[^\r\n]*", b"", content).split()[:count], dtype=np.int64)
    else:
        values = np.frombuffer(content[: 2 * count], ">u2")
    if len(values) < count:
        msg = f"{path}: the file is cut short."
        raise OSError(msg)
    return RawImage(values.reshape(shape), None if white == _UINT16_MAX else white)


def _read_colour_png(path: Path | str) -> NDArray[Any]:
    cv2 = _import_reader("cv2", "opencv-python-headless", path)
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        msg = f"{path}: the file is damaged."
        raise OSError(msg)
    return values[..., 2::-1]  # from blue, green, red; without alpha


def _read_tiff(path: Path | str) -> RawImage:
    tifffile = _import_reader("tifffile", "tifffile", path)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            photometric, values = int(page.photometric), page.asarray()
            planes = int(page.planarconfig) != 1 and page.samplesperpixel > 1
            orientation = page.tags.get(ORIENTATION)
            bits = int(page.bitspersample) if values.dtype.kind == "u" else _CONTAINER_BITS
    except (tifffile.TiffFileError, RuntimeError, ValueError) as error:
        msg = f"{path}: {error}"
        raise OSError(msg) from error
    _require_photometric(path, photometric)
    values = np.moveaxis(values, 0, -1) if planes else values
    if values.ndim == 3 and values.shape[2] == 2:  # noqa: PLR2004  # grey and alpha
        values = values[..., 0]
    values = apply_orientation(values, orientation.value if orientation else UPRIGHT)
    return RawImage(values, _white_of(bits))


def _require_photometric(path: Path | str, photometric: int) -> None:
    if photometric not in {1, 2}:
        msg = (
            f"{path}: an image of more than 8 bits must be grey, with white above black, or RGB,"
            f" not of photometric interpretation {photometric}: save it as one of these."
        )
        raise ValueError(msg)


def _import_reader(module: str, package: str, path: Path | str) -> Any:  # noqa: ANN401
    try:
        return import_module(module)
    except ImportError as error:
        msg = (
            f"{path}: this kind of image is read with {package}: install it, or save the image in"
            " 8 bits."
        )
        raise ValueError(msg) from error


def _read_8_bits(path: Path | str) -> NDArray[np.float32]:
    # from an open file: Pillow maps TIFF files into memory by their path, and misreads turned ones
    with _errors_name(path), Path(path).open("rb") as file, Image.open(file) as opened:
        if has_high_bit_depth(opened):
            msg = (
                f"{path}: {opened.format} images are read if they have 8 bits: save it as PNG or"
                " TIFF, which keep all of its bits."
            )
            raise ValueError(msg)
        return _from_8_bits(opened)


def _from_8_bits(image: Image.Image) -> NDArray[np.float32]:
    # the multiplication gives bit for bit what torchvision gives
    values = np.asarray(image.convert("RGB"), np.float32) * np.float32(1.0 / 255.0)
    return np.ascontiguousarray(apply_orientation(values, orientation_of(image)))


def _from_pillow(image: Image.Image, bit_depth: int) -> NDArray[np.float32]:
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.filename
        and image.tag_v2.get(ORIENTATION) in SIDEWAYS
    ):  # Pillow may misread it, see _read_8_bits
        return read_image(image.filename, bit_depth)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        upright = apply_orientation(values, orientation_of(image))
        return _to_rgb(RawImage(upright), bit_depth, "the image")
    if has_high_bit_depth(image):
        msg = "Pillow keeps 8 of this file's bits: pass its path to read all of them."
        raise ValueError(msg)
    return _from_8_bits(image)


def _to_array(source: Any) -> NDArray[Any]:  # noqa: ANN401
    """Array of shape ``(H, W)`` or ``(H, W, C)`` of a user's array or tensor."""
    if hasattr(source, "detach"):  # a tensor: PyTorch is not imported here
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    values = np.asarray(source)
    if values.dtype.kind not in "biuf":
        msg = f"pass a path, a Pillow image, or an array of numbers, not {type(source).__name__}."
        raise TypeError(msg)
    if values.ndim == 4 and len(values) == 1:  # noqa: PLR2004
        values = values[0]
    if values.ndim == 2 and values.size:  # noqa: PLR2004
        return values
    if values.ndim == 3 and values.size:  # noqa: PLR2004
        last, first = values.shape[2] in _CHANNELS, values.shape[0] in _CHANNELS
        if last != first:
            return values if last else np.moveaxis(values, 0, -1)
    msg = (
        "an image has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, got"
        f" {values.shape}."
    )
    raise ValueError(msg)


def _to_rgb(raw: RawImage, bit_depth: int, name: str) -> NDArray[np.float32]:
    """RGB between 0 and 1, shape ``(H, W, 3)``; errors call the image by the given name."""
    values = raw.values
    kind = values.dtype.kind
    lowest, highest = values.min(), values.max()
    if kind == "f" and not (lowest >= 0.0 and highest <= 1.0 + ROUNDING):
        msg = (
            f"{name} holds floats from {lowest:.6g} to {highest:.6g}: pass them between 0 and 1,"
            " divided by the value of white and not normalised; or integers."
        )
        raise ValueError(msg)
    if kind in "bf":
        scaled = values.astype(np.float32)
    elif values.dtype == np.uint8:
        scaled = values.astype(np.float32) * np.float32(1.0 / 255.0)
    else:
        white = raw.white or (1 << bit_depth) - 1
        if lowest < 0:
            msg = (
                f"{name} holds negative values, down to {lowest}: pass them from 0, for black, to"
                " white."
            )
            raise ValueError(msg)
        if highest > white:
            raise ValueError(_too_large(name, int(highest), raw.white, bit_depth))
        scaled = (values / np.float64(white)).astype(np.float32)
    scaled = scaled[..., None] if scaled.ndim == 2 else scaled[..., :3]  # noqa: PLR2004  # no alpha
    return np.ascontiguousarray(scaled if scaled.shape[2] == 3 else np.repeat(scaled, 3, 2))  # noqa: PLR2004


def _too_large(name: str, highest: int, white: int | None, bit_depth: int) -> str:
    """Message about a value above white."""
    if white is not None:
        return (
            f"{name} holds values up to {highest}, and says that {white} is white: the file is"
            " damaged."
        )
    bits = highest.bit_length()
    if bits > _CONTAINER_BITS:
        return (
            f"{name} holds values up to {highest}, more than 16 bits: save it with 16, or as floats"
            " between 0 and 1."
        )
    needed = bits + bits % 2
    return (
        f"{name} holds values up to {highest}, more than the {bit_depth} bits of this model: pass"
        f" bit_depth={needed} (--model.bit_depth {needed}), and fit again if the model was fitted"
        f" to images of {bit_depth} bits."
    )
