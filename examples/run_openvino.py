"""Run an exported model over images: needs openvino, numpy and Pillow, no PyTorch.

    python run_openvino.py model.xml IMAGES --out DIR

Writes a heatmap of each image under DIR, and ``scores.csv``: image, score, label (1 for anomalous),
and row and column of the peak in the image's pixels, if the model gives it. Scores and maps are
normalised: the threshold is 0.5. A file that cannot be read is named, and the exit code is 1.
Files of other formats are counted. Images under DIR are not read.

As everywhere in Sgfr, images are rotated as their EXIF orientation says, and the first of several
pages is read. Grey images of 16 bits are read at the bit depth that the model was fitted with, and
floats lie between 0 and 1.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import openvino as ov
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NOT_READ = {
    ".apng",
    ".avif",
    ".dib",
    ".dng",
    ".exr",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jxl",
    ".pbm",
}
NOT_READ |= {".pcx", ".pfm", ".pnm", ".raw", ".tga"}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF


class Row(NamedTuple):
    """A line of the table."""

    image: str
    score: float
    label: int
    row: int | None
    column: int | None


def read(path: Path, bit_depth: int) -> np.ndarray:
    """Image as ``(3, H, W)``, ``float32`` between 0 and 1.

    Raises:
        ValueError: If it is a kind of image that is not read right.
    """
    try:
        # from an open file, since Pillow misreads some turned TIFF files that it maps into memory
        # by their path
        with path.open("rb") as file, Image.open(file) as opened:
            values = values_of(opened, path, bit_depth)
    except UnidentifiedImageError:
        msg = (
            "it is no image that Pillow reads (nor floats in colour or of 64 bits): save it as"
            " another"
        )
        raise ValueError(msg) from None
    return values.transpose(2, 0, 1)


def values_of(opened: Image.Image, path: Path, bit_depth: int) -> np.ndarray:
    """Opened image as RGB, ``(H, W, 3)``, between 0 and 1."""
    if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
        say(
            f"{path}: holds several pages or frames: the first is read, the others are not"
            " inspected"
        )
    return plain(opened) if is_plain(opened) else grey(opened, bit_depth)


def is_plain(opened: Image.Image) -> bool:
    """Whether there are no more than 8 bits, of which Pillow would drop some or clip."""
    tiles = getattr(opened, "tile", None)  # some decoders have none
    how = tiles[0][3] if tiles else None
    scaled = (
        opened.format == "PPM"
        and isinstance(how, tuple)
        and isinstance(how[-1], int)
        and how[-1] > 255  # noqa: PLR2004
    )
    deep = max(getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8 or ";16" in str(how)  # noqa: PLR2004
    return not (scaled or deep or opened.mode[0] in "IF")


def upright(opened: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says, if that can be read."""
    try:
        return ImageOps.exif_transpose(opened)
    except (SyntaxError, ValueError, TypeError, LookupError):
        return opened


def plain(opened: Image.Image) -> np.ndarray:
    """An image of 8 bits, ``(H, W, 3)``, between 0 and 1."""
    return np.asarray(upright(opened).convert("RGB"), np.float32) * np.float32(1.0 / 255.0)


def grey(opened: Image.Image, bit_depth: int) -> np.ndarray:
    """A grey image of more than 8 bits, ``(H, W, 3)``, between 0 and 1.

    Raises:
        ValueError: If it is another kind of image, or holds larger values than the camera gives.
    """
    tags = getattr(opened, "tag_v2", {})
    said = max(tags.get(BITS_PER_SAMPLE, (16,)))
    white = float((1 << bit_depth) - 1)
    if opened.mode == "F" and opened.format in {"TIFF", "PPM"}:
        white = 1.0
    elif (
        opened.format == "PPM" and opened.mode == "I"
    ):  # to 16 bits Pillow scales those that are of fewer
        white = white if opened.tile[0][0] == "raw" else 65535.0  # type: ignore[attr-defined]
    elif (
        opened.mode.startswith("I;16")
        and opened.format in {"PNG", "TIFF"}
        and tags.get(PHOTOMETRIC, 1) == 1
    ):
        white = white if said >= 16 else float((1 << said) - 1)  # noqa: PLR2004
    else:
        msg = (
            "of images with more than 8 bits, grey PNG, TIFF and PGM of up to 16 are read here:"
            " save it as such"
        )
        raise ValueError(msg)
    values = np.asarray(upright(opened)).astype(np.float32)
    lowest, highest = values.min(), values.max()
    # rounding may have added that
    if white == 1.0 and not (lowest >= 0.0 and highest <= 1.001):  # noqa: PLR2004
        msg = f"it holds floats from {lowest:.6g} to {highest:.6g}: those between 0 and 1 are read"
        raise ValueError(msg)
    if white > 1.0 and highest > white:
        bits = int(white).bit_length()
        msg = (
            f"it holds values up to {highest:.0f}, more than the {bits} bits that the model was"
            " fitted with"
        )
        raise ValueError(msg)
    return np.repeat((values / np.float32(white))[..., None], 3, -1)


def resized(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Of the one size that the model takes, if it takes but one."""
    if size is None or image.shape[1:] == size:
        return image
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in image]
    return np.stack(
        [np.asarray(channel.resize(size[::-1], Image.Resampling.BILINEAR)) for channel in channels]
    )


class Axis(NamedTuple):
    """Axis of the map: pixel ``i`` is centred at ``offset + (i + 0.5) * step`` of the image."""

    offset: float
    step: float
    length: int

    def resized(self, length: int) -> "Axis":
        """As many pixels as given, over the same part of the image."""
        return Axis(self.offset, self.step * self.length / length, length)

    def cut(self, before: int, length: int) -> "Axis":
        """From a pixel on, which may lie outside, and of another length."""
        return Axis(self.offset + before * self.step, self.step, length)

    def cropped(self, length: int) -> "Axis":
        """The middle, as torchvision rounds it."""
        more = self.length - length
        return self.cut(round(more / 2.0) if more >= 0 else -(-more // 2), length)

    def pixel(self, at: int, most: int) -> int:
        """The image's pixel, of ``most``, under the centre of one of the map's."""
        return min(max(math.floor(self.offset + (at + 0.5) * self.step), 0), most - 1)


def frame_transform(steps: Sequence[Sequence[Any]], size: Sequence[int]) -> tuple[Axis, Axis]:
    """Both axes of the map over an image of a size, by the model's transforms."""
    down, right = (Axis(0.0, 1.0, length) for length in size)
    for name, *numbers in steps:
        if name == "resize":
            down, right = down.resized(numbers[0]), right.resized(numbers[1])
        elif name == "shorter":
            (shorter, longest), (short, long) = numbers, sorted((down.length, right.length))
            both = (shorter, int(shorter * long / short))
            if longest is not None and both[1] > longest:
                both = (int(longest * shorter / both[1]), longest)
            new = both if down.length <= right.length else both[::-1]
            down, right = down.resized(new[0]), right.resized(new[1])
        elif name == "crop":
            down, right = down.cropped(numbers[0]), right.cropped(numbers[1])
        elif name == "pad":
            before, above, after, below = numbers
            down, right = (
                down.cut(-above, above + down.length + below),
                right.cut(-before, before + right.length + after),
            )
        elif name != "aspect":  # which resizes all of the image, to the shape of the map
            msg = f"the model does '{name}' to an image, which this program does not know"
            raise ValueError(msg)
    return down, right


def colours(values: np.ndarray) -> np.ndarray:
    """Blue, green, yellow, red for 0 to 1, shape ``(..., 3)``, ``uint8``."""
    stops = np.array(
        [[0, 0, 96], [0, 128, 255], [64, 224, 160], [255, 224, 32], [224, 0, 0]], float
    )
    place = np.linspace(0.0, 1.0, len(stops))
    return np.stack(
        [np.interp(values, place, stops[:, channel]) for channel in range(3)], -1
    ).astype(np.uint8)


def heatmap(
    image: np.ndarray, axes: Sequence[Axis], anomaly_map: np.ndarray, mask: np.ndarray | None
) -> Image.Image:
    """Inspected part of the image, the map over it, and the outline above the threshold."""
    height, width = anomaly_map.shape
    (top, bottom), (left, right) = (
        (round(axis.offset), round(axis.offset + axis.step * axis.length)) for axis in axes
    )
    whole = Image.fromarray((image.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8))
    original = whole.crop((left, top, right, bottom)).resize((width, height))
    overlay = Image.blend(original, Image.fromarray(colours(np.clip(anomaly_map, 0, 1))), 0.5)
    outlined = np.array(original)
    if mask is not None:
        inside = mask.astype(bool)
        inner = inside.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(inside, step, axis)
        outlined[inside & ~inner] = (255, 0, 0)
    row = Image.new("RGB", (3 * width, height))
    for number, part in enumerate((original, overlay, Image.fromarray(outlined))):
        row.paste(part, (number * width, 0))
    return row


def images_in(place: Path, out: Path) -> tuple[list[Path], Counter[str]]:
    """Images of a folder and those below it, without ``out``, or one file; and the others."""
    if place.is_file():
        return [place], Counter()
    own = out.resolve()
    found = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES | NOT_READ and path.is_file()
    )
    found = [path for path in found if own not in path.resolve().parents]
    return (
        [path for path in found if path.suffix.lower() in SUFFIXES],
        Counter(path.suffix.lower() for path in found if path.suffix.lower() in NOT_READ),
    )


class Model:
    """A compiled model, for any number of threads."""

    def __init__(
        self, compiled: ov.CompiledModel, about: dict[str, Any], score_map: int | None
    ) -> None:
        # the bindings set themselves up at the first use of an array, in which two threads at once
        # would wait for ever
        _ = ov.Tensor(np.zeros(1, np.float32)).data
        self.bit_depth = int(about.get("bit_depth", 8))
        self.warning = about.get("warning")  # that too few images support the threshold
        self._compiled = compiled
        self._score_map = score_map
        self._idle: deque[ov.InferRequest] = deque()
        outputs = list(compiled.outputs)[:score_map]
        self._outputs = {
            name: number for number, output in enumerate(outputs) for name in output.get_names()
        }
        height, width = compiled.input(0).partial_shape[2], compiled.input(0).partial_shape[3]
        self.size = (
            (height.get_length(), width.get_length())
            if height.is_static and width.is_static
            else None
        )
        self.steps: list[Any] | None = about.get("steps")
        if self.size is not None and self.steps is not None:
            self.steps = [("resize", *self.size), *self.steps]

    @property
    def threads(self) -> int:
        """As many as keep the device busy."""
        return int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """What is predicted of an image ``(3, H, W)``, by name; maps ``(h, w)``."""
        try:
            request = self._idle.pop()
        except IndexError:  # all are at work
            request = self._compiled.create_infer_request()
        try:
            values = list(request.infer({0: np.ascontiguousarray(image[None])}).values())
        finally:
            self._idle.append(request)
        found = {name: values[number] for name, number in self._outputs.items()}
        if self._score_map is not None:
            found["score_map"] = values[self._score_map]
        return {
            name: value.reshape(value.shape[-2:]) if value.ndim > 2 else value  # noqa: PLR2004
            for name, value in found.items()
        }


def score_map_of(network: ov.Model) -> Any:  # noqa: ANN401
    """What the score is the maximum of, in the graph; ``None`` if that is not found."""
    nodes, seen = deque([network.output("pred_score").get_node()]), set()
    while nodes:
        node = nodes.popleft()
        sources = [port.get_source_output() for port in node.inputs()]
        if node.get_type_name() == "ReduceMax":
            return sources[0] if len(sources[0].get_partial_shape()) == 4 else None  # noqa: PLR2004
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            nodes += [source.get_node() for source in sources]
    return None


def load(file: Path, device: str, precision: str) -> Model:
    """The model; ends where there is none."""
    if not file.is_file():
        end(f"{file}: no such file; `anomalib export --export_type openvino` makes one")
    if file.suffix == ".xml" and not file.with_suffix(".bin").is_file():
        end(f"{file.with_suffix('.bin')}: no such file; it belongs to {file.name}, copy both")
    core = ov.Core()
    try:
        if (
            file.suffix == ".xml" and b"<net" not in file.read_bytes()[:4096]
        ):  # OpenVINO would try it as other kinds
            raise RuntimeError  # noqa: TRY301
        network = core.read_model(file)
    except RuntimeError:
        end(f"{file}: not a model that OpenVINO can read; it takes .xml and .onnx")
    missing = {"anomaly_map", "pred_score", "pred_label"} - {
        name for port in network.outputs for name in port.get_names()
    }
    if missing:
        end(
            f"{file}: not an exported model with a threshold, it has no"
            f" {' and no '.join(sorted(missing))}"
        )
    places = [place for place in (["framework", "sgfr"], ["sgfr"]) if network.has_rt_info(place)]
    about = json.loads(network.get_rt_info(places[0]).astype(str)) if places else {}
    source = score_map_of(network)
    score_map = None if source is None else len(network.outputs)
    if source is not None:
        network.add_outputs([source])
    _, *shape = network.input(0).partial_shape
    network.reshape(ov.PartialShape([1, *shape]))  # images go in one by one, which saves time
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": precision}
    try:
        return Model(core.compile_model(network, device, hints), about, score_map)
    except RuntimeError:
        end(
            f"--device {device} with --precision {precision}: not here; there is"
            f" {', '.join(core.available_devices)}"
        )


def say(message: str) -> None:
    """Tell the user, whatever the console can show."""
    print(message, file=sys.stderr, flush=True)


def end(message: str) -> NoReturn:
    """Say what is wrong, in one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What to do; ends where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="exported model: .xml or .onnx")
    parser.add_argument("images", type=Path, help="a folder of images, or one")
    parser.add_argument("--out", type=Path, default=Path("heatmaps"), help="folder of the results")
    parser.add_argument("--device", type=str.upper, default="CPU")
    parser.add_argument(
        "--precision",
        choices=("f32", "f16", "bf16"),
        default="f32",
        help="less is not what was fitted",
    )
    options = parser.parse_args(arguments)
    if not options.images.exists():
        end(f"{options.images}: no such file or folder")
    if options.out.exists() and not options.out.is_dir():
        end(f"--out {options.out}: is a file, and has to be a folder")
    return options


def inspect(model: Model, path: Path, target: Path) -> Row:
    """Score an image, and draw its heatmap."""
    image = read(path, model.bit_depth)
    found = model(resized(image, model.size))
    axes = frame_transform(model.steps or [], image.shape[1:])
    row = column = None
    if model.steps is not None and "score_map" in found:
        shape = found["score_map"].shape
        place = np.unravel_index(found["score_map"].argmax(), shape)
        row, column = (
            axis.resized(length).pixel(int(at), most)
            for axis, at, length, most in zip(axes, place, shape, image.shape[1:], strict=True)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    heatmap(image, axes, found["anomaly_map"], found.get("pred_mask")).save(target)
    return Row(
        str(path),
        float(found["pred_score"].ravel()[0]),
        int(found["pred_label"].ravel()[0]),
        row,
        column,
    )


def write(rows: Sequence[Row], table: Path) -> None:
    """Write the table, whole or not at all."""
    part = table.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(
            [Row._fields, *((row[0], f"{row.score:.6f}", *row[2:]) for row in rows)]
        )
    part.replace(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a console of another alphabet shows what it can
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = asked(arguments)
    folder = options.images.parent if options.images.is_file() else options.images
    paths, others = images_in(options.images, options.out)
    left_out = (
        f"{others.total()} images are not read:"
        f" {', '.join(f'{n} {kind}' for kind, n in sorted(others.items()))}"
    )
    if not paths:
        also = f"; {left_out}" if others else ""
        end(
            f"{options.images}: no images in it ({', '.join(sorted(SUFFIXES))}) but what lies under"
            f" --out {options.out}{also}"
        )
    model = load(options.model, options.device, options.precision)
    if model.warning:
        print(f"warning: {model.warning}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    stopped = False
    start = time.perf_counter()
    with ThreadPoolExecutor(model.threads) as pool:
        targets = [
            options.out / path.relative_to(folder).with_suffix(path.suffix + ".png")
            for path in paths
        ]
        jobs = [
            pool.submit(inspect, model, path, target)
            for path, target in zip(paths, targets, strict=True)
        ]
        try:
            for path, job in zip(paths, jobs, strict=True):
                error = job.exception()
                if error is not None:  # whatever it is, it costs no other file
                    say(f"{path}: cannot be read: {error or type(error).__name__}")
        except KeyboardInterrupt:
            stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.perf_counter() - start
    done = [job for job in jobs if not job.cancelled()]
    rows = [job.result() for job in done if job.exception() is None]

    table = options.out / "scores.csv"
    write(rows, table)
    if others:
        say(left_out)
    print(
        f"{len(rows)} images in {seconds:.1f} s, {len(rows) / seconds:.1f} a second, reading and"
        " drawing included."
    )
    print(f"{sum(row.label for row in rows)} are anomalous. Scores: {table}")
    if stopped:
        say(f"interrupted: {len(paths) - len(done)} of {len(paths)} images were not read")
        return 130
    return int(len(rows) < len(done))


if __name__ == "__main__":
    sys.exit(main())
