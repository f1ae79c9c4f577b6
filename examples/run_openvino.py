"""Run an exported model over a folder of images, or one: needs openvino, numpy and Pillow, no PyTorch.

    python run_openvino.py model.xml IMAGES --out DIR

Writes a heatmap beside each image's name under DIR, and ``scores.csv``: file, score, label. Scores and maps are as the
model gives them, with its threshold at 0.5. A file that cannot be read is named and skipped, and the exit code is 1.
What lies under DIR is no image of yours. Grey pictures of 16 bits are read at the depth that the model was fitted with.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import openvino as ov
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF


def read(path: Path, size: tuple[int, int] | None, bit_depth: int) -> np.ndarray:
    """Image as ``(1, 3, H, W)``, ``float32`` between 0 and 1; resized only where the model takes but one size."""
    with Image.open(path) as opened:
        image = opened.convert("RGB") if is_plain(opened) else grey(opened, bit_depth)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    values = np.asarray(image, np.float32)
    values = np.stack([values] * 3, -1) if values.ndim == 2 else values / 255.0  # noqa: PLR2004
    return values.transpose(2, 0, 1)[None]


def is_plain(opened: Image.Image) -> bool:
    """Whether there are no more than 8 bits, of which Pillow would drop some or clip."""
    how = opened.tile[0][3]  # type: ignore[attr-defined]
    scaled = opened.format == "PPM" and isinstance(how, tuple) and how[-1] > 255  # noqa: PLR2004
    deep = max(getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8 or ";16" in str(how)  # noqa: PLR2004
    return not (scaled or deep or opened.mode[0] in "IF")


def grey(opened: Image.Image, bit_depth: int) -> Image.Image:
    """A grey picture of more than 8 bits, between 0 and 1.

    Raises:
        ValueError: If it is another kind of picture, or holds larger values than the camera gives.
    """
    tags = getattr(opened, "tag_v2", {})
    if opened.format == "PPM" and opened.mode == "I":
        bits = bit_depth if opened.tile[0][0] == "raw" else 16  # type: ignore[attr-defined]  # to which Pillow scales
    elif opened.mode.startswith("I;16") and tags.get(PHOTOMETRIC, 1) == tags.get(ORIENTATION, 1) == 1:
        said = max(tags.get(BITS_PER_SAMPLE, (16,)))
        bits = said if said < 16 else bit_depth  # noqa: PLR2004
    else:
        msg = "of pictures with more than 8 bits, grey PNG, TIFF and PGM of up to 16 are read here: save it as such"
        raise ValueError(msg)
    values, white = np.asarray(opened).astype(np.float32), (1 << bits) - 1
    if values.max() > white:
        msg = f"it holds values up to {values.max():.0f}, more than the {bits} bits that the model was fitted with"
        raise ValueError(msg)
    return Image.fromarray(values / white)


def colours(values: np.ndarray) -> np.ndarray:
    """Blue, green, yellow, red for 0 to 1, shape ``(..., 3)``, ``uint8``."""
    stops = np.array([[0, 0, 96], [0, 128, 255], [64, 224, 160], [255, 224, 32], [224, 0, 0]], float)
    place = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(values, place, stops[:, channel]) for channel in range(3)], -1).astype(np.uint8)


def heatmap(image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Image, map over the image, and the outline of what exceeds the threshold, side by side."""
    height, width = anomaly_map.shape
    original = Image.fromarray((image[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)).resize((width, height))
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


def images_in(place: Path, out: Path) -> list[Path]:
    """Images in a folder and those below, but for what lies under ``out``; or the one file."""
    if place.is_file():
        return [place]
    own = out.resolve()
    found = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if own not in path.resolve().parents)


def load(file: Path, device: str, precision: str) -> tuple[ov.CompiledModel, int]:
    """The model, and the bits a value of the pictures it was fitted with; ends where there is none."""
    if not file.is_file():
        end(f"{file}: no such file; `anomalib export --export_type openvino` makes one")
    if file.suffix == ".xml" and not file.with_suffix(".bin").is_file():
        end(f"{file.with_suffix('.bin')}: no such file; it belongs to {file.name}, copy both")
    core = ov.Core()
    try:
        if file.suffix == ".xml" and b"<net" not in file.read_bytes()[:4096]:  # OpenVINO would try it as other kinds
            raise RuntimeError  # noqa: TRY301
        network = core.read_model(file)
    except RuntimeError:
        end(f"{file}: not a model that OpenVINO can read; it takes .xml and .onnx")
    missing = {"anomaly_map", "pred_score", "pred_label"} - {
        name for port in network.outputs for name in port.get_names()
    }
    if missing:
        end(f"{file}: not an exported model with a threshold, it has no {' and no '.join(sorted(missing))}")
    told = ["framework", "sgfr"]
    about = json.loads(network.get_rt_info(told).astype(str)) if network.has_rt_info(told) else {}
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": precision}
    try:
        return core.compile_model(network, device, hints), about.get("bit_depth", 8)
    except RuntimeError:
        end(f"--device {device} with --precision {precision}: not here; there is {', '.join(core.available_devices)}")


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
        "--precision", choices=("f32", "f16", "bf16"), default="f32", help="less is not what was fitted"
    )
    options = parser.parse_args(arguments)
    if not options.images.exists():
        end(f"{options.images}: no such file or folder")
    if options.out.exists() and not options.out.is_dir():
        end(f"--out {options.out}: is a file, and has to be a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = asked(arguments)
    folder = options.images.parent if options.images.is_file() else options.images
    paths = images_in(options.images, options.out)
    if not paths:
        end(
            f"{options.images}: no images in it ({', '.join(sorted(SUFFIXES))}) but what lies under --out {options.out}"
        )
    model, bit_depth = load(options.model, options.device, options.precision)
    names = {name: number for number, output in enumerate(model.outputs) for name in output.get_names()}
    height, width = model.input(0).partial_shape[2], model.input(0).partial_shape[3]
    size = (height.get_length(), width.get_length()) if height.is_static and width.is_static else None
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[Path, tuple[float, bool]] = {}
    failed: list[Path] = []

    def finish(request: ov.InferRequest, job: tuple[Path, np.ndarray]) -> None:
        path, image = job
        found = {name: request.get_output_tensor(number).data.copy() for name, number in names.items()}
        rows[path] = (float(found["pred_score"].ravel()[0]), bool(found["pred_label"].ravel()[0]))
        target = options.out / path.relative_to(folder).with_suffix(path.suffix + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask = found["pred_mask"].reshape(found["anomaly_map"].shape[-2:]) if "pred_mask" in found else None
        heatmap(image, found["anomaly_map"].reshape(found["anomaly_map"].shape[-2:]), mask).save(target)

    queue = ov.AsyncInferQueue(model)
    queue.set_callback(finish)
    start = time.perf_counter()
    for path in paths:
        try:
            image = read(path, size, bit_depth)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{path}: cannot be read: {error}", file=sys.stderr)
            failed.append(path)
            continue
        queue.start_async({0: image}, (path, image))
    queue.wait_all()
    seconds = time.perf_counter() - start

    table = options.out / "scores.csv"
    whole = table.with_suffix(".part")
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "score", "anomalous"])
        writer.writerows([path, f"{rows[path][0]:.6f}", rows[path][1]] for path in paths if path in rows)
    whole.replace(table)
    print(f"{len(rows)} images in {seconds:.1f} s, {len(rows) / seconds:.1f} a second, reading and drawing included.")
    print(f"{sum(label for _, label in rows.values())} are anomalous. Scores: {table}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
