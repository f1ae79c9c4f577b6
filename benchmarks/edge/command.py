"""Exported models: agreement with PyTorch, size, and latency beside the bare backbone.

    python -m benchmarks.edge --out DIR

Fits and exports each model to solar cells, then runs the files without PyTorch. Writes
``edge.json`` as measurements come, ``README.md`` and plots; an interrupted command, given again,
goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_text
from benchmarks.edge.cases import ANSWERS, CASES, F32, LATENCIES, SEARCHED, SIZE
from benchmarks.edge.report import report

__all__ = ["main"]

_REPOSITORY = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code, which is 1 if a step failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edge", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/edge"))
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--runs", type=int, default=100, help="timed runs of each model")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(
            f"--cases: unknown {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}"
        )
    results = options.out / "edge.json"
    found: dict[str, Any] = (
        json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    )
    work = options.out / "work"
    failed = False
    for key, module, *job in _steps(options, work):
        if key in found and "error" not in found[key]:
            continue
        print(key, flush=True)
        finished = subprocess.run(  # noqa: S603
            [sys.executable, "-m", module, *job],
            cwd=_REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
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
    folders = {name: (work / name).resolve() for name in options.cases}
    steps: list[tuple[str, ...]] = [
        (f"export {name}", "benchmarks.edge.export", name, str(folder))
        for name, folder in folders.items()
    ]
    jobs = _time_jobs(folders, options.runs)
    for name, folder in folders.items():
        jobs += _memory_jobs(name, folder)
        jobs += _answers_jobs(name, folder)
    return steps + [(key, "benchmarks.edge.run", step, json.dumps(job)) for key, step, job in jobs]


def _time_jobs(folders: dict[str, Path], runs: int) -> list[tuple[str, str, dict[str, Any]]]:
    models = {
        name: str(folder / "model.xml") for name, folder in folders.items() if not CASES[name].side
    }
    if not models:
        return []
    common: dict[str, Any] = {"runs": runs, "size": SIZE}
    jobs = [
        (
            f"latency {how}",
            "latency",
            {**common, "models": models, "config": config, "fixed": fixed},
        )
        for how, (config, fixed) in LATENCIES.items()
    ]
    jobs.append(("throughput", "throughput", {**common, "models": models, "config": F32}))
    if "bare" in models:
        searched = {name: scales for name, scales in SEARCHED.items() if name in models}
        job = {**common, "bare": models["bare"], "searched": searched, "config": F32}
        jobs.append(("products", "products", job))
    return jobs


def _memory_jobs(name: str, folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for shape in ([batch, 3, *CASES[name].size] for batch in (1, 8)):
        # the others' files take one image
        if shape[0] == 1 or (CASES[name].model in {"sgfr", "bare"} and not CASES[name].side):
            job = {"model": str(folder / "model.xml"), "config": F32, "shape": shape}
            jobs.append((f"memory {name} batch {shape[0]}", "memory", job))
    if CASES[name].compared:
        job = {"model": str(folder / "any_size.xml"), "config": F32, "shape": [8, 3, 1024, 1024]}
        jobs.append((f"memory {name} batch 8, 1024 px", "memory", job))
    return jobs


def _answers_jobs(name: str, folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for label, (file, config, size) in ANSWERS.items() if CASES[name].compared else ():
        paths = {"model": str(folder / file), "reference": str(folder / "reference.npz")}
        jobs.append(
            (f"answers {name} {label}", "answers", {**paths, "config": config, "size": size})
        )
    return jobs


def _measured(module: str, output: str, folder: Path) -> dict[str, Any]:
    if module.endswith("export"):
        return {
            "bytes": {
                path.name: path.stat().st_size + path.with_suffix(".bin").stat().st_size
                for path in sorted(folder.glob("*.xml"))
            }
        }
    measured: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return measured
