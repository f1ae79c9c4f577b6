"""Another light: what is measured of a fitted model, before and after every picture changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule

from anomalib_sgfr import Sgfr
from benchmarks import domain_shift
from benchmarks.domain_shift import CHANGES, main


@pytest.mark.usefixtures("small_images")
def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.domain_shift._NEW", 4)
    monkeypatch.setattr("benchmarks.domain_shift.CHANGES", {"darker": CHANGES["darker"]})
    fits: list[list[str]] = []
    small = domain_shift.fitted

    def seen(module: AnomalibDataModule, seed: int, **arguments: object) -> Sgfr:
        fits.append(sorted(Path(path).name for path in module.train_data.samples["image_path"]))
        return small(module, seed, **arguments)

    monkeypatch.setattr("benchmarks.domain_shift.fitted", seen)
    arguments = ["--root", str(parts), "--data", "folder", "--seeds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "domain-shift.json").read_text(encoding="utf-8"))
    found = {row["way"]: row for row in rows}
    assert list(found) == ["as it was", "nothing", "adapted", "update", "alone"]
    assert [row["change"] for row in rows] == [None, *["darker"] * 4]
    new = [f"{number}.png" for number in range(4)]
    base, alone = fits
    assert (len(base), alone) == (8, new)
    assert found["as it was"]["metrics"]["image_AUROC"] == 1.0
    assert found["nothing"]["false_alarms"] > found["update"]["false_alarms"]
    assert found["nothing"]["false_alarms"] > found["adapted"]["false_alarms"]
    assert found["update"]["metrics"]["AUPRO"] > found["nothing"]["metrics"]["AUPRO"]
    assert "| folder | darker | updated with the new images | " in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_the_same_each_time(name: str) -> None:
    image = torch.rand(3, 200, 300, generator=torch.Generator().manual_seed(0))
    once, again = (CHANGES[name](image, np.random.default_rng(3)) for _ in range(2))
    assert once.shape == image.shape
    assert torch.equal(once, again)
    assert (once - image).abs().mean() > 0.02
