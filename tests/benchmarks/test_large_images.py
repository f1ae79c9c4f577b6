"""Small defects in large images: made, measured in processes of their own, and reported."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common.defects import surface
from benchmarks.large_images import main, report


def test_images_are_uneven_but_have_no_defect() -> None:
    found = surface(np.random.default_rng(0), (300, 400))
    assert found.shape == (300, 400)
    assert found.dtype == np.float32
    assert 0.0 <= found.min() < found.mean() < found.max() <= 1.0
    assert 0.03 < found.std() < 0.12


def test_what_is_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "way": "256 x 256",
        "seed": 0,
        "metrics": {"image_AUROC": 0.5, "pixel_AP": 0.1, "AUPRO": 0.25},
        "per_defect": {"20": 0.75, "6": 0.5},
        "image_s": 0.125,
        "peak_mb": 11.2,
        "fit_s": 3.4,
    }
    monkeypatch.setattr("benchmarks.large_images._WAYS", {"256 x 256": {}})
    (tmp_path / "large-images.json").write_text(json.dumps([row]), encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 0
    assert (
        "| 256 x 256 | 50.0 | 75.0 | 50.0 | 10.0 | 25.0 | 0.12 | 11 | 3 |"
        in capsys.readouterr().out
    )
    report(tmp_path)
    assert "image AUROC, 6 px | image AUROC, 20 px | all" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )


def test_a_way_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.large_images as module

    for name, value in {"_SIZE": (96, 128), "_TRAINED": 2, "_GOOD": 2, "_EACH": 1}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "_WAYS", {"tiles": {"image_size": (96, 128), "tile_size": 64}})
    module._make(tmp_path, 0)
    found = module._measure("tiles", tmp_path, 0)
    assert set(found["per_defect"]) == {"6", "10", "14", "20"}
    assert all(
        0.0 <= found["metrics"][name] <= 1.0 for name in ("image_AUROC", "pixel_AP", "AUPRO")
    )
    assert found["image_s"] > 0
