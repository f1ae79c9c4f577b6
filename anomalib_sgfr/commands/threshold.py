"""``anomalib-sgfr threshold``: what a checkpoint's threshold rests on, and another one without a fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_sgfr.commands.inputs import Parser, existing, images_in, load, new_file, post_processor_of, quiet, rewrite

if TYPE_CHECKING:
    from anomalib_sgfr.inspection.post_processing import SgfrPostProcessor
    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Show or change; returns the exit code."""
    parser = Parser(prog="anomalib-sgfr threshold", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument("--false_alarm_rate", type=float, help="choose by good images: the share that may be alarms")
    parser.add_argument("--held_out", type=existing, help="folder of good images that were not trained on: score them")
    parser.add_argument("--group", help="regular expression that names the part in an image's path")
    parser.add_argument("--value", type=float, help="set the threshold, in units of the raw score")
    parser.add_argument("--score", type=float, help="set it where results now show this score: larger ones are alarms")
    parser.add_argument("--by", help="regular expression on the path: show alarms for each product, camera ...")
    parser.add_argument("--out", type=new_file, help="new checkpoint (default: beside the old, named CKPT_threshold)")
    options = parser.parse_args(arguments)

    quiet()
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    processor = post_processor_of(model)
    wishes = (options.false_alarm_rate, options.held_out, options.group, options.value, options.score)
    if all(wish is None for wish in wishes):
        if options.out:
            parser.error("--out: there is nothing to change")
        print(_page(processor, options.by))
        return 0
    out = options.out or options.ckpt_path.with_stem(f"{options.ckpt_path.stem}_threshold")
    before = float(processor.image_threshold)
    _change(model, processor, options)
    rewrite(options.ckpt_path, out, model)
    print(f"Threshold {before:.6g} before, {float(processor.image_threshold):.6g} now.")
    print(_page(processor, options.by))
    print(f"Checkpoint: {out}")
    return 0


def _change(model: "Sgfr", processor: "SgfrPostProcessor", options: Any) -> None:  # noqa: ANN401
    from anomalib_sgfr.inspection.post_processing import checked

    ways = {"--value": options.value, "--score": options.score, "--false_alarm_rate": options.false_alarm_rate}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        msg = f"{' and '.join(given)} are ways to say one thing: pass one of them."
        raise ValueError(msg)
    checked(false_alarm_rate=options.false_alarm_rate, group=options.group)
    reported = processor.is_set and (processor.linear or processor.enable_normalization)
    if options.score is not None and not 0.0 < options.score < (1.0 if reported else float("inf")):
        limit = "between 0 and 1" if reported else "above 0, as results show it"
        msg = f"--score must lie {limit}, got {options.score}."
        raise ValueError(msg)
    if options.value is not None and not 0.0 <= options.value < float("inf"):
        msg = f"--value must be a finite number, at least 0, got {options.value}."
        raise ValueError(msg)
    if options.group is not None or options.held_out is not None:
        _score_anew(model, processor, options.held_out, options.group or processor.group)
    if options.false_alarm_rate is not None:
        processor.false_alarm_rate, processor.value = options.false_alarm_rate, None
    elif given:
        processor.value = options.value if options.score is None else processor.threshold_at(options.score)
    if processor.value is None and not processor.evidence.good.scores:
        msg = "the checkpoint keeps no scores to choose a threshold from: pass --held_out FOLDER, or --value."
        raise ValueError(msg)
    processor.choose()


def _score_anew(model: "Sgfr", processor: "SgfrPostProcessor", held_out: Path | None, group: str | None) -> None:
    """Have other scores for the threshold to rest on: of other images, or without those of the same part."""
    from anomalib_sgfr.inspection.calibration import scored
    from anomalib_sgfr.inspection.evidence import Kind, require_group, unit_of

    regrouped, processor.group = group != processor.group, group
    if held_out is not None:
        images_in(held_out)
        processor.held_out = str(held_out)
        processor.evidence = processor.nominal_evidence(model.model, model.pre_processor, [])
        processor.false_alarm_rate, processor.value = processor.rate, None
        return
    good = processor.evidence.good
    require_group(group, good.paths)
    if not regrouped:
        return
    trained = {unit_of(path, group) for path in model.model.images}
    again = good.some([unit in trained for unit in good.units(group)]).paths
    gone = [path for path in again if not Path(path).is_file()]
    if gone:
        msg = (
            f"--group: images are scored anew, without the atoms of their part, and {len(gone)} of {len(again)} are "
            f"gone: {gone[0]}. Pass --held_out FOLDER with others."
        )
        raise ValueError(msg)
    anew = scored(model.model, model.pre_processor, again, Kind.TRAINING, group)
    processor.evidence = processor.evidence.joined(anew)


def _page(processor: "SgfrPostProcessor", by: str | None) -> str:
    from anomalib_sgfr.inspection.evidence import require_group

    threshold = float(processor.image_threshold)
    good, bad = processor.evidence.good, processor.evidence.defective
    lines = [f"Threshold {threshold:.6g} of the raw score; it rests on {processor.basis}."]
    pixel = float(processor.pixel_threshold)
    if pixel != threshold:
        lines.append(f"Masks are of what exceeds {pixel:.6g}.")
    for name, kind in (("Good", good), ("Defective", bad)):
        if kind.scores:
            ordered = sorted(kind.scores)
            above = sum(score > threshold for score in ordered)
            middle = ordered[len(ordered) // 2]
            spread = f"raw scores {ordered[0]:.4g} to {ordered[-1]:.4g}, median {middle:.4g}"
            lines.append(f"{name}: {len(ordered)} images, {spread}; {above} above the threshold.")
    if bad.scores and good.scores:
        lines.append(f"How sure: {processor.evidence.said(processor.group, processor.rate)}.")
    if by is not None:
        require_group(by, processor.evidence.paths)
        lines += _products(processor, by, threshold)
    return "\n".join(lines)


def _products(processor: "SgfrPostProcessor", by: str, threshold: float) -> list[str]:
    """A line for each product: how many good ones are alarms."""
    from anomalib_sgfr.core.thresholds import alarm_threshold
    from anomalib_sgfr.inspection.evidence import named

    good = processor.evidence.good
    found: dict[str, list[float]] = {}
    for path, score in zip(good.paths, good.scores, strict=True):
        found.setdefault(named(path, by), []).append(score)
    lines = []
    for name, scores in sorted(found.items()):
        alarms = sum(score > threshold for score in scores)
        own = alarm_threshold(scores, processor.rate)
        lines.append(
            f"  {name}: {alarms} of {len(scores)} good images are alarms ({100 * alarms / len(scores):.2g}%); "
            f"a threshold of its own would be {own:.4g}"
        )
    return lines
