"""Properties that hold whatever the embeddings: of the solvers, the sampler and the certificate."""

import itertools
from random import Random

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from anomalib_sgfr.core.certificate import certify
from anomalib_sgfr.core.clusters import Clusters, merge
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.core.self_expression import affine, affine_distance, omp
from anomalib_sgfr.core.solvers import SOLVERS

hypothesis.settings.register_profile("here", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")

VALUES = st.floats(-50, 50, width=32).map(lambda value: 0.0 if abs(value) < 1e-3 else value)


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None, rows: int = 24) -> Tensor:
    """Embeddings with what real ones have: duplicates, zeros, dependent rows."""
    width = columns or draw(st.integers(1, 9))
    made = draw(arrays.arrays(np.float64, (draw(st.integers(1, rows)), width), elements=VALUES))
    return torch.from_numpy(made)


@st.composite
def targets_and_banks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    width = draw(st.integers(1, 9))
    return draw(matrices(width, 6)), draw(matrices(width, 24))


@hypothesis.given(targets_and_banks(), st.integers(1, 8))
def test_the_affine_residual_is_never_above_the_nearest_neighbours(
    pair: tuple[Tensor, Tensor], k: int
) -> None:
    target, bank = pair
    nearest = torch.cdist(target, bank, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    left = affine(target, bank, k).residual.norm(dim=1)
    assert bool((left <= nearest * (1 + 1e-6) + 1e-6).all())


@hypothesis.given(targets_and_banks(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_order_of_the_bank_does_not_matter(
    pair: tuple[Tensor, Tensor], k: int, random: Random
) -> None:
    target, bank = pair
    order = list(range(len(bank)))
    random.shuffle(order)
    scale = 1.0 + float(target.norm(dim=1).amax() + bank.norm(dim=1).amax())
    one, other = (affine_distance(target, rows, k, 1e-3) for rows in (bank, bank[order]))
    # equally distant atoms at the edge of the support may be chosen either way: their coefficients
    # are zero
    torch.testing.assert_close(one, other, atol=2e-3 * scale, rtol=0)


@hypothesis.given(targets_and_banks())
def test_more_atoms_never_leave_more_of_a_pursuit(pair: tuple[Tensor, Tensor]) -> None:
    target, bank = pair
    left = [omp(target, bank, k).residual.norm(dim=1) for k in range(1, 6)]
    scale = 1.0 + float(target.norm(dim=1).amax())
    for fewer, more in itertools.pairwise(left):
        assert bool((more <= fewer + 1e-6 * scale).all())


@hypothesis.given(
    matrices(4, 60),
    matrices(4, 60),
    st.integers(1, 12),
    st.sampled_from(["affine", "omp", "ridge"]),
)
def test_the_certificate_holds_whatever_the_order_of_merging(
    one: Tensor, two: Tensor, size: int, solver: str
) -> None:
    scale_clusters = []
    for part in (one, two):
        sampler = SubspaceSampler(size, working_size=1)
        for batch in part.split(7):
            sampler.observe(batch)
        scale_clusters.append(sampler.clusters())
    everything = torch.cat((one, two))
    for order in (scale_clusters, scale_clusters[::-1]):
        clusters, _ = merge(order, size)
        certificate = certify(clusters, SOLVERS[solver](3, 1e-3).bound(clusters))
        assert certificate.patches == len(everything)
        nearest = torch.cdist(
            everything, clusters.atoms, compute_mode="donot_use_mm_for_euclid_dist"
        ).amin(1)
        assert float(nearest.amax()) <= float(clusters.radius.amax()) * (1 + 1e-6) + 1e-3
        if solver == "affine":
            left = affine(everything, clusters.atoms, 3, 1e-3).residual.norm(dim=1)
            assert float(left.amax()) <= certificate.largest + 1e-3
            assert float(left.mean()) <= certificate.mean + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@hypothesis.given(pair=targets_and_banks(), k=st.integers(1, 8))
def test_every_precision_gives_finite_residuals_of_its_own(
    dtype: torch.dtype, pair: tuple[Tensor, Tensor], k: int
) -> None:
    target, bank = (part.to(dtype) for part in pair)
    for residual in (affine(target, bank, k, 1e-3).residual, omp(target, bank, k).residual):
        assert residual.dtype == dtype
        assert bool(torch.isfinite(residual).all())
    # a target that is an atom is rebuilt by it, but for what the search by products cannot tell
    # apart
    rounding = max(
        torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0.0
    )
    assert float(affine_distance(bank, bank, 1).amax()) <= 4 * rounding**0.5 * (
        1.0 + float(bank.abs().amax())
    )


@hypothesis.given(matrices(3, 80), st.integers(1, 10), st.integers(1, 30))
def test_every_embedding_counts_once_however_it_is_batched(
    points: Tensor, size: int, batch: int
) -> None:
    sampler = SubspaceSampler(size, working_size=1)
    for part in points.split(batch):
        sampler.observe(part)
    clusters: Clusters = sampler.clusters()
    assert int(clusters.count.sum()) == len(points)
    assert 1 <= len(clusters.atoms) <= size
