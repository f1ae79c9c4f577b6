"""Modules whose numbers keep their types when a model is cast to half precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExemptFromCasts", "home"]

_WITHOUT_DOUBLES = {"mps"}


def home(device: torch.device) -> torch.device:
    """Where 64 bits of floating point are worked with, for what is on a device: there, or on the CPU if it has none."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLES else device


class ExemptFromCasts(nn.Module):
    """Mixin: ``half``, ``bfloat16``, ``to(dtype)`` and the like move the module to a device, but cast nothing.

    What atoms stand for is counted in 64 bits and searched in 32; the same in 16 would be another bank. Where a device
    has no 64 bits of floating point, these stay on the CPU.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """PyTorch's one gate for moves and casts: there is no public one for a module of its own."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64:
                device = fn(tensor.new_empty(0, dtype=torch.float32)).device
                if home(device) != device:
                    return tensor.to(home(device))
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, *args, **kwargs)
