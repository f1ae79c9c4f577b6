"""Callback that decides in which folder the results of a run go, and which run ``latest`` names."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.run_paths import (
    LATEST,
    make_results_folder,
    newest_complete_run,
    restore_latest,
    results_base,
    run_of_checkpoint,
    set_latest,
)

__all__ = [
    "AfterPostProcessor",
    "BatchCallback",
    "RunFolder",
    "image_paths",
    "image_paths_of",
    "results_folder",
    "unreadable_images",
]

logger = logging.getLogger(__name__)


class BatchCallback(Callback):
    """Base of callbacks that take the batches of a prediction and of a test alike."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the predictions of a batch."""
        del batch, batch_idx
        self.add_batch(trainer, pl_module, outputs, dataloader_idx)

    on_test_batch_end = on_predict_batch_end

    def add_batch(self, trainer: Trainer, module: Any, outputs: Any, loader: int) -> None:  # noqa: ANN401
        """Take the predictions of a batch, of a prediction or a test.

        Args:
            trainer (Trainer): Of the run.
            module (Any): The model.
            outputs (Any): anomalib's batch, with predictions.
            loader (int): Number of its data loader, if there are several.
        """


class AfterPostProcessor(BatchCallback):
    """Base of callbacks that run after the post-processor: before it, scores are raw."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move this callback behind all others but those that save checkpoints."""
        del pl_module, stage
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        others = [callback for callback in every if callback is not self]
        saving = (index for index, other in enumerate(others) if isinstance(other, Checkpoint))
        last = next(saving, len(others))
        trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]


class RunFolder(AfterPostProcessor):
    """Keep ``latest`` at the last complete run, and results of different checkpoints apart.

    ``Sgfr`` attaches one. anomalib points ``latest`` to the folder of a run when the run starts.
    This callback points it back to the last run that has a checkpoint, and to the new run when its
    fit has ended. So a run that fails or is killed leaves ``latest`` as it was.

    Predictions go to ``predictions/<images>`` in the folder of the run that saved the checkpoint. A
    test of another run's checkpoint goes to ``tests/<data>`` there; a test of the run's own
    checkpoint stays in the run's folder.

    Args:
        folder (str | Path | None): Folder for all results of predictions and tests; ``None`` for
            one of each checkpoint's own.

    Attributes:
        results (Path | None): Folder of the running or last prediction or test.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.results: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Point ``latest`` back to the last complete run until this fit has ended."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._restore_latest(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a fit that would restore a finished one and learn nothing."""
        if trainer.ckpt_path is not None and not getattr(pl_module, "update", True):
            logger.warning(
                "%s restores a fit that has ended: nothing is learnt from these images. Pass"
                " --model.update true (model.update = True) to add them to its banks, or leave"
                " ckpt_path out to fit afresh.",
                trainer.ckpt_path,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Point ``latest`` to this run, if it has saved a checkpoint."""
        del pl_module
        saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
        run = Path(trainer.default_root_dir)
        link = run.parent / LATEST
        if not trainer.is_global_zero or not link.is_symlink():
            return
        try:
            if saved and Path(saved).is_file():
                set_latest(run)
        except OSError as error:  # the checkpoint was saved all the same
            logger.warning("%s could not be pointed to %s: %s", link, run.name, error)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Log which run ``latest`` names after one that failed."""
        del pl_module
        run = Path(trainer.default_root_dir)
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            self._restore_latest(trainer)  # the failure may have come before setup
            complete = newest_complete_run(run.parent) if isinstance(exception, Exception) else None
            if complete is not None and complete != run and (run.parent / LATEST).is_symlink():
                logger.warning(
                    "The run has not ended: %s names %s, the last one that has.", LATEST, complete
                )

    @staticmethod
    def _restore_latest(trainer: Trainer) -> None:
        run = Path(trainer.default_root_dir)
        link = run.parent / LATEST
        try:
            if link.is_symlink() and link.resolve() == run.resolve():
                restore_latest(run)
        except OSError as error:
            logger.debug("%s stays as it is: %s", link, error)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder of a test's results."""
        self._choose(trainer, pl_module, "tests")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the folder of a prediction's results."""
        self._choose(trainer, pl_module, "predictions")

    def _choose(self, trainer: Trainer, module: Any, kind: str) -> None:  # noqa: ANN401
        if hasattr(module, "require_fitted"):  # before a folder is made in vain
            module.require_fitted("test" if kind == "tests" else "predict with")
        own = Path(self.folder) if self.folder is not None else None
        if own is None and trainer.is_global_zero:
            own = _folder_of_checkpoint(trainer, module, kind)
        # under Lightning's launchers every process has a root folder of its own: use the first's
        self.results = gathered(own)[0]


def _folder_of_checkpoint(trainer: Trainer, module: Any, kind: str) -> Path:  # noqa: ANN401
    """Make the folder for a checkpoint's results on these images."""
    root = Path(trainer.default_root_dir)
    saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
    checkpoint = trainer.ckpt_path or saved or getattr(module, "restored_from", None)
    run = run_of_checkpoint(checkpoint)
    if kind == "tests" and run == root.resolve():
        return root
    base = results_base(root, checkpoint, getattr(module, "name", "Sgfr"))
    paths = image_paths(trainer, kind)
    name = getattr(getattr(trainer, "datamodule", None), "name", "") or _name_of(paths)
    if run != base and checkpoint:
        name = f"{Path(checkpoint).stem}-{name}"
    listing = "\n".join(paths).encode(errors="surrogateescape")
    about = {
        "checkpoint": str(Path(checkpoint).resolve()) if checkpoint else None,
        "model": _fingerprint(module),
        "images": hashlib.sha256(listing).hexdigest()[:16],
    }
    try:
        return make_results_folder(base / kind / name, about)
    except OSError as error:
        logger.warning("Results go to %s: %s", root, error)
        return root


def _name_of(paths: Sequence[str]) -> str:
    """Name of the images' common folder, and of the image itself if it is the only one."""
    folders = {Path(path).absolute().parent for path in paths}
    if not folders:
        return "images"
    common = min(folders, key=lambda folder: len(folder.parts))
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    return f"{common.name}-{Path(paths[0]).stem}" if len(paths) == 1 else common.name or "images"


def _fingerprint(module: Any) -> str:  # noqa: ANN401
    """Hash of the tensors that a fit and the choice of a threshold change."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if ".banks." in name or name.startswith("post_processor."):
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def image_paths(trainer: Any, kind: str) -> list[str]:  # noqa: ANN401
    """Image files of a prediction or test, as far as its data sets list them.

    Args:
        trainer (Trainer): Trainer of the run.
        kind (str): ``"predictions"`` or ``"tests"``.

    Returns:
        list[str]: Paths in order; empty if a data set does not list its images.
    """
    name = "predict_dataloaders" if kind == "predictions" else "test_dataloaders"
    loaders = getattr(trainer, name, None)
    paths: list[str] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        found = image_paths_of(loader)
        if found is None:
            return []
        paths += found
    return paths


def image_paths_of(loader: Any) -> list[str] | None:  # noqa: ANN401
    """Image files of a data loader.

    Args:
        loader (DataLoader | None): Loader of a data set of anomalib's, or any other.

    Returns:
        list[str] | None: Paths in order; ``None`` if the data set does not list its images.
    """
    dataset = getattr(loader, "dataset", None)
    samples = getattr(dataset, "samples", None)
    paths = getattr(dataset, "image_filenames", None) if samples is None else samples["image_path"]
    return None if paths is None else list(map(str, paths))


def unreadable_images(trainer: Any) -> dict[str, str]:  # noqa: ANN401
    """Reason by path of each image that a prediction has left out.

    Args:
        trainer (Trainer): Of the run.
    """
    loaders = getattr(trainer, "predict_dataloaders", None)
    found: dict[str, str] = {}
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        found |= getattr(loader, "unreadable", {})
    return found


def results_folder(trainer: Any) -> Path:  # noqa: ANN401
    """Folder for the results of the running prediction or test.

    Args:
        trainer (Trainer): Trainer of the run.

    Returns:
        Path: Folder that the run's :class:`RunFolder` chose; the trainer's own without one.
    """
    callbacks = getattr(trainer, "callbacks", [])
    chosen = (item.results for item in callbacks if isinstance(item, RunFolder))
    return next(filter(None, chosen), Path(trainer.default_root_dir))
