"""Result pictures of what a camera of more than 8 bits gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.visualization import ImageVisualizer
from PIL import Image

from anomalib_sgfr.pictures.files import is_deep
from anomalib_sgfr.pictures.reading import picture

__all__ = ["DeepVisualizer"]


class DeepVisualizer(ImageVisualizer):
    """anomalib's, but that pictures of more than 8 bits are drawn at their true range.

    anomalib opens the files itself, which clips such pictures to white. It is shown copies in 8 bits, under the same
    names, while it draws.
    """

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
        with _in_8_bits(batch, pl_module.model.bit_depth):
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


@contextmanager
def _in_8_bits(batch: Any, bit_depth: int) -> Iterator[None]:  # noqa: ANN401
    """Let deep files of a batch be copies of them, whose paths end as theirs do."""
    paths = list(getattr(batch, "image_path", None) or ())
    deep = [path for path in paths if path is not None and Path(path).is_file() and is_deep(path)]
    if not deep:
        yield
        return
    with TemporaryDirectory() as scratch:
        shown = {path: Path(scratch, *Path(path).absolute().parts[1:]) for path in deep}
        for path, copy in shown.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            values = np.round(255.0 * picture(path, bit_depth)).astype(np.uint8)
            Image.fromarray(values).save(copy, format="PNG")
        batch.image_path = [str(shown.get(path, path)) for path in paths]
        try:
            yield
        finally:
            batch.image_path = paths
