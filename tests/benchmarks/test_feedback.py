"""Accepting false alarms: counted among images that were not accepted."""

import json
from pathlib import Path

import pytest

from benchmarks.feedback import main


@pytest.mark.usefixtures("small_images")
def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("benchmarks.feedback._ALARMS", 0.5)
    assert main(arguments) == 0
    rows = {
        row["way"]: row
        for row in json.loads((tmp_path / "feedback.json").read_text(encoding="utf-8"))
    }
    assert list(rows) == ["before", "accepted", "refit"]
    assert (rows["before"]["accepted"], rows["before"]["good"], rows["before"]["defective"]) == (
        1,
        5,
        6,
    )
    assert (rows["before"]["alarms_kept"], rows["before"]["still_kept"]) == (2, 1)
    assert rows["accepted"]["still_kept"] == 0
    assert rows["accepted"]["atoms"] > 0
    assert "| folder | 20 accepted | " in (tmp_path / "README.md").read_text(encoding="utf-8")
