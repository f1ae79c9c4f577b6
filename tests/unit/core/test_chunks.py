"""Loops of exported graphs."""

import pytest
import torch
from torch import Tensor, nn

from anomalib_sgfr.core.chunks import in_parts, mapped, number_of_parts


@pytest.mark.parametrize(
    ("numbers", "parts"),
    [
        ([1024, 1024, 256, 64], 1),  # 256 x 256 pixels
        ([2048], 1),
        ([2049], 2),
        ([128 * 128, 128 * 128, 64 * 64, 32 * 32], 8),  # 1024 x 1024 pixels
        ([125 * 125, 63 * 63, 32 * 32], 8),  # 1000 x 1000 pixels
        ([4099, 1], 3),
    ],
)
def test_parts_are_as_few_as_memory_allows(numbers: list[int], parts: int) -> None:
    assert number_of_parts(numbers) == parts
    for number in numbers:
        patches = torch.arange(2.0 * number).reshape(2, number, 1) + 1.0
        found = in_parts(patches, parts)
        assert found.shape == (2 * parts, -(-number // parts), 1)
        assert found.shape[1] <= 2048
        assert torch.equal(found.reshape(2, -1, 1)[:, :number], patches)
        assert not found.reshape(2, -1, 1)[:, number:].any()


def test_parts_of_several_tensors_are_taken_together() -> None:
    class Both(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return mapped(lambda a, b: torch.cat((a.flatten(), b.flatten())), one, other)

    one, other = torch.randn(3, 4, 2), torch.randn(3, 5)
    found = torch.export.export(Both(), (one, other)).module()(one, other)
    assert torch.equal(found, torch.cat((one.flatten(1), other), 1))
