"""Drawn defects: of the size asked for, where the mask says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common.defects import draw_defect
from benchmarks.defect_size import main


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_defect_is_where_its_mask_is_and_of_its_size(size: int) -> None:
    rng = np.random.default_rng(0)
    image = torch.full((3, 128, 128), 0.5)
    for _ in range(20):
        changed, mask = draw_defect(image, size, rng)
        difference = (changed - image).abs().amax(0).numpy()
        assert difference[mask].min() > 0.04
        assert difference[~mask].max() <= 0.3 * 0.35 + 1e-6  # the faint rim of a smudge
        rows, columns = np.nonzero(mask)
        extent = np.hypot(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.5 * size <= extent <= 1.5 * size + 2


def test_studies_a_folder_of_ones_own(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.defect_size._SIZES", (16, 32))
    monkeypatch.setattr("benchmarks.defect_size._BLURS", (2.0, 8.0))
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| image_AUROC | 16 | 32 | mean |" in text
    for label in ("blur 2, box", "blur 2, binomial", "blur 8, box", "blur 8, binomial"):
        assert text.count(f"| {label} |") == 3  # metrics
    assert (tmp_path / "defect-size.png").stat().st_size > 0
    before = (tmp_path / "defect-size.json").read_bytes()
    monkeypatch.setattr("benchmarks.defect_size._evaluate", None)  # nothing is done twice
    assert main(arguments) == 0
    assert (tmp_path / "defect-size.json").read_bytes() == before
