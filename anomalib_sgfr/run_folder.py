"""Folders and files of a run."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from anomalib_sgfr.core.processes import gathered

__all__ = [
    "LATEST",
    "Afterwards",
    "RunFolder",
    "atomic_write",
    "checkpoint_in",
    "claim_folder",
    "give_back_latest",
    "image_paths",
    "image_paths_of",
    "names_of",
    "newest_whole_run",
    "point_latest",
    "results_base",
    "results_folder",
    "run_of",
    "whole_checkpoint",
]

logger = logging.getLogger(__name__)


class Afterwards(Callback):
    """Comes after the post-processor, also if the user's callbacks come first: before it, scores
    are raw.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all but what keeps checkpoints."""
        del pl_module, stage
        # Lightning sets it when it runs
        every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in every if callback is not self]
        last = next(
            (place for place, other in enumerate(others) if isinstance(other, Checkpoint)),
            len(others),
        )
        # see above
        trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]


LATEST = "latest"
_ABOUT = "about.json"
_CHECKPOINT = PurePath("weights", "lightning", "model.ckpt")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Args:
        file (Path): The file; its folder is made.

    Yields:
        Path: A file beside it to write instead, which replaces it when the block has ended.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def checkpoint_in(run: Path) -> Path | None:
    """Checkpoint of a run: ``weights/lightning/model.ckpt``, or another in that folder.

    Args:
        run (Path): Folder of the run.

    Returns:
        Path | None: The file; ``None`` if there is none.
    """
    usual = run / _CHECKPOINT
    if usual.is_file():
        return usual
    return min(usual.parent.glob("*.ckpt"), default=None)


def _version(run: Path) -> int:
    found = re.fullmatch(r"v(\d+)", run.name)
    return int(found[1]) if found else -1


def newest_whole_run(root: Path) -> Path | None:
    """Newest run that ended: the one of the highest number that has a checkpoint.

    Args:
        root (Path): Folder of the runs, ``<root>/Sgfr/<data>``.
    """
    runs = sorted(
        (path for path in root.glob("v*") if _version(path) >= 0), key=_version, reverse=True
    )
    return next((run for run in runs if checkpoint_in(run)), None)


def point_latest(run: Path) -> None:
    """Point the link ``latest`` beside a run to it, in one step. Does nothing where ``latest`` is
    no link.

    Args:
        run (Path): Folder of the run, ``v0``, ``v1`` ...
    """
    link = run.parent / LATEST
    if not link.is_symlink():
        return
    part = link.with_name(f".{LATEST}-{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(run.resolve(), target_is_directory=True)
    part.replace(link)


def give_back_latest(run: Path) -> Path | None:
    """Point ``latest`` to the newest whole run, if it names a run without a checkpoint.

    Args:
        run (Path): Folder of a run that has not ended.

    Returns:
        Path | None: The run that ``latest`` names now; ``None`` if nothing was changed.
    """
    link = run.parent / LATEST
    whole = newest_whole_run(run.parent)
    if whole is None or not link.is_symlink() or checkpoint_in(link) is not None:
        return None
    point_latest(whole)
    return whole


def whole_checkpoint(path: Path) -> Path | None:
    """Checkpoint to use in place of one that is missing because ``latest`` names a run that did not
    end.

    Args:
        path (Path): ``.../latest/weights/lightning/model.ckpt``, or what else was asked for.

    Returns:
        Path | None: That of the newest whole run; ``None`` if the file is there, or no other can be
            meant.
    """
    if path.exists() or LATEST not in path.parts:
        return None
    place = len(path.parts) - 1 - path.parts[::-1].index(LATEST)
    run = newest_whole_run(Path(*path.parts[:place]))
    found = run and run.joinpath(*path.parts[place + 1 :])
    return found if found and found.exists() else None


def run_of(checkpoint: Path | str | None) -> Path | None:
    """Folder of the run that a checkpoint was saved by.

    Args:
        checkpoint (Path | str | None): The file.

    Returns:
        Path | None: ``None`` if the file does not lie where anomalib saves it.
    """
    if not checkpoint:
        return None
    parents = Path(checkpoint).resolve().parents
    usual = len(parents) > 2 and (parents[1].name, parents[0].name) == _CHECKPOINT.parts[:2]  # noqa: PLR2004
    return parents[2] if usual else None


def results_base(root: Path, checkpoint: Path | str | None, model: str = "Sgfr") -> Path:
    """Folder that predictions and tests of a checkpoint get folders in.

    Args:
        root (Path): The trainer's, ``<results>/Sgfr[/<data>]/v0``; ``.../latest`` where anomalib
            found no run.
        checkpoint (Path | str | None): That the model is from.
        model (str): anomalib's name of the model.

    Returns:
        Path: The checkpoint's own run if that lies in the same results; else ``root``, but never a
        folder ``latest``, which would be in the way of the link of that name.
    """
    run = run_of(checkpoint)
    root = root.absolute()
    top = next((part for part in (root, *root.parents) if part.name == model), None)
    if run is not None and top is not None and run.is_relative_to(top.resolve()):
        return run
    return root.parent if root.name == LATEST and not root.is_symlink() else root


def claim_folder(wanted: Path, about: Mapping[str, object]) -> Path:
    """Make a folder for results, which those of other input do not share.

    Args:
        wanted (Path): The folder. If it holds results of other input, a number is added: ``-2``,
            ``-3`` ...
        about (Mapping[str, object]): What the results are of, as JSON can keep it; written beside
            them.

    Returns:
        Path: The folder. The same input gets the same folder again.

    Raises:
        OSError: If the folder cannot be made.
    """
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        file = folder / _ABOUT
        number += 1
        if folder.exists() and not folder.is_dir():
            continue
        try:
            if json.loads(file.read_text(encoding="utf-8")) == dict(about):
                return folder
        except FileNotFoundError:
            if not folder.is_dir() or not any(folder.iterdir()):
                folder.mkdir(parents=True, exist_ok=True)
                with (
                    suppress(FileExistsError),
                    file.open("x", encoding="utf-8") as text,
                ):  # another process was first
                    json.dump(dict(about), text, indent=1)
                    return folder
                number -= 1
        except ValueError:  # of other making
            continue


def names_of(paths: Iterable[str], *, keep_suffix: bool = False) -> dict[str, Path]:
    """Names of results for images, each its own: their paths below the folder that holds all of
    them.

    Args:
        paths (Iterable[str]): Image files.
        keep_suffix (bool): Whether names end as the files do; without, only where that tells two
            images apart.

    Returns:
        dict[str, Path]: Relative paths.
    """
    whole = {path: Path(path).absolute() for path in paths}
    if not whole:
        return {}
    common = Path(os.path.commonpath([path.parent for path in whole.values()]))
    relative = {path: where.relative_to(common) for path, where in whole.items()}
    counts = Counter(name.with_suffix("") for name in set(relative.values()))
    bare = {path: name.with_suffix("") for path, name in relative.items()}
    return {
        path: relative[path] if keep_suffix or counts[bare[path]] > 1 else bare[path]
        for path in whole
    }


class RunFolder(Afterwards):
    """Keep ``latest`` at the last run that ended, and results of different checkpoints apart. Sgfr
    attaches one.

    anomalib points ``latest`` to a run's folder when the run starts. From there it goes back to the
    last run that has a
    checkpoint, and forward again when the fit has ended: a run that fails or is killed leaves
        ``latest`` as it was.

    Predictions go to ``predictions/<images>`` in the run's folder of the checkpoint; tests of
    another run's checkpoint to ``tests/<data>`` there. A test of the run's own checkpoint stays in
    the run's folder.

    Args:
        folder (str | Path | None): For all results of predictions and tests; ``None`` for one of
            each checkpoint's own.

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
        if not trainer.is_global_zero or not (run.parent / LATEST).is_symlink():
            return
        try:
            if saved and Path(saved).is_file():
                point_latest(run)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning(
                "%s could not be pointed to %s: %s", run.parent / LATEST, run.name, error
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say which run ``latest`` names after one that failed."""
        del pl_module
        run = Path(trainer.default_root_dir)
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            self._give_back(trainer)  # a failure before setup
            whole = newest_whole_run(run.parent) if isinstance(exception, Exception) else None
            if whole is not None and whole != run and (run.parent / LATEST).is_symlink():
                logger.warning(
                    "The run has not ended: %s names %s, the last one that has.", LATEST, whole
                )

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
        "images": (
            hashlib.sha256("\n".join(paths).encode(errors="surrogateescape")).hexdigest()[:16]
        ),
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
    loaders = getattr(
        trainer, "predict_dataloaders" if kind == "predictions" else "test_dataloaders", None
    )
    paths: list[str] = []
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        found = image_paths_of(loader)
        if found is None:
            return []
        paths += found
    return paths


def image_paths_of(loader: Any) -> list[str] | None:  # noqa: ANN401
    """Image files of a data loader; ``None`` if its data set does not tell.

    Args:
        loader (DataLoader | None): Of a data set of anomalib's, or any other.
    """
    dataset = getattr(loader, "dataset", None)
    samples = getattr(dataset, "samples", None)
    paths = getattr(dataset, "image_filenames", None) if samples is None else samples["image_path"]
    return None if paths is None else list(map(str, paths))


def results_folder(trainer: Any) -> Path:  # noqa: ANN401
    """Folder for the results of the running prediction or test.

    Args:
        trainer (Trainer): Of the run.

    Returns:
        Path: That of the run's :class:`RunFolder`; the trainer's own without one.
    """
    every = getattr(trainer, "callbacks", [])
    chosen = next(
        (item.results for item in every if isinstance(item, RunFolder) and item.results), None
    )
    return chosen or Path(trainer.default_root_dir)
