"""Loops of exported graphs."""

import pytest
import torch
from torch import Tensor, nn

from anomalib_sgfr.core.chunks import equal_parts, mapped


@pytest.mark.parametrize(
    ("numbers", "parts"),
    [
        ([1024, 1024, 256, 64], 1),  # 256 x 256 pixels
        ([2048], 1),
        ([2050], 2),
        ([128 * 128, 128 * 128, 64 * 64, 32 * 32], 8),  # 1024 x 1024 pixels
        ([188 * 248, 94 * 124, 47 * 62], 31),  # 23 would do for the largest, but divides none
        ([61 * 67], 61),
        ([4099], 4099),  # a prime
        ([4096, 1], 1),
    ],
)
def test_parts_are_equal_and_as_few_as_memory_allows(numbers: list[int], parts: int) -> None:
    assert equal_parts(numbers) == parts


def test_parts_of_several_tensors_are_taken_together() -> None:
    class Both(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return mapped(lambda a, b: torch.cat((a.flatten(), b.flatten())), one, other)

    one, other = torch.randn(3, 4, 2), torch.randn(3, 5)
    found = torch.export.export(Both(), (one, other)).module()(one, other)
    assert torch.equal(found, torch.cat((one.flatten(1), other), 1))
