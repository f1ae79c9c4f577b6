"""Layers of equal weight: factors from the first images, kept with the bank."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder

from anomalib_sgfr import Sgfr
from tests.conftest import fit, folder_datamodule, small


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_layers_count_alike_however_images_are_batched(batch: int, parts: Path, tmp_path: Path) -> None:
    model, plain = small(bank_size=20_000, equal_layers=True), small(bank_size=20_000)
    for each in (model, plain):  # every patch is an atom
        fit(each, folder_datamodule(parts, train_batch_size=batch), tmp_path)
    assert plain.model.scale.numel() == 0
    assert model.model.scale.shape == (152,)
    fine, coarse = plain.model.bank.var(0, correction=0).split([40, 112])
    ratio = float((coarse.sum() / fine.sum()).sqrt())
    assert not 0.9 < ratio < 1.1  # they do differ
    assert float(model.model.scale[0] / model.model.scale[-1]) == pytest.approx(ratio, rel=1e-3)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            model.model.embed(images), plain.model.embed(images) * model.model.scale[:, None, None]
        )
    spread = [part.sum() for part in model.model.bank.var(0, correction=0).split([40, 112])]
    torch.testing.assert_close(*spread, rtol=1e-3, atol=0.0)


def test_the_scale_is_of_the_first_images(datamodule: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_sgfr.callbacks._SCALED_BY", 6)  # of 12, in batches of 4
    seen: list[torch.Tensor] = []
    model = small(bank_size=20_000, equal_layers=True)
    new_scale = model.new_scale
    monkeypatch.setattr(model, "new_scale", lambda features: [seen.append(features), new_scale(features)][1])
    fit(model, datamodule, tmp_path)
    assert [len(features) for features in seen] == [8 * 32 * 32]  # once, and of whole batches
    assert model.certificate().patches == 12 * 32 * 32  # those that waited are not lost, nor seen twice
    assert {tuple(row) for row in (seen[0][::997] * model.model.scale).tolist()} <= {
        tuple(row) for row in model.model.bank.tolist()
    }


def test_a_checkpoint_keeps_the_scale_of_its_bank(datamodule: Folder, tmp_path: Path) -> None:
    model = small(equal_layers=True)
    path = fit(model, datamodule, tmp_path).best_model_path
    restored = Sgfr.load_from_checkpoint(path, equal_layers=False)  # what a fit would do, not what was done
    assert torch.equal(restored.model.scale, model.model.scale)
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(
            *(each.eval().model(images).anomaly_map for each in (restored, model)), rtol=0, atol=0
        )
