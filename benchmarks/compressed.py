"""Exported files in fewer bits: false alarms and misses beside those of 32 bits.

    python -m benchmarks.compressed --root DIR --out DIR

Each model is fitted with its defaults, so that good images alone choose the threshold, and exported
to OpenVINO for images of any size: in 32 bits, and in each compression that ``anomalib export``
offers for it. The files alone score the test images, as OpenVINO computes them by itself on this
processor, and one image is timed with all of them in turn. Writes ``compressed.json`` and
``README.md``; an interrupted command, given again, goes on where it stopped.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino
from anomalib.deploy import CompressionType, ExportType
from PIL import Image

from anomalib_sgfr.console import quiet_engine
from benchmarks.common import data
from benchmarks.common.cases import Case, alike, median, run_cases, seeds, title
from benchmarks.common.engine import fitted, silence
from benchmarks.common.records import read_rows, table, write_text
from benchmarks.edge.cases import F32
from benchmarks.edge.export import move, write_reference

__all__ = ["main", "report"]

_DATA = ("mtd:canonical", "mvtec:grid", "kolektor")
_RUNS = 40
_COMPRESSIONS = {
    "f32": None,
    **{
        item.name: item
        for item in (CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ)
    },
}
_METRICS = ("image_AUROC", "pixel_AP", "AUPRO")
_COUNTS = ("false_alarms", "good", "misses", "defective", "labels_changed")
_COLUMNS = ["data set", "file", "false alarms", "misses", "labels changed"]
_COLUMNS += ["image AUROC", "pixel AP", "AUPRO", "MiB", "time"]


def _evaluate(case: Case) -> list[dict[str, Any]]:
    """Errors, accuracy, size and time of each file."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        module = data.build(case.dataset, case.root, case.split, case.seed)
        model = fitted(module, case.seed)
        write_reference(model, module, folder)
        files = {}
        for name, compression in _COMPRESSIONS.items():
            exported = quiet_engine(scratch).export(
                model,
                ExportType.OPENVINO,
                scratch,
                compression_type=compression,
                datamodule=module if compression is CompressionType.INT8_PTQ else None,
            )
            files[name] = folder / f"{name}.xml"
            move(exported, files[name])
        ways = {"f32": (files["f32"], F32), "default": (files["f32"], {})}
        if (
            openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
            == "bf16"
        ):
            ways["bf16"] = (_unmarked(files["f32"]), {})
        ways |= {name: (files[name], {}) for name in list(_COMPRESSIONS)[1:]}
        with Image.open(module.test_data.samples.image_path[0]) as opened:
            size = opened.size[::-1]
        models = {name: str(file) for name, (file, _) in ways.items()}
        configs = {name: config for name, (_, config) in ways.items()}
        times = _run(
            "latency",
            {"models": models, "configs": configs, "config": {}, "runs": _RUNS, "size": size},
        )
        rows = []
        for name, (file, config) in ways.items():
            job = {
                "model": str(file),
                "reference": str(folder / "reference.npz"),
                "config": config,
                "size": None,
            }
            found = _run("answers", job)
            rows.append({
                "file": name,
                **{metric: found.get(metric) for metric in _METRICS},
                **{count: found[count] for count in _COUNTS},
                "bytes": file.stat().st_size + file.with_suffix(".bin").stat().st_size,
                "ms": times[name]["median_ms"],
            })  # fmt: skip
    return rows


def _unmarked(file: Path) -> Path:
    """Copy of a file that leaves the precision to OpenVINO, as an ONNX file does."""
    target = file.with_name("bf16.xml")
    text = file.read_text(encoding="utf-8")
    target.write_text(
        re.sub(r'<attribute name="(precise|DisablePrecisionConversion)"[^>]*>', "", text),
        encoding="utf-8",
    )
    shutil.copyfile(file.with_suffix(".bin"), target.with_suffix(".bin"))
    return target


def _run(step: str, job: dict[str, Any]) -> dict[str, Any]:
    """One step in a process without PyTorch."""
    command = [sys.executable, "-m", "benchmarks.edge.run", step, json.dumps(job)]
    finished = subprocess.run(  # noqa: S603
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    silence()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return run_cases("compressed", __doc__, _DATA, _evaluate, report, arguments)


def report(folder: Path) -> None:
    """Write ``README.md`` from ``compressed.json``."""
    found = read_rows(folder / "compressed.json")
    lines = []
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in found):
        own = alike(found, dataset=dataset, split=split)
        plain = alike(own, file="f32")
        for file in dict.fromkeys(row["file"] for row in own):
            rows = alike(own, file=file)
            images = sum(row["good"] + row["defective"] for row in rows)
            lines.append([
                title(dataset, split),
                file,
                _count(rows, plain, "false_alarms", "good"),
                _count(rows, plain, "misses", "defective"),
                f"{sum(row['labels_changed'] for row in rows)} of {images}",
                *(_accuracy(rows, plain, metric) for metric in _METRICS),
                f"{median(rows, 'bytes') / 2**20:.1f}",
                f"{median(rows, 'ms') / median(plain, 'ms'):.2f}",
            ])  # fmt: skip
    write_text(
        folder / "README.md",
        f"""\
# Fewer bits

`python -m benchmarks.compressed`: files for images of any size, run by OpenVINO on a CPU. Good
training images alone chose the threshold (1% false alarms). False alarms and misses are counts at
the file's own threshold; in brackets the difference from 32 bits, in percentage points of the good
or defective images. Labels changed are those that differ from the Engine's. Accuracy is in percent,
with the difference from 32 bits. Time is of one image, as a ratio to 32 bits, all files in turn in
one process, beside other work. Seeds {seeds(found)}: counts are sums, all else medians.

- `f32`: the exported file, with `INFERENCE_PRECISION_HINT: f32`.
- `default`: the same file as OpenVINO computes it by itself, on a processor that has bfloat16.
- `bf16`: the same file without the mark that keeps its operations in 32 bits, in bfloat16: what
  OpenVINO makes of the exported ONNX file by itself.
- `FP16`, `INT8`, `INT8_PTQ`: exported with that compression, as OpenVINO computes it by itself.

{table(_COLUMNS, lines)}
""",
    )


def _count(rows: list[dict[str, Any]], plain: list[dict[str, Any]], name: str, of: str) -> str:
    number, before, images = (
        sum(row[key] for row in part) for part, key in ((rows, name), (plain, name), (rows, of))
    )
    text = f"{number} of {images}, {100 * number / images:.1f}%"
    return text if rows == plain else f"{text} ({100 * (number - before) / images:+.1f})"


def _accuracy(rows: list[dict[str, Any]], plain: list[dict[str, Any]], metric: str) -> str:
    if any(row[metric] is None for row in rows):
        return "-"
    own, before = (100 * median(part, metric) for part in (rows, plain))
    return f"{own:.2f}" if rows == plain else f"{own:.2f} ({own - before:+.2f})"


if __name__ == "__main__":
    sys.exit(main())
