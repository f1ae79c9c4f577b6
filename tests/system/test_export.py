"""Exported models give the same answers, at any batch and image size, compressed or not."""

import copy
import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType
from PIL import Image

from anomalib_sgfr import Inspector, NominalPostProcessor, Sgfr
from anomalib_sgfr.core.chunks import number_of_parts
from anomalib_sgfr.core.patch_grid import to_patches
from anomalib_sgfr.core.self_expression import affine_distance
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, ThresholdState
from anomalib_sgfr.quantisation import compare_labels, float_operations, keeping_in_float
from anomalib_sgfr.training.reject import add_defects, find_defect
from tests.conftest import engine_in, folder_datamodule, small, stored_bytes, write_image

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_openvino.py"


@pytest.fixture(scope="module")
def exported(
    parts: Path,
    tmp_path_factory: pytest.TempPathFactory,
    traced_once: None,  # noqa: ARG001
) -> tuple[Sgfr, Path]:
    """A fitted model, and its export for any image size."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = Sgfr(
        bank_size=300,
        bit_depth=12,
        post_processor=NominalPostProcessor(0.1),
        visualizer=False,
        evaluator=False,
    )
    engine = engine_in(folder)
    engine.fit(model, datamodule=folder_datamodule(parts))
    path = engine.export(model, ExportType.OPENVINO, export_root=folder)
    assert path is not None
    return model, path


def test_images_of_any_size_score_as_through_the_engine(
    exported: tuple[Sgfr, Path], tmp_path: Path
) -> None:
    model, path = exported
    compiled = openvino.Core().compile_model(path, "CPU", F32)
    for number, size in enumerate([(256, 256), (300, 300), (640, 411), (97, 800)]):
        write_image(tmp_path / f"{number}.png", number, size, defect=True)
        image: np.ndarray = read_image(tmp_path / f"{number}.png")
        (batch,) = engine_in(tmp_path).predict(
            model, dataset=PredictDataset(tmp_path / f"{number}.png")
        )
        found = compiled(image.transpose(2, 0, 1)[None])
        reference = batch.anomaly_map.numpy()
        assert np.abs(found["anomaly_map"] - reference).max() <= 1e-3 * np.ptp(reference)
        np.testing.assert_allclose(
            found["pred_score"].ravel(), batch.pred_score.numpy().ravel(), atol=1e-3
        )
        assert bool(found["pred_label"].ravel()[0]) == bool(batch.pred_label)


_TWO = """
import os, signal, sys
from anomalib_sgfr import Inspector
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
first, second = (Inspector.load(sys.argv[1]) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGINT)
"""


def test_one_frame_is_answered_by_a_graph_of_known_shapes(
    exported: tuple[Sgfr, Path], parts: Path
) -> None:
    inspector = Inspector.load(exported[1])
    files = sorted((parts / "bad").iterdir())[:3]
    alone, together = [inspector(file) for file in files], inspector(files)
    for one, other in zip(alone, together, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert (one.label, one.place) == (other.label, other.place)
        np.testing.assert_allclose(one.map, other.map, atol=1e-6)
    one, several = (inspector._backend._models[number].compile() for number in (1, 16))
    assert one.input(0).partial_shape.is_static
    assert several.input(0).partial_shape[0].is_dynamic


@pytest.mark.slow
def test_an_export_knows_rejected_defects(exported: tuple[Sgfr, Path], tmp_path: Path) -> None:
    plain, _ = exported
    model = copy.deepcopy(plain)
    write_image(tmp_path / "defect.png", 0, (256, 256), defect=True)
    load_defect(model, tmp_path / "defect.png")
    # also of a size that the file has to resize
    path = model.to_openvino(tmp_path, input_size=(200, 300))
    compiled = openvino.Core().compile_model(path, "CPU", F32)
    for number in range(2):
        write_image(tmp_path / f"{number}.png", number, (200, 300), defect=True)
        image: np.ndarray = read_image(tmp_path / f"{number}.png")
        found, expected, before = (
            compiled(image.transpose(2, 0, 1)[None])["pred_score"].item(),
            float(model(image).pred_score),
            float(plain(image).pred_score),
        )
        assert found == pytest.approx(expected, abs=1e-3)
        assert expected > before + 0.01


def load_defect(model: Sgfr, image: Path) -> None:
    """Reject a whole image."""
    own = model.model.eval()
    prepared = read_prepared(str(image), model.pre_processor, own.bit_depth)
    region = torch.ones(prepared.shape[1:], dtype=torch.bool)
    defect = find_defect(own, prepared, f"2026-01-01 {image.name}", region)
    own.load_defects(add_defects(own.fitted_state, [defect], [0.1] * len(own.banks)))


@pytest.mark.slow
def test_parts_of_large_images_answer_as_the_whole(tmp_path: Path) -> None:
    """A third at a time, which the number of patches of no scale but the first is a multiple of."""
    size = (776, 504)
    for index in range(4):
        write_image(tmp_path / "good" / f"{index}.png", index, size)
        write_image(tmp_path / "bad" / f"{index}.png", 10 + index, size, defect=True)
    module = folder_datamodule(tmp_path, normal_test_dir=None, mask_dir=None, train_batch_size=2)
    model = small(bank_size=100, image_size=size)
    engine_in(tmp_path, limit_val_batches=0).fit(model, datamodule=module)
    load_defect(model, tmp_path / "bad" / "0.png")
    embeddings = model.model.embed(torch.zeros(1, 3, *size))
    numbers = [part.shape[2] * part.shape[3] for part in embeddings]
    assert number_of_parts(numbers) == 3
    assert any(number % 3 for number in numbers)

    path = model.to_openvino(tmp_path, input_size=size)
    images = np.stack([read_image(file) for file in sorted((tmp_path / "bad").iterdir())])
    found = openvino.Core().compile_model(path, "CPU", F32)(images.transpose(0, 3, 1, 2))
    for number, image in enumerate(images):
        expected = model(image)
        assert found["pred_score"][number] == pytest.approx(float(expected.pred_score), abs=1e-3)
        np.testing.assert_allclose(
            found["anomaly_map"][number], expected.anomaly_map[0].numpy(), atol=2e-3
        )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_after_two_inspectors_is_handled(exported: tuple[Sgfr, Path]) -> None:
    """OpenVINO's signal stack is that of a core which is still there."""
    done = subprocess.run(
        [sys.executable, "-c", _TWO, exported[1]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_a_file_compiled_as_openvino_chooses_labels_as_the_engine_does(
    exported: tuple[Sgfr, Path], parts: Path, tmp_path: Path
) -> None:
    model, path = exported
    compiled = openvino.Core().compile_model(path, "CPU")  # bfloat16 on a processor that has it
    files = [*sorted((parts / "good_test").iterdir()), *sorted((parts / "bad").iterdir())]
    labels = []
    for file in files:
        (batch,) = engine_in(tmp_path).predict(model, dataset=PredictDataset(file))
        found = compiled(read_image(file).transpose(2, 0, 1)[None])
        assert found["pred_score"].item() == pytest.approx(float(batch.pred_score), abs=0.005)
        labels.append((bool(found["pred_label"].item()), bool(batch.pred_label)))
    assert [by_file for by_file, _ in labels] == [by_engine for _, by_engine in labels]
    assert {by_engine for _, by_engine in labels} == {False, True}
    ran = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    convolutions = [about for about in ran if about["layerType"].astype(str) == "Convolution"]
    assert {about["runtimePrecision"].astype(str) for about in convolutions} == {"f32"}


def test_every_operation_of_a_file_keeps_its_precision(
    exported: tuple[Sgfr, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "saved.xml"
    openvino.save_model(
        openvino.Core().read_model(exported[1]), saved
    )  # as a reshape of the file is saved
    for file in (exported[1], saved):
        layers = [
            layer
            for layer in ET.parse(file).iter("layer")
            if layer.get("type") in {"Convolution", "MatMul"}
        ]
        assert len(layers) > 30
        for layer in layers:
            marks = {
                mark.get("name"): mark.get("value") for mark in layer.iterfind("rt_info/attribute")
            }
            assert set((marks["DisablePrecisionConversion"] or "").split(":")[-1].split(",")) == {
                "f16",
                "bf16",
            }


_FRAMES = """
import json, os, sys
import numpy as np
from anomalib_sgfr import Inspector

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

inspector = Inspector.load(sys.argv[1])
found = [inspector(path) for path in sys.argv[2:]]
rows = [[each.score, each.label, each.map.shape, float(each.map.max())] for each in found]
print(json.dumps(rows))
rng = np.random.default_rng(0)
for number in range(220):
    height, width = rng.integers(20, 400, 2)
    inspector(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if number == 60:
        before = resident()
print(resident() - before)
assert not {"torch", "anomalib", "torchvision"} & set(sys.modules)
"""


def test_frames_are_inspected_without_pytorch_in_bounded_memory(
    exported: tuple[Sgfr, Path], tmp_path: Path
) -> None:
    model, path = exported
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, size in enumerate([(256, 256), (640, 411), (97, 800)]):
        write_image(files[number], number, size, defect=number > 0)
    command = [sys.executable, "-c", _FRAMES, str(path), *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=EXAMPLE.parents[1]
    )
    assert done.returncode == 0, done.stderr
    frames, grown = map(json.loads, done.stdout.splitlines())
    for (score, label, shape, peak), file in zip(frames, files, strict=True):
        (batch,) = engine_in(tmp_path).predict(model, dataset=PredictDataset(file))
        assert score == pytest.approx(float(batch.pred_score), abs=1e-3)
        assert label == bool(batch.pred_label)
        assert tuple(shape) == read_image(file).shape[:2]
        assert peak == pytest.approx(
            float(batch.anomaly_map.max()), abs=0.02
        )  # where it is resized, it is less steep
    assert grown < 20  # MiB


class _Distance(torch.nn.Module):
    def __init__(self, bank: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bank", bank)

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return affine_distance(target, self.bank, 5, 0.01)


def test_equal_atoms_are_no_trouble_once_exported(tmp_path: Path) -> None:
    bank = torch.randn(20, 6)
    bank[:5] = bank[0]
    target = torch.cat((bank[:2], bank[7:9], torch.randn(3, 6)))
    module = _Distance(bank).eval()
    shapes = ({0: torch.export.Dim("n")},)
    torch.onnx.export(
        module, (target,), tmp_path / "distance.onnx", dynamo=True, dynamic_shapes=shapes
    )
    found = openvino.Core().compile_model(tmp_path / "distance.onnx", "CPU", F32)(target.numpy())[0]
    assert found[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found, module(target).numpy(), atol=1e-3)


def test_what_is_no_number_is_never_good(parts: Path, tmp_path: Path) -> None:
    model = small(image_size=64, layers=["blocks.1"])
    engine_in(tmp_path, limit_val_batches=0).fit(model, datamodule=folder_datamodule(parts))
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path, input_size=(64, 64)))
    names = [output.name for output in session.get_outputs()]
    image = (
        read_image(parts / "good" / "00.png")
        .astype(np.float32)
        .transpose(2, 0, 1)[None, :, :64, :64]
        / 255.0
    )
    labels = []
    for value in (0.5, np.nan, np.inf):
        image[:, :, 10:12, 10:12] = value
        found = dict(
            zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True)
        )
        labels.append(bool(found["pred_label"].all()))
        assert value == 0.5 or float(found["pred_score"].item()) == 1.0
    assert labels[1:] == [True, True]


def test_the_file_holds_backbone_and_bank_once(exported: tuple[Sgfr, Path]) -> None:
    model, path = exported
    backbone = sum(4 * tensor.numel() for tensor in model.model.embedder.extractor.parameters())
    bank = sum(4 * bank.solver.index_atoms.numel() for bank in model.model.banks)
    assert path.with_suffix(".bin").stat().st_size < 1.05 * (backbone + bank) + 200_000


@pytest.mark.parametrize(("backbone", "layer"), [("resnet18", "layer2"), ("test_vit", "blocks.2")])
def test_every_backbone_exports_with_a_free_batch(
    backbone: str, layer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = (160, 160) if "vit" in backbone else (96, 96)
    processor = Sgfr.configure_pre_processor(size, backbone)
    model = Sgfr(
        backbone,
        layers=[layer],
        score_layers=[layer],
        pre_trained=False,
        pre_processor=processor,
        post_processor=NominalPostProcessor(),
    )
    model.eval()
    with torch.no_grad():
        embeddings = model.model.embed(torch.randn(4, 3, *size))
    for bank, embedding in zip(model.model.banks, embeddings, strict=True):
        bank.set(to_patches(embedding)[::3][:200])
    model.post_processor.use(
        ThresholdState(CalibrationScores.of([1.0, 2.0], Split.HELD_OUT, ["", ""])).calibrated()
    )
    model._is_fitted = torch.tensor([True])
    with caplog.at_level(logging.WARNING):
        path = model.to_openvino(tmp_path, input_size=size)
    assert "Traceback" not in caplog.text
    assert path.with_suffix(".bin").stat().st_size < 1.05 * stored_bytes(model) + 500_000
    compiled = openvino.Core().compile_model(path, "CPU", F32)
    for batch in (1, 3):
        images = torch.rand(batch, 3, *size)
        with torch.no_grad():
            expected = model(images).anomaly_map.numpy()
        assert np.abs(compiled(images.numpy())["anomaly_map"] - expected).max() <= 1e-3 * np.ptp(
            expected
        )


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("compression", "size"),
    [
        pytest.param(CompressionType.FP16, (256, 256), marks=pytest.mark.slow),
        (CompressionType.INT8, None),
        pytest.param(CompressionType.INT8_PTQ, (256, 256), marks=pytest.mark.slow),
    ],
)
def test_compressed_files_still_tell_good_from_bad(
    compression: CompressionType,
    size: tuple[int, int] | None,
    exported: tuple[Sgfr, Path],
    parts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, path = exported
    with caplog.at_level(logging.INFO):
        small = engine_in(tmp_path).export(
            model,
            ExportType.OPENVINO,
            export_root=tmp_path,
            input_size=size,
            compression_type=compression,
            datamodule=folder_datamodule(parts),
        )
    assert small is not None
    assert "as OpenVINO computes it here: false alarms on 6 good images: " in caplog.text
    assert small.with_suffix(".bin").stat().st_size < 0.75 * path.with_suffix(".bin").stat().st_size
    whole, compressed = (openvino.Core().compile_model(file, "CPU", F32) for file in (path, small))
    scores = []
    for image_path in [
        *sorted((parts / "good_test").iterdir()),
        *sorted((parts / "bad").iterdir()),
    ]:
        image = (
            np.asarray(Image.open(image_path).convert("RGB").resize((256, 256)), np.float32) / 255.0
        )
        image = image.transpose(2, 0, 1)[None]
        scores.append([float(run(image)["pred_score"].ravel()[0]) for run in (whole, compressed)])
    table = np.array(scores)
    assert table[:6].max(0)[1] < table[6:].min(0)[1]
    np.testing.assert_allclose(table[:, 1], table[:, 0], atol=0.05)


def test_errors_of_a_file_are_counted_beside_the_models() -> None:
    truth, labels, exported = torch.tensor(
        [[0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]
    ).bool()
    words, difference = compare_labels(truth, labels, exported)
    assert (
        words
        == "false alarms on 4 good images: 2, the model 1; misses on 2 defective images: 2, the"
        " model 1"
    )
    assert difference == 0.5
    assert compare_labels(truth[:4], labels[:4], labels[:4])[1] == 0.0  # without a defect


@pytest.mark.parametrize(
    "compression", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ, "int8_ptq"]
)
def test_compression_that_needs_images_is_refused_before_the_conversion(
    compression: CompressionType,
    exported: tuple[Sgfr, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.onnx.export", None)  # what takes the time
    with pytest.raises(
        ValueError,
        match=r"compression INT8_\w+ is measured on images and there are none: pass --data",
    ):
        exported[0].to_openvino(tmp_path, compression_type=compression)
    assert not list(tmp_path.iterdir())


def test_what_follows_the_backbone_is_not_quantised(exported: tuple[Sgfr, Path]) -> None:
    import nncf

    network = openvino.Core().read_model(exported[1])
    kept = set(float_operations(network))
    kinds = {
        operation.get_friendly_name(): operation.get_type_name() for operation in network.get_ops()
    }
    assert sum(kinds[name] in {"Convolution", "GroupConvolution"} for name in kept) == 3
    pooling = {name for name, kind in kinds.items() if kind == "AvgPool"}
    assert len(pooling) == 4 * 4  # of each scale
    assert pooling <= kept
    order = [operation.get_friendly_name() for operation in network.get_ordered_ops()]
    first = min(order.index(name) for name, kind in kinds.items() if kind == "Convolution")
    resizing = {name for name in order[:first] if kinds[name] == "MatMul"}
    assert len(resizing) == 2
    assert resizing <= kept
    original = nncf.quantize
    with keeping_in_float(network):
        assert nncf.quantize is not original
    assert nncf.quantize is original


@pytest.mark.parametrize("fixed_size", [False, True])
def test_the_example_runs_without_pytorch(
    exported: tuple[Sgfr, Path], parts: Path, tmp_path: Path, fixed_size: bool
) -> None:
    path = exported[1]
    if fixed_size:
        network = openvino.Core().read_model(path)
        network.reshape([1, 3, 256, 256])
        path = tmp_path / "fixed.xml"
        openvino.save_model(network, path)
    folder = tmp_path / "images"
    for source in [*(parts / "bad").iterdir(), *(parts / "good_test").iterdir()]:
        target = folder / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "assert not {'torch', 'anomalib'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    command = (
        "import sys; sys.argv ="
        f" {[str(EXAMPLE), str(path), str(folder), '--out', str(tmp_path / 'out')]!r}\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # for the file that cannot be read
    assert "broken.png: cannot be read" in done.stderr
    assert "12 images in" in done.stdout
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert len(list((tmp_path / "out").rglob("*.png.png"))) == 12
    scores = {"bad": [], "good_test": []}  # type: ignore[var-annotated]
    for row in rows:
        scores[Path(row["image"]).parent.name].append(float(row["score"]))
    assert min(scores["bad"]) > max(scores["good_test"])


def test_tiles_and_region_are_in_every_exported_file(parts: Path, tmp_path: Path) -> None:
    size = 100  # no multiple of a stride
    inside = np.zeros((96, 96), np.uint8)
    inside[5:, :80] = 255
    Image.fromarray(inside).save(tmp_path / "roi.png")
    model = Sgfr(
        "test_resnet",
        layers=["layer2"],  # one to trace
        score_layers=["layer2"],
        pre_trained=False,
        bank_size=100,
        image_size=size,
        tile_size=64,
        tile_stride=32,
        roi=str(tmp_path / "roi.png"),
        post_processor=NominalPostProcessor(0.1),
        visualizer=False,
        evaluator=False,
    )
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(parts))
    (tmp_path / "roi.png").unlink()
    restored = Sgfr.load_from_checkpoint(engine.best_model_path)
    compiled = openvino.Core().compile_model(
        engine.export(restored, ExportType.OPENVINO, export_root=tmp_path), "CPU", F32
    )
    torch_file = engine.export(restored, ExportType.TORCH, export_root=tmp_path)
    assert torch_file is not None
    loaded = torch.load(torch_file, weights_only=False)["model"].eval()
    paths = [parts / "bad" / "00.png", parts / "good_test" / "00.png"]
    for path in paths:
        (batch,) = engine_in(tmp_path).predict(model, dataset=PredictDataset(path))
        image = torch.from_numpy(read_image(path).transpose(2, 0, 1)[None].copy()).float()
        with torch.no_grad():
            by_torch = loaded(image)
        by_file = compiled(image.numpy())
        reference = batch.anomaly_map.numpy()
        for found in (np.asarray(by_torch.anomaly_map), by_file["anomaly_map"]):
            assert np.abs(found - reference).max() <= 1e-3 * np.ptp(reference)
        np.testing.assert_allclose(
            by_file["pred_score"].ravel(), batch.pred_score.numpy().ravel(), atol=1e-3
        )
        assert reference[..., int(size * 0.9) :].max() == 0.0
    both = torch.stack(
        [torch.from_numpy(read_image(path).transpose(2, 0, 1).copy()) for path in paths]
    )
    assert compiled(both.numpy())["anomaly_map"].shape == (2, 1, size, size)  # with a free batch


def run_example(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(folder: Path) -> dict[str, float]:
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return {Path(row["image"]).name: float(row["score"]) for row in csv.DictReader(file)}


def test_the_example_scores_deep_pictures_as_the_engine_does_and_leaves_its_own_output_alone(
    exported: tuple[Sgfr, Path], parts: Path, tmp_path: Path
) -> None:
    model, path = exported
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        values = np.asarray(Image.open(parts / "bad" / f"{number:02}.png").convert("L")).astype(
            np.uint16
        )
        Image.fromarray(values * 16 + 7).save(folder / f"{number}.png")
        Image.fromarray(values * 16 + 7).save(folder / f"{number}.tif")
    Image.fromarray(np.full((64, 64), 5000, np.uint16)).save(folder / "bright.png")
    for _ in range(2):  # the second run finds the first one's heatmaps
        done = run_example(path, folder, "--out", folder / "heatmaps")
        assert done.returncode == 1
        assert "4 images in" in done.stdout
        told = [
            line for line in done.stderr.splitlines() if not line.startswith("warning: ")
        ]  # of few images
        assert len(told) == 1
        assert (
            f"{folder / 'bright.png'}: cannot be read: it holds values up to 5000, more than the 12"
            " bits" in done.stderr
        )
    (folder / "bright.png").unlink()
    batches = engine_in(tmp_path).predict(model, dataset=PredictDataset(folder))
    engine = {
        Path(file).name: float(score)
        for one in batches
        for file, score in zip(one.image_path, one.pred_score, strict=True)
    }
    found = table(folder / "heatmaps")
    assert found == pytest.approx(
        {name: engine[name] for name in ("0.png", "0.tif", "1.png", "1.tif")}, abs=1e-3
    )
    assert Inspector.load(path)(folder / "0.png").score == pytest.approx(engine["0.png"], abs=1e-3)
    alone = run_example(path, folder / "0.png", "--out", tmp_path / "alone", "--device", "cpu")
    assert alone.returncode == 0, alone.stderr
    assert table(tmp_path / "alone") == pytest.approx({"0.png": engine["0.png"]}, abs=1e-3)


def test_the_example_says_in_one_line_what_is_wrong(
    exported: tuple[Sgfr, Path], parts: Path, tmp_path: Path
) -> None:
    path = exported[1]
    lonely = tmp_path / "lonely.xml"
    lonely.write_bytes(path.read_bytes())
    for suffix in ("xml", "bin"):
        (tmp_path / f"text.{suffix}").write_text("no model")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for arguments, words in [
        ((path, tmp_path / "nowhere"), "nowhere: no such file or folder"),
        ((path, tmp_path / "empty"), "no images in it"),
        ((tmp_path / "no.xml", parts), "no.xml: no such file"),
        ((lonely, parts), "lonely.bin: no such file"),
        ((tmp_path / "text.xml", parts), "not a model that OpenVINO can read"),
        ((path, parts, "--out", tmp_path / "file"), "is a file, and has to be a folder"),
        ((path, parts, "--device", "abacus"), "there is CPU"),
    ]:
        done = run_example(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert words in done.stderr
