"""A model fitted to images of any shape answers alike in Engine, Inspector and a new process."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_sgfr import Inspector, Sgfr
from tests.conftest import engine_in, folder_datamodule, small, write_image

SHAPES = {
    "square": [(96, 96)],
    "tall": [(200, 80)],
    "wide": [(60, 240)],
    "nearly square": [(104, 96)],
    "several": [(200, 80), (80, 200), (96, 96)],
}
SIZES = {
    "square": ((128, 128), None),
    "tall": ((160, 96), None),
    "wide": ((64, 256), None),
    "nearly square": ((128, 128), None),
    "several": ((128, 128), (128, 32)),
}


def folder_of(root: Path, shapes: list[tuple[int, int]]) -> Path:
    for index in range(12):
        write_image(root / "good" / f"{index:02}.png", index, shapes[index % len(shapes)])
    for index in range(6):
        shape = shapes[index % len(shapes)]
        write_image(root / "good_test" / f"{index:02}.png", 100 + index, shape)
        write_image(root / "bad" / f"{index:02}.png", 200 + index, shape, defect=True)
    return root


def answers(model: Sgfr, root: Path, folder: Path, **options: object) -> dict[str, tuple]:
    datamodule = folder_datamodule(root)
    batches = engine_in(folder).predict(model, datamodule=datamodule, **options)
    assert (datamodule.train_batch_size, datamodule.eval_batch_size) == (4, 4)
    return {
        path: (float(score), bool(label), anomaly_map.numpy(), mask.numpy())
        for batch in batches
        for path, score, label, anomaly_map, mask in zip(
            batch.image_path,
            batch.pred_score,
            batch.pred_label,
            batch.anomaly_map,
            batch.pred_mask,
            strict=True,
        )
    }


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("shape")
    root = folder_of(folder / "data", SHAPES[request.param])
    model, engine = small(seed=0), engine_in(folder / "run")
    engine.fit(model, datamodule=folder_datamodule(root))
    return request.param, root, model, Path(engine.best_model_path)


def test_all_tools_answer_alike(case: tuple, tmp_path: Path) -> None:
    name, root, model, checkpoint = case
    size, rule = SIZES[name]
    assert (tuple(model.pre_processor.resize.size), model.pre_processor.resize.rule) == (size, rule)
    found = answers(model, root, tmp_path)
    # a model that knows nothing of the images, whose data module is set up before the checkpoint
    restored = answers(small(image_size=None), root, tmp_path, ckpt_path=checkpoint)
    inspector = Inspector.load(checkpoint)
    assert inspector.size == (None if rule else size)
    for path, (score, label, anomaly_map, mask) in found.items():
        again = restored[path]
        assert again[:2] == (score, label)
        assert np.array_equal(again[2], anomaly_map)
        assert np.array_equal(again[3], mask)
        inspected = inspector(path)
        assert inspected.score == pytest.approx(score, abs=1e-6)
        assert inspected.label == label
        with Image.open(path) as image:
            assert inspected.map.shape == inspected.mask.shape == image.size[::-1]
        expected = (128, 128) if size == (128, 128) else size
        if rule is None:
            assert anomaly_map.shape[-2:] == expected


def test_a_square_set_is_scored_as_before(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["nearly square"])
    scores = []
    for image_size in (128, (128, 128)):
        model = small(seed=0, image_size=image_size)
        engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
        scores.append([found[:1] for found in answers(model, root, tmp_path).values()])
    assert scores[0] == scores[1]


def test_tiles_of_images_of_several_aspect_ratios(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["several"])
    model, engine = small(seed=0, tile_size=64, tile_stride=32), engine_in(tmp_path / "run")
    engine.fit(model, datamodule=folder_datamodule(root))
    found = answers(model, root, tmp_path)
    assert len({anomaly_map.shape for _, _, anomaly_map, _ in found.values()}) == 3
    inspector = Inspector.load(engine.best_model_path)
    for path, (score, label, _, _) in found.items():
        inspected = inspector(path)
        assert (inspected.score, inspected.label) == (pytest.approx(score, abs=1e-6), label)


def test_the_size_may_be_fixed(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model = small(image_size="square", bank_size=50, layers=["blocks.1"])
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(root))
    assert model.pre_processor.resize.size == [256, 256]
    assert model.trained_aspect is None
    checkpoint = engine.best_model_path
    assert Sgfr.load_from_checkpoint(checkpoint, image_size=256).pre_processor.resize.size == [
        256,
        256,
    ]
    with pytest.raises(ValueError, match="image_size of 256 x 256, 320 x 320 is asked for"):
        Sgfr.load_from_checkpoint(checkpoint, image_size=320)


def test_another_size_than_the_checkpoints_is_refused(case: tuple) -> None:
    name, _, _, checkpoint = case
    size, rule = SIZES[name]
    assert Sgfr.load_from_checkpoint(checkpoint, image_size=128).pre_processor.resize.rule == rule
    its = "128, each image in its own" if rule else " x ".join(map(str, size))
    with pytest.raises(ValueError, match=f"image_size of {its}.*256 x 256 is asked for"):
        Sgfr.load_from_checkpoint(checkpoint, image_size=256)
    if size != (128, 128) or rule:
        for asked in ("square", (128, 128)):
            with pytest.raises(ValueError, match=f"image_size of {its}.* is asked for"):
                Sgfr.load_from_checkpoint(checkpoint, image_size=asked)


def test_a_later_fit_chooses_anew_and_a_failed_one_changes_nothing(
    case: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, root, _, checkpoint = case
    model = Sgfr.load_from_checkpoint(checkpoint, visualizer=False, evaluator=False)
    before = answers(model, root, tmp_path)
    other = folder_of(tmp_path / "other", [(80, 160)])
    with monkeypatch.context() as patch:
        patch.setattr("anomalib_sgfr.training.fit.build_banks", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine_in(tmp_path).fit(model, datamodule=folder_datamodule(other))
    size, rule = SIZES[name]
    assert (tuple(model.pre_processor.resize.size), model.pre_processor.resize.rule) == (size, rule)
    after = answers(model, root, tmp_path)
    assert all(after[path][0] == found[0] for path, found in before.items())
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(other))
    assert (model.pre_processor.resize.size, model.pre_processor.resize.rule) == ([96, 160], None)


def test_where_only_the_square_has_so_few_pixels_images_have_no_common_aspect(
    tmp_path: Path,
) -> None:
    root = folder_of(tmp_path / "data", SHAPES["several"])
    model = small(image_size=96)
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
    assert (model.pre_processor.resize.size, model.pre_processor.resize.rule) == ([96, 96], None)
    assert model.trained_aspect is None


def test_an_update_keeps_the_size_and_what_the_images_were(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model = small()
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(root))
    assert model.pre_processor.resize.size == [160, 96]
    assert model.trained_aspect == pytest.approx(2.5)
    updated = Sgfr.load_from_checkpoint(engine.best_model_path, update=True, visualizer=False)
    other = folder_of(tmp_path / "other", SHAPES["wide"])
    engine_in(tmp_path).fit(updated, datamodule=folder_datamodule(other))
    assert updated.pre_processor.resize.size == [160, 96]
    assert updated.trained_aspect == pytest.approx(2.5)


def test_a_region_of_interest_gives_the_size(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["several"])
    mask = np.zeros((200, 80), np.uint8)
    mask[40:160, 10:70] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    model = small(roi=str(tmp_path / "roi.png"))
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
    assert (model.pre_processor.resize.size, model.pre_processor.resize.rule) == ([160, 96], None)
    assert model.model.region.shape == (160, 96)


@pytest.mark.parametrize("arguments", [{}, {"image_size": (96, 96)}])
def test_a_region_of_interest_of_another_shape_is_refused(
    arguments: dict[str, object], tmp_path: Path
) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    Image.new("L", (80, 80), 255).save(tmp_path / "roi.png")
    model = small(roi=str(tmp_path / "roi.png"), **arguments)
    with pytest.raises(ValueError, match=r"roi\.png' has 80 x 80 pixels .* paint it on one"):
        engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))


def test_a_backbone_of_one_size_keeps_it(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model = Sgfr(
        "swin_tiny_patch4_window7_224",
        layers=["layers.0"],
        bank_size=20,
        pre_trained=False,
        visualizer=False,
        evaluator=False,
    )
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
    assert model.pre_processor.resize.size == [224, 224]


def test_an_image_of_another_shape_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model, engine = small(), engine_in(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(root))
    write_image(tmp_path / "wide" / "0.png", 0, (80, 160))
    with caplog.at_level(logging.WARNING):
        (batch,) = engine_in(tmp_path).predict(model, data_path=tmp_path / "wide")
    assert batch.anomaly_map.shape[-2:] == (160, 96)
    (said,) = [
        record.message for record in caplog.records if "another aspect ratio" in record.message
    ]
    assert "0.png" in said
    assert "2.50" in said
    caplog.clear()
    engine_in(tmp_path).predict(model, data_path=root / "good")
    assert "another aspect ratio" not in caplog.text


def test_a_mask_of_another_shape_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model, engine = small(), engine_in(tmp_path)
    masks = tmp_path / "masks"
    masks.mkdir()
    for image in (root / "bad").iterdir():
        Image.new("L", (80, 200), 255).save(masks / image.name)
    data = {"mask_dir": masks}
    engine.fit(model, datamodule=folder_datamodule(root, **data))
    for size, times in (((40, 100), 0), ((60, 60), 1)):
        Image.new("L", size, 255).save(masks / "00.png")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            engine_in(tmp_path).test(model, datamodule=folder_datamodule(root, **data))
        assert caplog.text.count("00.png' has 60 x 60 pixels (height x width), its image") == times


def test_images_are_drawn_in_their_aspect_ratio(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["tall"])
    model = small(visualizer=True, image_size=(160, 96))
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
    engine_in(tmp_path / "run").predict(model, data_path=root / "bad" / "00.png")
    (drawn,) = (tmp_path / "run").rglob("00.png")
    with Image.open(drawn) as image:
        width, height = image.size
    assert height == round(256 * 160 / 96)
    assert width % 256 == 0
    assert width > 256


def test_a_batch_that_was_stretched_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", SHAPES["several"])
    model = small()
    engine_in(tmp_path).fit(model, datamodule=folder_datamodule(root))
    datamodule = folder_datamodule(root)
    datamodule.setup()
    with pytest.raises(ValueError, match="use a batch size of 1, or fit with image_size 'square'"):
        engine_in(tmp_path).predict(model, dataloaders=datamodule.test_dataloader())
    assert torch.isfinite(model.model.banks[0].atoms).all()
