"""``anomalib-sgfr adapt``: adapt to a domain shift (light, camera) by a few good images of it."""

from collections.abc import Sequence
from statistics import median

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    image_files,
    load,
)

__all__ = ["main"]

_SUFFIX = "_adapted"


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

    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.training.adapt import FEWEST, adapt

    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    files = image_files(options.images)
    if len(files) < FEWEST:
        parser.error(f"at least {FEWEST} good images are needed, better 4 to 16; there is one")
    bad = image_files([options.bad]) if options.bad else []
    found = adapt(model, files, bad, directions=options.directions, force=options.force)
    processor = model.post_processor
    is_set = isinstance(processor, SgfrPostProcessor) and processor.is_set
    threshold = processor.label_threshold if is_set else None
    _print_change("Good", *found.good, threshold)
    _print_change("Defective", *found.bad, threshold)
    print("Each good image was scored by the model that the others adapt.")
    if is_set:
        print(
            "The threshold stays, as a value set by hand: choose it again, from more good images of"
            " the new domain, by `anomalib-sgfr threshold CKPT --held_out FOLDER`."
        )
    out = options.out or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    model.save_checkpoint(out)
    print(f"Checkpoint: {out}")
    return 0


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
