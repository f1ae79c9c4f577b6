"""What scores depend on and what they do not: repetition, workers, batches, precision."""

import gc
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset

from anomalib_sgfr import Sgfr
from tests.conftest import atoms, engine_in, folder_datamodule, small

SOLVERS = ("affine", "omp", "ridge")


def fitted(parts: Path, folder: Path, solver: str = "affine", precision: str = "32-true", **data: int) -> Sgfr:
    torch.manual_seed(len(data))  # the argument is stronger
    model = small(bank_size=60, solver=solver, image_size=64, seed=0)
    engine_in(folder, precision=precision).fit(model, datamodule=folder_datamodule(parts, **data))
    return model


def scores(model: Sgfr, parts: Path, folder: Path, precision: str = "32-true") -> torch.Tensor:
    engine = engine_in(folder, precision=precision)
    batches = engine.predict(model, dataset=PredictDataset(parts / "bad"))
    assert {batch.pred_score.dtype for batch in batches} == {torch.float32}
    return torch.cat([batch.pred_score.flatten() for batch in batches])


@pytest.fixture(scope="module")
def references(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sgfr]:
    return {solver: fitted(parts, tmp_path_factory.mktemp(solver), solver) for solver in SOLVERS}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_fit_is_bit_equal_whoever_loads_the_images(
    solver: str, references: dict[str, Sgfr], parts: Path, tmp_path: Path
) -> None:
    reference = references[solver]
    again = fitted(parts, tmp_path, solver, num_workers=2 * (solver == "affine"))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores(again, parts, tmp_path), scores(reference, parts, tmp_path), rtol=0, atol=0)


@pytest.mark.parametrize("data", [{"train_batch_size": 3}, {"eval_batch_size": 1}])
def test_other_batches_differ_by_rounding(
    data: dict[str, int], references: dict[str, Sgfr], parts: Path, tmp_path: Path
) -> None:
    one, other = references["affine"], fitted(parts, tmp_path, **data)
    assert atoms(one).shape == atoms(other).shape
    torch.testing.assert_close(scores(one, parts, tmp_path), scores(other, parts, tmp_path), rtol=0, atol=1e-4)


# on a CPU Lightning has bf16-mixed run for 16-mixed
@pytest.mark.parametrize(
    ("solver", "precision", "most"),
    [
        ("affine", "64-true", 1e-5),
        ("affine", "bf16-mixed", 0.01),
        ("affine", "16-mixed", 0.01),
        ("affine", "16-true", 0.01),
        ("affine", "bf16-true", 0.01),
        ("omp", "bf16-true", 0.01),
        ("ridge", "64-true", 1e-5),
    ],
)
def test_every_precision_scores_close_to_32_bits(
    solver: str, precision: str, most: float, references: dict[str, Sgfr], parts: Path, tmp_path: Path
) -> None:
    expected = scores(references[solver], parts, tmp_path)
    other = fitted(parts, tmp_path, solver, precision)
    for found in (scores(other, parts, tmp_path, precision), scores(other, parts, tmp_path)):
        torch.testing.assert_close(found, expected, rtol=0, atol=most)
    assert {bank.stored.dtype for bank in other.model.banks} == {torch.float16}


def test_a_precision_that_alters_the_backbone_is_refused() -> None:
    model = small()
    model._trainer = SimpleNamespace(precision="transformer-engine")
    with pytest.raises(ValueError, match=r"precision must be one of 32-true, .*, got 'transformer-engine'"):
        model.setup("fit")


def test_memory_stays_flat_over_images_of_ever_new_sizes(references: dict[str, Sgfr]) -> None:
    model = references["affine"]
    held = []
    for number in range(90):
        if number == 30:  # what is kept of a few sizes is there
            tracemalloc.start()
        model(np.full((40 + number, 200 - number, 3), number, np.uint8))
        if number % 4 == 0:
            model.model(torch.zeros(1, 3, 32 + 4 * (number % 40), 64))
        if number in {59, 89}:
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 20_000, held
