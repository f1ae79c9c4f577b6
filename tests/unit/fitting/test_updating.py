"""The bank over a model's life: its certificate, new images later, and when it is large enough."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch.loggers import CSVLogger

from anomalib_sgfr import Sgfr
from tests.conftest import atoms, fit, folder_datamodule, small, write_image

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))


def others(root: Path) -> Path:
    """Parts of another kind: larger texture."""
    for index in range(6):
        write_image(root / "good" / f"{index}.png", 50 + index, (40, 40))
    write_image(root / "good_test" / "0.png", 60, (40, 40))
    write_image(root / "bad" / "0.png", 61, (40, 40), defect=True)
    return root


def residuals_of(model: Sgfr, datamodule: Folder) -> list[torch.Tensor]:
    """Residuals of all training images' patches, of each scale."""
    datamodule.setup()
    with torch.no_grad():
        images = [model.pre_processor.transform(item.image[None]) for item in datamodule.train_data]
        return model.model.residual_maps(model.model.embed(torch.cat(images)))


def test_the_certificate_is_in_the_log_the_loggers_and_the_checkpoint(
    datamodule: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(pre_processor=SMALL_IMAGES)
    with caplog.at_level("INFO", logger="anomalib_sgfr"):
        engine = fit(model, datamodule, tmp_path, logger=CSVLogger(tmp_path))
    found = model.certificate()
    assert found.patches == 12 * (8 * 8 + 4 * 4)
    assert f"within {found.largest:.4g}" in caplog.text
    assert "certified_residual" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text(encoding="utf-8")
    residuals = residuals_of(model, datamodule)
    for residual, scale in zip(residuals, found.scales, strict=True):
        assert 0 <= float(residual.max()) <= scale.largest
        assert float(residual.mean()) <= scale.mean
    assert 0 < float(model.model.combine(residuals, (64, 64)).max()) <= found.largest
    assert 0 < sum(float(residual.mean()) for residual in residuals) <= found.mean
    restored = Sgfr.load_from_checkpoint(engine.best_model_path).certificate()
    assert (restored.largest, restored.mean, restored.patches) == (found.largest, found.mean, found.patches)


@pytest.mark.parametrize("route", ["checkpoint", "object"])
def test_new_images_are_added_to_a_fitted_model(route: str, parts: Path, tmp_path: Path) -> None:
    first = small(pre_processor=SMALL_IMAGES, bank_size=400)
    engine = fit(first, folder_datamodule(parts), tmp_path / "first")
    old_bank = atoms(first)
    new = folder_datamodule(others(tmp_path / "others"), mask_dir=None)
    if route == "checkpoint":
        model = small(pre_processor=SMALL_IMAGES, bank_size=400, update=True)
        Engine(default_root_dir=tmp_path / "second", accelerator="cpu").fit(
            model, datamodule=new, ckpt_path=engine.best_model_path
        )
    else:
        model = first
        model.update = True
        fit(model, new, tmp_path / "second")
    found = model.certificate()
    assert found.patches == (12 + 6) * (8 * 8 + 4 * 4)
    assert {Path(path).parents[1].name for path in model.model.images} == {parts.name, "others"}
    assert not torch.equal(atoms(model), old_bank)
    for data in (folder_datamodule(parts), new):  # the old images were not needed, and are not forgotten
        for residual, scale in zip(residuals_of(model, data), found.scales, strict=True):
            assert float(residual.max()) <= scale.largest


def test_an_update_takes_no_atom_for_what_is_rebuilt_already(datamodule: Folder, tmp_path: Path) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=700, tolerance=12.0)
    fit(model, datamodule, tmp_path / "first")
    before = [bank.atoms.clone() for bank in model.model.banks]
    assert len(before[0]) < 700
    assert model.certificate().largest <= 12.0 * (1 + 0.05)  # and what regularisation may add
    model.update = True
    fit(model, datamodule, tmp_path / "second")
    for bank, its_before in zip(model.model.banks, before, strict=True):
        assert {tuple(row) for row in bank.atoms.tolist()} == {tuple(row) for row in its_before.tolist()}


def test_an_update_without_a_fitted_model_says_so(datamodule: Folder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot add to an Sgfr that is not fitted"):
        fit(small(update=True), datamodule, tmp_path)


def test_a_tolerance_keeps_the_bank_small(parts: Path, tmp_path: Path) -> None:
    sizes = []
    for tolerance in (0.0, 12.0, 18.0):
        model = small(pre_processor=SMALL_IMAGES, bank_size=700, tolerance=tolerance)
        fit(model, folder_datamodule(parts), tmp_path)
        sizes.append(len(model.model.banks[0].atoms))
    assert sizes[0] == 700 > sizes[1] > sizes[2] >= 5
    with pytest.raises(ValueError, match="tolerance"):
        small(tolerance=-0.5)
