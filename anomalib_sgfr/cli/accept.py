"""``anomalib-sgfr accept``: learn from false alarms that images are good, or take that back."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    image_files,
    load,
    post_processor_of,
    require_images,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.training.accept import AcceptanceHistory

__all__ = ["main"]

_SUFFIX = "_accepted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Accept images, take them back, or show the history; returns 1 if an image was refused."""
    parser = Parser(prog="anomalib-sgfr accept", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    parser.add_checkpoint()
    add(
        "images",
        nargs="*",
        type=existing,
        help="good images, or folders of images; none: show what was accepted",
    )
    add("--bad", type=existing, help="folder of defective images, none of which may become good")
    add("--force", action="store_true", help="accept images that the checkpoint objects to")
    add("--undo", action="store_true", help="take back what was accepted last")
    parser.add_out(_SUFFIX)
    options = parser.parse_args(arguments)
    if options.undo and options.images:
        parser.error("--undo takes back what was accepted last: pass no images with it")
    require_images(parser, options, "bad", "force")

    code = 0
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    own = options.ckpt_path if options.ckpt_path.stem.endswith(_SUFFIX) else None
    out = options.out or own or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    if options.undo:
        print(_undo(model))
    elif options.images:
        files = image_files(options.images)
        bad = image_files([options.bad]) if options.bad else []
        number, refused = _accept(model, files, bad, force=options.force)
        code = int(refused > 0)
        if not number:
            print("Nothing was added.")
            return code
    else:
        print(_history(model.accepted))
        return 0
    model.save_checkpoint(out)
    print(f"Checkpoint: {out}")
    return code


def _history(history: "AcceptanceHistory | None") -> str:
    """Images that were accepted, as text."""
    if history is None:
        return "No image was accepted."
    lines = []
    for number, step in enumerate(history.steps, 1):
        atoms = sum(part.number for part in step.additions)
        lines.append(f"{number}. {step.time}: {len(step.additions)} images, {atoms} atoms")
        for part in step.additions:
            forced = ", by --force" if part.image in step.forced else ""
            lines.append(f"   {part.image}: {part.number} atoms{forced}")
    return "\n".join(lines)


def _undo(model: "Sgfr") -> str:
    """Take the last step back; returns a sentence about it."""
    from anomalib_sgfr.training.accept import take_back

    step = take_back(model)
    atoms = sum(part.number for part in step.additions)
    return (
        f"Taken back: {len(step.additions)} images and {atoms} atoms, accepted {step.time}; "
        f"threshold {post_processor_of(model).state.image:.6g}."
    )


def _accept(model: "Sgfr", files: list[str], bad: list[str], *, force: bool) -> tuple[int, int]:
    """Accept images, and print what became of each; returns how many were added, and refused."""
    from anomalib_sgfr.training.accept import accept

    threshold = post_processor_of(model).label_threshold
    found = accept(model, files, bad, force=force)
    for path, score in found.no_alarms.items():
        about = f"raw score {score:.4g}, threshold {threshold:.4g}"
        print(f"{path}: is no alarm ({about}): nothing to add")
    for path, why in found.refused.items():
        print(f"error: {path} is refused: {why}", file=sys.stderr)
    if found.missed:
        print(
            f"warning: {len(found.missed)} known defects would be called good, as they resemble"
            " rejected ones no more than accepted images do:"
            f" {', '.join(found.missed[:3])}",
            file=sys.stderr,
        )
    if not found.images:
        return 0, len(found.refused)
    threshold = post_processor_of(model).label_threshold
    for image, atoms, before, now in found.images:
        still = "" if now <= threshold else f", still an alarm at the threshold of {threshold:.4g}"
        scores = f"{before:.4g} before, {now:.4g} now{still}"
        print(f"{image}: {atoms} new atoms, raw score {scores}")
    size = " + ".join(str(len(bank.atoms)) for bank in model.model.banks)
    print(f"Added {sum(image.atoms for image in found.images)} atoms: {size} now.")
    earlier, now = found.thresholds
    if found.kept:
        print(f"Threshold {earlier:.6g}, as it was: {found.kept}.")
    else:
        basis = post_processor_of(model).basis
        print(f"Threshold {earlier:.6g} before, {now:.6g} now, calibrated on {basis}.")
    return len(found.images), len(found.refused)
