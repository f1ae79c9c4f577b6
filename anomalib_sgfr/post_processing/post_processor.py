"""Labels and masks from a calibrated threshold that is always there, and that says what it is
calibrated on.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.data.utils import get_image_filenames
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.core.linear_algebra import KeepsDtype
from anomalib_sgfr.post_processing.calibration import rescored, scored, spread_over
from anomalib_sgfr.post_processing.calibration_scores import (
    CalibrationScores,
    Split,
    file_of,
    in_all_processes,
    require_group,
    unit_of,
)
from anomalib_sgfr.post_processing.normalisation import ReportingScale
from anomalib_sgfr.post_processing.threshold_state import DEFAULT_RATE, ThresholdState
from anomalib_sgfr.post_processing.thresholds import StreamingF1Threshold, require_rate
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["NominalPostProcessor", "SgfrPostProcessor", "checked", "sensitivities"]

logger = logging.getLogger(__name__)

# in a checkpoint, and in the post-processor's part of it
_CONFIG = "anomalib_post_processor_config"
_STATE = "threshold"


def checked(**asked: Any) -> dict[str, Any]:  # noqa: ANN401
    """What was asked for of arguments that may be ``None``.

    Raises:
        ValueError: If an argument is out of range.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    require_rate(asked.get("false_alarm_rate", DEFAULT_RATE), "false_alarm_rate")
    if asked.get("images", 1) < 1:
        msg = f"images must be at least 1, got {asked['images']}."
        raise ValueError(msg)
    for name in ("image_sensitivity", "pixel_sensitivity"):
        if not 0.0 <= asked.get(name, 0.5) <= 1.0:
            msg = f"{name} must lie between 0 and 1, got {asked[name]}."
            raise ValueError(msg)
    require_group(asked.get("group"))
    return asked


def sensitivities(processor: Any) -> dict[str, float]:  # noqa: ANN401
    """What was asked for of anomalib's own post-processor, which a checkpoint would overrule
    without a word.
    """
    default = PostProcessor()
    names = ("image_sensitivity", "pixel_sensitivity") if type(processor) is PostProcessor else ()
    return {
        name: value
        for name in names
        if (value := getattr(processor, name)) != getattr(default, name)
    }


class SgfrPostProcessor(KeepsDtype, ReportingScale):
    """Sgfr's own: a threshold with defects at hand or without, the same in the Engine, checkpoints
    and exported files.

    Good images choose it: the one that they exceed at a chosen rate, see
    :func:`~anomalib_sgfr.post_processing.thresholds.conformal_threshold`, from good validation
    images, and from training images, each scored without the atoms of its own part. Labelled
    validation images choose it instead where they show that it makes more errors, see
    :func:`~anomalib_sgfr.post_processing.thresholds.combined_threshold`. Where there are at least
    five of each kind, with masks, these choose the pixels' threshold, see
    :mod:`~anomalib_sgfr.post_processing.thresholds`.

    All that belongs to the threshold is in ``state``. Scores and maps are normalised as
    :class:`~anomalib_sgfr.post_processing.normalisation.ReportingScale` says.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous. If
            given, good images alone choose the threshold, whatever there is in validation. ``None``
            for 1%. Given with a checkpoint, the threshold is chosen anew from the scores that it
            keeps.
        held_out (str | None): Folder of good images that are not trained on, to calibrate the
            threshold on.
        group (str | None): Regular expression that names the part in an image's path: images of one
            part are not independent, and are scored without each other's atoms. What its groups
            match is the name, or all that it matches. ``None`` for a part each.
        images (int | None): Most images to score for it. ``None`` for 300.
        image_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        pixel_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        **kwargs (Any): As anomalib's post-processor takes them.

    Attributes:
        state (ThresholdState): The threshold, what was asked for, and its calibration scores;
            :meth:`use` replaces it.
        held_out (str | None): As given.
        images (int): As given.

    Raises:
        ValueError: If an argument is out of range.
    """

    _rate: float | None = None  # of a fit that no rate was asked for

    def __init__(
        self,
        false_alarm_rate: float | None = None,
        held_out: str | None = None,
        group: str | None = None,
        images: int | None = None,
        image_sensitivity: float | None = None,
        pixel_sensitivity: float | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        # is stronger than a checkpoint
        self._asked = checked(
            false_alarm_rate=false_alarm_rate,
            held_out=held_out,
            group=group,
            images=images,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.held_out = held_out
        self.images = 300 if images is None else images
        self.image_sensitivity = 0.5 if image_sensitivity is None else image_sensitivity
        self.pixel_sensitivity = 0.5 if pixel_sensitivity is None else pixel_sensitivity
        self._seen = CalibrationScores()  # in this validation
        self._pixels = StreamingF1Threshold()  # of this validation
        self._has_warned = False
        self._state = self._fresh()
        self.register_load_state_dict_post_hook(SgfrPostProcessor._restored)

    def _fresh(self) -> ThresholdState:
        """Nothing but what was asked for."""
        return ThresholdState(
            false_alarm_rate=self._asked.get("false_alarm_rate", self._rate),
            group=self._asked.get("group"),
        )

    @property
    def state(self) -> ThresholdState:
        """The threshold, what was asked for, and its calibration scores."""
        return self._state

    def use(self, state: ThresholdState) -> None:
        """Take a state into use in place of the present one.

        Args:
            state (ThresholdState): As ``ThresholdState.chosen`` makes it.
        """
        self._state = state
        self.power, self.linear = state.power, state.linear
        self._image_threshold.fill_(state.image)
        self._pixel_threshold.fill_(state.pixel)
        if not state.linear:
            for least, most, threshold in (
                (self.image_min, self.image_max, self._image_threshold),
                (self.pixel_min, self.pixel_max, self._pixel_threshold),
            ):
                least.copy_(threshold).mul_(0.0)
                most.copy_(threshold).mul_(2.0)
        self._has_warned = False

    @property
    def calibration_scores(self) -> CalibrationScores:
        """Calibration scores."""
        return self._state.scores

    @property
    def value(self) -> float | None:
        """Threshold that was set by hand."""
        return self._state.value

    @property
    def false_alarm_rate(self) -> float | None:
        """Rate that was asked for."""
        return self._state.false_alarm_rate

    @property
    def group(self) -> str | None:
        """Regular expression that names the part in an image's path."""
        return self._state.group

    @property
    def rate(self) -> float:
        """Share of good images that may be labelled anomalous, where good images alone choose."""
        return self._state.rate

    @property
    def is_set(self) -> bool:
        """Whether there is a threshold."""
        return self._state.is_set

    @property
    def basis(self) -> str:
        """What the threshold is calibrated on, in words."""
        return self._state.basis

    @property
    def warning(self) -> str | None:
        """One sentence about a threshold that too few good images support."""
        return self._state.warning

    @property
    def peak_threshold(self) -> float:
        """As :attr:`mask_threshold`, but of the largest value of a good image's map: masks may
        suggest a lower one.
        """
        pixel = self._state.pixel
        return (
            self.mask_threshold * self._state.peak / pixel if pixel > 0.0 else self.mask_threshold
        )

    # What a fit makes of it

    def nominal_calibration_scores(
        self,
        model: SgfrModel,
        pre_processor: Any,  # noqa: ANN401
        paths: Sequence[str],
    ) -> CalibrationScores:
        """Score good images for a model that was fitted; sets nothing.

        Args:
            model (SgfrModel): The model.
            pre_processor (Any): Its pre-processor.
            paths (Sequence[str]): Training images, of which some are scored unless there is a
                ``held_out``.

        Returns:
            CalibrationScores: The same in all processes, which share the work.

        Raises:
            FileNotFoundError: If there is no image in ``held_out``.
            ValueError: If ``group`` matches no path.
        """
        kind = Split.TRAINING if self.held_out is None else Split.HELD_OUT
        chosen = spread_over(
            paths if self.held_out is None else self.held_out_images(), self.images, self.group
        )
        require_group(self.group, chosen)
        return scored(model, pre_processor, chosen, kind, self.group)

    def calibrated(
        self,
        model: SgfrModel,
        pre_processor: Any,  # noqa: ANN401
        paths: Sequence[str],
        *,
        update: bool = False,
        excluded: Sequence[str] = (),
    ) -> ThresholdState:
        """State of the threshold for a model that was fitted; sets nothing.

        Args:
            model (SgfrModel): The model.
            pre_processor (Any): Its pre-processor.
            paths (Sequence[str]): Training images.
            update (bool): Whether the fit adds to the earlier one, whose images that are still
                there are scored again.
            excluded (Sequence[str]): Images that are not known to be good any more.

        Returns:
            ThresholdState: The same in all processes, which share the work.

        Raises:
            FileNotFoundError: If there is no image in ``held_out``.
            ValueError: If ``group`` matches no path.
        """
        state = self._state if update else self._fresh()
        new = self.nominal_calibration_scores(model, pre_processor, paths)
        earlier = state.scores.excluding([*excluded, *new.paths])
        known = rescored(earlier, model, pre_processor, state.group)
        state = state._replace(scores=known.joined(new), masks=state.masks).chosen()
        if not state.is_set:
            logger.warning(
                "There is no image to choose a threshold from: the training images have no paths."
            )
        return state

    def tell(self) -> None:
        """Write to the log what the threshold is calibrated on."""
        if not self.is_set:
            return
        logger.info("Threshold %.4g is calibrated on %s.", self._state.image, self.basis)
        if self.warning:
            logger.warning("%s", self.warning)

    def held_out_images(self) -> list[str]:
        """Images in ``held_out``.

        Raises:
            FileNotFoundError: If there is none.
        """
        try:
            return [str(path) for path in get_image_filenames(str(self.held_out))]
        except (FileNotFoundError, ValueError) as error:
            msg = f"held_out: there is no image in '{self.held_out}'."
            raise FileNotFoundError(msg) from error

    # What Lightning calls

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder without images before the fit, and not when it ends."""
        super().on_fit_start(trainer, pl_module)
        if self.held_out is not None:
            require_group(self._asked.get("group"), self.held_out_images())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a validation that was not finished."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._seen = CalibrationScores()
        self._pixels.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        *args: object,
        **kwargs: object,
    ) -> None:
        """Note raw scores and labels."""
        del trainer, pl_module, args, kwargs
        scores, labels = outputs.pred_score, outputs.gt_label
        if (
            not self._state.learns_from_validation
            or scores is None
            or labels is None
            or not len(scores)
        ):
            return
        kinds = (
            torch.where(labels.bool(), int(Split.DEFECTIVE), int(Split.HELD_OUT)).flatten().tolist()
        )
        paths = tuple(str(path) for path in outputs.image_path or [""] * len(kinds))
        peaks = tuple(outputs.anomaly_map.flatten(1).amax(1).tolist())
        values = tuple(scores.flatten().tolist())
        self._seen = self._seen.joined(
            CalibrationScores(values, tuple(kinds), paths, peaks, (True,) * len(kinds))
        )
        if outputs.gt_mask is not None:
            self._pixels.update(outputs.anomaly_map, outputs.gt_mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the threshold anew with what was seen."""
        seen, self._seen = in_all_processes(self._seen), CalibrationScores()
        masks = self._pixels.compute(pl_module.device)
        self._pixels.reset()
        if not self._state.learns_from_validation or not seen.scores:
            return
        self.use(
            self._state.validated(
                self._regrouped(seen, pl_module), masks, self._training_files(pl_module)
            )
        )
        if trainer.state.fn != "fit":
            self.tell()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the threshold is calibrated on, once validation has had its say."""
        super().on_fit_end(trainer, pl_module)
        self.tell()

    def _training_files(self, pl_module: Any) -> list[str]:  # noqa: ANN401
        return [*pl_module.model.images, *self._state.scores.of_kind(Split.TRAINING).paths]

    def _regrouped(self, seen: CalibrationScores, pl_module: Any) -> CalibrationScores:  # noqa: ANN401
        """With good images of parts that were trained on scored as training images are, without the
        part's atoms.
        """
        if self.group is None:
            return seen
        training = self._training_files(pl_module)
        known, files = (
            {unit_of(path, self.group) for path in training},
            {file_of(path) for path in training},
        )
        siblings = [
            unit in known and kind == Split.HELD_OUT and file_of(path) not in files
            for unit, kind, path in zip(seen.units(self.group), seen.kinds, seen.paths, strict=True)
        ]
        again = scored(
            pl_module.model,
            pl_module.pre_processor,
            seen.subset(siblings).paths,
            Split.TRAINING,
            self.group,
        )
        return seen.subset([not sibling for sibling in siblings]).joined(again)

    # What predictions become

    def post_process_batch(self, batch: Batch[Any]) -> None:
        """As anomalib does; without a threshold scores and maps stay as they are, and there are no
        labels.
        """
        if self.is_set:
            super().post_process_batch(batch)
        else:
            self._warn()

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """As anomalib does; without a threshold scores and maps stay as they are, and there are no labels."""
        if self.is_set:
            return super().forward(predictions)
        self._warn()
        return InferenceBatch(
            pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map
        )

    def _warn(self) -> None:
        if not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            logger.warning(
                "There is no threshold, so no labels and no masks are given: "
                "`anomalib-sgfr threshold CKPT --held_out FOLDER` sets one from good images."
            )

    # What a checkpoint keeps

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "held_out", "images")

    def checkpoint_config(self) -> dict[str, Any]:
        """As anomalib's, and the state of the threshold."""
        return {**super().checkpoint_config(), _STATE: self._state.plain()}

    @staticmethod
    def adopt(checkpoint: dict[str, Any]) -> None:
        """Read an earlier version's checkpoint, or one of anomalib's own post-processor, as one of
        this version.

        Args:
            checkpoint (dict[str, Any]): As Lightning read it; changed in place.
        """
        config, state = checkpoint.get(_CONFIG), checkpoint.get("state_dict", {})
        if not config or _STATE in config:
            return
        image, pixel = (
            float(state.get(f"post_processor._{which}_threshold", torch.nan))
            for which in ("image", "pixel")
        )
        found = ThresholdState.of_earlier(config, image, pixel)
        checkpoint[_CONFIG] = {**config, _STATE: found.plain()}

    @staticmethod
    def without_threshold(checkpoint: dict[str, Any]) -> None:
        """Take the threshold and its calibration scores out of a checkpoint that was read.

        Args:
            checkpoint (dict[str, Any]): As :meth:`adopt` leaves it; changed in place.
        """
        config = checkpoint.get(_CONFIG)
        if config:
            kept = ThresholdState.restored(config[_STATE])
            asked = kept._replace(scores=CalibrationScores(), value=None, read_from=(), masks=None)
            checkpoint[_CONFIG] = {**config, _STATE: asked.chosen().plain()}

    def unmet(self, config: dict[str, Any]) -> str | None:
        """What was asked for that cannot take effect without scoring images again.

        Args:
            config (dict[str, Any]): That a checkpoint stored, as :meth:`adopt` leaves it.

        Returns:
            str | None: What to tell the user.
        """
        kept = ThresholdState.restored(config[_STATE])
        stored = {
            "held_out": config.get("held_out"),
            "group": kept.group,
            "images": config.get("images"),
        }
        for name, value in stored.items():
            if name in self._asked and value != self._asked[name]:
                return (
                    f"{name} '{self._asked[name]}' cannot take effect on a checkpoint, which was"
                    f" made with '{value}': `anomalib-sgfr threshold CKPT` can change it."
                )
        rate = self._asked.get("false_alarm_rate")
        if rate is not None and rate != kept.false_alarm_rate and not kept.scores.good.scores:
            return (
                f"false_alarm_rate {rate:g} cannot take effect: the checkpoint keeps no scores of"
                " good images to choose a threshold from. `anomalib-sgfr threshold CKPT --held_out"
                " FOLDER` can."
            )
        return None

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """As anomalib's, and take the stored state into use; what was asked for is stronger.

        Args:
            config (dict[str, Any]): As :meth:`checkpoint_config` gave it, or anomalib's own
                post-processor.
        """
        super().load_checkpoint_config(config)
        for name in ("held_out", "images", "image_sensitivity", "pixel_sensitivity"):
            setattr(self, name, self._asked.get(name, getattr(self, name)))
        if _STATE not in config:
            self.use(
                ThresholdState.of_earlier(
                    config, float(self._image_threshold), float(self._pixel_threshold)
                )
            )
            return
        state = ThresholdState.restored(config[_STATE])
        rate = self._asked.get("false_alarm_rate", state.false_alarm_rate)
        rate = self._rate if rate is None else rate
        if rate != state.false_alarm_rate and state.scores.good.scores:
            state = state._replace(false_alarm_rate=rate, value=None, read_from=()).chosen()
        self.use(state)

    @staticmethod
    def _restored(module: Any, *_: object) -> None:  # noqa: ANN401
        """Keep the state true to thresholds that were loaded without it."""
        state = module.state
        image, pixel = float(module._image_threshold), float(module._pixel_threshold)  # noqa: SLF001  # of this class
        if not _same(image, state.image) or not _same(pixel, state.pixel):
            module.use(state.with_thresholds(image, pixel))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; of a file that an earlier version exported, its attributes become the state."""
        super().__setstate__(state)
        if "_state" not in state:
            config = {**state, "evidence": state["evidence"].plain()}
            self._pixels = StreamingF1Threshold()
            for name in ("evidence", "value", "false_alarm_rate", "group", "power"):
                self.__dict__.pop(name, None)
            image, pixel = float(self._image_threshold), float(self._pixel_threshold)
            self.use(ThresholdState.of_earlier({"power": 1.0, **config}, image, pixel))


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


class NominalPostProcessor(SgfrPostProcessor):
    """A threshold at a chosen rate of false alarms from good images alone, whatever there is in
    validation.

    :class:`SgfrPostProcessor` with a rate.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous.
            ``None`` for 1%, or a checkpoint's.
        held_out (str | None): As in :class:`SgfrPostProcessor`; so for the others.
        group (str | None): What makes a part.
        images (int | None): Most images to score.
        **kwargs (Any): As in :class:`SgfrPostProcessor`.
    """

    _rate = DEFAULT_RATE
