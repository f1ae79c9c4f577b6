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
    images_in,
    load,
    new_file,
    objections,
    post_processor_of,
    quiet,
    refuse,
    require_named_group,
    rewrite,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.post_processing.threshold_state import ThresholdState

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Show or change; returns the exit code."""
    parser = Parser(prog="anomalib-sgfr threshold", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument(
        "--false_alarm_rate", type=float, help="choose by good images: the share that may be alarms"
    )
    parser.add_argument(
        "--held_out",
        type=existing,
        help="folder of good images that were not trained on: score them",
    )
    parser.add_argument("--group", help="regular expression that names the part in an image's path")
    parser.add_argument("--value", type=float, help="set the threshold, in units of the raw score")
    parser.add_argument(
        "--score",
        type=float,
        help="set it where results now show this score: larger ones are alarms",
    )
    parser.add_argument(
        "--read_from",
        type=existing,
        nargs="+",
        help=(
            "with --value or --score: images, or folders of such, that it was read from; reports"
            " then say so"
        ),
    )
    parser.add_argument(
        "--by", help="regular expression on the path: show alarms for each product, camera ..."
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="take --held_out for good whatever the checkpoint knows",
    )
    parser.add_argument(
        "--json", action="store_true", help="show the threshold as JSON, for programs"
    )
    parser.add_argument(
        "--out",
        type=new_file,
        help="new checkpoint (default: beside the old, named CKPT_threshold)",
    )
    options = parser.parse_args(arguments)

    quiet()
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    processor = post_processor_of(model)
    wishes = (
        options.false_alarm_rate,
        options.held_out,
        options.group,
        options.value,
        options.score,
    )
    changes = any(wish is not None for wish in wishes)
    if not changes and (options.out or options.read_from or options.force):
        parser.error(
            "there is nothing to change: pass --false_alarm_rate, --held_out, --group, --value or"
            " --score"
        )
    require_named_group("--by", options.by, processor.state.scores.paths)
    out = options.out or options.ckpt_path.with_stem(f"{options.ckpt_path.stem}_threshold")
    before = processor.state
    if changes:
        processor.use(_changed(model, processor, options))
        rewrite(options.ckpt_path, out, model)
    if options.json:
        print(
            json.dumps(
                {**_facts(processor), **({"checkpoint": str(out)} if changes else {})}, indent=2
            )
        )
        return 0
    if changes:
        print(f"Threshold {before.image:.6g} before, {processor.state.image:.6g} now.")
    print(_page(processor, options.by))
    if changes:
        print(f"Checkpoint: {out}")
    return 0


def _changed(model: "Sgfr", processor: "SgfrPostProcessor", options: Any) -> "ThresholdState":  # noqa: ANN401
    """The state with what is asked for; nothing of the model changes."""
    from anomalib_sgfr.post_processing.thresholds import require_rate

    state = processor.state
    ways = {
        "--value": options.value,
        "--score": options.score,
        "--false_alarm_rate": options.false_alarm_rate,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        msg = f"{' and '.join(given)} are ways to say one thing: pass one of them."
        raise ValueError(msg)
    by_hand = options.value is not None or options.score is not None
    if options.read_from and not by_hand:
        msg = "--read_from goes with --value or --score."
        raise ValueError(msg)
    if options.false_alarm_rate is not None:
        require_rate(options.false_alarm_rate, "false_alarm_rate")
    require_named_group("--group", options.group)
    normalised = state.is_set and (state.linear or processor.enable_normalization)
    if options.score is not None and not 0.0 < options.score < (
        1.0 if normalised else float("inf")
    ):
        limit = "between 0 and 1" if normalised else "above 0, as results show it"
        msg = f"--score must lie {limit}, got {options.score}."
        raise ValueError(msg)
    if options.value is not None and not 0.0 < options.value < float("inf"):
        msg = (
            f"--value must be a finite number above 0, got {options.value}: at 0 every image is an"
            " alarm."
        )
        raise ValueError(msg)
    if options.group is not None or options.held_out is not None:
        state = _scored_anew(model, processor, options)
    if options.false_alarm_rate is not None:
        state = state._replace(false_alarm_rate=options.false_alarm_rate, value=None, read_from=())
    elif by_hand:
        value = (
            options.value if options.score is None else processor.raw_threshold_at(options.score)
        )
        files = [str(file) for path in options.read_from or () for file in images_in(path)]
        state = state._replace(value=value, read_from=tuple(dict.fromkeys(files)))
    state = state.calibrated()
    if not state.is_set:
        msg = (
            "the checkpoint keeps no scores to choose a threshold from: pass --held_out FOLDER, or"
            " --value."
        )
        raise ValueError(msg)
    return state


def _scored_anew(model: "Sgfr", processor: "SgfrPostProcessor", options: Any) -> "ThresholdState":  # noqa: ANN401
    """The state with other calibration scores: of other images, or without the atoms of the same
    part.
    """
    from anomalib_sgfr.post_processing.calibration import Split, group_of, score_images

    state = processor.state
    group = options.group or state.group
    if options.held_out is not None:
        paths = [str(path) for path in images_in(options.held_out)]
        require_named_group("--group", group, paths)
        against = objections(model, paths)
        if not options.force:
            refuse(against, "--held_out")
        anew = score_images(model.model, model.pre_processor, paths, Split.HELD_OUT, group)
        processor.held_out = str(options.held_out)
        return state._replace(
            scores=anew,
            group=group,
            false_alarm_rate=state.rate,
            value=None,
            read_from=(),
            forced=tuple(against),
        )
    good = state.scores.good
    require_named_group("--group", group, good.paths)
    if group == state.group:
        return state
    trained = {group_of(path, group) for path in model.model.images}
    again = good.subset([unit in trained for unit in good.groups(group)]).paths
    gone = [path for path in again if not Path(path).is_file()]
    if gone:
        msg = (
            f"--group: images are scored anew, without the atoms of their part, and {len(gone)} of"
            f" {len(again)} are gone: {gone[0]}. Pass --held_out FOLDER with others."
        )
        raise ValueError(msg)
    anew = score_images(model.model, model.pre_processor, again, Split.TRAINING, group)
    return state._replace(scores=state.scores.joined(anew), group=group)


def _facts(processor: "SgfrPostProcessor") -> dict[str, Any]:
    """Plain data about a threshold."""
    state = processor.state
    facts: dict[str, Any] = {
        "threshold": state.image if state.is_set else None,
        "pixel_threshold": state.pixel if state.is_set else None,
        "chosen_by": state.by,
        "basis": state.basis,
        "warning": state.warning,
        "false_alarm_rate": state.rate,
        "independent_good_images": state.independent_images,
    }
    for name, scores in (
        ("good", state.scores.good.scores),
        ("defective", state.scores.defective.scores),
    ):
        facts[name] = {"images": len(scores), "above": sum(score > state.image for score in scores)}
        if scores:
            facts[name] |= {"least": min(scores), "median": median(scores), "most": max(scores)}
    return facts


def _page(processor: "SgfrPostProcessor", by: str | None) -> str:
    state = processor.state
    if not state.is_set:
        return "There is no threshold: --held_out FOLDER of good images, or --value, sets one."
    lines = [f"Threshold {state.image:.6g} of the raw score, calibrated on {state.basis}."]
    if state.pixel != state.image:
        lines.append(f"Masks are of what exceeds {state.pixel:.6g}.")
    for name, kind in (("Good", state.scores.good), ("Defective", state.scores.defective)):
        if kind.scores:
            above = sum(score > state.image for score in kind.scores)
            spread = (
                f"raw scores {min(kind.scores):.4g} to {max(kind.scores):.4g}, median"
                f" {median(kind.scores):.4g}"
            )
            lines.append(
                f"{name}: {len(kind.scores)} images, {spread}; {above} above the threshold."
            )
    if by is not None:
        lines += _products(state, by)
    if state.warning:
        print(f"warning: {state.warning}", file=sys.stderr)
    return "\n".join(lines)


def _products(state: "ThresholdState", by: str) -> list[str]:
    """A line for each product: how many good ones are alarms."""
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
