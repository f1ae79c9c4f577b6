"""Other settings for ``anomalib-sgfr sensitivity --suggest``: fitted anew, and measured alike."""

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_sgfr.cli.arguments import post_processor_of

if TYPE_CHECKING:
    from anomalib_sgfr.inspector import Inspector
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.report.sensitivity import Sensitivity, SettingResult

__all__ = ["compare_settings", "settings_to_try", "training_images"]

_TRAINING = 100  # most images to fit to
_FEWEST = 4  # training images that are still there
_TIMED = 7  # inspections of an image
_LARGER = (1.4, 2.0)  # factors of the image size: twice and four times the pixels
_STEP = 32  # sides are multiples of it
_BLUR = 4.0  # tried where there is none


def compare_settings(
    model: "Sgfr", measure: Callable[["Inspector", "Sgfr"], "Sensitivity"], image: Path
) -> list["SettingResult"]:
    """Fit and measure each setting that is worth trying.

    Args:
        model (Sgfr): The restored model.
        measure (Callable): Draws the same defects for each setting, and counts those that are
            found.
        image (Path): Image to take the time of.

    Returns:
        list[SettingResult]: That of the present settings first.

    Raises:
        ValueError: If too few training images are there, or the fit cannot be repeated.
    """
    from anomalib_sgfr.console import progress
    from anomalib_sgfr.images.pre_processor import output_size
    from anomalib_sgfr.report.sensitivity import SettingResult

    paths = training_images(model)
    tried = settings_to_try(model)
    results, present = list[SettingResult](), None
    for name, change in progress(list(tried.items()), len(tried), "Settings"):
        with _fitted(model, paths, change) as (inspector, fitted):
            if not change and output_size(fitted.pre_processor) != output_size(model.pre_processor):
                msg = "--suggest cannot repeat this fit: its images were pre-processed otherwise."
                raise ValueError(msg)
            found = measure(inspector, fitted)
            present = present or inspector
            now, own = _seconds([present, inspector], image)
            first = results[0].seconds if results else now
            results.append(
                SettingResult(
                    name=name,
                    arguments=dict(change),
                    seconds=first * own / now,  # beside the present ones, whatever else runs
                    drawn=found.drawn,
                    found=found.drawn - found.missed,
                    images=found.images + len(found.alarms),
                    alarms=len(found.alarms),
                )
            )
    return results


def training_images(model: "Sgfr") -> list[str]:
    """Training images of a checkpoint that are still there, at most 100.

    Args:
        model (Sgfr): The restored model.

    Raises:
        ValueError: If there are too few.
    """
    from anomalib_sgfr.post_processing.calibration import Split, select_evenly

    scores = post_processor_of(model).state.scores
    known = dict.fromkeys([*model.model.images, *scores.of_split(Split.TRAINING).paths])
    there = [path for path in known if path and Path(path).is_file()]
    if len(there) < _FEWEST:
        record = getattr(model, "fit_record", None)
        folders = ", ".join(record.folders) if record else ""
        msg = (
            f"--suggest fits to the training images again, but {len(there)} of {len(known)} are"
            f" there{f': they were in {folders}' if folders else ''}."
        )
        raise ValueError(msg)
    return select_evenly(there, _TRAINING)


def settings_to_try(model: "Sgfr") -> dict[str, dict[str, Any]]:
    """Changed arguments of each setting, by its name; the present settings first, without any.

    Args:
        model (Sgfr): The restored model.

    Returns:
        dict[str, dict[str, Any]]: Half and twice the blur; the finest layer of the image score at
        another weight; larger images, which cost more.
    """
    from anomalib_sgfr.features.layers import resolve_score_layers
    from anomalib_sgfr.images.pre_processor import output_size

    given = model.hparams
    tried: dict[str, dict[str, Any]] = {"as now": {}}
    blur = float(given["blur"])
    for value in (blur / 2.0, blur * 2.0) if blur else (_BLUR,):
        tried[f"blur {value:g}"] = {"blur": value}
    weights = resolve_score_layers(given["backbone"], given["layers"], given["score_layers"])
    finest = next(iter(weights))
    if len(weights) > 1:
        weight = 1.0 if weights[finest] < 1.0 else 0.25
        changed = {"score_layers": {**weights, finest: weight}}
        tried[f"weight {weight:g} of {finest} in the image score"] = changed
    size = output_size(model.pre_processor)
    if size is not None and not given["tile_size"]:
        for factor in _LARGER:
            height, width = (max(1, round(factor * side / _STEP)) * _STEP for side in size)
            tried[f"image size {height} x {width}"] = {"image_size": (height, width)}
    return tried


@contextmanager
def _fitted(
    model: "Sgfr", paths: Sequence[str], change: Mapping[str, Any]
) -> Iterator[tuple["Inspector", "Sgfr"]]:
    """Inspector of a fit with changed arguments, and its model; files are removed at the end."""
    from anomalib.data import Folder

    from anomalib_sgfr.console import quiet_engine
    from anomalib_sgfr.inspector import Inspector
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

    state = post_processor_of(model).state
    given = {**model.hparams, "seed": model.hparams["seed"] or 0, "trim": 0.0, "update": False}
    with tempfile.TemporaryDirectory(prefix="sgfr-") as scratch, redirect_stdout(sys.stderr):
        root = Path(scratch)
        (root / "good").mkdir()
        originals = {}
        for number, path in enumerate(paths):
            link = root / "good" / f"{number}{Path(path).suffix}"
            link.symlink_to(Path(path).absolute())
            originals[link.name] = path

        class Linked(Folder):
            """Training images by their own paths, which name their groups."""

            def _setup(self, stage: str | None = None) -> None:
                super()._setup(stage)
                samples = self.train_data.samples
                names = (Path(link).name for link in samples["image_path"])
                samples["image_path"] = [originals[name] for name in names]
                self.train_data.samples = samples

        module = Linked(
            name="settings",
            root=root,
            normal_dir="good",
            val_split_mode="none",
            test_split_mode="none",
            train_batch_size=8,
            num_workers=0,
            seed=0,
        )
        fitted = Sgfr(
            **{**given, **change},
            post_processor=SgfrPostProcessor(state.false_alarm_rate, group=state.group),
            evaluator=False,
            visualizer=False,
        )
        engine = quiet_engine(root, limit_val_batches=0)
        own = logging.getLogger("anomalib_sgfr")
        level = own.level
        own.setLevel(logging.ERROR)  # warnings of few images, which the user has had of the fit
        try:
            engine.fit(fitted, datamodule=module)
        finally:
            own.setLevel(level)
        checkpoint = root / "model.ckpt"
        engine.trainer.save_checkpoint(checkpoint)
        yield Inspector.load(checkpoint), fitted


def _seconds(inspectors: Sequence["Inspector"], image: Path) -> list[float]:
    """Median time of the inspection of an image by each, in turns."""
    seconds: list[list[float]] = [[] for _ in inspectors]
    for _ in range(_TIMED):
        for inspector, own in zip(inspectors, seconds, strict=True):
            begun = time.perf_counter()
            inspector(image)
            own.append(time.perf_counter() - begun)
    return [statistics.median(own) for own in seconds]
