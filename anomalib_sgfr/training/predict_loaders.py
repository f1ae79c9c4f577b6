"""Loaders of a prediction: without images that cannot be read, and with some for each process."""

import copy
import logging
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from anomalib_sgfr.images.reading import why_unreadable
from anomalib_sgfr.run_folder import image_paths, image_paths_of, unreadable_images

__all__ = ["name_unreadable", "prepare", "reason_unreadable"]

logger = logging.getLogger(__name__)

_NAMED = 10  # most images that an error names, beside the log


def prepare(trainer: Trainer) -> None:
    """Let a prediction of one process leave out images that cannot be read.

    A damaged file must not cost the results of all others. Several processes need as many batches
    each, and stop; each of them gets an image.

    Args:
        trainer (Trainer): Of the run, before its loaders are made.
    """
    # Lightning has no hook between loaders, which a checkpoint's batch sizes precede, and their use
    source = trainer.predict_loop._data_source  # noqa: SLF001
    vars(source).pop("dataloader", None)  # of an earlier run
    module, given = trainer.lightning_module, source.dataloader

    def loaders() -> Any:  # noqa: ANN401
        made = given()
        if trainer.lightning_module is not module:  # the run of another model
            return made
        if not isinstance(made, CombinedLoader):
            made = CombinedLoader(made, "sequential")
        made.flattened = [
            _leaving_out(loader) if trainer.world_size == 1 else _padded(loader, trainer)
            for loader in made.flattened
        ]
        return made

    vars(source)["dataloader"] = loaders


def _padded(loader: Any, trainer: Trainer) -> Any:  # noqa: ANN401
    """Loader that repeats images where there are fewer than processes, so that each predicts some.

    Lightning would stop the processes without an image while the others wait for them.
    :func:`~anomalib_sgfr.training.distributed.drop_padding` drops the repeated images.
    """
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, Sized) or len(sampler) >= trainer.world_size:
        return loader
    prepared = trainer._data_connector._prepare_dataloader  # noqa: SLF001
    return prepared(loader, shuffle=False, mode=RunningStage.VALIDATING)


def reason_unreadable(path: str) -> str | None:
    """Why anomalib cannot read an image; ``None`` if it can.

    Args:
        path (str): The file.

    Raises:
        MemoryError: If there is no memory to tell.
    """
    try:
        read_image(path)
    except MemoryError:
        raise
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
            # readers raise whatever they like; only a file that cannot be read is left out
            reason = reason_unreadable(self._paths[index])
            if reason is None:
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
