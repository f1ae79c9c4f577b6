"""Headers of image files: pages, damaged orientations, and kinds that are not read."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from anomalib_sgfr.images.headers import SUFFIXES, count_unread, read_header
from anomalib_sgfr.images.reading import read_image

VALUES = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_unread_files_are_counted(tmp_path: Path) -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) == SUFFIXES
    names = ("a/0.png", "a/1.gif", "b/0.png", "b/c/2.GIF", "b/3.jp2", "b/notes.txt", "other.gif")
    root = tmp_path / "root"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert count_unread([root / "a" / "0.png", root / "b" / "0.png"]) == {".gif": 3, ".jp2": 1}
    assert count_unread([root / "b" / "0.png"]) == {".jp2": 1}
    assert not count_unread([])


def test_folders_that_lie_far_apart_are_counted_alone(tmp_path: Path) -> None:
    for name in ("a/b/c/0.png", "a/b/c/1.gif", "d/0.png", "d/e/2.gif", "far/other.gif", "f.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    far = [tmp_path / "a" / "b" / "c" / "0.png", tmp_path / "d" / "0.png"]
    assert count_unread(far) == {".gif": 2}
    assert count_unread([tmp_path / "a" / "0.png", *far[1:]]) == {".gif": 4}  # one data set


def test_a_folder_that_vanishes_ends_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.gif", "b/2.gif"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def vanishing(folder: Any) -> Any:
        if Path(folder).name == "a":
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert count_unread([tmp_path / "0.png", tmp_path / "b" / "1.png"]) == {".gif": 1}


@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"nothing of the kind"])
def test_a_damaged_orientation_is_ignored(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(VALUES).save(tmp_path / "p.png", exif=b"Exif\0\0" + exif)
    assert not read_header(tmp_path / "p.png").oriented
    np.testing.assert_allclose(read_image(tmp_path / "p.png"), VALUES / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [("p.tif", {}), ("p.png", {}), ("p.webp", {"lossless": True})]
)
def test_the_first_of_several_pages_is_read_and_the_file_named_once(
    name: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    first, second = Image.fromarray(VALUES), Image.fromarray(VALUES[::-1])
    first.save(path, save_all=True, append_images=[second], **options)
    for _ in range(2):
        np.testing.assert_allclose(read_image(path), VALUES / 255, atol=1e-6)
    (record,) = caplog.records
    assert f"{path} holds several pages" in record.getMessage()


def test_a_thumbnail_is_not_a_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = VALUES[..., 0].astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as file:
        file.write(grey, photometric="minisblack")
        file.write(grey[::2, ::2], photometric="minisblack", subfiletype=1)
    read_image(tmp_path / "thumbnail.tif", 16)
    assert not caplog.records
