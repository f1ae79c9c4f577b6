"""``anomalib-sgfr sensitivity``: what would be missed, by defects drawn into good images."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    images_in,
    load,
    new_file,
    post_processor_of,
)
from anomalib_sgfr.cli.prediction import report_damaged
from anomalib_sgfr.cli.settings import compare_settings, training_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anomalib_sgfr.inspector import Inspector
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.report.sensitivity import Sensitivity
    from anomalib_sgfr.report.sensitivity_page import SensitivityFacts

__all__ = ["main"]

_PAGES, _FIGURES = (".html", ".htm"), ".json"
_IMAGES = 300  # most good images to draw into, as calibration takes
_FEWER = 3  # times fewer defects for each setting than for the page
_KINDS = ("spot", "scratch", "thread", "dent", "piece", "distortion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, inspect and report; returns 1 if an image could not be read."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out.suffix not in {*_PAGES, _FIGURES}:
        parser.error(f"--out must end in .html or .json, got {options.out}")
    if not _may_replace(options.out.with_suffix(_FIGURES)):
        parser.error(
            f"--out: {options.out.with_suffix(_FIGURES)} has something else than the figures of"
            " this command: name another file"
        )
    files = list(dict.fromkeys(file for path in options.good for file in images_in(path)))

    from anomalib_sgfr.inspector import Inspector
    from anomalib_sgfr.post_processing.calibration import select_evenly
    from anomalib_sgfr.report.page import write_page
    from anomalib_sgfr.report.sensitivity_page import render_sensitivity, sensitivity_as_json

    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    is_set = post_processor_of(model).is_set
    inspector = Inspector.load(options.ckpt_path)
    if inspector.threshold is None or not is_set:
        msg = (
            f"'{options.ckpt_path}' has no threshold, so nothing is found or missed: set one by"
            " `anomalib-sgfr threshold`."
        )
        raise ValueError(msg)
    if options.suggest:
        training_images(model)  # refused before anything is computed
    chosen = [Path(path) for path in select_evenly([str(file) for file in files], _IMAGES)]
    damaged: dict[Path, str] = {}
    settings = []
    try:
        found = _measure(inspector, model, chosen, options, damaged)
        if options.suggest:
            readable = [path for path in chosen if path not in damaged]
            fewer = argparse.Namespace(**vars(options))
            fewer.number = max(1, options.number // _FEWER)
            settings = compare_settings(
                model, lambda own, of: _measure(own, of, readable, fewer, {}), readable[0]
            )
    except ValueError as error:
        report_damaged(damaged)
        raise ValueError(re.sub("^(good|sizes):", r"--\1:", str(error))) from error
    code = report_damaged(damaged)
    facts = _facts(model, options, inspector.threshold, len(files), chosen)
    facts = facts._replace(settings=settings)
    figures = f"{json.dumps(sensitivity_as_json(found, facts), indent=2)}\n"
    if options.out.suffix in _PAGES:
        write_page(render_sensitivity(found, facts), options.out)
        print(f"Page: {options.out}")
    write_page(figures, options.out.with_suffix(_FIGURES))
    print(f"Figures: {options.out.with_suffix(_FIGURES)}")
    return code


def _parser() -> Parser:
    parser = Parser(prog="anomalib-sgfr sensitivity", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    parser.add_checkpoint()
    about = "folders of good images, better not of those trained on"
    add("--good", type=existing, nargs="+", required=True, help=about)
    about = "the page (.html), with the figures for programs beside it (.json); or these alone"
    add("--out", type=new_file, required=True, help=about)
    about = "millimetres of a pixel of the images, for sizes in millimetres too"
    add("--mm_per_pixel", type=_positive, help=about)
    about = "mask image, white where defects may be drawn (default: the checkpoint's region)"
    add("--roi", type=existing, help=about)
    add("--kinds", nargs="+", choices=_KINDS, default=_KINDS, help="kinds of defects")
    about = "sizes in pixels of the images (default: seven, from 1/100 to 1/5 of a side)"
    add("--sizes", nargs="+", type=_positive, help=about)
    about = "contrasts as shares of white (default: 0.1 0.25)"
    add("--contrasts", nargs="+", type=_contrast, default=[0.1, 0.25], help=about)
    about = "defects to draw of each kind, contrast and size (default: 30)"
    add("--number", type=at_least(1), default=30, help=about)
    add("--seed", type=at_least(0), default=0, help="of places and shapes (default: 0)")
    about = "compare other settings (blur, layers, image size), fitted to the training images anew"
    add("--suggest", action="store_true", help=about)
    return parser


def _may_replace(figures: Path) -> bool:
    """Whether a file is not there, or is of this command; others have such names too.

    A watch of ``line.csv`` has its state in ``line.json``.
    """
    if not figures.exists():
        return True
    try:
        found = json.loads(figures.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and (not found or "curves" in found)


def _measure(
    inspector: "Inspector",
    model: "Sgfr",
    paths: Sequence[Path],
    options: argparse.Namespace,
    damaged: dict[Path, str],
) -> "Sensitivity":
    """Draw defects as the options say, and count those that a model finds."""
    from anomalib_sgfr.report.sensitivity import measure_sensitivity

    return measure_sensitivity(
        inspector,
        paths,
        _region_of(model, options.roi),
        bit_depth=inspector.bit_depth,
        kinds=list(dict.fromkeys(options.kinds)),
        contrasts=sorted(set(options.contrasts)),
        sizes=sorted(set(options.sizes)) if options.sizes else None,
        number=options.number,
        seed=options.seed,
        damaged=damaged,
    )


def _positive(text: str) -> float:
    """Type of an argument that is a positive number."""
    return _between(text, float("inf"), "a positive number")


def _contrast(text: str) -> float:
    """Type of an argument that is a share of white."""
    return _between(text, 1.0, "a number above 0, at most 1")


def _between(text: str, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= most or number == float("inf"):
        msg = f"must be {what}, got '{text}'"
        raise argparse.ArgumentTypeError(msg)
    return number


def _region_of(
    model: "Sgfr", roi: Path | None
) -> "Callable[[Path, tuple[int, int]], NDArray[np.bool_]]":
    """Pixels of an image that are inspected, and inside the masks of the model and the user.

    Raises:
        ValueError: If the mask cannot be read, or the model moves pixels in an unknown way. The
            function raises it too, for an image of another size than the mask.
    """
    import numpy as np

    from anomalib_sgfr.images.frame_geometry import frame_transform
    from anomalib_sgfr.images.pre_processor import geometric_steps
    from anomalib_sgfr.images.roi import read_roi

    steps = geometric_steps(getattr(model.pre_processor, "transform", None))
    own = model.model.region.numpy() if model.model.region.numel() else None
    given = None if roi is None else read_roi(roi).numpy()

    def region_of(path: Path, size: tuple[int, int]) -> "NDArray[np.bool_]":
        transform = frame_transform(steps, size)
        inspected = np.ones(transform.input_size) if own is None else own
        region: NDArray[np.bool_] = transform.resample(inspected) > 0.5  # noqa: PLR2004
        if given is None:
            return region
        if given.shape != size:
            its, wanted = (" x ".join(map(str, shape)) for shape in (size, given.shape))
            msg = f"{path} is of {its} pixels, the mask of --roi of {wanted}"
            raise ValueError(msg)
        both: NDArray[np.bool_] = region & given
        if not both.any():
            msg = f"the mask of --roi has no white pixel that the model inspects in {path}"
            raise ValueError(msg)
        return both

    return region_of


def _facts(
    model: "Sgfr",
    options: argparse.Namespace,
    threshold: float,
    number: int,
    chosen: Sequence[Path],
) -> "SensitivityFacts":
    """What the page and the figures tell beside the counts."""
    from anomalib_sgfr.post_processing.calibration import Split
    from anomalib_sgfr.report.fit_record import versions
    from anomalib_sgfr.report.model_facts import known_images, sha256_of
    from anomalib_sgfr.report.sensitivity_page import SensitivityFacts

    processor = post_processor_of(model)
    scores = processor.state.scores
    trained = [*model.model.images, *scores.of_split(Split.TRAINING).paths]
    known, _ = known_images([str(path) for path in chosen], trained)
    notes = [f"{processor.warning}."] if processor.warning else []
    if any(known):
        notes.append(
            f"{sum(known)} of {len(chosen)} good images were trained on: they score lower than new"
            " images, so that more is missed in them."
        )
    state = model.model.fitted_state
    if options.suggest and (
        model.accepted or state.rejected or any(part.nuisance is not None for part in state.states)
    ):
        notes.append(
            "Other settings, and the present ones beside them, are of new fits: without what this"
            " checkpoint has learned by accept, reject or adapt."
        )
    if number > len(chosen):
        notes.append(f"Of {number} good images, {len(chosen)} were used, chosen evenly.")
    return SensitivityFacts(
        made=datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M"),
        checkpoint=str(options.ckpt_path),
        sha256=sha256_of(str(options.ckpt_path)),
        versions=versions(),
        threshold=threshold,
        basis=processor.basis,
        false_alarm_rate=processor.state.rate,
        seed=options.seed,
        has_region=options.roi is not None or bool(model.model.region.numel()),
        mm_per_pixel=options.mm_per_pixel,
        notes=notes,
    )
