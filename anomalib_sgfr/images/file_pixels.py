"""Pixels of the model's input followed back to the image file, for the peak of each score."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import Subset

from anomalib_sgfr.images.bit_depth import READS_HIGH_BIT_DEPTH, dataset_transform, running_dataset
from anomalib_sgfr.images.frame_geometry import FrameTransform, Step, frame_transform
from anomalib_sgfr.images.headers import read_header
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.images.reading import upright_size

__all__ = ["file_peaks", "file_transforms"]


def file_peaks(
    trainer: Trainer,
    module: Any,  # noqa: ANN401
    outputs: Any,  # noqa: ANN401
    loader: int = 0,
) -> tuple[list[tuple[int, int] | None], str]:
    """Pixel of its file at the peak of each image's score map.

    Args:
        trainer (Trainer): Of the running prediction or test.
        module (Any): The model, with ``peak`` of the latest batch.
        outputs (Any): The batch, with predictions.
        loader (int): Number of its data loader, if there are several.

    Returns:
        tuple[list[tuple[int, int] | None], str]: Row and column from zero, ``None`` where they are
        not known; and the reason why pixels could not be followed back, or an empty string.
    """
    scores, peaks = getattr(outputs, "pred_score", None), getattr(module, "peak", None)
    count = 0 if scores is None else scores.numel()
    if peaks is None or len(peaks) != count or outputs.anomaly_map is None:
        return [None] * count, ""
    dataset = running_dataset(trainer, loader)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    paths = [str(path or "") for path in outputs.image_path or [""] * count]
    after = _steps_or_none(getattr(module.pre_processor, "transform", None))
    transforms, why_not = file_transforms(
        paths, _dataset_steps(dataset), after, outputs.image.shape[-2:]
    )
    shape = outputs.anomaly_map.shape[-2:]
    pixels = [
        None if transform is None else transform.frame_pixel(peak, shape)
        for transform, peak in zip(transforms, peaks.tolist(), strict=True)
    ]
    return pixels, why_not


def file_transforms(
    paths: Sequence[str],
    before: Sequence[Step] | None,
    after: Sequence[Step] | None,
    input_size: Sequence[int],
) -> tuple[list[FrameTransform | None], str]:
    """Transforms from the model's input to the image files of a batch.

    Args:
        paths (Sequence[str]): Image files of the batch; empty where they are not known.
        before (Sequence[Step] | None): What the data set does to an image, see
            :func:`~anomalib_sgfr.images.frame_geometry.frame_transform`; ``None`` if unknown.
        after (Sequence[Step] | None): What the pre-processor does then; ``None`` if unknown.
        input_size (Sequence[int]): Height and width of the model's input.

    Returns:
        tuple[list[FrameTransform | None], str]: One for each image, ``None`` where pixels cannot be
        followed back; and the reason, or an empty string.
    """
    transforms: list[FrameTransform | None] = [None] * len(paths)
    if before is None or after is None:
        who = "data set" if before is None else "pre-processor"
        return transforms, f"the {who} moves pixels in a way that is not known"
    sizes: dict[str, tuple[int, int]] = {}
    oriented = False
    for path in filter(None, paths):
        try:
            sizes[path] = upright_size(path)
            oriented |= read_header(path).oriented
        except (OSError, ValueError, SyntaxError):  # no such file, or no image any more
            continue
    given = {frame_transform(before, size).input_size for size in sizes.values()}
    # anomalib stretches the images of a batch to one size: a resize to fixed height and width then
    # still covers the same part of the file, one that keeps the aspect or a crop does not
    is_uniform = len(given) == 1 and len(sizes) == len(set(paths)) and not oriented
    if len(paths) > 1 and not is_uniform and not (after and after[0][0] == "resize"):
        reason = "images of different sizes were stretched to one batch: use a batch size of 1"
        return transforms, reason
    for number, path in enumerate(paths):
        if path in sizes:
            found = frame_transform([*before, *after], sizes[path])
            transforms[number] = found if found.input_size == tuple(input_size) else None
    unknown = "image files are not known, or their size is not what the data set gave"
    return transforms, unknown if None in transforms else ""


def _dataset_steps(dataset: Any) -> list[Step] | None:  # noqa: ANN401
    """What a data set does to the pixels of the images that it reads; ``None`` if unknown."""
    if getattr(dataset, READS_HIGH_BIT_DEPTH, False):
        return []
    try:
        return _steps_or_none(dataset_transform(dataset))
    except AttributeError:
        return None


def _steps_or_none(transform: Any) -> list[Step] | None:  # noqa: ANN401
    try:
        return list(geometric_steps(transform))
    except ValueError:
        return None
