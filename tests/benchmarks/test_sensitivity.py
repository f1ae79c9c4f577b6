"""The comparison of drawn with real defects."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anomalib_sgfr import Sgfr
from anomalib_sgfr.report.sensitivity import DetectionCurve
from benchmarks import sensitivity


def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_NUMBER", 1)
    monkeypatch.setattr(sensitivity, "Sgfr", partial(Sgfr, image_size=64, bank_size=200))
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert sensitivity.main(arguments) == 0
    (row,) = json.loads((tmp_path / "sensitivity.json").read_text(encoding="utf-8"))
    assert row["kind"] == "bad"  # the folder
    assert row["images"] == 6
    assert row["recall"] == 1.0
    assert row["size"] == pytest.approx(31, abs=2)  # of discs with a radius below 16 pixels
    assert row["contrast"] > 0.4
    assert row["predicted"] > row["drawn"]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| folder | bad | 6 |" in page


@pytest.mark.parametrize("angle", [0.0, 0.6, 1.2])
def test_measures_of_a_line_and_a_disc(angle: float) -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:200, :200] - 100.0
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    ground = 0.5 + rng.normal(0, 0.03, (200, 200))
    for mask, length, is_narrow in (
        ((np.abs(along) <= 40) & (np.abs(across) <= 2), 81, True),
        (np.hypot(along, across) <= 40, 81, False),
    ):
        image = np.repeat((ground - 0.2 * mask)[..., None], 3, -1).astype(np.float32)
        other = mask.copy()
        other[:3, :3] = True  # a smaller defect does not count
        size, contrast, narrow = sensitivity.measures(image, other)
        assert size == pytest.approx(length, abs=2)
        assert contrast == pytest.approx(0.2, abs=0.01)
        assert narrow == is_narrow


def test_curves_are_read_between_sizes_and_contrasts() -> None:
    def curve(kind: str, contrast: float, found: list[int]) -> DetectionCurve:
        return DetectionCurve(kind, contrast, [10.0, 40.0], [10, 10], found, found)

    curves = [
        curve("spot", 0.4, [4, 8]),
        curve("spot", 0.1, [0, 4]),
        curve("dent", 0.1, [10, 10]),
        curve("dent", 0.4, [10, 10]),
    ]
    at = sensitivity.curves_at
    assert at(curves, ["spot"], 20.0, 0.2) == pytest.approx(0.4)
    assert at(curves, ["spot"], 1.0, 0.01) == 0.0
    assert at(curves, ["spot"], 500.0, 1.0) == pytest.approx(0.8)
    assert at(curves, ["spot", "dent"], 20.0, 0.2) == pytest.approx(0.7)


def test_the_region_of_parts_is_a_box_or_the_ellipse_in_it() -> None:
    box = sensitivity.region_of_parts("tire", (100, 200))
    rows, columns = np.nonzero(box)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 82, 44, 155)
    assert box.sum() == 68 * 112
    ellipse = sensitivity.region_of_parts("bottle", (100, 200))
    assert ellipse[50, 100]
    assert not ellipse[8, 15]
    assert ellipse.mean() == pytest.approx(np.pi / 4 * 0.81, abs=0.01)
    assert sensitivity.region_of_parts("grid", (3, 4)).all()
