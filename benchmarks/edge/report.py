"""The page of the edge benchmark: latency, size and answers from ``edge.json``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.figures import plt, save_figure
from benchmarks.common.records import write_text
from benchmarks.edge.cases import ANSWERS, CASES, LATENCIES, SEARCHED

__all__ = ["report"]


def report(folder: Path) -> None:
    """Write ``README.md`` and the plot from ``edge.json``."""
    found: dict[str, Any] = json.loads((folder / "edge.json").read_text(encoding="utf-8"))
    fine = {key: value for key, value in found.items() if "error" not in value}
    parts = ["# Sgfr at the edge", "`python -m benchmarks.edge --out DIR`, on two cores."]
    parts += [
        _latency_table(fine, folder),
        _throughput_table(fine),
        _size_table(fine),
        _large_table(fine),
    ]
    parts.append(_answers_table(fine))
    errors = [f"- {key}: {value['error']}" for key, value in found.items() if "error" in value]
    if errors:
        parts.append("## Failed\n\n" + "\n".join(errors))
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _latency_table(found: dict[str, Any], folder: Path) -> str:
    lines = [
        "## Latency",
        "",
        (
            "OpenVINO, one image of 256 px, whole model, and beside the bare backbone in the same"
            " process: medians,"
        ),
        (
            'and ratios of medians and of the least. Files take any number of images; for "one'
            ' image", each, the bare'
        ),
        (
            "backbone too, is reshaped to a batch of one before it is compiled, as `Inspector` does"
            " for single frames."
        ),
        "",
        f"| model | {' | '.join(f'{how}, ms | x bare | least x' for how in LATENCIES)} |",
        "|---" * (1 + 3 * len(LATENCIES)) + "|",
    ]
    names, bars = [], []
    for name in CASES:
        cells, shown = [], 0.0
        for how in LATENCIES:
            times = found.get(f"latency {how}", {})
            if name in times and "bare" in times:
                own, bare = times[name], times["bare"]
                shown = shown or own["median_ms"] / bare["median_ms"]
                cells += [f"{own['median_ms']:.2f}"]
                cells += [f"{own[value] / bare[value]:.2f}" for value in ("median_ms", "least_ms")]
            else:
                cells += ["-"] * 3
        if not shown:
            continue
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        names.append(name)
        bars.append(shown)
    lines += ["", *_bounds(found)]
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axis.barh(
        names[::-1],
        bars[::-1],
        color=["tab:red" if "sgfr" in name else "tab:grey" for name in names[::-1]],
    )
    axis.set(xlabel="latency, times that of the bare backbone (f32, medians)", xscale="log")
    axis.axvline(1.0, color="black", lw=0.8)
    save_figure(figure, folder / "latency.png")
    return "\n".join([*lines, "", "![latency](latency.png)"])


def _bounds(found: dict[str, Any]) -> list[str]:
    """What an exact search in f32 costs at least."""
    lines = [
        (
            "The product of all atoms with all patches of an image, and the least of each group of"
            " eight, alone: a model"
        ),
        (
            "whose search is exact and in f32 takes no less than that and the backbone. Medians of"
            " one process."
        ),
        "",
        "| model | atoms | GFLOP | product, ms | GFLOP/s | backbone, ms | no model below, x bare |",
        "|---|---|---|---|---|---|---|",
    ]
    times = found.get("products", {})
    for name, scales in SEARCHED.items():
        if name not in times:
            continue
        work = 2e-9 * sum(width * patches * atoms for width, patches, atoms in scales)
        product, bare = times[name]["median_ms"], times["bare"]["median_ms"]
        cells = [
            ", ".join(f"{atoms:,}" for *_, atoms in scales),
            f"{work:.2f}",
            f"{product:.2f}",
            f"{1e3 * work / product:.0f}",
            f"{bare:.2f}",
            f"{1 + product / bare:.2f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _throughput_table(found: dict[str, Any]) -> str:
    lines = [
        "## Throughput",
        "",
        (
            "Images a second, f32: one after the other with `PERFORMANCE_HINT: LATENCY`, and with"
            " `THROUGHPUT` so many at"
        ),
        (
            "a time as OpenVINO chooses, as `examples/run_openvino.py` does. Medians, in turns in"
            " one process."
        ),
        "",
        "| model | one after the other | several at a time | requests | gain |",
        "|---|---|---|---|---|",
    ]
    for name in CASES:
        row = found.get("throughput", {}).get(name)
        if row:
            gain = row["together"] / row["alone"]
            lines.append(
                f"| {name} | {row['alone']:.1f} | {row['together']:.1f} | {row['requests']} |"
                f" {gain:.2f} |"
            )
    return "\n".join(lines)


def _large_table(found: dict[str, Any]) -> str:
    lines = [
        "## Large images in one call",
        "",
        (
            "Models of other input sizes, one image, f32; memory as above. In PyTorch, and by"
            " tiles: `large-images`."
        ),
        "",
        "| input, px | ms | ms a megapixel | MiB | MiB a megapixel |",
        "|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        row = found.get(f"memory {name} batch 1", {})
        if "median_ms" in row and (case.side or name == "sgfr"):
            height, width = case.size
            megapixels = height * width / 1e6
            cells = [
                f"{height} x {width}",
                f"{row['median_ms']:.0f}",
                f"{row['median_ms'] / megapixels:.0f}",
            ]
            cells += [f"{row['inference_mib']:.0f}", f"{row['inference_mib'] / megapixels:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size_table(found: dict[str, Any]) -> str:
    lines = [
        "## Size and memory",
        "",
        "MiB; of memory, the peak above what the runtime takes by itself.",
        "",
        "| model | file | FP16 | INT8 | loaded | one image | batch 8 | batch 8, 1024 px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name, case in CASES.items() if not case.side):
        sizes = found.get(f"export {name}", {}).get("bytes", {})
        one = found.get(f"memory {name} batch 1", {})
        others = [
            found.get(f"memory {name} {shape}", {}) for shape in ("batch 8", "batch 8, 1024 px")
        ]
        cells = [_mib(sizes.get(file)) for file in ("model.xml", "fp16.xml", "int8.xml")]
        cells += [_number(one.get("loaded_mib")), _number(one.get("inference_mib"))]
        cells += [_number(other.get("inference_mib")) for other in others]
        if set(cells) == {"-"}:
            continue
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _answers_table(found: dict[str, Any]) -> str:
    lines = [
        "## Answers",
        "",
        (
            "Exported models against PyTorch through anomalib's Engine, on the test images: largest"
            " difference of a map"
        ),
        (
            "and of a score, as a fraction of their range; labels that change; image AUROC in"
            " percent, and its difference."
        ),
        "",
        "| model | run as | map | score | labels | image AUROC |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for label in ANSWERS:
            row = found.get(f"answers {name} {label}")
            if row is None:
                continue
            before, after = (100 * row[f"{of}image_AUROC"] for of in ("reference_", ""))
            lines.append(
                f"| {name} | {label} | {row['map_difference']:.1e} | {row['score_difference']:.1e}"
                f" | {row['labels_changed']} of {row['images']} | {after:.2f}"
                f" ({after - before:+.2f}) |"
            )
    return "\n".join(lines)


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
