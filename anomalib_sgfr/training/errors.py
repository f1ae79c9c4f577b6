"""Images that cannot be read, and notes on a failed run: what errors of other packages mean."""

import copy
import logging
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from anomalib_sgfr.images.reading import why_unreadable
from anomalib_sgfr.run_folder import image_paths, image_paths_of, unreadable_images
from anomalib_sgfr.run_paths import no_checkpoint
from anomalib_sgfr.training.checkpoint import damage

__all__ = [
    "Reason",
    "add_reasons",
    "leave_out_unreadable",
    "name_unreadable",
    "remedy",
]

logger = logging.getLogger(__name__)

_SEARCHED_S = 30.0  # seconds spent to find images that cannot be read
_NAMED = 10  # most images that an error names, beside the log
_LOADERS = ("train_dataloader", "val_dataloaders", "test_dataloaders", "predict_dataloaders")


class Reason(str):
    """Note on an exception of another package that tells the user what is wrong."""

    __slots__ = ()


# messages of anomalib's data sets and metrics, the files that raise them, and what to do
_REMEDIES = (
    (
        r"not enough values to unpack \(expected 2, got 0\)",
        "anomalib/data/",
        (
            "too few good images: anomalib splits images to test with off the training images, and"
            " none are left. Pass at least 5 in --data.normal_dir, or others to test with:"
            " --data.normal_test_dir, --data.abnormal_dir."
        ),
    ),
    (
        r"Mismatch between anomalous images and mask images|cannot assign \d+ input values",
        "anomalib/data/",
        (
            "--data.mask_dir must hold one mask for each image of --data.abnormal_dir, named as the"
            " image is: 000.png for 000.jpg."
        ),
    ),
    (
        r"Cannot update metric of type .*(?:name|field:) pred_(?:label|mask)",
        "anomalib/metrics/",
        (
            "a metric of labels or masks cannot be among val_metrics: the threshold is chosen when"
            " validation ends. Put F1Score and the like into test_metrics, or use F1Max, AUROC or"
            " AUPR, which take scores."
        ),
    ),
    (
        r"'\w+' object has no attribute '(?:val|test)_data'",
        "anomalib/data/",
        (
            "there are no images to validate or test with: pass --data.normal_test_dir or"
            " --data.abnormal_dir, or leave --data.val_split_mode and --data.test_split_mode as"
            " they are."
        ),
    ),
)


def add_reasons(trainer: Trainer, exception: Exception) -> None:
    """Add what is known of a failure to its exception, as notes.

    Args:
        trainer (Trainer): Of the run that failed.
        exception (Exception): How it failed.
    """
    wrong = damage(trainer.ckpt_path) or _other_file(trainer, exception)
    images = [
        f"{path} cannot be read: {reason}"
        for path, reason in _unreadable_images(trainer, exception)
    ]
    for text in (wrong, *images, remedy(exception)):
        if text:
            exception.add_note(Reason(text))


def _other_file(trainer: Trainer, exception: Exception) -> str | None:
    """That the file Lightning failed to read is not a checkpoint, but something PyTorch saved."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(exception.__traceback__))
    reading = any(
        code.co_name == "resume_start" and "checkpoint_connector" in code.co_filename
        for code in frames
    )
    if not reading or isinstance(exception, OSError):  # which name the file
        return None
    return no_checkpoint(str(trainer.ckpt_path), exception)


def remedy(exception: BaseException) -> str | None:
    """What an error of anomalib's data sets or metrics means, and what to do.

    Args:
        exception (BaseException): The error.

    Returns:
        str | None: ``None`` if it is not one of those known.
    """
    files = [
        Path(frame.f_code.co_filename).as_posix()
        for frame, _ in traceback.walk_tb(exception.__traceback__)
    ]
    for pattern, file, text in _REMEDIES:
        if re.search(pattern, str(exception)) and any(file in name for name in files):
            return text
    return None


def _unreadable_images(trainer: Trainer, exception: Exception) -> list[tuple[str, str]]:
    """First image of each data set that cannot be read, and why, if an image was being read.

    Errors of readers seldom name the file. The search takes half a minute at most.
    """
    # an exception from another process has its traceback as text only
    if read_image.__name__ not in "".join(traceback.format_exception(exception)):
        return []
    until = time.perf_counter() + _SEARCHED_S
    failed = []
    for name in _LOADERS:
        loaders = getattr(trainer, name, None)
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            for path in image_paths_of(loader) or ():
                if time.perf_counter() > until:
                    break
                reason = _why_unreadable(path)
                if reason:
                    failed.append((path, reason))
                    break
    return failed


def _why_unreadable(path: str) -> str | None:
    """Why anomalib cannot read an image; ``None`` if it can."""
    try:
        read_image(path)
    except Exception as error:  # noqa: BLE001  # whatever a reader may raise
        return f"{why_unreadable(path, error)}{_hint(Path(path))}"
    return None


def _hint(path: Path) -> str:
    if path.name.startswith("._"):
        return f" (macOS writes such files beside images: find '{path.parent}' -name '._*' -delete)"
    return ""


class _Unreadable(NamedTuple):
    """Image in place of which a data set has raised an error."""

    path: str
    reason: str


class _Guarded:
    """Data set that gives :class:`_Unreadable` for an image that cannot be read."""

    def __init__(self, dataset: Any, paths: Sequence[str]) -> None:  # noqa: ANN401
        self._dataset, self._paths = dataset, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        try:
            return self._dataset[index]
        except Exception:
            reason = _why_unreadable(self._paths[index])
            if reason is None:  # something else is wrong
                raise
            return _Unreadable(self._paths[index], reason)


class _Collated:
    """Collates a batch without its unreadable images, which are given beside it."""

    def __init__(self, collate: Any) -> None:  # noqa: ANN401
        self._collate = collate

    def __call__(self, items: list[Any]) -> tuple[Any, list[_Unreadable]]:
        read = [item for item in items if not isinstance(item, _Unreadable)]
        left_out = [item for item in items if isinstance(item, _Unreadable)]
        return self._collate(read) if read else None, left_out


class _ReadableLoader:
    """Loader that leaves out images that cannot be read.

    Args:
        loader (DataLoader): The loader.
        paths (Sequence[str]): Files of its data set.

    Attributes:
        dataset (Dataset): The data set.
        unreadable (dict[str, str]): Reason by path of each image that was left out.
    """

    def __init__(self, loader: DataLoader[Any], paths: Sequence[str]) -> None:
        self.dataset, self.unreadable = loader.dataset, dict[str, str]()
        self._loader = copy.copy(loader)
        # PyTorch refuses to set them
        guarded, collate = _Guarded(loader.dataset, paths), _Collated(loader.collate_fn)
        vars(self._loader).update(dataset=guarded, collate_fn=collate)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch, left_out in self._loader:
            self.unreadable.update(left_out)
            if batch is not None:
                yield batch


def leave_out_unreadable(trainer: Trainer) -> None:
    """Let a prediction of one process leave out images that cannot be read.

    A damaged file must not cost the results of all others. Several processes need as many batches
    each, and stop.

    Args:
        trainer (Trainer): Of the run, before its loaders are made.
    """
    # Lightning has no hook between loaders, which a checkpoint's batch sizes precede, and their use
    source = trainer.predict_loop._data_source  # noqa: SLF001
    vars(source).pop("dataloader", None)  # of an earlier run
    if trainer.world_size > 1:
        return
    module, given = trainer.lightning_module, source.dataloader

    def readable() -> Any:  # noqa: ANN401
        loaders = given()
        if trainer.lightning_module is not module:  # the run of another model
            return loaders
        if not isinstance(loaders, CombinedLoader):
            loaders = CombinedLoader(loaders, "sequential")
        loaders.flattened = list(map(_leaving_out, loaders.flattened))
        return loaders

    vars(source)["dataloader"] = readable


def _leaving_out(loader: Any) -> Any:  # noqa: ANN401
    """Loader that leaves out what cannot be read, if it names its images and makes batches."""
    paths = image_paths_of(loader) if isinstance(loader, DataLoader) else None
    if paths is None or loader.batch_sampler is None or len(paths) != len(loader.dataset):
        return loader
    return _ReadableLoader(loader, paths)


def name_unreadable(trainer: Trainer) -> None:
    """Name the images that a prediction has left out, after all others were predicted.

    Args:
        trainer (Trainer): Of the run.

    Raises:
        OSError: If there is one.
    """
    reasons = [f"{path} cannot be read: {why}" for path, why in unreadable_images(trainer).items()]
    if not reasons:
        return
    for reason in reasons[_NAMED:]:
        logger.error(reason)
    more = len(reasons) - _NAMED
    named = "; ".join(reasons[:_NAMED]) + (f"; and {more} more, see the log" if more > 0 else "")
    total = len(image_paths(trainer, "predictions"))
    others = f" {total - len(reasons)} of {total} images were predicted." if total > 1 else ""
    msg = f"{named}.{others}"
    raise OSError(msg)
