"""What processes unite and exchange, in threads."""

from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Max
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.memory_bank import MemoryBankState
from anomalib_sgfr.torch_model import FittedState
from anomalib_sgfr.training.distributed import (
    DataParallelAnchor,
    drop_padding,
    support_idle_processes,
    unite,
)
from anomalib_sgfr.training.fit import build_banks
from tests.threaded import in_threads


def fitted_state(points: list[float], threshold: float, image: str) -> FittedState:
    """Atoms on a line, all of one image."""
    origin = torch.zeros(len(points), 5, dtype=torch.int32)
    return FittedState(
        [MemoryBankState(Clusters.of(torch.tensor(points)[:, None], origin), threshold)], [image]
    )


@pytest.mark.parametrize("largest", range(3))
def test_the_threshold_is_no_smaller_than_any_processs(largest: int) -> None:
    thresholds = [1.0 + 6.0 * (rank == largest) for rank in range(3)]
    for united in in_threads(
        lambda rank: unite(fitted_state([10.0 * rank], thresholds[rank], f"{rank}"), [3])
    ):
        assert united.states[0].threshold == 7.0
        atoms, origins = united.states[0].clusters.atoms, united.states[0].clusters.origin
        where = {
            united.images[number]: atom
            for number, (atom,) in zip(origins[:, 0].tolist(), atoms.tolist(), strict=True)
        }
        assert where == {"0": 0.0, "1": 10.0, "2": 20.0}


@pytest.mark.parametrize(("tolerance", "atoms"), [(0.0, 3), (0.5, 2)])
def test_atoms_of_different_processes_stand_for_each_other_within_the_tolerance(
    tolerance: float, atoms: int
) -> None:
    points = [[0.0], [0.25], [9.0]]
    for united in in_threads(
        lambda rank: unite(fitted_state(points[rank], tolerance, f"{rank}"), [3], tolerance)
    ):
        assert len(united.states[0].clusters.atoms) == atoms
        assert int(united.states[0].clusters.count.sum()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("busy", [[0], [1], [0, 2]])
def test_a_process_without_images_takes_part_in_a_fit(busy: list[int], dtype: torch.dtype) -> None:
    points = torch.arange(8, dtype=dtype).reshape(4, 2)

    def own(rank: int) -> FittedState:
        samplers = [SubspaceSampler(9), SubspaceSampler(9)]
        for scale, sampler in enumerate(samplers):
            if rank in busy:
                origin = torch.zeros(4, 5, dtype=torch.int32)
                sampler.observe(points + 100 * rank + 50 * scale, origin)
        return build_banks(samplers, {0: f"{rank}"} if rank in busy else {})

    for united in in_threads(own):
        assert united.images == [f"{rank}" for rank in busy]
        for scale, state in enumerate(united.states):
            seen = torch.cat([points + 100 * rank + 50 * scale for rank in busy])
            assert state.clusters.atoms.dtype == dtype
            assert torch.equal(state.clusters.atoms.sort(0).values, seen)


def test_all_refuse_a_fit_without_any_image() -> None:
    ended = in_threads(lambda _: build_banks([SubspaceSampler(9)], {}))
    assert [str(error) for error in ended] == [
        "no nominal embedding was observed: the training set is empty."
    ] * 3
    assert all(isinstance(error, ValueError) for error in ended)


class Computing(Evaluator):
    """Computes at the end of a test, without a trainer to log to."""

    def on_test_epoch_end(self, *_: object) -> None:  # type: ignore[override]
        self.found = [metric.compute() for metric in self.test_metrics]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_metrics_are_computed_by_processes_that_never_updated_them(dtype: torch.dtype) -> None:
    maps = torch.rand(4, 8, 8).to(dtype)
    masks = maps > 0.8
    batch = ImageBatch(
        image=torch.rand(4, 3, 8, 8),
        anomaly_map=maps,
        gt_mask=masks,
        pred_score=torch.tensor([0.1, 0.4, 0.35, 0.8], dtype=dtype),
        gt_label=torch.tensor([False, False, True, True]),
    )
    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]

    def own(rank: int) -> list[Tensor]:
        evaluator = Computing(
            test_metrics=[
                AUROC(image),
                F1Max(image, strict=False),
                AUROC(pixel, strict=False),
                AUPRO(pixel),
            ]
        )
        support_idle_processes(evaluator)
        its = batch if rank == 1 else ImageBatch(image=torch.empty(0, 3, 8, 8))
        evaluator.on_test_batch_end(None, None, its, its, 0)  # type: ignore[arg-type]
        evaluator.on_test_epoch_end(None, None)
        return evaluator.found

    alone = in_threads(lambda _: own(1), world=1)[0]
    assert [float(value) for value in alone[:2]] == pytest.approx([0.75, 0.8])
    for found in in_threads(own):
        assert [float(value) for value in found] == pytest.approx([float(value) for value in alone])


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_padding_is_dropped_of_each_of_several_loaders(kind: Any) -> None:
    loaders = [
        DataLoader(
            TensorDataset(torch.arange(images)),
            2,
            sampler=DistributedSampler(range(images), 3, 2, shuffle=False),
        )  # type: ignore[arg-type]
        for images in (6, 1)
    ]
    several = dict(zip("ab", loaders, strict=True)) if kind is dict else kind(loaders)
    for number, kept in ((0, 2), (1, 0)):
        batch = ImageBatch(image=torch.rand(len(loaders[number].sampler), 3, 8, 8))  # type: ignore[arg-type]
        drop_padding(batch, several, 0, number)
        assert len(batch.image) == kept


def test_the_anchor_takes_a_gradient_and_is_in_no_state() -> None:
    module = torch.nn.Module()
    module.anchor = DataParallelAnchor(torch.device("cpu"))
    loss = module.anchor()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert [float(part.grad) for part in module.parameters() if part.grad is not None] == [0.0]
    assert module.state_dict() == {}
    module.load_state_dict({})
