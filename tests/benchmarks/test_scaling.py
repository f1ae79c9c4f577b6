"""The scaling benchmark: exponents, tables and the memory of recorded fits."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.common.records import Record, merge


def test_the_exponent_of_a_power_law() -> None:
    assert scaling.slope([100, 200, 400], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_measures_each_point_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scaling, "_BASE", {"patches": 4096, "atoms": 60, "width": 16, "support": 3, "processes": 1}
    )
    monkeypatch.setattr(scaling, "_SWEEPS", {"scoring": {"atoms": (30, 60)}})
    assert scaling.main(["--out", str(tmp_path), "--repeats", "1"]) == 0
    found = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    assert [row["atoms"] for row in found] == [30, 60]
    assert all(row["seconds"] > 0 for row in found)
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| scoring | atoms | 30, 60 |" in report
    assert (tmp_path / "steps.png").stat().st_size > 0


def test_memory_is_taken_from_the_comparison(tmp_path: Path) -> None:
    record = Record(
        dataset="mtd",
        split="canonical",
        model="sgfr",
        arguments={},
        backbone="tf_efficientnet_lite0",
        image_size=[256, 256],
        seed=0,
        limit_train=100,
        versions={},
        n_train=100,
        n_test=4,
        extract_peak_rss_mb=1500.0,
        fit_peak_rss_mb=1620.0,
        sampling_s=1.25,
    )
    others = [  # of three fits, the median; one was not timed
        dataclasses.replace(record, seed=1, fit_peak_rss_mb=1700.0, sampling_s=None),
        dataclasses.replace(
            record, seed=2, fit_peak_rss_mb=1610.0, extract_peak_rss_mb=1400.0, sampling_s=1.75
        ),
        dataclasses.replace(
            record, limit_train=200, n_train=200, fit_peak_rss_mb=1490.0, sampling_s=None
        ),
    ]
    merge(tmp_path / "results.json", [record, *others])
    scaling.report(tmp_path)
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| sgfr | 100 | 3 | 1,500 | 1,620 | 200 | 1.5 |" in report
    assert "| sgfr | 200 | 1 | 1,500 | 1,490 | 0 | - |" in report
    assert (tmp_path / "memory.png").exists()
