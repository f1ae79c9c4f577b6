"""Row and column of what raised a score, in the image file's own pixels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch.utils.data import Subset

from anomalib_sgfr.images.bit_depth import READS_HIGH_BIT_DEPTH
from anomalib_sgfr.images.frame_geometry import FrameTransform, Step, frame_transform
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import read_header, upright_size

__all__ = ["Followed", "file_peaks", "followed", "running_dataset"]


class Followed(NamedTuple):
    """How the model's input lies over image files.

    Attributes:
        placements (list[tuple[FrameTransform, tuple[int, int]] | None]): For each image the placement,
            and height and width of its file, upright; ``None`` where pixels cannot be followed back
            to the file.
        why_not (str): Reason, where there is one of these; else empty.
    """

    placements: list[tuple[FrameTransform, tuple[int, int]] | None]
    why_not: str = ""


def running_dataset(trainer: Trainer, number: int = 0) -> Any:  # noqa: ANN401
    """Data set that the batches of the running stage come from; of the loader with a number, if
    there are several.
    """
    stage = trainer.state.stage
    name = (
        "train_dataloader"
        if trainer.training or not stage
        else f"{stage.dataloader_prefix}_dataloaders"
    )
    loaders = getattr(trainer, name, None)
    loader = (
        loaders[number] if isinstance(loaders, list | tuple) and number < len(loaders) else loaders
    )
    return getattr(loader, "dataset", None)


def followed(
    paths: Sequence[str],
    before: Sequence[Step] | None,
    after: Sequence[Step] | None,
    shape: Sequence[int],
) -> Followed:
    """Follow the pixels of a batch back to its files.

    Args:
        paths (Sequence[str]): Image files of the batch; empty where they are not known.
        before (Sequence[Step] | None): What the data set does to an image, see
            :func:`~anomalib_sgfr.images.frame_geometry.frame_transform`; ``None`` if that is not known.
        after (Sequence[Step] | None): What the pre-processor does to it then.
        shape (Sequence[int]): Height and width of the model's input.
    """
    nothing: list[tuple[FrameTransform, tuple[int, int]] | None] = [None] * len(paths)
    if before is None or after is None:
        who = "data set" if before is None else "pre-processor"
        return Followed(nothing, f"the {who} moves pixels in a way that is not known")
    sizes: dict[str, tuple[int, int]] = {}
    turned = False
    for path in filter(None, paths):
        try:
            sizes[path] = upright_size(path)
            turned |= read_header(path).is_turned
        except (OSError, ValueError, SyntaxError):  # no file, or no image any more
            continue
    given = {frame_transform(before, size).size for size in sizes.values()}
    # anomalib makes images of a batch equal in size by stretching them: what is then resized to a
    # fixed height and width covers the same part of the file, what keeps its aspect or is cropped
    # does not
    is_uniform = len(given) == 1 and len(sizes) == len(set(paths)) and not turned
    if len(paths) > 1 and not is_uniform and not (after and after[0][0] == "resize"):
        return Followed(
            nothing, "images of different sizes were stretched to one batch: use a batch size of 1"
        )
    for number, path in enumerate(paths):
        if path in sizes:
            over = frame_transform([*before, *after], sizes[path])
            nothing[number] = (over, sizes[path]) if over.size == tuple(shape) else None
    why_not = (
        "image files are not known, or their size is not what the data set gave"
        if None in nothing
        else ""
    )
    return Followed(nothing, why_not)


def file_peaks(
    trainer: Trainer,
    module: Any,
    outputs: Any,
    loader: int = 0,
) -> tuple[list[tuple[int, int] | None], str]:
    """Pixel of its file that raised the score of each image of a batch.

    Args:
        trainer (Trainer): Of the running prediction or test.
        module (Any): The model, with ``peak`` of the latest batch.
        outputs (Any): The batch, after the model.
        loader (int): Number of its data loader, if there are several.

    Returns:
        tuple[list[tuple[int, int] | None], str]: Row and column, counted from zero, ``None`` where
        they are not known; and the reason why pixels of the model could not be followed back to the
        file, if they could not.
    """
    scores, peaks = getattr(outputs, "pred_score", None), getattr(module, "peak", None)
    number = 0 if scores is None else scores.numel()
    if peaks is None or len(peaks) != number or outputs.anomaly_map is None:
        return [None] * number, ""
    data_set = running_dataset(trainer, loader)
    while isinstance(data_set, Subset):
        data_set = data_set.dataset
    paths = [str(path or "") for path in outputs.image_path or [""] * number]
    after = _steps(getattr(module.pre_processor, "transform", None))
    over = followed(paths, _steps_of_data_set(data_set), after, outputs.image.shape[-2:])
    shape = outputs.anomaly_map.shape[-2:]
    pixels = [
        None if found is None else found[0].pixel(place, shape, found[1])
        for found, place in zip(over.placements, peaks.tolist(), strict=True)
    ]
    return pixels, over.why_not


def _steps(transform: Any) -> list[Step] | None:  # noqa: ANN401
    try:
        return list(geometric_steps(transform))
    except ValueError:
        return None


def _steps_of_data_set(data_set: Any) -> list[Step] | None:  # noqa: ANN401
    """What a data set does to the images that it reads."""
    if getattr(data_set, READS_HIGH_BIT_DEPTH, False):
        return []
    if not (hasattr(data_set, "augmentations") or hasattr(data_set, "transform")):
        return None
    return _steps(getattr(data_set, "augmentations", None) or getattr(data_set, "transform", None))
