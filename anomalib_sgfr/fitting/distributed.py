"""What the processes of a distributed fit exchange, and the one bank they make of it."""

import itertools
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.utils.data import DistributedSampler

from anomalib_sgfr.bank import BankState
from anomalib_sgfr.core.cover import Cover, merge
from anomalib_sgfr.core.provenance import renumbered, shifted
from anomalib_sgfr.torch_model import Learnt

_T = TypeVar("_T")

__all__ = ["drop_padding", "is_padding", "leave_out_empty", "several", "unite"]


def several() -> bool:
    """Whether other processes take part in the fit."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unite(own: Learnt, sizes: Sequence[int], tolerance: float = 0.0) -> Learnt:
    """Make one bank of what all processes learnt.

    Args:
        own (Learnt): What this process learnt; of more atoms than are to be kept a better bank is made.
        sizes (Sequence[int]): Largest number of atoms of each scale to keep.
        tolerance (float): Distance within which atoms of a scale stand for each other; see
            :func:`~anomalib_sgfr.core.cover.merge`.

    Returns:
        Learnt: The same on all processes; ``own`` where there is but one.
    """
    if not several():
        return own
    known = _gather_objects(own.images)
    covers, thresholds = [], []
    for state, size in zip(own.states, sizes, strict=True):
        gathered = enumerate(_gather(state.cover))
        every = [shifted(cover, sum(map(len, known[:rank]))) for rank, cover in gathered]
        cover, radius = merge(every, size, tolerance)
        covers.append(cover)
        thresholds.append(max(_largest(state.threshold, cover.atoms.device), radius))
    covers, images = renumbered(covers, dict(enumerate(itertools.chain.from_iterable(known))))
    return Learnt(list(map(BankState, covers, thresholds)), images)


def is_padding(loader: Any, batch: int, images: int) -> Tensor:  # noqa: ANN401
    """Which images of a batch are there for the second time, so that all processes have equally many.

    Args:
        loader (Any): The process's data loader.
        batch (int): Number of the batch in the process.
        images (int): In the batch; those before it had as many.

    Returns:
        Tensor: A mask of shape ``(images,)``.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return torch.zeros(images, dtype=torch.bool)
    place = batch * (loader.batch_size or 1) + torch.arange(images)  # in this process
    return place * sampler.num_replicas + sampler.rank >= len(cast("Sized", sampler.dataset))


def drop_padding(batch: Any, loader: Any, number: int) -> None:  # noqa: ANN401
    """Leave out of a batch, in place, the images that are there for the second time: metrics would count them twice.

    Args:
        batch (Any): anomalib's, of the process's data loader.
        loader (Any): The data loader.
        number (int): Of the batch in the process.
    """
    images = len(batch.image)
    kept = ~is_padding(loader, number, images)
    if kept.all():
        return
    rows = kept.nonzero().flatten().tolist()
    for field in ("image", *(name for name in vars(batch) if name != "image")):
        value = getattr(batch, field)
        if isinstance(value, Tensor) and value.ndim and len(value) == images:
            setattr(batch, field, value[rows])
        elif isinstance(value, list) and len(value) == images:
            setattr(batch, field, [value[row] for row in rows])


def leave_out_empty(evaluator: Any) -> None:  # noqa: ANN401
    """Have metrics not see batches that :func:`drop_padding` left empty: some cannot take them.

    Args:
        evaluator (Any): anomalib's callback.
    """
    for hook in ("on_validation_batch_end", "on_test_batch_end"):
        method = getattr(evaluator, hook)
        if not isinstance(method, partial):
            setattr(evaluator, hook, partial(_unless_empty, method))


def _unless_empty(method: Callable[..., None], trainer: Any, module: Any, outputs: Any, batch: Any, *rest: Any) -> None:  # noqa: ANN401
    if len(batch.image):
        method(trainer, module, outputs, batch, *rest)


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
