"""Plain transformers, with random weights: the presets are built, and one goes all the way to an
exported file.
"""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
import yaml
from anomalib.data import PredictDataset
from anomalib.deploy import ExportType

from anomalib_sgfr import Sgfr
from anomalib_sgfr.features.embedding import pool
from tests.conftest import engine_in, fit, folder_datamodule

CONFIGS = Path(__file__).parents[2] / "configs"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.parametrize(("name", "side"), [("dinov2s", 392), ("dinov3s", 448)])
def test_a_preset_has_a_bank_for_each_layer(name: str, side: int) -> None:
    given = yaml.safe_load((CONFIGS / f"mvtecad_{name}.yaml").read_text(encoding="utf-8"))["model"][
        "init_args"
    ]
    model = Sgfr(**given, pre_trained=False)
    assert model.model.embedder.layers == given["layers"]
    assert len(model.model.banks) == 4
    assert all(scale.in_map and scale.score_weight == 1.0 for scale in model.model.embedder.scales)
    prepared = model.pre_processor(torch.rand(1, 3, 100, 80))
    assert prepared.shape == (1, 3, side, side)
    with torch.no_grad():
        assert [part.shape for part in model.model.embed(prepared)] == [(1, 384, 28, 28)] * 4


def test_a_patch_is_its_token_and_no_other() -> None:
    """Neither the class token nor one of the registers."""
    backbone = "vit_small_patch16_dinov3"
    model = Sgfr(backbone, layers=["blocks.1", "blocks.3"], pre_trained=False).model
    images = torch.randn(2, 3, 96, 64)
    network = model.embedder.extractor.feature_extractor.eval()
    assert network.num_prefix_tokens == 5  # a class and four registers
    with torch.no_grad():
        tokens = network.forward_intermediates(
            images, indices=[1, 3], norm=True, intermediates_only=True
        )
        for found, expected in zip(model.embed(images), tokens, strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, pool(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced_once")
def test_from_a_fit_by_tiles_to_an_exported_file(parts: Path, tmp_path: Path) -> None:
    layers = ["blocks.1", "blocks.4"]
    model = Sgfr(
        "test_vit",
        layers=layers,
        pre_trained=False,
        bank_size=[60, 40],
        image_size=96,
        tile_size=64,
        tile_stride=32,
    )
    engine = fit(model, folder_datamodule(parts), tmp_path)
    assert [bank.atoms.shape for bank in model.model.banks] == [(60, 64), (40, 64)]
    restored = Sgfr.load_from_checkpoint(engine.best_model_path).eval()
    path = engine.export(restored, ExportType.OPENVINO, export_root=tmp_path, input_size=(96, 96))
    assert path is not None
    onnx = engine.export(restored, ExportType.ONNX, export_root=tmp_path, input_size=(96, 96))
    batches = engine_in(tmp_path).predict(model, dataset=PredictDataset(parts / "bad"))
    for file in (path, onnx):
        compiled = openvino.Core().compile_model(file, "CPU", F32)
        images = torch.rand(2, 3, 96, 96)
        with torch.no_grad():
            expected = restored(images)
        found = compiled(images.numpy())
        for name in ("anomaly_map", "pred_score"):
            difference = np.abs(found[name] - getattr(expected, name).numpy())
            assert difference.max() <= 2e-3
    assert len(batches) == 6
