import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_sgfr.report.media import (
    ScoreAxis,
    aspect_ratio,
    bar_path,
    curve_path,
    evidence_chart,
    histogram,
    map_uri,
    outline,
    small_map,
    webp,
)


def opened(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_ticks_are_round_numbers_at_their_positions() -> None:
    found = ScoreAxis(0.13, 0.97).ticks
    assert 4 <= len(found) <= 10
    for position, label in found:
        assert 0.13 + position * 0.84 == pytest.approx(float(label), abs=1e-9)
    assert ScoreAxis(1.0, 1.0).ticks == ScoreAxis(0.0, float("inf")).ticks == []


def test_bars_are_as_high_as_their_counts() -> None:
    tops = [float(top) for top in re.findall(r"V([\d.]+)h", bar_path([1, 0, 2, 4]))]
    assert tops == [75.0, 50.0, 0.0]
    assert bar_path([]) == bar_path([0]) == ""


def test_a_histogram_counts_every_score() -> None:
    scores = np.random.default_rng(0).normal(size=500).tolist()
    row = histogram("Good", scores, ScoreAxis(-1.0, 1.0))
    expected = np.histogram(np.clip(scores, -1, 1), 60, (-1, 1))[0]
    assert (row.number, row.tallest) == (500, expected.max())
    assert row.path.count("z") == (expected > 0).sum()


def test_a_curve_begins_at_the_bottom() -> None:
    assert curve_path([0, 0.15, 0.3], [0, 0.5, 1], 0.3) == "M0.0 100.00L500.0 50.00L1000.0 0.00"


def test_evidence_is_drawn_on_a_logarithmic_axis_up_to_a_hundred_limits() -> None:
    chart = evidence_chart([10.0, 1e3, 1e300], 100.0)
    heights = [100.0 - float(y) for y in re.findall(r" ([\d.]+)", chart.path)]
    assert heights == pytest.approx([20.0, 40.0, 80.0, 100.0], abs=0.01)  # from 0.1 to 1e4
    assert chart.limit == pytest.approx(0.6)
    assert dict(zip("abcdef", chart.powers, strict=True))["a"] == (pytest.approx(0.0), "0.1")
    for height, label in chart.powers:
        assert 10.0 ** (5.0 * height - 1.0) == pytest.approx(float(label))
    low = evidence_chart([1e-5, 0.0], 100.0)
    assert low.powers[0][0] >= 0.0
    assert len(evidence_chart(np.linspace(1, 50, 100_000).tolist(), 100.0).path) < 10_000


def test_maps_are_on_one_scale() -> None:
    values = np.array([[0.0, 0.25], [0.5, 9.0]], np.float16)
    assert opened(map_uri(values, 0.0, 1.0)).tolist() == [[0, 64], [128, 255]]
    assert opened(map_uri(values, 0.0, 9.0))[1, 1] == 255
    assert opened(map_uri(np.zeros((2, 2)), 0.0, 0.0)).tolist() == [[0, 0], [0, 0]]


def test_a_small_map_is_finite() -> None:
    values = small_map(np.array([[np.nan, np.inf], [1e9, -1e9]]))
    assert np.isfinite(values).all()
    assert values[0, 0] == 0.0


@pytest.mark.parametrize("most_bytes", [3000, 9000])
def test_an_encoded_image_has_a_largest_size(most_bytes: int) -> None:
    noise = np.random.default_rng(0).uniform(size=(512, 300, 3)).astype(np.float32)
    content = webp(noise, 256, most_bytes)
    assert len(content) <= most_bytes
    image = Image.open(io.BytesIO(content))
    assert image.format == "WEBP"
    assert image.width / image.height == pytest.approx(300 / 512, rel=0.05)


def test_an_outline_surrounds_what_exceeds_the_level() -> None:
    rows, columns = np.mgrid[:100, :200]
    disk = ((rows - 50) ** 2 + (columns - 60) ** 2 < 20**2).astype(np.float32)
    points = np.array(re.findall(r"(\d+) (\d+)", outline(disk, 0.5)), float)
    x, y = points[:, 0] * 0.2 - 60.5, points[:, 1] * 0.1 - 50.5
    assert np.abs(np.hypot(x, y) - 20).max() < 1.5
    assert outline(disk, 1.0) == ""
    whole = np.array(re.findall(r"(\d+) (\d+)", outline(np.ones((10, 10)), 0.5)), float)
    assert (whole.min(), whole.max()) == (0, 1000)


def test_the_aspect_ratio_is_that_of_the_file(tmp_path: Path) -> None:
    Image.new("L", (300, 100)).save(tmp_path / "wide.png")
    assert aspect_ratio(str(tmp_path / "wide.png"), 64, 64) == 3.0
    assert aspect_ratio(str(tmp_path / "gone.png"), 50, 100) == 2.0
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a right angle
    Image.new("RGB", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert aspect_ratio(str(tmp_path / "turned.jpg"), 64, 64) == pytest.approx(1 / 3)
    Image.new("RGB", (80, 10)).save(tmp_path / "wide.png")
    assert aspect_ratio(str(tmp_path / "wide.png"), 64, 64) == 8.0
