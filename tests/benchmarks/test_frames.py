"""One frame after the other: both kinds of file are measured, each in a process of its own."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import frames
from benchmarks.common import engine


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_measures_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_TIMED", 2)
    monkeypatch.setattr(frames, "_SIZES", (64, 64))
    tiny = partial(
        engine.fitted, backbone="test_resnet", layers=["layer1"], pre_trained=False, bank_size=50
    )
    monkeypatch.setattr(engine, "fitted", tiny)
    assert frames.main(["--frames", "30", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "frames.json").read_text(encoding="utf-8"))
    assert [(row["kind"], row["frames"]) for row in rows] == [
        ("checkpoint", 2),
        ("OpenVINO", 2),
        ("checkpoint", 30),
        ("OpenVINO", 30),
    ]
    assert all(row["milliseconds"] > 0 and row["mib_at_the_end"] > 50 for row in rows)
    assert "| OpenVINO | 64 x 64 | 30 of ever new sizes |" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )
