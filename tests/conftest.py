"""Small synthetic data: textured good parts, and the same with a blob that their masks mark."""

# threads are counted when torch is imported
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_sgfr import Sgfr
from anomalib_sgfr.post_processing.thresholds import conformal_threshold, with_margin
from benchmarks.common import tracing
from tests.warm import warmed

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; fail at once
# anomalib makes several in a process, which `backends._openvino_core` says the fault of
_make_core, _kept_cores = openvino.Core, list[openvino.Core]()


def _kept_core(*arguments: str) -> openvino.Core:
    """A core that does not end before the process does."""
    _kept_cores.append(_make_core(*arguments))
    return _kept_cores[-1]


openvino.Core = _kept_core  # type: ignore[misc,assignment]


def write_image(
    path: Path, seed: int, size: tuple[int, int] = (96, 96), *, defect: bool = False
) -> None:
    """Write a noisy grid, and if ``defect`` a bright blob in it with a mask of the same name under
    ``masks``.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    image = 110 + 40 * np.sin(rows / 5) * np.cos(columns / 5) + rng.normal(0, 6, size)
    if defect:
        row, column = (
            rng.integers(height // 4, 3 * height // 4),
            rng.integers(width // 4, 3 * width // 4),
        )
        blob = (rows - row) ** 2 + (columns - column) ** 2 < (min(size) // 6) ** 2
        image[blob] = 250
        mask = path.parent.parent / "masks" / path.name
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((blob * 255).astype(np.uint8)).save(mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).convert("RGB").save(path)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``good`` (12), ``good_test`` (6), ``bad`` (6) and ``masks``."""
    root = tmp_path_factory.mktemp("parts")
    for index in range(12):
        write_image(root / "good" / f"{index:02}.png", index)
    for index in range(6):
        write_image(root / "good_test" / f"{index:02}.png", 100 + index)
        write_image(root / "bad" / f"{index:02}.png", 200 + index, defect=True)
    return root


@pytest.fixture(scope="session")
def checkpoint(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a small model that was fitted to ``parts``."""
    engine = engine_in(tmp_path_factory.mktemp("fitted"))
    engine.fit(small(), datamodule=folder_datamodule(parts))
    return Path(engine.best_model_path)


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that all workers of a run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the executables of ``tests/warm.py``."""
    with warmed(run_folder(tmp_path_factory) / "warm") as folder:
        yield folder


@pytest.fixture(scope="module")
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trace a model for ONNX once in a run of the tests, which is most of an export."""
    with tracing.traced_once(run_folder(tmp_path_factory) / "traced"):
        yield


@pytest.fixture
def datamodule(parts: Path) -> Folder:
    """The synthetic parts as a datamodule, without worker processes."""
    return folder_datamodule(parts)


def folder_datamodule(root: Path, **overrides: object) -> Folder:
    """Build anomalib's Folder datamodule over the layout of ``parts``."""
    arguments: dict[str, object] = {
        "name": "parts",
        "root": root,
        "normal_dir": "good",
        "abnormal_dir": "bad",
        "normal_test_dir": "good_test",
        "mask_dir": "masks",
        "train_batch_size": 4,
        "eval_batch_size": 4,
        "num_workers": 0,
        "val_split_mode": "same_as_test",
        "seed": 0,
    }
    return Folder(**{**arguments, **overrides})  # type: ignore[arg-type]


def engine_in(folder: Path, **arguments: object) -> Engine:
    """Build a quiet Engine on the CPU that writes under a folder."""
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    return Engine(default_root_dir=folder, **{**quiet, **arguments})  # type: ignore[arg-type]


def small(**arguments: object) -> Sgfr:
    """Build a model of small images with a small bank, without pictures and metrics."""
    size = {} if "pre_processor" in arguments else {"image_size": 128}
    return Sgfr(**{"bank_size": 200, "visualizer": False, "evaluator": False, **size, **arguments})  # type: ignore[arg-type]


def fit(model: Sgfr, datamodule: Folder, folder: Path, **arguments: object) -> Engine:
    """Fit a model and return the Engine that did."""
    engine = engine_in(folder, **arguments)
    engine.fit(model, datamodule=datamodule)
    return engine


def nominal_threshold(scores: Sequence[float], rate: float) -> float:
    """The threshold that good images alone choose."""
    return with_margin(conformal_threshold(scores, rate), scores)


def stored_bytes(model: Sgfr) -> int:
    """Of what an exported file must hold: the backbone, and of each bank what its solver needs."""
    tensors = list(model.model.embedder.extractor.parameters())
    tensors += [getattr(bank.solver, "operator", bank.atoms) for bank in model.model.banks]
    return sum(4 * tensor.numel() for tensor in tensors)


def atoms(model: Sgfr) -> torch.Tensor:
    """All atoms of a fitted model, one after the other."""
    return torch.cat([bank.atoms.flatten() for bank in model.model.banks])


def distances(points: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Distance of each point from its nearest atom."""
    return torch.cdist(points.double(), bank.double()).amin(1)


def coverage(points: torch.Tensor, bank: torch.Tensor) -> float:
    """The largest of them."""
    return float(distances(points, bank).max())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
