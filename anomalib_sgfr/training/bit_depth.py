"""What a model does with pictures as cameras give them: files in a run, and frames in memory."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_sgfr.images.bit_depth import (
    ConstantImageCheck,
    check_synthetic_sources,
    reread_images,
    to_batch,
)
from anomalib_sgfr.images.file_pixels import running_dataset
from anomalib_sgfr.images.reading import SUFFIXES, count_unread, infer_bit_depth
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["FromCameras"]

logger = logging.getLogger(__name__)


class FromCameras(LightningModule, ABC):
    """Mixin that reads pictures at their true range, where anomalib would clip them, and looks at
    those to learn from.

    Attributes:
        bit_depth (int | None): As the user gave it; what is in use is the torch model's.
    """

    model: SgfrModel
    pre_processor: Any
    post_processor: Any
    bit_depth: int | None = None
    update: bool
    _looks: ConstantImageCheck | None = None

    @abstractmethod
    def require_fitted(self, action: str) -> None:
        """Refuse what only a fitted model can do; the model says when it is."""

    def on_train_start(self) -> None:
        """Choose the depth at which pictures are read: files of 16 bits may come from a camera of
        fewer.

        Raises:
            OSError: If a picture cannot be read.
            ValueError: If one cannot be read at its true range.
        """
        self._looks = ConstantImageCheck(vouched=self.bit_depth is not None)
        check_synthetic_sources(getattr(self.trainer, "datamodule", None))
        samples = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "samples", None)
        paths = [] if samples is None else samples["image_path"].tolist()
        _tell_left_out(self.trainer, paths)
        if not self.update and self.bit_depth is None:
            self.model.bit_depth = infer_bit_depth(paths)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Attach what reads pictures again, before anomalib's pre-processor."""
        callbacks = super().configure_callbacks()
        return [_TRUE_RANGE, *(callbacks if isinstance(callbacks, Sequence) else [callbacks])]

    def take_in(self, batch: Any, number: int) -> None:  # noqa: ANN401
        """Read images of a batch that hold more than 8 bits again, at their true range; look at
        those to learn from.

        Args:
            batch (Any): As the data set gave it, before the pre-processor.
            number (int): Of the loader, if there are several.

        Raises:
            ValueError: If one cannot be read so, or nearly all training images look misread.
        """
        if isinstance(batch, ImageBatch):
            reread_images(batch, running_dataset(self.trainer, number), self.model.bit_depth)
            if self.trainer.training and self._looks:
                images: Any = batch.image
                self._looks.see(images, batch.image_path)

    def require_good_looks(self) -> None:
        """Refuse to learn from pictures that look misread.

        Raises:
            ValueError: If most of those seen do.
        """
        if self._looks:
            self._looks.judge()

    def forward(self, batch: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Score images as the Engine does, whatever mode the model is in and however many threads
        call.

        Args:
            batch (Any): A batch of shape ``(B, C, H, W)`` or one frame: an array, a Pillow picture
                or a path, as :func:`~anomalib_sgfr.images.reading.read_image` takes it.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InferenceBatch: Maps, scores, labels and masks, of the size of the model's input.

        Raises:
            RuntimeError: If the model is not fitted.
            TypeError: If it is no picture.
            ValueError: If values are out of range, or the shape is not a picture's.
        """
        if torch.compiler.is_compiling():
            return super().forward(batch, *args, **kwargs)
        self.require_fitted("score with")
        images = to_batch(batch, self.model.bit_depth).to(self.device)
        # by what scores in any mode: a mode switched and switched back would be another thread's
        # meanwhile
        predicted = self.model.score_maps(
            images if self.pre_processor is None else self.pre_processor(images)
        ).prediction
        return predicted if self.post_processor is None else self.post_processor(predicted)


class _TrueRange(Callback):
    """A hook of the model itself would do, but that Lightning warns of each use of it beside a data
    module.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is left out."""
        del pl_module
        loaders = trainer.predict_dataloaders
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            _tell_left_out(
                trainer, getattr(getattr(loader, "dataset", None), "image_filenames", None)
            )

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        del trainer, batch_idx
        cast("FromCameras", pl_module).take_in(batch, 0)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        del trainer, batch_idx
        cast("FromCameras", pl_module).take_in(batch, dataloader_idx)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def _tell_left_out(trainer: Trainer, paths: Sequence[Any] | None) -> None:
    """Say which pictures beside those of a data set are left out, which anomalib does without a
    word.
    """
    others = count_unread(paths or []) if trainer.is_global_zero else None
    if others:
        said = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
        logger.warning(
            "%d pictures beside those that are read are left out: %s. anomalib reads files"
            " named %s.",
            others.total(),
            said,
            ", ".join(sorted(SUFFIXES)),
        )


_TRUE_RANGE = (
    _TrueRange()
)  # holds nothing; another one would replace it in a second run, with a word about it
