"""What a fit learns: the samplers it starts with, and the banks it makes of them when the stream has passed."""

from collections.abc import Mapping, Sequence

import torch

from anomalib_sgfr.bank import Bank
from anomalib_sgfr.core.cover import centred
from anomalib_sgfr.core.provenance import renumbered
from anomalib_sgfr.core.sampling import SubspaceSampler
from anomalib_sgfr.fitting.distributed import Learnt, several, unite
from anomalib_sgfr.torch_model import SgfrModel

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


def learn(
    model: SgfrModel,
    samplers: Sequence[SubspaceSampler],
    grids: Sequence[tuple[int, int]],
    images: Mapping[int, str],
    stay: bool,
) -> None:
    """Give a model the banks that samplers learnt, in all processes together.

    Args:
        model (SgfrModel): Whose banks are replaced.
        samplers (Sequence[SubspaceSampler]): Of each scale.
        grids (Sequence[tuple[int, int]]): Rows and columns of an image's patches, of each scale.
        images (Mapping[int, str]): Paths by the numbers in the atoms' origins.
        stay (bool): Whether atoms stay where they are, and with them what was certified of an earlier bank, instead of
            moving to the mean of what they stand for.
    """
    found = [sampler.learnt(sampler.working_size if several() else None) for sampler in samplers]
    covers, paths = renumbered([cover for cover, _ in found], images)
    own = Learnt(covers, [threshold for _, threshold in found], paths)
    learnt = unite(own, samplers[0].bank_size, samplers[0].tolerance)
    for bank, sampler, cover, threshold, grid in zip(
        model.banks, samplers, learnt.covers, learnt.thresholds, grids, strict=True
    ):
        limit = sampler.tolerance if threshold <= sampler.tolerance else torch.inf
        bank.set(cover if stay else centred(cover, limit), threshold, grid)
    model.images = learnt.images
