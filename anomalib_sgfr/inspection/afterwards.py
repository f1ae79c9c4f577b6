"""What callbacks share that tell of a run: their turn after the post-processor, and what all processes found."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["Afterwards", "gathered"]


class Afterwards(Callback):
    """Comes after the post-processor, also if the user's callbacks come first: before it, scores are raw."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all but what keeps checkpoints."""
        del pl_module, stage
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it when it runs
        others = [callback for callback in every if callback is not self]
        last = next((place for place, other in enumerate(others) if isinstance(other, Checkpoint)), len(others))
        trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]  # see above


def gathered(found: Sequence[Any]) -> list[list[Any]]:
    """What each process of a run has found; the same in all. Of a single process, what it has.

    Args:
        found (Sequence[Any]): By this process; can be pickled.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [list(found)]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, list(found))
    return every
