"""Agreement of every route from an image to an answer, for every way to make a checkpoint.

    python -m benchmarks.agreement --out DIR

A small model is fitted to drawn parts; ``threshold``, ``accept``, ``adapt``, an update and other
arguments make further checkpoints of it. Each is asked about the same images by every route there
is: the Engine, the command line, calls in Python, anomalib's inferencers, exported files in several
precisions, the report. Writes ``README.md``: for each route and way the largest difference of a
score from the Engine's, and how many labels differ.
"""

import csv
import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr import Inspector, Sgfr, SgfrPostProcessor
from anomalib_sgfr.cli.main import main as anomalib_sgfr
from benchmarks.common.records import write_text
from benchmarks.common.tracing import traced_once

__all__ = [
    "ROUTES",
    "SHAPES",
    "Answer",
    "Difference",
    "Way",
    "compare",
    "draw",
    "main",
    "make_ways",
    "way_of_shapes",
]

SIZE, RADIUS = 64, 8  # of images and their defects, in pixels
# sizes to which images of several aspect ratios are resized, so that a map has the image's pixels
SHAPES = ((128, 128), (160, 96), (96, 160))
# shallow layers: what is asked here does not depend on how well the model does
MODEL: dict[str, Any] = {
    "layers": ["blocks.0", "blocks.1"],
    "score_layers": ["blocks.1"],
    "bank_size": 100,
    "image_size": SIZE,
    "seed": 0,
}
_TEXT = """# One answer by every route

    python -m benchmarks.agreement --out DIR

A small model of drawn parts, and the checkpoints that commands, an update and other arguments
make of it (columns). Twelve images, from good to plainly defective. Each cell: the largest
difference of a normalised score from that of `Engine.predict`, and how many of the twelve labels
differ. A dash: the route takes no arguments beside the checkpoint.

{table}
"""
_SEVERAL = "images of several aspect ratios"
EXACT, ROUNDED = 2e-4, 3e-2  # differences of a score that 32 bits, and bfloat16, may make


class Answer(NamedTuple):
    """What a route says of an image; ``None`` for what it does not say.

    Attributes:
        score (float): Normalised score.
        label (bool): Whether the image is anomalous.
        map (NDArray | None): Normalised anomaly map, shape ``(H, W)`` of the image.
        mask (NDArray | None): Anomalous pixels, of the same shape.
    """

    score: float
    label: bool
    map: NDArray[Any] | None = None
    mask: NDArray[Any] | None = None


class Way(NamedTuple):
    """How a model is made.

    Attributes:
        checkpoint (Path): The file.
        asked (dict[str, Any]): Arguments of the post-processor that are given with it.
        size (int): Side of a square of as many pixels as the images have.
    """

    checkpoint: Path
    asked: dict[str, Any] = {}  # noqa: RUF012  # of a NamedTuple, never changed
    size: int = SIZE

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the model but its post-processor."""
        return {**MODEL, "image_size": self.size}

    def model(self) -> Sgfr:
        """A fresh model, to be given the checkpoint."""
        processor = SgfrPostProcessor(**self.asked)
        return Sgfr(**self.arguments, post_processor=processor, visualizer=False)

    def loaded(self) -> Sgfr:
        """The model, loaded as a user does."""
        asked = {"post_processor": SgfrPostProcessor(**self.asked)} if self.asked else {}
        return Sgfr.load_from_checkpoint(
            self.checkpoint, map_location="cpu", visualizer=False, **asked
        )

    @property
    def threshold(self) -> float:
        """Normalised score above which an image is labelled anomalous."""
        return 1.0 - float(self.asked.get("image_sensitivity", 0.5))


class Difference(NamedTuple):
    """Of a route from the Engine, over all images.

    Attributes:
        score (float): The largest of scores.
        map (float): The largest of maps; NaN if the route gives none.
        labels (int): Labels that differ.
        near (int): Those among them whose score lies within ``ROUNDED`` of the threshold.
        pixels (float): Share of pixels whose masks differ; NaN if the route gives none.
    """

    score: float
    map: float
    labels: int
    near: int
    pixels: float


def draw(root: Path, shapes: Sequence[tuple[int, int]] = ((SIZE, SIZE),)) -> Path:
    """Draw 12 ``good``, 3 ``odd`` (a mark), 6 ``dim`` and 6 ``asked/good`` and ``asked/bad``.

    Args:
        root (Path): Their folder.
        shapes (Sequence[tuple[int, int]]): Heights and widths that follow each other.
    """
    numbers = {"good": 12, "odd": 3, "dim": 6, "asked/good": 6, "asked/bad": 6}
    for kind, (name, number) in enumerate(numbers.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            rng = np.random.default_rng(100 * kind + index)
            height, width = shapes[index % len(shapes)]
            rows, columns = np.mgrid[:height, :width]
            waves = np.sin(rows / 5) * np.cos(columns / 5)
            image = 110 + 40 * waves + rng.normal(0, 6, (height, width))
            row, column = rng.integers(16, 48, 2)
            if name == "asked/bad":  # from faint to plain
                image[np.hypot(rows - row, columns - column) < RADIUS] += 20 + 20 * index
            elif name == "odd":
                image[row - 2 : row + 2, column - 6 : column + 6] = 150
            elif name == "dim":
                image = 0.7 * image + 10
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("RGB").save(
                root / name / f"{Path(name).name}{index}.png"
            )
    return root


def _module(root: Path, normal: str = "good") -> Any:  # noqa: ANN401
    from anomalib.data import Folder

    return Folder(
        "parts",
        root=root,
        normal_dir=normal,
        abnormal_dir="asked/bad",
        normal_test_dir="asked/good",
        val_split_mode="same_as_test",
        num_workers=0,
        train_batch_size=4,
        eval_batch_size=4,
        seed=0,
    )


def _engine(folder: Path, **arguments: Any) -> Any:  # noqa: ANN401
    from anomalib.engine import Engine

    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
    }
    return Engine(default_root_dir=folder, **quiet, **arguments)


def _run(*arguments: object) -> None:
    """Run a command of anomalib-sgfr.

    Raises:
        RuntimeError: If it fails.
    """
    given = list(map(str, arguments))
    with redirect_stdout(sys.stderr):
        code = anomalib_sgfr(given)
    if code:
        msg = f"anomalib-sgfr {' '.join(given)} ended with {code}."
        raise RuntimeError(msg)


def make_ways(parts: Path, folder: Path) -> dict[str, Way]:
    """Fit a model, and make of its checkpoint all others.

    Args:
        parts (Path): Images, as :func:`draw` draws them.
        folder (Path): Where checkpoints go.

    Returns:
        dict[str, Way]: By name.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def fitted(name: str, normal: str = "good", earlier: Path | None = None) -> Path:
        engine = _engine(folder / name)
        model = Sgfr(**MODEL, visualizer=False, update=earlier is not None)
        engine.fit(model, datamodule=_module(parts, normal), ckpt_path=earlier)
        return Path(engine.best_model_path)

    def made(name: str, command: str, *arguments: object, of: Path) -> Path:
        out = folder / f"{name}.ckpt"
        _run(command, of, *arguments, "--out", out)
        return out

    fit = fitted("fit")
    rate = made("rate", "threshold", "--false_alarm_rate", 0.2, of=fit)
    accepted = made("accepted", "accept", parts / "odd", of=rate)
    return {
        "fit": Way(fit),
        "threshold --false_alarm_rate": Way(rate),
        "threshold --score": Way(made("score", "threshold", "--score", 0.4, of=fit)),
        "accept": Way(accepted),
        "accept --undo": Way(made("undone", "accept", "--undo", of=accepted)),
        "adapt": Way(made("adapted", "adapt", parts / "dim", of=fit)),
        "update": Way(fitted("update", "dim", fit)),
        "reject": Way(made("rejected", "reject", parts / "asked/bad/bad0.png", "--yes", of=fit)),
        "false_alarm_rate asked for": Way(fit, {"false_alarm_rate": 0.2}),
        "image_sensitivity asked for": Way(fit, {"image_sensitivity": 0.7}),
    }


def way_of_shapes(parts: Path, folder: Path) -> Way:
    """Fit a model to images of several aspect ratios, each of which keeps its own.

    Args:
        parts (Path): Images, as :func:`draw` draws them with ``SHAPES``.
        folder (Path): Where the checkpoint goes.
    """
    size = SHAPES[0][0]
    engine = _engine(folder)
    model = Sgfr(**{**MODEL, "image_size": size}, visualizer=False)
    engine.fit(model, datamodule=_module(parts))
    return Way(Path(engine.best_model_path), size=size)


# Routes: from a way, a folder of images and a scratch folder to answers by file name


def _of(found: Any, index: int = 0) -> Answer:  # noqa: ANN401
    """Answer of an image of anomalib's batch."""

    def image(values: Any) -> NDArray[Any] | None:  # noqa: ANN401
        return None if values is None else np.squeeze(np.asarray(values[index]))

    score, label = (
        float(np.ravel(values)[index]) for values in (found.pred_score, found.pred_label)
    )
    return Answer(score, bool(label), image(found.anomaly_map), image(found.pred_mask))


def _files(images: Path) -> list[Path]:
    return sorted(path for path in images.rglob("*.png"))


def by_engine(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Engine.predict`` with ``ckpt_path``."""
    from anomalib.data import PredictDataset

    engine = _engine(scratch)
    batches = engine.predict(way.model(), dataset=PredictDataset(images), ckpt_path=way.checkpoint)
    return {
        Path(path).name: _of(batch, index)
        for batch in batches
        for index, path in enumerate(batch.image_path)
    }


def _options(way: Way) -> list[str]:
    """Arguments of the command line for a fresh model."""
    model = {**way.arguments, "visualizer": "false"}
    options = [
        f"--model.{name}={json.dumps(value) if isinstance(value, list) else value}"
        for name, value in model.items()
    ]
    if way.asked:
        options.append("--model.post_processor=anomalib_sgfr.SgfrPostProcessor")
        options += [f"--model.post_processor.{name}={value}" for name, value in way.asked.items()]
    return ["--model", "Sgfr", *options, "--ckpt_path", str(way.checkpoint)]


def _table(file: Path) -> dict[str, Answer]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {
        Path(row["image"]).name: Answer(float(row["score"]), bool(int(row["label"])))
        for row in rows
    }


def by_command(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``anomalib predict``, from its table of scores."""
    table = scratch / "scores.csv"
    told = ["--trainer.callbacks=anomalib_sgfr.ScoreTable", f"--trainer.callbacks.file={table}"]
    _run("predict", *_options(way), "--data", images, "--default_root_dir", scratch, *told)
    return _table(table)


def by_test(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Engine.test``: its table of scores, whose labels give the F1 score that it reports."""
    from anomalib_sgfr import ScoreTable

    file = scratch / "test.csv"
    engine = _engine(scratch, callbacks=[ScoreTable(file)])
    (figures,) = engine.test(
        way.model(), datamodule=_module(images.parent), ckpt_path=way.checkpoint
    )
    answers = _table(file)
    hits = sum(answer.label and name.startswith("bad") for name, answer in answers.items())
    positives = sum(answer.label + name.startswith("bad") for name, answer in answers.items())
    f1 = 2 * hits / positives
    if not math.isclose(f1, figures["image_F1Score"], abs_tol=1e-6):
        msg = f"the labels' F1 score is {f1}, the reported one {figures['image_F1Score']}."
        raise RuntimeError(msg)
    return answers


def by_call(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Sgfr.load_from_checkpoint(...)(frame)``."""
    del scratch
    model = way.loaded()
    return {path.name: _of(model(str(path))) for path in _files(images)}


def _inspected(file: Path, images: Path) -> dict[str, Answer]:
    inspector = Inspector.load(file)
    found = {path.name: inspector(path) for path in _files(images)}
    return {
        name: Answer(each.score, bool(each.label), each.map, each.mask)
        for name, each in found.items()
    }


def by_inspector(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Inspector.load(checkpoint)``."""
    del scratch
    return _inspected(way.checkpoint, images)


def exported(way: Way, kind: str, folder: Path, **arguments: Any) -> Path:  # noqa: ANN401
    """The file that ``Engine.export`` makes, once."""
    from anomalib.deploy import ExportType

    suffix = {"torch": ".pt", "onnx": ".onnx", "openvino": ".xml"}[kind]
    name = "-".join([kind, *map(str, arguments.values())])
    root = folder / "exported" / name
    file = next(root.rglob(f"*{suffix}"), None) if root.exists() else None
    if file is None:
        made = _engine(folder).export(
            way.model(), ExportType(kind), export_root=root, ckpt_path=way.checkpoint, **arguments
        )
        file = Path(made)
    return file


def by_torch_file(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Inspector.load("model.pt")``."""
    return _inspected(exported(way, "torch", scratch), images)


def by_torch_inferencer(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """Anomalib's ``TorchInferencer``."""
    from anomalib.deploy import TorchInferencer

    with patch.dict(os.environ, {"TRUST_REMOTE_CODE": "1"}):
        inferencer = TorchInferencer(exported(way, "torch", scratch), device="cpu")
    return {path.name: _of(inferencer.predict(path)) for path in _files(images)}


def by_openvino_file(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Inspector.load("model.xml")``, in 32 bits."""
    return _inspected(exported(way, "openvino", scratch), images)


def by_openvino_inferencer(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """Anomalib's ``OpenVINOInferencer``: in bfloat16 where the processor has it."""
    from anomalib.deploy import OpenVINOInferencer

    inferencer = OpenVINOInferencer(exported(way, "openvino", scratch), device="CPU")
    return {path.name: _of(inferencer.predict(path)) for path in _files(images)}


def by_half_file(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``Inspector.load`` of a file with 16-bit weights."""
    from anomalib.deploy import CompressionType

    return _inspected(
        exported(way, "openvino", scratch, compression_type=CompressionType.FP16), images
    )


def by_script(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``examples/run_openvino.py``, from its table of scores."""
    script = Path(__file__).parents[1] / "examples" / "run_openvino.py"
    out = scratch / "script"
    given = [str(script), str(exported(way, "openvino", scratch)), str(images), "--out", str(out)]
    with patch.object(sys, "argv", given), redirect_stdout(sys.stderr):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(str(ended)) from ended
    return _table(out / "scores.csv")


def by_onnx_runtime(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """ONNX Runtime, of the exported file as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        exported(way, "onnx", scratch), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    answers = {}
    for path in _files(images):
        frame = (
            np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255
        )
        found = dict(
            zip(names, session.run(None, {session.get_inputs()[0].name: frame}), strict=True)
        )
        score, label = (float(np.ravel(found[name])[0]) for name in ("pred_score", "pred_label"))
        answers[path.name] = Answer(
            score,
            bool(label),
            *(found[name].reshape(frame.shape[-2:]) for name in ("anomaly_map", "pred_mask")),
        )
    return answers


def by_report(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``anomalib-sgfr report``, from its figures."""
    figures = scratch / "report.json"
    given = [
        "--good",
        images / "good",
        "--bad",
        images / "bad",
        "--out",
        scratch / "report.html",
        "--json",
        figures,
    ]
    _run("report", way.checkpoint, *given)
    rows = json.loads(figures.read_text(encoding="utf-8"))["images"]
    return {Path(row["image"]).name: Answer(row["score"], bool(row["label"])) for row in rows}


def by_explain(way: Way, images: Path, scratch: Path) -> dict[str, Answer]:
    """``anomalib-sgfr explain``, from its table of scores."""
    _run(
        "explain",
        way.checkpoint,
        images,
        "--regions",
        1,
        "--only_anomalous",
        "--out",
        scratch / "explained",
    )
    return _table(scratch / "explained" / "scores.csv")


Route = Callable[[Way, Path, Path], dict[str, Answer]]
# whether it takes arguments beside the checkpoint, and how far scores may be from the Engine's
ROUTES: dict[str, tuple[Route, bool, float]] = {
    "`anomalib predict`": (by_command, True, EXACT),
    "`anomalib test`": (by_test, True, EXACT),
    "model called in Python": (by_call, True, EXACT),
    "Inspector, checkpoint": (by_inspector, False, EXACT),
    "`anomalib-sgfr report`": (by_report, False, EXACT),
    "`anomalib-sgfr explain`": (by_explain, False, EXACT),
    "Inspector, Torch file": (by_torch_file, True, EXACT),
    "TorchInferencer": (by_torch_inferencer, True, EXACT),
    "Inspector, OpenVINO file": (by_openvino_file, True, EXACT),
    "run_openvino.py": (by_script, True, EXACT),
    "ONNX Runtime": (by_onnx_runtime, True, EXACT),
    "OpenVINO file, 16-bit weights": (by_half_file, True, ROUNDED),
    "OpenVINOInferencer, OpenVINO's own precision": (by_openvino_inferencer, True, ROUNDED),
}


def compare(
    reference: Mapping[str, Answer], found: Mapping[str, Answer], threshold: float = 0.5
) -> Difference:
    """Of a route's answers from the Engine's.

    Args:
        reference (Mapping[str, Answer]): The Engine's.
        found (Mapping[str, Answer]): The route's, of the same images.
        threshold (float): Of normalised scores.

    Raises:
        ValueError: If they are of other images, or a map is of another shape.
    """
    if reference.keys() != found.keys():
        msg = f"answers are of other images: {sorted(reference.keys() ^ found.keys())}."
        raise ValueError(msg)
    pairs = [(reference[name], found[name]) for name in sorted(found)]
    changed = [ours for ours, theirs in pairs if ours.label != theirs.label]
    maps = [np.abs(ours.map - theirs.map).max() for ours, theirs in pairs if theirs.map is not None]
    masks = [
        np.mean(ours.mask != (theirs.mask > 0)) for ours, theirs in pairs if theirs.mask is not None
    ]
    return Difference(
        score=max(abs(ours.score - theirs.score) for ours, theirs in pairs),
        map=float(max(maps)) if maps else math.nan,
        labels=len(changed),
        near=sum(abs(answer.score - threshold) < ROUNDED for answer in changed),
        pixels=float(np.mean(masks)) if masks else math.nan,
    )


def differences(
    ways: Mapping[str, Way], images: Path, scratch: Path
) -> Iterator[tuple[str, str, Difference]]:
    """Ask every route about the images, for every way.

    Args:
        ways (Mapping[str, Way]): As :func:`make_ways` makes them.
        images (Path): Their folder.
        scratch (Path): Where files go.

    Yields:
        tuple[str, str, Difference]: Way, route, and how far it is from ``Engine.predict``.
    """
    for number, (name, way) in enumerate(ways.items()):
        folder = scratch / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        reference = by_engine(way, images, folder)
        for route, (ask, takes_arguments, _) in ROUTES.items():
            if takes_arguments or not way.asked:
                yield name, route, compare(reference, ask(way, images, folder), way.threshold)


def table(found: Mapping[tuple[str, str], Difference]) -> str:
    """Markdown: a line for each route, a column for each way."""
    ways = list(dict.fromkeys(way for way, _ in found))
    lines = ["| largest difference of a score; labels that differ | " + " | ".join(ways) + " |"]
    lines.append("|---" * (1 + len(ways)) + "|")
    for route in ROUTES:
        cells = []
        for way in ways:
            each = found.get((way, route))
            cells.append("-" if each is None else f"{each.score:.0e}; {each.labels}")
        lines.append(f"| {route} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask every route, and write the table."""
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, traced_once(Path(folder) / "traces"):
        parts, several = draw(Path(folder) / "parts"), draw(Path(folder) / "several", SHAPES)
        found = {}
        for of, ways in (
            (parts, make_ways(parts, Path(folder) / "made")),
            (several, {_SEVERAL: way_of_shapes(several, Path(folder) / "fitted")}),
        ):
            scratch = Path(folder) / f"{of.name} asked"
            for way, route, each in differences(ways, of / "asked", scratch):
                found[way, route] = each
                print(f"{way}, {route}: {each}", file=sys.stderr)
    write_text(options.out / "README.md", _TEXT.format(table=table(found)))
    print(options.out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
