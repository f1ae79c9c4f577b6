"""``anomalib-sgfr accept``: learn from false alarms that images are good, or take that back."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    image_files,
    load,
    objections,
    post_processor_of,
    require_images,
)

if TYPE_CHECKING:
    from torch import Tensor

    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.torch_model import SgfrModel
    from anomalib_sgfr.training.accept import AcceptanceHistory, NewAtoms

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
    history = model.accepted
    if history is None:
        msg = "no image was accepted: there is nothing to take back."
        raise ValueError(msg)
    step, left = history.steps[-1], history._replace(steps=history.steps[:-1])
    model.model.load_state_dict(left.applied(model.model).state_dict())
    processor = post_processor_of(model)
    processor.load_checkpoint_config(step.config)
    processor.load_state_dict(step.state)
    model.accepted = left if left.steps else None
    _hold_limits(model)
    atoms = sum(part.number for part in step.additions)
    return (
        f"Taken back: {len(step.additions)} images and {atoms} atoms, accepted {step.time}; "
        f"threshold {processor.state.image:.6g}."
    )


class _Scored(NamedTuple):
    """Image file with its embeddings, size and raw score."""

    path: str
    embeddings: Any
    size: Any
    score: float

    @classmethod
    def of(cls, model: "SgfrModel", image: "Tensor", path: str) -> "_Scored":
        """Embed and score a pre-processed image of shape ``(3, H, W)``."""
        embeddings, size = model.embed(image[None]), image.shape[-2:]
        score = float(model.score_embeddings(embeddings, size).pred_score)
        return cls(path, embeddings, size, score)

    def score_by(self, model: "SgfrModel") -> float:
        """Raw score by the memory banks of another model with the same backbone."""
        return float(model.score_embeddings(self.embeddings, self.size).pred_score)


def _read(model: "Sgfr", path: str) -> "Tensor":
    from anomalib_sgfr.images.pre_processor import read_prepared

    return read_prepared(path, model.pre_processor, model.model.bit_depth)


def _become_good(
    defects: Sequence[_Scored], model: "SgfrModel", before: float, threshold: float
) -> list[str]:
    """Defective images that exceeded the threshold before, and do not exceed the new one."""
    return [
        defect.path
        for defect in defects
        if defect.score > before and defect.score_by(model) <= threshold
    ]


def _accept(model: "Sgfr", files: list[str], bad: list[str], *, force: bool) -> tuple[int, int]:
    """Accept images, and print what becomes of each; returns how many were added, and refused."""
    import torch

    from anomalib_sgfr.console import progress
    from anomalib_sgfr.training.accept import add_atoms, find_new_atoms

    processor = post_processor_of(model)
    if not processor.is_set:
        msg = (
            "the checkpoint has no threshold, so nothing was called anomalous: `anomalib-sgfr"
            " threshold` sets one."
        )
        raise ValueError(msg)
    threshold, peak = processor.label_threshold, processor.peak_threshold
    model.eval()
    against = objections(model, files)
    known = processor.calibration_scores.defective.exclude([*files, *bad]).paths
    bad = [*bad, *(path for path in known if Path(path).is_file())]
    additions: list[NewAtoms] = []
    before: dict[str, float] = {}
    refused = 0
    with torch.no_grad():
        defects = [_Scored.of(model.model, _read(model, path), path) for path in bad]
        current = model.model
        for path in progress(files, len(files), "Accepting"):
            image = _read(model, path)
            score = _Scored.of(current, image, path).score
            addition = find_new_atoms(current, image, path, threshold, peak)
            if addition is None:
                about = f"raw score {score:.4g}, threshold {threshold:.4g}"
                print(f"{path}: is no alarm ({about}): nothing to add")
                continue
            why = "" if force or path not in against else f": {against[path]}. --force accepts it."
            if not why:
                state = add_atoms(model.model.fitted_state, [*additions, addition])
                tried = model.model.with_banks(state)
                good = _become_good(defects, tried, threshold, threshold)
                if good:
                    known_good = f"{len(good)} of {len(bad)} known defects would be called good"
                    why = f": with it {known_good}: {', '.join(good[:3])}"
            if why:
                print(f"error: {path} is refused{why}", file=sys.stderr)
                refused += 1
                continue
            additions.append(addition)
            before[path] = score
            current = tried
        if not additions:
            return 0, refused
        _add_atoms(model, additions, [path for path in before if path in against])
        calibration = _recalibrate(model, defects, threshold)
        _print_scores(model, additions, before)
    size = " + ".join(str(len(bank.atoms)) for bank in model.model.banks)
    print(f"Added {sum(part.number for part in additions)} atoms: {size} now.")
    print(calibration)
    return len(additions), refused


def _add_atoms(model: "Sgfr", additions: Sequence["NewAtoms"], forced: list[str]) -> None:
    """Add atoms, and a step to the history that takes them back."""
    from anomalib_sgfr.training.accept import Acceptance, AcceptanceHistory

    processor = post_processor_of(model)
    history = model.accepted or AcceptanceHistory.begun(model.model)
    step = Acceptance(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        additions=[_with_thumbnails(model, addition) for addition in additions],
        state={name: value.clone() for name, value in processor.state_dict().items()},
        config=processor.checkpoint_config(),
        forced=forced,
    )
    history = history._replace(steps=(*history.steps, step))
    model.model.load_state_dict(history.applied(model.model).state_dict())
    model.accepted = history
    _hold_limits(model)


def _hold_limits(model: "Sgfr") -> None:
    """Let rejected defects raise the score of no image that is known to be good."""
    from anomalib_sgfr.training.reject import hold_limits

    state = post_processor_of(model).state
    hold_limits(model.model, model.pre_processor, state.scores.good.paths, state.group)
    steps = model.accepted.steps if model.accepted else ()
    accepted = [addition.image for step in steps for addition in step.additions]
    # beside their own atoms, unlike images to calibrate on
    hold_limits(model.model, model.pre_processor, accepted, leave_out=False)


def _with_thumbnails(model: "Sgfr", addition: "NewAtoms") -> "NewAtoms":
    """New atoms with their thumbnails, where the memory banks keep some."""
    from anomalib_sgfr.report.crops import thumbnails
    from anomalib_sgfr.training.accept import add_atoms

    if not any(bank.thumbnails.numel() for bank in model.model.banks):
        return addition
    earlier = model.model.fitted_state
    extended = model.model.with_banks(add_atoms(earlier, [addition]))
    pairs = zip(thumbnails(extended, model.pre_processor, earlier), earlier.states, strict=True)
    new = [part[len(state.clusters.atoms) :] for part, state in pairs]
    return addition._replace(thumbnails=new)


def _print_scores(model: "Sgfr", additions: Sequence["NewAtoms"], before: dict[str, float]) -> None:
    """Print each image's score before and after, by what is written to the checkpoint."""
    threshold = post_processor_of(model).label_threshold
    for path, number in ((addition.image, addition.number) for addition in additions):
        now = _Scored.of(model.model, _read(model, path), path).score
        still = "" if now <= threshold else f", still an alarm at the threshold of {threshold:.4g}"
        scores = f"{before[path]:.4g} before, {now:.4g} now{still}"
        print(f"{path}: {number} new atoms, raw score {scores}")


def _recalibrate(model: "Sgfr", defects: Sequence[_Scored], before: float) -> str:
    """Calibrate the threshold with the present memory banks; returns a sentence about it."""
    from anomalib_sgfr.post_processing.calibration import rescore

    processor = post_processor_of(model)
    missed = _become_good(defects, model.model, before, before)
    if missed:  # none is by the new atoms alone
        print(
            f"warning: {len(missed)} known defects would be called good, as they resemble rejected"
            f" ones no more than accepted images do: {', '.join(missed[:3])}",
            file=sys.stderr,
        )
    earlier = processor.state
    phrase = f"Threshold {earlier.image:.6g}"
    if earlier.by in {"hand", "unknown"}:
        return f"{phrase}, as it was: it is {earlier.basis}."
    scores = rescore(earlier.scores, model.model, model.pre_processor, earlier.group)
    processor.use(earlier._replace(scores=scores).calibrated())
    good = len(_become_good(defects, model.model, before, processor.label_threshold))
    if good:
        processor.use(earlier)
        return f"{phrase}, as it was: with a new one {good} known defects would be called good."
    return f"{phrase} before, {processor.state.image:.6g} now, calibrated on {processor.basis}."
