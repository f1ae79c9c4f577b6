"""Crops of training images around the patches that atoms come from, and their thumbnails."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_sgfr.core.patch_grid import PatchIndex
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.memory_bank import MemoryBankState
from anomalib_sgfr.torch_model import FittedState, SgfrModel

__all__ = ["CONTEXT", "THUMBNAIL", "TrainingCrops", "crop_around", "displayable", "thumbnails"]

CONTEXT = 5  # patches across a crop: features of a patch also depend on its neighbours
THUMBNAIL = 24  # pixels across a thumbnail
_CACHED_IMAGES = 64


def displayable(pre_processor: Any, image: Tensor) -> NDArray[np.float32]:  # noqa: ANN401
    """Undo the normalisation of a pre-processed image.

    Args:
        pre_processor (Any): The pre-processor, with a ``transform``.
        image (Tensor): Pre-processed image, shape ``(3, H, W)``.

    Returns:
        NDArray[np.float32]: The image, shape ``(H, W, 3)``, between 0 and 1.
    """
    transform = getattr(pre_processor, "transform", None)
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    for step in reversed(steps):
        if isinstance(step, Normalize):
            mean, std = (
                torch.tensor(values, device=image.device)[:, None, None]
                for values in (step.mean, step.std)
            )
            image = image * std + mean
    image = image.detach().float().cpu().clamp(0.0, 1.0)
    pixels: NDArray[np.float32] = image.permute(1, 2, 0).numpy()
    return pixels


def crop_around(image: NDArray[np.float32], patch: PatchIndex) -> NDArray[np.float32]:
    """Five by five patches around a patch of an image ``(H, W, 3)``; grey beyond the image."""
    window = patch.window(image.shape[:2], CONTEXT)
    reach = [round(length / 2) for length in window[2:]]
    padded = np.pad(image, (*((width, width) for width in reach), (0, 0)), constant_values=0.5)
    top, left = round(window.top + window.height / 2), round(window.left + window.width / 2)
    return padded[top : top + 2 * reach[0], left : left + 2 * reach[1]]


class TrainingCrops:
    """Crops of the training images that atoms come from.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): The model's pre-processor.
    """

    def __init__(self, model: SgfrModel, pre_processor: Any) -> None:  # noqa: ANN401
        self._pre_processor = pre_processor
        self._images = model.images
        self._bit_depth = model.bit_depth
        self._banks = list(model.banks)
        self._read = lru_cache(_CACHED_IMAGES)(self.read)

    def read(self, path: str) -> NDArray[np.float32] | None:
        """Training image as the model sees it, ``(H, W, 3)``; ``None`` if it cannot be read."""
        try:
            image = read_prepared(path, self._pre_processor, self._bit_depth)
        except (OSError, ValueError, SyntaxError):  # gone, or no image any more
            return None
        return displayable(self._pre_processor, image)

    def original(self, scale: int, atom: int) -> NDArray[np.float32] | None:
        """Crop of the training image around the patch that an atom began as.

        Args:
            scale (int): Number of the scale.
            atom (int): Row of the scale's memory bank.

        Returns:
            NDArray[np.float32] | None: Crop of shape ``(h, w, 3)``, between 0 and 1; ``None`` if
            the image is unknown or cannot be read.
        """
        number, row, column, *grid = self._banks[scale].origin[atom].tolist()
        image = self._read(self._images[number]) if 0 <= number < len(self._images) else None
        if image is None:
            return None
        return crop_around(image, PatchIndex(row, column, (grid[0], grid[1])))

    def crop(self, scale: int, atom: int) -> NDArray[np.float32] | None:
        """Crop of the training image, as :meth:`original`; else the atom's thumbnail, if any."""
        found = self.original(scale, atom)
        stored = self._banks[scale].thumbnails
        if found is None and len(stored):
            found = stored[atom].float().div(255.0).cpu().numpy()
        return found


def thumbnails(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    earlier: FittedState | None = None,
) -> list[Tensor]:
    """Thumbnails of all atoms.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): The model's pre-processor.
        earlier (FittedState | None): Earlier state of the model. Its thumbnails are kept for
            atoms that it has too, because their images may be gone.

    Returns:
        list[Tensor]: For each scale, shape ``(M, 24, 24, 3)``, ``uint8``: 1,728 bytes an atom; grey
        where an image cannot be read.
    """
    crops = TrainingCrops(model, pre_processor)
    found = []
    for scale, bank in enumerate(model.banks):
        known = {} if earlier is None else _by_origin(earlier.states[scale], earlier.images)
        origins = _origins(bank.origin, model.images)
        small = torch.full((len(bank.atoms), THUMBNAIL, THUMBNAIL, 3), 128, dtype=torch.uint8)
        for atom in bank.origin[:, 0].argsort().tolist():  # image by image
            if origins[atom] in known:
                small[atom] = known[origins[atom]]
            elif (crop := crops.original(scale, atom)) is not None:
                small[atom] = _shrunk(crop)
        found.append(small.to(bank.atoms.device))
    return found


def _shrunk(crop: NDArray[np.float32]) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None]
    size = (THUMBNAIL, THUMBNAIL)
    small = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).mul(255.0).round().to(torch.uint8)


def _by_origin(state: MemoryBankState, images: list[str]) -> dict[tuple[str, ...], Tensor]:
    """Thumbnails by origin, which identifies an atom of a scale in any order."""
    if state.thumbnails is None:
        return {}
    origins = _origins(state.clusters.origin, images)
    known = dict(zip(origins, state.thumbnails.cpu(), strict=True))
    known.pop((), None)
    return known


def _origins(origin: Tensor, images: list[str]) -> list[tuple[str, ...]]:
    """Image path, row, column and grid of each atom; empty where unknown."""
    return [
        (images[number], *map(str, patch)) if number >= 0 else ()
        for number, *patch in origin.tolist()
    ]
