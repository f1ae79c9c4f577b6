"""Loops of exported graphs: the results of one step over everything, in bounded parts."""

import pytest
import torch
from torch import Tensor, nn

from anomalib_sgfr.core.chunks import by_parts, mapped


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("atoms", torch.randn(7, 3))

    def step(self, patches: Tensor) -> Tensor:
        return (patches[:, None] - self.atoms).square().sum(2)

    def forward(self, patches: Tensor) -> Tensor:
        return by_parts(self.step, patches)


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (1, None),
        (2048, None),
        (2050, 1025),
        (4096, 2048),
        (61 * 67, 67),
        (4099, None),  # a prime: no equal parts
    ],
)
def test_patches_are_taken_in_the_largest_equal_parts(number: int, part: int | None) -> None:
    loop, patches = Loop(), torch.randn(number, 3)
    program = torch.export.export(loop, (patches,))
    loops = [node for node in program.graph.nodes if str(node.target) == "scan"]
    shapes = [node.args[2][0].meta["val"].shape for node in loops]
    assert shapes == ([(number // part, part, 3)] if part else [])
    assert torch.equal(program.module()(patches), loop.step(patches))


def test_parts_of_several_tensors_are_taken_together() -> None:
    class Both(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return mapped(lambda a, b: torch.cat((a.flatten(), b.flatten())), one, other)

    one, other = torch.randn(3, 4, 2), torch.randn(3, 5)
    found = torch.export.export(Both(), (one, other)).module()(one, other)
    assert torch.equal(found, torch.cat((one.flatten(1), other), 1))
