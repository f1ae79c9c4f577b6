"""Sgfr at the edge: are an exported model's answers the same, how large is it, and how fast beside its backbone?

    python -m benchmarks.edge --out DIR [--root DIR]

Fits and exports each model, then runs the files without PyTorch. With ``--root``, the folder of the magnetic tiles, on
those; otherwise on solar cells. Writes ``edge.json`` as measurements come, ``README.md`` and plots; an interrupted
command, given again, goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import write_text

__all__ = ["CASES", "Case", "main", "report"]

_REPOSITORY = Path(__file__).parents[1]
_LITE, _WIDE = "tf_efficientnet_lite0", "wide_resnet50_2"
_SIZE = [256, 256]
_F32: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
_PRECISIONS: dict[str, dict[str, str]] = {"f32": _F32, "default": {}}


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        model (str): As in :mod:`benchmarks.compare`, or ``bare`` for the backbone alone.
        backbone (str): A timm name.
        atoms (int): Atoms of the bank.
        arguments (dict[str, Any]): Arguments of the model that differ from its defaults.
        compared (bool): Whether its answers are compared.
        compressed (bool): Whether those of its compressed files are.
    """

    model: str
    backbone: str = _LITE
    atoms: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    compared: bool = False
    compressed: bool = False

    @property
    def pre_trained(self) -> bool:
        """Whether weights that work without a network exist; without them, only time can be measured."""
        return self.backbone == _LITE


CASES: dict[str, Case] = {
    "bare": Case("bare"),
    "sgfr-1000": Case("sgfr", atoms=1000, compared=True, compressed=True),
    "sgfr-5000": Case("sgfr", atoms=5000),
    "sgfr-omp-1000": Case("sgfr", atoms=1000, arguments={"solver": "omp"}, compared=True),
    "sgfr-ridge": Case("sgfr", atoms=1000, arguments={"solver": "ridge"}, compared=True),
    "padim": Case("padim"),
    "mhpatchcore": Case("mhpatchcore"),
    "patchcore-0.01": Case("patchcore", atoms=2048, arguments={"coreset_sampling_ratio": 0.001}),
    "patchcore-0.1": Case("patchcore", atoms=20_480, arguments={"coreset_sampling_ratio": 0.001}),
    "bare-wide": Case("bare", backbone=_WIDE),
    "sgfr-wide-1000": Case("sgfr", backbone=_WIDE, atoms=1000),
}
_BACKBONES = {_LITE: "bare", _WIDE: "bare-wide"}
_SEARCHED = {  # of each scale, width of what is searched, and patches of an image
    _LITE: ((41, 1024), (113, 256)),
    _WIDE: ((513, 1024), (1025, 256)),
}
_ANSWERS: dict[str, tuple[str, dict[str, str], list[int] | None]] = {
    "ONNX Runtime": ("model.onnx", {}, None),
    "OpenVINO f32": ("any_size.xml", _F32, None),
    "OpenVINO f32, fixed size": ("model.xml", _F32, _SIZE),
    "OpenVINO default": ("model.xml", {}, _SIZE),
    "FP16, f32": ("fp16.xml", _F32, _SIZE),
    "FP16, default": ("fp16.xml", {}, _SIZE),
    "INT8": ("int8.xml", {}, _SIZE),
    "INT8_PTQ": ("int8_ptq.xml", {}, _SIZE),
    "INT8_ACQ": ("int8_acq.xml", {}, _SIZE),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code, which is 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder of the magnetic tiles; solar cells without it")
    parser.add_argument("--out", type=Path, default=Path("runs/edge"))
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each model")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"--cases: unknown {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    results = options.out / "edge.json"
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    work = options.out / "work"
    failed = False
    for key, module, *job in _steps(options, work):
        if key in found and "error" not in found[key]:
            continue
        print(key, flush=True)
        finished = subprocess.run(  # noqa: S603
            [sys.executable, "-m", module, *job], cwd=_REPOSITORY, capture_output=True, text=True, check=False
        )
        if finished.returncode:
            failed = True
            found[key] = {"error": (finished.stderr.strip().splitlines() or ["no message"])[-1]}
        else:
            found[key] = _measured(module, finished.stdout, work / job[0])
        print(f"    {found[key]}", flush=True)
        write_text(results, json.dumps(found, indent=1) + "\n")
    report(options.out)
    print((options.out / "README.md").read_text(encoding="utf-8"))
    return int(failed)


def _steps(options: argparse.Namespace, work: Path) -> list[tuple[str, ...]]:
    """Key, module and arguments of each step."""
    root = [str(options.root.resolve())] if options.root else []
    folders = {name: (work / name).resolve() for name in options.cases}
    steps: list[tuple[str, ...]] = [
        (f"export {name}", "benchmarks.edge_export", name, str(folder), *root) for name, folder in folders.items()
    ]
    jobs = _time_jobs(folders, options.runs)
    for name, folder in folders.items():
        jobs += _memory_jobs(name, folder)
        jobs += _answers_jobs(name, folder)
    return steps + [(key, "benchmarks.edge_run", step, json.dumps(job)) for key, step, job in jobs]


def _time_jobs(folders: dict[str, Path], runs: int) -> list[tuple[str, str, dict[str, Any]]]:
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for backbone, bare in _BACKBONES.items():
        models = {
            name: str(folder / "model.xml") for name, folder in folders.items() if CASES[name].backbone == backbone
        }
        for precision, config in _PRECISIONS.items():
            job: dict[str, Any] = {"models": models, "config": config, "runs": runs, "size": _SIZE}
            if models:
                jobs.append((f"latency {backbone} {precision}", "latency", job))
        if bare in models:
            job = {"bare": models[bare], "atoms": [1000, 5000], "searched": _SEARCHED[backbone]}
            jobs.append((f"products {backbone}", "products", {**job, "config": _F32, "runs": runs, "size": _SIZE}))
    return jobs


def _memory_jobs(name: str, folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for shape in ([1, 3, 256, 256], [8, 3, 256, 256]):
        if shape[0] == 1 or CASES[name].model in {"sgfr", "bare"}:  # the others' files take one image
            job = {"model": str(folder / "model.xml"), "config": _F32, "shape": shape}
            jobs.append((f"memory {name} batch {shape[0]}", "memory", job))
    if CASES[name].compared:
        job = {"model": str(folder / "any_size.xml"), "config": _F32, "shape": [8, 3, 1024, 1024]}
        jobs.append((f"memory {name} batch 8, 1024 px", "memory", job))
    return jobs


def _answers_jobs(name: str, folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for label, (file, config, size) in _ANSWERS.items() if CASES[name].compared else ():
        if CASES[name].compressed or not file.startswith(("fp16", "int8")):
            paths = {"model": str(folder / file), "reference": str(folder / "reference.npz")}
            jobs.append((f"answers {name} {label}", "answers", {**paths, "config": config, "size": size}))
    return jobs


def _measured(module: str, output: str, folder: Path) -> dict[str, Any]:
    if module.endswith("edge_export"):
        return {
            "bytes": {
                path.name: path.stat().st_size + path.with_suffix(".bin").stat().st_size
                for path in sorted(folder.glob("*.xml"))
            }
        }
    measured: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return measured


def report(folder: Path) -> None:
    """Write ``README.md`` and the plot from ``edge.json``."""
    found: dict[str, Any] = json.loads((folder / "edge.json").read_text(encoding="utf-8"))
    fine = {key: value for key, value in found.items() if "error" not in value}
    parts = ["# Sgfr at the edge", "`python -m benchmarks.edge --out DIR`, on two cores."]
    parts += [_latency_table(fine, folder), _size_table(fine), _answers_table(fine)]
    errors = [f"- {key}: {value['error']}" for key, value in found.items() if "error" in value]
    if errors:
        parts.append("## Failed\n\n" + "\n".join(errors))
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _latency_table(found: dict[str, Any], folder: Path) -> str:
    from benchmarks.plots import plt, save_figure

    lines = [
        "## Latency",
        "",
        "OpenVINO, one image of 256 px, whole model, and beside the bare backbone in the same process: medians, and",
        "ratios of medians and of the least.",
        "",
        "| model | backbone | f32, ms | x bare | least x | default, ms | x bare | least x |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names, bars = [], []
    for name, case in CASES.items():
        cells, shown = [], 0.0
        for precision in _PRECISIONS:
            times = found.get(f"latency {case.backbone} {precision}", {})
            if name in times and _BACKBONES[case.backbone] in times:
                own, bare = times[name], times[_BACKBONES[case.backbone]]
                shown = shown or own["median_ms"] / bare["median_ms"]
                cells += [f"{own['median_ms']:.2f}"]
                cells += [f"{own[value] / bare[value]:.2f}" for value in ("median_ms", "least_ms")]
            else:
                cells += ["-"] * 3
        if not shown:
            continue
        lines.append(f"| {name} | {case.backbone} | " + " | ".join(cells) + " |")
        names.append(name)
        bars.append(shown)
    lines += ["", *_bounds(found)]
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axis.barh(names[::-1], bars[::-1], color=["tab:red" if "sgfr" in name else "tab:grey" for name in names[::-1]])
    axis.set(xlabel="latency, times that of the bare backbone (f32, medians)", xscale="log")
    axis.axvline(1.0, color="black", lw=0.8)
    save_figure(figure, folder / "latency.png")
    return "\n".join([*lines, "", "![latency](latency.png)"])


def _bounds(found: dict[str, Any]) -> list[str]:
    """What an exact search in f32 costs at least."""
    lines = [
        "The product of all atoms with all patches of an image, and the least of each group of eight, alone: a model",
        "whose search is exact and in f32 takes no less than that and the backbone. Medians of one process.",
        "",
        "| backbone | atoms | GFLOP | product, ms | GFLOP/s | backbone, ms | no model below, x bare |",
        "|---|---|---|---|---|---|---|",
    ]
    for backbone, searched in _SEARCHED.items():
        times = found.get(f"products {backbone}", {})
        values = sum(width * patches for width, patches in searched)
        for name in times:
            if name == "bare":
                continue
            atoms = int(name.rsplit(" ", 1)[1])
            work, product, bare = 2e-9 * atoms * values, times[name]["median_ms"], times["bare"]["median_ms"]
            cells = [f"{atoms:,}", f"{work:.2f}", f"{product:.2f}", f"{1e3 * work / product:.0f}", f"{bare:.2f}"]
            lines.append(f"| {backbone} | " + " | ".join(cells) + f" | {1 + product / bare:.2f} |")
    return lines


def _size_table(found: dict[str, Any]) -> str:
    lines = [
        "## Size and memory",
        "",
        "MiB; of memory, the peak above what the runtime takes by itself.",
        "",
        "| model | file | FP16 | INT8 | loaded | one image | batch 8 | batch 8, 1024 px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        sizes = found.get(f"export {name}", {}).get("bytes", {})
        one = found.get(f"memory {name} batch 1", {})
        others = [found.get(f"memory {name} {shape}", {}) for shape in ("batch 8", "batch 8, 1024 px")]
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
        "Exported models against PyTorch through anomalib's Engine, on the test images: largest difference of a map",
        "and of a score, as a fraction of their range; labels that change; accuracy in percent, and its difference.",
        "",
        "| model | run as | map | score | labels | image AUROC | AUPRO |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for label in _ANSWERS:
            row = found.get(f"answers {name} {label}")
            if row is None:
                continue
            accuracy = [
                f"{100 * row[metric]:.2f} ({100 * (row[metric] - row[f'reference_{metric}']):+.2f})"
                if metric in row
                else "-"
                for metric in ("image_AUROC", "AUPRO")
            ]
            lines.append(
                f"| {name} | {label} | {row['map_difference']:.1e} | {row['score_difference']:.1e} | "
                f"{row['labels_changed']} of {row['images']} | " + " | ".join(accuracy) + " |"
            )
    return "\n".join(lines)


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
