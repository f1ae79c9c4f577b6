"""Labels and masks from a threshold that is always there, and that says what it rests on."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.data.utils import get_image_filenames
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.core.f1_threshold import StreamingF1Threshold
from anomalib_sgfr.inspection.calibration import scored, spread_over
from anomalib_sgfr.inspection.chosen_threshold import DEFAULT_RATE, ChosenThreshold
from anomalib_sgfr.inspection.evidence import Evidence, Kind, in_all_processes, require_group, unit_of
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["NominalPostProcessor", "SgfrPostProcessor", "checked", "sensitivities"]

logger = logging.getLogger(__name__)


def checked(**asked: Any) -> dict[str, Any]:  # noqa: ANN401
    """What was asked for of arguments that may be ``None``.

    Raises:
        ValueError: If an argument is out of range.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    if not 0.0 < asked.get("false_alarm_rate", DEFAULT_RATE) < 1.0:
        msg = f"false_alarm_rate must lie between 0 and 1, got {asked['false_alarm_rate']}."
        raise ValueError(msg)
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
    """What was asked for of anomalib's own post-processor, which a checkpoint would overrule without a word."""
    default = PostProcessor()
    names = ("image_sensitivity", "pixel_sensitivity") if type(processor) is PostProcessor else ()
    return {name: value for name in names if (value := getattr(processor, name)) != getattr(default, name)}


class SgfrPostProcessor(ChosenThreshold):
    """Sgfr's own: a threshold with defects at hand or without, the same in the Engine, checkpoints and exported files.

    With defective images in validation it lies between the good and the defective scores, see
    :func:`~anomalib_sgfr.core.thresholds.dividing_threshold`; the pixels' is that of the largest F1 score, see
    :mod:`~anomalib_sgfr.core.f1_threshold`. Without any it is the one that good parts exceed at a chosen rate, see
    :func:`~anomalib_sgfr.core.thresholds.alarm_threshold`: from good validation images, and from training images, each
    scored without the atoms of its own unit.

    What it rests on is in ``evidence``, see :class:`~anomalib_sgfr.inspection.chosen_threshold.ChosenThreshold`. Scores
    and maps are reported as :class:`~anomalib_sgfr.inspection.reporting.ReportingScale` says.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous. If given, the threshold
            rests on good images alone, whatever there is in validation. ``None`` for 1%, and only where there is no
            defect. Given with a checkpoint, the threshold is chosen anew from the scores that it keeps.
        held_out (str | None): Folder of good images that are not trained on, for the threshold to rest on.
        group (str | None): Regular expression that names the unit in an image's path: pictures of one part are one
            unit, and do not vouch for each other. What its groups match is the name, or all that it matches. ``None``
            for a unit each.
        images (int | None): Most images to score for it. ``None`` for 300.
        image_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        pixel_sensitivity (float | None): As anomalib's; ``None`` for 0.5, or a checkpoint's.
        **kwargs (Any): As anomalib's post-processor takes them.

    Raises:
        ValueError: If an argument is out of range.
    """

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
        self.false_alarm_rate = false_alarm_rate
        self.held_out = held_out
        self.group = group
        self.images = 300 if images is None else images
        self.image_sensitivity = 0.5 if image_sensitivity is None else image_sensitivity
        self.pixel_sensitivity = 0.5 if pixel_sensitivity is None else pixel_sensitivity
        self._stored_rate: float | None = None  # of the checkpoint that was read
        self._known = Evidence()  # of the fit that this one adds to
        self._seen = Evidence()  # in this validation
        self._pixels = StreamingF1Threshold()  # of this validation
        self._has_warned = False
        self.register_load_state_dict_post_hook(SgfrPostProcessor._restored)

    # What a fit makes of it

    def nominal_evidence(self, model: SgfrModel, pre_processor: Any, paths: Sequence[str]) -> Evidence:  # noqa: ANN401
        """Score good images for a model that was fitted; sets nothing.

        Args:
            model (SgfrModel): The model.
            pre_processor (Any): Its pre-processor.
            paths (Sequence[str]): Training images, of which some are scored unless there is a ``held_out``.

        Returns:
            Evidence: The same in all processes, which share the work.

        Raises:
            FileNotFoundError: If there is no image in ``held_out``.
            ValueError: If ``group`` matches no path.
        """
        kind = Kind.TRAINING if self.held_out is None else Kind.HELD_OUT
        chosen = spread_over(paths if self.held_out is None else self.held_out_images(), self.images, self.group)
        require_group(self.group, chosen)
        return scored(model, pre_processor, chosen, kind, self.group)

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
            require_group(self.group, self.held_out_images())
        self._known = self.evidence if getattr(pl_module, "update", False) else Evidence()

    def pooled(self, evidence: Evidence) -> Evidence:
        """With what was known before, if this fit adds to an earlier one."""
        return self._known.joined(evidence)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a validation that was not finished."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._seen = Evidence()
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
        if not self.learns_from_validation or scores is None or labels is None or not len(scores):
            return
        kinds = torch.where(labels.bool(), int(Kind.DEFECTIVE), int(Kind.HELD_OUT)).flatten().tolist()
        paths = tuple(str(path) for path in outputs.image_path or [""] * len(kinds))
        peaks = outputs.anomaly_map.flatten(1).amax(1)
        seen = Evidence(tuple(scores.flatten().tolist()), tuple(kinds), paths, tuple(peaks.tolist()))
        self._seen = self._seen.joined(seen)
        if outputs.gt_mask is not None:
            self._pixels.update(outputs.anomaly_map, outputs.gt_mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the threshold from what was seen, and from training images where that has no defect or no good one."""
        seen, self._seen = in_all_processes(self._seen), Evidence()
        pixel = self._pixels.compute(pl_module.device)
        self._pixels.reset()
        if not self.learns_from_validation or not (seen.scores or trainer.state.fn == "fit"):
            return
        if not (seen.defective.scores and seen.good.scores):
            seen = self._with_training(seen, trainer, pl_module)
        self.take(self.pooled(seen), pixel)

    def _with_training(self, seen: Evidence, trainer: Trainer, pl_module: Any) -> Evidence:  # noqa: ANN401
        """With training images, and good ones that training images are of one unit with scored as those are."""
        if trainer.state.fn != "fit":
            return self.evidence.good.joined(seen)
        left_out = {path for path, _ in pl_module.suspects} - set(pl_module.model.images)
        training = [path for path in pl_module.training_images() if path not in left_out]
        known = {unit_of(path, self.group) for path in training}
        units = zip(seen.units(self.group), seen.kinds, strict=True)
        siblings = [unit in known and kind == Kind.HELD_OUT for unit, kind in units]
        model = pl_module.model, pl_module.pre_processor
        again = scored(*model, seen.some(siblings).paths, Kind.TRAINING, self.group)
        nominal = self.nominal_evidence(*model, training)
        return nominal.joined(again).joined(seen.some([not sibling for sibling in siblings]))

    # What predictions become

    def post_process_batch(self, batch: Batch[Any]) -> None:
        """As anomalib does; without a threshold scores and maps stay as they are, and there are no labels."""
        if self._is_set:
            super().post_process_batch(batch)
        else:
            self._warn()

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """As anomalib does; without a threshold scores and maps stay as they are, and there are no labels."""
        if self._is_set:
            return super().forward(predictions)
        self._warn()
        return InferenceBatch(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)

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
        return (
            *super()._checkpoint_config_keys,
            "false_alarm_rate",
            "held_out",
            "group",
            "images",
            "value",
            "linear",
            "power",
        )

    def checkpoint_config(self) -> dict[str, Any]:
        """As anomalib's, and what the threshold rests on."""
        return {**super().checkpoint_config(), "evidence": self.evidence.plain()}

    def unmet(self, config: dict[str, Any]) -> str | None:
        """What was asked for that cannot take effect without scoring images again.

        Args:
            config (dict[str, Any]): That a checkpoint stored.

        Returns:
            str | None: What to tell the user.
        """
        asked = self._asked_of(config)
        for name in ("held_out", "group", "images"):
            if name in asked and config.get(name) != asked[name]:
                return (
                    f"{name} '{asked[name]}' cannot take effect on a checkpoint, which was made with "
                    f"'{config.get(name)}': `anomalib-sgfr threshold CKPT` can change it."
                )
        rate = asked.get("false_alarm_rate")
        kept = Evidence.restored(config.get("evidence"))
        if rate is not None and rate != config.get("false_alarm_rate") and not kept.good.scores:
            return (
                f"false_alarm_rate {rate:g} cannot take effect: the checkpoint keeps no scores of good images to "
                "choose a threshold from. `anomalib-sgfr threshold CKPT --held_out FOLDER` can."
            )
        return None

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """As anomalib's; what was asked for is stronger. Of anomalib's own post-processor, its scale is kept too."""
        super().load_checkpoint_config(config)
        self.evidence = Evidence.restored(config.get("evidence"))
        self.linear = config.get("linear", "false_alarm_rate" not in config)
        self.power = config.get("power", 1.0)  # of version 0.2
        self._stored_rate = self.false_alarm_rate
        for name, value in self._asked_of(config).items():
            setattr(self, name, value)

    def _asked_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """What was asked for, of a checkpoint."""
        del config
        return self._asked

    @staticmethod
    def _restored(module: Any, *_: object) -> None:  # noqa: ANN401
        """Know whether there is a threshold; choose it anew if another rate was asked for."""
        module._is_set = not bool(module.image_threshold.isnan())  # noqa: SLF001  # of this class
        if module.false_alarm_rate != module._stored_rate and module.evidence.good.scores:  # noqa: SLF001
            module.value = None
            module.choose()


class NominalPostProcessor(SgfrPostProcessor):
    """A threshold at a chosen rate of false alarms from good images alone, whatever there is in validation.

    :class:`SgfrPostProcessor` with a rate.

    Args:
        false_alarm_rate (float | None): Share of good images that may be labelled anomalous. ``None`` for 1%, or a
            checkpoint's.
        held_out (str | None): As in :class:`SgfrPostProcessor`; so for the others.
        group (str | None): What makes a unit.
        images (int | None): Most images to score.
        **kwargs (Any): As in :class:`SgfrPostProcessor`.
    """

    def __init__(
        self,
        false_alarm_rate: float | None = None,
        held_out: str | None = None,
        group: str | None = None,
        images: int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(false_alarm_rate, held_out, group, images, **kwargs)
        self.false_alarm_rate = self._stored_rate = self.rate

    def _asked_of(self, config: dict[str, Any]) -> dict[str, Any]:
        """A rate, where the checkpoint's threshold was chosen by defects."""
        if config.get("false_alarm_rate") is None and "false_alarm_rate" in config:
            return {"false_alarm_rate": DEFAULT_RATE, **self._asked}
        return self._asked
