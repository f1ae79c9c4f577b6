"""``anomalib-sgfr adapt``: adapt to a domain shift (light, camera) by a few good images of it."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    image_files,
    load,
    objections,
    refuse,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.calibration import CalibrationScores, NominalScores
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["main"]

_SUFFIX = "_adapted"
_FEWEST = 2  # each is scored by the model that the others adapt


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapt a checkpoint, and print what changed; returns the exit code."""
    parser = Parser(prog="anomalib-sgfr adapt", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    parser.add_checkpoint()
    add("images", nargs="+", type=existing, help="good images as they look now, or folders of such")
    about = "folder of defective images as they look now, to see what is found"
    add("--bad", type=existing, help=about)
    about = "number to project out of the patches of each scale (default: 4)"
    add("--directions", type=at_least(1), default=4, help=about)
    add("--force", action="store_true", help="take the images for good despite the checkpoint")
    parser.add_out(_SUFFIX)
    options = parser.parse_args(arguments)

    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    files = image_files(options.images)
    if len(files) < _FEWEST:
        parser.error(f"at least {_FEWEST} good images are needed, better 4 to 16; there is one")
    bad = image_files([options.bad]) if options.bad else []
    against = objections(model, files)
    if not options.force:
        refuse(against, "images")
    _adapt(model, files, bad, options.directions, tuple(against))
    out = options.out or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    model.save_checkpoint(out)
    print(f"Checkpoint: {out}")
    return 0


def _adapt(
    model: "Sgfr", files: list[str], bad: list[str], directions: int, forced: tuple[str, ...]
) -> None:
    """Adapt a model in place; each good image is scored by the model that the others adapt."""
    import torch

    from anomalib_sgfr.images.pre_processor import read_prepared
    from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, nominal_scores
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.training.adapt import project_out_shift, residual_moments
    from anomalib_sgfr.training.reject import hold_limits

    own = model.eval().model

    def scored(of: "SgfrModel", paths: list[str]) -> "NominalScores":
        return nominal_scores(of, model.pre_processor, paths, leave_out=False)

    moments = [
        residual_moments(own, [read_prepared(path, model.pre_processor, own.bit_depth)])
        for path in files
    ]
    total = [torch.stack(scale).sum(0) for scale in zip(*moments, strict=True)]
    good_before, bad_before = (scored(own, paths).scores for paths in (files, bad))
    good_now, peaks = [], []
    for path, own_moments in zip(files, moments, strict=True):
        others = [every - one for every, one in zip(total, own_moments, strict=True)]
        adapted = own.with_banks(project_out_shift(own, others, directions))
        if hold_limits(adapted, model.pre_processor, [path], leave_out=False):
            for bank, raised in zip(own.banks, adapted.banks, strict=True):
                bank.defects.set_limits(raised.defects.limits)
        found = scored(adapted, [path])
        good_now += found.scores
        peaks += found.peaks
    own.load_fitted_state(project_out_shift(own, total, directions))
    hold_limits(own, model.pre_processor, files, leave_out=False)
    model.accepted = None  # the banks that it would restore are gone
    processor = model.post_processor
    processor = processor if isinstance(processor, SgfrPostProcessor) else None
    threshold = processor.label_threshold if processor and processor.is_set else None
    _print_change("Good", good_before, good_now, threshold)
    _print_change("Defective", bad_before, scored(own, bad).scores, threshold)
    print("Each good image was scored by the model that the others adapt.")
    if processor and processor.is_set:
        scores = CalibrationScores.of(good_now, Split.HELD_OUT, files, peaks)
        _keep_threshold(processor, scores, forced)


def _print_change(
    name: str, before: list[float], now: list[float], threshold: float | None
) -> None:
    """Print median scores, and alarms, before and after."""
    if not before:
        return
    medians = f"{median(before):.4g} before, {median(now):.4g} now"
    line = f"{name}: {len(before)} images, median raw score {medians}"
    if threshold is not None:
        alarms = [sum(score > threshold for score in scores) for scores in (before, now)]
        line += f"; above the threshold of {threshold:.4g}: {alarms[0]} before, {alarms[1]} now"
    print(f"{line}.")


def _keep_threshold(
    processor: "SgfrPostProcessor", scores: "CalibrationScores", forced: tuple[str, ...]
) -> None:
    """Keep the threshold as a value, with the new scores to choose another one from."""
    state = processor.state
    by_hand = state._replace(value=state.image, read_from=state.threshold_images, by="hand")
    processor.use(by_hand._replace(scores=scores, forced=forced))
    print(
        "The threshold stays, as a value set by hand: choose it again, from more good images of the"
        " new domain, by `anomalib-sgfr threshold CKPT --held_out FOLDER`."
    )
