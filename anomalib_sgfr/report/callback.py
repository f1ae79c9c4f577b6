"""What a report says of the model: banks and certificate, arguments, how it was fitted, and whom it
suspects.

Lightning callback that writes a report of a test or a prediction.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.console import bar_is_on, progress
from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.images.pre_processor import geometric_steps
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    nominal_scores,
    require_group,
    select_evenly,
)
from anomalib_sgfr.post_processing.threshold_state import ThresholdState
from anomalib_sgfr.report.contents import (
    Digest,
    Mimic,
    ModelFacts,
    Picture,
    ScaleFacts,
    Suspect,
    Unit,
    by_importance,
    pruned,
)
from anomalib_sgfr.report.crops import Gallery, displayed
from anomalib_sgfr.report.fit_record import versions
from anomalib_sgfr.report.media import (
    BUDGET,
    aspect_of,
    mimic_of,
    outline,
    small_heat,
    training_picture,
    webp,
)
from anomalib_sgfr.report.page import rendered, write_page
from anomalib_sgfr.report.score_table import Scored, scored_in, threshold_of
from anomalib_sgfr.report.statistics import RegionOverlap, known_among
from anomalib_sgfr.run_folder import AfterPostProcessor
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Report", "facts_of", "sha256_of"]

logger = logging.getLogger(__name__)

_SUSPECTS, _LOOKED_AT, _BINS = 6, 60, 30
_LEFT_OUT = {"pre_processor", "post_processor", "evaluator", "visualizer"}


def facts_of(module: Any, checkpoint: str = "") -> ModelFacts:  # noqa: ANN401
    """What is known of a fitted Sgfr.

    Args:
        module (Any): The model, or one like it.
        checkpoint (str): Its file, if that is known.
    """
    model: SgfrModel = module.model
    certificate = model.certificate()
    suspects, looked_at = _suspects(module)
    return ModelFacts(
        backbone=str(module.hparams.get("backbone", "")),
        scales=_scales(model),
        certified=certificate.largest_score,
        arguments=_arguments(module.hparams),
        fit=getattr(module, "fit_record", None),
        images=len(model.images),
        suspects=suspects,
        looked_at=looked_at,
        checkpoint=checkpoint,
        sha256=sha256_of(checkpoint),
        versions=versions(),
    )


def sha256_of(file: str) -> str:
    """Of a file's content; empty if it cannot be read."""
    if not file:
        return ""
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _scales(model: SgfrModel) -> list[ScaleFacts]:
    found = []
    embedder, banks = model.embedder, model.banks
    for scale, bank, bound in zip(embedder.scales, banks, model.certificate().scales, strict=True):
        heard = [
            name for name, hears in (("map", scale.in_map), ("score", scale.in_score)) if hears
        ]
        counts, _ = bound.histogram(_BINS)
        found.append(
            ScaleFacts(
                layers=", ".join(embedder.layers[member] for member in scale.layer_indices),
                stride=scale.stride,
                heard=" and ".join(heard),
                atoms=len(bank.atoms),
                width=bank.atoms.shape[1],
                patches=bound.patches,
                mean=bound.mean,
                largest=bound.largest,
                histogram=counts.tolist(),
            )
        )
    return found


def _arguments(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    plain = [(name, value) for name, value in arguments.items() if name not in _LEFT_OUT]
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for name, value in plain
    ]


def _suspects(module: Any) -> tuple[list[Suspect], int]:  # noqa: ANN401
    """Training images that are rebuilt worst without their own atoms, by what is known already or
    by looking.
    """
    model, processor = module.model, module.post_processor
    scores: list[tuple[str, float]]
    calibration_scores = getattr(processor, "calibration_scores", CalibrationScores())
    training = calibration_scores.subset(
        [kind == Split.TRAINING for kind in calibration_scores.kinds]
    )
    if getattr(module, "suspects", None):
        scores = list(module.suspects)
    elif training.scores:
        scores = list(zip(training.paths, training.scores, strict=True))
    else:
        there = [path for path in model.images if Path(path).is_file()]
        group = getattr(processor, "group", None)
        chosen = select_evenly(there, _LOOKED_AT, group)
        found = (
            nominal_scores(model, module.pre_processor, chosen, group=group).scores
            if chosen
            else []
        )
        scores = list(zip(chosen, found, strict=True))
    worst = sorted(scores, key=lambda item: -item[1])[:_SUSPECTS]
    reported = getattr(processor, "reported", float)
    pictures = [training_picture(path, module.pre_processor, model.bit_depth) for path, _ in worst]
    suspects = [
        Suspect(path, reported(score), picture)
        for (path, score), picture in zip(worst, pictures, strict=True)
    ]
    return suspects, len(scores)


_EXPLAINED = 24  # images with a mimic view
_SIDE, _FEWER_SIDE, _FEW = 256, 384, 120  # pixels along a picture; larger where there are few


class Report(AfterPostProcessor):
    """Write ``report.html``, one file that shows a test or a prediction to whoever decides; for
    ``trainer.callbacks``.

    It holds all it shows, and opens anywhere without a network. Several processes write one.

    Args:
        file (str | Path | None): The page; ``None`` for ``report.html`` in the run's folder.
        group (str | None): Regular expression that names the product, camera ... in an image's
            path: a line of the table for each.
        pictures (int): Most images to show with pictures. Of all others there is the score.
            Defaults to ``500``.

    Attributes:
        units (list[Unit]): Images that this process has seen in the run.
        checkpoint (str): The model's file; found out if it is empty.
        kinds (Mapping[str, str]): Kind of defect by path, where the folder's name is not that.
        unreadable (Mapping[Any, str]): Files that could not be read, and why: read when the run has
            ended.
        digest (Digest | None): What the page of the latest run shows.
        written (Path | None): The page of the latest run, once it is there.
        failed (str): Why it is not.

    Raises:
        ValueError: If ``pictures`` is negative, or ``group`` is not a regular expression.
    """

    def __init__(
        self, file: str | Path | None = None, group: str | None = None, pictures: int = 500
    ) -> None:
        super().__init__()
        if pictures < 0:
            msg = f"pictures must be at least 0, got {pictures}."
            raise ValueError(msg)
        require_group(group)
        self.file = file
        self.group = group
        self.pictures = pictures
        self.units: list[Unit] = []
        self.checkpoint = ""
        self.kinds: Mapping[str, str] = {}
        self.unreadable: Mapping[Any, str] = {}
        self.digest: Digest | None = None
        self.written: Path | None = None
        self.failed = ""
        self._held = 0
        self._regions = RegionOverlap()
        self._why_not = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a page.

        Raises:
            TypeError: If the model is not Sgfr.
        """
        del trainer
        if not isinstance(getattr(pl_module, "model", None), SgfrModel):
            msg = f"Report tells of Sgfr, not of {type(pl_module).__name__}."
            raise TypeError(msg)
        self.units, self._held, self._regions, self._why_not = [], 0, RegionOverlap(), ""
        self.written, self.failed, self.digest = None, "", None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for prediction."""
        self.on_predict_start(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the images of a batch."""
        del batch, batch_idx
        self._see(pl_module, outputs, file_peaks(trainer, pl_module, outputs, dataloader_idx)[0])

    on_test_batch_end = on_predict_batch_end

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        self._end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        self._end(trainer, pl_module)

    def _see(self, module: Any, outputs: Any, pixels: Sequence[tuple[int, int] | None]) -> None:  # noqa: ANN401
        rows = scored_in(outputs, module.post_processor, pixels)
        size = outputs.anomaly_map.shape[-2:] if outputs.anomaly_map is not None else None
        peaks = None if module.peak is None or size is None else module.peak.tolist()
        for index, row in enumerate(rows):
            place = None
            if peaks is not None and size is not None:
                place = ((peaks[index][1] + 0.5) / size[1], (peaks[index][0] + 0.5) / size[0])
            picture = self._picture(module, outputs, index, row.image) if self.pictures else None
            self._held += picture is not None
            self.units.append(Unit(row, "", place, picture))
        if self._held > 2 * self.pictures + 64:
            self.units = pruned(self.units, threshold_of(module.post_processor), self.pictures)
            self._held = sum(unit.picture is not None for unit in self.units)
        self._regions.add(outputs.anomaly_map, outputs.gt_mask)

    def _picture(self, module: Any, outputs: Any, index: int, path: str) -> Picture | None:  # noqa: ANN401
        """The image as the model saw it; a picture that cannot be made does not end the run."""
        try:
            shown = displayed(module.pre_processor, outputs.image[index])
            heat = outputs.anomaly_map[index].squeeze().float().cpu().numpy()
            level = _level(module.post_processor)
            mask = (
                None
                if outputs.gt_mask is None
                else outputs.gt_mask[index].squeeze().float().cpu().numpy()
            )
            return Picture(
                image=webp(
                    shown,
                    _FEWER_SIDE if self.pictures <= _FEW else _SIDE,
                    BUDGET // max(self.pictures, 1),
                ),
                heat=small_heat(heat),
                outline="" if level is None else outline(heat, level),
                truth="" if mask is None else outline(mask, 0.5),
                aspect=_aspect(module.pre_processor, path, *shown.shape[:2]),
            )
        except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
            self._why_not = f"Some pictures could not be made: {error}"
            return None

    def _end(self, trainer: Trainer, module: Any) -> None:  # noqa: ANN401
        every = gathered(self.units)
        if not trainer.is_global_zero:
            return
        file = (
            Path(self.file)
            if self.file is not None
            else Path(trainer.default_root_dir) / "report.html"
        )
        try:
            self.digest = self._digest(trainer, module, _each_once(every), alone=len(every) == 1)
            write_page(rendered(self.digest), file)
        except Exception as error:  # noqa: BLE001  # what was found is not lost for it
            self.failed = f"The report {file} could not be written: {error}"
            logger.warning(self.failed)
        else:
            self.written = file
            logger.info("Report: %s", file)

    def _digest(
        self,
        trainer: Trainer,
        module: Any,
        units: Sequence[Unit],
        *,
        alone: bool,
    ) -> Digest:
        processor = module.post_processor
        threshold, state = threshold_of(processor), getattr(processor, "state", ThresholdState())
        units = _with_kinds(pruned(units, threshold, self.pictures), self.kinds)
        units, by_name = _with_what_is_known(units, state, module.model.images)
        paths = {unit.scored.image for unit in units if unit.scored.image}
        notes = [self._why_not] if self._why_not else []
        group = self.group
        if group is not None:
            try:
                require_group(group, sorted(paths))
            except ValueError as error:
                notes.append(str(error))
                group = None
        curve, note = (
            self._regions.curve()
            if alone
            else (None, "Several processes do not share their masks.")
        )
        model, prepared = module.model, module.pre_processor
        gallery = Gallery(model, prepared)
        first = by_importance(units, threshold, _EXPLAINED)
        explained = [place for place in first if units[place].picture is not None]
        mimics: dict[int, Mimic] = {
            place: mimic_of(model, prepared, units[place].scored.image, gallery)
            for place in progress(
                explained, len(explained), "Explanations", shown=bar_is_on(trainer)
            )
        }
        return Digest(
            units=units,
            threshold=threshold,
            heat_threshold=_level(processor),
            scaled=bool(
                getattr(processor, "is_set", True)
                and getattr(processor, "enable_normalization", True)
            ),
            basis=getattr(processor, "basis", "what anomalib's post-processor found"),
            nominal_units=state.independent_images,
            model=facts_of(module, self.checkpoint or _checkpoint(trainer)),
            made=datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M"),
            mimics=mimics,
            group=group,
            regions=curve,
            regions_note=note,
            warning=getattr(processor, "warning", None),
            by_name=by_name,
            unreadable=[(str(path), reason) for path, reason in self.unreadable.items()],
            notes=notes,
        )


def _with_what_is_known(
    units: Sequence[Unit], state: ThresholdState, trained_on: Sequence[str]
) -> tuple[list[Unit], int]:
    """Units that say whether they chose the threshold or were trained on; and how many their names
    alone tell of.
    """
    paths = [unit.scored.image for unit in units]
    trained, by_name = known_among(
        paths, [*trained_on, *state.scores.of_split(Split.TRAINING).paths]
    )
    chose, also = known_among(paths, state.threshold_images)
    found = [
        unit._replace(trained_on=its_trained, chose=its_chose)
        for unit, its_trained, its_chose in zip(units, trained, chose, strict=True)
    ]
    return found, max(by_name, also)


def _level(processor: Any) -> float | None:  # noqa: ANN401
    """Threshold of pixels in the map as it is reported, if there is one."""
    if not getattr(processor, "is_set", True) or not hasattr(
        processor, "normalized_pixel_threshold"
    ):
        return None
    level = float(processor.normalized_pixel_threshold)
    return level if level == level else None  # noqa: PLR0124  # NaN


def _aspect(pre_processor: Any, path: str, height: int, width: int) -> float:  # noqa: ANN401
    """Of the file, where the model saw all of it; of what it saw otherwise."""
    try:
        whole = all(
            step[0] == "resize"
            for step in geometric_steps(getattr(pre_processor, "transform", None))
        )
    except ValueError:
        whole = False
    return aspect_of(path, height, width) if whole and path else width / height


def _checkpoint(trainer: Any) -> str:  # noqa: ANN401
    """The file that the model is from, as far as the trainer knows."""
    kept = getattr(trainer, "checkpoint_callback", None)
    found = getattr(trainer, "ckpt_path", None) or getattr(kept, "best_model_path", "") or ""
    return str(found) if found and Path(str(found)).is_file() else ""


def _each_once(every: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Of all processes; what several were given, to have equally many, counts once."""
    if len(every) == 1:
        return list(every[0])
    once = {unit.scored.image: unit for part in every for unit in part if unit.scored.image}
    return [once[path] for path in sorted(once)] + [
        unit for part in every for unit in part if not unit.scored.image
    ]


def _with_kinds(units: Sequence[Unit], kinds: Mapping[str, str]) -> list[Unit]:
    """With what each is called: the folder of a defect, unless good images lie there too."""
    folders = {str(PurePath(unit.scored.image).parent) for unit in units if unit.scored.truth == 0}

    def kind_of(scored: Scored) -> str:
        if scored.image in kinds:
            return kinds[scored.image]
        if scored.truth is None:
            return ""
        folder = PurePath(scored.image).parent
        return (
            "good"
            if not scored.truth
            else "defect"
            if str(folder) in folders
            else folder.name or "defect"
        )

    return [unit._replace(kind=kind_of(unit.scored)) for unit in units]
