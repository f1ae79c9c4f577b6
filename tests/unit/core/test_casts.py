"""Modules that casts leave alone, and moves do not."""

import pytest
import torch

from anomalib_sgfr.core.linear_algebra import KeepsDtype


class Module(KeepsDtype):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("single", torch.rand(3))
        self.register_buffer("count", torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_change_neither_type_nor_digits(dtype: torch.dtype) -> None:
    module = Module()
    before = module.single.clone()
    assert module.to(dtype) is module
    assert module.single.dtype == torch.float32
    assert torch.equal(module.single, before)
    assert module.count.dtype == torch.int64


def test_a_move_that_casts_too_only_moves() -> None:
    for move in (("meta",), ("meta", torch.float16)):
        module = Module().to(*move)
        assert (module.single.device.type, module.single.dtype) == ("meta", torch.float32)
        assert (module.count.device.type, module.count.dtype) == ("meta", torch.int64)
