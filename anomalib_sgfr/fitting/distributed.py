"""What the processes of a distributed fit exchange, and the one bank they make of it."""

import itertools
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from anomalib_sgfr.core.cover import Cover, merge
from anomalib_sgfr.core.provenance import renumbered, shifted

_T = TypeVar("_T")

__all__ = ["Learnt", "several", "unite"]


class Learnt(NamedTuple):
    """What a fit learnt.

    Attributes:
        covers (list[Cover]): The atoms of each scale, and what they stand for.
        thresholds (list[float]): Distances above which another atom would have been taken.
        images (list[str]): Paths of the images that the covers' ``origin`` numbers.
    """

    covers: list[Cover]
    thresholds: list[float]
    images: list[str]


def several() -> bool:
    """Whether other processes take part in the fit."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unite(own: Learnt, bank_size: int, tolerance: float = 0.0) -> Learnt:
    """Make one bank of what all processes learnt.

    Args:
        own (Learnt): What this process learnt; of more than ``bank_size`` atoms a better bank is made.
        bank_size (int): Largest number of atoms of a scale to keep.
        tolerance (float): Distance within which atoms of a scale stand for each other; see
            :func:`~anomalib_sgfr.core.cover.merge`.

    Returns:
        Learnt: The same on all processes; ``own`` where there is but one.
    """
    if not several():
        return own
    known = _gather_objects(own.images)
    covers, thresholds = [], []
    for own_cover, threshold in zip(own.covers, own.thresholds, strict=True):
        gathered = enumerate(_gather(own_cover))
        every = [shifted(cover, sum(map(len, known[:rank]))) for rank, cover in gathered]
        cover, radius = merge(every, bank_size, tolerance)
        covers.append(cover)
        thresholds.append(max(_largest(threshold, cover.atoms.device), radius))
    covers, images = renumbered(covers, dict(enumerate(itertools.chain.from_iterable(known))))
    return Learnt(covers, thresholds, images)


def _gather(cover: Cover) -> list[Cover]:
    """Covers of all processes, in the order of their ranks; they may differ in size.

    Tensors alone are exchanged, on their own device, by the default process group.
    """
    sizes = _all(torch.tensor([len(cover.atoms)], device=cover.atoms.device))
    most = max(int(size) for size in sizes)
    parts = [_all(torch.cat((part, part.new_zeros(most - len(part), *part.shape[1:])))) for part in cover]
    return [
        Cover(*(part[rank][: int(size)] for part in parts))  # without the padding
        for rank, size in enumerate(sizes)
    ]


def _gather_objects(value: _T) -> list[_T]:
    """Values of all processes, in the order of their ranks; for what tensors cannot hold."""
    received: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(received, value)
    return received


def _largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values; ``device`` is one that the process group communicates on."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return float(tensor)


def _all(tensor: Tensor) -> list[Tensor]:
    received = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(received, tensor.contiguous())
    return received
