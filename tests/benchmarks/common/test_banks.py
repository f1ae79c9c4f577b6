"""Banks of patches at hand: those of the product's sampler."""

import pytest
import torch

from anomalib_sgfr.core.clusters import recentred
from anomalib_sgfr.core.sampler import SubspaceSampler
from benchmarks.common.banks import scale_clusters


@pytest.mark.parametrize("size", [100, 4000])
def test_a_bank_is_that_of_the_product_s_sampler_whatever_others_are_asked_for(size: int) -> None:
    patches = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0)).split(
        3000
    )  # thinned once on the way
    sampler = SubspaceSampler(size)
    for batch in patches:
        sampler.observe(batch)
    expected = recentred(sampler.clusters())
    assert len(expected.atoms) == size
    for sizes in ([size], [size, 1000, 40]):
        found = dict(scale_clusters(patches, sizes))
        assert list(found) == sorted(sizes)
        assert all(
            torch.equal(one, other) for one, other in zip(found[size], expected, strict=True)
        )
