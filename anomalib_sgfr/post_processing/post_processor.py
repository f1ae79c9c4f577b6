"""Post-processor: labels, masks and normalised scores from a calibrated threshold."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.data.utils import get_image_filenames
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from anomalib_sgfr.core.linear_algebra import KeepsDtype
from anomalib_sgfr.post_processing.calibration import (
    DEFAULT_RATE,
    STATE_KEY,
    CalibrationScores,
    Split,
    ThresholdState,
    gather_scores,
    group_of,
    real_path,
    require_group,
    rescore,
    score_images,
    select_evenly,
)
from anomalib_sgfr.post_processing.thresholds import (
    StreamingF1Threshold,
    normalise,
    raw_ratio,
    require_rate,
)
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["NominalPostProcessor", "SgfrPostProcessor", "requested_sensitivities"]

logger = logging.getLogger(__name__)


def require_threshold(processor: Any, so: str) -> "SgfrPostProcessor":  # noqa: ANN401
    """Post-processor of a model whose feedback needs a threshold.

    Args:
        processor (Any): Of the model.
        so (str): What follows without one.

    Raises:
        ValueError: If there is no threshold.
    """
    if not isinstance(processor, SgfrPostProcessor) or not processor.is_set:
        msg = f"the checkpoint has no threshold, so {so}: `anomalib-sgfr threshold` sets one."
        raise ValueError(msg)
    return processor


def requested_sensitivities(processor: Any) -> dict[str, float]:  # noqa: ANN401
    """Sensitivities given to anomalib's own post-processor, which a checkpoint would replace."""
    if type(processor) is not PostProcessor:
        return {}
    default = PostProcessor()
    return {
        name: getattr(processor, name)
        for name in ("image_sensitivity", "pixel_sensitivity")
        if getattr(processor, name) != getattr(default, name)
    }


class SgfrPostProcessor(KeepsDtype, PostProcessor):
    """Post-processor with a threshold that needs no defective images.

    Good images set the threshold at a false-alarm rate, see
    :func:`~anomalib_sgfr.post_processing.thresholds.conformal_threshold`: good validation images
    and training images, each scored without the atoms of its own group. Labelled validation images
    set it instead where they show that it makes more errors, see
    :func:`~anomalib_sgfr.post_processing.thresholds.combined_threshold`. Masks of at least five
    validation images of each kind set the pixel threshold, at the largest F1 score. Scores and maps
    are normalised by :func:`~anomalib_sgfr.post_processing.thresholds.normalise`.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous. If
            given, only good images set the threshold, also from a checkpoint's calibration scores.
            ``None`` for 1%.
        held_out (str | None): Folder of good images that are not trained on, to calibrate the
            threshold on.
        group (str | None): Regular expression that names the part in an image's path: images of one
            part are one group, which are not independent and are scored without each other's atoms.
            ``None`` for a group each.
        images (int | None): Largest number of images to score for calibration. ``None`` for 300.
        image_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        pixel_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        **kwargs (Any): As anomalib's post-processor takes them.

    Attributes:
        state (ThresholdState): The threshold, what was requested, and its calibration scores.
        held_out (str | None): As given.
        images (int): As given.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from anomalib_sgfr import Sgfr, SgfrPostProcessor
        >>> post_processor = SgfrPostProcessor(false_alarm_rate=0.05)
        >>> model = Sgfr.load_from_checkpoint(checkpoint, post_processor=post_processor)
        >>> post_processor.is_set, post_processor.false_alarm_rate
        (True, 0.05)
    """

    _default_rate: float | None = None  # rate of a fit without a request

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
        arguments: dict[str, Any] = {
            "false_alarm_rate": false_alarm_rate,
            "held_out": held_out,
            "group": group,
            "images": images,
            "image_sensitivity": image_sensitivity,
            "pixel_sensitivity": pixel_sensitivity,
        }
        # overrides what a checkpoint stores
        self._asked = {name: value for name, value in arguments.items() if value is not None}
        _require_valid(self._asked)
        self.held_out = held_out
        self.images = 300 if images is None else images
        self.image_sensitivity = 0.5 if image_sensitivity is None else image_sensitivity
        self.pixel_sensitivity = 0.5 if pixel_sensitivity is None else pixel_sensitivity
        self._seen = CalibrationScores()  # in this validation
        self._pixels = StreamingF1Threshold()  # of this validation
        self._has_warned = False
        self._state = self._fresh_state()
        self.register_load_state_dict_post_hook(SgfrPostProcessor._restored)

    def _fresh_state(self) -> ThresholdState:
        """State of what was requested, without scores."""
        return ThresholdState(
            false_alarm_rate=self._rate_over(None), group=self._asked.get("group")
        )

    def _rate_over(self, stored: float | None) -> float | None:
        """Requested rate, or else a checkpoint's, or else the default."""
        rate = self._asked.get("false_alarm_rate", stored)
        return self._default_rate if rate is None else rate

    @property
    def state(self) -> ThresholdState:
        """The threshold, what was requested, and its calibration scores."""
        return self._state

    def use(self, state: ThresholdState) -> None:
        """Replace the state.

        Args:
            state (ThresholdState): As ``ThresholdState.calibrated`` gives it.
        """
        self._state = state
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
        """Calibration scores of the threshold."""
        return self._state.scores

    @property
    def false_alarm_rate(self) -> float | None:
        """Requested false-alarm rate."""
        return self._state.false_alarm_rate

    @property
    def is_set(self) -> bool:
        """Whether there is a threshold."""
        return self._state.is_set

    @property
    def basis(self) -> str:
        """What the threshold is calibrated on, as a phrase."""
        return self._state.basis

    @property
    def warning(self) -> str | None:
        """Warning of a threshold that too few good images support; ``None`` if they suffice."""
        return self._state.warning

    # Normalised and raw scores

    @property
    def normalises(self) -> bool:
        """Whether scores are normalised once there is a threshold."""
        return bool(self._state.linear or self.enable_normalization)

    @property
    def label_threshold(self) -> float:
        """Raw score above which an image is labelled anomalous: moved by the sensitivity."""
        return self._raw("image", 1.0 - self.image_sensitivity)

    @property
    def mask_threshold(self) -> float:
        """Value of the raw map above which a pixel is anomalous: moved by the sensitivity."""
        return self._raw("pixel", 1.0 - self.pixel_sensitivity)

    @property
    def peak_threshold(self) -> float:
        """Like :attr:`mask_threshold`, but from the largest values of good images' maps."""
        pixel = self._state.pixel
        return (
            self.mask_threshold * self._state.peak / pixel if pixel > 0.0 else self.mask_threshold
        )

    def raw_score(self, score: float) -> float:
        """Raw score of a normalised one."""
        return self._raw("image", score) if self.normalises else score

    def reported_score(self, raw: float) -> float:
        """Score as predictions hold it, of a raw one."""
        if not self.normalises or bool(self.image_threshold.isnan()):
            return raw
        score = torch.tensor(raw, dtype=torch.float32, device=self.image_threshold.device)
        normalised = self._normalize(score, self.image_min, self.image_max, self.image_threshold)
        return raw if normalised is None else float(normalised)

    def _raw(self, which: str, normalised: float) -> float:
        least, most, threshold = (
            getattr(self, f"{which}_{name}") for name in ("min", "max", "threshold")
        )
        if self._state.linear:
            return float(threshold) + (normalised - 0.5) * float(most - least)
        return float(threshold) * raw_ratio(normalised, self._state.power)

    def raw_threshold_at(self, score: float) -> float:
        """Threshold that labels anomalous what now has a larger normalised score.

        Args:
            score (float): A normalised score; a raw one where there is no threshold yet.

        Returns:
            float: A threshold of the raw score, to set by hand.
        """
        raw = score if bool(self.image_threshold.isnan()) else self.raw_score(score)
        ratio = raw_ratio(1.0 - self.image_sensitivity, self._state.power)
        # at the ends of sensitivity all images are anomalous, or none
        return raw / ratio if 0.0 < ratio < math.inf else raw

    def _normalize(  # type: ignore[override]  # anomalib's is static, and called on the object
        self, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor
    ) -> Tensor | None:
        if preds is None or self._state.linear:
            return super()._normalize(preds, norm_min, norm_max, threshold)
        return normalise(preds, threshold, self._state.power)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """Threshold of the score that predictions hold, moved by the sensitivity."""
        return self._prediction_threshold(self.image_threshold, self.image_sensitivity)

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """Threshold of the map that predictions hold, moved by the sensitivity."""
        return self._prediction_threshold(self.pixel_threshold, self.pixel_sensitivity)

    def _prediction_threshold(self, threshold: Tensor, sensitivity: float) -> Tensor:
        if self.normalises:
            return torch.tensor(1.0 - sensitivity, dtype=torch.float32)
        return threshold * raw_ratio(1.0 - sensitivity, self._state.power)

    # Calibration by a fit

    def calibrate(
        self,
        model: SgfrModel,
        pre_processor: Any,  # noqa: ANN401
        paths: Sequence[str],
        *,
        update: bool = False,
        excluded: Sequence[str] = (),
    ) -> ThresholdState:
        """State of the threshold of a fitted model, to :meth:`use`. A collective call.

        Args:
            model (SgfrModel): The model.
            pre_processor (Any): Pre-processor of the model.
            paths (Sequence[str]): Training images; scored unless there is a ``held_out``.
            update (bool): Whether the fit adds to an earlier one, whose images are then scored
                again where they are still there.
            excluded (Sequence[str]): Images of it that are not known to be good any more.

        Returns:
            ThresholdState: The same in all processes, which share the work.

        Raises:
            FileNotFoundError: If there is no image in ``held_out``.
            ValueError: If ``group`` matches no path.
        """
        state = self._state if update else self._fresh_state()
        split = Split.TRAINING if self.held_out is None else Split.HELD_OUT
        chosen = self._chosen(paths)
        require_group(self._state.group, chosen)
        new = score_images(model, pre_processor, chosen, split, self._state.group)
        earlier = state.scores.exclude([*excluded, *new.paths])
        known = rescore(earlier, model, pre_processor, state.group)
        state = state._replace(scores=known.joined(new)).calibrated()
        if not state.is_set:
            logger.warning(
                "There is no image to choose a threshold from: the training images have no paths."
            )
        return state

    def known_good(self, paths: Sequence[str], excluded: Sequence[str] = ()) -> list[str]:
        """Good images that an update of a fit calibrates on.

        Args:
            paths (Sequence[str]): As in :meth:`calibrate`.
            excluded (Sequence[str]): As in :meth:`calibrate`.
        """
        return [*self._state.scores.good.exclude(excluded).paths, *self._chosen(paths)]

    def _chosen(self, paths: Sequence[str]) -> list[str]:
        good = paths if self.held_out is None else self._held_out_images()
        return select_evenly(good, self.images, self._state.group)

    def _held_out_images(self) -> list[str]:
        try:
            return [str(path) for path in get_image_filenames(str(self.held_out))]
        except (FileNotFoundError, ValueError) as error:
            msg = f"held_out: there is no image in '{self.held_out}'."
            raise FileNotFoundError(msg) from error

    def _log_basis(self) -> None:
        if not self.is_set:
            return
        logger.info("Threshold %.4g is calibrated on %s.", self._state.image, self.basis)
        if self.warning:
            logger.warning("%s", self.warning)

    # Hooks of Lightning

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a ``held_out`` folder without images before the fit."""
        super().on_fit_start(trainer, pl_module)
        if self.held_out is not None:
            require_group(self._asked.get("group"), self._held_out_images())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the threshold is calibrated on, after validation."""
        super().on_fit_end(trainer, pl_module)
        self._log_basis()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a validation that did not end."""
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
        """Keep raw scores, labels and counts of pixels."""
        del trainer, pl_module, args, kwargs
        scores, labels = outputs.pred_score, outputs.gt_label
        if not self._state.uses_validation or scores is None or labels is None or not len(scores):
            return
        kinds = torch.where(labels.bool(), int(Split.DEFECTIVE), int(Split.HELD_OUT))
        batch = CalibrationScores(
            scores=tuple(scores.flatten().tolist()),
            kinds=tuple(kinds.flatten().tolist()),
            paths=tuple(str(path) for path in outputs.image_path or [""] * len(scores)),
            peaks=tuple(outputs.anomaly_map.flatten(1).amax(1).tolist()),
            current=(True,) * len(scores),
        )
        self._seen = self._seen.joined(batch)
        if outputs.gt_mask is not None:
            self._pixels.update(outputs.anomaly_map, outputs.gt_mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate the threshold with the validation images. A collective call."""
        seen, self._seen = gather_scores(self._seen), CalibrationScores()
        masks = self._pixels.compute(pl_module.device)
        self._pixels.reset()
        if not self._state.uses_validation or not seen.scores:
            return
        model: Any = pl_module.model
        training = [*model.images, *self._state.scores.of_split(Split.TRAINING).paths]
        seen = self._rescored_groups(seen, pl_module, training)
        # images that were trained on are no good images of a validation
        new = seen.defective.joined(seen.good.exclude(training))
        scores = self._state.scores.joined(new)
        self.use(self._state._replace(scores=scores, masks=masks).calibrated())
        if trainer.state.fn != "fit":
            self._log_basis()

    def _rescored_groups(
        self,
        seen: CalibrationScores,
        pl_module: Any,  # noqa: ANN401
        training: Sequence[str],
    ) -> CalibrationScores:
        """Scores with good images of trained groups scored as training images are."""
        group = self._state.group
        if group is None:
            return seen
        trained_groups = {group_of(path, group) for path in training}
        trained_files = {real_path(path) for path in training}
        of_trained_group = [
            name in trained_groups
            and kind == Split.HELD_OUT
            and real_path(path) not in trained_files
            for name, kind, path in zip(seen.groups(group), seen.kinds, seen.paths, strict=True)
        ]
        paths = seen.subset(of_trained_group).paths
        model, pre_processor = pl_module.model, pl_module.pre_processor
        again = score_images(model, pre_processor, paths, Split.TRAINING, group)
        return seen.subset([not flag for flag in of_trained_group]).joined(again)

    # Predictions

    def post_process_batch(self, batch: Batch[Any]) -> None:
        """Normalise and label a batch in place; without a threshold it stays as it is."""
        if self.is_set:
            super().post_process_batch(batch)
        else:
            self._warn_without_threshold()

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalised and labelled predictions; raw ones without labels if there is no threshold."""
        if self.is_set:
            return super().forward(predictions)
        self._warn_without_threshold()
        return InferenceBatch(
            pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map
        )

    def _warn_without_threshold(self) -> None:
        if not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            logger.warning(
                "There is no threshold, so no labels and no masks are given: "
                "`anomalib-sgfr threshold CKPT --held_out FOLDER` sets one from good images."
            )

    # Checkpoints

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "held_out", "images")

    def checkpoint_config(self) -> dict[str, Any]:
        """Configuration to store: anomalib's, and the state of the threshold."""
        return {**super().checkpoint_config(), STATE_KEY: self._state.to_dict()}

    def require_compatible(self, config: dict[str, Any]) -> None:
        """Refuse a checkpoint to which a request cannot apply without scoring images again.

        Args:
            config (dict[str, Any]): That it stores, upgraded to this version.

        Raises:
            ValueError: If there is such a request.
        """
        state = ThresholdState.from_dict(config[STATE_KEY])
        stored = {name: config.get(name) for name in ("held_out", "images")}
        stored["group"] = state.group
        for name, value in stored.items():
            if self._asked.get(name, value) != value:
                msg = (
                    f"{name} '{self._asked[name]}' cannot take effect on a checkpoint, which was"
                    f" made with '{value}': `anomalib-sgfr threshold CKPT` can change it."
                )
                raise ValueError(msg)
        rate = self._asked.get("false_alarm_rate", state.false_alarm_rate)
        if rate != state.false_alarm_rate and not state.scores.good.scores:
            msg = (
                f"false_alarm_rate {rate:g} cannot take effect: the checkpoint keeps no scores of"
                " good images to choose a threshold from. `anomalib-sgfr threshold CKPT --held_out"
                " FOLDER` can."
            )
            raise ValueError(msg)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore a stored configuration; what was requested overrides it.

        Args:
            config (dict[str, Any]): That this post-processor or anomalib's own gave.
        """
        super().load_checkpoint_config(config)
        for name in ("held_out", "images", "image_sensitivity", "pixel_sensitivity"):
            setattr(self, name, self._asked.get(name, getattr(self, name)))
        if STATE_KEY not in config:
            image, pixel = float(self._image_threshold), float(self._pixel_threshold)
            self.use(ThresholdState.from_earlier_version(config, image, pixel))
            return
        state = ThresholdState.from_dict(config[STATE_KEY])
        rate = self._rate_over(state.false_alarm_rate)
        if rate != state.false_alarm_rate and state.scores.good.scores:
            state = state._replace(false_alarm_rate=rate, value=None, read_from=()).calibrated()
        self.use(state)

    @staticmethod
    def _restored(module: Any, *_: object) -> None:  # noqa: ANN401
        """Hook: match the state to thresholds loaded without it. Pickled files hold this name."""
        state = module.state
        loaded = float(module._image_threshold), float(module._pixel_threshold)  # noqa: SLF001
        own = state.image, state.pixel
        if not all(
            one == other or (math.isnan(one) and math.isnan(other))
            for one, other in zip(loaded, own, strict=True)
        ):
            module.use(state.with_stored_thresholds(*loaded))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; the attributes of a file that version 0.2 exported become the state."""
        super().__setstate__(state)
        if "_state" not in state:
            config = {"power": 1.0, **state, "evidence": state["evidence"].to_dict()}
            self._pixels = StreamingF1Threshold()
            for name in ("evidence", "value", "false_alarm_rate", "group", "power"):
                self.__dict__.pop(name, None)
            image, pixel = float(self._image_threshold), float(self._pixel_threshold)
            self.use(ThresholdState.from_earlier_version(config, image, pixel))


class NominalPostProcessor(SgfrPostProcessor):
    """:class:`SgfrPostProcessor` whose threshold only good images set, also without a given rate.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous.
            ``None`` for a checkpoint's, or 1%.
        held_out (str | None): As in :class:`SgfrPostProcessor`, like all that follow.
        group (str | None): Regular expression that names the part.
        images (int | None): Largest number of images to score.
        **kwargs (Any): As in :class:`SgfrPostProcessor`.

    Examples:
        >>> from anomalib_sgfr import NominalPostProcessor
        >>> NominalPostProcessor().false_alarm_rate
        0.01
    """

    _default_rate = DEFAULT_RATE


def _require_valid(arguments: dict[str, Any]) -> None:
    """Refuse a post-processor's argument that is out of range."""
    require_rate(arguments.get("false_alarm_rate", DEFAULT_RATE), "false_alarm_rate")
    if arguments.get("images", 1) < 1:
        msg = f"images must be at least 1, got {arguments['images']}."
        raise ValueError(msg)
    for name in ("image_sensitivity", "pixel_sensitivity"):
        if not 0.0 <= arguments.get(name, 0.5) <= 1.0:
            msg = f"{name} must lie between 0 and 1, got {arguments[name]}."
            raise ValueError(msg)
    require_group(arguments.get("group"))
