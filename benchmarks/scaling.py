"""Scaling of Sgfr's cost: with the data, the bank, the embedding, the support, processes.

    python -m benchmarks.scaling --out DIR

Times the product's own steps on made embeddings, one quantity varied at a time, each measurement in
a process of its own. Peak memory against the number of training images, Sgfr's beside Patchcore's,
is drawn from the records that :mod:`benchmarks.compare` left in ``DIR/results.json``, if any.
Writes ``steps.json``, ``README.md`` and plots.
"""

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomalib_sgfr.core import self_expression
from anomalib_sgfr.core.clusters import Clusters, merge
from anomalib_sgfr.core.sampler import SubspaceSampler
from benchmarks.common.cases import show_page
from benchmarks.common.figures import plt, save_figure
from benchmarks.common.memory import peak_mb, reset_peak
from benchmarks.common.records import Record, read, read_rows, table, write_rows, write_text

__all__ = ["main", "report"]

_BASE = {"patches": 400_000, "atoms": 2000, "width": 152, "support": 5, "processes": 1}
_SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "sampling": {
        "patches": (100_000, 200_000, 400_000, 800_000, 1_600_000),
        "atoms": (500, 1000, 2000, 4000, 8000),
        "width": (76, 152, 304, 608),
    },
    "merging": {"processes": (2, 4, 8, 16, 32), "atoms": (500, 1000, 2000, 4000, 8000)},
    "scoring": {
        "atoms": (500, 1000, 2000, 4000, 8000),
        "support": (1, 2, 5, 10, 20),
        "width": (76, 152, 304, 608),
    },
}
_BATCH = 32_768
_IMAGE_PATCHES = 1024
_LATENT = 12  # dimension of what the made embeddings vary in, besides noise


def _stream(patches: int, width: int, seed: int = 0) -> Any:  # noqa: ANN401
    """Made embeddings in batches: a curved surface of a dozen dimensions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    into, out = (torch.randn(shape, generator=generator) for shape in ((_LATENT, 64), (64, width)))
    for start in range(0, patches, _BATCH):
        size = min(_BATCH, patches - start)
        latent = torch.randn((size, _LATENT), generator=generator)
        yield (latent @ into / _LATENT**0.5).tanh() @ out + torch.randn(
            (size, width), generator=generator
        )


def _sampling(point: dict[str, int]) -> float:
    sampler, seconds = SubspaceSampler(point["atoms"], working_size=point["atoms"]), 0.0
    for batch in _stream(point["patches"], point["width"]):
        start = time.perf_counter()
        sampler.observe(batch)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    sampler.clusters()
    return seconds + time.perf_counter() - start


def _merging(point: dict[str, int]) -> float:
    scale_clusters = []
    for rank in range(max(2, point["processes"])):
        (points,) = _stream(point["atoms"], point["width"], rank)
        scale_clusters.append(Clusters.of(points))
    start = time.perf_counter()
    merge(scale_clusters, point["atoms"])
    return time.perf_counter() - start


def _scoring(point: dict[str, int]) -> float:
    bank: Tensor = next(_stream(point["atoms"], point["width"]))
    image: Tensor = next(_stream(_IMAGE_PATCHES, point["width"], 1))
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        self_expression.affine_distance(image, bank, point["support"], 1e-3)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


_STEPS = {"sampling": _sampling, "merging": _merging, "scoring": _scoring}


def _measure(step: str, point: dict[str, int]) -> dict[str, Any]:
    """Seconds of a step, and peak resident memory above what the process held before it."""
    _STEPS[step]({**point, "patches": 2 * _BATCH, "atoms": 200})  # libraries load what they need
    reset_peak()
    before = peak_mb()
    seconds = _STEPS[step](point)
    return {
        "step": step,
        **point,
        "seconds": round(seconds, 6),
        "peak_mib": round(peak_mb() - before, 1),
    }


def _points() -> list[tuple[str, dict[str, int]]]:
    points = []
    for step, sweeps in _SWEEPS.items():
        for name, values in sweeps.items():
            points += [(step, {**_BASE, name: value}) for value in values]
    return [point for number, point in enumerate(points) if point not in points[:number]]


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent ``b`` of ``cost = a * value ** b``, by least squares on logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds over all points; medians are reported"
    )
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for repeat, (step, point) in itertools.product(range(options.repeats), _points()):
        with context.Pool(1) as pool:
            found.append(pool.apply(_measure, (step, point)))
        print(f"[{repeat + 1}/{options.repeats}] {found[-1]}", flush=True)
        write_rows(options.out / "steps.json", found)
    return show_page(report, options.out)


def report(folder: Path) -> None:
    """Write ``README.md`` and plots from ``steps.json`` and ``results.json`` in ``folder``."""
    parts = ["# How the cost of Sgfr grows", "`python -m benchmarks.scaling --out DIR`"]
    steps = read_rows(folder / "steps.json")
    if steps:
        parts.append(_steps_report(steps, folder))
    records = [record for record in read(folder / "results.json") if record.error is None]
    if records:
        parts.append(_memory_report(records, folder))
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _steps_report(found: list[dict[str, Any]], folder: Path) -> str:
    base = ", ".join(f"{value:,} {name}" for name, value in _BASE.items())
    rounds = len(found) // len(_points())
    lines = []
    figure, axes = plt.subplots(
        1, len(_SWEEPS), figsize=(4.2 * len(_SWEEPS), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (step, sweeps) in zip(axes[0], _SWEEPS.items(), strict=True):
        for name, values in sweeps.items():
            rows = [
                [row for row in found if row["step"] == step and _is(row, name, value)]
                for value in values
            ]
            seconds = [statistics.median(row["seconds"] for row in group) for group in rows]
            peaks = [statistics.median(row["peak_mib"] for row in group) for group in rows]
            exponent = slope(values, seconds)
            cells = [
                step,
                name,
                ", ".join(f"{value:,}" for value in values),
                ", ".join(f"{value:.3g}" for value in seconds),
                ", ".join(f"{value / seconds[0]:.2f}" for value in seconds),
                f"{exponent:.2f}",
                ", ".join(f"{value:.0f}" for value in peaks),
            ]
            lines.append(cells)
            relative = [value / values[0] for value in values]
            axis.plot(
                relative,
                [value / seconds[0] for value in seconds],
                "o-",
                label=f"{name} ({exponent:.2f})",
            )
        most = max(values[-1] / values[0] for values in sweeps.values())
        axis.plot([1, most], [1, most], ":", color="grey", label="in proportion")
        axis.set(
            xscale="log", yscale="log", xlabel="times as much", ylabel="times as long", title=step
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    save_figure(figure, folder / "steps.png")
    columns = ["step", "quantity", "values", "seconds", "relative", "exponent", "peak MiB"]
    return f"""\
One quantity varied at a time, all else {base}. Rounds: {rounds}, and medians of them; seconds also
relative to the first of a sweep, and the exponent of a power law through them.

{table(columns, lines)}

![steps](steps.png)"""


def _is(row: dict[str, Any], name: str, value: int) -> bool:
    return all(row[other] == (value if other == name else usual) for other, usual in _BASE.items())


def _memory_report(records: Sequence[Record], folder: Path) -> str:
    commands = folder / "commands.txt"
    parts = ["## Peak memory of a fit"]
    parts += [f"```sh\n{commands.read_text(encoding='utf-8')}```"] if commands.exists() else []
    parts.append("Medians over the seeds; of the fit above the bare pass, too.")
    lines = []
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for model in sorted({record.model for record in records}):
        mine = [record for record in records if record.model == model]
        numbers = sorted({record.n_train or 0 for record in mine})
        peaks = []
        for number in numbers:
            runs = [record for record in mine if (record.n_train or 0) == number]
            bare, fit = ([_mib(run, which) for run in runs] for which in ("extract", "fit"))
            above = [max(0.0, most - least) for most, least in zip(fit, bare, strict=True)]
            timed = [run.sampling_s for run in runs if run.sampling_s is not None]
            sampling = f"{statistics.median(timed):.1f}" if timed else "-"
            cells = [f"{statistics.median(values):,.0f}" for values in (bare, fit, above)]
            lines.append([model, str(number), str(len(runs)), *cells, sampling])
            peaks.append(statistics.median(fit))
        axis.plot(numbers, peaks, "o-", label=model)
    axis.set(
        xlabel="training images", ylabel="peak resident memory of the fit, MiB", ylim=(0, None)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, folder / "memory.png")
    columns = ["model", "training images", "seeds", "bare pass, MiB", "fit, MiB"]
    columns += ["fit above the bare pass, MiB", "sampling, s"]
    return "\n\n".join([*parts, table(columns, lines), "![memory](memory.png)"])


def _mib(record: Record, which: str) -> float:
    peak: float | None = getattr(record, f"{which}_peak_rss_mb")
    return math.nan if peak is None else peak


if __name__ == "__main__":
    sys.exit(main())
