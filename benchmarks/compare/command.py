"""Sgfr against anomalib's memory-bank models, in one command.

    python -m benchmarks.compare --dataset mtd --root DIR --split canonical,tile --models
    sgfr,patchcore,padim

Every run is a process of its own, through anomalib's Engine. Results are written as they come and
an interrupted command, given again, goes on where it stopped. In the output folder:
``results.json`` (see :mod:`benchmarks.common.records`), ``commands.txt`` (what made them),
``README.md`` (tables) and plots; under ``work``, the maps and logs of each run.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from anomalib_sgfr.features.backbone import default_size
from anomalib_sgfr.features.layers import backbone_layers
from anomalib_sgfr.training.image_size import choose_size, training_sizes
from benchmarks.common import data
from benchmarks.common.records import Record, Spec, merge, read, write_text
from benchmarks.common.zoo import MODELS, resolve_arguments
from benchmarks.compare import report
from benchmarks.compare.rows import title

__all__ = ["main"]

_MODELS = [
    model for model in MODELS if model != "anomalydino"
]  # which takes DINO's transformers alone
_MALLOC = (  # of the C library: what is larger goes back to the system at once
    "MALLOC_MMAP_THRESHOLD_"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code, which is 1 if a model failed."""
    options = _parse(arguments)
    specs = _plan(options)
    results = options.out / "results.json"
    done = {record.key: record for record in read(results)}
    pending = [spec for spec in specs if spec.key not in done or _again(done[spec.key], options)]
    _remember_command(
        options.out / "commands.txt", arguments if arguments is not None else sys.argv[1:]
    )
    if len(pending) < len(specs):
        _say(f"{len(specs) - len(pending)} of {len(specs)} runs are in {results} already.")
    try:
        for number, spec in enumerate(pending, 1):
            _say(f"[{number}/{len(pending)}] {title(spec)}, seed {spec.seed}")
            record = _run(spec, options)
            if options.untimed:
                record = dataclasses.replace(
                    record, extract_s=None, fit_s=None, sampling_s=None, predict_ms=None
                )
            merge(results, [record])
            _say(f"    {_summary(record)}")
    except KeyboardInterrupt:
        _say("\nInterrupted. What finished is saved; the same command goes on from here.")
        return 130
    wanted = {spec.key for spec in specs}
    report.write(options.out)
    records = [record for record in read(results) if record.key in wanted]
    _say("\n\n".join(filter(None, (report.table(records), report.averages(records)))))
    _say(f"Tables and plots: {options.out / 'README.md'}")
    return int(any(record.error is not None for record in records))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dataset", required=True, choices=data.DATASETS)
    parser.add_argument("--root", type=Path, help="folder of the images; elpv-* need none")
    parser.add_argument("--split", type=_names, help="mtd: canonical, tile, or both with a comma")
    parser.add_argument(
        "--category",
        dest="split",
        type=_names,
        help="mvtec, btech, visa: some, with commas; default those in --root",
    )
    parser.add_argument("--models", type=_names, default=_MODELS, help="of: " + ", ".join(MODELS))
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="a timm name")
    parser.add_argument(
        "--image-size",
        type=int,
        help="side in pixels of the square; default what suits the backbone",
    )
    parser.add_argument(
        "--aspect",
        type=_names,
        default=["own"],
        help="square, own or both: images are squeezed to the square, as anomalib's models do by"
        " default, or have as many pixels in the aspect ratio of the training images",
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0]
    )
    parser.add_argument(
        "--limit-train", type=int, help="use only so many training images, chosen by the seed"
    )
    parser.add_argument(
        "--contamination",
        type=float,
        help="share of training images to be defective, from the test set",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="MODEL.ARGUMENT=VALUE", help="may be repeated"
    )
    parser.add_argument("--out", type=Path, help="output folder; default runs/compare/DATASET")
    parser.add_argument("--timeout", type=float, help="seconds after which a run counts as failed")
    parser.add_argument(
        "--untimed", action="store_true", help="record no times: for runs beside other work"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    options = parser.parse_args(arguments)
    unknown = [model for model in options.models if model not in MODELS]
    if unknown:
        parser.error(f"--models: unknown {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    if not set(options.aspect) <= {"square", "own"}:
        parser.error(f"--aspect: square, own or both, got {', '.join(options.aspect)}")
    options.image_size = options.image_size or default_size(options.backbone)[0]
    parts = data.PARTS.get(options.dataset, ())
    if options.split and not parts:
        parser.error(f"--split: {options.dataset} has none")
    if options.dataset == "mtd":
        options.split = options.split or ["canonical"]
    elif parts and options.root is not None and not options.split:
        options.split = [part for part in parts if (options.root / part).is_dir()] or None
    options.out = options.out or Path("runs/compare") / options.dataset
    try:
        options.sizes = {  # also says what is wrong with the data before the first long run
            split: _sizes(options, split) for split in options.split or [None]
        }
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return options


def _sizes(options: argparse.Namespace, split: str | None) -> list[tuple[tuple[int, int], bool]]:
    """Sizes to run a data set at, and whether each image has its own aspect ratio instead."""
    module = data.build(
        options.dataset, options.root, split, 0, options.limit_train, options.contamination
    )
    square = (options.image_size, options.image_size)
    step = max(layer.stride for layer in backbone_layers(options.backbone))
    size, rule = choose_size(training_sizes(module), options.image_size, step)
    wanted = {"square": (square, False), "own": (size, rule is not None)}
    return list(dict.fromkeys(wanted[aspect] for aspect in options.aspect))


def _again(record: Record, options: argparse.Namespace) -> bool:
    """Whether a run is to be repeated: it failed, or its times are wanted and missing."""
    if record.error is not None:
        return bool(options.retry_failed)
    return record.fit_s is None and not options.untimed


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _plan(options: argparse.Namespace) -> list[Spec]:
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in options.set:
        target, _, value = assignment.partition("=")
        model, _, name = target.partition(".")
        if not value or not name or model not in MODELS:
            sys.exit(
                f"--set: expected MODEL.ARGUMENT=VALUE with a model of {', '.join(MODELS)}:"
                f" {assignment}"
            )
        try:
            overrides.setdefault(model, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides.setdefault(model, {})[name] = value
    try:
        resolved = {
            model: resolve_arguments(model, overrides.get(model, {})) for model in options.models
        }
    except ValueError as error:
        sys.exit(f"--set: {error}")
    return [
        Spec(
            dataset=options.dataset,
            split=split,
            model=model,
            arguments=resolved[model],
            backbone=options.backbone,
            image_size=list(size),
            seed=seed,
            limit_train=options.limit_train,
            contamination=options.contamination,
            own_aspect=each,
        )
        for split, seed, model in product(options.split or [None], options.seeds, options.models)
        for size, each in options.sizes[split]
        if model == "sgfr" or not each  # other models take one size
    ]


def _run(spec: Spec, options: argparse.Namespace) -> Record:
    folder = options.out / "work" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / "record.json"
    record_file.unlink(missing_ok=True)
    fields = json.dumps(
        {**dataclasses.asdict(spec), "root": str(options.root) if options.root else None}
    )
    start = time.monotonic()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "benchmarks.compare.run", fields, str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict(MODELS[spec.model].environment)},
        )
        try:
            while process.poll() is None:
                _tick(start)
                if options.timeout and time.monotonic() - start > options.timeout:
                    process.kill()
                    process.wait()
                    return Record.of(spec, error=f"timed out after {options.timeout:.0f} s")
                time.sleep(0.5)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.returncode or not record_file.exists():
        lines = [
            line
            for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        reason = lines[-1].strip()[:300] if lines else "no output"
        return Record.of(spec, error=f"exit code {process.returncode}: {reason}")
    return Record(**json.loads(record_file.read_text(encoding="utf-8")))


def _remember_command(path: Path, arguments: Sequence[str]) -> None:
    """Add this command to those that made the results, with ``DIR`` for local folders."""
    words = list(arguments)
    for position, word in enumerate(words[:-1]):
        if word == "--root" or (word == "--out" and Path(words[position + 1]).is_absolute()):
            words[position + 1] = "DIR"
    setting = os.environ.get(_MALLOC)
    line = (
        (f"{_MALLOC}={setting} " if setting else "")
        + "python -m benchmarks.compare "
        + shlex.join(words)
    )
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line not in lines:
        write_text(path, "\n".join([*lines, line]) + "\n")


def _summary(record: Record) -> str:
    if record.error is not None:
        return f"FAILED: {record.error}"
    scores = ", ".join(
        f"{name} {100 * value:.1f}" for name, value in record.metrics.items() if value is not None
    )
    times = [getattr(record, name) for name in ("fit_s", "sampling_s", "predict_ms")]
    if None in times:
        return f"{scores}; not timed"
    return f"{scores}; fit {times[0]:.0f} s, sampling {times[1]:.0f} s, {times[2]:.0f} ms/image"


def _say(text: str) -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    print(text, flush=True)


def _tick(start: float) -> None:
    """Show that a run is alive."""
    if sys.stdout.isatty():
        print(f"\r    {time.monotonic() - start:.0f} s", end="", flush=True)
