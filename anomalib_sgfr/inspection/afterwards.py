"""What callbacks share that tell of a run: their turn after the post-processor."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["Afterwards"]


class Afterwards(Callback):
    """Comes after the post-processor, also if the user's callbacks come first: before it, scores are raw."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all but what keeps checkpoints."""
        del pl_module, stage
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it when it runs
        others = [callback for callback in every if callback is not self]
        last = next((place for place, other in enumerate(others) if isinstance(other, Checkpoint)), len(others))
        trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]  # see above
