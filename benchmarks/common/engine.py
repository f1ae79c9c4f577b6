"""Fits with anomalib's Engine, quiet and on the CPU."""

import logging
import tempfile
import warnings
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback

from anomalib_sgfr import Sgfr
from anomalib_sgfr.console import quiet_engine

__all__ = ["fitted", "quiet_fit", "silence"]


def silence() -> None:
    """Keep warnings, and what Lightning says of each run, out of a run's log."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def quiet_fit(model: AnomalibModule, datamodule: AnomalibDataModule, *callbacks: Callback) -> None:
    """Fit and leave no files behind."""
    with tempfile.TemporaryDirectory() as scratch:
        engine = quiet_engine(scratch, callbacks=list(callbacks), limit_val_batches=0)
        engine.fit(model=model, datamodule=datamodule)


def fitted(module: AnomalibDataModule, seed: int, **arguments: Any) -> Sgfr:  # noqa: ANN401
    """Fit Sgfr, with its defaults but for ``arguments``; for raw scores."""
    torch.manual_seed(seed)
    model = Sgfr(seed=seed, evaluator=False, visualizer=False, **arguments)
    quiet_fit(model, module)
    return model
