"""Callbacks that write images of results: anomaly maps and masks, and anomalib's drawings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.headers import read_header
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.report.score_table import ScoreRow, score_rows
from anomalib_sgfr.run_folder import RunFolder, image_paths, results_folder
from anomalib_sgfr.run_paths import atomic_write, names_of

__all__ = ["Predictions", "ResultVisualizer"]


_SIDE = 256  # pixels of the shorter side of a drawn image


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

    def add_batch(self, trainer: Trainer, module: Any, outputs: Any, loader: int) -> None:  # noqa: ANN401
        """Write the images of a batch."""
        del loader
        folder = results_folder(trainer)
        for index, row in enumerate(score_rows(outputs, module.post_processor, None)):
            maps = {
                name: values[index].float().cpu().squeeze().numpy()
                for name in ("anomaly_map", "pred_mask")
                if (values := getattr(outputs, name)) is not None
            }
            _write(folder, self._name(row.image), row, _in_file_pixels(maps, row.image, module))

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


class ResultVisualizer(ImageVisualizer):
    """anomalib's visualizer, made fit for high bit depth, rotated files and equal file names.

    anomalib opens the files itself: it clips images of more than 8 bits to white and ignores EXIF
    orientation. This visualizer gives it upright 8-bit copies. anomalib also names a result by the
    last folder of its image, or by the path from the data set's name on; where two images would
    share a name, this visualizer keeps the folders of all. Without an ``output_dir`` it writes to
    ``images`` in the folder of the run's results. Without a ``field_size`` it draws images in the
    aspect ratio of their anomaly maps, the shorter side of 256 pixels.

    Args:
        *args (Any): Passed to anomalib's visualizer.
        **kwargs (Any): Passed on too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._given_dir = self.output_dir
        self._keeps_aspect = self.field_size == (_SIDE, _SIDE)  # anomalib's default
        self._names: dict[str, Path] = {}
        self._drawn: dict[Path, str] = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Name the result images of a test."""
        del pl_module
        self._start(trainer, "tests")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Name the result images of a prediction."""
        del pl_module
        self._start(trainer, "predictions")

    def _start(self, trainer: Any, kind: str) -> None:  # noqa: ANN401
        self.output_dir, self._drawn = self._given_dir, {}
        paths = image_paths(trainer, kind)
        self._names = {path: _anomalib_name(trainer, path) for path in paths}
        if len(set(self._names.values())) < len(self._names):
            self._names = names_of(paths, keep_suffix=True)

    def on_test_batch_end(
        self,
        trainer: Any,  # noqa: ANN401
        pl_module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of a batch; anomalib calls this after a prediction too."""
        del outputs, batch_idx, dataloader_idx
        if self.output_dir is None:
            self.output_dir = results_folder(trainer) / "images"
        if self._keeps_aspect and batch.anomaly_map is not None:
            height, width = batch.anomaly_map.shape[-2:]
            scale = _SIDE / min(height, width)
            self.field_size = round(scale * width), round(scale * height)
        paths = list(batch.image_path or [])
        with _in_8_bits(batch, pl_module.model.bit_depth):
            for index, item in enumerate(batch):
                drawn = self.visualize(item)
                if not isinstance(drawn, Image.Image):
                    continue
                name = self._name(trainer, str(paths[index]) if paths else "")
                file = Path(self.output_dir) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                known = file.suffix.lower() in Image.registered_extensions()
                drawn.save(file if known else f"{file}.png")

    def _name(self, trainer: Any, path: str) -> Path:  # noqa: ANN401
        """Name that no other image of the run has."""
        if path:
            name = self._names.get(path) or _anomalib_name(trainer, path)
        else:
            name = Path(f"image-{len(self._drawn):05}.png")
        if self._drawn.get(name, path) != path:  # the data set did not list its files
            name = Path(*Path(path).absolute().parts[1:])
        self._drawn[name] = path
        return name


def _anomalib_name(trainer: Any, path: str) -> Path:  # noqa: ANN401
    """Name that anomalib chooses."""
    data = getattr(trainer, "datamodule", None)
    name, category = getattr(data, "name", None), getattr(data, "category", None)
    return Path(generate_output_filename(path, "", name, category, mkdir=False))


@contextmanager
def _in_8_bits(batch: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Replace files of a batch that anomalib misreads by 8-bit copies, whose paths end alike."""
    paths = list(getattr(batch, "image_path", None) or ())
    misread = [
        path
        for path in paths
        if path is not None and Path(path).is_file() and not read_header(path).is_plain
    ]
    if not misread:
        yield
        return
    with TemporaryDirectory() as scratch:
        copies = {path: Path(scratch, *Path(path).absolute().parts[1:]) for path in misread}
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            values = np.round(255.0 * read_image(path, bit_depth)).astype(np.uint8)
            Image.fromarray(values).save(copy, format="PNG")
        batch.image_path = [str(copies.get(path, path)) for path in paths]
        try:
            yield
        finally:
            batch.image_path = paths
