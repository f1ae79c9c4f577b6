"""Callback that writes anomaly maps and masks in pixels of the image files."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.report.score_table import ScoreRow, score_rows
from anomalib_sgfr.run_folder import RunFolder, image_paths, results_folder
from anomalib_sgfr.run_paths import atomic_write, names_of

__all__ = ["Predictions"]


class Predictions(RunFolder):
    """Write the anomaly map and mask of every image that is predicted or tested.

    A callback for ``trainer.callbacks``. The folder repeats the folders of the images in
    ``arrays/NAME.npz`` with ``anomaly_map`` (float32, ``(H, W)``, 0.5 at the threshold),
    ``pred_mask`` (bool, ``(H, W)``), ``score``, ``threshold``, ``label`` and ``image``; in
    ``maps/NAME.png``, grey, 255 for 1; and in ``masks/NAME.png``, 255 where anomalous. ``H`` and
    ``W`` are the image file's size, or the model's input size if the file is not known. The table
    of scores and the result images go there too.

    Args:
        folder (str | Path | None): The folder; ``None`` for ``predictions/<images>`` in the run's
            folder of the checkpoint. Defaults to ``None``.

    Examples:
        >>> from anomalib.engine import Engine
        >>> from anomalib_sgfr import Predictions
        >>> writer = Predictions(folder / "predictions")
        >>> engine = Engine(callbacks=[writer], logger=False, enable_progress_bar=False)
        >>> _ = engine.predict(model, datamodule=datamodule, return_predictions=False)
        >>> sorted(path.name for path in (folder / "predictions").iterdir() if path.is_dir())
        ['arrays', 'maps', 'masks']
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(folder)
        self._names: dict[str, Path] = {}
        self._written = 0

    def _choose(self, trainer: Trainer, module: Any, kind: str) -> None:  # noqa: ANN401
        super()._choose(trainer, module, kind)
        self._names, self._written = names_of(image_paths(trainer, kind)), 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the images of a batch."""
        del batch, batch_idx, dataloader_idx
        folder = results_folder(trainer)
        for index, row in enumerate(score_rows(outputs, pl_module.post_processor, None)):
            maps = {
                name: values[index].float().cpu().squeeze().numpy()
                for name in ("anomaly_map", "pred_mask")
                if (values := getattr(outputs, name)) is not None
            }
            _write(folder, self._name(row.image), row, _in_file_pixels(maps, row.image, pl_module))

    on_test_batch_end = on_predict_batch_end

    def _name(self, image: str) -> Path:
        self._written += 1
        if not image:
            return Path(f"image-{self._written - 1:05}")
        return self._names.get(image) or Path(*Path(image).absolute().parts[1:])


def _in_file_pixels(
    maps: dict[str, NDArray[np.float32]],
    image: str,
    module: Any,  # noqa: ANN401
) -> dict[str, NDArray[np.float32]]:
    """Maps over the whole image file, zero outside the inspected area."""
    if not image or not Path(image).is_file():
        return maps
    size = read_image(image, module.model.bit_depth).shape[:2]
    try:
        steps = geometric_steps(getattr(module.pre_processor, "transform", None))
        transform = frame_transform(steps, size)
    except ValueError:  # the transforms cannot be followed: keep the model's pixels
        return maps
    return {name: transform.resample(values) for name, values in maps.items()}


def _write(folder: Path, name: Path, row: ScoreRow, maps: dict[str, NDArray[np.float32]]) -> None:
    """Write the files of an image, each whole or not at all."""
    fields = {key: getattr(row, key) for key in ("score", "threshold", "label", "image")}
    arrays: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    images = {}
    if "pred_mask" in maps:
        arrays["pred_mask"] = maps["pred_mask"] > 0.5  # noqa: PLR2004
        images["masks"] = arrays["pred_mask"] * np.uint8(255)
    if "anomaly_map" in maps:
        arrays["anomaly_map"] = maps["anomaly_map"]
        images["maps"] = np.round(255.0 * maps["anomaly_map"].clip(0.0, 1.0)).astype(np.uint8)
    for kind, pixels in images.items():
        with atomic_write(folder / kind / f"{name}.png") as part:
            Image.fromarray(pixels).save(part, format="PNG")
    with atomic_write(folder / "arrays" / f"{name}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
