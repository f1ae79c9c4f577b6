"""Fitting and scoring on a GPU, beside the bare backbone, Padim and Patchcore.

    python -m benchmarks.gpu [--dataset mtd --root DIR] --out DIR

Images are held in memory, so that nothing of a data loader is measured: made ones, or those of a
data set. Times are of one process, medians, with the GPU waited for; memory is the peak that
PyTorch took on the GPU. Sgfr is measured as it is, compiled, and as a CUDA graph. Writes
``gpu.json`` and ``README.md``. Where there is no GPU it says so, and all is well; ``--device cpu``
goes through the same steps on a CPU.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomalib_sgfr import Sgfr
from anomalib_sgfr.memory_bank import residual_maps
from anomalib_sgfr.torch_model import SgfrModel
from benchmarks.common import data
from benchmarks.common.cases import show_page
from benchmarks.common.defects import surface
from benchmarks.common.engine import silence
from benchmarks.common.records import table, write_text
from benchmarks.common.zoo import MODELS, BareExtraction, resolve_arguments

__all__ = ["main", "report"]

_BACKBONE = "tf_efficientnet_lite0"
_SIZE = (256, 256)
_BASES = 32  # made images, of which the others are shifted and noisy copies
_BASELINES: dict[str, dict[str, Any]] = {"padim": {}, "patchcore": {"coreset_sampling_ratio": 0.01}}
_SECONDS = 1.0  # of repeated runs, for each time
_FEWEST = 3


class _Options(NamedTuple):
    """What is measured."""

    device: torch.device
    images: int
    batch: int
    single: int
    sizes: list[int]
    compiler: str
    baselines: list[str]


class _Held(Dataset[ImageItem]):
    """Images in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=self.images[index], image_path=f"made/{index:05}.png")


class _Clock(Callback):
    """Seconds of a fit, from its first batch to all that was learnt."""

    seconds = float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        _wait(pl_module.device)
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        _wait(pl_module.device)
        self.seconds += time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--dataset", choices=data.DATASETS, help="made images without it")
    parser.add_argument("--root", type=Path, help="folder of the data set")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--images", type=int, default=761, help="made images to fit to")
    parser.add_argument(
        "--single", type=int, default=128, help="of them, to fit to one by one; 0 for none"
    )
    parser.add_argument("--batch", type=int, default=32, help="of a fit")
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[1, 8, 32, 128],
    )
    parser.add_argument(
        "--compiler", default="inductor", help="backend of torch.compile; none to leave it out"
    )
    parser.add_argument(
        "--models", type=lambda text: text.split(","), default=list(_BASELINES), help="beside Sgfr"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    options = parser.parse_args(arguments)
    unknown = set(options.models) - {*_BASELINES, ""}
    if unknown:
        parser.error(
            f"--models: unknown {', '.join(sorted(unknown))}; choose from {', '.join(_BASELINES)}"
        )
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was measured.")
        return 0
    silence()
    images = _images(options)
    chosen = _Options(
        device,
        len(images),
        options.batch,
        min(options.single, len(images)),
        options.sizes,
        options.compiler,
        [name for name in options.models if name],
    )
    found: dict[str, Any] = {
        "card": _name(device),
        "torch": version("torch"),
        "data": options.dataset or "made",
    }
    found |= {
        "images": chosen.images,
        "batch": chosen.batch,
        "single": chosen.single,
        "fit": {},
        "score": {},
    }
    for name, measured in _measured(images, chosen):
        for kind, values in measured.items():
            found.setdefault(kind, {}).setdefault(name, {}).update(values)
        print(name, measured, flush=True)
        write_text(options.out / "gpu.json", json.dumps(found, indent=1) + "\n")
    return show_page(report, options.out)


def _images(options: argparse.Namespace) -> Tensor:
    """Images ``(N, 3, H, W)`` between 0 and 1."""
    if options.dataset:
        module = data.build(options.dataset, options.root, options.split, num_workers=0)
        items = (cast("Any", module.train_data[row]).image for row in range(len(module.train_data)))
        resize = torch.nn.functional.interpolate
        return torch.cat(
            [resize(item[None], _SIZE, mode="bilinear", antialias=True) for item in items]
        )
    rng = np.random.default_rng(0)
    bases = np.stack([surface(rng, _SIZE) for _ in range(min(_BASES, options.images))])
    made = np.empty((options.images, *_SIZE), np.float32)
    for number in range(options.images):
        shift = tuple(rng.integers(0, 256, 2))
        made[number] = np.roll(bases[number % len(bases)], shift, (0, 1))
        made[number] += rng.normal(0.0, 0.01, _SIZE)
    return torch.from_numpy(made.clip(0.0, 1.0))[:, None].expand(-1, 3, -1, -1)  # grey, held once


def _measured(images: Tensor, options: _Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model's name and what was measured of it."""
    layers = MODELS["sgfr"].layers(_BACKBONE)
    common: dict[str, Any] = {"evaluator": False, "visualizer": False}
    bare = BareExtraction(
        backbone=_BACKBONE, layers=layers, image_size=_SIZE, post_processor=False, **common
    )
    yield "bare", {"fit": _fits(bare, images, options)}
    batches = [images[:size] for size in options.sizes if size <= len(images)]
    prepared = [_prepared(bare, batch, options.device) for batch in batches]
    extractor = bare.model.to(options.device).eval().embedder.extractor

    def scores(run: Callable[[Tensor], Any]) -> dict[str, Any]:
        return _scores(run, extractor, prepared, options)

    yield "bare", {"score": scores(extractor)}

    model = Sgfr(backbone=_BACKBONE, image_size=_SIZE, seed=0, post_processor=False, **common)
    yield "sgfr", {"fit": _fits(model, images, options)}
    inner = model.model.to(options.device).eval()
    yield "sgfr", {"score": scores(inner)}
    yield "sgfr", {"stages": _stages(inner, prepared, options)}
    if options.device.type == "cuda":
        yield "sgfr, CUDA graph", {"score": scores(_captured(inner))}
    if options.compiler != "none":
        compiled: Any = torch.compile(
            inner, fullgraph=True, dynamic=False, backend=options.compiler
        )
        yield "sgfr, compiled", {"score": scores(compiled)}
    for name in options.baselines:
        other = MODELS[name].build(_BACKBONE, _SIZE, 0, resolve_arguments(name, _BASELINES[name]))
        yield name, {"fit": {f"batch {options.batch}": _fit(other, images, options)}}
        yield name, {"score": scores(cast("Any", other.model).to(options.device).eval())}


def _fits(model: Sgfr, images: Tensor, options: _Options) -> dict[str, Any]:
    # what starts up, of PyTorch and of a model that has programs compiled, is measured apart
    others = {"one batch, the first": _fit(model, images[: options.batch], options)}
    if options.single:
        others["batch 1"] = _fit(model, images[: options.single], options._replace(batch=1))
    # last, because with its banks the model is scored
    return {f"batch {options.batch}": _fit(model, images, options), **others}


def _fit(model: AnomalibModule, images: Tensor, options: _Options) -> dict[str, float | None]:
    """Seconds of a fit, and its peak on the GPU in MiB."""
    clock = _Clock()
    loader = DataLoader(
        _Held(images), batch_size=options.batch, collate_fn=ImageBatch.collate, shuffle=True
    )
    _reset_peak(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(
            default_root_dir=scratch,
            accelerator="gpu" if options.device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
            limit_val_batches=0,
        )
        engine.fit(model=model, train_dataloaders=loader)
    return {"seconds": round(clock.seconds, 3), "peak_mib": _peak_mib(options.device)}


def _prepared(model: Sgfr, images: Tensor, device: torch.device) -> Tensor:
    prepared: Tensor = cast("Any", model.pre_processor).transform(images)
    return prepared.to(device)


@torch.no_grad()
def _scores(
    run: Callable[[Tensor], Any],
    bare: Callable[[Tensor], Any],
    batches: Sequence[Tensor],
    options: _Options,
) -> dict[str, Any]:
    """Milliseconds by number of images, beside the bare backbone, and peak GPU memory in MiB."""
    found = {}
    for batch in batches:
        _reset_peak(options.device)
        run(batch)
        peak = _peak_mib(options.device)
        taken, beside = _milliseconds([partial(run, batch), partial(bare, batch)], options.device)
        found[str(len(batch))] = {"ms": taken, "bare_ms": beside, "peak_mib": peak}
    return found


@torch.no_grad()
def _stages(inner: SgfrModel, batches: Sequence[Tensor], options: _Options) -> dict[str, Any]:
    """Milliseconds of each step of Sgfr."""
    found = {}
    for images in batches:
        embeddings = inner.embed(images)
        residuals = residual_maps(list(inner.banks), embeddings)
        steps: dict[str, Callable[[], Any]] = {
            "backbone": partial(inner.embedder.extractor, images),
            "backbone and pooling": partial(inner.embed, images),
            **{
                f"bank of {len(bank.atoms):,}, {part.shape[1]} values": partial(
                    residual_maps, [bank], [part]
                )
                for bank, part in zip(inner.banks, embeddings, strict=True)
            },
            "maps": partial(
                inner.anomaly_map_generator, residuals, images.shape[-2:], inner.region
            ),
        }
        found[str(len(images))] = dict(
            zip(steps, _milliseconds(list(steps.values()), options.device), strict=True)
        )
    return found


def _captured(inner: SgfrModel) -> Callable[[Tensor], Any]:
    """Scoring as a CUDA graph, captured once for each shape."""
    graphs: dict[torch.Size, tuple[Any, Tensor, Any]] = {}

    def run(images: Tensor) -> Any:  # noqa: ANN401
        if images.shape not in graphs:
            held = images.clone()
            for _ in range(
                _FEWEST
            ):  # what is made once, such as the matrices of the maps, is made before
                inner(held)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = inner(held)
            graphs[images.shape] = graph, held, result
        graph, held, result = graphs[images.shape]
        held.copy_(images)
        graph.replay()
        return result

    return run


def _milliseconds(steps: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Medians of runs that are waited for, in turns, after some to warm up."""
    for step in steps:
        for _ in range(_FEWEST):
            step()
    _wait(device)
    taken: list[list[float]] = [[] for _ in steps]
    while len(taken[0]) < _FEWEST or sum(map(sum, taken)) < _SECONDS * len(steps):
        for step, own in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            _wait(device)
            own.append(time.perf_counter() - start)
    return [round(1000.0 * statistics.median(own), 3) for own in taken]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mib(device: torch.device) -> float | None:
    return (
        round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else None
    )


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"none, CPU ({platform.machine()})"
    )


def report(folder: Path) -> None:
    """Write ``README.md`` from ``gpu.json``."""
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    sizes = list(found["score"]["bare"])
    heads = [f"{size} image{'s' * (size != '1')}" for size in sizes]
    scoring = []
    for name, of in found["score"].items():
        cells = [
            f"{of[size]['ms']:.2f} ({of[size]['ms'] / of[size]['bare_ms']:.2f})"
            if size in of
            else "-"
            for size in sizes
        ]
        scoring.append([name, *cells, _cell(of[sizes[-1]]["peak_mib"])])
    bare = found["fit"]["bare"]
    fits = []
    for name, of in found["fit"].items():
        cells = [
            f"{of[way]['seconds']:.2f} ({of[way]['seconds'] / bare[way]['seconds']:.2f})"
            if way in of
            else "-"
            for way in bare
        ]
        fits.append([name, *cells, _cell(of[next(iter(bare))]["peak_mib"])])
    stages = found["stages"]["sgfr"]
    steps = [[step, *(f"{stages[size][step]:.2f}" for size in sizes)] for step in stages[sizes[0]]]
    write_text(
        folder / "README.md",
        f"""\
# On a GPU

`python -m benchmarks.gpu`: {found["card"]}, PyTorch {found["torch"]}; {found["images"]} images
({found["data"]}), held in memory. Of scoring, milliseconds; of a fit, seconds: of all images, or of
{found["single"]}, one at a time. In brackets, times the bare backbone, of scoring in turn with it.
MiB are the peak on the GPU.

{table(["scoring", *heads, f"MiB of {sizes[-1]}"], scoring)}

{table(["fit", *bare, "MiB"], fits)}

{table(["step of Sgfr, ms", *heads], steps)}
""",
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
