"""Exact search of the nearest atoms: one product, one pass of minima, and little to sort.

Everything is made of operations that export to ONNX and OpenVINO and are fast there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.core.linear_algebra import middle, require_finite

__all__ = ["Index", "nearest", "search_index"]

_GROUP = 8  # atoms whose least distance stands for them all while the nearest are looked for


class Index(NamedTuple):
    """A bank made ready for the search of nearest atoms, by :func:`search_index`.

    Attributes:
        atoms (Tensor): Rows ``(b - centre, |b - centre|^2)``, in whole groups of eight, shape ``(8
            g, d + 1)``.
        centre (Tensor): Mean of the bank, shape ``(d,)``.
    """

    atoms: Tensor
    centre: Tensor


def search_index(bank: Tensor) -> Index:
    """Make a bank ready for :func:`nearest`.

    Args:
        bank (Tensor): Shape ``(M, d)``, floating point.

    Returns:
        Index: Of the same dtype.

    Raises:
        ValueError: If a value is not finite: such an atom would be passed over in silence.
    """
    require_finite(bank, "bank")
    centre = middle(bank)
    atoms = bank - centre
    missing = -len(bank) % _GROUP
    # what only fills a group is farther than any atom whose squared distance can be computed
    far = torch.finfo(bank.dtype).max / 4.0
    length = functional.pad(atoms.square().sum(1, keepdim=True), (0, 0, 0, missing), value=far)
    return Index(torch.cat((functional.pad(atoms, (0, 0, 0, missing)), length), 1), centre)


def nearest(target: Tensor, index: Index, k: int) -> Tensor:
    """Rows of the bank nearest to each target.

    Both are centred on the bank: the expansion ``|b|^2 - 2 x.b`` (without ``|x|^2``, which orders
    nothing) loses digits to a common offset, and post-activation features have a large one. The
    squared length of an atom is one more coordinate, which saves a pass over all distances. The
    ``k`` nearest lie in the ``k`` groups of atoms that come nearest, so that one pass of minima
    leaves few distances to sort.

    Args:
        target (Tensor): Shape ``(N, d)``, floating point.
        index (Index): Of a bank ``(M, d)`` of the same dtype.
        k (int): Between one and ``M``.

    Returns:
        Tensor: Shape ``(N, k)``, ``int64``, from nearest to farthest.
    """
    points = functional.pad(-2.0 * (target - index.centre), (0, 1), value=1.0)
    groups = index.atoms.shape[0] // _GROUP
    distance = (index.atoms @ points.T).unflatten(0, (groups, _GROUP))  # (g, 8, N)
    closest = distance.amin(1).topk(min(k, groups), dim=0, largest=False).indices  # (k, N)
    members = (
        closest.unsqueeze(1) * _GROUP + torch.arange(_GROUP, device=closest.device)[:, None]
    ).flatten(0, 1)
    # by their places in one row: runtimes have a fast routine for that, and a plain loop for a
    # gather along an axis
    number = points.shape[0]
    places = members * number + torch.arange(number, device=closest.device)  # (8 k, N)
    within = distance.flatten().index_select(0, places.flatten()).reshape(places.shape)
    return members.gather(0, within.topk(k, dim=0, largest=False).indices).T
