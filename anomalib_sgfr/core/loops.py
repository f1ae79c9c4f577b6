"""A loop that stays a loop in an exported graph."""

from collections.abc import Callable

import torch
from torch import Tensor

# PyTorch has no public name for it yet (2.14): this is the one place that uses the private one. When it moves, import
# it from where it is then; if it goes, `torch.stack([step(part) for part in parts])` is right for a fixed batch alone.
from torch._higher_order_ops import scan

__all__ = ["mapped"]


def mapped(step: Callable[[Tensor], Tensor], parts: Tensor) -> Tensor:
    """Apply a function to each part, one at a time: memory does not grow with their number.

    A loop of Python's over a batch-derived size would bake the batch into an exported graph.

    Args:
        step (Callable[[Tensor], Tensor]): From a part, shape ``(...)``, to a result; of operations that export.
        parts (Tensor): Shape ``(n, ...)``.

    Returns:
        Tensor: Results, one after the other in a new first dimension.
    """

    def carry_on(carry: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        return carry.clone(), step(part)

    _, found = scan(carry_on, torch.zeros(1, device=parts.device), parts, dim=0)
    return found
