"""Visualizer of result images: any bit depth, upright, with unique names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from PIL import Image

from anomalib_sgfr.images.headers import read_header
from anomalib_sgfr.images.reading import read_image
from anomalib_sgfr.run_folder import image_paths, results_folder
from anomalib_sgfr.run_paths import names_of

__all__ = ["ResultVisualizer"]


class ResultVisualizer(ImageVisualizer):
    """anomalib's visualizer, made fit for high bit depth, rotated files and equal file names.

    anomalib opens the files itself: it clips images of more than 8 bits to white and ignores EXIF
    orientation. This visualizer gives it upright 8-bit copies. anomalib also names a result by the
    last folder of its image, or by the path from the data set's name on; where two images would
    share a name, this visualizer keeps the folders of all. Without an ``output_dir`` it writes to
    ``images`` in the folder of the run's results.

    Args:
        *args (Any): Passed to anomalib's visualizer.
        **kwargs (Any): Passed on too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._given_dir = self.output_dir
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
