"""Banks as a fit makes them, of patches at hand."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters, recentred
from anomalib_sgfr.core.sampler import WORKING_SIZE, SubspaceSampler

__all__ = ["scale_clusters"]


@torch.no_grad()
def scale_clusters(
    batches: Sequence[Tensor], sizes: Iterable[int]
) -> Iterator[tuple[int, Clusters]]:
    """Banks of several sizes in one pass; small ones are chosen from the same atoms.

    Args:
        batches (Sequence[Tensor]): Patches of one scale as the fit sees them, each ``(n, d)``.
        sizes (Iterable[int]): Most atoms of each bank.

    Yields:
        tuple[int, Clusters]: Each size, the smallest first, and the atoms with what they stand for.
    """
    sampler: SubspaceSampler | None = None
    for size in sorted(sizes):
        working_size = max(size, WORKING_SIZE)
        if sampler is None or sampler.bank_size != working_size:
            sampler = SubspaceSampler(working_size)
            for batch in batches:
                sampler.observe(batch)
        yield size, recentred(sampler.fitted_state(size)[0])
