"""Run an exported model over a folder of images: needs openvino, numpy and Pillow, no PyTorch.

    python run_openvino.py model.xml FOLDER --out DIR

Writes a heatmap beside each image's name under DIR, and ``scores.csv``: file, score, label. Scores and maps are as the
model gives them, with its threshold at 0.5. A file that cannot be read is named and skipped, and the exit code is 1.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Image as ``(1, 3, H, W)``, ``float32`` between 0 and 1; resized only where the model takes but one size."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255.0


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="exported model: .xml or .onnx")
    parser.add_argument("folder", type=Path, help="images, in any depth")
    parser.add_argument("--out", type=Path, default=Path("heatmaps"))
    parser.add_argument("--device", default="CPU")
    options = parser.parse_args(arguments)
    if not options.model.is_file():
        parser.error(f"{options.model}: no such file; `anomalib export --export_type openvino` makes one")
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{options.folder}: no images in it ({', '.join(sorted(SUFFIXES))})")

    model = ov.Core().compile_model(options.model, options.device, {"PERFORMANCE_HINT": "THROUGHPUT"})
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
        target = options.out / path.relative_to(options.folder).with_suffix(path.suffix + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        mask = found["pred_mask"].reshape(found["anomaly_map"].shape[-2:]) if "pred_mask" in found else None
        heatmap(image, found["anomaly_map"].reshape(found["anomaly_map"].shape[-2:]), mask).save(target)

    queue = ov.AsyncInferQueue(model)
    queue.set_callback(finish)
    start = time.perf_counter()
    for path in paths:
        try:
            image = read(path, size)
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
