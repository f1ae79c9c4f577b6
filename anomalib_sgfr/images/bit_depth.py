"""High bit depth: images that anomalib clips or leaves turned are read again.

anomalib's data sets read 8 bits a value, and ignore most EXIF orientations.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.pre_processing.utils.spec import transform_to_spec
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from anomalib_sgfr.images.headers import FileHeader, read_header, warn_of_pages
from anomalib_sgfr.images.reading import ROUNDING, read_image, read_raw
from anomalib_sgfr.images.resizing import plain

__all__ = [
    "READS_HIGH_BIT_DEPTH",
    "ConstantImageCheck",
    "check_synthetic_sources",
    "dataset_transform",
    "evenly_spaced",
    "infer_bit_depth",
    "read_tensor",
    "require_bit_depth",
    "reread_images",
    "running_dataset",
    "to_batch",
]

logger = logging.getLogger(__name__)

READS_HIGH_BIT_DEPTH = "reads_true_range"  # attribute of a data set whose own images are right
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_MAX_HEADERS, _MAX_IMAGES = 1000, 64  # of files, to infer the bit depth of a set
_MAX_SOURCES = 64  # of synthetic anomalies
_CONSTANT_SHARE = 0.9  # of the pixels of a nearly constant image, and of the images of a set
_MIN_IMAGES = 16  # to refuse a set before all of it is seen
_MAX_NAMES = 5
_SAMPLED_SIDE = 64  # pixels along a side that are compared


def require_bit_depth(bit_depth: int | None) -> None:
    """Check an argument ``bit_depth``.

    Args:
        bit_depth (int | None): As a user gave it.

    Raises:
        ValueError: If it is neither ``None`` nor an integer from 8 to 16.
    """
    if bit_depth is not None and not (isinstance(bit_depth, int) and 8 <= bit_depth <= 16):  # noqa: PLR2004
        msg = f"bit_depth must be an integer from 8 to 16, got {bit_depth!r}."
        raise ValueError(msg)


def infer_bit_depth(paths: Sequence[Path | str]) -> int:
    """Bits of the camera: the fewest of 8, 10, 12, 14, 16 that hold the largest value of a sample.

    Args:
        paths (Sequence[Path | str]): Image files: up to 1,000 headers and 64 images of more than 8
            bits are read.

    Returns:
        int: Bits; 8 if no file has more, or those that have tell their value of white.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file's kind is not supported, or it holds more than 16 bits.
    """
    high = [path for path in evenly_spaced(paths, _MAX_HEADERS) if read_header(path).high_bit_depth]
    bits = 8
    for path in evenly_spaced(high, _MAX_IMAGES):
        raw = read_raw(path)
        if raw.white is None and raw.values.dtype.kind in "iu":
            bits = max(bits, raw.significant_bits, int(raw.values.max()).bit_length())
    if bits > _BIT_DEPTHS[-1]:
        msg = (
            f"images hold values of {bits} bits, more than 16: save them with 16, or as floats"
            " between 0 and 1."
        )
        raise ValueError(msg)
    return next(depth for depth in _BIT_DEPTHS if depth >= bits)


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items of a sequence, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def read_tensor(path: str, bit_depth: int = 8) -> Tensor:
    """Image file as a tensor, see :func:`~anomalib_sgfr.images.reading.read_image`.

    Args:
        path (str): The file.
        bit_depth (int): Bits of the camera, for a file that does not tell its value of white.

    Returns:
        Tensor: Shape ``(3, H, W)``, ``float32`` between 0 and 1.
    """
    return torch.from_numpy(read_image(path, bit_depth)).permute(2, 0, 1)


def to_batch(source: Any, bit_depth: int) -> Tensor:  # noqa: ANN401
    """Batch of images from what a user may call a model with.

    Args:
        source (Any): A batch ``(B, C, H, W)``, or one image as
            :func:`~anomalib_sgfr.images.reading.read_image` takes it.
        bit_depth (int): Bits of the camera.

    Returns:
        Tensor: Shape ``(B, 3, H, W)``, ``float32`` between 0 and 1; a float batch of 3 channels
        keeps its dtype, but for ``float64``.

    Raises:
        TypeError: If it is not an image.
        ValueError: If values are out of range, or the shape is not that of an image.
    """
    is_batch = getattr(source, "ndim", 0) == 4  # noqa: PLR2004
    is_tensor = isinstance(source, Tensor)
    if is_tensor and is_batch and source.is_floating_point() and source.shape[1] == 3:  # noqa: PLR2004
        images = source.float() if source.dtype == torch.float64 else source
        if bool((images >= 0.0).all() & (images <= 1.0 + ROUNDING).all()):
            return images
    arrays = [read_image(image, bit_depth) for image in (source if is_batch else [source])]
    images = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    return images.to(source.device if is_tensor else None)


def running_dataset(trainer: Trainer, loader: int = 0) -> Any:  # noqa: ANN401
    """Data set of the running stage.

    Args:
        trainer (Trainer): Of the run.
        loader (int): Number of the data loader, if there are several.

    Returns:
        Any: The data set; ``None`` if the loader has none.
    """
    stage = trainer.state.stage
    if trainer.training or not stage:
        name = "train_dataloader"
    else:
        name = f"{stage.dataloader_prefix}_dataloaders"
    loaders = getattr(trainer, name, None)
    if isinstance(loaders, list | tuple) and loader < len(loaders):
        loaders = loaders[loader]
    return getattr(loaders, "dataset", None)


def reread_images(batch: Any, dataset: Any, bit_depth: int) -> None:  # noqa: ANN401
    """Replace the images of a batch that anomalib does not read correctly.

    These are images of more than 8 bits, and those with an EXIF orientation.

    Args:
        batch (ImageBatch): Images of anomalib's data set, before the pre-processor.
        dataset (Any): The data set.
        bit_depth (int): Bits of the camera, for files that do not tell their value of white.

    Raises:
        ValueError: If a file cannot be read, the data set augments images at random or in an
            unknown way, or a mask has the orientation that the image is stored in.
    """
    if getattr(dataset, READS_HIGH_BIT_DEPTH, False):
        return
    images: dict[int, Tensor] = {}
    for number, path in enumerate(batch.image_path or ()):
        try:
            header = FileHeader() if path is None else read_header(path)
        except OSError:  # no file has this name: the data set makes the image
            continue
        if header.has_more_pages:
            warn_of_pages(str(path))
        if not header.is_plain:
            image = read_tensor(path, bit_depth)
            if header.oriented and batch.mask_path:
                _require_upright_mask(batch.mask_path[number], path, image.shape[-2:])
            images[number] = _transformed(image, dataset, path)
    size = batch.image.shape[-2:]
    sizes = {image.shape[-2:] for image in images.values()}
    if len(images) == len(batch.image) and len(sizes) == 1 and size not in sizes:  # all turned
        batch.image = torch.stack([images[number].to(batch.image) for number in range(len(images))])
        return
    for number, image in images.items():  # anomalib stretches the images of a batch to one size
        fitting = image if image.shape[-2:] == size else resize(image, list(size))
        batch.image[number] = fitting.to(batch.image)


def _require_upright_mask(mask: str, path: Any, size: Sequence[int]) -> None:  # noqa: ANN401
    """Refuse a mask of the size that the image has before it is turned."""
    height, width = size
    if height == width or not mask or not Path(mask).is_file():
        return
    with Image.open(mask) as opened:
        if opened.size == (height, width):  # Pillow gives the width first
            msg = (
                f"{path} is turned by its EXIF orientation to {height} x {width} pixels, its mask"
                f" has {width} x {height}: save both of them upright."
            )
            raise ValueError(msg)


def dataset_transform(dataset: Any) -> Any:  # noqa: ANN401
    """Transform that a data set applies to the images that it reads.

    Args:
        dataset (Any): anomalib's or one like it.

    Returns:
        Any: Its augmentations or transform; ``None`` if there is none.

    Raises:
        AttributeError: If the data set does not tell.
    """
    if not (hasattr(dataset, "augmentations") or hasattr(dataset, "transform")):
        msg = f"{type(dataset).__name__} has neither augmentations nor transform."
        raise AttributeError(msg)
    return getattr(dataset, "augmentations", None) or getattr(dataset, "transform", None)


def _transformed(image: Tensor, dataset: Any, path: Any) -> Tensor:  # noqa: ANN401
    """Image as its data set would have transformed it."""
    high = read_header(path).high_bit_depth
    has = "holds more than 8 bits a value" if high else "is turned by its EXIF orientation"
    unreadable = f"{path} {has}, which anomalib's reader does not support"
    try:
        transform = dataset_transform(dataset)
    except AttributeError as error:
        msg = (
            f"{unreadable}, and {type(dataset).__name__} does not say how it reads: if it reads"
            f" all bits, upright, give it an attribute {READS_HIGH_BIT_DEPTH} = True."
        )
        raise ValueError(msg) from error
    if transform is None:
        return image
    try:
        transform_to_spec(plain(transform))  # anomalib's list of transforms that are not random
    except ValueError as error:
        msg = (
            f"{unreadable}, and the data set alters it by {type(transform).__name__}, which"
            " cannot be repeated: leave out the augmentations, or save 8 bits, upright."
        )
        raise ValueError(msg) from error
    transformed: Tensor = transform(image)
    return transformed


def check_synthetic_sources(datamodule: Any) -> None:  # noqa: ANN401
    """Refuse synthetic anomalies on images that anomalib reads wrongly: it saved what it read.

    Args:
        datamodule (Any): Data of a run, or ``None``.

    Raises:
        ValueError: If a source image has more than 8 bits or an EXIF orientation.
    """
    for name in ("val_data", "test_data"):
        dataset = getattr(datamodule, name, None)
        if not isinstance(dataset, SyntheticAnomalyDataset):
            continue
        for path in evenly_spaced(dataset.source_samples["image_path"].tolist(), _MAX_SOURCES):
            header = read_header(path)
            if not header.is_plain:
                how, has = (
                    ("with 8 bits", "holds more")
                    if header.high_bit_depth
                    else ("on images before they are turned", "has an EXIF orientation")
                )
                msg = (
                    f"anomalib draws synthetic anomalies {how}, and {path} {has}: choose another"
                    " val_split_mode or test_split_mode than synthetic."
                )
                raise ValueError(msg)


class ConstantImageCheck:
    """Check of training images for a nearly constant value, a sign that they were read wrongly.

    An image is nearly constant if nine tenths of its pixels have one value.

    Args:
        user_confirmed (bool): Whether the user gave the bit depth: then it only warns.
    """

    def __init__(self, user_confirmed: bool = False) -> None:
        self._user_confirmed = user_confirmed
        self._seen = 0
        self._constant: list[str] = []

    def update(self, images: Tensor, paths: Sequence[Any] | None) -> None:
        """Add a batch.

        Args:
            images (Tensor): Shape ``(B, 3, H, W)``, between 0 and 1.
            paths (Sequence[Any] | None): Their files.

        Raises:
            ValueError: If at least 16 images were seen, and nine tenths of them are constant.
        """
        row_step, column_step = (max(1, side // _SAMPLED_SIDE) for side in images.shape[-2:])
        values = images[..., ::row_step, ::column_step].flatten(1).float()
        median = values.median(1, keepdim=True).values
        share = ((values - median).abs() < 0.5 / 255.0).float().mean(1)
        for number in (share >= _CONSTANT_SHARE).nonzero().flatten().tolist():
            name = str(paths[number]) if paths else f"image {self._seen + number + 1}"
            self._constant.append(f"{name} ({share[number]:.0%} of it is {median[number, 0]:.3g})")
        self._seen += len(images)
        if self._seen >= _MIN_IMAGES and len(self._constant) >= _CONSTANT_SHARE * self._seen:
            self._refuse()

    def finish(self) -> None:
        """Check the whole set, warn of single constant images, and start anew.

        Raises:
            ValueError: If most images are constant.
        """
        if 2 * len(self._constant) > self._seen:
            self._refuse()
        if self._constant:
            logger.warning("Training images that are nearly constant: %s.", self._summary())
        self._seen, self._constant = 0, []

    def _summary(self) -> str:
        more = ", ..." if len(self._constant) > _MAX_NAMES else ""
        names = ", ".join(self._constant[:_MAX_NAMES]) + more
        return f"{len(self._constant)} of {self._seen}: {names}"

    def _refuse(self) -> None:
        if self._user_confirmed:
            return
        msg = (
            f"training images are nearly constant, as if they were read wrongly: {self._summary()}."
            " Look at them; if they are right, pass bit_depth (8 for ordinary files)."
        )
        raise ValueError(msg)
