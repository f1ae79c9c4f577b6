"""Headers of image files: bit depth, EXIF orientation and number of pages; decodes no pixel."""

import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

__all__ = [
    "NOT_READ",
    "ORIENTATION",
    "SIDEWAYS",
    "SUFFIXES",
    "TIFF_SIGNATURES",
    "UPRIGHT",
    "FileHeader",
    "apply_orientation",
    "count_unread",
    "has_high_bit_depth",
    "orientation_of",
    "read_header",
    "warn_of_pages",
]

logger = logging.getLogger(__name__)

# Image files of a folder that are read, as anomalib does, and that are not.
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_OTHERS = "apng avif dib dng exr gif heic heif jfif jp2 jpe jxl pbm pcx pfm pnm raw tga"
NOT_READ = frozenset(f".{name}" for name in _OTHERS.split())

ORIENTATION = ExifTags.Base.Orientation
UPRIGHT = 1
SIDEWAYS = range(5, 9)  # orientations that exchange rows and columns
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEW_SUBFILE_TYPE = 254  # tag of TIFF
_THUMBNAIL_OR_MASK = 0b101  # bits of its value: the page belongs to another one
_MAX_PAGES = 1000
_LEVELS = 2  # from a folder of images up to the folder of its data set


class FileHeader(NamedTuple):
    """What the header of a file says about its image; all ``False`` if it is not an image.

    Attributes:
        high_bit_depth (bool): Whether it holds more than 8 bits a value.
        oriented (bool): Whether it has an EXIF orientation that anomalib's reader ignores or, for
            TIFF, does not always apply correctly.
        has_more_pages (bool): Whether it holds several images, of which the first is read.
        significant_bits (int): Bits of the camera, from a PNG's chunk ``sBIT``; 0 if unknown.
    """

    high_bit_depth: bool = False
    oriented: bool = False
    has_more_pages: bool = False
    significant_bits: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether anomalib reads the file correctly."""
        return not (self.high_bit_depth or self.oriented)


def read_header(path: Path | str) -> FileHeader:
    """Read the header of a file.

    Args:
        path (Path | str): The file.

    Returns:
        FileHeader: What it says.

    Raises:
        OSError: If there is no such file.
    """
    with Path(path).open("rb") as file:
        head = file.read(32)
        if head.startswith(_PNG_SIGNATURE):
            tagged, animated, significant_bits = _scan_png(file)
            oriented = tagged and _is_oriented(path)
            return FileHeader(head[24:25] > b"\x08", oriented, animated, significant_bits)
        if head.startswith(TIFF_SIGNATURES[:2]):
            bits, pages, orientation = _scan_tiff(file, head)
            return FileHeader(bits > 8, orientation in SIDEWAYS, pages > 1)  # noqa: PLR2004
    if head.startswith(b"\xff\xd8\xff"):  # JPEG
        return FileHeader(oriented=_is_oriented(path))
    if head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X":
        flags = head[20]
        oriented = bool(flags & 0b1100) and _is_oriented(path)
        return FileHeader(oriented=oriented, has_more_pages=bool(flags & 0b10))
    if head.startswith(TIFF_SIGNATURES) or re.match(rb"P[2356fF]\s", head):
        with Image.open(path) as opened:
            return FileHeader(
                has_high_bit_depth(opened), has_more_pages=getattr(opened, "n_frames", 1) > 1
            )
    return FileHeader()


def _scan_png(file: BinaryIO) -> tuple[bool, bool, int]:
    """Whether a PNG may have an orientation, whether it is animated, and its significant bits."""
    tagged, animated, significant_bits = False, False, 0
    for name, length in _png_chunks(file):
        if name == b"sBIT":
            significant_bits = max(file.read(length), default=0)
        elif name in {b"zTXt", b"iTXt", b"tEXt"}:
            tagged |= file.read(30).startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"))
        tagged |= name == b"eXIf"
        animated |= name == b"acTL"
    return tagged, animated, significant_bits


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Name and length of each chunk, with the file positioned at its content."""
    offset = len(_PNG_SIGNATURE)
    while True:
        file.seek(offset)
        head = file.read(8)
        if len(head) < 8:  # noqa: PLR2004
            return
        length = int.from_bytes(head[:4], "big")
        yield head[4:], length
        offset += length + 12


def _scan_tiff(file: BinaryIO, head: bytes) -> tuple[int, int, int]:
    """Bits a value of the first page, number of pages without thumbnails and masks, orientation.

    Pillow takes ten times as long, and cannot open every TIFF.
    """
    order: Literal["little", "big"] = "little" if head.startswith(b"II") else "big"
    bits, pages, orientation, seen = 0, 0, UPRIGHT, set[int]()
    offset = int.from_bytes(head[4:8], order)
    while offset and offset not in seen and len(seen) < _MAX_PAGES:
        seen.add(offset)
        file.seek(offset)
        count = file.read(2)
        if len(count) < 2:  # noqa: PLR2004  # the file is cut short
            break
        entries = file.read(12 * int.from_bytes(count, order))
        offset = int.from_bytes(file.read(4), order)
        # tag: number of values (4 bytes), and the values or where they lie (4 bytes)
        tags = {
            int.from_bytes(entries[at : at + 2], order): entries[at + 4 : at + 12]
            for at in range(0, len(entries) - 11, 12)
        }
        kind = int.from_bytes(tags.get(_NEW_SUBFILE_TYPE, b"")[4:8], order)
        pages += not kind & _THUMBNAIL_OR_MASK
        if len(seen) > 1:
            continue
        if ORIENTATION in tags:
            orientation = int.from_bytes(tags[ORIENTATION][4:6], order)
        bits = 1
        if entry := tags.get(TiffImagePlugin.BITSPERSAMPLE):
            samples = int.from_bytes(entry[:4], order)
            values = entry[4:8]
            if samples > 2:  # noqa: PLR2004
                file.seek(int.from_bytes(values, order))
                values = file.read(2 * samples)
            found = [int.from_bytes(values[i : i + 2], order) for i in range(0, len(values), 2)]
            bits = max(found[:samples], default=1)
    return bits, pages, orientation


def has_high_bit_depth(opened: Image.Image) -> bool:
    """Whether an image that Pillow has opened, but not decoded, has more than 8 bits a value."""
    if opened.mode.startswith(("I", "F")):
        return True
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return max(opened.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8  # noqa: PLR2004
    tiles = getattr(opened, "tile", None)
    arguments = tiles[0][3] if tiles else None  # of Pillow's decoder
    if opened.format == "PPM":
        maximum = arguments[-1] if isinstance(arguments, tuple) else None
        return isinstance(maximum, int) and maximum > 255  # noqa: PLR2004
    return ";16" in str(arguments)


def orientation_of(image: Image.Image) -> Any:  # noqa: ANN401
    """EXIF orientation of an image: 1 if it has none, or one that is damaged."""
    try:
        return image.getexif().get(ORIENTATION, UPRIGHT)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return UPRIGHT


def _is_oriented(path: Path | str) -> bool:
    try:
        with Image.open(path) as opened:
            return orientation_of(opened) in range(2, 9)
    except (OSError, SyntaxError, ValueError):  # damaged: decoding it will raise
        return False


def apply_orientation(values: NDArray[Any], orientation: Any) -> NDArray[Any]:  # noqa: ANN401
    """Turn or mirror pixels as an EXIF orientation says.

    Args:
        values (NDArray): Shape ``(H, W)`` or ``(H, W, C)``.
        orientation (Any): From 1 to 8; any other value leaves the pixels as they are.

    Returns:
        NDArray: Upright, shape ``(H, W)`` or ``(W, H)``, and channels.
    """
    if orientation in SIDEWAYS:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


@lru_cache(1024)  # once a file
def warn_of_pages(name: str) -> None:
    """Warn that a file holds more images than the one that is read."""
    logger.warning(
        "%s holds several pages or frames: the first is read, the others are not inspected.", name
    )


def count_unread(paths: Sequence[Path | str]) -> Counter[str]:
    """Count image files of kinds that are not read, in the folders of those that are and below.

    The folder that all have in common is counted too, unless it is more than two levels up: data
    sets that lie far apart have no more in common than a disk. What cannot be listed is skipped.

    Args:
        paths (Sequence[Path | str]): Files that are read.

    Returns:
        Counter[str]: Number of files by suffix.
    """
    if not paths:
        return Counter()
    folders = {Path(path).absolute().parent for path in paths}
    common = Path(os.path.commonpath(folders))
    if all(len(folder.relative_to(common).parts) <= _LEVELS for folder in folders):
        folders = {common}
    walks = (os.walk(folder) for folder in folders)
    # a single file may be all that was asked for from a folder of many kinds
    listed = [next(walk, ("", [], [])) for walk in walks] if len(paths) == 1 else chain(*walks)
    found = {Path(folder, name) for folder, _, names in listed for name in names}
    return Counter(
        path.suffix.lower() for path in found if path.suffix.lower() in NOT_READ and path.is_file()
    )
