"""Callback that writes what a prediction found, map by map, in pixels of the image files."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.report.score_table import Scored, scored_in
from anomalib_sgfr.run_folder import RunFolder, image_paths, results_folder
from anomalib_sgfr.run_paths import atomic_write, names_of

__all__ = ["Predictions"]


class Predictions(RunFolder):
    """Write the anomaly map and mask of every image that is predicted or tested; for
    ``trainer.callbacks``.

    Under the folder, with the images' own folders below: ``arrays/NAME.npz`` with ``anomaly_map``
    (float32, ``(H, W)``, 0.5 at the threshold), ``pred_mask`` (bool, ``(H, W)``), ``score``,
    ``threshold``, ``label`` and ``image``; ``maps/NAME.png``, grey, 255 for 1; ``masks/NAME.png``,
    255 where anomalous. ``H`` and ``W`` are the image file's size; the model's input size where the
    file is not known. The table of scores and the pictures go there too.

    Args:
        folder (str | Path | None): Where to; ``None`` for ``predictions/<images>`` in the run's
            folder of the checkpoint. Defaults to ``None``.
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
        outputs: Any,
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Write the images of a batch."""
        del args
        self._write(results_folder(trainer), pl_module, outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Write the images of a batch."""
        self.on_predict_batch_end(trainer, pl_module, outputs, *args)

    def _write(self, folder: Path, module: Any, outputs: Any) -> None:  # noqa: ANN401
        rows = scored_in(outputs, module.post_processor, None)
        for index, row in enumerate(rows):
            found = {"anomaly_map": outputs.anomaly_map, "pred_mask": outputs.pred_mask}
            maps = {
                name: part[index].float().cpu().squeeze().numpy()
                for name, part in found.items()
                if part is not None
            }
            maps = _in_pixels_of_the_file(maps, row.image, module)
            self._write_one(folder, self._name(row.image), row, maps)

    def _name(self, image: str) -> Path:
        self._written += 1
        if not image:
            return Path(f"image-{self._written - 1:05}")
        return self._names.get(image) or Path(*Path(image).absolute().parts[1:])

    @staticmethod
    def _write_one(
        folder: Path, name: Path, row: Scored, maps: dict[str, NDArray[np.float32]]
    ) -> None:
        about = {
            "score": row.score,
            "threshold": row.threshold,
            "label": row.label,
            "image": row.image,
        }
        arrays: dict[str, Any] = {key: value for key, value in about.items() if value is not None}
        if "pred_mask" in maps:
            arrays["pred_mask"] = maps["pred_mask"] > 0.5  # noqa: PLR2004
            _save(
                folder / "masks" / f"{name}.png",
                lambda file: _png(arrays["pred_mask"] * np.uint8(255), file),
            )
        if "anomaly_map" in maps:
            arrays["anomaly_map"] = maps["anomaly_map"]
            shown = np.round(255.0 * maps["anomaly_map"].clip(0.0, 1.0)).astype(np.uint8)
            _save(folder / "maps" / f"{name}.png", lambda file: _png(shown, file))
        _save(folder / "arrays" / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays))


def _in_pixels_of_the_file(
    maps: dict[str, Any],
    image: str,
    module: Any,  # noqa: ANN401
) -> dict[str, NDArray[np.float32]]:
    """Maps over the whole image file, zero where the model does not look."""
    if not image or not Path(image).is_file():
        return maps
    size = read_image(image, module.model.bit_depth).shape[:2]
    try:
        over = frame_transform(
            geometric_steps(getattr(module.pre_processor, "transform", None)), size
        )
    except ValueError:  # the transform cannot be followed: in the model's own pixels
        return maps
    return {name: over.resample(values) for name, values in maps.items()}


def _png(values: NDArray[np.uint8], file: Any) -> None:  # noqa: ANN401
    Image.fromarray(values).save(file, format="PNG")


def _save(path: Path, write: Any) -> None:  # noqa: ANN401
    """Write a file whole or not at all."""
    with atomic_write(path) as part, part.open("wb") as file:
        write(file)
