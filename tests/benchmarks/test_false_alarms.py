"""Realised rates of false alarms: measured on images that nothing was set by."""

import json
from pathlib import Path

import pytest

from benchmarks.false_alarms import _part_by_part, main


@pytest.mark.usefixtures("small_images")
def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "false-alarms.json").read_text(encoding="utf-8"))
    assert {row["source"] for row in rows} == {"leave-one-out", "leave-part-out", "held-out"}
    images = {row["source"]: row["nominal_images"] for row in rows}
    assert images["held-out"] == round(
        0.2 * images["leave-one-out"]
    )  # and those were not trained on
    for source in images:
        of_source = sorted(
            (row for row in rows if row["source"] == source), key=lambda row: row["rate"]
        )
        assert [row["threshold"] for row in of_source] == sorted(
            (row["threshold"] for row in of_source), reverse=True
        )
        assert all(row["detected"] == 1.0 for row in of_source)
    assert "| folder | training images, without their own atoms |" in (
        tmp_path / "README.md"
    ).read_text("utf-8")
    assert (tmp_path / "false-alarms.png").stat().st_size > 0

    monkeypatch.setattr("benchmarks.false_alarms._evaluate", None)  # nothing is done twice
    assert main(arguments) == 0


def test_no_part_is_on_both_sides() -> None:
    part_of = {f"{index}.png": str(index // 3) for index in range(60)}
    held_out = _part_by_part(
        [f"parts/{index}.png" for index in range(60)], lambda path: part_of[Path(path).name]
    )
    assert len(held_out) == 12
    assert all(
        sum(f"parts/{3 * part + photograph}.png" in held_out for photograph in range(3)) % 3 == 0
        for part in range(20)
    )
