"""Steps over many patches within a bounded memory: here, and as a loop in an exported graph."""

from collections.abc import Callable

import torch
from torch import Tensor

# PyTorch has no public name for it yet (2.14): this is the one place that uses the private one.
# When it moves, import it from where it is then; if it goes, `torch.stack([step(part) for part in
# parts])` is right for a fixed batch alone.
from torch._higher_order_ops import scan

__all__ = ["by_parts", "in_chunks", "mapped"]

# Largest number of values that one chunk may hold in temporary tensors: 64 MiB of float32.
_CHUNK_VALUES = 2**24
_EXPORTED_PATCHES = 2048  # at once in an exported graph
_FEWEST_EXPORTED = 16


def in_chunks(step: Callable[[Tensor], Tensor], parts: Tensor, values_each: int) -> Tensor:
    """Apply a function to many parts, as many at a time as its temporary tensors may hold.

    Args:
        step (Callable[[Tensor], Tensor]): From some parts, shape ``(n, ...)``, to as many results.
        parts (Tensor): Shape ``(N, ...)``.
        values_each (int): Values that one part takes in temporary tensors.

    Returns:
        Tensor: Results in their order, ``N`` of them.
    """
    return torch.cat([step(chunk) for chunk in parts.split(max(1, _CHUNK_VALUES // values_each))])


def mapped(step: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """Apply a function to each part, one at a time: memory does not grow with their number.

    A loop of Python's over a batch-derived size would bake the batch into an exported graph.

    Args:
        step (Callable[..., Tensor]): From a part of each tensor, shape ``(...)``, to a result; of
            operations that export.
        *parts (Tensor): One or more, each of shape ``(n, ...)``.

    Returns:
        Tensor: Results, one after the other in a new first dimension.
    """

    def carry_on(carry: Tensor, part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return carry.clone(), step(*part)

    _, found = scan(carry_on, torch.zeros(1, device=parts[0].device), parts, dim=0)
    return found


def by_parts(step: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Apply a function to the patches of an image in an exported graph; in parts, if they are many.

    Args:
        step (Callable[[Tensor], Tensor]): As :func:`mapped` takes it: from patches, ``(n, d)``, to
            as many results.
        patches (Tensor): Shape ``(N, d)``.

    Returns:
        Tensor: Results, shape ``(N, ...)``.
    """
    number, part = patches.shape[0], None
    if isinstance(number, int) and number > _EXPORTED_PATCHES:
        sizes = range(_EXPORTED_PATCHES, _FEWEST_EXPORTED, -1)
        part = next((size for size in sizes if number % size == 0), None)
    if part is None:
        return step(patches)
    return mapped(step, patches.unflatten(0, (-1, part))).flatten(0, 1)
