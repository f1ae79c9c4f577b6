"""``anomalib-sgfr threshold``: what a threshold is calibrated on, and another one without a fit."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    image_files,
    load,
    post_processor_of,
    require_named_group,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.calibration import ThresholdState
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor

__all__ = ["main"]

_SUFFIX = "_threshold"
# what changes the threshold; of the first three, at most one
_CHANGES = ("value", "score", "false_alarm_rate", "held_out", "group")


def _parser() -> Parser:
    parser = Parser(prog="anomalib-sgfr threshold", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    parser.add_checkpoint()
    rate = "set it from good images: the share of them that may be alarms"
    add("--false_alarm_rate", type=float, help=rate)
    held_out = "folder of good images that were not trained on: score them"
    add("--held_out", type=existing, help=held_out)
    add("--group", help="regular expression that names the part in an image's path")
    add("--value", type=float, help="set the threshold of the raw score")
    add("--score", type=float, help="set it where results now show this score")
    add(
        "--read_from",
        type=existing,
        nargs="+",
        help="with --value or --score: images, or folders of images, that it was read from; reports"
        " then say so",
    )
    add("--by", help="regular expression on the path: show alarms for each product, camera ...")
    add("--force", action="store_true", help="take --held_out for good despite the checkpoint")
    add("--json", action="store_true", help="show the threshold as JSON, for programs")
    parser.add_out(_SUFFIX)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Show or change the threshold; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    processor = post_processor_of(model)
    changes = any(getattr(options, name) is not None for name in _CHANGES)
    if not changes and (options.out or options.read_from or options.force):
        parser.error(
            "there is nothing to change: pass --false_alarm_rate, --held_out, --group, --value or"
            " --score"
        )
    if options.by and options.json:
        msg = "--by shows its lines as text: pass it without --json."
        raise ValueError(msg)
    require_named_group("--by", options.by, processor.state.scores.paths)
    out = options.out or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    before = processor.state
    if changes:
        processor.use(_changed_state(model, processor, options))
        model.save_checkpoint(out)
    if options.json:
        checkpoint = {"checkpoint": str(out)} if changes else {}
        print(json.dumps({**_facts(processor.state), **checkpoint}, indent=2))
        return 0
    if changes:
        print(f"Threshold {before.image:.6g} before, {processor.state.image:.6g} now.")
    print(_summary(processor.state, options.by))
    if processor.warning:
        print(f"warning: {processor.warning}", file=sys.stderr)
    if changes:
        print(f"Checkpoint: {out}")
    return 0


def _require_valid(processor: "SgfrPostProcessor", options: Any) -> None:  # noqa: ANN401
    """Refuse options that contradict each other or are out of range."""
    from anomalib_sgfr.post_processing.thresholds import require_rate

    given = [f"--{name}" for name in _CHANGES[:3] if getattr(options, name) is not None]
    msg, infinity = "", float("inf")
    if len(given) > 1:
        msg = f"{' and '.join(given)} are ways to say one thing: pass one of them."
    elif options.read_from and options.value is None and options.score is None:
        msg = "--read_from goes with --value or --score."
    elif options.force and options.held_out is None:
        msg = "--force goes with --held_out."
    elif options.value is not None and not 0.0 < options.value < infinity:
        msg = f"--value must be a finite number above 0, got {options.value}"
        msg += ": at 0 every image is an alarm."
    elif options.score is not None:
        normalised = processor.is_set and processor.normalises
        if not 0.0 < options.score < (1.0 if normalised else infinity):
            limit = "between 0 and 1" if normalised else "above 0, as results show it"
            msg = f"--score must lie {limit}, got {options.score}."
    if msg:
        raise ValueError(msg)
    if options.false_alarm_rate is not None:
        require_rate(options.false_alarm_rate, "false_alarm_rate")
    require_named_group("--group", options.group)


def _changed_state(
    model: "Sgfr",
    processor: "SgfrPostProcessor",
    options: Any,  # noqa: ANN401
) -> "ThresholdState":
    """State with what the options request."""
    _require_valid(processor, options)
    state = processor.state
    if options.held_out is not None:
        state = _held_out_state(model, processor, options)
    elif options.group is not None:
        state = _regrouped_state(model, state, options.group or state.group)
    if options.false_alarm_rate is not None:
        state = state._replace(false_alarm_rate=options.false_alarm_rate, value=None, read_from=())
    elif options.value is not None or options.score is not None:
        value = options.value
        if value is None:
            value = processor.raw_threshold_at(options.score)
        state = state._replace(value=value, read_from=tuple(image_files(options.read_from or ())))
    state = state.calibrated()
    if not state.is_set:
        msg = (
            "the checkpoint keeps no scores to choose a threshold from: pass --held_out FOLDER, or"
            " --value."
        )
        raise ValueError(msg)
    return state


def _held_out_state(
    model: "Sgfr",
    processor: "SgfrPostProcessor",
    options: Any,  # noqa: ANN401
) -> "ThresholdState":
    """State with the scores of other good images."""
    from anomalib_sgfr.post_processing.calibration import Split, score_images
    from anomalib_sgfr.training.accept import require_good
    from anomalib_sgfr.training.reject import hold_limits

    state = processor.state
    group = options.group or state.group
    paths = image_files([options.held_out])
    require_named_group("--group", group, paths)
    against = require_good(model, paths, "--held_out", force=options.force)
    processor.held_out = str(options.held_out)
    hold_limits(model.model, model.pre_processor, paths, group)
    return state._replace(
        scores=score_images(model.model, model.pre_processor, paths, Split.HELD_OUT, group),
        group=group,
        false_alarm_rate=state.rate,
        value=None,
        read_from=(),
        forced=tuple(against),
    )


def _regrouped_state(model: "Sgfr", state: "ThresholdState", group: str | None) -> "ThresholdState":
    """State with training images scored without the atoms of another group."""
    from anomalib_sgfr.post_processing.calibration import Split, group_of, score_images
    from anomalib_sgfr.training.reject import hold_limits

    good = state.scores.good
    require_named_group("--group", group, good.paths)
    if group == state.group:
        return state
    trained = {group_of(path, group) for path in model.model.images}
    again = good.subset([name in trained for name in good.groups(group)]).paths
    gone = [path for path in again if not Path(path).is_file()]
    if gone:
        msg = (
            f"--group: images are scored anew, without the atoms of their part, and {len(gone)} of"
            f" {len(again)} are gone: {gone[0]}. Pass --held_out FOLDER with others."
        )
        raise ValueError(msg)
    hold_limits(model.model, model.pre_processor, again, group)
    anew = score_images(model.model, model.pre_processor, again, Split.TRAINING, group)
    return state._replace(scores=state.scores.joined(anew), group=group)


def _facts(state: "ThresholdState") -> dict[str, Any]:
    """The threshold as plain data."""
    facts: dict[str, Any] = {
        "threshold": state.image if state.is_set else None,
        "pixel_threshold": state.pixel if state.is_set else None,
        "chosen_by": state.by,
        "basis": state.basis,
        "warning": state.warning,
        "false_alarm_rate": state.rate,
        "independent_good_images": state.independent_images,
    }
    for name in ("good", "defective"):
        scores = getattr(state.scores, name).scores
        facts[name] = {"images": len(scores), "above": sum(score > state.image for score in scores)}
        if scores:
            facts[name] |= {"least": min(scores), "median": median(scores), "most": max(scores)}
    return facts


def _summary(state: "ThresholdState", by: str | None) -> str:
    """The threshold as text."""
    if not state.is_set:
        return "There is no threshold: --held_out FOLDER of good images, or --value, sets one."
    lines = [f"Threshold {state.image:.6g} of the raw score, calibrated on {state.basis}."]
    if state.pixel != state.image:
        lines.append(f"Masks are of what exceeds {state.pixel:.6g}.")
    for name, kind in (("Good", state.scores.good), ("Defective", state.scores.defective)):
        scores = kind.scores
        if scores:
            above = sum(score > state.image for score in scores)
            spread = f"{min(scores):.4g} to {max(scores):.4g}, median {median(scores):.4g}"
            about = f"{len(scores)} images, raw scores {spread}"
            lines.append(f"{name}: {about}; {above} above the threshold.")
    return "\n".join(lines if by is None else lines + _alarms_by_label(state, by))


def _alarms_by_label(state: "ThresholdState", by: str) -> list[str]:
    """Lines of false alarms, one for each product, camera ..."""
    from anomalib_sgfr.post_processing.calibration import group_label
    from anomalib_sgfr.post_processing.thresholds import conformal_threshold

    found: dict[str, list[float]] = {}
    for path, score in zip(state.scores.good.paths, state.scores.good.scores, strict=True):
        found.setdefault(group_label(path, by), []).append(score)
    lines = []
    for name, scores in sorted(found.items()):
        alarms = sum(score > state.image for score in scores)
        own = conformal_threshold(scores, state.rate)
        lines.append(
            f"  {name}: {alarms} of {len(scores)} good images are alarms"
            f" ({100 * alarms / len(scores):.2g}%); a threshold of its own would be {own:.4g}"
        )
    return lines
