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
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from anomalib_sgfr.console import quiet_engine
from benchmarks.common import data
from benchmarks.common.engine import quiet_fit, silence
from benchmarks.common.memory import peak_mb, reset_peak
from benchmarks.common.records import Record, Spec, write_text
from benchmarks.common.scores import accuracy, scores_of_sizes
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
        self.maps += list(outputs.anomaly_map.float().numpy().reshape(-1, height, width))
        if outputs.gt_mask is not None:
            self.masks += list(outputs.gt_mask.numpy().reshape(-1, height, width).astype(bool))


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
    fixed = BareExtraction.configure_pre_processor((height, width), spec.backbone)
    bare = BareExtraction(
        backbone=spec.backbone,
        layers=entry.layers(spec.backbone),
        pre_processor=spec.own_aspect or fixed,
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
    model = entry.build(
        spec.backbone, (height, width), spec.seed, spec.arguments, own_aspect=spec.own_aspect
    )
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
    measured["predict_ms"] = round(_predict_ms(model, datamodule), 3)
    return measured


def _test(model: AnomalibModule, datamodule: AnomalibDataModule, folder: Path) -> dict[str, Any]:
    samples = datamodule.test_data.samples
    collector = _Collector()
    with tempfile.TemporaryDirectory() as scratch:
        engine = quiet_engine(scratch, callbacks=[collector])
        engine.test(model=model, datamodule=datamodule, verbose=False)

    scores, maps = np.concatenate(collector.scores), collector.maps
    kinds = data.kinds(samples, collector.paths)
    fpr, tpr, _ = roc_curve(kinds != "good", scores)
    curves: dict[str, Any] = {"roc": [fpr.round(5).tolist(), tpr.round(5).tolist()], "pro": None}
    pixels = None
    if samples.attrs.get("task") == "segmentation":
        pixels = scores_of_sizes(maps, collector.masks)
        curves["pro"] = list(pixels.pro)
    arrays: dict[str, Any] = {
        "paths": collector.paths,
        "scores": scores,
        "kinds": kinds,
        "maps": _of_one_size(maps).astype(np.float16),
    }
    if collector.masks:
        arrays["masks"] = _of_one_size(collector.masks)
    np.savez(folder / "maps.npz", **arrays)
    write_text(folder / "curves.json", json.dumps(curves))
    return accuracy(scores, kinds, pixels)


def _of_one_size(images: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Images in one array, for figures: of several sizes, each at the first one's."""
    height, width = images[0].shape
    rows, columns = (np.arange(length)[:, None] for length in (height, width))
    return np.stack(
        [
            image[rows * image.shape[0] // height, columns.T * image.shape[1] // width]
            for image in images
        ]
    )


def _predict_ms(model: AnomalibModule, datamodule: AnomalibDataModule) -> float:
    image = data.images(datamodule.test_data, [0], cast("Any", model.pre_processor).transform)
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
