"""Images of a 12-bit camera, mixed sets and frames in memory, from fit to prediction."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_sgfr import Inspector, Sgfr, SgfrModel, explain
from anomalib_sgfr.cli.prediction import readable
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import nominal_scores
from anomalib_sgfr.report.crops import TrainingCrops
from tests.conftest import engine_in, fit, folder_datamodule, small

INPUT = (64, 64)


def frame(seed: int, *, defect: bool = False) -> NDArray[np.uint16]:
    """A part as a camera of 12 bits sees it: nearly all of it brighter than 8 bits can say."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]
    image = 1500 + 500 * np.sin(rows / 5) * np.cos(columns / 5) + rng.normal(0, 80, INPUT)
    if defect:
        row, column = rng.integers(16, 48, 2)
        image[(rows - row) ** 2 + (columns - column) ** 2 < 64] = 3900
    return image.astype(np.uint16)


def write(path: Path, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("camera")
    for index in range(10):
        write(root / "good" / f"{index}.png", frame(index))
    for index in range(4):
        write(root / "good_test" / f"{index}.tif", frame(100 + index))
        write(root / "bad" / f"{index}.tif", frame(200 + index, defect=True))
    return root


def data(root: Path, **overrides: Any) -> Folder:
    return folder_datamodule(root, mask_dir=None, **overrides)


def model_for(**arguments: Any) -> Sgfr:
    return small(
        **{"pre_processor": Sgfr.configure_pre_processor(INPUT), "bank_size": 100, **arguments}
    )


@pytest.fixture(scope="module")
def fitted(
    camera: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sgfr, Path, dict[str, float]]:
    """A model, its checkpoint, and its figures on test images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fitted")
    model = model_for(evaluator=True)
    engine = fit(model, data(camera), folder)
    (figures,) = engine.test(model, datamodule=data(camera))
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return model, folder / "model.ckpt", dict(figures)


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns a thousand times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 1000)
    yield
    sys.setswitchinterval(interval)


def engine_score(model: Sgfr, path: Path, folder: Path) -> float:
    (batch,) = engine_in(folder).predict(model, dataset=PredictDataset(path))
    return float(batch.pred_score)


def test_defects_in_images_of_12_bits_are_found(
    fitted: tuple[Sgfr, Path, dict[str, float]],
) -> None:
    model, _, figures = fitted
    assert model.model.bit_depth == 12
    assert figures["image_AUROC"] == pytest.approx(1.0)
    assert figures["image_F1Score"] == pytest.approx(1.0)


def test_it_learns_what_it_would_from_the_same_images_in_other_containers(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, tmp_path: Path
) -> None:
    model = fitted[0]
    path = camera / "bad" / "0.tif"
    values = np.asarray(Image.open(path))
    score = engine_score(model, path, tmp_path)
    head = b"P5 64 64 4095\n"
    (tmp_path / "same.pgm").write_bytes(head + values.astype(">u2").tobytes())
    Image.fromarray((values / 4095).astype(np.float32)).save(tmp_path / "same.tif")
    write(tmp_path / "plain.png", np.round(values / 4095 * 255).astype(np.uint8))
    assert engine_score(model, tmp_path / "same.pgm", tmp_path) == pytest.approx(score, abs=1e-5)
    assert engine_score(model, tmp_path / "same.tif", tmp_path) == pytest.approx(score, abs=1e-5)
    assert engine_score(model, tmp_path / "plain.png", tmp_path) == pytest.approx(
        score, abs=2e-2
    )  # of rounding


def test_every_tool_reads_the_same(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, tmp_path: Path
) -> None:
    model = fitted[0]
    path = camera / "bad" / "1.tif"
    score = engine_score(model, path, tmp_path)
    (raw,) = nominal_scores(model.model, model.pre_processor, [str(path)]).scores
    assert model.post_processor.raw_score(score) == pytest.approx(raw, rel=1e-4)
    damaged: dict[Path, str] = {}
    (batch,) = engine_in(tmp_path).predict(
        model, dataloaders=readable([path], damaged, model.model.bit_depth)
    )
    assert not damaged
    assert float(batch.pred_score) == pytest.approx(score, abs=1e-5)
    found = Inspector.load(fitted[1])(path)
    assert found.score == pytest.approx(score, abs=1e-5)
    assert Inspector.load(fitted[1])(np.array(Image.open(path))).score == pytest.approx(
        score, abs=1e-5
    )
    shown = TrainingCrops(model.model, model.pre_processor).read(str(camera / "good" / "0.png"))
    assert shown is not None
    np.testing.assert_allclose(shown[..., 0], frame(0) / 4095, atol=1e-5)


def test_the_depth_is_in_the_checkpoint(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, tmp_path: Path
) -> None:
    model, checkpoint, _ = fitted
    restored = Sgfr.load_from_checkpoint(checkpoint, visualizer=False, evaluator=False)
    assert restored.model.bit_depth == 12
    path = camera / "bad" / "0.tif"
    assert engine_score(restored, path, tmp_path) == pytest.approx(
        engine_score(model, path, tmp_path), abs=1e-6
    )
    (batch,) = engine_in(tmp_path).predict(
        model_for(), dataset=PredictDataset(path), ckpt_path=checkpoint
    )
    assert float(batch.pred_score) == pytest.approx(engine_score(model, path, tmp_path), abs=1e-6)
    with pytest.raises(
        ValueError, match=r"read with bit_depth 12, the model has 16: pass --model.bit_depth 12"
    ):
        Sgfr.load_from_checkpoint(checkpoint, visualizer=False, bit_depth=16)
    stored = torch.load(checkpoint, weights_only=False)
    assert stored.pop("sgfr_bit_depth") == 12
    torch.save(stored, tmp_path / "before.ckpt")  # of a version that read 8 bits alone
    assert (
        Sgfr.load_from_checkpoint(tmp_path / "before.ckpt", visualizer=False).model.bit_depth == 8
    )
    assert (
        Sgfr.load_from_checkpoint(
            tmp_path / "before.ckpt", visualizer=False, bit_depth=12
        ).model.bit_depth
        == 12
    )


def test_an_image_of_more_bits_is_refused_by_name(
    fitted: tuple[Sgfr, Path, dict[str, float]], tmp_path: Path
) -> None:
    write(tmp_path / "brighter.png", frame(0) * 8)
    with pytest.raises(
        ValueError, match=r"brighter.png holds values up to \d+, more than the 12 bits"
    ):
        engine_in(tmp_path).predict(fitted[0], dataset=PredictDataset(tmp_path))


WAYS: dict[str, Callable[[NDArray[np.uint16]], Any]] = {
    "grey": lambda values: values,
    "channels first": lambda values: np.repeat(values[None], 3, 0),
    "channels last": lambda values: np.repeat(values[..., None], 3, 2),
    "Pillow": Image.fromarray,
    "tensor of integers": lambda values: torch.from_numpy(values.astype(np.int32)),
    "tensor of one channel": lambda values: torch.from_numpy(values / np.float32(4095))[None],
    "batch of one channel": lambda values: torch.from_numpy(values / np.float32(4095))[None, None],
    "batch": lambda values: torch.from_numpy(values / np.float32(4095)).expand(1, 3, -1, -1),
    "batch of doubles": lambda values: torch.from_numpy(values / 4095).expand(1, 3, -1, -1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_frame_in_memory_scores_as_through_the_engine(
    way: str,
    training: bool,
    fitted: tuple[Sgfr, Path, dict[str, float]],
    camera: Path,
    tmp_path: Path,
) -> None:
    model = fitted[0]
    path = camera / "bad" / "2.tif"
    expected = engine_score(model, path, tmp_path)
    model.train(training)
    with torch.no_grad():
        found = model(WAYS[way](np.array(Image.open(path))))
    assert model.training is training
    assert float(found.pred_score) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "bad", [torch.rand(1, 3, 64, 64) * 255, torch.randn(3, 64, 64), torch.rand(2, 64, 64)]
)
def test_a_frame_that_cannot_be_right_is_refused(
    bad: torch.Tensor, fitted: tuple[Sgfr, Path, Any]
) -> None:
    with pytest.raises(ValueError, match=r"pass them between 0 and 1|an image has shape"):
        fitted[0](bad)
    with pytest.raises(RuntimeError, match="not fitted"):
        model_for()(torch.rand(1, 3, 64, 64))


def test_images_of_other_depths_in_one_set_are_each_read_right(tmp_path: Path) -> None:
    for index in range(5):
        write(tmp_path / "good" / f"{index}.png", frame(index))
        write(
            tmp_path / "good" / f"plain{index}.png",
            np.round(frame(10 + index) / 4095 * 255).astype(np.uint8),
        )
    write(tmp_path / "good_test" / "0.png", frame(100))
    write(tmp_path / "bad" / "0.png", frame(200, defect=True))
    model = model_for(trim=0.5)
    fit(model, data(tmp_path), tmp_path)
    assert model.model.bit_depth == 12
    raw = [score for _, score in model.suspects]
    assert max(raw) < 2.0 * min(raw)  # none of them is white


def test_a_failed_fit_leaves_the_depth_and_a_misread_set_is_refused_before_it_is_learnt(
    camera: Path, tmp_path: Path
) -> None:
    for index in range(3):
        write(tmp_path / "good" / f"{index}.png", np.minimum(frame(index), 255).astype(np.uint8))
    write(tmp_path / "good_test" / "0.png", frame(100))
    write(tmp_path / "bad" / "0.png", frame(200, defect=True))
    model = model_for()
    fit(model, data(camera), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"training images are nearly constant.*: 3 of 3: .*good/\d.png"
    ):
        fit(model, data(tmp_path), tmp_path)
    assert model.model.bit_depth == 12
    model.require_fitted("predict with")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_anomalib_would_do_to_images_of_high_bit_depth_is_refused(
    camera: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="leave out the augmentations"):
        fit(model_for(), data(camera, train_augmentations=RandomHorizontalFlip()), tmp_path)
    with pytest.raises(ValueError, match="synthetic anomalies with 8 bits"):
        fit(model_for(), data(camera, val_split_mode="synthetic"), tmp_path)


def test_a_depth_that_is_none_is_refused() -> None:
    for depth in (7, 17, 12.0):
        with pytest.raises(ValueError, match="bit_depth must be an integer from 8 to 16"):
            model_for(bit_depth=depth)


def test_a_loader_of_somebody_elses_is_read_too(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, tmp_path: Path
) -> None:
    model = fitted[0]
    dataset = PredictDataset(camera / "bad")
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)
    batches = engine_in(tmp_path).predict(model, dataloaders=[loader, loader])
    flat = [batch for part in batches for batch in (part if isinstance(part, list) else [part])]
    scores = torch.cat([batch.pred_score for batch in flat])
    assert torch.equal(scores[:4], scores[4:])
    assert float(scores[0]) == pytest.approx(
        engine_score(model, camera / "bad" / "0.tif", tmp_path), abs=1e-5
    )


def test_result_images_show_what_the_camera_saw(camera: Path, tmp_path: Path) -> None:
    for index in range(2):
        write(
            tmp_path / "parts" / "more" / f"{index}.png", (frame(300 + index) >> 4).astype(np.uint8)
        )
    module = data(camera, normal_test_dir=[camera / "good_test", tmp_path / "parts" / "more"])
    model = model_for(visualizer=True)
    engine = fit(model, module, tmp_path)
    engine.test(model, datamodule=module)
    drawn = {
        path.parent.name + "/" + path.name: path
        for path in tmp_path.rglob("images/**/*.*")
        if path.is_file()
    }
    assert len(drawn) == 10
    for name, source in (
        ("bad/0.tif", camera / "bad" / "0.tif"),
        ("good_test/1.tif", camera / "good_test" / "1.tif"),
    ):
        with Image.open(drawn[name]) as opened:
            shown = np.asarray(
                opened.convert("RGB").crop((0, 0, 256, 256)).resize(INPUT, Image.Resampling.BOX),
                float,
            )
        expected = np.asarray(Image.open(source), float) / 4095 * 255
        difference = np.abs(shown[20:, :, 0] - expected[20:])  # the name of the field stands above
        assert np.median(difference) < 6
    assert {str(path) for path in module.test_data.samples.image_path} >= {
        str(camera / "bad" / "0.tif")
    }


def test_a_loaded_model_scores_alike_from_eight_threads(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, often_switched: None
) -> None:
    del often_switched
    model = Sgfr.load_from_checkpoint(fitted[1], visualizer=False, evaluator=False)
    assert model.training  # as Lightning restores it
    paths = [
        str(path)
        for path in sorted((camera / "bad").iterdir()) + sorted((camera / "good_test").iterdir())
    ]
    expected = {path: float(model(path).pred_score) for path in paths}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: (path, float(model(path).pred_score)), paths * 12))
    assert len(set(expected.values())) == len(paths)
    assert {path: {score for name, score in found if name == path} for path in paths} == {
        path: {score} for path, score in expected.items()
    }
    assert model.training


def test_the_mode_is_nothing_that_a_score_follows_from(
    fitted: tuple[Sgfr, Path, dict[str, float]], camera: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = fitted[0], str(camera / "bad" / "0.tif")
    scores = [float(model.train(mode)(path).pred_score) for mode in (True, False)]
    assert scores[0] == scores[1]
    model.train()
    (raw,) = nominal_scores(model.model, model.pre_processor, [path]).scores
    assert model.model.training
    image = read_prepared(path, model.pre_processor, model.model.bit_depth)
    assert float(explain(model.model, image).score_map.max()) == pytest.approx(raw, rel=1e-4)
    for kind in (Sgfr, SgfrModel):  # nor does a call change it
        for name in ("train", "eval"):
            monkeypatch.setattr(kind, name, None)
    assert float(model(path).pred_score) == scores[0]
    assert nominal_scores(model.model, model.pre_processor, [path]).scores == [raw]
    assert float(explain(model.model, image).score_map.max()) == pytest.approx(raw, rel=1e-4)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_turned_images_are_learnt_scored_and_shown_upright(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    options = (
        {"lossless": True}
        if suffix == ".webp"
        else {"quality": 100, "subsampling": 0}
        if suffix == ".jpg"
        else {}
    )
    for kind, number, defect in (("good", 6, False), ("good_test", 1, False), ("bad", 1, True)):
        for index in range(number):
            values = (frame(100 * len(kind) + index, defect=defect)[:, :48] >> 4).astype(np.uint8)
            for folder, pixels, tag in (
                ("upright", values, None),
                ("turned", np.rot90(values), exif),
            ):
                path = tmp_path / folder / kind / f"{index}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).convert("RGB").save(
                    path, **({} if tag is None else {"exif": tag}), **options
                )
    models = {}
    for folder in ("upright", "turned"):
        torch.manual_seed(0)
        models[folder] = model_for(visualizer=True)
        module = data(tmp_path / folder, train_batch_size=6)
        engine = fit(models[folder], module, tmp_path / f"fit_{folder}")
        engine.test(models[folder], datamodule=module)
    close = 3e-2 if suffix == ".jpg" else 1e-5  # which is not the same when it is turned before
    for kind in ("good_test", "bad"):
        paths = [tmp_path / folder / kind / f"0{suffix}" for folder in ("upright", "turned")]
        scores = [
            engine_score(model, path, tmp_path) for path in paths for model in models.values()
        ]
        scores += [float(models["upright"](str(path)).pred_score) for path in paths]
        assert scores == pytest.approx([scores[0]] * 6, abs=close)
    shown = [
        np.asarray(
            Image.open(next((tmp_path / f"fit_{folder}").rglob(f"images/bad/0{suffix}"))).convert(
                "L"
            ),
            float,
        )
        for folder in models
    ]
    assert np.abs(shown[0] - shown[1]).mean() < 2


def test_a_mask_of_an_image_before_it_is_turned_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image, mask = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)
    mask[4:8, 4:8] = 255
    for kind, number in (("good", 2), ("good_test", 1), ("bad", 1)):
        for index in range(number):
            (tmp_path / kind).mkdir(exist_ok=True)
            noise = np.random.default_rng(index).integers(0, 255, image.shape, dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / kind / f"{index}.png", exif=exif)
    write(tmp_path / "masks" / "0.png", mask)
    with pytest.raises(
        ValueError,
        match=r"bad/0.png is turned .* to 48 x 32 pixels, its mask has 32 x 48: save both",
    ):
        fit(model_for(), folder_datamodule(tmp_path, eval_batch_size=1), tmp_path)


def test_what_a_folder_holds_beside_is_said(
    fitted: tuple[Sgfr, Path, dict[str, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(2):
        write(tmp_path / "in" / f"{index}.png", frame(index))
        Image.fromarray((frame(index) >> 4).astype(np.uint8)).save(tmp_path / "in" / f"{index}.gif")
    Image.fromarray((frame(9) >> 4).astype(np.uint8)).save(tmp_path / "in" / "0.jp2")
    batches = engine_in(tmp_path).predict(fitted[0], dataset=PredictDataset(tmp_path / "in"))
    assert len(batches) == 2
    assert "3 images are left out: 2 .gif, 1 .jp2" in caplog.text
