"""Pictures that anomalib's data sets clip, cut or leave turned, read again: at their true range,
upright.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.pre_processing.utils.spec import transform_to_spec
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from anomalib_sgfr.images.reading import (
    ROUNDING,
    FileHeader,
    evenly_spaced,
    read_header,
    read_image,
    warn_of_pages,
)

__all__ = [
    "READS_HIGH_BIT_DEPTH",
    "ConstantImageCheck",
    "check_synthetic_sources",
    "read_tensor",
    "reread_images",
    "to_batch",
]

logger = logging.getLogger(__name__)

READS_HIGH_BIT_DEPTH = "reads_true_range"  # attribute of a data set whose own images are right
_FLAT = 0.9  # share of one value in a picture that looks misread
_ENOUGH = 16  # pictures to judge a set by, before all were seen
_NAMED = 5
_SAMPLED = 64  # pixels along a side that are looked at


def read_tensor(path: str, bit_depth: int = 8) -> Tensor:
    """Read a file: as anomalib does, but upright, and one of more than 8 bits at its true range.

    Args:
        path (str): The file.
        bit_depth (int): Bits that the camera gives, for a deep file that does not say.

    Returns:
        Tensor: Shape ``(3, H, W)``, ``float32`` between 0 and 1.
    """
    return torch.from_numpy(read_image(path, bit_depth)).permute(2, 0, 1)


def reread_images(batch: Any, dataset: Any, bit_depth: int) -> None:  # noqa: ANN401
    """Replace the images of a batch whose files hold more than 8 bits, or are turned by their EXIF
    orientation.

    Args:
        batch (ImageBatch): Images as anomalib's data set gave them, before the model's own
            pre-processing.
        dataset (Any): Where it came from.
        bit_depth (int): Bits that the camera gives, for deep files that do not say.

    Raises:
        ValueError: If a file cannot be read at its true range, the data set alters images by chance
            or in a way that is not known, or a mask lies over a picture as it was before it was
            turned.
    """
    if getattr(dataset, READS_HIGH_BIT_DEPTH, False):
        return
    again: dict[int, Tensor] = {}
    for number, path in enumerate(batch.image_path or ()):
        try:
            found = FileHeader() if path is None else read_header(path)
        except OSError:  # no file of the name: the image is somebody else's
            continue
        if found.has_pages:
            warn_of_pages(str(path))
        if not found.is_plain:
            image = read_tensor(path, bit_depth)
            if found.is_turned and batch.mask_path:
                _require_mask_upright(batch.mask_path[number], path, image.shape[-2:])
            again[number] = _altered(image, dataset, path)
    size = batch.image.shape[-2:]
    sizes = {image.shape[-2:] for image in again.values()}
    if (
        len(again) == len(batch.image) and len(sizes) == 1 and size not in sizes
    ):  # turned: all as they are upright
        batch.image = torch.stack([again[number].to(batch.image) for number in range(len(again))])
        return
    for number, image in again.items():  # a batch is of one size, as anomalib makes it
        fitting = image if image.shape[-2:] == size else resize(image, list(size))
        batch.image[number] = fitting.to(batch.image)


def _require_mask_upright(mask: str, path: Any, size: Sequence[int]) -> None:  # noqa: ANN401
    """Refuse a mask of the size that a picture has before it is turned."""
    height, width = size
    if height == width or not mask or not Path(mask).is_file():
        return
    with Image.open(mask) as opened:
        if opened.size == (height, width):  # Pillow has the width first
            msg = (
                f"{path} is turned by its EXIF orientation to {height} x {width} pixels, its mask"
                f" has {width} x {height}: save the picture upright, or the mask as the picture"
                " looks."
            )
            raise ValueError(msg)


def check_synthetic_sources(datamodule: Any) -> None:  # noqa: ANN401
    """Refuse anomalies that anomalib has drawn on pictures that it misreads: it wrote what it saw.

    Args:
        datamodule (Any): Data of a run, or ``None``.

    Raises:
        ValueError: If there are such.
    """
    for name in ("val_data", "test_data"):
        dataset = getattr(datamodule, name, None)
        if isinstance(dataset, SyntheticAnomalyDataset):
            for path in evenly_spaced(dataset.source_samples["image_path"].tolist(), _SAMPLED):
                found = read_header(path)
                if not found.is_plain:
                    what = (
                        "with 8 bits"
                        if found.is_deep
                        else "on pictures as they are before they are turned"
                    )
                    more = "holds more" if found.is_deep else "has an EXIF orientation"
                    msg = (
                        f"anomalib draws synthetic anomalies {what}, and {path} {more}: choose"
                        " another val_split_mode or test_split_mode than synthetic."
                    )
                    raise ValueError(msg)


def _altered(image: Tensor, dataset: Any, path: Any) -> Tensor:  # noqa: ANN401
    """The image as its data set would have altered it."""
    if not (hasattr(dataset, "augmentations") or hasattr(dataset, "transform")):
        msg = (
            f"{_misread(path)}, and {type(dataset).__name__} does not say how it reads: if it reads"
            f" the true range, upright, let it have an attribute {READS_HIGH_BIT_DEPTH} = True."
        )
        raise ValueError(msg)
    transform = getattr(dataset, "augmentations", None) or getattr(dataset, "transform", None)
    if transform is None:
        return image
    try:
        transform_to_spec(transform)  # anomalib's own list of those that leave nothing to chance
    except ValueError as error:
        msg = (
            f"{_misread(path)}, and the data set alters it by {type(transform).__name__}, which"
            " cannot be repeated: leave out the augmentations, or save 8 bits, upright."
        )
        raise ValueError(msg) from error
    altered: Tensor = transform(image)
    return altered


def _misread(path: Any) -> str:  # noqa: ANN401
    what = (
        "holds more than 8 bits a value"
        if read_header(path).is_deep
        else "is turned by its EXIF orientation"
    )
    return f"{path} {what}, which anomalib's reader cannot give"


class ConstantImageCheck:
    """Whether training pictures look misread: one value in nine tenths of most of them.

    Args:
        vouched (bool): Whether the user says how to read them: then it is only told.
    """

    def __init__(self, vouched: bool = False) -> None:
        self._vouched = vouched
        self._seen = 0
        self._flat: list[str] = []

    def see(self, images: Tensor, paths: Sequence[Any] | None) -> None:
        """Look at a batch.

        Args:
            images (Tensor): Shape ``(B, 3, H, W)``, between 0 and 1.
            paths (Sequence | None): Their files.

        Raises:
            ValueError: If nearly all of enough pictures look misread.
        """
        steps = [max(1, length // _SAMPLED) for length in images.shape[-2:]]
        values = images[..., :: steps[0], :: steps[1]].flatten(1).float()
        middle = values.median(1, keepdim=True).values  # what most values are, if most are one
        share = ((values - middle).abs() < 0.5 / 255.0).float().mean(1)
        for number in (share >= _FLAT).nonzero().flatten().tolist():
            name = str(paths[number]) if paths else f"picture {self._seen + number + 1}"
            self._flat.append(f"{name} ({share[number]:.0%} of it is {middle[number, 0]:.3g})")
        self._seen += len(images)
        if self._seen >= _ENOUGH and len(self._flat) >= _FLAT * self._seen:
            self._refuse()

    def judge(self) -> None:
        """Refuse a set that looks misread; name the pictures that do so in another.

        Raises:
            ValueError: If most pictures do.
        """
        if 2 * len(self._flat) > self._seen:
            self._refuse()
        if self._flat:
            logger.warning("Nearly one value in %d of %d training pictures: %s.", *self._said())
        self._seen, self._flat = 0, []

    def _said(self) -> tuple[int, int, str]:
        more = ", ..." if len(self._flat) > _NAMED else ""
        return len(self._flat), self._seen, ", ".join(self._flat[:_NAMED]) + more

    def _refuse(self) -> None:
        count, seen, names = self._said()
        if self._vouched:
            return
        msg = (
            f"{count} of {seen} training pictures look misread, each being nearly one value"
            f" throughout: {names}. Look at them; if they are right, pass bit_depth (8 for ordinary"
            " files)."
        )
        raise ValueError(msg)


def to_batch(source: Any, bit_depth: int) -> Tensor:  # noqa: ANN401
    """A batch of images from what a user may call a model with.

    Args:
        source (Any): A batch ``(B, C, H, W)`` or one frame, see
            :func:`~anomalib_sgfr.images.reading.read_image`.
        bit_depth (int): Bits that the camera gives.

    Returns:
        Tensor: Shape ``(B, 3, H, W)``, ``float32`` between 0 and 1, or other floats as they came.

    Raises:
        TypeError: If it is not a picture.
        ValueError: If values are out of range, or the shape is not a picture's.
    """
    if (
        isinstance(source, Tensor)
        and source.is_floating_point()
        and source.ndim == 4  # noqa: PLR2004
        and source.shape[1] == 3  # noqa: PLR2004
    ):
        images = source.float() if source.dtype == torch.float64 else source
        if bool((images >= 0.0).all() & (images <= 1.0 + ROUNDING).all()):
            return images
    whole = source.ndim == 4 if hasattr(source, "ndim") else False  # noqa: PLR2004
    device = source.device if isinstance(source, Tensor) else None
    pictures = [read_image(frame, bit_depth) for frame in (source if whole else [source])]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in pictures]).to(device)
