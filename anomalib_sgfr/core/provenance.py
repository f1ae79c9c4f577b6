"""Where the atoms of a bank come from: numbers of images, and the images' paths."""

from collections.abc import Mapping, Sequence

import torch

from anomalib_sgfr.core.cover import Cover

__all__ = ["renumbered", "shifted"]


def renumbered(covers: Sequence[Cover], images: Mapping[int, str]) -> tuple[list[Cover], list[str]]:
    """Number anew the images that atoms come from, from zero, without gaps, each path once.

    Args:
        covers (Sequence[Cover]): Atoms of each scale.
        images (Mapping[int, str]): Paths by the numbers in the covers' ``origin``.

    Returns:
        tuple[list[Cover], list[str]]: The covers with the new numbers, and the paths they number. An image without a
        path gets the number -1.
    """
    every = torch.cat([cover.origin[:, 0] for cover in covers])
    numbers, place = every.unique(return_inverse=True)
    paths = [images.get(number) for number in numbers.tolist()]
    new = {path: index for index, path in enumerate(dict.fromkeys(path for path in paths if path is not None))}
    table = numbers.new_tensor([-1 if path is None else new[path] for path in paths])
    changed = [
        cover._replace(origin=torch.cat((image[:, None], cover.origin[:, 1:]), 1))
        for cover, image in zip(covers, table[place].split([len(cover.origin) for cover in covers]), strict=True)
    ]
    return changed, list(new)


def shifted(cover: Cover, by: int) -> Cover:
    """Add to the numbers of the images that atoms come from, where they are known."""
    image = cover.origin[:, :1]
    return cover._replace(origin=torch.cat((torch.where(image < 0, image, image + by), cover.origin[:, 1:]), 1))
