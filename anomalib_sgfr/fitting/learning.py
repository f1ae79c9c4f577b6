"""What a fit learns: the samplers it starts with, and what it makes of them when the stream has passed."""

from collections.abc import Mapping, Sequence

import torch

from anomalib_sgfr.bank import Bank, BankState
from anomalib_sgfr.core.cover import centred
from anomalib_sgfr.core.provenance import renumbered
from anomalib_sgfr.core.sampling import SubspaceSampler
from anomalib_sgfr.fitting.distributed import several, unite
from anomalib_sgfr.torch_model import Learnt

__all__ = ["learn", "samplers_for"]


def samplers_for(
    banks: Sequence[Bank], bank_size: int, tolerance: float, update: bool, global_rank: int
) -> list[SubspaceSampler]:
    """Samplers for a fit that starts now, one for each scale.

    Args:
        banks (Sequence[Bank]): The model's.
        bank_size (int): Largest number of atoms of each.
        tolerance (float): Of the anomaly map, which sums the scales: each may use up an equal share.
        update (bool): Whether to go on from the atoms that the banks have.
        global_rank (int): Of this process; what was seen before counts once among all of them.

    Returns:
        list[SubspaceSampler]: In the order of the banks.
    """
    samplers = []
    for bank in banks:
        sampler = SubspaceSampler(bank_size, tolerance / len(banks))
        if update:
            cover = bank.cover
            if global_rank > 0:
                cover = cover._replace(count=torch.zeros_like(cover.count), squares=torch.zeros_like(cover.squares))
            sampler.resume(cover, float(bank.threshold))
        samplers.append(sampler)
    return samplers


def learn(samplers: Sequence[SubspaceSampler], images: Mapping[int, str], stay: bool) -> Learnt:
    """Make of what samplers hold what a model is to take into use, in all processes together.

    Args:
        samplers (Sequence[SubspaceSampler]): Of each scale.
        images (Mapping[int, str]): Paths by the numbers in the atoms' origins.
        stay (bool): Whether atoms stay where they are, and with them what was certified of an earlier bank, instead of
            moving to the mean of what they stand for.

    Returns:
        Learnt: The same in all processes.
    """
    found = [sampler.learnt(sampler.working_size if several() else None) for sampler in samplers]
    covers, paths = renumbered([cover for cover, _ in found], images)
    own = Learnt([BankState(cover, threshold) for cover, (_, threshold) in zip(covers, found, strict=True)], paths)
    learnt = unite(own, samplers[0].bank_size, samplers[0].tolerance)
    if stay:
        return learnt
    moved = [
        state._replace(
            cover=centred(state.cover, sampler.tolerance if state.threshold <= sampler.tolerance else torch.inf)
        )
        for state, sampler in zip(learnt.states, samplers, strict=True)
    ]
    return learnt._replace(states=moved)
