"""Callback that decides where a run's results go, and which run ``latest`` names."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.inspection.afterwards import Afterwards
from anomalib_sgfr.inspection.runs import (
    LATEST,
    claim_folder,
    give_back_latest,
    newest_whole_run,
    point_latest,
    results_base,
    run_of,
)

__all__ = ["RunFolder", "image_paths", "results_folder"]

logger = logging.getLogger(__name__)


class RunFolder(Afterwards):
    """Keep ``latest`` at the last run that ended, and results of different checkpoints apart. Sgfr attaches one.

    anomalib points ``latest`` to a run's folder when the run starts. From there it goes back to the last run that has a
    checkpoint, and forward again when the fit has ended: a run that fails or is killed leaves ``latest`` as it was.

    Predictions go to ``predictions/<images>`` in the run's folder of the checkpoint; tests of another run's checkpoint
    to ``tests/<data>`` there. A test of the run's own checkpoint stays in the run's folder.

    Args:
        folder (str | Path | None): For all results of predictions and tests; ``None`` for one of each checkpoint's own.

    Attributes:
        results (Path | None): Folder of the running or last prediction or test.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.results: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Point ``latest`` back to the last whole run until this one has ended."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._give_back(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a fit that would restore a finished one and learn nothing."""
        if trainer.ckpt_path is not None and not getattr(pl_module, "update", True):
            logger.warning(
                "%s restores a fit that has ended: nothing is learnt from these images. Pass --model.update true "
                "(model.update = True) to add them to its banks, or leave ckpt_path out to fit afresh.",
                trainer.ckpt_path,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Point ``latest`` to this run, if it has saved a checkpoint."""
        del pl_module
        saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (run.parent / LATEST).is_symlink():
            return
        try:
            if saved and Path(saved).is_file():
                point_latest(run)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("%s could not be pointed to %s: %s", run.parent / LATEST, run.name, error)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say which run ``latest`` names after one that failed."""
        del pl_module
        run = Path(trainer.default_root_dir)
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            self._give_back(trainer)  # a failure before setup
            whole = newest_whole_run(run.parent) if isinstance(exception, Exception) else None
            if whole is not None and whole != run and (run.parent / LATEST).is_symlink():
                logger.warning("The run has not ended: %s names %s, the last one that has.", LATEST, whole)

    @staticmethod
    def _give_back(trainer: Trainer) -> None:
        run = Path(trainer.default_root_dir)
        link = run.parent / LATEST
        try:
            if link.is_symlink() and link.resolve() == run.resolve():
                give_back_latest(run)
        except OSError as error:  # never worse than without
            logger.debug("%s stays as it is: %s", link, error)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder of a test's results."""
        self._choose(trainer, pl_module, "tests")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder of a prediction's results."""
        self._choose(trainer, pl_module, "predictions")

    def _choose(self, trainer: Trainer, module: Any, kind: str) -> None:  # noqa: ANN401
        if hasattr(module, "require_fitted"):  # before a folder is made for nothing
            module.require_fitted("test" if kind == "tests" else "predict with")
        own = Path(self.folder) if self.folder is not None else None
        if own is None and trainer.is_global_zero:
            own = _own_folder(trainer, module, kind)
        # every process has a root of its own under Lightning's launchers: the first one's counts
        self.results = gathered(own)[0]


def _own_folder(trainer: Trainer, module: Any, kind: str) -> Path:  # noqa: ANN401
    root = Path(trainer.default_root_dir)
    saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
    checkpoint = trainer.ckpt_path or saved or getattr(module, "restored_from", None)
    if kind == "tests" and run_of(checkpoint) == root.resolve():
        return root
    base = results_base(root, checkpoint, getattr(module, "name", "Sgfr"))
    paths = image_paths(trainer, kind)
    name = getattr(getattr(trainer, "datamodule", None), "name", "") or _name(paths)
    if run_of(checkpoint) != base and checkpoint:
        name = f"{Path(checkpoint).stem}-{name}"
    about = {
        "checkpoint": str(Path(checkpoint).resolve()) if checkpoint else None,
        "model": _fingerprint(module),
        "images": hashlib.sha256("\n".join(paths).encode(errors="surrogateescape")).hexdigest()[:16],
    }
    try:
        return claim_folder(base / kind / name, about)
    except OSError as error:
        logger.warning("Results go to %s: %s", root, error)
        return root


def _name(paths: Sequence[str]) -> str:
    """Of the images: their folder's, and of a single image that too."""
    folders = {Path(path).absolute().parent for path in paths}
    if not folders:
        return "images"
    common = min(folders, key=lambda folder: len(folder.parts))
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    return f"{common.name}-{Path(paths[0]).stem}" if len(paths) == 1 else common.name or "images"


def _fingerprint(module: Any) -> str:  # noqa: ANN401
    """Of what a fit and a choice of a threshold change."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if ".banks." in name or name.startswith("post_processor."):
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def image_paths(trainer: Any, kind: str) -> list[str]:  # noqa: ANN401
    """Image files that a prediction or test is about to see, as far as its data sets tell.

    Args:
        trainer (Trainer): Of the run.
        kind (str): ``"predictions"`` or ``"tests"``.

    Returns:
        list[str]: Paths in order; empty if a data set does not tell.
    """
    loaders = getattr(trainer, "predict_dataloaders" if kind == "predictions" else "test_dataloaders", None)
    paths: list[str] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        dataset = getattr(loader, "dataset", None)
        samples = getattr(dataset, "samples", None)
        found = getattr(dataset, "image_filenames", None) if samples is None else samples["image_path"]
        if found is None:
            return []
        paths += map(str, found)
    return paths


def results_folder(trainer: Any) -> Path:  # noqa: ANN401
    """Folder for the results of the running prediction or test.

    Args:
        trainer (Trainer): Of the run.

    Returns:
        Path: That of the run's :class:`RunFolder`; the trainer's own without one.
    """
    every = getattr(trainer, "callbacks", [])
    chosen = next((item.results for item in every if isinstance(item, RunFolder) and item.results), None)
    return chosen or Path(trainer.default_root_dir)
