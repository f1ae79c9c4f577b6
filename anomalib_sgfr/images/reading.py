"""What a picture's file holds, when that is more than 8 bits a value: Pillow alone would clip or
drop bits.

A path, a Pillow picture or an array, read as RGB between 0 and 1 at its true range, or refused by
name.
"""

import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

__all__ = [
    "NOT_READ",
    "ROUNDING",
    "SUFFIXES",
    "FileHeader",
    "RawImage",
    "apply_orientation",
    "count_unread",
    "evenly_spaced",
    "infer_bit_depth",
    "is_deep",
    "misread_by_pillow",
    "more_than_8_bits",
    "naming",
    "read_header",
    "read_image",
    "read_raw",
    "require_bit_depth",
    "upright_size",
    "warn_of_pages",
]

logger = logging.getLogger(__name__)

# Of pictures in folders: those that are read, as anomalib does, and others.
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
NOT_READ = frozenset(
    {
        ".apng",
        ".avif",
        ".dib",
        ".dng",
        ".exr",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jxl",
        ".pbm",
        ".pcx",
    }
    | {".pfm", ".pnm", ".raw", ".tga"}
)

_DEPTHS = (8, 10, 12, 14, 16)
_HEADERS, _PICTURES = 1000, 64  # looked at, at most, to tell the depth of a set
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = ExifTags.Base.Orientation
_UPRIGHT = 1
_ON_ITS_SIDE = range(
    5, 9
)  # rows become columns; Pillow misreads such TIFF when it maps it into memory
_KIND_OF_PAGE = 254  # tag of TIFF: NewSubfileType
_SMALLER_OR_MASK = 0b101  # bits of it: a page that is a thumbnail, or a mask, of another
_MOST_PAGES = 1000
_CONTAINER = 16  # bits; says nothing of the camera
_ORIENTED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


class RawImage(NamedTuple):
    """Values as a file holds them.

    Attributes:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``, numbers of any kind.
        full (int | None): The value that stands for white, if the file says so.
        significant (int): Bits that the camera gave at least, by what the file says; ``0`` if it
            does not.
    """

    values: NDArray[Any]
    full: int | None = None
    significant: int = 0


class FileHeader(NamedTuple):
    """What the first bytes of a file say of it; nothing of what is no picture.

    Attributes:
        is_deep (bool): Whether it holds more than 8 bits a value.
        is_turned (bool): Whether it has an EXIF orientation that Pillow does not turn it by, or not
            always right.
        has_pages (bool): Whether it holds several pictures, of which the first is read.
    """

    is_deep: bool = False
    is_turned: bool = False
    has_pages: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether anomalib reads the file right."""
        return not (self.is_deep or self.is_turned)


def read_header(path: Path | str) -> FileHeader:
    """Look at the first bytes of a file; decodes no pixel.

    Raises:
        OSError: If there is no such file.
    """
    with Path(path).open("rb") as file:
        head = file.read(32)
        if head.startswith(_PNG):
            tagged, animated = _png_chunks(file)
            return FileHeader(head[24:25] > b"\x08", tagged and _is_turned(path), animated)
        if head.startswith(_TIFF[:2]):
            bits, pages, orientation = _tiff_pages(file, head)
            return FileHeader(bits > 8, orientation in _ON_ITS_SIDE, pages > 1)  # noqa: PLR2004
    if head.startswith(b"\xff\xd8\xff"):
        return FileHeader(is_turned=_is_turned(path))
    if head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X":
        flags = head[20]
        return FileHeader(
            is_turned=bool(flags & 0b1100) and _is_turned(path), has_pages=bool(flags & 0b10)
        )
    if head.startswith(_TIFF) or re.match(rb"P[2356fF]\s", head):
        with Image.open(path) as opened:
            return FileHeader(
                more_than_8_bits(opened), has_pages=getattr(opened, "n_frames", 1) > 1
            )
    return FileHeader()


def upright_size(path: Path | str) -> tuple[int, int]:
    """Height and width of a picture as it is read: upright. Decodes no pixel, where Pillow knows
    the kind of file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is of a kind that is not served, or what reads it is not installed.
    """
    is_turned = read_header(path).is_turned
    try:
        with Image.open(path) as opened:
            height, width = opened.height, opened.width
            if isinstance(
                opened, TiffImagePlugin.TiffImageFile
            ):  # some versions of Pillow have turned the size, some not
                height, width = (
                    opened.tag_v2[tag]
                    for tag in (TiffImagePlugin.IMAGELENGTH, TiffImagePlugin.IMAGEWIDTH)
                )
            lies = is_turned and _orientation(opened) in _ON_ITS_SIDE
    except UnidentifiedImageError:
        height, width = read_raw(path).values.shape[:2]
        return height, width
    return (width, height) if lies else (height, width)


def is_deep(path: Path | str) -> bool:
    """Whether a file holds more than 8 bits a value, by its first bytes; those of no picture are
    not deep.

    Raises:
        OSError: If there is no such file.
    """
    return read_header(path).is_deep


def _is_turned(path: Path | str) -> bool:
    try:
        with Image.open(path) as opened:
            return _orientation(opened) in _ORIENTED
    except (OSError, SyntaxError, ValueError):  # a damaged file is refused by what reads it
        return False


def _orientation(image: Image.Image) -> Any:  # noqa: ANN401
    try:
        return image.getexif().get(_ORIENTATION, _UPRIGHT)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        struct.error,
    ):  # damaged: it says nothing
        return _UPRIGHT


def apply_orientation(values: NDArray[Any], image: Image.Image) -> NDArray[Any]:
    """Turn pixels as the EXIF orientation of their picture says.

    Args:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``, as Pillow gives them.
        image (Image.Image): The picture, which Pillow has read: TIFF is turned by then, and says
            so.

    Returns:
        NDArray: Shape ``(H, W)`` or ``(W, H)``, and channels.
    """
    turn = _ORIENTED.get(_orientation(image))
    return values if turn is None else turn(values)


def misread_by_pillow(opened: Image.Image) -> bool:
    """Whether Pillow, which has opened a file by its path and not yet read it, may read it wrong."""
    is_tiff = isinstance(opened, TiffImagePlugin.TiffImageFile)
    return is_tiff and bool(opened.filename) and opened.tag_v2.get(_ORIENTATION) in _ON_ITS_SIDE  # type: ignore[attr-defined]


def _png_chunks(file: BinaryIO) -> tuple[bool, bool]:
    """Whether a PNG has a chunk that may hold an orientation, and whether it is animated."""
    tagged = animated = False
    for name, _ in _chunks(file):
        if name in {b"eXIf", b"zTXt", b"iTXt", b"tEXt"}:
            tagged |= name == b"eXIf" or file.read(30).startswith(
                (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
            )
        animated |= name == b"acTL"
    return tagged, animated


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Name and length of each chunk of a PNG, with the file where its content begins."""
    place = len(_PNG)
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:  # noqa: PLR2004
            return
        length = int.from_bytes(head[:4], "big")
        yield head[4:], length
        place += length + 12


def _tiff_pages(file: BinaryIO, head: bytes) -> tuple[int, int, int]:
    """Bits a value of the first picture, pictures that are no smaller copy or mask of another, and
    the orientation.

    Pillow would take ten times as long, and knows not all.
    """
    order: Literal["little", "big"] = "little" if head.startswith(b"II") else "big"

    def numbers(content: bytes, width: int) -> list[int]:
        return [
            int.from_bytes(content[at : at + width], order) for at in range(0, len(content), width)
        ]

    bits, pages, orientation, seen = 0, 0, _UPRIGHT, set[int]()
    (place,) = numbers(head[4:8], 4) or [0]
    while place and place not in seen and len(seen) < _MOST_PAGES:
        seen.add(place)
        file.seek(place)
        content = file.read(2)
        if len(content) < 2:  # noqa: PLR2004  # cut short
            break
        entries = file.read(12 * numbers(content, 2)[0])
        following = numbers(file.read(4), 4)
        place = following[0] if following else 0
        kind, its_bits = 0, 1
        for at in range(0, len(entries), 12):
            tag, _ = numbers(entries[at : at + 4], 2)
            if tag == _KIND_OF_PAGE:
                kind = numbers(entries[at + 8 : at + 12], 4)[0]
            if tag == _ORIENTATION and not bits:
                orientation = numbers(entries[at + 8 : at + 10], 2)[0]
            if tag == TiffImagePlugin.BITSPERSAMPLE and not bits:
                count, where = numbers(entries[at + 4 : at + 12], 4)
                if count <= 2:  # noqa: PLR2004
                    its_bits = max(numbers(entries[at + 8 : at + 12], 2)[:count])
                else:
                    file.seek(where)
                    its_bits = max(numbers(file.read(2 * count), 2), default=1)
        bits = bits or its_bits
        pages += not kind & _SMALLER_OR_MASK
    return bits, pages, orientation


def count_unread(paths: Sequence[Path | str]) -> Counter[str]:
    """Pictures beside those that are read, and in folders below, whose suffix says that they are
    not.

    Args:
        paths (Sequence[Path | str]): Those that are read.

    Returns:
        Counter[str]: How many there are of each suffix.
    """
    if not paths:
        return Counter()
    folder = Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))
    # a single one may be the one file that was asked for, of a folder of many kinds
    found = folder.iterdir() if len(paths) == 1 else folder.rglob("*")
    return Counter(
        path.suffix.lower() for path in found if path.suffix.lower() in NOT_READ and path.is_file()
    )


def more_than_8_bits(opened: Image.Image) -> bool:
    """Whether the file of a picture that Pillow has opened, and not yet read, holds more than 8
    bits a value.
    """
    if opened.mode.startswith(("I", "F")):
        return True
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return max(opened.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8  # noqa: PLR2004
    arguments = _tile(opened)[1]
    if opened.format == "PPM":
        return (
            isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255  # noqa: PLR2004
        )
    return ";16" in str(arguments)


def _tile(opened: Image.Image) -> tuple[str, Any, int]:
    """Name of the decoder that Pillow will use, its arguments, and where the values begin."""
    tiles = getattr(opened, "tile", None)
    return (tiles[0][0], tiles[0][3], tiles[0][2]) if tiles else ("", None, 0)


def read_raw(path: Path | str) -> RawImage:
    """Read a file that :func:`is_deep`, turned upright as Pillow turns TIFF files.

    Args:
        path (Path | str): The file.

    Returns:
        RawImage: Its values, as they are.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is of a kind that is not served, or what reads it is not installed.
    """
    with naming(path):
        return _stored(path)


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Have what readers of pictures raise name the file.

    Raises:
        OSError: In place of what they raise without it.
    """
    try:
        yield
    except (OSError, SyntaxError) as error:
        if str(path) in str(error):
            raise
        msg = f"{path} cannot be read: {error}"
        raise OSError(msg) from error


def _stored(path: Path | str) -> RawImage:
    try:
        with Image.open(path) as opened:
            if opened.format == "PPM":
                return _portable(path, opened)
            grey = opened.mode.startswith("I;16")
            if opened.format == "PNG":
                values = np.array(opened) if grey else _png_in_colour(path)
                return RawImage(
                    apply_orientation(values, opened), significant=_significant_bits(path)
                )
            tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
            if tags and grey and tags.get(_ORIENTATION, _UPRIGHT) == _UPRIGHT:
                _require_white_above_black(
                    path, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)
                )
                bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (_CONTAINER,))[0]
                return RawImage(np.array(opened), _full(bits))
    except UnidentifiedImageError:
        with Path(path).open("rb") as file:
            if not file.read(4).startswith(_TIFF):
                raise
    return _tiff(path)


def _full(bits: int) -> int | None:
    return (1 << bits) - 1 if bits < _CONTAINER else None


def _portable(path: Path | str, opened: Image.Image) -> RawImage:
    """PGM and PPM, binary or plain: Pillow scales these value by value, or to 8 bits."""
    decoder, arguments, offset = _tile(opened)
    if opened.mode == "F":
        return RawImage(np.array(opened))
    top = arguments[-1] if isinstance(arguments, tuple) else 65535
    content = Path(path).read_bytes()[offset:]
    channels = 3 if opened.mode == "RGB" else 1
    count = opened.width * opened.height * channels
    if decoder == "ppm_plain":
        values = np.array(re.sub(rb"#[^\r\n]*", b"", content).split()[:count], dtype=np.int64)
    else:
        values = np.frombuffer(content[: 2 * count], ">u2")
    if len(values) < count:
        msg = f"{path}: the file is cut short."
        raise OSError(msg)
    return RawImage(
        values.reshape(opened.height, opened.width, channels),
        None if top == 65535 else top,  # noqa: PLR2004
    )


def _png_in_colour(path: Path | str) -> NDArray[Any]:
    cv2 = _needed("cv2", "opencv-python-headless", path)
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        msg = f"{path}: the file is damaged."
        raise OSError(msg)
    return values[..., 2::-1]  # from blue, green, red; without alpha


def _significant_bits(path: Path | str) -> int:
    """Of a PNG, by its chunk ``sBIT``, which comes before the values."""
    with Path(path).open("rb") as file:
        for name, length in _chunks(file):
            if name == b"sBIT":
                return max(file.read(length), default=0)
            if name == b"IDAT":
                break
    return 0


def _tiff(path: Path | str) -> RawImage:
    tifffile = _needed("tifffile", "tifffile", path)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            photometric, values = int(page.photometric), page.asarray()
            planes = int(page.planarconfig) != 1 and page.samplesperpixel > 1
            orientation = page.tags.get(_ORIENTATION)
            bits = int(page.bitspersample) if values.dtype.kind == "u" else _CONTAINER
    except (tifffile.TiffFileError, RuntimeError, ValueError) as error:
        msg = f"{path}: {error}"
        raise OSError(msg) from error
    _require_white_above_black(path, photometric)
    values = np.moveaxis(values, 0, -1) if planes else values
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 2 else values  # noqa: PLR2004  # alpha
    turn = _ORIENTED.get(orientation.value if orientation else _UPRIGHT, np.asarray)
    return RawImage(turn(values), _full(bits))


def _require_white_above_black(path: Path | str, photometric: int) -> None:
    if photometric not in {1, 2}:
        msg = (
            f"{path}: of pictures with more than 8 bits, grey ones with white above black and RGB"
            f" are read, not those of photometric interpretation {photometric}: save it as one of"
            " these."
        )
        raise ValueError(msg)


def _needed(module: str, package: str, path: Path | str) -> Any:  # noqa: ANN401
    try:
        return import_module(module)
    except ImportError as error:
        msg = (
            f"{path}: this kind of picture is read with {package}: install it, or save the picture"
            " in 8 bits."
        )
        raise ValueError(msg) from error


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """Some of a sequence, evenly spread over it."""
    return (
        list(items)
        if len(items) <= most
        else [items[step * len(items) // most] for step in range(most)]
    )


def infer_bit_depth(paths: Sequence[Path | str]) -> int:
    """Bits a value that the camera gave: the smallest of 8, 10, 12, 14, 16 that hold the largest
    value of a sample.

    Args:
        paths (Sequence[Path | str]): Files, of which up to 1,000 headers and 64 deep pictures are
            looked at.

    Returns:
        int: Bits; 8 if no file is deep, or those that are say by themselves what is white.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is of a kind that is not served, or holds more than 16 bits.
    """
    deep = [path for path in evenly_spaced(paths, _HEADERS) if is_deep(path)]
    bits = _DEPTHS[0]
    for path in evenly_spaced(deep, _PICTURES):
        found = read_raw(path)
        if found.full is None and found.values.dtype.kind in "iu":
            bits = max(bits, found.significant, int(found.values.max()).bit_length())
    if bits > _CONTAINER:
        msg = (
            f"pictures hold values of {bits} bits, more than 16: save them with 16, or as floats"
            " between 0 and 1."
        )
        raise ValueError(msg)
    return next(depth for depth in _DEPTHS if depth >= bits)


_CHANNELS = (1, 3, 4)
ROUNDING = 1e-3  # what rounding may have added to 1


def require_bit_depth(bit_depth: int | None) -> None:
    """Refuse what is no depth.

    Raises:
        ValueError: If ``bit_depth`` is neither ``None`` nor between 8 and 16.
    """
    if bit_depth is not None and not (isinstance(bit_depth, int) and 8 <= bit_depth <= 16):  # noqa: PLR2004
        msg = f"bit_depth must be an integer from 8 to 16, got {bit_depth!r}."
        raise ValueError(msg)


def read_image(source: Any, bit_depth: int = 8) -> NDArray[np.float32]:  # noqa: ANN401
    """Read a picture.

    Those of 8 bits come out as anomalib reads them, but upright: turned as their EXIF orientation
    says, whatever the format. A value of more bits is divided by what the file says is white; if it
    does not say, by the largest number of ``bit_depth`` bits. Of a file of several pages or frames
    the first is read, and a warning names the file.

    Args:
        source (Any): A path, a Pillow picture, or an array or tensor: grey, RGB or RGBA, ``(H,
            W)``, ``(H, W, C)`` or ``(C, H, W)``, of integers, booleans, or floats between 0 and 1.
        bit_depth (int): Bits that the camera gives, from 8 to 16.

    Returns:
        NDArray[np.float32]: Shape ``(H, W, 3)``, between 0 and 1.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If values are out of range, or the shape is not a picture's.
        TypeError: If it is something else.
    """
    if isinstance(source, str | Path):
        found = read_header(source)
        if found.has_pages:
            warn_of_pages(str(source))
        if found.is_deep:
            return _unit(read_raw(source), bit_depth, str(source))
        return _eight_bits_of(source)
    if isinstance(source, Image.Image):
        return _pillow(source, bit_depth)
    values = _array(source)
    return _unit(RawImage(_channels_last(values)), bit_depth, "the picture")


@lru_cache(1024)  # once a file
def warn_of_pages(name: str) -> None:
    """Warn that a file holds more pictures than the one that is read."""
    logger.warning(
        "%s holds several pages or frames: the first is read, the others are not inspected.", name
    )


def _eight_bits_of(path: str | Path) -> NDArray[np.float32]:
    # from an open file, since Pillow misreads some turned TIFF files that it maps into memory by
    # their path
    with naming(path), Path(path).open("rb") as file, Image.open(file) as opened:
        if more_than_8_bits(opened):
            msg = (
                f"{path}: of {opened.format} pictures those of 8 bits are read: save it as PNG or"
                " TIFF, which keep all of its bits."
            )
            raise ValueError(msg)
        return _eight_bits(opened)


def _eight_bits(image: Image.Image) -> NDArray[np.float32]:
    # by multiplication, as torchvision does, to the last bit
    values = np.asarray(image.convert("RGB"), np.float32) * np.float32(1.0 / 255.0)
    return np.ascontiguousarray(apply_orientation(values, image))


def _pillow(image: Any, bit_depth: int) -> NDArray[np.float32]:  # noqa: ANN401
    if misread_by_pillow(image):
        return read_image(image.filename, bit_depth)
    if image.mode.startswith(("I", "F")):
        return _unit(
            RawImage(apply_orientation(np.asarray(image), image)), bit_depth, "the picture"
        )
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
    msg = (
        "one picture has shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels C, got"
        f" {values.shape}."
    )
    raise ValueError(msg)


def _unit(found: RawImage, bit_depth: int, name: str) -> NDArray[np.float32]:
    """RGB between 0 and 1."""
    values = found.values
    kind, width = values.dtype.kind, values.dtype.itemsize
    lowest, highest = values.min(), values.max()
    if kind == "b":
        unit = values.astype(np.float32)
    elif kind == "f":
        if not (lowest >= 0.0 and highest <= 1.0 + ROUNDING):
            msg = (
                f"{name} holds floats from {lowest:.6g} to {highest:.6g}: pass them between 0 and"
                " 1, divided by the value of white and not normalised; or integers."
            )
            raise ValueError(msg)
        unit = values.astype(np.float32)
    elif kind == "u" and width == 1:
        unit = values.astype(np.float32) * np.float32(1.0 / 255.0)
    else:
        full = found.full or (1 << bit_depth) - 1
        if lowest < 0:
            msg = (
                f"{name} holds negative values, down to {lowest}: pass them from 0, for black, to"
                " white."
            )
            raise ValueError(msg)
        if highest > full:
            raise ValueError(_too_large(name, int(highest), found.full, bit_depth))
        unit = (values / np.float64(full)).astype(np.float32)
    # without alpha, as Pillow does
    unit = unit[..., None] if unit.ndim == 2 else unit[..., :3]  # noqa: PLR2004
    return np.ascontiguousarray(unit if unit.shape[2] == 3 else np.repeat(unit, 3, 2))  # noqa: PLR2004


def _too_large(name: str, highest: int, full: int | None, bit_depth: int) -> str:
    if full is not None:
        return (
            f"{name} holds values up to {highest}, and says that {full} is white: the file is"
            " damaged."
        )
    bits = highest.bit_length()
    if bits > 16:  # noqa: PLR2004
        return (
            f"{name} holds values up to {highest}, more than 16 bits: save it with 16, or as floats"
            " between 0 and 1."
        )
    needed = bits + bits % 2
    return (
        f"{name} holds values up to {highest}, more than the {bit_depth} bits that are read here:"
        f" pass bit_depth={needed} (--model.bit_depth {needed}), and fit again if the model learnt"
        f" pictures of {bit_depth} bits as such."
    )
