"""Crops of images as the model saw them: of a training image while it is there, a thumbnail when it
is gone.
"""

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

__all__ = ["THUMBNAIL", "Gallery", "crop", "displayed", "thumbnails"]

CONTEXT = 5  # patches across a crop: a patch pools its neighbours, and its network sees more
THUMBNAIL = 24  # pixels across a thumbnail
_KEPT_IMAGES = 64  # training images read lately


def displayed(pre_processor: Any, image: Tensor) -> NDArray[np.float32]:  # noqa: ANN401
    """A pre-processed image ``(3, H, W)`` as it looks, ``(H, W, 3)``, between 0 and 1."""
    transform = getattr(pre_processor, "transform", None)
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    for step in reversed(steps):
        if isinstance(step, Normalize):
            mean, std = (
                torch.tensor(values, device=image.device)[:, None, None]
                for values in (step.mean, step.std)
            )
            image = image * std + mean
    shown: NDArray[np.float32] = (
        image.detach().float().cpu().clamp(0.0, 1.0).permute(1, 2, 0).numpy()
    )
    return shown


def crop(image: NDArray[np.float32], place: PatchIndex) -> NDArray[np.float32]:
    """The surroundings of a patch of an image ``(H, W, 3)``; grey beyond the image."""
    window = place.window(image.shape[:2], CONTEXT)
    reach = [round(length / 2) for length in window[2:]]
    padded = np.pad(image, (*((width, width) for width in reach), (0, 0)), constant_values=0.5)
    top, left = round(window.top + window.height / 2), round(window.left + window.width / 2)
    return padded[top : top + 2 * reach[0], left : left + 2 * reach[1]]


class Gallery:
    """Crops of the training images that atoms come from.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
    """

    def __init__(self, model: SgfrModel, pre_processor: Any) -> None:  # noqa: ANN401
        self._pre_processor = pre_processor
        self._images = model.images
        self._bit_depth = model.bit_depth
        self._banks = list(model.banks)
        self._read = lru_cache(_KEPT_IMAGES)(self._load)

    def _load(self, path: str) -> NDArray[np.float32] | None:
        try:
            image = read_prepared(path, self._pre_processor, self._bit_depth)
        except (
            OSError,
            ValueError,
            SyntaxError,
        ):  # gone, or not an image any more, as Pillow's readers say it
            return None
        return displayed(self._pre_processor, image)

    def original(self, scale: int, atom: int) -> NDArray[np.float32] | None:
        """What an atom of a scale was seen in, or ``None`` if its image is gone or was never known."""
        bank = self._banks[scale]
        number, row, column, *grid = bank.origin[atom].tolist()
        image = self._read(self._images[number]) if 0 <= number < len(self._images) else None
        return None if image is None else crop(image, PatchIndex(row, column, (grid[0], grid[1])))

    def crop(self, scale: int, atom: int) -> NDArray[np.float32] | None:
        """The same, or the atom's thumbnail, if there is one."""
        found = self.original(scale, atom)
        pictures = self._banks[scale].thumbnails
        if found is None and len(pictures):
            found = pictures[atom].float().div(255.0).cpu().numpy()
        return found


def thumbnails(
    model: SgfrModel,
    pre_processor: Any,
    earlier: FittedState | None = None,
) -> list[Tensor]:
    """Thumbnails of all atoms.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        earlier (FittedState | None): What it was fitted to before: atoms of which there is a
            thumbnail keep it, also when their images are gone.

    Returns:
        list[Tensor]: For each scale, shape ``(M, 24, 24, 3)``, ``uint8``: 1,728 bytes an atom; grey
        where an image cannot be read.
    """
    gallery = Gallery(model, pre_processor)
    pictures = []
    for scale, bank in enumerate(model.banks):
        known = {} if earlier is None else _by_place(earlier.states[scale], earlier.images)
        places = _places(bank.origin, model.images)
        made = torch.full((len(bank.atoms), THUMBNAIL, THUMBNAIL, 3), 128, dtype=torch.uint8)
        for atom in bank.origin[:, 0].argsort().tolist():  # image by image
            if places[atom] in known:
                made[atom] = known[places[atom]]
                continue
            found = gallery.original(scale, atom)
            if found is not None:
                pixels = torch.from_numpy(np.ascontiguousarray(found)).permute(2, 0, 1)[None]
                small = functional.interpolate(
                    pixels, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True
                )
                made[atom] = small[0].permute(1, 2, 0).mul(255.0).round().to(torch.uint8)
        pictures.append(made.to(bank.atoms.device))
    return pictures


def _by_place(state: MemoryBankState, images: list[str]) -> dict[tuple[str, ...], Tensor]:
    """Thumbnails by what tells atoms of a scale apart, whatever their order: where each was seen."""
    if state.thumbnails is None:
        return {}
    known = dict(zip(_places(state.clusters.origin, images), state.thumbnails.cpu(), strict=True))
    known.pop((), None)
    return known


def _places(origin: Tensor, images: list[str]) -> list[tuple[str, ...]]:
    """Path of the image, and row, column and grid, of each atom; empty where that is not known."""
    return [
        (images[number], *map(str, place)) if number >= 0 else ()
        for number, *place in origin.tolist()
    ]
