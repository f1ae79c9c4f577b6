"""Fit and export one model: ``python -m benchmarks.edge.export CASE FOLDER``.

``CASE`` is a name of :data:`benchmarks.edge.cases.CASES`. Writes into ``FOLDER`` what is exported,
and for a case whose answers are compared ``reference.npz``: scores, labels and maps of the test
images through anomalib's Engine.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components import AnomalibModule
from lightning.pytorch import seed_everything
from numpy.typing import NDArray
from torch import Tensor, nn

from anomalib_sgfr import NominalPostProcessor, Sgfr
from anomalib_sgfr.console import quiet_engine
from benchmarks.common import data
from benchmarks.common.engine import silence
from benchmarks.common.zoo import MODELS, resolve_arguments
from benchmarks.edge.cases import BACKBONE, CASES, Case

__all__ = ["main", "move", "write_reference"]

_TRAIN_IMAGES, _LARGE_IMAGES = 100, 8  # as many patches
_COMPRESSIONS = {
    "fp16": CompressionType.FP16,
    "int8": CompressionType.INT8,
    "int8_ptq": CompressionType.INT8_PTQ,
}


class _Bare(nn.Module):
    """The backbone alone, up to the layers the models take their features from."""

    def __init__(self, model: Sgfr) -> None:
        super().__init__()
        self.pre_processor: Any = model.pre_processor
        self.extractor = model.model.embedder.extractor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.extractor(self.pre_processor(images))
        return tuple(features.values()) if isinstance(features, dict) else tuple(features)


def main(name: str, folder: str) -> None:
    """Fit and export."""
    silence()
    seed_everything(0, verbose=False)
    case, out = CASES[name], Path(folder)
    height, width = case.size
    out.mkdir(parents=True, exist_ok=True)
    if case.model == "bare":
        bare = _Bare(Sgfr(backbone=BACKBONE, evaluator=False, visualizer=False)).eval()
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            bare,
            (torch.zeros(2, 3, height, width),),
            str(out / "model.onnx"),
            input_names=["input"],
            dynamo=True,
            dynamic_shapes=({0: batch},),
            opset_version=18,
        )
        import openvino

        openvino.save_model(
            openvino.convert_model(out / "model.onnx"), out / "model.xml", compress_to_fp16=False
        )
        (out / "model.onnx").unlink()
        (out / "model.onnx.data").unlink(missing_ok=True)
        return
    images = _LARGE_IMAGES if case.side else _TRAIN_IMAGES
    datamodule = data.build("elpv-mono", limit_train=images)
    model = _model(case)
    with tempfile.TemporaryDirectory() as scratch:
        engine = quiet_engine(scratch, limit_val_batches=0)
        engine.fit(model, datamodule=datamodule)
        if case.model == "patchcore":
            _fill(model, case.atoms)
        static: dict[str, Any] = (
            {} if case.model == "sgfr" else {"onnx_kwargs": {"dynamic_shapes": None}}
        )
        move(
            engine.export(
                model, ExportType.OPENVINO, scratch, input_size=(height, width), **static
            ),
            out / "model.xml",
        )
        if not case.compared:
            return
        write_reference(model, datamodule, out)
        move(engine.export(model, ExportType.ONNX, scratch), out / "model.onnx")
        move(engine.export(model, ExportType.OPENVINO, scratch), out / "any_size.xml")
        for suffix, compression in _COMPRESSIONS.items():
            path = engine.export(
                model,
                ExportType.OPENVINO,
                scratch,
                input_size=(height, width),
                compression_type=compression,
                datamodule=datamodule if suffix.endswith("ptq") else None,
            )
            move(path, out / f"{suffix}.xml")


def _model(case: Case) -> AnomalibModule:
    if case.model != "sgfr":
        height, width = case.size
        arguments = resolve_arguments(case.model, case.arguments)
        return MODELS[case.model].build(BACKBONE, (height, width), 0, arguments)
    return Sgfr(
        backbone=BACKBONE,
        image_size=None if case.side is None else (case.side, case.side),
        seed=0,
        post_processor=NominalPostProcessor(0.05),
        evaluator=False,
        visualizer=False,
        **case.arguments,
    )


def _fill(model: Any, atoms: int) -> None:  # noqa: ANN401
    """Give Patchcore a bank of the size its ratio selects; which atoms does not matter to time."""
    bank = model.model.memory_bank
    model.model.memory_bank = bank[torch.arange(atoms) % len(bank)] + 1e-3 * torch.randn(
        atoms, bank.shape[1]
    )


def write_reference(model: AnomalibModule, datamodule: AnomalibDataModule, out: Path) -> None:
    """Write ``reference.npz``: what the model answers through anomalib's Engine.

    Maps and masks lie one after the other, as images may have several sizes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        batches: Any = quiet_engine(scratch).predict(model, datamodule=datamodule)
    paths = [path for batch in batches for path in batch.image_path]
    sizes = [
        batch.anomaly_map.shape[-2:] for batch in batches for _ in range(len(batch.image_path))
    ]

    def together(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(batch, name).numpy().ravel() for batch in batches])

    arrays: dict[str, Any] = {
        "paths": np.array(paths),
        "kinds": data.kinds(datamodule.test_data.samples, paths),
        "scores": together("pred_score"),
        "labels": together("pred_label").astype(bool),
        "sizes": np.array(sizes),
        "maps": together("anomaly_map"),
    }
    if all(batch.gt_mask is not None for batch in batches):
        arrays["masks"] = together("gt_mask").astype(bool)
    np.savez(out / "reference.npz", **arrays)


def move(path: Path | None, target: Path) -> None:
    """Move a model with the weights beside it."""
    if path is None:
        msg = "anomalib's Engine exported nothing."
        raise RuntimeError(msg)
    for weights in (path.with_suffix(".bin"), path.with_suffix(".onnx.data")):
        if weights.exists():
            # an ONNX file names its weights' file
            weights.replace(
                target.with_suffix(".bin")
                if weights.suffix == ".bin"
                else target.parent / weights.name
            )
    path.replace(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
