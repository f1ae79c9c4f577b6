"""The certificate beside what it bounds."""

import json
from pathlib import Path

import pytest

from benchmarks.tightness import main


def test_bounds_hold_and_are_reported(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tightness._SIZES", (50, 300))
    monkeypatch.setattr("benchmarks.tightness._CACHE", tmp_path / "cache")
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "out" / "tightness.json").read_text(encoding="utf-8"))
    assert [(row["scale"], row["atoms"]) for row in rows] == [(scale, size) for scale in range(4) for size in (50, 300)]
    for row in rows:
        assert row["patches"] == 12 * (32, 32, 16, 8)[row["scale"]] ** 2
        assert row["largest"] <= row["largest_bound"]
        assert 0 < row["mean"] <= row["mean_bound"]
    assert rows[1]["mean"] < rows[0]["mean"]  # more atoms leave less
    assert "| folder | 8 | 12,288 | 50 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
