import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_sgfr.report.media import aspect_of, embedded_heat, outline, small_heat, webp


def opened(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_maps_are_on_one_scale() -> None:
    heat = np.array([[0.0, 0.25], [0.5, 9.0]], np.float16)
    assert opened(embedded_heat(heat, 0.0, 1.0)).tolist() == [[0, 64], [128, 255]]
    assert opened(embedded_heat(heat, 0.0, 9.0))[1, 1] == 255
    assert opened(embedded_heat(np.zeros((2, 2)), 0.0, 0.0)).tolist() == [[0, 0], [0, 0]]


def test_a_small_map_keeps_what_is_no_number_out() -> None:
    heat = small_heat(np.array([[np.nan, np.inf], [1e9, -1e9]]))
    assert np.isfinite(heat).all()
    assert heat[0, 0] == 0.0


@pytest.mark.parametrize("room", [3000, 9000])
def test_a_picture_has_the_room_it_is_given(room: int) -> None:
    noise = np.random.default_rng(0).uniform(size=(512, 300, 3)).astype(np.float32)
    content = webp(noise, 256, room)
    assert len(content) <= room
    image = Image.open(io.BytesIO(content))
    assert image.format == "WEBP"
    assert image.width / image.height == pytest.approx(300 / 512, rel=0.05)


def test_an_outline_goes_around_what_exceeds_the_level() -> None:
    rows, columns = np.mgrid[:100, :200]
    disk = ((rows - 50) ** 2 + (columns - 60) ** 2 < 20**2).astype(np.float32)
    places = np.array(re.findall(r"(\d+) (\d+)", outline(disk, 0.5)), float)
    x, y = places[:, 0] * 0.2 - 60.5, places[:, 1] * 0.1 - 50.5
    assert np.abs(np.hypot(x, y) - 20).max() < 1.5
    assert outline(disk, 1.0) == ""
    whole = np.array(re.findall(r"(\d+) (\d+)", outline(np.ones((10, 10)), 0.5)), float)
    assert whole.min() == 0
    assert whole.max() == 1000


def test_a_file_says_how_wide_its_picture_is(tmp_path: Path) -> None:
    Image.new("L", (300, 100)).save(tmp_path / "wide.png")
    assert aspect_of(str(tmp_path / "wide.png"), 64, 64) == 3.0
    assert aspect_of(str(tmp_path / "gone.png"), 50, 100) == 2.0
