"""Exchange of covers between the processes of a distributed fit."""

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from anomalib_sgfr.sampling import Cover

_T = TypeVar("_T")

__all__ = ["gather", "gather_objects", "largest"]


def gather(cover: Cover) -> list[Cover]:
    """Give every process the covers of all, in the order of their ranks.

    Covers may differ in size. Tensors alone are exchanged, on their own device, by the default process group.

    Args:
        cover (Cover): This process's.

    Returns:
        list[Cover]: One for each process, the same on all of them; only ``cover`` where there is but one.
    """
    if _alone():
        return [cover]
    sizes = _all(torch.tensor([len(cover.atoms)], device=cover.atoms.device))
    most = max(int(size) for size in sizes)
    parts = [_all(torch.cat((part, part.new_zeros(most - len(part), *part.shape[1:])))) for part in cover]
    return [
        Cover(*(part[rank][: int(size)] for part in parts))  # without the padding
        for rank, size in enumerate(sizes)
    ]


def gather_objects(value: _T) -> list[_T]:
    """Give every process the values of all, in the order of their ranks; for what tensors cannot hold.

    Args:
        value (_T): This process's.

    Returns:
        list[_T]: One for each process.
    """
    if _alone():
        return [value]
    received: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(received, value)
    return received


def largest(value: float, device: torch.device) -> float:
    """The largest of all processes' values.

    Args:
        value (float): This process's.
        device (torch.device): Device that the process group communicates on.

    Returns:
        float: The same on all processes.
    """
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if not _alone():
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return float(tensor)


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def _all(tensor: Tensor) -> list[Tensor]:
    received = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(received, tensor.contiguous())
    return received
