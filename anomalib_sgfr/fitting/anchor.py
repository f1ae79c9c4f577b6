"""The trainable parameter that PyTorch's data-parallel wrapper insists on, for a model that trains none."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

__all__ = ["DataParallelAnchor"]


class DataParallelAnchor(LightningModule):
    """Mixin that has the parameter while several processes fit; it is no part of the model, and in no checkpoint."""

    _anchor: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.register_parameter("_anchor", None)

    def dummy_loss(self) -> Tensor:
        """A loss of zero that lets Lightning's automatic optimisation run; of the parameter, if there is one."""
        return torch.zeros((), device=self.device, requires_grad=True) if self._anchor is None else 0 * self._anchor

    def setup(self, stage: str) -> None:
        """Add the parameter where a data-parallel strategy runs the fit, be it in one process."""
        super().setup(stage)
        if stage == "fit" and isinstance(self.trainer.strategy, ParallelStrategy):
            self._anchor = nn.Parameter(torch.zeros((), device=self.device))

    def teardown(self, stage: str) -> None:
        """Drop it."""
        super().teardown(stage)
        self._anchor = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore without it."""
        super().on_load_checkpoint(checkpoint)
        if self._anchor is not None:
            checkpoint["state_dict"]["_anchor"] = self._anchor.detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save without it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].pop("_anchor", None)
