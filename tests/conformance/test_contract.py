"""The contract that anomalib holds its own models to, held for Sgfr through its Engine and
inferencers.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model, list_models

from anomalib_sgfr import Sgfr
from tests.conftest import folder_datamodule, stored_bytes


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, Engine]:
    torch.manual_seed(0)
    model = get_model("sgfr")
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("trained"), accelerator="cpu")
    # validated one image at a time, as prediction scores them: the image that sets the threshold
    # then scores it exactly
    engine.train(model, datamodule=folder_datamodule(parts, eval_batch_size=1))
    return model, engine


def another(root: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", **arguments)  # type: ignore[arg-type]


def test_it_is_listed() -> None:
    assert "sgfr" in list_models()
    assert isinstance(get_model("Sgfr", bank_size=10), Sgfr)


def test_fit_and_test_find_the_blobs(
    trained: tuple[Sgfr, Engine], datamodule: Folder, tmp_path: Path
) -> None:
    model, engine = trained
    (metrics,) = another(tmp_path).test(model, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.9
    assert Path(engine.best_model_path).is_file()


def test_train_from_its_checkpoint(
    trained: tuple[Sgfr, Engine], datamodule: Folder, tmp_path: Path
) -> None:
    (metrics,) = another(tmp_path).train(
        Sgfr(), datamodule=datamodule, ckpt_path=trained[1].best_model_path
    )
    assert metrics["image_AUROC"] == 1.0


def test_validate_from_its_checkpoint(
    trained: tuple[Sgfr, Engine], datamodule: Folder, tmp_path: Path
) -> None:
    another(tmp_path).validate(Sgfr(), datamodule=datamodule, ckpt_path=trained[1].best_model_path)


def test_predict_gives_scores_labels_maps_and_masks(
    trained: tuple[Sgfr, Engine], parts: Path, tmp_path: Path
) -> None:
    engine = another(tmp_path)
    batches = engine.predict(
        Sgfr(), dataset=PredictDataset(parts / "bad"), ckpt_path=trained[1].best_model_path
    )
    assert len(batches) == 6
    for batch in batches:
        assert isinstance(batch, ImageBatch)
        assert batch.anomaly_map.shape == batch.pred_mask.shape == (1, 256, 256)
        assert 0.5 <= float(batch.pred_score) <= 1.0
    # anomalib's threshold is the lowest score that separates the classes, and its label a strict
    # comparison with it
    assert sum(bool(batch.pred_label) for batch in batches) >= 5


def test_visualizer_writes_pictures(trained: tuple[Sgfr, Engine]) -> None:
    folder = Path(trained[1].trainer.default_root_dir)
    assert len(list(folder.rglob("*.png"))) == 12


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("export_type", [ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO])
def test_export_agrees_with_the_model(
    export_type: ExportType,
    trained: tuple[Sgfr, Engine],
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, engine = trained
    path = another(tmp_path).export(
        Sgfr(), export_type, export_root=tmp_path, ckpt_path=engine.best_model_path
    )
    assert "Traceback" not in caplog.text
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    inferencer = (
        TorchInferencer(path, device="cpu")
        if export_type == ExportType.TORCH
        else OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"})
    )
    scored = another(tmp_path, logger=False).predict(model, dataset=PredictDataset(parts / "bad"))
    # the defective image with the least score is anomalib's threshold itself: rounding alone
    # decides its label
    ranked = sorted(scored, key=lambda batch: float(batch.pred_score))[1:]
    for image in [batch.image_path[0] for batch in ranked] + sorted((parts / "good").iterdir())[:2]:
        exported = inferencer.predict(image)
        (batch,) = another(tmp_path, logger=False).predict(model, dataset=PredictDataset(image))
        # images are smaller than the model's input, so that resizing is the same with and without
        # antialiasing
        np.testing.assert_allclose(
            np.squeeze(exported.anomaly_map), batch.anomaly_map.squeeze().numpy(), atol=1e-3
        )
        np.testing.assert_allclose(
            np.squeeze(exported.pred_score), batch.pred_score.numpy().item(), atol=1e-3
        )
        assert bool(np.squeeze(exported.pred_label)) == bool(batch.pred_label)


@pytest.mark.parametrize("solver", ["omp", "ridge"])
def test_every_solver_exports_with_a_free_batch(solver: str, parts: Path, tmp_path: Path) -> None:
    import openvino

    layers = {"layers": ["layer1"], "score_layers": ["layer1"]}  # fewer to trace
    model = Sgfr(
        "test_resnet", **layers, pre_trained=False, solver=solver, bank_size=50, visualizer=False
    )
    engine = another(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(parts))
    path = engine.export(model, ExportType.OPENVINO, export_root=tmp_path)
    assert path.with_suffix(".bin").stat().st_size < 1.05 * stored_bytes(model) + 500_000
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model.eval()
    paths = sorted((parts / "bad").iterdir())[:2] + sorted((parts / "good_test").iterdir())[:1]
    every = torch.stack([read_image(path, as_tensor=True) for path in paths])
    every = torch.nn.functional.interpolate(every, size=(256, 256), mode="bilinear")
    for batch in (1, 3):
        images = every[:batch]
        with torch.no_grad():
            expected = model(images).anomaly_map.numpy()
        np.testing.assert_allclose(compiled(images.numpy())["anomaly_map"], expected, atol=1e-3)


def test_tiling(parts: Path, tmp_path: Path) -> None:
    model = Sgfr(
        bank_size=100, pre_processor=Sgfr.configure_pre_processor((256, 256)), visualizer=False
    )
    engine = another(
        tmp_path, callbacks=[TilerConfigurationCallback(enable=True, tile_size=128, stride=128)]
    )
    (metrics,) = engine.train(model, datamodule=folder_datamodule(parts))
    assert model.model.tiler is not None
    assert metrics["pixel_AUROC"] > 0.9
