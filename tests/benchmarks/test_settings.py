"""The worth of settings that drawn defects choose."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anomalib_sgfr import Sgfr
from benchmarks import settings


def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_NUMBER", 1)
    monkeypatch.setattr(settings, "Sgfr", partial(Sgfr, image_size=64, bank_size=200))
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert settings.main(arguments) == 0
    rows = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in rows]
    assert names[:3] == ["as now", "blur 2", "blur 8"]
    assert names[-2:] == ["image size 96 x 96", "image size 128 x 128"]
    assert [row["recall"] for row in rows] == [1.0] * len(rows)
    assert 80 <= rows[0]["drawn"] <= 6 * 2 * 7  # a distortion needs texture
    assert "image size 128 x 128" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_gain_and_regret_of_the_recommended_setting(tmp_path: Path) -> None:
    def row(name: str, found: int, seconds: float, recall: float) -> dict[str, Any]:
        return {
            "dataset": "mvtec",
            "split": "grid",
            "seed": 0,
            "name": name,
            "arguments": {},
            "seconds": seconds,
            "drawn": 400,
            "found": found,
            "images": 50,
            "alarms": 0,
            "image_AUROC": recall,
            "recall": recall,
            "false_alarms": 0.0,
        }

    rows = [
        row("as now", 200, 0.1, 0.50),
        row("recommended", 280, 0.1, 0.60),
        row("best", 150, 0.1, 0.75),
        row("larger", 300, 0.3, 0.90),
        row("largest", 100, 0.4, 0.95),
    ]
    (tmp_path / "settings.json").write_text(json.dumps(rows), encoding="utf-8")
    settings.report(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")

    def line(gain: str, regret: str, by_chance: str) -> str:
        cells = (f"{value} ({value} to {value})" for value in (gain, regret, by_chance))
        return " | ".join(cells)

    # (0.50 + 0.60 + 0.75) / 3 - 0.50; over all five (3.70 / 5) - 0.50
    assert f"| recall, the same cost | {line('+10.0', '+15.0', '+11.7')} |" in page
    assert f"| recall, any cost | {line('+40.0', '+5.0', '+24.0')} |" in page
    marked = [text.split(" | ")[1] for text in page.splitlines() if text.endswith("| yes |")]
    assert marked == ["recommended", "larger"]
