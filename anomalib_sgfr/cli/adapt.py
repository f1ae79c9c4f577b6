"""``anomalib-sgfr adapt``: go on after a domain shift (light, camera), from a few good images of
the new domain.
"""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    images_in,
    load,
    new_file,
    objections,
    quiet,
    refuse,
    rewrite,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.calibration import CalibrationScores, NominalScores
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["main"]

_SUFFIX = "_adapted"
_FEWEST = 2  # each is scored by what the others tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapt, and tell what it did; returns the exit code."""
    parser = Parser(prog="anomalib-sgfr adapt", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument(
        "images", nargs="+", type=existing, help="good images as they look now, or folders of such"
    )
    parser.add_argument(
        "--bad",
        type=existing,
        help="folder of defective images as they look now, to see what is found",
    )
    parser.add_argument(
        "--directions",
        type=at_least(1),
        default=4,
        help="to leave out of the patches of each scale (default: 4)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="take the images for good whatever the checkpoint knows",
    )
    parser.add_argument(
        "--out",
        type=new_file,
        help=f"new checkpoint (default: beside the old, named CKPT{_SUFFIX})",
    )
    options = parser.parse_args(arguments)

    quiet()
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    files = list(dict.fromkeys(str(file) for path in options.images for file in images_in(path)))
    if len(files) < _FEWEST:
        parser.error(f"at least {_FEWEST} good images are needed, better 4 to 16; there is one")
    bad = [str(path) for path in images_in(options.bad)] if options.bad else []
    against = objections(model, files)
    if not options.force:
        refuse(against, "images")
    _adapt(model, files, bad, options.directions, tuple(against))
    out = options.out or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    rewrite(options.ckpt_path, out, model)
    print(f"Checkpoint: {out}")
    return 0


def _adapt(
    model: "Sgfr", files: list[str], bad: list[str], directions: int, forced: tuple[str, ...]
) -> None:
    """Adapt a model in place; each good image is scored as the others alone would have it."""
    import torch

    from anomalib_sgfr.images.pre_processor import read_prepared
    from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, nominal_scores
    from anomalib_sgfr.training.adapt import project_out_shift, residual_moments

    own = model.eval().model

    def scored(of: "SgfrModel", paths: list[str]) -> "NominalScores":
        return nominal_scores(of, model.pre_processor, paths, leave_out=False)

    moments = [
        residual_moments(own, [read_prepared(path, model.pre_processor, own.bit_depth)])
        for path in files
    ]
    together = [torch.stack(scale).sum(0) for scale in zip(*moments, strict=True)]
    before, bad_before = (scored(own, paths).scores for paths in (files, bad))
    now, peaks = [], []
    for path, its in zip(files, moments, strict=True):
        others = [every - one for every, one in zip(together, its, strict=True)]
        found = scored(own.with_banks(project_out_shift(own, others, directions)), [path])
        now += found.scores
        peaks += found.peaks
    own.load_fitted_state(project_out_shift(own, together, directions))
    model.accepted = None  # of banks that there are no more
    _tell(model, before, now, bad_before, scored(own, bad).scores)
    _keep_threshold(model, CalibrationScores.of(now, Split.HELD_OUT, files, peaks), forced)


def _tell(
    model: "Sgfr",
    before: list[float],
    now: list[float],
    bad_before: list[float],
    bad_now: list[float],
) -> None:
    processor = _with_threshold(model)
    for what, scores, then in (("Good", before, now), ("Defective", bad_before, bad_now)):
        if not scores:
            continue
        line = (
            f"{what}: {len(scores)} images, median raw score {median(scores):.4g} before,"
            f" {median(then):.4g} now"
        )
        if processor is not None:
            threshold = processor.label_threshold
            alarms = [sum(score > threshold for score in found) for found in (scores, then)]
            line += f"; above the threshold of {threshold:.4g}: {alarms[0]} before, {alarms[1]} now"
        print(f"{line}.")
    print("Each good image was scored as the others alone would have it.")


def _keep_threshold(model: "Sgfr", scores: "CalibrationScores", forced: tuple[str, ...]) -> None:
    """Keep the threshold, which other scores chose, as a value; with the new ones at hand to choose
    another.
    """
    processor = _with_threshold(model)
    if processor is None:
        return
    state = processor.state
    by_hand = state._replace(
        value=state.image, read_from=state.threshold_images, by="hand"
    )  # the pixels' stays too
    processor.use(by_hand._replace(scores=scores, forced=forced))
    print(
        "The threshold stays, as a value set by hand: choose it again, from more good images of the"
        " new domain, by `anomalib-sgfr threshold CKPT --held_out FOLDER`."
    )


def _with_threshold(model: "Sgfr") -> "SgfrPostProcessor | None":
    """The post-processor, if it is Sgfr's and there is a threshold."""
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

    found = model.post_processor
    return found if isinstance(found, SgfrPostProcessor) and found.is_set else None
