"""An export of a model that keeps each image's aspect ratio, run on images of any shape."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer

from anomalib_sgfr import Inspector, Sgfr
from anomalib_sgfr.images.frame_geometry import aspect_bounds, size_of_aspect
from tests.conftest import engine_in, folder_datamodule, small, write_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_openvino.py"
SHAPES = [(96, 96), (200, 80), (80, 200), (60, 300), (401, 333)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, Path, Path]:
    """A fitted model, its images, and the folder of its exports to ONNX and OpenVINO."""
    folder = tmp_path_factory.mktemp("aspect")
    for index in range(12):
        write_image(folder / "good" / f"{index:02}.png", index, SHAPES[index % 3])
    for index in range(6):
        write_image(folder / "good_test" / f"{index:02}.png", 100 + index, SHAPES[index % 3])
        write_image(folder / "bad" / f"{index:02}.png", 200 + index, SHAPES[index % 3], defect=True)
    model, engine = small(seed=0, layers=["blocks.1", "blocks.2"]), engine_in(folder)
    engine.fit(model, datamodule=folder_datamodule(folder))
    assert model.pre_processor.resize.rule is not None
    for kind in (ExportType.ONNX, ExportType.OPENVINO):
        engine.export(model, kind, export_root=folder)
    return model, folder, folder / "weights"


def test_each_runtime_answers_as_the_model(
    exported: tuple[Sgfr, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib's inferencer makes a cache here
    model, _, weights = exported
    onnx = onnxruntime.InferenceSession(weights / "onnx" / "model.onnx")
    names = [output.name for output in onnx.get_outputs()]
    compiled = openvino.Core().compile_model(
        weights / "openvino" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    inspectors = [
        Inspector.load(weights / file) for file in ("onnx/model.onnx", "openvino/model.xml")
    ]
    inferencer = OpenVINOInferencer(weights / "openvino" / "model.xml")
    for number, shape in enumerate(SHAPES):
        path = tmp_path / f"{number}.png"
        write_image(path, number, shape, defect=True)
        image = read_image(path, as_tensor=True)[None]
        expected = model(image)
        scale = float(np.ptp(expected.anomaly_map.numpy()))
        answers = [
            dict(zip(names, onnx.run(None, {"input": image.numpy()}), strict=True)),
            {output.any_name: compiled(image.numpy())[output] for output in compiled.outputs},
        ]
        for found in answers:
            np.testing.assert_allclose(
                found["anomaly_map"], expected.anomaly_map, atol=1e-3 * scale
            )
            np.testing.assert_allclose(found["pred_score"], expected.pred_score, atol=1e-3)
            assert np.array_equal(found["pred_label"], expected.pred_label)
        for inspector in inspectors:
            inspected = inspector(path)
            assert inspected.score == pytest.approx(float(expected.pred_score), abs=1e-3)
            assert inspected.map.shape == shape
            assert inspector.size is None
        # in bfloat16 on a processor that has it
        assert np.ravel(inferencer.predict(path).pred_score).item() == pytest.approx(
            float(expected.pred_score), abs=0.005
        )


def test_images_at_a_bound_of_aspect_ratios_get_the_model_s_size_in_any_precision(
    exported: tuple[Sgfr, Path, Path],
) -> None:
    model, _, weights = exported
    rule = model.pre_processor.resize.rule
    # in bfloat16 on a processor that has it, where 371 is no number
    compiled = openvino.Core().compile_model(weights / "openvino" / "model.xml", "CPU")
    tried = set()
    for heights, widths in aspect_bounds(*rule)[2:-2]:
        width = 371
        height = int(width * heights / widths)
        for shape in ((height, width), (height + 1, width)):
            found = compiled(np.zeros((1, 3, *shape), np.float32))["anomaly_map"]
            assert found.shape[-2:] == size_of_aspect(*shape, *rule), shape
            tried.add(found.shape)
    assert len(tried) > 4


def test_a_batch_of_one_shape_is_scored_at_once(exported: tuple[Sgfr, Path, Path]) -> None:
    model, folder, weights = exported
    onnx = onnxruntime.InferenceSession(weights / "onnx" / "model.onnx")
    images = np.stack(
        [read_image(folder / "bad" / f"{i:02}.png", as_tensor=True).numpy() for i in (1, 4)]
    )
    (scores, *_) = onnx.run(["pred_score"], {"input": images})
    for image, score in zip(images, scores, strict=True):
        assert float(model(image.transpose(1, 2, 0)).pred_score) == pytest.approx(score, abs=1e-3)


def test_the_example_finds_the_peak_in_the_images_own_pixels(
    exported: tuple[Sgfr, Path, Path], tmp_path: Path
) -> None:
    _, _, weights = exported
    for number, shape in enumerate(SHAPES):
        write_image(tmp_path / "asked" / f"{number}.png", number, shape, defect=True)
    file = weights / "openvino" / "model.xml"
    given = [sys.executable, EXAMPLE, file, tmp_path / "asked", "--out", tmp_path / "out"]
    subprocess.run(list(map(str, given)), check=True)
    inspector = Inspector.load(file)
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == len(SHAPES)
    for row in rows:
        found = inspector(row["image"])
        assert float(row["score"]) == pytest.approx(found.score, abs=1e-3)
        assert bool(int(row["label"])) == found.label
        assert (int(row["row"]), int(row["column"])) == found.place


@pytest.mark.slow
def test_a_file_of_one_size_and_a_compressed_one_answer_alike(
    exported: tuple[Sgfr, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder, _ = exported
    engine = engine_in(tmp_path)
    path = engine.export(
        model, ExportType.ONNX, export_root=tmp_path / "fixed", input_size=(200, 80)
    )
    assert "The file takes images of 200 x 80 pixels (height x width). Others" in caplog.text
    file = folder / "bad" / "01.png"
    image = read_image(file, as_tensor=True)[None].numpy()
    (score,) = onnxruntime.InferenceSession(path).run(["pred_score"], {"input": image})
    expected = float(model(read_image(file)).pred_score)
    assert float(score.item()) == pytest.approx(expected, abs=1e-3)
    quantised = engine.export(
        model,
        ExportType.OPENVINO,
        export_root=tmp_path / "int8",
        compression_type=CompressionType.INT8_PTQ,
        datamodule=folder_datamodule(folder),
    )
    inspector = Inspector.load(quantised)
    for name in ("good_test/00.png", "good_test/01.png", "bad/01.png", "bad/02.png"):
        found, its = inspector(folder / name), model(read_image(folder / name))
        assert found.label == bool(its.pred_label)
        assert found.score == pytest.approx(float(its.pred_score), abs=0.1)
