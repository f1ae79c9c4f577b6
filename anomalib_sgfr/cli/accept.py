"""``anomalib-sgfr accept``: learn that images are good which were called anomalous, or take that
back.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    images_in,
    load,
    new_file,
    objections,
    post_processor_of,
    quiet,
    rewrite,
)

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
    from anomalib_sgfr.torch_model import SgfrModel
    from anomalib_sgfr.training.accept import AcceptanceHistory, NewAtoms

__all__ = ["main"]

_SUFFIX = "_accepted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Accept, take back, or show; returns the exit code, 1 if an image was refused."""
    parser = Parser(prog="anomalib-sgfr accept", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument(
        "images",
        nargs="*",
        type=existing,
        help="good images, or folders of such; none: show the record",
    )
    parser.add_argument(
        "--bad", type=existing, help="folder of defective images, none of which may turn good"
    )
    parser.add_argument(
        "--force", action="store_true", help="accept images that the checkpoint speaks against"
    )
    parser.add_argument("--undo", action="store_true", help="take back what was accepted last")
    parser.add_argument(
        "--out",
        type=new_file,
        help=f"new checkpoint (default: beside the old, named CKPT{_SUFFIX})",
    )
    options = parser.parse_args(arguments)
    if options.undo and options.images:
        parser.error("--undo takes back what was accepted last: pass no images with it")

    quiet()
    code = 0
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    own = options.ckpt_path if options.ckpt_path.stem.endswith(_SUFFIX) else None
    out = options.out or own or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    if options.undo:
        print(_undo(model))
    elif options.images:
        files = list(
            dict.fromkeys(str(file) for path in options.images for file in images_in(path))
        )
        bad = [str(path) for path in images_in(options.bad)] if options.bad else []
        added, refused = _accept(model, files, bad, force=options.force)
        code = int(refused > 0)
        if not added:
            print("Nothing was added.")
            return code
    else:
        print(_told(model.accepted))
        return 0
    rewrite(options.ckpt_path, out, model)
    print(f"Checkpoint: {out}")
    return code


def _told(record: "AcceptanceHistory | None") -> str:
    if record is None:
        return "No image was accepted."
    lines = []
    for number, step in enumerate(record.steps, 1):
        atoms = sum(part.number for part in step.additions)
        lines.append(f"{number}. {step.time}: {len(step.additions)} images, {atoms} atoms")
        lines += [
            f"   {part.image}: {part.number}"
            f" atoms{', by --force' if part.image in step.forced else ''}"
            for part in step.additions
        ]
    return "\n".join(lines)


def _undo(model: "Sgfr") -> str:
    record = model.accepted
    if record is None:
        msg = "no image was accepted: there is nothing to take back."
        raise ValueError(msg)
    step, left = record.steps[-1], record._replace(steps=record.steps[:-1])
    before = left.applied(model.model)
    model.model.load_state_dict(before.state_dict())
    processor = post_processor_of(model)
    processor.load_checkpoint_config(step.config)
    processor.load_state_dict(step.state)
    model.accepted = left if left.steps else None
    atoms = sum(part.number for part in step.additions)
    return (
        f"Taken back: {len(step.additions)} images and {atoms} atoms, accepted {step.time}; "
        f"threshold {processor.state.image:.6g}."
    )


class _Known(NamedTuple):
    """Defective images: files, embeddings, sizes and raw scores."""

    paths: list[str]
    embeddings: list[Any]
    sizes: list[Any]
    scores: list[float]

    def turned(self, banks: Any, model: "SgfrModel", before: float, threshold: float) -> list[str]:  # noqa: ANN401
        """Those above the threshold before that are not now."""
        return [
            path
            for path, embedding, size, score in zip(*self, strict=True)
            if score > before and _score(model, embedding, size, banks) <= threshold
        ]


def _score(model: "SgfrModel", embedding: Any, size: Any, banks: Any = None) -> float:  # noqa: ANN401
    return float(model.score_embeddings(embedding, size, banks).pred_score)


def _known(model: "Sgfr", paths: list[str]) -> _Known:
    from anomalib_sgfr.images.pre_processor import read_prepared

    images = [
        read_prepared(path, model.pre_processor, model.model.bit_depth)[None] for path in paths
    ]
    embeddings = [model.model.embed(image) for image in images]
    sizes = [image.shape[-2:] for image in images]
    scores = [_score(model.model, part, size) for part, size in zip(embeddings, sizes, strict=True)]
    return _Known(paths, embeddings, sizes, scores)


def _accept(model: "Sgfr", files: list[str], bad: list[str], *, force: bool) -> tuple[int, int]:
    """Accept what can be, and tell of each; returns how many images were added, and refused."""
    import torch

    from anomalib_sgfr.console import progress
    from anomalib_sgfr.images.pre_processor import read_prepared
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
    bad = list(dict.fromkeys([*bad, *_known_defective(processor, files)]))
    additions: list[NewAtoms] = []
    before: dict[str, float] = {}
    refused = 0
    with torch.no_grad():
        known = _known(model, bad)
        current = model.model
        for path in progress(files, len(files), "Accepting"):
            image = read_prepared(path, model.pre_processor, model.model.bit_depth)
            score = _score(current, current.embed(image[None]), image.shape[-2:])
            addition = find_new_atoms(current, image, path, threshold, peak)
            if addition is None:
                print(
                    f"{path}: is no alarm (raw score {score:.4g}, threshold {threshold:.4g}):"
                    " nothing to add"
                )
                continue
            if path in against and not force:
                print(
                    f"error: {path} is refused: {against[path]}. --force accepts it.",
                    file=sys.stderr,
                )
                refused += 1
                continue
            tried = model.model.with_banks(
                add_atoms(model.model.fitted_state, [*additions, addition])
            )
            turned = known.turned(tried.banks, tried, threshold, threshold)
            if turned:
                named = (
                    f"{len(turned)} of {len(bad)} known defects would be called good:"
                    f" {', '.join(turned[:3])}"
                )
                print(f"error: {path} is refused: with it {named}", file=sys.stderr)
                refused += 1
                continue
            additions.append(addition)
            before[path] = score
            current = tried
        if not additions:
            return 0, refused
        _take(model, additions, [path for path in before if path in against])
        told = _recalibrate(model, known, threshold)
        _tell(model, additions, before)
    size = " + ".join(str(len(bank.atoms)) for bank in model.model.banks)
    print(f"Added {sum(part.number for part in additions)} atoms: {size} now.")
    print(told)
    return len(additions), refused


def _known_defective(processor: "SgfrPostProcessor", files: Sequence[str]) -> list[str]:
    """Images that the checkpoint knows as defective and that are still there, but for those that
    are to be good.
    """
    return [
        path
        for path in processor.state.scores.defective.exclude(files).paths
        if Path(path).is_file()
    ]


def _take(model: "Sgfr", additions: Sequence["NewAtoms"], forced: list[str]) -> None:
    """Add atoms, with a record that takes them back."""
    from anomalib_sgfr.training.accept import Acceptance, AcceptanceHistory

    processor = post_processor_of(model)
    record = model.accepted or AcceptanceHistory.begun(model.model)
    step = Acceptance(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        additions=[_with_thumbnails(model, addition) for addition in additions],
        state={name: value.clone() for name, value in processor.state_dict().items()},
        config=processor.checkpoint_config(),
        forced=forced,
    )
    record = record._replace(steps=(*record.steps, step))
    model.model.load_state_dict(record.applied(model.model).state_dict())
    model.accepted = record


def _tell(model: "Sgfr", additions: Sequence["NewAtoms"], before: dict[str, float]) -> None:
    """Print what became of each image, by the banks and the threshold that are written."""
    from anomalib_sgfr.images.pre_processor import read_prepared

    threshold = post_processor_of(model).label_threshold
    for addition in additions:
        image = read_prepared(addition.image, model.pre_processor, model.model.bit_depth)
        now = _score(model.model, model.model.embed(image[None]), image.shape[-2:])
        still = "" if now <= threshold else f", still an alarm at the threshold of {threshold:.4g}"
        was = before[addition.image]
        print(
            f"{addition.image}: {addition.number} new atoms, raw score {was:.4g} before, {now:.4g}"
            f" now{still}"
        )


def _with_thumbnails(model: "Sgfr", addition: "NewAtoms") -> "NewAtoms":
    """With pictures of the new atoms, where the banks keep such."""
    from anomalib_sgfr.report.crops import thumbnails
    from anomalib_sgfr.training.accept import add_atoms

    if not any(bank.thumbnails.numel() for bank in model.model.banks):
        return addition
    earlier = model.model.fitted_state
    pictures = thumbnails(
        model.model.with_banks(add_atoms(earlier, [addition])), model.pre_processor, earlier
    )
    new = [
        part[len(state.clusters.atoms) :]
        for part, state in zip(pictures, earlier.states, strict=True)
    ]
    return addition._replace(thumbnails=new)


def _recalibrate(model: "Sgfr", known: _Known, before: float) -> str:
    """Choose the threshold anew from its calibration scores, made again by the banks as they are
    now; tells of it.
    """
    from anomalib_sgfr.post_processing.calibration import rescore

    processor = post_processor_of(model)
    earlier = processor.state
    told = f"Threshold {earlier.image:.6g}"
    if earlier.by in {"hand", "unknown"}:
        return f"{told}, as it was: it is {earlier.basis}."
    scores = rescore(earlier.scores, model.model, model.pre_processor, earlier.group)
    processor.use(earlier._replace(scores=scores).calibrated())
    turned = known.turned(None, model.model, before, processor.label_threshold)
    if turned:
        processor.use(earlier)
        return (
            f"{told}, as it was: with a new one {len(turned)} known defects would be called good."
        )
    return f"{told} before, {processor.state.image:.6g} now, calibrated on {processor.basis}."
