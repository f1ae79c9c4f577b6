"""Result pictures of what a camera of more than 8 bits gives, and upright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.visualization import ImageVisualizer
from PIL import Image

from anomalib_sgfr.pictures.files import header
from anomalib_sgfr.pictures.reading import picture

__all__ = ["DeepVisualizer"]


class DeepVisualizer(ImageVisualizer):
    """anomalib's, but that pictures of more than 8 bits are drawn at their true range, and turned ones upright.

    anomalib opens the files itself, which clips such pictures to white. It is shown upright copies in 8 bits, under the
    same names, while it draws.
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
    """Let files of a batch that anomalib misreads be copies of them, whose paths end as theirs do."""
    paths = list(getattr(batch, "image_path", None) or ())
    misread = [path for path in paths if path is not None and Path(path).is_file() and not header(path).is_plain]
    if not misread:
        yield
        return
    with TemporaryDirectory() as scratch:
        shown = {path: Path(scratch, *Path(path).absolute().parts[1:]) for path in misread}
        for path, copy in shown.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            values = np.round(255.0 * picture(path, bit_depth)).astype(np.uint8)
            Image.fromarray(values).save(copy, format="PNG")
        batch.image_path = [str(shown.get(path, path)) for path in paths]
        try:
            yield
        finally:
            batch.image_path = paths
