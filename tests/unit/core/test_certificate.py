"""The certificate against a brute-force recomputation of every residual."""

import pytest
import torch
from torch import Tensor

from anomalib_sgfr.core.certificate import certify
from anomalib_sgfr.core.cover import Cover, centred
from anomalib_sgfr.core.sampling import SubspaceSampler
from anomalib_sgfr.core.self_expression import affine, omp, ridge, ridge_operator


def residuals(points: Tensor, bank: Tensor, solver: str, k: int, regularisation: float) -> Tensor:
    found = {
        "affine": lambda: affine(points, bank, k, regularisation).residual,
        "omp": lambda: omp(points, bank, k).residual,
        "ridge": lambda: ridge(points, ridge_operator(bank, regularisation)),
    }
    return found[solver]().norm(dim=1).double()


def stream(points: Tensor, size: int) -> Cover:
    sampler = SubspaceSampler(bank_size=size, working_size=1)
    for batch in points.split(170):
        sampler.observe(batch)
    return sampler.cover()


@pytest.mark.parametrize("regularisation", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize(("solver", "k"), [("affine", 1), ("affine", 5), ("omp", 3), ("ridge", 1)])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_residual_exceeds_its_bound(solver: str, k: int, regularisation: float, seed: int, moved: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2500, 12, generator=generator) * torch.rand(2500, 1, generator=generator) + 1
    cover = centred(stream(points, 60)) if moved else stream(points, 60)
    certificate = certify(cover, solver, k, regularisation)
    found = residuals(points, cover.atoms, solver, k, regularisation)
    assert certificate.patches == 2500
    assert float(found.max()) <= certificate.largest
    assert float(found.mean()) <= certificate.mean
    counts, edges = certificate.histogram(10)
    assert int(counts.sum()) == 2500
    for edge, beyond in zip(edges[:-1], counts.flip(0).cumsum(0).flip(0), strict=True):
        assert int((found > edge).sum()) <= int(beyond)  # never more patches beyond an edge than it says


def test_the_bound_is_attained_where_nothing_was_dropped_twice() -> None:
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0]]).repeat_interleave(3, 0)
    points[1, 1], points[4, 1] = 0.5, 0.25
    cover = stream(points, 2)
    found = torch.cdist(points, cover.atoms).amin(1)
    assert certify(cover, "affine").largest == pytest.approx(float(found.max()), rel=1e-3)
    by_atom = found.reshape(2, 3).square().mean(1).sqrt()  # means are bounded by root mean squares
    assert certify(cover, "affine").means.tolist() == pytest.approx(by_atom.tolist(), rel=1e-3)
    assert certify(cover, "affine").mean == pytest.approx(float(by_atom.mean()), rel=1e-3)


def test_a_bank_of_all_patches_rebuilds_each_of_them() -> None:
    certificate = certify(Cover.of(torch.randn(40, 6)), "affine", 5, 0.0)
    assert certificate.largest == 0.0
    counts, edges = certificate.histogram(4)
    assert counts.tolist() == [40, 0, 0, 0]
    assert len(edges) == 5
    with pytest.raises(ValueError, match="bins"):
        certificate.histogram(0)


def test_it_says_nothing_false_of_a_bank_smaller_than_the_support() -> None:
    points = torch.randn(500, 4)
    cover = stream(points, 3)
    found = residuals(points, cover.atoms, "affine", 10, 1e-3)
    assert float(found.max()) <= certify(cover, "affine", 10, 1e-3).largest
