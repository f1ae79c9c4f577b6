"""The inspector gives the Engine's predictions, in the frame's own pixels."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.deploy import ExportType
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_sgfr import Inspection, Inspector, Monitor, ProductInspector, Sgfr
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, read_prepared
from anomalib_sgfr.inspector import choose_product
from tests.conftest import engine_in, fit, small, write_image

SIZES = {"square": (96, 96), "wide": (80, 200), "tall": (150, 70)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for index in range(8):
        write_image(folder / "good" / f"{index}.png", index, (96, 96))
    for index, (name, size) in enumerate(SIZES.items()):
        write_image(folder / "bad" / f"{name}.png", 50 + index, size, defect=True)
    return folder


@pytest.fixture(scope="module", params=["resize", "crop"])
def fitted(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sgfr, Path]:
    """A model and its checkpoint."""
    pre_processor: Any = Sgfr.configure_pre_processor((64, 64))
    if request.param == "crop":
        moved = [Resize(80, antialias=True), CenterCrop((64, 64)), Normalize([0.5] * 3, [0.3] * 3)]
        pre_processor = SgfrPreProcessor(Compose(moved))
    model = small(pre_processor=pre_processor)
    module = Folder("p", root=root, normal_dir="good", normal_test_dir="good", num_workers=0)
    engine = fit(model, module, tmp_path_factory.mktemp("fit"), limit_val_batches=0)
    return model, Path(str(engine.best_model_path))


def engines(model: Sgfr, path: Path, scratch: Path) -> Any:
    (batch,) = engine_in(scratch).predict(model, dataset=PredictDataset(path))
    return batch


@pytest.mark.parametrize("name", SIZES)
def test_predictions_are_those_of_the_engine(
    name: str, fitted: tuple[Sgfr, Path], root: Path, tmp_path: Path
) -> None:
    model, checkpoint = fitted
    inspector = Inspector.load(checkpoint)
    path = root / "bad" / f"{name}.png"
    expected = engines(model, path, tmp_path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        frames = (path, str(path), opened.convert("RGB"), pixels)
        found = [inspector(frame) for frame in frames]
    for each in found:
        assert isinstance(each, Inspection)
        assert each.score == pytest.approx(float(expected.pred_score), abs=1e-5)
        assert each.label == bool(expected.pred_label)
        assert each.map.shape == each.mask.shape == pixels.shape[:2]
        np.testing.assert_array_equal(each.map, found[0].map)
    # the peak is in the defect, in the frame's own pixels, unless that was cropped off
    truth = np.asarray(Image.open(root / "masks" / f"{name}.png")) > 0
    top, left, bottom, right = found[0].window
    if truth[top:bottom, left:right].sum() > 0.8 * truth.sum():
        assert truth[np.unravel_index(found[0].map.argmax(), found[0].map.shape)]
    outside = np.ones(pixels.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert not found[0].map[outside].any()
    assert not found[0].mask[outside].any()


def test_a_torch_file_is_the_same(fitted: tuple[Sgfr, Path], root: Path, tmp_path: Path) -> None:
    model, checkpoint = fitted
    exported = engine_in(tmp_path).export(model, ExportType.TORCH, export_root=tmp_path)
    path = root / "bad" / "wide.png"
    for one, other in zip(
        Inspector.load(exported)(path), Inspector.load(checkpoint)(path), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.ckpt", None, "no such file"),
        ("model.xyz", b"", r"must be a checkpoint \(.ckpt\) or an exported file"),
        ("model.ckpt", b"short", "is not a whole checkpoint"),
        ("model.xml", b"<a/>", r"model.bin' is not beside 'model.xml'"),
    ],
)
def test_files_that_cannot_be_loaded_are_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Inspector.load(tmp_path / name)


def test_other_exported_files_are_named(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError,
        match="is not a file that `anomalib export --export_type torch` wrote of an Sgfr",
    ):
        Inspector.load(tmp_path / "model.pt")
    import openvino as ov

    parameter = ov.opset8.parameter([1, 3, 8, 8])
    ov.save_model(ov.Model([ov.opset8.relu(parameter)], [parameter]), tmp_path / "model.xml")
    with pytest.raises(ValueError, match="is not an export of an anomalib model"):
        Inspector.load(tmp_path / "model.xml")
    with pytest.raises(ValueError, match=r"device must be one of CPU.*, got 'TPU'"):
        Inspector.load(tmp_path / "model.xml", device="tpu")
    (tmp_path / "model.xml").write_text("<a/>", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a model that OpenVINO can read"):
        Inspector.load(tmp_path / "model.xml")


def test_the_import_needs_no_torch() -> None:
    code = (
        "import anomalib_sgfr, sys; anomalib_sgfr.Inspector; assert not {'torch', 'anomalib'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_peak_is_in_the_frames_pixels(fitted: tuple[Sgfr, Path], root: Path) -> None:
    model, checkpoint = fitted
    path = root / "bad" / "wide.png"
    found = Inspector.load(checkpoint)(path)
    assert found.place is not None
    with torch.no_grad():
        maps = model.model.eval().score_maps(read_prepared(str(path), model.pre_processor)[None])
    row, column = maps.peak[0].tolist()
    top, left, bottom, right = found.window
    for at, of_map, first, last in (
        (found.place[0], row, top, bottom),
        (found.place[1], column, left, right),
    ):
        assert first <= at < last
        assert abs(at - (first + (of_map + 0.5) * (last - first) / 64)) <= 1


def test_several_frames_are_the_same_as_one_by_one(fitted: tuple[Sgfr, Path], root: Path) -> None:
    paths = [root / "bad" / f"{name}.png" for name in SIZES] + sorted((root / "good").iterdir())
    with Image.open(paths[0]) as opened:
        frames = [*paths, *map(str, paths), np.asarray(opened), opened.convert("L")]
    inspector = Inspector.load(fitted[1])
    one_by_one = [inspector(frame) for frame in frames]
    assert isinstance(one_by_one[0], Inspection)
    for several in (frames, tuple(frames), iter(frames), (frame for frame in frames)):
        found = inspector(several)
        assert isinstance(found, list)
        assert len(found) == len(frames) > 16  # more than a batch
        for one, other in zip(one_by_one, found, strict=True):
            assert (one.label, one.window, one.place) == (other.label, other.window, other.place)
            assert one.score == pytest.approx(other.score, abs=1e-5)
            np.testing.assert_allclose(one.map, other.map, atol=1e-5)
    assert inspector([]) == []
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        inspector([paths[0], root / "nowhere.png"])


def test_its_settings_are_those_of_the_model(fitted: tuple[Sgfr, Path], root: Path) -> None:
    model, checkpoint = fitted
    inspector = Inspector.load(checkpoint)
    assert inspector.size == (64, 64)
    assert inspector.bit_depth == 8
    assert inspector.threshold == pytest.approx(0.5)
    for path in [*(root / "bad").iterdir(), *(root / "good").iterdir()]:
        found = inspector(path)
        assert found.label == (found.score > inspector.threshold)
    model.post_processor.image_sensitivity = 0.7
    try:
        model.trainer.save_checkpoint(checkpoint.with_name("sensitive.ckpt"))
    finally:
        model.post_processor.image_sensitivity = 0.5
    assert Inspector.load(checkpoint.with_name("sensitive.ckpt")).threshold == pytest.approx(0.3)


def test_without_a_threshold_there_are_no_labels(root: Path, tmp_path: Path) -> None:
    model = small(image_size=64, post_processor=False)
    module = Folder("p", root=root, normal_dir="good", normal_test_dir="good", num_workers=0)
    engine = fit(model, module, tmp_path, limit_val_batches=0)
    inspector = Inspector.load(str(engine.best_model_path))
    found = inspector(root / "bad" / "wide.png")
    assert (inspector.threshold, found.label, found.mask) == (None, None, None)


def test_a_closed_inspector_is_refused(fitted: tuple[Sgfr, Path], root: Path) -> None:
    with Inspector.load(fitted[1]) as inspector:
        assert inspector(root / "bad" / "wide.png").score
    inspector.close()  # twice is no trouble
    for use in (
        lambda: inspector(root / "bad" / "wide.png"),
        lambda: inspector.threshold,
        lambda: inspector([]),
    ):
        with pytest.raises(RuntimeError, match="this Inspector is closed: load the model again"):
            use()


def test_one_inspector_serves_threads(fitted: tuple[Sgfr, Path], root: Path) -> None:
    inspector = Inspector.load(fitted[1])
    paths = sorted((root / "bad").iterdir()) + sorted((root / "good").iterdir())
    alone = [inspector(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: [inspector(path) for path in paths], range(16)):
            for one, other in zip(alone, found, strict=True):
                assert (one.score, one.label, one.place) == (other.score, other.label, other.place)
                np.testing.assert_array_equal(one.map, other.map)


def test_a_monitor_takes_every_score(fitted: tuple[Sgfr, Path], root: Path) -> None:
    model, checkpoint = fitted
    raw = np.linspace(1.0, 2.0, 40).tolist()
    processor = model.post_processor
    scores = [processor.reported_score(score) for score in raw]
    monitor = Monitor(scores, threshold=float(processor.image_threshold))
    inspector = Inspector.load(checkpoint, monitor=monitor)
    found = inspector([root / "bad" / "wide.png", np.zeros((70, 70, 3), np.uint8)])
    assert len(found) == monitor.images == 2
    expected = Monitor(scores)
    for each in found:
        expected.update(each.score)
    assert monitor.evidence == expected.evidence
    other = Monitor(scores, threshold=1.1 * float(processor.image_threshold))
    with pytest.raises(ValueError, match=r"the model's is .*: make it anew"):
        Inspector.load(checkpoint, monitor=other)


def test_a_checkpoints_monitor_has_its_calibration_scores(tmp_path: Path) -> None:
    for number in range(12, 17):
        write_image(tmp_path / "good" / f"{number}.png", number)
    model = small(seed=0, image_size=64)

    def fitted_to_all() -> str:
        module = Folder("p", root=tmp_path, normal_dir="good", num_workers=0)
        return str(fit(model, module, tmp_path / "fit").best_model_path)

    path = fitted_to_all()
    with pytest.raises(ValueError, match="4 calibration images of different parts are too few"):
        Monitor.of_checkpoint(path)
    for number in range(12):
        write_image(tmp_path / "good" / f"{number}.png", number)
    path = fitted_to_all()
    monitor = Monitor.of_checkpoint(path, defect_share=0.0)
    raw = model.post_processor.calibration_scores.scores
    expected = sorted(model.post_processor.reported_score(score) for score in raw)
    assert list(monitor.calibration) == pytest.approx(expected)
    assert (monitor.parts, monitor.defect_share) == (len(raw), 0.0)
    inspector = Inspector.load(path, monitor=monitor)
    inspector(sorted((tmp_path / "good").iterdir()))
    assert not monitor.reading.changed
    rng = np.random.default_rng(0)
    for _ in range(80):
        inspector(rng.integers(0, 255, (96, 96, 3), np.uint8))
    assert monitor.reading.changed
    assert monitor.reading.direction == "higher"


def stripes(path: Path, seed: int) -> None:
    """Write an image of another product: broad diagonal stripes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:96, :96]
    grey = 128 + 90 * np.sign(np.sin((rows + columns) / 9)) + rng.normal(0, 6, (96, 96))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB").save(path)


def test_products_are_told_apart(
    checkpoint: Path, parts: Path, tmp_path: Path, frame_of_noise: np.ndarray
) -> None:
    for number in range(8):
        stripes(tmp_path / "good" / f"{number}.png", number)
    module = Folder("p", root=tmp_path, normal_dir="good", normal_test_dir="good", num_workers=0)
    engine = fit(small(), module, tmp_path / "fit", limit_val_batches=0)
    paths = {"grids": checkpoint, "stripes": str(engine.best_model_path)}
    inspector = ProductInspector.load(paths)
    frames = [*sorted((parts / "good_test").iterdir()), *sorted((parts / "bad").iterdir())]
    found = inspector(frames)
    assert [each.product for each in found] == ["grids"] * len(frames)
    # the same batches: one image or several at once may differ in the last bit
    alone = Inspector.load(checkpoint)(frames)
    for expected, each in zip(alone, found, strict=True):
        assert (each.score, each.label, each.place) == (
            expected.score,
            expected.label,
            expected.place,
        )
        np.testing.assert_array_equal(each.map, expected.map)
    stripes(tmp_path / "new.png", 100)
    assert inspector(tmp_path / "new.png").product == "stripes"
    unknown = inspector(frame_of_noise)
    assert (unknown.product, unknown.label) == (None, True)
    # a monitor takes the scores of its own product, and no other
    monitor = Monitor.of_checkpoint(checkpoint)
    watched = ProductInspector(
        {
            "grids": Inspector.load(checkpoint, monitor=monitor),
            "stripes": Inspector.load(paths["stripes"]),
        }
    )
    watched(iter([frames[0], tmp_path / "new.png", frame_of_noise, frames[1]]))
    expected = Monitor.of_checkpoint(checkpoint)
    Inspector.load(checkpoint, monitor=expected)(frames[:2])
    assert monitor.images == 2
    assert monitor.evidence == pytest.approx(expected.evidence)
    # without the model of its product, a good frame is of none
    only = ProductInspector.load({"stripes": paths["stripes"]})
    assert only(frames[0]).product is None


@pytest.fixture
def frame_of_noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)


def test_a_product_is_that_of_the_map_with_the_least_median_inside() -> None:
    def inspection(value: float, score: float = 0.7) -> Inspection:
        inside = np.full((4, 4), value, np.float32)
        inside[0] = 0.99  # a defect
        outside = np.zeros((40, 4), np.float32)  # of the region of interest
        values = np.concatenate([inside, outside])
        return Inspection(score, label=True, map=values, mask=None, window=(0, 0, 44, 4))

    found = {"one": inspection(0.4), "two": inspection(0.3, 0.8), "three": inspection(0.6)}
    assert choose_product(found) == found["two"]._replace(product="two")
    assert choose_product({"three": found["three"]}).product is None
    nothing = found["one"]._replace(map=np.zeros((4, 4), np.float32))
    assert choose_product({"one": nothing}).product == "one"


def test_products_that_cannot_be_compared_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inspectors must hold the inspector of at least one"):
        ProductInspector({})
    model = small(image_size=64, post_processor=False)
    module = Folder("p", root=root, normal_dir="good", normal_test_dir="good", num_workers=0)
    engine = fit(model, module, tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match="the model of 'screws' has no threshold"):
        ProductInspector.load({"screws": str(engine.best_model_path)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ProductInspector, "inspectors must name each product.*a Inspector"),
        (lambda _: ProductInspector({"a": "m.ckpt"}), "of 'a' must be an Inspector, got 'm.ck"),
        (lambda _: ProductInspector.load(["m.ckpt"]), "paths must name each product.*a list"),
        (
            lambda found: Inspector(found._open_backend, "line.json"),
            "monitor must be a Monitor, got 'l",
        ),
    ],
)
def test_other_arguments_are_named(
    make: Callable[[Inspector], object], message: str, fitted: tuple[Sgfr, Path]
) -> None:
    with pytest.raises(TypeError, match=message):
        make(Inspector.load(fitted[1]))
