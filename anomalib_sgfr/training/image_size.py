"""Size that images are resized to: as asked for, or the aspect ratio of the training images."""

import logging
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import nn

from anomalib_sgfr.features.backbone import accepts_size
from anomalib_sgfr.images.bit_depth import evenly_spaced
from anomalib_sgfr.images.frame_geometry import frame_transform, size_of_aspect
from anomalib_sgfr.images.pre_processor import (
    SgfrPreProcessor,
    aspect_rule,
    geometric_steps,
    output_size,
)
from anomalib_sgfr.images.reading import upright_size
from anomalib_sgfr.torch_model import SgfrModel

__all__ = [
    "ImageSize",
    "SizeChoice",
    "as_size",
    "choose_size",
    "require_drawn_on_image",
    "require_one_size",
    "squeezed",
    "stretched_mask",
    "training_sizes",
]

logger = logging.getLogger(__name__)

ImageSize = int | tuple[int, int] | Literal["square"] | None

_MAX_HEADERS = 1000  # training images whose sizes are read
_ONE_SHAPE = 1.1  # largest ratio of two aspect ratios that count as one
_MOST = 0.95  # share of the training images that must have it
_SQUEEZED = 1.5  # ratio of an image's aspect ratio to that of the training images, to be told
_TRIED = (200, 100)  # an aspect ratio that a backbone must accept if each image has its own


def as_size(size: int | Sequence[int] | str | None) -> tuple[int, int] | None:
    """Height and width from one number of pixels or two; ``None`` for a default size.

    Raises:
        ValueError: If it is no size.
    """
    if size is None or size == "square":
        return None
    both: tuple[Any, ...] = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(length, int) and length > 0 for length in both):  # noqa: PLR2004
        msg = (
            "image_size must be one or two whole numbers of pixels, at least 1, or 'square', got"
            f" {size!r}."
        )
        raise ValueError(msg)
    return both[0], both[1]


class SizeChoice:
    """Choice of the size that a model's default pre-processor resizes images to.

    Args:
        image_size (int | Sequence[int] | str | None): Height and width. One number, or ``None``:
            the side of a square of as many pixels, in the aspect ratio of the training images.
            ``"square"``: the default size, whatever the images are.
        pre_processor (nn.Module | None): Of the model.
        own_pre_processor (bool): Whether it is the user's, which stays as it is.

    Raises:
        ValueError: If size and pre-processor contradict each other.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] | str | None,
        pre_processor: nn.Module | None,
        *,
        own_pre_processor: bool,
    ) -> None:
        self._asked = as_size(image_size)
        size = output_size(pre_processor)
        if self._asked is not None and size != self._asked:
            its = "no one size" if size is None else _by(size)
            msg = (
                f"image_size is {_by(self._asked)}, but the pre_processor makes {its}: pass one of"
                " the two."
            )
            raise ValueError(msg)
        follows = not own_pre_processor and (image_size is None or isinstance(image_size, int))
        self._square = image_size == "square"
        self._side = size[0] if follows and size is not None and size[0] == size[1] else None
        self._batch_sizes: tuple[Any, int, int] | None = None
        self._aspect: float | None = None  # of the running fit
        self._before: tuple[SgfrPreProcessor, list[int], tuple[int, int] | None] | None = None

    def choose(
        self,
        model: SgfrModel,
        pre_processor: nn.Module | None,
        trainer: Trainer,
        region: Sequence[int] | None,
    ) -> None:
        """Choose the size for a fit, by the aspect ratios of its images.

        Args:
            model (SgfrModel): The model.
            pre_processor (nn.Module | None): Its pre-processor, which is changed.
            trainer (Trainer): Of the fit, with its data module.
            region (Sequence[int] | None): Height and width of the image that the region of interest
                is drawn on, if there is one: one size for all images.
        """
        if self._side is None or not isinstance(pre_processor, SgfrPreProcessor):
            return
        resize = pre_processor.resize
        if resize is None:
            return
        square = (self._side, self._side)
        step = model.embedder.scale_strides[-1]
        sizes = [region] if region else training_sizes(getattr(trainer, "datamodule", None))
        size, rule = choose_size(sizes, self._side, step)
        tried = size if rule is None else size_of_aspect(*_TRIED, *rule)
        if not accepts_size(model.embedder.backbone, tuple(model.embedder.layers), tried):
            size, rule = square, None
        self.undo()
        self._before = pre_processor, resize.size, resize.rule
        pre_processor.choose_size(size, rule)
        self._aspect = _common_aspect(sizes)
        if rule is None:
            logger.info("Images are resized to %s pixels (height x width).", _by(size))
        else:
            logger.info(
                "The training images have several aspect ratios: each image keeps its own, at about"
                " as many pixels as %s. A batch has one image.",
                _by(square),
            )

    def undo(self) -> None:
        """Return to the size before the running fit, if it chose one."""
        if self._before is not None:
            pre_processor, size, rule = self._before
            pre_processor.choose_size(size, rule)
            self._before = None

    def settle(self, earlier: float | None) -> float | None:
        """End the running fit: its size stays.

        Args:
            earlier (float | None): What an earlier fit returned.

        Returns:
            float | None: Height over width of the training images, if they have one aspect ratio
            and the size was chosen by it; that of the earlier fit if this one chose no size.
        """
        was_chosen, self._before = self._before is not None, None
        return self._aspect if was_chosen else earlier

    def require_same(self, model: SgfrModel, pre_processor: nn.Module | None) -> None:
        """Refuse another size than the restored one.

        Args:
            model (SgfrModel): The model.
            pre_processor (nn.Module | None): Its pre-processor, as a checkpoint has it.

        Raises:
            ValueError: If another one was asked for.
        """
        rule = aspect_rule(pre_processor)
        size = output_size(pre_processor) if rule is None else (rule[0], rule[0])
        if size is None or not (self._asked or self._square):
            return
        asked = "square" if self._asked is None else _by(self._asked)
        if self._square:
            same = rule is None and size[0] == size[1]
        elif self._side is None:
            same = rule is None and size == self._asked
        else:
            step = model.embedder.scale_strides[-1]
            same = size == (
                (_whole(self._side, rule[1]),) * 2
                if rule
                else size_of_aspect(*size, self._side, step)
            )
        if not same:
            its = _by(size) if rule is None else f"{rule[0]}, each image in its own aspect ratio"
            msg = (
                f"the checkpoint was fitted at an image_size of {its}, {asked} is asked for: leave"
                " image_size out, or fit again."
            )
            raise ValueError(msg)

    def limit_batches(self, pre_processor: nn.Module | None, trainer: Trainer | None) -> None:
        """Have a data module give one image a batch if images are of several sizes.

        anomalib stretches the images of a batch to one size.

        Args:
            pre_processor (nn.Module | None): Of the model.
            trainer (Trainer | None): Of the run.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        if aspect_rule(pre_processor) is None or not hasattr(datamodule, "eval_batch_size"):
            return
        self.release()
        self._batch_sizes = datamodule, datamodule.train_batch_size, datamodule.eval_batch_size
        datamodule.train_batch_size = datamodule.eval_batch_size = 1

    def release(self) -> None:
        """Give a data module back the batch sizes that it had before the run."""
        if self._batch_sizes is not None:
            datamodule, training, evaluation = self._batch_sizes
            datamodule.train_batch_size, datamodule.eval_batch_size = training, evaluation
            self._batch_sizes = None


def choose_size(
    sizes: Sequence[Sequence[int]], side: int, step: int
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Size for all images, and the rule by which each has its own if they differ.

    Args:
        sizes (Sequence[Sequence[int]]): Heights and widths of training images.
        side (int): See :func:`~anomalib_sgfr.images.frame_geometry.size_of_aspect`.
        step (int): As there.

    Returns:
        tuple[tuple[int, int], tuple[int, int] | None]: Height and width, of the aspect ratio that
        at least 95% of the images have within 10%, and ``None``; otherwise the square, and the
        rule, ``side`` as a multiple of ``step``, and ``step``. The square and ``None`` without
        sizes.
    """
    found = {size_of_aspect(height, width, side, step) for height, width in sizes}
    if len(found) < 2:  # noqa: PLR2004
        return next(iter(found), (side, side)), None
    aspect = _common_aspect(sizes)
    if aspect is None:
        whole = _whole(side, step)
        return (whole, whole), (whole, step)
    height, width = min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))
    return size_of_aspect(height, width, side, step), None


def _common_aspect(sizes: Sequence[Sequence[int]]) -> float | None:
    """Median height over width, if most are near it; ``None`` if not, or without sizes."""
    ratios = [height / width for height, width in sizes]
    middle = statistics.median(ratios) if ratios else math.nan
    alike = [1.0 / _ONE_SHAPE <= ratio / middle <= _ONE_SHAPE for ratio in ratios]
    return middle if ratios and sum(alike) >= _MOST * len(ratios) else None


def require_drawn_on_image(
    region: Sequence[int], sizes: Sequence[Sequence[int]], path: str | Path
) -> None:
    """Refuse a region of interest in another aspect ratio than the training images have in common.

    Args:
        region (Sequence[int]): Height and width of its mask image.
        sizes (Sequence[Sequence[int]]): Heights and widths of training images.
        path (str | Path): The mask image.

    Raises:
        ValueError: If it was not drawn on such an image.
    """
    aspect, ratio = _common_aspect(sizes), region[0] / region[1]
    if aspect is not None and not 1.0 / _ONE_SHAPE <= ratio / aspect <= _ONE_SHAPE:
        msg = (
            f"roi '{path}' has {_by(region)} pixels (height x width), the training images have"
            f" {_by(sizes[0])}: paint it on one of them."
        )
        raise ValueError(msg)


def require_one_size(paths: Sequence[Any], rule: tuple[int, int]) -> None:
    """Refuse a batch of images of several sizes, which anomalib has stretched to one.

    Args:
        paths (Sequence[Any]): Image files of the batch; those that cannot be read are passed over.
        rule (tuple[int, int]): See :class:`~anomalib_sgfr.images.resizing.AspectResize`.

    Raises:
        ValueError: If they are to be resized to different sizes.
    """
    found: dict[tuple[int, int], Any] = {}
    for path in paths:
        with suppress(OSError, SyntaxError, ValueError):
            found.setdefault(size_of_aspect(*upright_size(path), *rule), path)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        msg = (
            f"a batch holds images of different aspect ratios, '{first}' and '{second}': each keeps"
            " its own, so use a batch size of 1, or fit with image_size 'square'."
        )
        raise ValueError(msg)


def squeezed(paths: Sequence[Any], aspect: float) -> list[str]:
    """Image files whose aspect ratio is far from that of the training images.

    Args:
        paths (Sequence[Any]): The files; those that cannot be read are passed over.
        aspect (float): Height over width of the training images.

    Returns:
        list[str]: Those that resizing stretches by more than half along one side.
    """
    found = []
    for path in paths:
        with suppress(OSError, SyntaxError, ValueError):
            height, width = upright_size(path)
            ratio = height / width / aspect
            if not 1.0 / _SQUEEZED <= ratio <= _SQUEEZED:
                found.append(str(path))
    return found


def stretched_mask(masks: Sequence[Any], images: Sequence[Any]) -> str | None:
    """Warning of the first mask that has another aspect ratio than its image.

    Args:
        masks (Sequence[Any]): Files of the ground truth, or nothing where there is none.
        images (Sequence[Any]): Their images; files that cannot be read are passed over.

    Returns:
        str | None: ``None`` if there is none.
    """
    for mask, image in zip(masks, images, strict=False):
        if not mask:
            continue
        with suppress(OSError, SyntaxError, ValueError):
            its, wanted = upright_size(mask), upright_size(image)
            if not 1.0 / _ONE_SHAPE <= its[0] / its[1] / (wanted[0] / wanted[1]) <= _ONE_SHAPE:
                return (
                    f"mask '{mask}' has {_by(its)} pixels (height x width), its image"
                    f" {_by(wanted)}: it is stretched over the image, and pixel metrics may be"
                    " wrong."
                )
    return None


def _whole(side: int, step: int) -> int:
    """Side of a square as a multiple of the step, so that all sizes of a rule are."""
    return max(1, round(side / step)) * step


def training_sizes(datamodule: Any) -> list[tuple[int, int]]:  # noqa: ANN401
    """Sizes of training images, of at most 1,000, read from their headers.

    Args:
        datamodule (Any): anomalib's, after its setup, or ``None``.

    Returns:
        list[tuple[int, int]]: Heights and widths as the data module's augmentations give them;
        empty if they are not known.
    """
    samples = getattr(getattr(datamodule, "train_data", None), "samples", None)
    if samples is None:
        return []
    try:
        steps = geometric_steps(getattr(datamodule, "train_augmentations", None))
        paths = evenly_spaced(samples["image_path"].tolist(), _MAX_HEADERS)
        return [frame_transform(steps, upright_size(path)).input_size for path in paths]
    except (OSError, SyntaxError, ValueError):  # unknown augmentations, or files of another kind
        return []


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
