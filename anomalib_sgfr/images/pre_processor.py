"""Pre-processing that an exported model does exactly as the Engine does."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import Tensor
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    Grayscale,
    Identity,
    Normalize,
    Pad,
    Resize,
    ToDtype,
    Transform,
)

from anomalib_sgfr.images.bit_depth import read_tensor
from anomalib_sgfr.images.resizing import (
    AspectResize,
    ExactAspectResize,
    ExactResize,
    adaptable,
    exportable,
    plain,
)

__all__ = [
    "SgfrPreProcessor",
    "aspect_rule",
    "geometric_steps",
    "output_size",
    "read_prepared",
]

_RULE = "aspect_rule"  # key of a checkpoint
_TRIED_SIZES = ((31, 47), (64, 50))


class SgfrPreProcessor(PreProcessor):
    """anomalib's pre-processor, with antialiased resizing in exported models too.

    anomalib turns antialiasing off in what it exports, so that images larger than the model's input
    score differently after an export. Bilinear resizing to a given height and width is exported as
    :class:`~anomalib_sgfr.images.resizing.ExactResize`; all else is as in anomalib.

    Args:
        transform (Transform | None): As anomalib's pre-processor takes it.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(adaptable(transform))
        self._make_exact()

    def _make_exact(self) -> None:
        self.export_transform = exportable(self.transform, self.export_transform)

    @property
    def resize(self) -> AspectResize | None:
        """The resizing that a fit can choose; ``None`` if the transform has none."""
        steps = getattr(self.transform, "transforms", [self.transform])
        return next((step for step in steps if isinstance(step, AspectResize)), None)

    def choose_size(self, size: Sequence[int], rule: tuple[int, int] | None = None) -> None:
        """Resize otherwise from now on, also what anomalib's data modules were given.

        Args:
            size (Sequence[int]): Height and width.
            rule (tuple[int, int] | None): See :class:`~anomalib_sgfr.images.resizing.AspectResize`.
        """
        if self.resize is not None:
            self.resize.choose(size, rule)
            self.export_transform = get_exportable_transform(self.transform)
            self._make_exact()

    def checkpoint_config(self) -> dict[str, Any]:
        """Configuration to store: anomalib's, and the rule if images keep their aspect ratios."""
        config = PreProcessor(plain(self.transform)).checkpoint_config()
        rule = aspect_rule(self)
        return config if rule is None else {**config, _RULE: list(rule)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore a configuration of :meth:`checkpoint_config`, or of anomalib's."""
        before = self.resize
        super().load_checkpoint_config(config)
        self.transform = adaptable(self.transform)
        restored = self.resize
        if restored is not None:
            rule = config.get(_RULE)
            restored.choose(restored.size, None if rule is None else (int(rule[0]), int(rule[1])))
            if before is not None:  # data modules hold it
                before.choose(restored.size, restored.rule)
                self.transform = _with_resize(self.transform, before)
        self.export_transform = get_exportable_transform(self.transform)
        self._make_exact()


def _with_resize(transform: Any, resize: AspectResize) -> Any:  # noqa: ANN401
    """Transform with another object for its first :class:`AspectResize`."""
    if not isinstance(transform, Compose):
        return resize
    steps = list(transform.transforms)
    first = next(index for index, step in enumerate(steps) if isinstance(step, AspectResize))
    return Compose([*steps[:first], resize, *steps[first + 1 :]])


def read_prepared(path: str, pre_processor: Any, bit_depth: int = 8) -> Tensor:  # noqa: ANN401
    """Read an image file and pre-process it as the Engine does.

    Args:
        path (str): The file.
        pre_processor (Any): anomalib's or one like it, or ``None``.
        bit_depth (int): Bits of the camera.

    Returns:
        Tensor: Shape ``(3, H, W)``.
    """
    image = read_tensor(path, bit_depth)
    transform = getattr(pre_processor, "transform", None)
    return image if transform is None else transform(image)


def output_size(pre_processor: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Size of a pre-processor's output.

    Args:
        pre_processor (Any): anomalib's or one like it, or ``None``.

    Returns:
        tuple[int, int] | None: Height and width; ``None`` if they depend on the image.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return None
    try:
        sizes = {tuple(transform(torch.zeros(3, *size)).shape[-2:]) for size in _TRIED_SIZES}
    except (RuntimeError, TypeError, ValueError):  # not a transform of images
        return None
    return sizes.pop() if len(sizes) == 1 else None


def aspect_rule(pre_processor: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Rule of a pre-processor, if each image keeps its aspect ratio.

    Args:
        pre_processor (Any): Sgfr's or another one, ``None`` for none.

    Returns:
        tuple[int, int] | None: Side and step, see
        :class:`~anomalib_sgfr.images.resizing.AspectResize`.
    """
    return getattr(getattr(pre_processor, "resize", None), "rule", None)


def geometric_steps(transform: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
    """Resizing, cropping and padding of a transform, in order.

    Args:
        transform (Any): torchvision's, or ``None``.

    Returns:
        list[tuple[Any, ...]]: As :func:`~anomalib_sgfr.images.frame_geometry.frame_transform` takes
        them.

    Raises:
        ValueError: If the transform moves pixels in any other way.
    """
    steps: list[tuple[Any, ...]] | None = None
    match transform:
        case None | Normalize() | ToDtype() | Identity() | Grayscale():
            steps = []
        case Compose():
            steps = [step for part in transform.transforms for step in geometric_steps(part)]
        case AspectResize(rule=(side, step)) | ExactAspectResize(rule=(side, step)):
            steps = [("aspect", side, step)]
        case Resize(size=[height, width]) | ExactResize(size=(height, width)):
            steps = [("resize", int(height), int(width))]
        case Resize(size=[shorter]):
            steps = [("shorter", int(shorter), transform.max_size)]
        case CenterCrop(size=(height, width)):
            steps = [("crop", int(height), int(width))]
        case Pad(padding_mode="constant", padding=padding):
            sides = padding if isinstance(padding, list | tuple) else [padding]
            steps = [("pad", *(list(map(int, sides)) * 4)[:4])]
    if steps is not None:
        return steps
    name = type(transform).__name__
    msg = (
        f"the pre-processor's {name} moves pixels in a way that cannot be followed back: use"
        " Resize, CenterCrop or Pad."
    )
    raise ValueError(msg)
