"""Notes on a failed run: what errors of other packages mean, and which image cannot be read."""

import re
import time
import traceback
from pathlib import Path

from anomalib.data.utils import read_image
from lightning.pytorch import Trainer

from anomalib_sgfr.run_folder import image_paths_of
from anomalib_sgfr.run_paths import no_checkpoint
from anomalib_sgfr.training.checkpoint import damage
from anomalib_sgfr.training.predict_loaders import reason_unreadable

__all__ = ["Reason", "add_reasons", "remedy"]

_SEARCHED_S = 30.0  # seconds spent to find images that cannot be read
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
                reason = reason_unreadable(path)
                if reason:
                    failed.append((path, reason))
                    break
    return failed
