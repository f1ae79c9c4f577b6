"""Modules whose numbers keep their types when a model is cast to half precision."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["ExemptFromCasts"]


class ExemptFromCasts(nn.Module):
    """Mixin: ``half``, ``bfloat16``, ``to(dtype)`` and the like move the module to a device, but cast nothing.

    What atoms stand for is counted in 64 bits and searched in 32; the same in 16 would be another bank.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """PyTorch's one gate for moves and casts: there is no public one for a module of its own."""

        def move(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, *args, **kwargs)
