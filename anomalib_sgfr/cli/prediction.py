"""Prediction of images that a command was given, with what is known of them."""

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["MASKS_HELP", "MaskFolder", "Truth", "predict_images", "readable", "report_damaged"]

MASKS_HELP = (
    "folder of masks, white on the defect, named as the image or NAME_mask; in it or in folders"
    " that repeat the image's, as dent/0.png for test/dent/0.png"
)


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


class MaskFolder:
    """Folder of masks, paired with images by their names.

    The mask of ``NAME.png`` is an image named ``NAME`` or else ``NAME_mask``, of any format. It
    lies in the folder, or in one below that repeats the image's own folders: for
    ``test/dent/0.png`` in ``test/dent``, else in ``dent``, else in the folder itself.

    Args:
        folder (Path): The folder, or the one mask.
    """

    def __init__(self, folder: Path) -> None:
        from anomalib.data.utils.image import is_image_file

        self._masks = defaultdict[tuple[tuple[str, ...], str], list[Path]](list)
        top = folder if folder.is_dir() else folder.parent
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if file.is_file() and is_image_file(file):
                self._masks[file.parent.relative_to(top).parts, file.stem].append(file)

    def mask_of(self, image: Path) -> Path | None:
        """Mask of an image; ``None`` if there is none.

        Args:
            image (Path): The image file.

        Raises:
            ValueError: If there are several.
        """
        folders = Path(os.path.abspath(image)).parent.parts[1:]  # noqa: PTH100  # links stay
        for first in range(len(folders) + 1):
            for stem in (image.stem, f"{image.stem}_mask"):
                masks = self._masks.get((folders[first:], stem), ())
                masks = [mask for mask in masks if not mask.samefile(image)]
                if len(masks) > 1:
                    msg = f"{image} has several masks: {', '.join(map(str, masks))}. Keep one."
                    raise ValueError(msg)
                if masks:
                    return masks[0]
        return None


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
