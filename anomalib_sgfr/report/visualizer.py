"""Result pictures: of any bit depth, upright, each under a name of its own, in the folder of the
run's results.
"""

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

__all__ = ["DeepVisualizer"]


class DeepVisualizer(ImageVisualizer):
    """anomalib's, but for pictures of more than 8 bits or turned ones, equal names, and where
    pictures go.

    anomalib opens the files itself, which clips pictures of more than 8 bits to white and leaves
    turned ones so. It is shown upright copies in 8 bits while it draws. It names a picture by its
    last folder, or from the data set's name on; where two images would get one name, all keep their
    folders. Without an ``output_dir`` pictures go to ``images`` in the folder of the run's results.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._given_dir = self.output_dir
        self._names: dict[str, Path] = {}
        self._drawn: dict[Path, str] = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Name the pictures of a test."""
        del pl_module
        self._start(trainer, "tests")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Name the pictures of a prediction."""
        del pl_module
        self._start(trainer, "predictions")

    def _start(self, trainer: Any, kind: str) -> None:  # noqa: ANN401
        self.output_dir, self._drawn = self._given_dir, {}
        paths = image_paths(trainer, kind)
        self._names = {path: self._usual(trainer, path) for path in paths}
        if len(set(self._names.values())) < len(self._names):
            self._names = names_of(paths, keep_suffix=True)

    @staticmethod
    def _usual(trainer: Any, path: str) -> Path:  # noqa: ANN401
        """Name that anomalib would choose."""
        data = getattr(trainer, "datamodule", None)
        return Path(
            generate_output_filename(
                path, "", getattr(data, "name", None), getattr(data, "category", None), mkdir=False
            )
        )

    def on_test_batch_end(
        self,
        trainer: Any,  # noqa: ANN401
        pl_module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of a batch."""
        del outputs, batch_idx, dataloader_idx
        if self.output_dir is None:
            self.output_dir = results_folder(trainer) / "images"
        paths = list(batch.image_path or [])
        with _in_8_bits(batch, pl_module.model.bit_depth):
            for index, item in enumerate(batch):
                shown = self.visualize(item)
                if not isinstance(shown, Image.Image):
                    continue
                path = str(paths[index]) if paths else ""
                file = Path(self.output_dir) / self._name(trainer, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                shown.save(
                    file if file.suffix.lower() in Image.registered_extensions() else f"{file}.png"
                )

    def _name(self, trainer: Any, path: str) -> Path:  # noqa: ANN401
        """That no other image of the run has."""
        name = self._names.get(path) or (
            self._usual(trainer, path) if path else Path(f"image-{len(self._drawn):05}.png")
        )
        if self._drawn.get(name, path) != path:  # of a data set that does not tell its files
            name = Path(*Path(path).absolute().parts[1:])
        self._drawn[name] = path
        return name


@contextmanager
def _in_8_bits(batch: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Let files of a batch that anomalib misreads be copies of them, whose paths end as theirs do."""
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
        shown = {path: Path(scratch, *Path(path).absolute().parts[1:]) for path in misread}
        for path, copy in shown.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            values = np.round(255.0 * read_image(path, bit_depth)).astype(np.uint8)
            Image.fromarray(values).save(copy, format="PNG")
        batch.image_path = [str(shown.get(path, path)) for path in paths]
        try:
            yield
        finally:
            batch.image_path = paths
