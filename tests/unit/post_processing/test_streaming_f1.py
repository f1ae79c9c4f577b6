"""The streaming threshold against scikit-learn's curve of all values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_curve
from torch import Tensor

from anomalib_sgfr.post_processing.thresholds import StreamingF1Threshold
from tests.threaded import in_threads

WIDTH = 2.0**-14


def threshold_of(values: Tensor, positive: Tensor, batches: int = 1) -> float | None:
    found = StreamingF1Threshold()
    for part, its in zip(values.tensor_split(batches), positive.tensor_split(batches), strict=True):
        found.update(part, its)
    return found.compute()


def drawn(seed: int, scale: float, apart: float) -> tuple[Tensor, Tensor]:
    """Values like those of maps, of which one in fifty belongs to a defect."""
    generator = np.random.default_rng(seed)
    positive = generator.random(20_000) < 0.02
    return torch.tensor(scale * generator.lognormal(apart * positive, 0.5)), torch.tensor(positive)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e5])
@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_parts_as_well_as_the_best_of_all_values(seed: int, scale: float, apart: float) -> None:
    values, positive = drawn(seed, scale, apart)
    threshold = threshold_of(values.float(), positive, batches=7)
    assert threshold is not None
    precision, recall, _ = precision_recall_curve(positive, values)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert best - 1e-4 < f1_score(positive, values >= threshold) <= best + 1e-9


@given(st.lists(st.floats(2.0**-31, 2.0**31, width=32), min_size=2, max_size=20), st.data())
def test_it_lies_within_a_bin_below_the_lowest_positive_where_classes_are_apart(
    values: list[float], data: st.DataObject
) -> None:
    levels = torch.tensor(values).sort().values
    cut = data.draw(st.integers(1, len(values) - 1))
    if levels[cut - 1] * (1 + WIDTH) ** 2 >= levels[cut]:
        return  # they may share a bin
    threshold = threshold_of(levels, torch.arange(len(values)) >= cut)
    assert threshold is not None
    assert levels[cut - 1] < threshold <= levels[cut] < threshold * (1 + WIDTH) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions_and_shapes_are_taken(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    assert threshold_of(values, (values > 2.5).int()) == 3.0


def test_values_beyond_the_bins_are_in_the_first_and_the_last() -> None:
    values = torch.tensor([-1.0, 0.0, 1e-30, 1e30, torch.inf, torch.nan])
    threshold = threshold_of(values, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert threshold is not None
    assert 4e9 < threshold < 2.0**32
    assert threshold_of(values[:3], torch.tensor([1, 1, 0])) == 0.0


@pytest.mark.parametrize("positive", [[], [0, 0], [1, 1]])
def test_one_class_alone_has_no_threshold(positive: list[int]) -> None:
    assert threshold_of(torch.ones(len(positive)), torch.tensor(positive)) is None
    assert StreamingF1Threshold().compute() is None


def test_what_is_forgotten_does_not_count() -> None:
    found = StreamingF1Threshold()
    found.update(torch.tensor([5.0, 6.0]), torch.tensor([0, 1]))
    found.reset()
    found.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert found.compute() == 2.0


def test_numbers_of_values_and_classes_must_agree() -> None:
    with pytest.raises(ValueError, match="as many elements as values, 3, got 2"):
        StreamingF1Threshold().update(torch.ones(3), torch.ones(2))


def test_memory_does_not_grow_with_the_values() -> None:
    found = StreamingF1Threshold()
    sizes = []
    for _ in range(3):
        found.update(torch.rand(2, 1, 64, 64), torch.rand(2, 64, 64) < 0.1)
        sizes.append(
            [(part.shape, part.dtype) for part in vars(found).values() if isinstance(part, Tensor)]
        )
    assert sizes[0] == sizes[1] == sizes[2]
    assert sum(shape.numel() for shape, _ in sizes[0]) * 8 == 16 * 2**20


def test_processes_find_what_one_finds_though_some_have_nothing() -> None:
    values, positive = drawn(0, 1.0, 1.0)

    def own(rank: int) -> float | None:
        found = StreamingF1Threshold()
        if rank != 1:
            found.update(values[rank // 2 :: 2], positive[rank // 2 :: 2])
        return found.compute()

    assert in_threads(own) == [threshold_of(values, positive)] * 3
