"""Explanations: regions, contributions and where these come from."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from matplotlib.figure import Figure
from torch.nn import functional

from anomalib_sgfr import Inspector, NominalPostProcessor, Sgfr
from anomalib_sgfr.cli.explain import main
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    ThresholdState,
    nominal_scores,
)
from anomalib_sgfr.report.crops import TrainingCrops, displayable
from anomalib_sgfr.report.explanation import explain
from anomalib_sgfr.report.figure import ExplanationFigure, draw, save
from tests.conftest import fit, folder_datamodule, small, write_image

STRIDES = (8, 8, 16, 32)  # of the grids of each scale


@pytest.fixture(scope="module", params=["affine", "omp", "ridge"])
def fitted(
    request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Sgfr:
    model = Sgfr(solver=request.param, bank_size=200, visualizer=False, evaluator=False)
    Engine(
        default_root_dir=tmp_path_factory.mktemp("fit"), logger=False, accelerator="cpu", devices=1
    ).fit(model, datamodule=folder_datamodule(parts))
    return model


def image_of(model: Sgfr, path: Path) -> torch.Tensor:
    from anomalib.data.utils import read_image

    return model.pre_processor.transform(read_image(path, as_tensor=True))


def test_every_atom_names_a_training_image_and_a_place_in_it(fitted: Sgfr) -> None:
    images = fitted.model.images
    assert {Path(path).parent.name for path in images} == {"good"}
    for scale, bank in enumerate(fitted.model.banks):
        assert bank.origin.shape == (len(bank.atoms), 5)
        for atom in range(0, len(bank.origin), 37):
            number, row, column, *_ = bank.origin[atom].tolist()
            with torch.no_grad():
                embeddings = fitted.model.eval().embed(image_of(fitted, Path(images[number]))[None])
            # an atom is the mean of what it stands for, and that patch is a part of it
            distance = (embeddings[scale][0, :, row, column] - bank.atoms[atom]).norm()
            assert float(distance) <= float(bank.radius[atom]) + 1e-3


def test_an_atom_that_stands_for_one_patch_is_that_patch(parts: Path, tmp_path: Path) -> None:
    pre_processor = Sgfr.configure_pre_processor((64, 64))
    model = small(bank_size=5000, pre_processor=pre_processor)
    fit(model, folder_datamodule(parts), tmp_path)
    assert [len(bank.atoms) for bank in model.model.banks] == [
        12 * 64,
        12 * 64,
        12 * 16,
        12 * 4,
    ]  # all of them
    for scale, bank in enumerate(model.model.banks):
        for atom in range(0, len(bank.atoms), 97):
            number, row, column, *_ = bank.origin[atom].tolist()
            with torch.no_grad():
                embeddings = model.model.eval().embed(
                    image_of(model, Path(model.model.images[number]))[None]
                )
            torch.testing.assert_close(
                embeddings[scale][0, :, row, column], bank.atoms[atom], atol=1e-3, rtol=1e-3
            )


def test_contributions_rebuild_the_patch(fitted: Sgfr, parts: Path) -> None:
    image = image_of(fitted, parts / "bad" / "00.png")
    found = explain(fitted.model, image, regions=4)
    assert len(found.regions) == 4
    assert found.regions[0].score == pytest.approx(float(found.score_map.max()), rel=1e-6)
    with torch.no_grad():
        maps = fitted.model.eval().score_maps(image[None])
    assert torch.equal(found.anomaly_map, maps.anomaly_map[0, 0])
    row, column = maps.peak[0].tolist()
    assert (found.regions[0].row, found.regions[0].column) == (
        row // 8,
        column // 8,
    )  # what raised the score
    scores = [region.score for region in found.regions]
    assert scores == sorted(scores, reverse=True)
    with torch.no_grad():
        embeddings = fitted.model.eval().embed(image[None])
    certificate = fitted.certificate()
    for region in found.regions:
        assert [part.scale for part in region.reconstructions] == [0, 1, 2, 3]
        assert [part.weight for part in region.reconstructions] == [0.25, 1.0, 1.0, 1.0]
        assert region.residual == pytest.approx(
            sum(part.weight * part.residual for part in region.reconstructions)
        )
        for part in region.reconstructions:
            bank = fitted.model.banks[part.scale]
            times = STRIDES[part.scale] // 8
            assert (part.row, part.column, part.grid) == (
                region.row // times,
                region.column // times,
                (32 // times, 32 // times),
            )
            left = float(found.residuals[part.scale][part.row, part.column])
            assert part.residual == pytest.approx(left, rel=1e-5)
            assert part.residual > 0
            assert (
                0
                < part.nominal
                <= part.nominal_largest
                <= certificate.scales[part.scale].largest * (1 + 1e-6)
            )
            if bank.solver_name == "ridge":
                continue  # shows the largest only
            mixture = sum(
                share.coefficient * bank.atoms[share.atom] for share in part.contributions
            )
            left = float(
                (embeddings[part.scale][0, :, part.row, part.column] - mixture).norm()
                / bank.residual_scale
            )
            assert part.residual == pytest.approx(left, rel=1e-3)
    places = [(region.row, region.column) for region in found.regions]
    for number, (row, column) in enumerate(places):
        assert all(
            max(abs(row - other), abs(column - another)) >= 6 for other, another in places[:number]
        )


@pytest.mark.parametrize("gone", [False, True])
def test_the_figure_is_drawn_with_and_without_the_training_images(
    fitted: Sgfr, parts: Path, tmp_path: Path, gone: bool
) -> None:
    if gone:  # as if the folder had been moved
        encoded = "\0".join(
            str(tmp_path / "gone" / Path(path).name) for path in fitted.model.images
        ).encode()
        images, fitted.model.image_paths = (
            fitted.model.image_paths,
            torch.tensor(list(encoded), dtype=torch.uint8),
        )
    try:
        figure = draw(
            fitted.model,
            fitted.pre_processor,
            image_of(fitted, parts / "bad" / "01.png"),
            title="a part",
        )
    finally:
        if gone:
            fitted.model.image_paths = images
    assert isinstance(figure, Figure)
    texts = [
        text.get_text() for part in figure.subfigs for axis in part.axes for text in axis.texts
    ]
    assert ("image\nis gone" in texts) == gone
    save(figure, tmp_path / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_one_command_and_the_callback_draw_a_folder(parts: Path, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path / "fit", logger=False, accelerator="cpu", devices=1)
    engine.fit(Sgfr(bank_size=100, visualizer=False), datamodule=folder_datamodule(parts))
    checkpoint = engine.best_model_path
    assert (
        main([str(parts / "bad"), "--ckpt_path", checkpoint, "--out", str(tmp_path / "figures")])
        == 0
    )
    assert len(list((tmp_path / "figures" / "bad").glob("*.png"))) == 6
    with (tmp_path / "figures" / "scores.csv").open(encoding="utf-8") as opened:
        lines = list(csv.DictReader(opened))
    inspector = Inspector.load(checkpoint)
    assert len(lines) == 6
    for line in lines:
        assert (int(line["row"]), int(line["column"])) == inspector(line["image"]).place
    # equal names in nested folders, in any order of the arguments
    for name in ("l1/good/00.png", "l2/good/00.png", "l2/good/00.bmp", "l2/01.png"):
        write_image(tmp_path / "lines" / name, 0)
    for number, given in enumerate(
        (
            ["--ckpt_path", checkpoint, "lines"],
            [checkpoint, "lines"],
            ["lines/l1", "lines/l2", checkpoint],
        )
    ):
        out = tmp_path / f"out{number}"
        paths = [
            part if part.startswith("-") or part == checkpoint else str(tmp_path / part)
            for part in given
        ]
        assert main([*paths, "--regions", "1", "--out", str(out)]) == 0
        assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == {
            "l1/good/00.png",
            "l2/good/00.png.png",
            "l2/good/00.bmp.png",
            "l2/01.png",
        }
    with pytest.raises(ValueError, match="regions must be at least 1"):
        ExplanationFigure(regions=0)


@pytest.fixture(scope="module")
def wide(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Sgfr:
    """Fitted to images wider than high, so that rows and columns cannot be confused."""
    model = small(bank_size=5000, pre_processor=Sgfr.configure_pre_processor((64, 96)))
    fit(model, folder_datamodule(parts), tmp_path_factory.mktemp("wide"))
    return model


def test_rows_are_rows_and_columns_are_columns(wide: Sgfr, parts: Path) -> None:
    images = {path: image_of(wide, Path(path)) for path in wide.model.images}
    for scale, (bank, stride) in enumerate(zip(wide.model.banks, STRIDES, strict=True)):
        assert bank.origin[:, 3:].unique(dim=0).tolist() == [[64 // stride, 96 // stride]]
        assert int(bank.origin[:, 2].max()) == 96 // stride - 1
        for atom in range(0, len(bank.atoms), 101):
            number, row, column, *_ = bank.origin[atom].tolist()
            with torch.no_grad():
                embeddings = wide.model.eval().embed(images[wide.model.images[number]][None])
            torch.testing.assert_close(
                embeddings[scale][0, :, row, column], bank.atoms[atom], atol=1e-3, rtol=1e-3
            )
    image = image_of(wide, parts / "good_test" / "00.png").clone()
    image[:, 8:24, 72:88] = 4.0  # rows 1 and 2, columns 9 and 10 of the finest patches
    found = explain(wide.model, image, regions=1)
    assert found.anomaly_map.shape == (64, 96)
    assert [tuple(residual.shape) for residual in found.residuals] == [
        (8, 12),
        (8, 12),
        (4, 6),
        (2, 3),
    ]
    (region,) = found.regions
    assert 0 <= region.row <= 3
    assert 8 <= region.column <= 11
    for part in region.reconstructions:
        assert part.grid == (64 // STRIDES[part.scale], 96 // STRIDES[part.scale])
        assert part.residual == pytest.approx(
            float(found.residuals[part.scale][part.row, part.column])
        )
        for share in part.contributions:
            assert share.grid == part.grid
            assert 0 <= share.row < part.grid[0]
            assert 0 <= share.column < part.grid[1]


def test_a_crop_is_of_the_place_it_says(wide: Sgfr) -> None:
    crops = TrainingCrops(wide.model, wide.pre_processor)
    for scale, (bank, side) in enumerate(zip(wide.model.banks, STRIDES, strict=True)):
        for atom in range(0, len(bank.atoms), 211):
            number, row, column, *_ = bank.origin[atom].tolist()
            shown = displayable(wide.pre_processor, image_of(wide, Path(wide.model.images[number])))
            middle = shown[row * side : (row + 1) * side, column * side : (column + 1) * side]
            found = crops.original(scale, atom)
            assert found is not None
            assert found.shape == (5 * side, 5 * side, 3)
            np.testing.assert_array_equal(found[2 * side : 3 * side, 2 * side : 3 * side], middle)


def test_what_cannot_be_explained_is_refused() -> None:
    model = Sgfr()
    with pytest.raises(RuntimeError, match="has no bank"):
        explain(model.model, torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"image must have shape \(3, H, W\)"):
        explain(model.model, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="regions must be at least 1"):
        explain(model.model, torch.zeros(3, 64, 64), regions=0)


def test_thumbnails_stand_in_for_training_images_that_are_gone(parts: Path, tmp_path: Path) -> None:
    images = tmp_path / "moved"
    shutil.copytree(parts, images)
    model = Sgfr(bank_size=60, thumbnails=True, visualizer=False, evaluator=False)
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", devices=1)
    engine.fit(model, datamodule=folder_datamodule(images))
    model = Sgfr.load_from_checkpoint(engine.best_model_path, map_location="cpu")
    originals = TrainingCrops(model.model, model.pre_processor)
    before = [[originals.crop(scale, atom) for atom in range(60)] for scale in range(4)]
    shapes = [crops[0].shape for crops in before if crops[0] is not None]
    assert shapes == [(5 * stride, 5 * stride, 3) for stride in STRIDES]
    shutil.rmtree(images)
    left = TrainingCrops(model.model, model.pre_processor)
    for scale, bank in enumerate(model.model.banks):
        assert bank.thumbnails.shape == (60, 24, 24, 3)
        for atom in range(60):
            assert left.original(scale, atom) is None
            pixels = torch.from_numpy(np.ascontiguousarray(before[scale][atom])).permute(2, 0, 1)[
                None
            ]
            expected = functional.interpolate(pixels, (24, 24), mode="bilinear", antialias=True)[
                0
            ].permute(1, 2, 0)
            np.testing.assert_allclose(left.crop(scale, atom), expected.numpy(), atol=1 / 255)
        assert len(bank.thumbnails.flatten(1).unique(dim=0)) > 50  # each its own


def test_trimming_suspects_the_defective_and_drops_their_atoms(parts: Path, tmp_path: Path) -> None:
    images = tmp_path / "mixed"
    shutil.copytree(parts, images)
    for number in (0, 1):
        shutil.move(images / "bad" / f"{number:02}.png", images / "good" / f"defective{number}.png")
        (images / "masks" / f"{number:02}.png").unlink()
    model = Sgfr(bank_size=300, trim=0.14, visualizer=False, evaluator=False)
    engine = Engine(default_root_dir=tmp_path / "run", logger=False, accelerator="cpu", devices=1)
    engine.fit(model, datamodule=folder_datamodule(images))
    assert {Path(path).stem for path, _ in model.suspects} == {"defective0", "defective1"}
    assert not any("defective" in path for path in model.model.images)
    (table,) = (tmp_path / "run").rglob("suspects.csv")
    assert "defective0.png" in table.read_text(encoding="utf-8")
    assert model.certificate().patches == 14 * (2 * 1024 + 256 + 64)
    # neither does the threshold know them: it is that of the ten good images
    calibrated = small(bank_size=300, trim=0.14, post_processor=NominalPostProcessor(0.1))
    fit(calibrated, folder_datamodule(images), tmp_path / "calibrated")
    good = [str(path) for path in sorted((images / "good").glob("[0-9]*.png"))]
    expected = NominalPostProcessor(0.1)
    scores, peaks = nominal_scores(calibrated.model, calibrated.pre_processor, good)
    scored = CalibrationScores.of(scores, Split.TRAINING, good, peaks)
    expected.use(ThresholdState(scored, false_alarm_rate=0.1).calibrated())
    assert calibrated.post_processor.image_threshold == expected.image_threshold
    assert calibrated.post_processor.pixel_threshold == expected.pixel_threshold
    with pytest.raises(ValueError, match=r"trim must lie between 0 and 0\.5"):
        Sgfr(trim=0.7)
