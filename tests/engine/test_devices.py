"""Devices without 64 bits of floating point, as Apple's: PyTorch's ``meta`` stands in for one, as
far as it goes.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from anomalib_sgfr import Sgfr, SgfrModel, SubspaceSampler
from anomalib_sgfr.core import linear_algebra as casts
from anomalib_sgfr.core.self_expression import ridge_code, ridge_operator
from anomalib_sgfr.memory_bank import MemoryBank
from tests.conftest import engine_in, folder_datamodule, small


@pytest.fixture
def poor() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "_WITHOUT_DOUBLES", {"meta"})
        yield "meta"


def doubles_there(module: nn.Module, device: str) -> list[str]:
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    there = {name: tensor for name, tensor in tensors.items() if tensor.device.type == device}
    assert any(name.endswith("stored") for name in there)
    return [name for name, tensor in there.items() if tensor.dtype == torch.float64]


def test_apples_device_is_one_of_them() -> None:
    assert casts.float64_device(torch.device("mps")) == torch.device("cpu")
    assert casts.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_accounts_stay_on_the_cpu_and_their_numbers_with_them(poor: str) -> None:
    model = SgfrModel()
    for bank in model.banks:
        bank.set(torch.rand(7, 3), threshold=0.25)
    squares = model.banks[0].squares.clone()
    model.to(poor)
    assert not doubles_there(model, poor)
    assert torch.equal(model.banks[0].squares, squares)
    assert float(model.banks[0].threshold) == 0.25


def test_a_bank_takes_there_what_was_learnt_here(poor: str) -> None:
    bank = MemoryBank().to(poor)
    bank.set(torch.rand(7, 3))
    assert (
        bank.stored.device.type
        == bank.radius.device.type
        == bank.solver.index_atoms.device.type
        == poor
    )
    assert bank.squares.device.type == "cpu"


def test_a_checkpoint_is_restored_to_it(poor: str, parts: Path, tmp_path: Path) -> None:
    engine = engine_in(tmp_path)
    engine.fit(small(bank_size=20, image_size=64), datamodule=folder_datamodule(parts))
    model = Sgfr.load_from_checkpoint(engine.best_model_path, map_location=poor)
    assert not doubles_there(model, poor)


def test_a_pickled_bank_holds_none() -> None:
    bank = MemoryBank()
    bank.set(torch.rand(7, 3), threshold=0.25)
    assert torch.float64 not in {value.dtype for value in bank.__getstate__()["_buffers"].values()}
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.squares, bank.squares)
    assert again.squares.dtype == again.threshold.dtype == torch.float64
    assert float(again.threshold) == 0.25


def test_what_is_computed_in_64_bits_is_computed_on_the_cpu_where_a_device_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []

    def here(device: torch.device) -> torch.device:
        asked.append(device)
        return torch.device("cpu")

    for module in ("linear_algebra", "sampler"):
        monkeypatch.setattr(f"anomalib_sgfr.core.{module}.float64_device", here)
    sampler = SubspaceSampler(4)
    sampler.observe(torch.rand(5, 3))
    assert len(asked) == 1
    ridge_operator(torch.rand(5, 3), 0.1)
    ridge_code(torch.rand(2, 3), torch.rand(5, 3), 0.1)
    assert len(asked) == 3
