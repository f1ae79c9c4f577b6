"""What a model looks at: size, tiles and a region of interest, which stay with what was learnt."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.callbacks.tiler_configuration import TilerConfigurationCallback
from anomalib.pre_processing.utils.spec import spec_to_transform
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from anomalib_sgfr.features.backbone import require_size
from anomalib_sgfr.features.tiling import Tiling
from anomalib_sgfr.images.pre_processor import output_size
from anomalib_sgfr.images.roi import read_roi, roi_at_input
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Frame", "Framed", "as_size"]

logger = logging.getLogger(__name__)

# in a checkpoint; one without the first is of a version that forgot its tiles
_TILING = "sgfr_tiling"
_CONFIG = "anomalib_pre_processor_config"
_NOT_KEPT = "sgfr_transform_not_kept"
# its hyper-parameters are no witness: Lightning puts the arguments of a restored model there
_ROI = "sgfr_roi"


class Frame(NamedTuple):
    """What a bank was learnt with.

    Attributes:
        tiling (Tiling | None): Tiles, if any.
        region (Tensor): As in :class:`~anomalib_sgfr.torch_model.SgfrModel`.
        roi (str | None): Where the mask was read from.
    """

    tiling: Tiling | None
    region: Tensor
    roi: str | None


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width that a user gave as one number or two.

    Raises:
        ValueError: If it is neither.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(length, int) and length > 0 for length in both):  # noqa: PLR2004
        msg = f"image_size must be one or two whole numbers of pixels, at least 1, got {size!r}."
        raise ValueError(msg)
    return both[0], both[1]


class Framed(LightningModule):
    """Mixin that keeps tiles and region with what was learnt, and refuses others than those."""

    model: SgfrModel
    pre_processor: Any
    update: bool

    def look_at(
        self,
        image_size: int | Sequence[int] | None,
        tile_size: int | Sequence[int] | None,
        tile_stride: int | Sequence[int] | None,
        roi: str | Path | None,
        own_pre_processor: bool = False,
    ) -> None:
        """Take the arguments, once the model is made.

        Args:
            image_size (int | Sequence[int] | None): Height and width of the model's input.
            tile_size (int | Sequence[int] | None): Height and width of a tile.
            tile_stride (int | Sequence[int] | None): From one tile to the next.
            roi (str | Path | None): Mask picture.
            own_pre_processor (bool): Whether the pre-processor is the user's.

        Raises:
            ValueError: If they contradict each other or the backbone.
        """
        self._given_size = None if image_size is None else as_size(image_size)
        made = output_size(self.pre_processor)
        if self._given_size is not None and made != self._given_size:
            its = "no one size" if made is None else _by(made)
            msg = (
                f"image_size is {_by(self._given_size)}, but the pre_processor makes {its}: pass"
                " one of the two."
            )
            raise ValueError(msg)
        if made is not None:
            require_size(self.model.embedder.backbone, self.model.embedder.layers, made)
        if tile_size is None and tile_stride is not None:
            msg = f"tile_stride {tile_stride} needs a tile_size."
            raise ValueError(msg)
        self._given_tiling = (
            None if tile_size is None else Tiling.parse(tile_size, tile_stride, self._coarsest)
        )
        self.model.tiler = None if self._given_tiling is None else self._given_tiling.tiler()
        self._roi = None if roi is None else str(roi)
        self._has_own_pre_processor = own_pre_processor
        self._frame: Frame | None = None  # of what was learnt; nothing is known of it before a fit

    @property
    def _coarsest(self) -> int:
        return self.model.embedder.scale_strides[-1]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Give a tiler without a stride that of its documentation, its tile's: anomalib's own fails
        without one.
        """
        for callback in self._tilers():
            if callback.stride is None:
                callback.stride = callback.tile_size
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Choose what to look at: after the callbacks, one of which may have set a tiler.

        Raises:
            ValueError: If arguments, callback, and what was learnt disagree, or the region cannot
                be had.
        """
        super().setup(stage)
        try:
            self._look(stage)
        except ValueError:
            self.look_as_learnt()
            raise

    def _look(self, stage: str) -> None:
        asked = self._asked_tiling()
        if asked is not None:
            self.model.tiler = asked.tiler()
        if self.trainer.ckpt_path is not None:  # which is read after this
            return
        if self._frame is not None and (stage != "fit" or self.update):
            _require_same(asked, self._frame.tiling, "the model")
            self.look_as_learnt()
        elif stage == "fit" and self._roi is not None:
            self.model.region = self._read_region()

    def _tilers(self) -> list[TilerConfigurationCallback]:
        callbacks = getattr(self._trainer, "callbacks", [])
        return [
            item
            for item in callbacks
            if isinstance(item, TilerConfigurationCallback) and item.enable
        ]

    def _asked_tiling(self) -> Tiling | None:
        """Tiles that the arguments or a callback ask for."""
        asked = self._given_tiling
        for callback in self._tilers():
            if callback.remove_border_count:
                msg = (
                    "the tiler's remove_border_count must be 0, got"
                    f" {callback.remove_border_count}."
                )
                raise ValueError(msg)
            its = Tiling.parse(callback.tile_size, callback.stride, self._coarsest)
            if asked is not None and asked != its:
                msg = (
                    f"the model's arguments ask for {asked}, the TilerConfigurationCallback for"
                    f" {its}: leave one out."
                )
                raise ValueError(msg)
            asked = its
        return asked

    def _read_region(self) -> Tensor:
        found = roi_at_input(read_roi(str(self._roi)), self.pre_processor, f"roi '{self._roi}'")
        return found.to(self.model.region.device)

    def _require_same_region(self, theirs: Tensor, name: str, known: str | None) -> None:
        """Refuse a region other than what was learnt; ``known`` is the file that it came from,
        which may be gone.
        """
        if self._roi is None:
            return
        if not theirs.numel():
            msg = (
                f"{name} was fitted without a roi, '{self._roi}' is asked for: leave it out, or fit"
                " again."
            )
            raise ValueError(msg)
        if self._roi == known and not Path(self._roi).is_file():
            return
        ours = self._read_region()
        if ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.cpu()):
            return
        if self._roi == known:
            logger.warning(
                "roi '%s' has changed since the fit: what was learnt keeps the earlier one.",
                self._roi,
            )
            return
        msg = f"{name} was fitted with another roi than '{self._roi}': leave it out, or fit again."
        raise ValueError(msg)

    def keep_look(self) -> None:
        """Remember what has been learnt with."""
        roi = self._frame.roi if self._roi is None and self._frame is not None else self._roi
        self._frame = Frame(Tiling.from_tiler(self.model.tiler), self.model.region, roi)

    def look_as_learnt(self) -> None:
        """Return to what was learnt with, if anything was."""
        if self._frame is not None:
            self.model.tiler = None if self._frame.tiling is None else self._frame.tiling.tiler()
            self.model.region = self._frame.region.to(self.model.region.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the tiles, as plain data; the region is a part of the model's state."""
        super().on_save_checkpoint(checkpoint)
        tiling = Tiling.from_tiler(self.model.tiler)
        checkpoint[_TILING] = None if tiling is None else tiling.state()
        checkpoint[_ROI] = self._roi if self._frame is None else self._frame.roi
        transform = getattr(self.pre_processor, "transform", None)
        kept = checkpoint.get(_CONFIG, {}).get("transform")
        checkpoint[_NOT_KEPT] = repr(transform) if transform is not None and kept is None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore, and refuse what was asked for and is not what was learnt with.

        Raises:
            ValueError: If pre-processor, image size, tiles or region differ.
        """
        name = "the checkpoint"
        self._take_pre_processor(checkpoint, name)
        made = output_size(self.pre_processor)
        if self._given_size is not None and made is not None and made != self._given_size:
            msg = (
                f"{name} was fitted at an image_size of {_by(made)}, {_by(self._given_size)} is"
                " asked for: leave image_size out, or fit again."
            )
            raise ValueError(msg)
        region = checkpoint["state_dict"].get("model.region", torch.empty(0, dtype=torch.uint8))
        self._require_same_region(region, name, checkpoint.get(_ROI))
        tiling = Tiling.from_tiler(self.model.tiler)
        if _TILING in checkpoint:
            tiling = Tiling.from_state(checkpoint[_TILING])
            _require_same(self._asked_tiling(), tiling, name)
        self._frame = Frame(tiling, region.clone(), checkpoint.get(_ROI))
        self.look_as_learnt()

    def _take_pre_processor(self, checkpoint: dict[str, Any], name: str) -> None:
        """Restore; first refuse a pre-processor of the user's that is not what was learnt with."""
        own: Any = self.pre_processor if self._has_own_pre_processor else None
        lost = checkpoint.get(_NOT_KEPT)
        if lost and own is None:
            msg = (
                f"{name} was fitted with a pre_processor that no checkpoint can keep: pass it"
                f" again. It did {lost}"
            )
            raise ValueError(msg)
        if not lost and hasattr(own, "checkpoint_config"):
            had_one = checkpoint.get("anomalib_components_enabled", {}).get("pre_processor", True)
            config = checkpoint.get(_CONFIG) if had_one else {}
            if config is not None and config != own.checkpoint_config():
                its = repr(spec_to_transform(config["transform"])) if config else "none"
                msg = (
                    f"{name} was fitted with another pre_processor: leave yours out, or fit again."
                    f" It had {its}"
                )
                raise ValueError(msg)
        transforms = (
            {key: value for key, value in vars(own).items() if "transform" in key} if lost else {}
        )
        super().on_load_checkpoint(checkpoint)
        if own is not None:
            vars(own).update(transforms)  # in whose place anomalib has put nothing


def _require_same(asked: Tiling | None, fitted_state: Tiling | None, name: str) -> None:
    if asked is None or asked == fitted_state:
        return
    was = "without tiles" if fitted_state is None else f"with {fitted_state}"
    msg = f"{name} was fitted {was}, {asked} are asked for: leave them out, or fit again."
    raise ValueError(msg)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
