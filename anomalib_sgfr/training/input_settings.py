"""Input of a model: size, tiles, region of interest and bit depth, as asked for and as fitted."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.callbacks.tiler_configuration import TilerConfigurationCallback
from anomalib.pre_processing.utils.spec import spec_to_transform
from lightning.pytorch import Trainer
from torch import Tensor, nn

from anomalib_sgfr.features.backbone import require_size
from anomalib_sgfr.features.tiling import Tiling
from anomalib_sgfr.images.pre_processor import output_size
from anomalib_sgfr.images.roi import read_roi, roi_at_input
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.image_size import SizeChoice, require_drawn_on_image, training_sizes

__all__ = ["FittedInput", "InputSettings", "tiler_callbacks"]

logger = logging.getLogger(__name__)

# keys of a checkpoint; one without the first is of a version that did not keep its tiles
_TILING = "sgfr_tiling"
_PRE_PROCESSOR = "anomalib_pre_processor_config"
_TRANSFORM_NOT_KEPT = "sgfr_transform_not_kept"
# not read from the hyper-parameters: Lightning puts the arguments of a restored model there
_ROI = "sgfr_roi"
_BIT_DEPTH = "sgfr_bit_depth"
_ASPECT = "sgfr_aspect"
_CHECKPOINT = "the checkpoint"


class FittedInput(NamedTuple):
    """Tiles and region of interest that a model was fitted with.

    Attributes:
        tiling (Tiling | None): Tiles, if any.
        region (Tensor): As in :class:`~anomalib_sgfr.torch_model.SgfrModel`.
        roi (str | None): File that the region was read from.
        aspect (float | None): Height over width of the training images, see
            :meth:`~anomalib_sgfr.training.image_size.SizeChoice.settle`.
    """

    tiling: Tiling | None
    region: Tensor
    roi: str | None
    aspect: float | None = None


class InputSettings:
    """Size, tiles, region and bit depth that were asked for, and those of the fit.

    Args:
        model (SgfrModel): The model, which is given tiles and bit depth.
        pre_processor (nn.Module | None): Its pre-processor.
        image_size (int | Sequence[int] | str | None): As :class:`SizeChoice` takes it.
        tile_size (int | Sequence[int] | None): Height and width of a tile.
        tile_stride (int | Sequence[int] | None): Pixels from one tile to the next.
        roi (str | Path | None): Mask image of the region of interest.
        bit_depth (int | None): Bits that the camera gives.
        own_pre_processor (bool): Whether the pre-processor is the user's.

    Attributes:
        bit_depth (int | None): As given; the depth in use is the model's.
        tiling (Tiling | None): Tiles that the arguments ask for.
        fitted (FittedInput | None): What the model was fitted with; ``None`` before a fit.

    Raises:
        ValueError: If arguments contradict each other or the backbone.
    """

    def __init__(
        self,
        model: SgfrModel,
        pre_processor: nn.Module | None,
        *,
        image_size: int | Sequence[int] | str | None = None,
        tile_size: int | Sequence[int] | None = None,
        tile_stride: int | Sequence[int] | None = None,
        roi: str | Path | None = None,
        bit_depth: int | None = None,
        own_pre_processor: bool = False,
    ) -> None:
        self._sizes = SizeChoice(image_size, pre_processor, own_pre_processor=own_pre_processor)
        self._roi = None if roi is None else str(roi)
        self._own_pre_processor = own_pre_processor
        self.bit_depth = bit_depth
        self.fitted: FittedInput | None = None
        size = output_size(pre_processor)
        if size is not None:
            require_size(model.embedder.backbone, model.embedder.layers, size)
        if tile_size is None and tile_stride is not None:
            msg = f"tile_stride {tile_stride} needs a tile_size."
            raise ValueError(msg)
        self.tiling = (
            None if tile_size is None else Tiling.parse(tile_size, tile_stride, _stride(model))
        )
        model.tiler = None if self.tiling is None else self.tiling.tiler()
        model.bit_depth = bit_depth or 8

    def configure(
        self,
        model: SgfrModel,
        pre_processor: nn.Module | None,
        trainer: Trainer,
        *,
        fit: bool,
        update: bool,
    ) -> None:
        """Set tiles and region at the start of a run, after a callback may have set a tiler.

        If the run restores a checkpoint, :meth:`restore` does the rest.

        Raises:
            ValueError: If arguments, callback and fit disagree, or the region cannot be read.
        """
        try:
            asked = self._asked_tiling(model, trainer)
            if asked is not None:
                model.tiler = asked.tiler()
            if trainer.ckpt_path is not None:
                return
            if self.fitted is not None and (update or not fit):
                _require_same_tiling(asked, self.fitted.tiling, "the model")
                self.apply_fitted(model)
            elif fit:
                drawn = None if self._roi is None else tuple(read_roi(self._roi).shape)
                if drawn is not None:
                    sizes = training_sizes(getattr(trainer, "datamodule", None))
                    require_drawn_on_image(drawn, sizes, str(self._roi))
                self._sizes.choose(model, pre_processor, trainer, drawn)
                if self._roi is not None:
                    model.region = self._read_region(model, pre_processor)
            self._sizes.limit_batches(pre_processor, trainer)
        except ValueError:
            self.apply_fitted(model)
            raise

    def release(self) -> None:
        """End a run: a data module gets back the batch sizes that it had before."""
        self._sizes.release()

    def keep(self, model: SgfrModel) -> None:
        """Note that a model was fitted with the input that it has now."""
        roi = self.fitted.roi if self._roi is None and self.fitted is not None else self._roi
        aspect = self._sizes.settle(None if self.fitted is None else self.fitted.aspect)
        self.fitted = FittedInput(Tiling.from_tiler(model.tiler), model.region, roi, aspect)

    def apply_fitted(self, model: SgfrModel) -> None:
        """Give a model the input of its fit, if it had one, and undo one that has not ended."""
        self._sizes.undo()
        if self.fitted is None:
            return
        model.tiler = None if self.fitted.tiling is None else self.fitted.tiling.tiler()
        model.region = self.fitted.region.to(model.region.device)

    def save(
        self, checkpoint: dict[str, Any], model: SgfrModel, pre_processor: nn.Module | None
    ) -> None:
        """Put the settings into a checkpoint as plain data; the region is in the model's state."""
        tiling = Tiling.from_tiler(model.tiler)
        checkpoint[_TILING] = None if tiling is None else tiling.state()
        checkpoint[_ROI] = self._roi if self.fitted is None else self.fitted.roi
        checkpoint[_BIT_DEPTH] = model.bit_depth
        checkpoint[_ASPECT] = None if self.fitted is None else self.fitted.aspect
        transform = getattr(pre_processor, "transform", None)
        kept = checkpoint.get(_PRE_PROCESSOR, {}).get("transform")
        checkpoint[_TRANSFORM_NOT_KEPT] = (
            repr(transform) if transform is not None and kept is None else None
        )

    def check(self, checkpoint: dict[str, Any], pre_processor: nn.Module | None) -> None:
        """Refuse a checkpoint of another bit depth or pre-processor, before anything is restored.

        If no checkpoint can keep the pre-processor, its configuration is removed.

        Raises:
            ValueError: If they differ.
        """
        fitted = checkpoint.get(_BIT_DEPTH, 8)
        if self.bit_depth not in {None, fitted} and fitted > 8:  # noqa: PLR2004
            msg = (
                f"the checkpoint's training images were read with bit_depth {fitted}, the model has"
                f" {self.bit_depth}: pass --model.bit_depth {fitted}, or fit again."
            )
            raise ValueError(msg)
        own: Any = pre_processor if self._own_pre_processor else None
        lost = checkpoint.get(_TRANSFORM_NOT_KEPT)
        if lost and own is None:
            msg = (
                f"{_CHECKPOINT} was fitted with a pre_processor that no checkpoint can keep: pass"
                f" it again. It did {lost}"
            )
            raise ValueError(msg)
        if lost:
            checkpoint.pop(_PRE_PROCESSOR, None)
        elif hasattr(own, "checkpoint_config"):
            had_one = checkpoint.get("anomalib_components_enabled", {}).get("pre_processor", True)
            config = checkpoint.get(_PRE_PROCESSOR) if had_one else {}
            if config is not None and config != own.checkpoint_config():
                its = repr(spec_to_transform(config["transform"])) if config else "none"
                msg = (
                    f"{_CHECKPOINT} was fitted with another pre_processor: leave yours out, or fit"
                    f" again. It had {its}"
                )
                raise ValueError(msg)

    def restore(
        self,
        checkpoint: dict[str, Any],
        model: SgfrModel,
        pre_processor: nn.Module | None,
        trainer: Trainer | None,
    ) -> None:
        """Restore the settings of a checkpoint, after its pre-processor; refuse others.

        Raises:
            ValueError: If image size, tiles or region differ.
        """
        self._sizes.require_same(model, pre_processor)
        region = checkpoint["state_dict"].get("model.region", torch.empty(0, dtype=torch.uint8))
        roi = checkpoint.get(_ROI)
        self._require_same_region(region, roi, model, pre_processor)
        tiling = Tiling.from_tiler(model.tiler)
        if _TILING in checkpoint:
            tiling = Tiling.from_state(checkpoint[_TILING])
            _require_same_tiling(self._asked_tiling(model, trainer), tiling, _CHECKPOINT)
        model.bit_depth = self.bit_depth or checkpoint.get(_BIT_DEPTH, 8)
        self._sizes.settle(None)  # the size is the checkpoint's
        self.fitted = FittedInput(tiling, region.clone(), roi, checkpoint.get(_ASPECT))
        self.apply_fitted(model)
        self._sizes.limit_batches(pre_processor, trainer)

    def _asked_tiling(self, model: SgfrModel, trainer: Trainer | None) -> Tiling | None:
        """Tiles that the arguments or a callback ask for."""
        asked = self.tiling
        for callback in tiler_callbacks(trainer):
            if callback.remove_border_count:
                msg = (
                    "the tiler's remove_border_count must be 0, got"
                    f" {callback.remove_border_count}."
                )
                raise ValueError(msg)
            its = Tiling.parse(callback.tile_size, callback.stride, _stride(model))
            if asked is not None and asked != its:
                msg = (
                    f"the model's arguments ask for {asked}, the TilerConfigurationCallback for"
                    f" {its}: leave one out."
                )
                raise ValueError(msg)
            asked = its
        return asked

    def _read_region(self, model: SgfrModel, pre_processor: nn.Module | None) -> Tensor:
        region = roi_at_input(read_roi(str(self._roi)), pre_processor, f"roi '{self._roi}'")
        return region.to(model.region.device)

    def _require_same_region(
        self, fitted: Tensor, roi: str | None, model: SgfrModel, pre_processor: nn.Module | None
    ) -> None:
        """Refuse a region other than that of the fit, which was read from ``roi``."""
        if self._roi is None:
            return
        if not fitted.numel():
            msg = (
                f"{_CHECKPOINT} was fitted without a roi, '{self._roi}' is asked for: leave it"
                " out, or fit again."
            )
            raise ValueError(msg)
        if self._roi == roi and not Path(self._roi).is_file():
            return
        asked = self._read_region(model, pre_processor)
        if asked.shape == fitted.shape and torch.equal(asked.cpu(), fitted.cpu()):
            return
        if self._roi != roi:
            msg = (
                f"{_CHECKPOINT} was fitted with another roi than '{self._roi}': leave it out, or"
                " fit again."
            )
            raise ValueError(msg)
        logger.warning(
            "roi '%s' has changed since the fit: the region of the fit stays in use.", self._roi
        )


def tiler_callbacks(trainer: Trainer | None) -> list[TilerConfigurationCallback]:
    """A trainer's callbacks that ask for tiles."""
    return [
        callback
        for callback in getattr(trainer, "callbacks", [])
        if isinstance(callback, TilerConfigurationCallback) and callback.enable
    ]


def _stride(model: SgfrModel) -> int:
    """Stride of the coarsest scale, in pixels."""
    return model.embedder.scale_strides[-1]


def _require_same_tiling(asked: Tiling | None, fitted: Tiling | None, name: str) -> None:
    if asked is None or asked == fitted:
        return
    was = "without tiles" if fitted is None else f"with {fitted}"
    msg = f"{name} was fitted {was}, {asked} are asked for: leave them out, or fit again."
    raise ValueError(msg)
