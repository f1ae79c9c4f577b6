"""What eight bits cost and save: exported files against the one in 32 bits, on all data sets.

    python -m benchmarks.compressed --root DIR --out DIR

Each model is fitted with its defaults and exported to OpenVINO in 32 bits and in each compression that
``anomalib export`` offers for it; the test images are scored by the files alone, and one image is timed with each in
turn. Writes ``compressed.json`` and ``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.deploy import CompressionType, ExportType

from anomalib_sgfr import NominalPostProcessor
from benchmarks.common import data
from benchmarks.common.engine import fitted, quiet_engine, silence
from benchmarks.common.places import DATA, Place, alike, median, seeds, study_places, title
from benchmarks.common.records import write_text
from benchmarks.edge.cases import F32
from benchmarks.edge.export import move, write_reference

__all__ = ["main", "report"]

_SIZE = (256, 256)
_RUNS = 60
_COMPRESSIONS = {"f32": None, **{item.name: item for item in (CompressionType.INT8, CompressionType.INT8_PTQ)}}
_METRICS = ("image_AUROC", "pixel_AP", "AUPRO")


def _evaluate(place: Place) -> list[dict[str, Any]]:
    """Accuracy, size and time of each file."""
    module = data.build(place.dataset, place.root, place.split, place.seed)
    model = fitted(module, place.seed, post_processor=NominalPostProcessor(0.05))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_reference(model, module, folder, _SIZE)
        files = {}
        for name, compression in _COMPRESSIONS.items():
            exported = quiet_engine(scratch).export(
                model,
                ExportType.OPENVINO,
                scratch,
                input_size=_SIZE,
                compression_type=compression,
                datamodule=module if compression is CompressionType.INT8_PTQ else None,
            )
            files[name] = folder / f"{name}.xml"
            move(exported, files[name])
        models = {name: str(file) for name, file in files.items()}
        times = {
            precision: _run("latency", {"models": models, "config": config, "runs": _RUNS, "size": _SIZE})
            for precision, config in (("f32", F32), ("default", {}))
        }
        rows = []
        for name, file in files.items():
            job = {"model": str(file), "reference": str(folder / "reference.npz"), "config": F32, "size": _SIZE}
            found = _run("answers", job)
            rows.append({
                "file": name,
                **{metric: found.get(metric) for metric in _METRICS},
                "labels_changed": found["labels_changed"],
                "images": found["images"],
                "bytes": file.stat().st_size + file.with_suffix(".bin").stat().st_size,
                **{f"{precision}_ms": part[name]["median_ms"] for precision, part in times.items()},
            })  # fmt: skip
    return rows


def _run(step: str, job: dict[str, Any]) -> dict[str, Any]:
    """One step in a process without PyTorch."""
    command = [sys.executable, "-m", "benchmarks.edge.run", step, json.dumps(job)]
    finished = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)  # noqa: S603
    measured: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    silence()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    about = (__doc__ or "").splitlines()[0]
    return study_places("compressed", about, DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``compressed.json``."""
    found = json.loads((folder / "compressed.json").read_text(encoding="utf-8"))
    lines = [
        "# Eight bits",
        "",
        f"`python -m benchmarks.compressed`: files of one input size, run by OpenVINO. Seeds {seeds(found)}. Accuracy",
        "in percent, and its difference from the file in 32 bits; medians over seeds. Times are of one image beside",
        "the file in 32 bits in the same process, with `INFERENCE_PRECISION_HINT: f32` and as OpenVINO chooses.",
        "",
        "| data set | file | image AUROC | pixel AP | AUPRO | labels changed | MiB | time, f32 | time, default |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in found):
        own = alike(found, dataset=dataset, split=split)
        for name in dict.fromkeys(row["file"] for row in own):
            cells = [_accuracy(own, name, metric) for metric in _METRICS]
            changed = sum(row["labels_changed"] for row in alike(own, file=name))
            images = sum(row["images"] for row in alike(own, file=name))
            cells += [f"{changed} of {images}", f"{median(own, 'bytes', file=name) / 2**20:.1f}"]
            for precision in ("f32_ms", "default_ms"):
                cells.append(f"{median(own, precision, file=name) / median(own, precision, file='f32'):.2f}")
            lines.append(f"| {title(dataset, split)} | {name} | " + " | ".join(cells) + " |")
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _accuracy(rows: list[dict[str, Any]], name: str, metric: str) -> str:
    if any(row[metric] is None for row in rows):
        return "-"
    own, plain = (100 * median(rows, metric, file=file) for file in (name, "f32"))
    return f"{own:.2f}" if name == "f32" else f"{own:.2f} ({own - plain:+.2f})"


if __name__ == "__main__":
    sys.exit(main())
