"""One benchmark run, in a process of its own: ``python -m benchmarks.compare.run SPEC FOLDER``.

``SPEC`` is a :class:`~benchmarks.common.records.Spec` as JSON with the data set's ``root`` added.
Writes into ``FOLDER`` ``record.json``, ``curves.json`` (ROC and per-region overlap) and
``maps.npz`` (scores and anomaly maps of the test images). Used by :mod:`benchmarks.compare`.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.metrics import roc_curve

from benchmarks.common import data
from benchmarks.common.engine import quiet_engine, quiet_fit, silence
from benchmarks.common.memory import peak_mb, reset_peak
from benchmarks.common.records import Record, Spec, write_text
from benchmarks.common.scores import accuracy, label_regions, pixel_scores
from benchmarks.common.zoo import MODELS, BareExtraction, stored, timed

_TIMED_PASSES = 30


class _FitClock(Callback):
    """Seconds and peak resident memory of a fit, from its first pass to its last."""

    seconds = peak_mb = float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer, pl_module
        reset_peak()
        self.seconds = -perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer, pl_module
        self.seconds += perf_counter()
        self.peak_mb = peak_mb()


class _Collector(Callback):
    """Keep raw scores, maps and masks of the test images."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.scores: list[np.ndarray] = []
        self.maps: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
    ) -> None:
        del trainer, pl_module, args
        self.paths.extend(outputs.image_path)
        self.scores.append(outputs.pred_score.float().numpy().reshape(-1))
        height, width = outputs.anomaly_map.shape[-2:]
        self.maps.append(outputs.anomaly_map.float().numpy().reshape(-1, height, width))
        if outputs.gt_mask is not None:
            self.masks.append(outputs.gt_mask.numpy().reshape(-1, height, width).astype(bool))


def main(spec_json: str, folder: str) -> None:
    """Run what ``spec_json`` says and write its results into ``folder``."""
    silence()
    fields = json.loads(spec_json)
    root = fields.pop("root")
    spec = Spec(**fields)
    measured = _run(spec, Path(root) if root else None, Path(folder))
    record = Record.of(spec, **measured)
    write_text(Path(folder) / "record.json", json.dumps(dataclasses.asdict(record), indent=1))


def _run(spec: Spec, root: Path | None, folder: Path) -> dict[str, Any]:
    seed_everything(spec.seed, verbose=False)
    entry = MODELS[spec.model]
    height, width = spec.image_size
    datamodule = data.build(
        spec.dataset, root, spec.split, spec.seed, spec.limit_train, spec.contamination
    )
    measured: dict[str, Any] = {
        "n_train": len(datamodule.train_data),
        "n_test": len(datamodule.test_data),
    }

    print("loading and embedding alone", flush=True)
    bare = BareExtraction(
        backbone=spec.backbone,
        layers=entry.layers(spec.backbone),
        pre_processor=BareExtraction.configure_pre_processor((height, width), spec.backbone),
        evaluator=False,
        visualizer=False,
    )
    clock = _FitClock()
    quiet_fit(bare, datamodule, clock)
    measured |= {
        "extract_s": round(clock.seconds, 3),
        "extract_peak_rss_mb": round(clock.peak_mb, 1),
    }
    del bare

    print("fitting", flush=True)
    seed_everything(spec.seed, verbose=False)
    model = entry.build(spec.backbone, (height, width), spec.seed, spec.arguments)
    clock = _FitClock()
    with timed(entry.sampling(model)) as spent:
        quiet_fit(model, datamodule, clock)
    atoms, size = stored(model)
    measured |= {
        "fit_s": round(clock.seconds, 3),
        "fit_peak_rss_mb": round(clock.peak_mb, 1),
        "sampling_s": round(sum(spent), 3),
        "bank_atoms": atoms,
        "bank_bytes": size,
    }

    print("testing", flush=True)
    measured |= _test(model, datamodule, folder)
    measured["predict_ms"] = round(_predict_ms(model, datamodule, height, width), 3)
    return measured


def _test(model: AnomalibModule, datamodule: AnomalibDataModule, folder: Path) -> dict[str, Any]:
    samples = datamodule.test_data.samples
    collector = _Collector()
    with tempfile.TemporaryDirectory() as scratch:
        engine = quiet_engine(scratch, callbacks=[collector])
        engine.test(model=model, datamodule=datamodule, verbose=False)

    scores, maps = np.concatenate(collector.scores), np.concatenate(collector.maps)
    kinds = data.kinds(samples, collector.paths)
    fpr, tpr, _ = roc_curve(kinds != "good", scores)
    curves: dict[str, Any] = {"roc": [fpr.round(5).tolist(), tpr.round(5).tolist()], "pro": None}
    pixels = None
    if samples.attrs.get("task") == "segmentation":
        pixels = pixel_scores(maps, label_regions(np.concatenate(collector.masks)))
        curves["pro"] = list(pixels.pro)
    arrays: dict[str, Any] = {
        "paths": collector.paths,
        "scores": scores,
        "kinds": kinds,
        "maps": maps.astype(np.float16),
    }
    if collector.masks:
        arrays["masks"] = np.concatenate(collector.masks)
    np.savez(folder / "maps.npz", **arrays)
    write_text(folder / "curves.json", json.dumps(curves))
    return accuracy(scores, kinds, pixels)


def _predict_ms(
    model: AnomalibModule, datamodule: AnomalibDataModule, height: int, width: int
) -> float:
    image = data.images(datamodule.test_data, [0], cast("Any", model.pre_processor).transform)
    if image.shape[-2:] != (height, width):
        msg = f"expected an image of {height} x {width}, got {tuple(image.shape)}."
        raise ValueError(msg)
    inner = model.model.eval()
    seconds = []
    with torch.no_grad():
        for _ in range(_TIMED_PASSES):
            start = perf_counter()
            inner(image)
            seconds.append(perf_counter() - start)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
