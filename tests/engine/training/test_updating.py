"""The bank over a model's life: its certificate, new images later, and when it is large enough."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch.loggers import CSVLogger

from anomalib_sgfr import Sgfr, SubspaceSampler
from anomalib_sgfr.training.fit import bank_sizes, build_samplers
from tests.conftest import atoms, fit, folder_datamodule, small, write_image

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))
PATCHES = 2 * 8 * 8 + 4 * 4 + 2 * 2  # of such an image, over all scales


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
        return model.model.score_maps(torch.cat(images)).residuals


def test_the_certificate_is_in_the_log_the_loggers_and_the_checkpoint(
    datamodule: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(pre_processor=SMALL_IMAGES)
    with caplog.at_level("INFO", logger="anomalib_sgfr"):
        engine = fit(model, datamodule, tmp_path, logger=CSVLogger(tmp_path))
    found = model.certificate()
    assert found.patches == 12 * PATCHES
    assert f"within {found.largest:.4g}" in caplog.text
    assert "certified_residual" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text(
        encoding="utf-8"
    )
    residuals = residuals_of(model, datamodule)
    for residual, scale in zip(residuals, found.scales, strict=True):
        assert 0 <= float(residual.max()) <= scale.largest
        assert float(residual.mean()) <= scale.mean
    found_maps = model.model.anomaly_map_generator(residuals, (64, 64), torch.empty(0))
    assert 0 < float(found_maps.anomaly_map.max()) <= found.largest
    assert 0 < float(found_maps.score_map.max()) <= found.largest_score
    assert 0 < float(found_maps.anomaly_map.mean()) <= found.mean
    restored = Sgfr.load_from_checkpoint(engine.best_model_path).certificate()
    assert (restored.largest, restored.mean, restored.patches) == (
        found.largest,
        found.mean,
        found.patches,
    )


@pytest.mark.parametrize("route", ["checkpoint", "object"])
def test_new_images_are_added_to_a_fitted_model(route: str, parts: Path, tmp_path: Path) -> None:
    first = small(pre_processor=SMALL_IMAGES, bank_size=400)
    engine = fit(first, folder_datamodule(parts), tmp_path / "first")
    old_bank = atoms(first)
    measures = [float(bank.residual_scale) for bank in first.model.banks]
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
    assert found.patches == (12 + 6) * PATCHES
    assert {Path(path).parents[1].name for path in model.model.images} == {parts.name, "others"}
    assert not torch.equal(atoms(model), old_bank)
    assert [
        float(bank.residual_scale) for bank in model.model.banks
    ] == measures  # scores of before keep their meaning
    for data in (
        folder_datamodule(parts),
        new,
    ):  # the old images were not needed, and are not forgotten
        for residual, scale in zip(residuals_of(model, data), found.scales, strict=True):
            assert float(residual.max()) <= scale.largest


def test_an_update_takes_no_atom_for_what_is_rebuilt_already(
    datamodule: Folder, tmp_path: Path
) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=700, tolerance=12.0)
    fit(model, datamodule, tmp_path / "first")
    before = [bank.atoms.clone() for bank in model.model.banks]
    assert len(before[0]) < 700
    bounds = zip(model.certificate().scales, model.model.banks, strict=True)
    # and what regularisation may add
    assert sum(scale.largest * float(bank.residual_scale) for scale, bank in bounds) <= 12.0 * (
        1 + 0.05
    )
    model.update = True
    fit(model, datamodule, tmp_path / "second")
    for bank, its_before in zip(model.model.banks, before, strict=True):
        assert {tuple(row) for row in bank.atoms.tolist()} == {
            tuple(row) for row in its_before.tolist()
        }


@pytest.mark.parametrize("bank_size", [60, 700])
def test_a_full_bank_keeps_only_a_part_of_its_atoms_and_one_with_room_all(
    bank_size: int, parts: Path, tmp_path: Path
) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=bank_size)
    earlier, later = (
        folder_datamodule(parts),
        folder_datamodule(others(tmp_path / "others"), mask_dir=None),
    )
    fit(model, earlier, tmp_path / "first")
    before = [{tuple(row) for row in bank.atoms.tolist()} for bank in model.model.banks]
    was = residuals_of(model, earlier)
    model.update = True
    fit(model, later, tmp_path / "second")
    after = [{tuple(row) for row in bank.atoms.tolist()} for bank in model.model.banks]
    stayed = [len(old & new) / len(old) for old, new in zip(before, after, strict=True)]
    full = [len(new) == bank_size for new in after]
    assert full == ([True] * 4 if bank_size == 60 else [True, True, False, False])
    for share, had_no_room in zip(stayed, full, strict=True):
        assert 0.0 < share < 1.0 if had_no_room else share == 1.0, stayed
    # what is left of the earlier images grows where atoms went, and stays below what is certified
    now = residuals_of(model, earlier)
    for old, new, had_no_room, scale in zip(
        was, now, full, model.certificate().scales, strict=True
    ):
        if had_no_room:
            assert float(new.mean()) > float(old.mean())
        else:
            assert float(new.mean()) == pytest.approx(float(old.mean()), rel=1e-3)
        assert float(new.max()) <= scale.largest


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


def test_a_resumed_sampler_goes_on_from_the_threshold(datamodule: Folder, tmp_path: Path) -> None:
    """A new atom lies farther than the earlier bank's threshold from all of its atoms."""
    model = small(pre_processor=SMALL_IMAGES, bank_size=60)
    fit(model, datamodule, tmp_path / "first")
    thresholds = [bank.state.threshold for bank in model.model.banks]
    assert (
        min(thresholds[:3]) > 0 == thresholds[3]
    )  # of the last there are fewer patches than atoms
    model.update = True
    samplers = model_samplers(model)
    assert [sampler.threshold_ for sampler in samplers] == thresholds
    assert [sampler.patches_seen_ for sampler in samplers] == [12 * 64, 12 * 64, 12 * 16, 12 * 4]
    before = [bank.atoms for bank in model.model.banks]
    fit(model, folder_datamodule(others(tmp_path / "others"), mask_dir=None), tmp_path / "second")
    for bank, old, threshold in zip(model.model.banks, before, thresholds, strict=True):
        new = [row for row in bank.atoms if not bool((old == row).all(1).any())]
        assert new
        assert float(torch.cdist(torch.stack(new), old).min()) > threshold * (
            1 - 1e-3
        )  # but for 16 bits
        assert bank.state.threshold >= threshold


def model_samplers(model: Sgfr) -> list[SubspaceSampler]:
    sizes = bank_sizes(model.model.embedder.scales, model.bank_size)
    return build_samplers(model.model.banks, sizes, model.tolerance, model.update, global_rank=0)


def test_all_processes_but_the_first_count_nothing_twice(
    datamodule: Folder, tmp_path: Path
) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=60, tolerance=3.0)
    fit(model, datamodule, tmp_path)
    first, second = (
        build_samplers(model.model.banks, [60] * 4, 3.0, update=True, global_rank=rank)
        for rank in (0, 1)
    )
    for mine, theirs, bank in zip(first, second, model.model.banks, strict=True):
        assert mine.tolerance == theirs.tolerance == 0.75
        assert torch.equal(mine.bank(), theirs.bank())
        assert (mine.patches_seen_, theirs.patches_seen_) == (int(bank.count.sum()), 0)
        assert float(theirs.clusters().squares.sum()) == 0.0
        assert torch.equal(theirs.clusters().radius.sort().values, bank.radius.sort().values)
    assert all(
        sampler.atoms_held == 0
        for sampler in build_samplers(model.model.banks, [60] * 4, 3.0, update=False, global_rank=0)
    )


def test_an_update_at_another_size_leaves_the_crops_of_earlier_atoms(
    datamodule: Folder, tmp_path: Path
) -> None:
    """Origins count the patches of the image they are of, not of the latest one."""
    model = small(pre_processor=Sgfr.configure_pre_processor((64, 96)), bank_size=300)
    fit(model, datamodule, tmp_path / "first")
    places = [
        {
            tuple(atom): tuple(origin)
            for atom, origin in zip(bank.atoms.tolist(), bank.origin.tolist(), strict=True)
        }
        for bank in model.model.banks
    ]
    assert {origin[3:] for origin in places[0].values()} == {(8, 12)}
    model.update = True
    model.pre_processor.transform = Sgfr.configure_pre_processor((128, 80)).transform
    fit(model, folder_datamodule(others(tmp_path / "others"), mask_dir=None), tmp_path / "second")
    for scale, (bank, stride) in enumerate(zip(model.model.banks, (8, 8, 16, 32), strict=True)):
        grids = {tuple(origin[3:]) for origin in bank.origin.tolist()}
        assert grids == {(64 // stride, 96 // stride), (128 // stride, math.ceil(80 / stride))}
        stayed = 0
        for atom, origin in zip(bank.atoms.tolist(), bank.origin.tolist(), strict=True):
            if tuple(atom) in places[scale]:
                stayed += 1
                assert tuple(origin[1:]) == places[scale][tuple(atom)][1:]
            assert 0 <= origin[1] < origin[3]
            assert 0 <= origin[2] < origin[4]
        assert stayed > 10


def test_an_update_keeps_the_thumbnails_of_atoms_that_stay(parts: Path, tmp_path: Path) -> None:
    images = tmp_path / "earlier"
    shutil.copytree(parts, images)
    model = small(pre_processor=SMALL_IMAGES, bank_size=300, thumbnails=True, tolerance=4.0)
    fit(model, folder_datamodule(images), tmp_path / "first")
    before = [
        dict(zip(map(tuple, bank.atoms.tolist()), bank.thumbnails.clone(), strict=True))
        for bank in model.model.banks
    ]
    shutil.rmtree(images)  # their thumbnails can only come from the bank now
    model.update = True
    fit(model, folder_datamodule(others(tmp_path / "others"), mask_dir=None), tmp_path / "second")
    for bank, known in zip(model.model.banks, before, strict=True):
        stayed = 0
        for atom, thumbnail in zip(bank.atoms.tolist(), bank.thumbnails, strict=True):
            assert not bool((thumbnail == 128).all()), "grey: lost"
            if tuple(atom) in known:
                stayed += 1
                assert torch.equal(thumbnail, known[tuple(atom)])
        assert 10 < stayed < len(bank.atoms)
