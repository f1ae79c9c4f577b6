"""Collective communication between the processes of a run; no other module has any.

A collective waits until every process calls it. Call each of them in every process, outside any
condition that may differ between processes; a process that has nothing to contribute passes an
empty value. :func:`failing_together` raises the error of one process in all of them, so that none
waits for one that has failed.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["failing_together", "gathered", "gathered_tensors", "several", "share", "summed"]

_T = TypeVar("_T")

_may_fail_alone = ContextVar("_may_fail_alone", default=False)  # inside `failing_together`


def several() -> bool:
    """Whether there are other processes."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def share(items: Sequence[_T]) -> Sequence[_T]:
    """Part of the items that this process is to work on: every n-th of n processes."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if several() else items


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise in every process what the block raises in any of them. The block holds no collective.

    Raises:
        Exception: That of the lowest rank that failed; a ``RuntimeError`` with its type and message
            if it cannot be pickled.
        RuntimeError: If the block calls a collective, which would wait for a failed process.
    """
    _require_collective_allowed()
    failure: Exception | None = None
    entered = _may_fail_alone.set(True)
    try:
        yield
    except Exception as error:  # noqa: BLE001  # is raised below, everywhere
        failure = error
    finally:
        _may_fail_alone.reset(entered)
    first = next((error for error in gathered(_portable(failure)) if error is not None), None)
    if first is None:
        return
    if failure is not None and str(failure) == str(first):
        raise failure
    raise first from failure


def gathered(value: _T) -> list[_T]:
    """Values of all processes.

    Args:
        value (object): Value of this process; can be pickled.

    Returns:
        list: Values in the order of the ranks.
    """
    _require_collective_allowed()
    if not several():
        return [value]
    received: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(received, value)
    return received


def gathered_tensors(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of all processes.

    Shapes may differ. An empty tensor becomes one without rows of the others' type and axes.

    Args:
        tensors (Sequence[Tensor]): Tensors of this process, on a device that the default process
            group communicates on.

    Returns:
        list[list[Tensor]]: Tensors of each process, in the order of the ranks.

    Raises:
        ValueError: In all processes, if the numbers of tensors differ, or the types or numbers of
            axes of those with values.
    """
    described = gathered([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    if not several():
        return [list(tensors)]
    if len({len(theirs) for theirs in described}) > 1:
        msg = (
            f"processes hold different numbers of tensors: {[len(theirs) for theirs in described]}."
        )
        raise ValueError(msg)
    columns = []
    for tensor, theirs in zip(tensors, zip(*described, strict=True), strict=True):
        filled = [(shape, dtype) for shape, dtype in theirs if prod(shape)]
        if len({(len(shape), dtype) for shape, dtype in filled}) > 1:
            msg = f"tensors of different processes cannot be joined: {filled}."
            raise ValueError(msg)
        like, its_type = filled[0] if filled else max(theirs, key=lambda item: len(item[0]))
        shapes = [shape if prod(shape) else (0, *like[1:]) for shape, _ in theirs]
        columns.append(_exchanged(tensor, shapes, its_type))
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in described]


def summed(tensor: Tensor) -> Tensor:
    """Sum over all processes.

    Args:
        tensor (Tensor): Of one shape and type in all processes, on a device that the default
            process group communicates on.
    """
    _require_collective_allowed()
    total = tensor.clone()
    if several():
        distributed.all_reduce(total)
    return total


def _exchanged(
    tensor: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> list[Tensor]:
    """Gather tensors of known shapes as bytes, which every backend takes."""
    lengths = [prod(shape) * dtype.itemsize for shape in shapes]
    sent = tensor.new_zeros(max(lengths), dtype=torch.uint8)
    if tensor.numel():
        sent[: tensor.numel() * dtype.itemsize].view(dtype).copy_(tensor.detach().reshape(-1))
    received = [torch.empty_like(sent) for _ in shapes]
    distributed.all_gather(received, sent)
    return [
        part[:length].view(dtype).reshape(shape)
        for part, length, shape in zip(received, lengths, shapes, strict=True)
    ]


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one of the same message that can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  # its own
    except Exception:  # noqa: BLE001  # whatever an exception's own class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _require_collective_allowed() -> None:
    if _may_fail_alone.get():
        msg = (
            "a collective inside `failing_together` would wait for a process that has failed: call"
            " it before or after."
        )
        raise RuntimeError(msg)
