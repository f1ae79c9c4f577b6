"""Images of every bit depth, container and shape are read in full, or refused by name."""

import itertools
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from anomalib.data.utils import read_image as anomalib_read_image
from numpy.typing import NDArray
from PIL import Image, ImageOps

from anomalib_sgfr.images.bit_depth import evenly_spaced, infer_bit_depth
from anomalib_sgfr.images.headers import FileHeader, read_header
from anomalib_sgfr.images.reading import read_image, read_raw, upright_size, why_unreadable

SIZE = (5, 7)
Values = NDArray[Any]


def drawn(bits: int, channels: int) -> Values:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (*SIZE, channels))
    values[0, 0], values[0, 1] = 0, (1 << bits) - 1
    return values.astype(np.uint8 if bits == 8 else np.uint16).squeeze()


def write_png(path: Path, values: Values, significant: int = 0) -> None:
    """By the standard, as Pillow cannot write 16 bits in colour."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    kind = {1: 0, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    head = struct.pack(
        ">IIBBBBB", values.shape[1], values.shape[0], 8 * values.itemsize, kind, 0, 0, 0
    )
    said = chunk(b"sBIT", bytes([significant] * channels)) if significant else b""
    parts = [chunk(b"IHDR", head), said, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path: Path, values: Values, **options: Any) -> None:
    tifffile.imwrite(
        path, values, photometric="minisblack" if values.ndim == 2 else "rgb", **options
    )


def write_big_endian(path: Path, values: Values) -> None:
    write_tiff(path, values, byteorder=">", compression="lzw")


def write_planes(path: Path, values: Values) -> None:
    if values.ndim == 2:
        write_tiff(path, values)
    else:
        write_tiff(path, np.moveaxis(values, -1, 0), planarconfig="separate")


def portable(top: int | None = None, *, plain: bool = False) -> Callable[[Path, Values], None]:
    def write(path: Path, values: Values) -> None:
        kind = (2 if plain else 5) + (values.ndim == 3)
        white = top or (255 if values.itemsize == 1 else 65535)
        head = f"P{kind}\n# made by a test\n{values.shape[1]} {values.shape[0]}\n{white}\n".encode()
        body = (
            " ".join(map(str, values.ravel())).encode()
            if plain
            else values.astype(f">u{values.itemsize}").tobytes()
        )
        path.write_bytes(head + body)

    return write


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def upright(values: Values, orientation: int) -> Values:
    """As Pillow turns it, between 0 and 1."""
    image = Image.fromarray(values)
    image.info["exif"] = exif_of(orientation).tobytes()
    return np.asarray(ImageOps.exif_transpose(image)) / 255


CONTAINERS: dict[str, tuple[str, Callable[..., None]]] = {
    "png": (".png", write_png),
    "tiff": (".tif", write_tiff),
    "tiff_big_endian_lzw": (".tif", write_big_endian),
    "tiff_planes": (".tif", write_planes),
    "pnm": (".pgm", portable()),
    "pnm_plain": (".pgm", portable(plain=True)),
}
CASES = [
    (bits, channels, name)
    for bits, channels, name in itertools.product((8, 10, 12, 14, 16), (1, 3, 4), CONTAINERS)
    if not (channels == 4 and name.startswith("pnm"))
    and not (
        bits == 8 and name in {"tiff_planes", "pnm_plain"}
    )  # as anomalib reads them, right or wrong
]


def expected(values: Values, white: float) -> Values:
    colour = values[..., None].repeat(3, -1) if values.ndim == 2 else values[..., :3]
    return colour / white


@pytest.mark.parametrize(("bits", "channels", "container"), CASES)
def test_every_bit_depth_container_and_channel_is_read_in_full(
    bits: int, channels: int, container: str, tmp_path: Path
) -> None:
    values = drawn(bits, channels)
    suffix, write = CONTAINERS[container]
    path = tmp_path / f"image{suffix}"
    write(path, values)
    assert read_header(path).high_bit_depth == (bits > 8)
    assert infer_bit_depth([path]) == bits
    found = read_image(path, bits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(values, (1 << bits) - 1), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_every_dtype_and_shape_are_read(bits: int, channels: int) -> None:
    values = drawn(bits, channels)
    wanted = expected(values, (1 << bits) - 1)
    channels_first = values[None] if channels == 1 else np.moveaxis(values, -1, 0)
    ways: list[Any] = [
        values,
        values if channels > 1 else values[..., None],
        channels_first,
        channels_first[None],
    ]
    ways += [values / ((1 << bits) - 1), (values / ((1 << bits) - 1)).astype(np.float32)]
    ways += [
        torch.from_numpy(channels_first.astype(values.dtype)),
        torch.from_numpy(channels_first / ((1 << bits) - 1)),
    ]
    if bits > 8:
        ways += [values.astype(np.int64), torch.from_numpy(values.astype(np.int32))]
    for way in ways:
        np.testing.assert_allclose(read_image(way, bits), wanted, atol=1e-6)
    if bits == 8 or channels == 1:
        np.testing.assert_allclose(read_image(Image.fromarray(values), bits), wanted, atol=1e-6)
    np.testing.assert_array_equal(read_image(values > 3), expected(values > 3, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".jpg", ".webp", ".ppm"])
def test_images_of_8_bits_are_what_anomalib_reads(mode: str, suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA").convert("RGB").convert(mode)
    path = tmp_path / f"image{suffix}"
    exif = {"exif": exif_of(6)} if suffix in {".png", ".jpg", ".tif", ".webp"} else {}
    try:
        image.save(path, **exif)
    except OSError:
        pytest.skip("no such image")
    turned = "exif" in Image.open(path).info or suffix == ".tif"
    with path.open("rb") as file:  # Pillow misreads turned TIFF by its path
        anomalibs: Any = anomalib_read_image(file, as_tensor=True)  # type: ignore[arg-type]
    anomalibs = torch.rot90(anomalibs, -1, (1, 2)) if turned and suffix != ".tif" else anomalibs
    assert torch.equal(torch.from_numpy(read_image(path)).permute(2, 0, 1), anomalibs)
    assert read_header(path) == FileHeader(oriented=turned)
    assert np.array_equal(read_image(Image.open(path)), read_image(path))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_kept(kind: type, channels: int, tmp_path: Path) -> None:
    values = (drawn(12, channels) / 4095).astype(kind)
    for byteorder in "<>":
        write_tiff(tmp_path / "f.tif", values, byteorder=byteorder, compression="lzw")
        assert read_header(tmp_path / "f.tif").high_bit_depth
        np.testing.assert_array_equal(
            read_image(tmp_path / "f.tif"), expected(values.astype(np.float32), 1)
        )
    assert infer_bit_depth([tmp_path / "f.tif"]) == 8  # says nothing of the depth


def test_the_white_of_the_file_comes_first(tmp_path: Path) -> None:
    values = np.array([[0, 100, 1000]], np.uint16)
    for top in (1000, 4095):
        portable(top)(tmp_path / "p.pgm", values)
        np.testing.assert_allclose(
            read_image(tmp_path / "p.pgm", 16)[0, :, 0], values[0] / top, atol=1e-6
        )
    for bits in (10, 12, 14):
        write_tiff(tmp_path / "p.tif", values, bitspersample=bits)
        np.testing.assert_allclose(
            read_image(tmp_path / "p.tif", 16)[0, :, 0], values[0] / ((1 << bits) - 1), atol=1e-6
        )
    assert infer_bit_depth([tmp_path / "p.pgm", tmp_path / "p.tif"]) == 8  # they need no more


def test_the_bit_depth_of_a_set_holds_its_largest_value_and_its_significant_bits(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, top in zip(paths, (300, 1023, 1024), strict=True):
        write_png(path, np.full(SIZE, top, np.uint16))
    assert [infer_bit_depth(paths[:count]) for count in range(4)] == [8, 10, 10, 12]
    write_png(paths[0], np.full(SIZE, 300, np.uint16), significant=14)
    assert infer_bit_depth(paths) == 14
    assert read_raw(paths[0]).significant_bits == 14
    write_png(paths[0], np.full(SIZE, 200, np.uint16))
    assert infer_bit_depth(paths[:1]) == 8


def test_a_set_is_sampled_evenly() -> None:
    assert evenly_spaced(range(10), 20) == list(range(10))
    chosen = evenly_spaced(range(1000), 64)
    assert len(chosen) == 64
    assert {late - early for early, late in itertools.pairwise(chosen)} == {15, 16}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            np.full(SIZE, 40000, np.uint16),
            "up to 40000, more than the 12 bits .* pass bit_depth=16",
        ),
        (np.full(SIZE, 5000, np.uint16), "pass bit_depth=14"),
        (np.full(SIZE, 70000, np.int32), "more than 16 bits"),
        (np.full(SIZE, -1, np.int32), "negative values, down to -1"),
        (np.full(SIZE, 255.0), "floats from 255 to 255: pass them between 0 and 1"),
        (np.full(SIZE, np.nan), "floats from nan"),
        (np.full(SIZE, -0.5), "floats from -0.5"),
        (torch.full((3, 9, 9), 2.0), "floats from 2"),
        (np.zeros((5, 7, 2)), r"got \(5, 7, 2\)"),
        (np.zeros((3, 7, 3)), r"got \(3, 7, 3\)"),
        (np.zeros((2, 3, 5, 7)), r"got \(2, 3, 5, 7\)"),
        (np.zeros((0, 7)), r"got \(0, 7\)"),
        (np.array(["a"]), "pass a path"),
        (None, "pass a path"),
    ],
)
def test_wrong_arrays_are_refused_with_a_remedy(source: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        read_image(source, 12)


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    deep, path = drawn(12, 3), tmp_path / "image.tif"
    write_tiff(path, deep)
    with pytest.raises(
        ValueError, match=r"image.tif holds values up to 4095, more than the 10 bits"
    ):
        read_image(path, 10)
    with Image.open(path) as opened, pytest.raises(ValueError, match="pass its path"):
        read_image(opened)
    tifffile.imwrite(path, deep[..., 0], photometric="miniswhite")
    with pytest.raises(ValueError, match=r"image.tif: .* photometric interpretation 0"):
        read_image(path, 12)
    write_tiff(path, drawn(12, 1).astype(np.float32))
    with pytest.raises(ValueError, match=r"image.tif holds floats from 0 to 4095"):
        read_image(path, 12)
    write_tiff(path, deep.astype(np.uint32) << 16)
    with pytest.raises(ValueError, match="more than 16"):
        infer_bit_depth([path])
    portable(1000)(tmp_path / "p.pgm", drawn(12, 1))
    with pytest.raises(ValueError, match="1000 is white: the file is damaged"):
        read_image(tmp_path / "p.pgm", 12)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_that_was_cut_short_is_named(container: str, channels: int, tmp_path: Path) -> None:
    suffix, write = CONTAINERS[container]
    path = tmp_path / f"cut{suffix}"
    values = (
        np.random.default_rng(0).integers(0, 65536, (64, 64, channels), dtype=np.uint16).squeeze()
    )
    write(path, values)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((OSError, ValueError), match="cut"):
        read_image(path, 16)


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.tif", "p.pgm", "p.webp", "p.bmp"])
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    said = f"{tmp_path / name} cannot be read: it is not an image, or it is damaged"
    with pytest.raises(OSError, match=f"^{re.escape(said)}$") as raised:
        read_image(tmp_path / name)
    reason = why_unreadable(tmp_path / name, raised.value)
    assert reason == "UnidentifiedImageError: it is not an image, or it is damaged"


def test_a_file_whose_header_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"P5 no image")
    with pytest.raises(OSError, match=r"^\S*p.png cannot be read: invalid literal"):
        read_image(tmp_path / "p.png")


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "p.png", drawn(16, 3))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"p.png: .* opencv-python-headless: install it"):
        read_image(tmp_path / "p.png", 16)


def test_images_are_read_without_pytorch() -> None:
    code = (
        "import sys, numpy as np; from anomalib_sgfr.images.reading import read_image;"
        " read_image(np.zeros((3, 9, 9)));assert not {'torch', 'anomalib', 'cv2', 'tifffile'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".tif", {}, 0.0),
        (".png", {}, 0.0),
        (".webp", {"lossless": True}, 0.0),
        (".jpg", {"quality": 100, "subsampling": 0}, 0.2),
    ],
)
def test_images_of_8_bits_are_upright(
    orientation: int, suffix: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    path = tmp_path / f"p{suffix}"
    Image.fromarray(drawn(8, 3)).save(path, exif=exif_of(orientation), **options)
    wanted = upright(drawn(8, 3), orientation)
    assert upright_size(path) == wanted.shape[:2]
    assert read_header(path).oriented == (orientation > (4 if suffix == ".tif" else 1))
    with Image.open(path) as opened:
        for found in (read_image(path), read_image(opened), read_image(opened.convert("RGB"))):
            np.testing.assert_allclose(found, wanted, atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_are_upright(orientation: int, channels: int, tmp_path: Path) -> None:
    values = drawn(8, channels)
    wanted = expected(upright(values, orientation), 1)
    tag = [(0x0112, "H", 1, orientation, True)]
    write_tiff(tmp_path / "p.tif", values.astype(np.uint16), extratags=tag)
    assert upright_size(tmp_path / "p.tif") == wanted.shape[:2]
    np.testing.assert_allclose(read_image(tmp_path / "p.tif"), wanted, atol=1e-6)
    body = b"eXIf" + exif_of(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path = tmp_path / "p.png"
    write_png(path, values.astype(np.uint16) * 257)
    content = path.read_bytes()
    for at in (33, len(content) - 12):  # before the values, and after them
        path.write_bytes(content[:at] + chunk + content[at:])
        assert read_header(path) == FileHeader(high_bit_depth=True, oriented=orientation > 1)
        np.testing.assert_allclose(read_image(path, 16), wanted, atol=1e-6)


def test_other_formats_of_high_bit_depth_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(drawn(16, 1)).save(tmp_path / "p.jp2")
    with pytest.raises(
        ValueError, match=r"p.jp2: JPEG2000 images are read if they have 8 bits: save it as PNG"
    ):
        read_image(tmp_path / "p.jp2", 16)
