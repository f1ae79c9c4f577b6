"""Whether a graphics card's kernels do the work: where they can run, and answer a small question as PyTorch does."""

import functools
import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from anomalib_sgfr.core import kernels
from anomalib_sgfr.core.search import search_index
from anomalib_sgfr.core.self_expression import affine_distance

__all__ = ["serve"]


def serve(tensor: Tensor) -> bool:
    """Whether kernels do the work for such a tensor: on a card, Triton and its C compiler are there, not of 64 bits."""
    return (tensor.is_cuda or _is_interpreted()) and tensor.dtype != torch.float64 and _usable()


def _usable() -> bool:
    return _tried()


# All that `torch.compiler.assume_constant_result` does, but for the import of a compiler: two seconds.
vars(_usable)["_dynamo_marked_constant"] = True


@functools.cache
def _tried() -> bool:
    if find_spec("triton") is None or not (torch.cuda.is_available() or _is_interpreted()):
        return False
    try:
        right = _are_right(torch.device("cpu" if _is_interpreted() else "cuda"))
        reason = "" if right else "what it computes is wrong"
    except Exception as error:  # noqa: BLE001  # of drivers, compilers and Triton; whatever it is, there is another way
        reason = f"{type(error).__name__}: {error}"
    if reason:
        message = f"Triton's kernels cannot be used, and Sgfr is slower on a graphics card without them: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return not reason


def _are_right(device: torch.device) -> bool:
    """Whether each kernel answers one small question as PyTorch does."""
    points = torch.linspace(0.0, 9.0, 40, device=device).sin().reshape(20, 2) * 3.0
    mutual = (points[:, None] - points).square().sum(2)
    row, squared = kernels.nearest_in_turn(points[10:], points[:10], 10, 0.0)
    right = torch.equal(row, mutual[10:, :10].argmin(1)) and torch.allclose(squared, mutual[10:, :10].amin(1))

    alive = torch.ones(20, dtype=torch.bool)
    for place in range(20):
        alive[place + 1 :] &= ~(alive[place] & (mutual[place, place + 1 :].cpu() <= 1.0))
    right &= torch.equal(kernels.separated_of_few(mutual, 1.0).cpu(), alive)

    left, order = mutual[0].sort(descending=True)
    among = mutual[order][:, order].contiguous()
    taken = kernels.farthest_of_few(left, among, torch.zeros_like(left), 3, left[-1], 0.0)
    expected = [0]
    for _ in range(2):
        left = torch.minimum(left, mutual[order[expected[-1]], order])
        expected.append(int(left.argmax()))
    right &= taken.tolist() == expected + [-1] * 17

    bank, embedding = points[:8], points[8:].T.reshape(1, 2, 3, 4).contiguous()
    pooled = kernels.binomial(embedding).sum((2, 3))
    right &= torch.allclose(256.0 * pooled, _all_weighted(embedding), rtol=1e-4, atol=1e-3)
    index, unit = search_index(bank), points.new_full((), 2.0)
    found = kernels.affine_lengths(embedding, index, kernels.columns_of(index), 8, 5, 0.5, unit)
    return right and torch.allclose(
        2.0 * found.flatten(), affine_distance(points[8:], bank, 5, 0.5), rtol=1e-4, atol=1e-5
    )


def _all_weighted(feature: Tensor) -> Tensor:
    """What all that ``binomial`` finds sums to: each value as often as it is within reach, times its weight."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=feature.device)

    def weights(length: int) -> Tensor:
        reach = torch.arange(length, device=feature.device)[:, None] + torch.arange(-2, 3, device=feature.device)
        return (line * ((reach >= 0) & (reach < length))).sum(1)

    return (feature * (weights(feature.shape[2])[:, None] * weights(feature.shape[3]))).sum((2, 3))


def _is_interpreted() -> bool:
    """Whether Triton runs on the CPU, slowly: how the kernels are tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"
