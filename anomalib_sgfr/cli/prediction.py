"""Prediction of images that a command was given, with what is known of them."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["Truth", "predict_images", "readable", "report_damaged"]


class Truth(NamedTuple):
    """Label and mask of an image, as far as they are known.

    Attributes:
        defective (bool | None): ``None`` if that is not known.
        kind (str): Of defect, or ``"good"``.
        mask (Path | None): White where the defect is.
    """

    defective: bool | None = None
    kind: str = ""
    mask: Path | None = None


def readable(
    paths: list[Path],
    damaged: dict[Path, str],
    bit_depth: int = 8,
    truths: Mapping[Path, Truth] | None = None,
) -> Any:  # noqa: ANN401
    """Loader that gives the Engine the readable images one by one, in this process.

    Args:
        paths (list[Path]): Image files.
        damaged (dict[Path, str]): Receives the reason for each image that cannot be read.
        bit_depth (int): Bit depth of the model.
        truths (Mapping[Path, Truth] | None): Labels and masks of the images.

    Returns:
        list: The loader in a list, which the Engine accepts though it is not a ``DataLoader``.
    """
    from anomalib.data import ImageBatch, ImageItem

    from anomalib_sgfr.images.bit_depth import READS_HIGH_BIT_DEPTH, read_tensor
    from anomalib_sgfr.images.reading import why_unreadable

    class Readable:
        """Loader and data set in one: an iterable data set with a length makes Lightning warn."""

        def __init__(self) -> None:
            self.image_filenames = [str(path) for path in paths]
            self.dataset = self

        def __len__(self) -> int:
            return len(paths)

        def __iter__(self) -> Iterator[Any]:
            for path in paths:
                try:
                    image = read_tensor(str(path), bit_depth)
                    its = _known(truths.get(path, Truth()), image.shape[-2:]) if truths else {}
                except Exception as error:  # noqa: BLE001  # whatever a reader of images may raise
                    damaged[path] = why_unreadable(path, error)
                else:
                    yield ImageBatch.collate([ImageItem(image=image, image_path=str(path), **its)])

    setattr(Readable, READS_HIGH_BIT_DEPTH, True)
    return [Readable()]


def predict_images(
    model: "Sgfr",
    callback: "Callback",
    paths: list[Path],
    damaged: dict[Path, str],
    *,
    truths: Mapping[Path, Truth] | None = None,
    folder: Path | None = None,
) -> None:
    """Predict images on one device; those that cannot be read are left out.

    Args:
        model (Sgfr): The model.
        callback (Callback): Uses the predictions.
        paths (list[Path]): Image files.
        damaged (dict[Path, str]): Receives the reason for each image that cannot be read.
        truths (Mapping[Path, Truth] | None): Labels and masks of the images.
        folder (Path | None): Folder for the results; ``None`` for one that is removed afterwards.
    """
    from anomalib_sgfr.console import quiet_engine
    from anomalib_sgfr.run_folder import RunFolder

    # standard output is for the results of the command, not for the progress bar
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        engine = quiet_engine(
            scratch,
            accelerator="auto",
            callbacks=[callback, RunFolder(folder or scratch)],
            enable_progress_bar=sys.stderr.isatty(),
        )
        loader = readable(paths, damaged, model.model.bit_depth, truths)
        engine.predict(model, dataloaders=loader, return_predictions=False)


def report_damaged(damaged: Mapping[Path, str]) -> int:
    """Print which images could not be read, and why; returns the exit code."""
    for path, reason in damaged.items():
        print(f"error: {path} cannot be read: {reason}", file=sys.stderr)
    return int(bool(damaged))


def _known(truth: Truth, size: Sequence[int]) -> dict[str, Any]:
    """Label and mask of an image of a size, as anomalib takes them.

    Raises:
        ValueError: If the mask is of another size.
    """
    import torch
    from anomalib.data.utils import read_mask
    from torchvision.tv_tensors import Mask

    if truth.defective is None:
        return {}
    label = {"gt_label": torch.tensor(truth.defective)}
    if truth.mask is None and truth.defective:
        return label
    if truth.mask is None:
        return {**label, "gt_mask": Mask(torch.zeros(tuple(size), dtype=torch.bool))}
    mask = read_mask(truth.mask, as_tensor=True)
    if tuple(mask.shape[-2:]) != tuple(size):
        found, wanted = (" x ".join(map(str, shape)) for shape in (mask.shape[-2:], size))
        msg = f"its mask {truth.mask} is of {found} pixels, the image of {wanted}"
        raise ValueError(msg)
    return {**label, "gt_mask": Mask(mask.squeeze() > 0)}
