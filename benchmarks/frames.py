"""One frame after the other: milliseconds, and memory over many frames of changing size.

    python -m benchmarks.frames --out DIR

A model of made images is used through :class:`~anomalib_sgfr.Inspector`, as a checkpoint and as
an OpenVINO file, each in a process of its own: at the default size for the time of a frame, at 64 x
64 pixels for ten thousand frames of ever new sizes. Writes ``frames.json`` and
``README.md``.
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
from PIL import Image

from anomalib_sgfr import Inspector
from benchmarks.common.cases import show_page
from benchmarks.common.memory import resident_mb
from benchmarks.common.records import read_rows, table, write_rows, write_text

__all__ = ["main", "report"]

_KINDS = ("checkpoint", "OpenVINO")
_TIMED = 60
_SIZES = (256, 64)  # for the time of a frame, and for many


def _files(folder: Path, size: int) -> dict[str, Path]:
    """A model of one size, as a checkpoint and as an OpenVINO file."""
    from anomalib.data import Folder  # what measures does without
    from anomalib.deploy import ExportType
    from anomalib.engine import Engine

    from benchmarks.common.engine import fitted

    rng = np.random.default_rng(0)
    (folder / "good").mkdir(parents=True, exist_ok=True)
    for number in range(16):
        pixels = rng.normal(128.0, 12.0, (96, 96, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "good" / f"{number}.png")
    module = Folder("frames", root=folder, normal_dir="good", normal_test_dir="good", num_workers=0)
    model = fitted(module, 0, image_size=(size, size))
    engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", devices=1)
    exported = engine.export(model, ExportType.OPENVINO, export_root=folder / str(size))
    checkpoint = folder / f"{size}.ckpt"
    model.trainer.save_checkpoint(checkpoint)
    return {"checkpoint": checkpoint, "OpenVINO": Path(str(exported))}


def _run(file: Path, frames: int, ever_new: bool) -> dict[str, Any]:
    """Inspect frames; give the memory in MiB after a tenth of them and at the end."""
    inspector = Inspector.load(file)
    rng = np.random.default_rng(1)
    seen: set[tuple[int, int]] = set()
    seconds, held = [], 0.0
    for number in range(frames):
        size = (256, 256)
        while ever_new and (size in seen or size == (256, 256)):
            size = (int(rng.integers(24, 400)), int(rng.integers(24, 400)))
        seen.add(size)
        frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        start = time.perf_counter()
        inspector(frame)
        seconds.append(time.perf_counter() - start)
        if number == frames // 10:
            held = resident_mb()
    return {
        "milliseconds": round(1000 * statistics.median(seconds), 2),
        "mib_after_a_tenth": round(held, 1),
        "mib_at_the_end": round(resident_mb(), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frames", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--frames", type=int, default=10_000, help="of ever new sizes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frames"))
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size, frames, ever_new in zip(
            _SIZES, (_TIMED, options.frames), (False, True), strict=True
        ):
            files = _files(Path(scratch), size)
            for kind in _KINDS:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(_run, (files[kind], frames, ever_new))
                rows.append(
                    {"kind": kind, "size": size, "frames": frames, "ever_new": ever_new, **found}
                )
                print(rows[-1], flush=True)
    write_rows(options.out / "frames.json", rows)
    return show_page(report, options.out)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``frames.json``."""
    rows = [
        [
            row["kind"],
            f"{row['size']} x {row['size']}",
            f"{row['frames']:,} of {'ever new sizes' if row['ever_new'] else '256 x 256'}",
            f"{row['milliseconds']:.1f}",
            f"{row['mib_after_a_tenth']:.0f}",
            f"{row['mib_at_the_end']:.0f}",
        ]
        for row in read_rows(folder / "frames.json")
    ]
    columns = ["model", "input", "frames", "ms a frame", "MiB after a tenth", "MiB at the end"]
    write_text(
        folder / "README.md",
        f"""\
# One frame after the other

`python -m benchmarks.frames`: medians of milliseconds a frame with `Inspector`, laying the map over
the frame included; memory of the process.

{table(columns, rows)}
""",
    )


if __name__ == "__main__":
    sys.exit(main())
