"""What a fit learns: the samplers it starts with, and what it makes of them when the stream has passed."""

from collections.abc import Mapping, Sequence

import torch

from anomalib_sgfr.bank import Bank, BankState
from anomalib_sgfr.core.cover import Cover, centred
from anomalib_sgfr.core.processes import several
from anomalib_sgfr.core.provenance import renumbered
from anomalib_sgfr.core.sampling import SubspaceSampler
from anomalib_sgfr.features.layers import Scale
from anomalib_sgfr.fitting.distributed import unite
from anomalib_sgfr.torch_model import Learnt

__all__ = ["bank_sizes", "learn", "samplers_for"]

_SIZES = {8: 1000, 31: 5000, float("inf"): 3000}  # by the largest stride


def bank_sizes(scales: Sequence[Scale], bank_size: int | Sequence[int] | None) -> list[int]:
    """Most atoms of each scale's bank.

    Args:
        scales (Sequence[Scale]): The finest first.
        bank_size (int | Sequence[int] | None): One number for all, or one for each scale. ``None`` for 1,000 up to
            stride 8, which has many patches alike, 5,000 beyond, and 3,000 from stride 32, which has few.

    Returns:
        list[int]: One for each scale.

    Raises:
        ValueError: If there is not one for each scale, or one is below one.
    """
    if bank_size is None:
        return [next(size for stride, size in _SIZES.items() if scale.stride <= stride) for scale in scales]
    if isinstance(bank_size, int):
        sizes = [bank_size] * len(scales)
    else:
        sizes = list(bank_size)
        if len(sizes) != len(scales):
            strides = ", ".join(str(scale.stride) for scale in scales)
            msg = f"bank_size must be one number, or one for each scale (of strides {strides}), got {sizes}."
            raise ValueError(msg)
    for size in sizes:
        SubspaceSampler(size)  # refuses what is out of range
    return sizes


def samplers_for(
    banks: Sequence[Bank], sizes: Sequence[int], tolerance: float, update: bool, global_rank: int
) -> list[SubspaceSampler]:
    """Samplers for a fit that starts now, one for each scale.

    Args:
        banks (Sequence[Bank]): The model's.
        sizes (Sequence[int]): Largest number of atoms of each.
        tolerance (float): Of the sum over scales of what is left of an embedding: each may use up an equal share.
        update (bool): Whether to go on from the atoms that the banks have.
        global_rank (int): Of this process; what was seen before counts once among all of them.

    Returns:
        list[SubspaceSampler]: In the order of the banks.
    """
    samplers = []
    for bank, size in zip(banks, sizes, strict=True):
        sampler = SubspaceSampler(size, tolerance / len(banks))
        if update:
            cover = bank.cover
            if global_rank > 0:
                cover = cover._replace(count=torch.zeros_like(cover.count), squares=torch.zeros_like(cover.squares))
            sampler.resume(cover, float(bank.threshold))
        samplers.append(sampler)
    return samplers


def learn(
    samplers: Sequence[SubspaceSampler],
    images: Mapping[int, str],
    earlier: Learnt | None = None,
    device: torch.device | None = None,
) -> Learnt:
    """Make of what samplers hold what a model is to take into use, in all processes together.

    A process whose samplers have observed nothing takes part without atoms.

    Args:
        samplers (Sequence[SubspaceSampler]): Of each scale.
        images (Mapping[int, str]): Paths by the numbers in the atoms' origins.
        earlier (Learnt | None): What the fit adds to, if anything. Atoms then stay where they are, instead of moving to
            the mean of what they stand for, and residuals are measured in the same unit as before. A full bank keeps
            only a part of its earlier atoms, so that earlier images may score otherwise.
        device (torch.device | None): One that the process group communicates on.

    Returns:
        Learnt: The same in all processes.

    Raises:
        ValueError: If no process has observed anything.
    """
    found = [
        (Cover.empty(device), sampler.threshold_)
        if several() and not sampler.patches_seen_
        else sampler.learnt(sampler.working_size if several() else None)
        for sampler in samplers
    ]
    covers, paths = renumbered([cover for cover, _ in found], images)
    own = Learnt([BankState(cover, threshold) for cover, (_, threshold) in zip(covers, found, strict=True)], paths)
    learnt = unite(own, [sampler.bank_size for sampler in samplers], samplers[0].tolerance)
    if earlier is not None:
        both = zip(learnt.states, earlier.states, strict=True)
        states = [state._replace(nominal=before.nominal, nuisance=before.nuisance) for state, before in both]
        return learnt._replace(states=states)
    moved = [
        state._replace(
            cover=centred(state.cover, sampler.tolerance if state.threshold <= sampler.tolerance else torch.inf)
        )
        for state, sampler in zip(learnt.states, samplers, strict=True)
    ]
    return learnt._replace(states=moved)
