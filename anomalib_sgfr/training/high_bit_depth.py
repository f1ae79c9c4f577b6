"""Lightning callback for images of more than 8 bits, and checks of the images of a run."""

import logging
from collections.abc import Sequence
from typing import Any

from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_sgfr.images.bit_depth import (
    ConstantImageCheck,
    check_synthetic_sources,
    infer_bit_depth,
    reread_images,
    running_dataset,
)
from anomalib_sgfr.images.headers import SUFFIXES, count_unread
from anomalib_sgfr.images.pre_processor import aspect_rule
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.image_size import require_one_size, squeezed, stretched_mask

__all__ = ["HighBitDepth"]

logger = logging.getLogger(__name__)


class HighBitDepth(Callback):
    """Read images of more than 8 bits again, which anomalib clips, and check images.

    Training images must not be nearly constant, and a batch must not hold images that anomalib has
    stretched to one size; an image that resizing squeezes is named.

    Sgfr attaches one, which comes before anomalib's pre-processor. (Lightning warns of hooks of
    these names in a model that is used beside a data module.)
    """

    def __init__(self) -> None:
        self._check: ConstantImageCheck | None = None
        self._has_warned = self._has_warned_of_mask = False

    def start_fit(
        self, trainer: Trainer, model: SgfrModel, bit_depth: int | None, *, update: bool
    ) -> None:
        """Choose the bit depth of a model: files of 16 bits may come from a camera of fewer.

        Args:
            trainer (Trainer): Of the fit, with its data loaders.
            model (SgfrModel): The model.
            bit_depth (int | None): As asked for; it also confirms that training images are right.
            update (bool): Whether the fit adds to an earlier one, whose bit depth stays.

        Raises:
            OSError: If an image cannot be read.
            ValueError: If an image cannot be read at its own bit depth.
        """
        self._check = ConstantImageCheck(user_confirmed=bit_depth is not None)
        check_synthetic_sources(getattr(trainer, "datamodule", None))
        samples = getattr(getattr(trainer.train_dataloader, "dataset", None), "samples", None)
        paths = [] if samples is None else samples["image_path"].tolist()
        _warn_of_unread(trainer, paths)
        if not update and bit_depth is None:
            model.bit_depth = infer_bit_depth(paths)

    def require_no_constant_images(self) -> None:
        """Refuse training images most of which are nearly constant.

        Raises:
            ValueError: If most of those seen are.
        """
        if self._check:
            self._check.finish()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which images of the folders are left out."""
        del pl_module
        loaders = trainer.predict_dataloaders
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            dataset = getattr(loader, "dataset", None)
            _warn_of_unread(trainer, getattr(dataset, "image_filenames", None))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Read images again; check them."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx)
        if self._check and isinstance(batch, ImageBatch):
            images: Any = batch.image
            self._check.update(images, batch.image_path)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read images of a batch again, in place, as its data set would have altered them."""
        del batch_idx
        if isinstance(batch, ImageBatch):
            model: Any = pl_module.model
            self._check_shapes(trainer, pl_module, batch.image_path or ())
            self._check_masks(batch)
            reread_images(batch, running_dataset(trainer, dataloader_idx), model.bit_depth)

    def _check_shapes(self, trainer: Trainer, module: Any, paths: Sequence[Any]) -> None:  # noqa: ANN401
        """Refuse a batch of images of several sizes; warn once of images that are squeezed."""
        rule = aspect_rule(module.pre_processor)
        if rule is not None and len(paths) > 1:
            require_one_size(paths, rule)
        aspect = getattr(module, "trained_aspect", None)
        if aspect is None or trainer.training or self._has_warned:
            return
        names = squeezed(paths, aspect)
        if names:
            self._has_warned = True
            logger.warning(
                "'%s' has another aspect ratio than the training images, height over width %.2f: it"
                " is squeezed, and its score may be high for that alone.",
                names[0],
                aspect,
            )

    def _check_masks(self, batch: ImageBatch) -> None:
        """Warn once of a mask of another shape than its image."""
        masks = None if self._has_warned_of_mask else batch.mask_path
        warning = stretched_mask(masks or (), batch.image_path or ())
        if warning:
            self._has_warned_of_mask = True
            logger.warning(warning)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def _warn_of_unread(trainer: Trainer, paths: Sequence[Any] | None) -> None:
    """Name kinds of images beside those of a data set, which anomalib leaves out silently."""
    unread = count_unread(paths or []) if trainer.is_global_zero else None
    if unread:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(unread.items()))
        logger.warning(
            "%d images are left out: %s. anomalib reads files named %s.",
            unread.total(),
            kinds,
            ", ".join(sorted(SUFFIXES)),
        )
