"""Steps over many patches within a bounded memory: here, and as a loop in an exported graph."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# PyTorch has no public name for it yet (2.14): this is the one place that uses the private one.
# When it moves, import it from where it is then; if it goes, `torch.stack([step(part) for part in
# parts])` is right for a fixed batch alone.
from torch._higher_order_ops import scan
from torch.nn import functional

__all__ = ["in_chunks", "in_parts", "mapped", "number_of_parts"]

# Largest number of values that one chunk may hold in temporary tensors: 64 MiB of float32.
_CHUNK_VALUES = 2**24
_EXPORTED_PATCHES = 2048  # of a scale at once in an exported graph


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


def number_of_parts(numbers: Sequence[int]) -> int:
    """Number of parts in which an exported graph takes the patches of an image.

    Args:
        numbers (Sequence[int]): Patches of each scale; symbols where an export does not know them.

    Returns:
        int: So many that a part of no scale is too large; one for numbers that are not known.
    """
    if not all(isinstance(number, int) for number in numbers):
        return 1
    return math.ceil(max(numbers) / _EXPORTED_PATCHES)


def in_parts(patches: Tensor, number: int) -> Tensor:
    """Patches of images in parts of equal size; zeros fill the last one.

    Args:
        patches (Tensor): Shape ``(B, N, d)``.
        number (int): Of parts of an image.

    Returns:
        Tensor: Shape ``(B * number, n, d)``, with ``n`` at least ``N / number``.
    """
    if number == 1:
        return patches
    filled = functional.pad(patches, (0, 0, 0, -patches.shape[1] % number))
    return filled.unflatten(1, (number, -1)).flatten(0, 1)
