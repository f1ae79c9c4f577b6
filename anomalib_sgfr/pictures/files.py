"""What a picture's file holds, when that is more than 8 bits a value: Pillow alone would clip or drop bits."""

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

__all__ = [
    "NOT_READ",
    "SUFFIXES",
    "Header",
    "Stored",
    "depth_of",
    "header",
    "is_deep",
    "is_misread",
    "left_out",
    "more_than_8_bits",
    "naming",
    "size_of",
    "spread",
    "stored",
    "upright",
]

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
_ON_ITS_SIDE = range(5, 9)  # rows become columns; Pillow misreads such TIFF when it maps it into memory
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


class Stored(NamedTuple):
    """Values as a file holds them.

    Attributes:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``, numbers of any kind.
        full (int | None): The value that stands for white, if the file says so.
        significant (int): Bits that the camera gave at least, by what the file says; ``0`` if it does not.
    """

    values: NDArray[Any]
    full: int | None = None
    significant: int = 0


class Header(NamedTuple):
    """What the first bytes of a file say of it; nothing of what is no picture.

    Attributes:
        is_deep (bool): Whether it holds more than 8 bits a value.
        is_turned (bool): Whether it has an EXIF orientation that Pillow does not turn it by, or not always right.
        has_pages (bool): Whether it holds several pictures, of which the first is read.
    """

    is_deep: bool = False
    is_turned: bool = False
    has_pages: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether anomalib reads the file right."""
        return not (self.is_deep or self.is_turned)


def header(path: Path | str) -> Header:
    """Look at the first bytes of a file; decodes no pixel.

    Raises:
        OSError: If there is no such file.
    """
    with Path(path).open("rb") as file:
        head = file.read(32)
        if head.startswith(_PNG):
            tagged, animated = _png_chunks(file)
            return Header(head[24:25] > b"\x08", tagged and _is_turned(path), animated)
        if head.startswith(_TIFF[:2]):
            bits, pages, orientation = _tiff_pages(file, head)
            return Header(bits > 8, orientation in _ON_ITS_SIDE, pages > 1)  # noqa: PLR2004
    if head.startswith(b"\xff\xd8\xff"):
        return Header(is_turned=_is_turned(path))
    if head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X":
        flags = head[20]
        return Header(is_turned=bool(flags & 0b1100) and _is_turned(path), has_pages=bool(flags & 0b10))
    if head.startswith(_TIFF) or re.match(rb"P[2356fF]\s", head):
        with Image.open(path) as opened:
            return Header(more_than_8_bits(opened), has_pages=getattr(opened, "n_frames", 1) > 1)
    return Header()


def size_of(path: Path | str) -> tuple[int, int]:
    """Height and width of a picture as it is read: upright. Decodes no pixel, where Pillow knows the kind of file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is of a kind that is not served, or what reads it is not installed.
    """
    is_turned = header(path).is_turned
    try:
        with Image.open(path) as opened:
            height, width = opened.height, opened.width
            if isinstance(
                opened, TiffImagePlugin.TiffImageFile
            ):  # some versions of Pillow have turned the size, some not
                height, width = (
                    opened.tag_v2[tag] for tag in (TiffImagePlugin.IMAGELENGTH, TiffImagePlugin.IMAGEWIDTH)
                )
            lies = is_turned and _orientation(opened) in _ON_ITS_SIDE
    except UnidentifiedImageError:
        height, width = stored(path).values.shape[:2]
        return height, width
    return (width, height) if lies else (height, width)


def is_deep(path: Path | str) -> bool:
    """Whether a file holds more than 8 bits a value, by its first bytes; those of no picture are not deep.

    Raises:
        OSError: If there is no such file.
    """
    return header(path).is_deep


def _is_turned(path: Path | str) -> bool:
    try:
        with Image.open(path) as opened:
            return _orientation(opened) in _ORIENTED
    except (OSError, SyntaxError, ValueError):  # a damaged file is refused by what reads it
        return False


def _orientation(image: Image.Image) -> Any:  # noqa: ANN401
    try:
        return image.getexif().get(_ORIENTATION, _UPRIGHT)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):  # damaged: it says nothing
        return _UPRIGHT


def upright(values: NDArray[Any], image: Image.Image) -> NDArray[Any]:
    """Turn pixels as the EXIF orientation of their picture says.

    Args:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``, as Pillow gives them.
        image (Image.Image): The picture, which Pillow has read: TIFF is turned by then, and says so.

    Returns:
        NDArray: Shape ``(H, W)`` or ``(W, H)``, and channels.
    """
    turn = _ORIENTED.get(_orientation(image))
    return values if turn is None else turn(values)


def is_misread(opened: Image.Image) -> bool:
    """Whether Pillow, which has opened a file by its path and not yet read it, may read it wrong."""
    is_tiff = isinstance(opened, TiffImagePlugin.TiffImageFile)
    return is_tiff and bool(opened.filename) and opened.tag_v2.get(_ORIENTATION) in _ON_ITS_SIDE  # type: ignore[attr-defined]


def _png_chunks(file: BinaryIO) -> tuple[bool, bool]:
    """Whether a PNG has a chunk that may hold an orientation, and whether it is animated."""
    tagged = animated = False
    for name, _ in _chunks(file):
        if name in {b"eXIf", b"zTXt", b"iTXt", b"tEXt"}:
            tagged |= name == b"eXIf" or file.read(30).startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"))
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
    """Bits a value of the first picture, pictures that are no smaller copy or mask of another, and the orientation.

    Pillow would take ten times as long, and knows not all.
    """
    order: Literal["little", "big"] = "little" if head.startswith(b"II") else "big"

    def numbers(content: bytes, width: int) -> list[int]:
        return [int.from_bytes(content[at : at + width], order) for at in range(0, len(content), width)]

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


def left_out(paths: Sequence[Path | str]) -> Counter[str]:
    """Pictures beside those that are read, and in folders below, whose suffix says that they are not.

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
    return Counter(path.suffix.lower() for path in found if path.suffix.lower() in NOT_READ and path.is_file())


def more_than_8_bits(opened: Image.Image) -> bool:
    """Whether the file of a picture that Pillow has opened, and not yet read, holds more than 8 bits a value."""
    if opened.mode.startswith(("I", "F")):
        return True
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return max(opened.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8  # noqa: PLR2004
    arguments = _tile(opened)[1]
    if opened.format == "PPM":
        return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255  # noqa: PLR2004
    return ";16" in str(arguments)


def _tile(opened: Image.Image) -> tuple[str, Any, int]:
    """Name of the decoder that Pillow will use, its arguments, and where the values begin."""
    tiles = getattr(opened, "tile", None)
    return (tiles[0][0], tiles[0][3], tiles[0][2]) if tiles else ("", None, 0)


def stored(path: Path | str) -> Stored:
    """Read a file that :func:`is_deep`, turned upright as Pillow turns TIFF files.

    Args:
        path (Path | str): The file.

    Returns:
        Stored: Its values, as they are.

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


def _stored(path: Path | str) -> Stored:
    try:
        with Image.open(path) as opened:
            if opened.format == "PPM":
                return _portable(path, opened)
            grey = opened.mode.startswith("I;16")
            if opened.format == "PNG":
                values = np.array(opened) if grey else _png_in_colour(path)
                return Stored(upright(values, opened), significant=_significant_bits(path))
            tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
            if tags and grey and tags.get(_ORIENTATION, _UPRIGHT) == _UPRIGHT:
                _require_white_above_black(path, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1))
                bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (_CONTAINER,))[0]
                return Stored(np.array(opened), _full(bits))
    except UnidentifiedImageError:
        with Path(path).open("rb") as file:
            if not file.read(4).startswith(_TIFF):
                raise
    return _tiff(path)


def _full(bits: int) -> int | None:
    return (1 << bits) - 1 if bits < _CONTAINER else None


def _portable(path: Path | str, opened: Image.Image) -> Stored:
    """PGM and PPM, binary or plain: Pillow scales these value by value, or to 8 bits."""
    decoder, arguments, offset = _tile(opened)
    if opened.mode == "F":
        return Stored(np.array(opened))
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
    return Stored(values.reshape(opened.height, opened.width, channels), None if top == 65535 else top)  # noqa: PLR2004


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


def _tiff(path: Path | str) -> Stored:
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
    return Stored(turn(values), _full(bits))


def _require_white_above_black(path: Path | str, photometric: int) -> None:
    if photometric not in {1, 2}:
        msg = (
            f"{path}: of pictures with more than 8 bits, grey ones with white above black and RGB are read, not those "
            f"of photometric interpretation {photometric}: save it as one of these."
        )
        raise ValueError(msg)


def _needed(module: str, package: str, path: Path | str) -> Any:  # noqa: ANN401
    try:
        return import_module(module)
    except ImportError as error:
        msg = f"{path}: this kind of picture is read with {package}: install it, or save the picture in 8 bits."
        raise ValueError(msg) from error


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Some of a sequence, evenly spread over it."""
    return list(items) if len(items) <= most else [items[step * len(items) // most] for step in range(most)]


def depth_of(paths: Sequence[Path | str]) -> int:
    """Bits a value that the camera gave: the smallest of 8, 10, 12, 14, 16 that hold the largest value of a sample.

    Args:
        paths (Sequence[Path | str]): Files, of which up to 1,000 headers and 64 deep pictures are looked at.

    Returns:
        int: Bits; 8 if no file is deep, or those that are say by themselves what is white.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is of a kind that is not served, or holds more than 16 bits.
    """
    deep = [path for path in spread(paths, _HEADERS) if is_deep(path)]
    bits = _DEPTHS[0]
    for path in spread(deep, _PICTURES):
        found = stored(path)
        if found.full is None and found.values.dtype.kind in "iu":
            bits = max(bits, found.significant, int(found.values.max()).bit_length())
    if bits > _CONTAINER:
        msg = f"pictures hold values of {bits} bits, more than 16: save them with 16, or as floats between 0 and 1."
        raise ValueError(msg)
    return next(depth for depth in _DEPTHS if depth >= bits)
