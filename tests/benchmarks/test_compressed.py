"""Exported files of fewer bits beside the one in 32 bits: what is measured, and how it is told."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compressed
from benchmarks.edge import run


def test_measures_a_folder_of_ones_own(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_COMPRESSIONS", {name: compressed._COMPRESSIONS[name] for name in ("f32", "INT8")})
    monkeypatch.setattr(compressed, "_RUNS", 20)
    # one early layer: a few operations to trace, which is most of an export's time
    monkeypatch.setattr(compressed, "fitted", partial(compressed.fitted, layers=["blocks.1"], bank_size=200))
    # here, not in a process of its own: that one works is tested with the edge benchmark
    monkeypatch.setattr(compressed, "_run", lambda step, job: getattr(run, step)(job))
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert compressed.main(arguments) == 0
    rows = {row["file"]: row for row in json.loads((tmp_path / "compressed.json").read_text(encoding="utf-8"))}
    assert list(rows) == ["f32", "INT8"]
    assert rows["f32"]["labels_changed"] == 0
    assert rows["INT8"]["bytes"] < rows["f32"]["bytes"]
    for row in rows.values():
        assert row["image_AUROC"] == 1.0
        assert 0.0 < row["AUPRO"] <= 1.0
        assert row["f32_ms"] > 0.0


def test_the_report_is_beside_the_file_in_32_bits(tmp_path: Path) -> None:
    def row(file: str, seed: int, auroc: float, **values: Any) -> dict[str, Any]:
        common = {"dataset": "mtd", "split": "tile", "pixel_AP": None, "AUPRO": None, "bytes": 2**20, "default_ms": 1.0}
        return {**common, "file": file, "seed": seed, "image_AUROC": auroc, "images": 10, **values}

    rows = [row("f32", seed, 0.9, labels_changed=0, f32_ms=4.0) for seed in (0, 1, 2)]
    rows += [row("INT8", seed, 0.8 + 0.01 * seed, labels_changed=seed, f32_ms=3.0) for seed in (0, 1, 2)]
    (tmp_path / "compressed.json").write_text(json.dumps(rows), encoding="utf-8")
    compressed.report(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Seeds 0, 1, 2." in text
    assert "| mtd tile | f32 | 90.00 | - | - | 0 of 30 | 1.0 | 1.00 | 1.00 |" in text
    assert "| mtd tile | INT8 | 81.00 (-9.00) | - | - | 3 of 30 | 1.0 | 0.75 | 1.00 |" in text
