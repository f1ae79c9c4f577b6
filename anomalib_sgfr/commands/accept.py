"""``anomalib-sgfr accept``: learn that images are good which were called anomalous, or take that back."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib_sgfr.commands.inputs import Parser, existing, images_in, load, new_file, post_processor_of, quiet, rewrite

if TYPE_CHECKING:
    from anomalib_sgfr.fitting.accepting import Addition, Record
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["main"]

_SUFFIX = "_accepted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Accept, take back, or show; returns the exit code, 1 if an image was refused."""
    parser = Parser(prog="anomalib-sgfr accept", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument(
        "images", nargs="*", type=existing, help="good images, or folders of such; none: show the record"
    )
    parser.add_argument("--bad", type=existing, help="folder of defective images, none of which may turn good")
    parser.add_argument("--undo", action="store_true", help="take back what was accepted last")
    parser.add_argument("--out", type=new_file, help=f"new checkpoint (default: beside the old, named CKPT{_SUFFIX})")
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
        files = list(dict.fromkeys(str(file) for path in options.images for file in images_in(path)))
        bad = [str(path) for path in images_in(options.bad)] if options.bad else []
        added, refused = _accept(model, files, bad)
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


def _told(record: "Record | None") -> str:
    if record is None:
        return "No image was accepted."
    lines = []
    for number, step in enumerate(record.steps, 1):
        atoms = sum(part.number for part in step.additions)
        lines.append(f"{number}. {step.time}: {len(step.additions)} images, {atoms} atoms")
        lines += [f"   {part.image}: {part.number} atoms" for part in step.additions]
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
        f"threshold {float(processor.image_threshold):.6g}."
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
    return float(model.score(embedding, size, banks).pred_score)  # type: ignore[arg-type]


def _known(model: "Sgfr", paths: list[str]) -> _Known:
    from anomalib_sgfr.features.pre_processing import read_prepared

    images = [read_prepared(path, model.pre_processor, model.model.bit_depth)[None] for path in paths]
    embeddings = [model.model.embed(image) for image in images]
    sizes = [image.shape[-2:] for image in images]
    scores = [_score(model.model, part, size) for part, size in zip(embeddings, sizes, strict=True)]
    return _Known(paths, embeddings, sizes, scores)


def _accept(model: "Sgfr", files: list[str], bad: list[str]) -> tuple[int, int]:
    """Accept what can be, and tell of each; returns how many images were added, and refused."""
    import torch

    from anomalib_sgfr.features.pre_processing import read_prepared
    from anomalib_sgfr.fitting.accepting import Record, Step, added, novel

    processor = post_processor_of(model)
    if not processor.is_set:
        msg = "the checkpoint has no threshold, so nothing was called anomalous: `anomalib-sgfr threshold` sets one."
        raise ValueError(msg)
    threshold, peak = processor.label_threshold, processor.peak_threshold
    model.eval()
    additions: list[Addition] = []
    refused = 0
    with torch.no_grad():
        known = _known(model, bad)
        current = model.model
        for path in files:
            image = read_prepared(path, model.pre_processor, model.model.bit_depth)
            before = _score(current, current.embed(image[None]), image.shape[-2:])
            addition = novel(current, image, path, threshold, peak)
            if addition is None:
                print(f"{path}: is no alarm (raw score {before:.4g}, threshold {threshold:.4g}): nothing to add")
                continue
            tried = model.model.refitted(added(model.model.learnt, [*additions, addition]))
            turned = known.turned(tried.banks, tried, threshold, threshold)
            if turned:
                named = f"{len(turned)} of {len(bad)} known defects would be called good: {', '.join(turned[:3])}"
                print(f"error: {path} is refused: with it {named}", file=sys.stderr)
                refused += 1
                continue
            additions.append(addition)
            current = tried
            after = _score(current, current.embed(image[None]), image.shape[-2:])
            still = "" if after <= threshold else ", still an alarm"
            print(f"{path}: {addition.number} new atoms, raw score {before:.4g} before, {after:.4g} now{still}")
        if not additions:
            return 0, refused
        record = model.accepted or Record.begun(model.model)
        additions = [_with_thumbnails(model, addition) for addition in additions]
        time = datetime.now(UTC).isoformat(timespec="seconds")
        state = {name: value.clone() for name, value in processor.state_dict().items()}
        step = Step(time, additions, state, processor.checkpoint_config())
        record = record._replace(steps=(*record.steps, step))
        model.model.load_state_dict(record.applied(model.model).state_dict())
        model.accepted = record
        _recalibrate(model, known, threshold)
    size = " + ".join(str(len(bank.atoms)) for bank in model.model.banks)
    print(f"Added {sum(part.number for part in additions)} atoms: {size} now.")
    return len(additions), refused


def _with_thumbnails(model: "Sgfr", addition: "Addition") -> "Addition":
    """With pictures of the new atoms, where the banks keep such."""
    from anomalib_sgfr.fitting.accepting import added
    from anomalib_sgfr.inspection.gallery import thumbnails

    if not any(bank.thumbnails.numel() for bank in model.model.banks):
        return addition
    earlier = model.model.learnt
    pictures = thumbnails(model.model.refitted(added(earlier, [addition])), model.pre_processor, earlier)
    new = [part[len(state.cover.atoms) :] for part, state in zip(pictures, earlier.states, strict=True)]
    return addition._replace(thumbnails=new)


def _recalibrate(model: "Sgfr", known: _Known, before: float) -> None:
    """Choose the threshold anew from what it rested on, scored by the banks as they are now."""
    from anomalib_sgfr.inspection.calibration import rescored

    processor = post_processor_of(model)
    earlier = processor.evidence, {name: value.clone() for name, value in processor.state_dict().items()}
    told = f"Threshold {float(processor.image_threshold):.6g}"
    if processor.value is not None or not processor.evidence.scores:
        print(f"{told}, as it was: it rests on {processor.basis}.")
        return
    pixel = processor.pixel_by_defects
    processor.evidence = rescored(processor.evidence, model.model, model.pre_processor, processor.group)
    processor.choose(pixel)
    now = processor.label_threshold
    turned = known.turned(None, model.model, before, now)
    if turned:
        processor.evidence = earlier[0]
        processor.load_state_dict(earlier[1])
        print(f"{told}, as it was: with a new one {len(turned)} known defects would be called good.")
        return
    print(f"{told} before, {float(processor.image_threshold):.6g} now; it rests on {processor.basis}.")
