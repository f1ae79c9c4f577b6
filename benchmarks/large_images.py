"""Small defects in large images: resized, and whole by tiles.

    python -m benchmarks.large_images --out DIR

Images of 1,500 x 2,000 pixels are made: a brushed surface under uneven light, and in some a spot,
scratch or smudge of 6 to 20 pixels. Each way of looking at them is fitted and measured in a process
of its own. Writes ``large-images.json`` and ``README.md``; an interrupted command, given again,
goes on where it stopped.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from PIL import Image
from torch.nn import functional

from benchmarks.common.cases import show_page
from benchmarks.common.defects import draw_defect, surface
from benchmarks.common.engine import fitted
from benchmarks.common.memory import peak_mb, reset_peak, resident_mb
from benchmarks.common.records import read_rows, table, write_rows, write_text
from benchmarks.common.scores import accuracy, label_regions, pixel_scores

__all__ = ["main", "report"]

_SIZE = (1500, 2000)
_DEFECTS = (6, 10, 14, 20)
_TRAINED, _GOOD, _EACH = 8, 16, 8  # images to fit to, without a defect, and with one of each size
_POOLED = 4  # pixels of an image along each side of what pixel metrics count
_WAYS: dict[str, dict[str, Any]] = {
    "256 x 256": {"image_size": (256, 256)},
    "512 x 512": {"image_size": (512, 512)},
    "1024 x 1024": {"image_size": (1024, 1024)},
    "1500 x 2000, tiles of 256": {"image_size": _SIZE, "tile_size": 256},
}


def _make(folder: Path, seed: int) -> None:
    """Draw all images: those to fit to as files, the others as arrays."""
    rng = np.random.default_rng(seed)
    (folder / "good").mkdir()
    for number in range(_TRAINED):
        Image.fromarray((255 * surface(rng, _SIZE)).astype(np.uint8)).save(
            folder / "good" / f"{number}.png", compress_level=1
        )
    for number, defect in enumerate([0] * _GOOD + list(_DEFECTS) * _EACH):
        image, mask = torch.from_numpy(surface(rng, _SIZE)).expand(3, -1, -1), np.zeros(_SIZE, bool)
        if defect:
            image, mask = draw_defect(image, defect, rng)
        pixels = (255 * image[0]).to(torch.uint8).numpy()
        np.savez(folder / f"{number:03}.npz", pixels=pixels, mask=mask, defect=defect)


@torch.no_grad()
def _measure(way: str, folder: Path, seed: int) -> dict[str, Any]:
    """Fit, score all images, and what that took."""
    torch.set_num_threads(1)
    module = Folder(
        "large",
        root=folder,
        normal_dir="good",
        train_batch_size=1,
        num_workers=0,
        val_split_mode="none",
    )
    start = time.perf_counter()
    model = fitted(module, seed, post_processor=False, **_WAYS[way]).eval()
    fit_s = time.perf_counter() - start
    seconds, peaks, maps, masks, kinds = [], [], [], [], []
    for file in sorted(folder.glob("*.npz")):
        stored = np.load(file)
        pixels = torch.from_numpy(stored["pixels"]).float().div(255)
        image = pixels.expand(1, 3, -1, -1).contiguous()
        before = resident_mb()
        reset_peak()
        start = time.perf_counter()
        found: Any = model(image)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_mb() - before)
        whole = functional.interpolate(found.anomaly_map, _SIZE, mode="bilinear")
        maps.append(functional.max_pool2d(whole, _POOLED)[0, 0].numpy())
        mask = torch.from_numpy(stored["mask"])[None].float()
        masks.append(functional.max_pool2d(mask, _POOLED)[0].numpy() > 0)
        kinds.append(str(int(stored["defect"])) if stored["defect"] else "good")
    of_pixels = pixel_scores(np.stack(maps), label_regions(np.stack(masks)))
    scores = np.array([part.max() for part in maps])
    cost = {"image_s": statistics.median(seconds), "peak_mb": max(peaks), "fit_s": fit_s}
    return {"way": way, "seed": seed, **accuracy(scores, np.array(kinds), of_pixels), **cost}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large_images", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large-images"))
    options = parser.parse_args(arguments)
    results = options.out / "large-images.json"
    found = read_rows(results)
    left = [way for way in _WAYS if way not in {row["way"] for row in found}]
    with tempfile.TemporaryDirectory() as scratch:
        if left:
            _make(Path(scratch), options.seed)
        for way in left:
            print(way, flush=True)
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found.append(process.apply(_measure, (way, Path(scratch), options.seed)))
            write_rows(results, found)
    return show_page(report, options.out)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``large-images.json``."""
    found = read_rows(folder / "large-images.json")
    sizes = sorted(int(size) for size in found[0]["per_defect"])
    columns = ["the model sees", *(f"image AUROC, {size} px" for size in sizes), "all"]
    columns += ["pixel AP", "AUPRO", "s an image", "MiB", "s to fit"]
    rows = []
    for row in found:
        cells = [row["per_defect"][str(size)] for size in sizes]
        cells += [row["metrics"][name] for name in ("image_AUROC", "pixel_AP", "AUPRO")]
        costs = [f"{row['image_s']:.2f}", f"{row['peak_mb']:.0f}", f"{row['fit_s']:.0f}"]
        rows.append([row["way"], *(f"{100 * cell:.1f}" for cell in cells), *costs])
    write_text(
        folder / "README.md",
        f"""\
# Small defects in large images

`python -m benchmarks.large_images`: spots, scratches and smudges of 6 to 20 pixels, drawn into made
images of 1,500 x 2,000 pixels, a brushed surface under uneven light. Accuracy in percent; pixels
are counted by squares of 4 x 4. {_TRAINED} good images to fit to; {_GOOD} good ones and {_EACH} of
each size are scored. One thread; seconds are medians. Memory is what scoring an image adds at its
peak.

{table(columns, rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
