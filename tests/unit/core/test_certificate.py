"""The certificate against a brute-force recomputation of every residual."""

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_sgfr.core.certificate import Certificate, ScaleCertificate, certify
from anomalib_sgfr.core.clusters import Clusters, reassign, recentred
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.core.self_expression import affine, omp, ridge, ridge_operator
from anomalib_sgfr.core.solvers import SOLVERS


def residuals(points: Tensor, bank: Tensor, solver: str, k: int, regularisation: float) -> Tensor:
    found = {
        "affine": lambda: affine(points, bank, k, regularisation).residual,
        "omp": lambda: omp(points, bank, k).residual,
        "ridge": lambda: ridge(points, ridge_operator(bank, regularisation)),
    }
    return found[solver]().norm(dim=1).double()


def certified(
    clusters: Clusters, solver: str, k: int = 1, regularisation: float = 0.0
) -> ScaleCertificate:
    return certify(clusters, SOLVERS[solver](k, regularisation).bound(clusters))


def stream(points: Tensor, size: int) -> Clusters:
    sampler = SubspaceSampler(bank_size=size, working_size=1)
    for batch in points.split(170):
        sampler.observe(batch)
    return sampler.clusters()


@pytest.mark.parametrize("regularisation", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize(("solver", "k"), [("affine", 1), ("affine", 5), ("omp", 3), ("ridge", 1)])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_residual_exceeds_its_bound(
    solver: str, k: int, regularisation: float, seed: int, moved: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = (
        torch.randn(2500, 12, generator=generator) * torch.rand(2500, 1, generator=generator) + 1
    )
    clusters = recentred(stream(points, 60)) if moved else stream(points, 60)
    certificate = certified(clusters, solver, k, regularisation)
    found = residuals(points, clusters.atoms, solver, k, regularisation)
    assert certificate.patches == 2500
    assert float(found.max()) <= certificate.largest
    assert float(found.mean()) <= certificate.mean
    counts, edges = certificate.histogram(10)
    assert int(counts.sum()) == 2500
    for edge, beyond in zip(edges[:-1], counts.flip(0).cumsum(0).flip(0), strict=True):
        assert int((found > edge).sum()) <= int(
            beyond
        )  # never more patches beyond an edge than it says


def test_the_bound_is_attained_where_nothing_was_dropped_twice() -> None:
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0]]).repeat_interleave(3, 0)
    points[1, 1], points[4, 1] = 0.5, 0.25
    clusters = stream(points, 2)
    found = torch.cdist(points, clusters.atoms).amin(1)
    assert certified(clusters, "affine").largest == pytest.approx(float(found.max()), rel=1e-3)
    by_atom = found.reshape(2, 3).square().mean(1).sqrt()  # means are bounded by root mean squares
    assert certified(clusters, "affine").means.tolist() == pytest.approx(by_atom.tolist(), rel=1e-3)
    assert certified(clusters, "affine").mean == pytest.approx(float(by_atom.mean()), rel=1e-3)


def formula(
    clusters: Clusters, solver: str, k: int, regularisation: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds and means of the docstring, atom by atom, with numpy."""
    atoms, radius, count, squares = (part.double().numpy() for part in clusters[:4])
    eps, width = float(torch.finfo(clusters.atoms.dtype).eps), atoms.shape[1]
    found = []
    for atom, beta, number, total in zip(atoms, radius, count, squares, strict=True):
        beside = np.sort(np.sqrt(((atoms - atom) ** 2).sum(1)))
        length, about = np.sqrt((atom**2).sum()), np.sqrt(((atom - atoms.mean(0)) ** 2).sum())
        values = []
        for distance in (beta, np.sqrt(total / number)):
            energy, beyond = distance**2, 0.0
            if solver == "affine":
                error = 3 * (width + 5) * eps * (about + 2 * beta) ** 2
                error *= beside[1] <= beta + np.sqrt(beta**2 + error)
                support = beside[:k]
                share = regularisation * (1 - 1 / len(support))
                energy += error + share * (((distance + support) ** 2).mean() + error)
            elif solver == "ridge":
                energy += regularisation * (atoms**2).sum() / width
                beyond = (width + 4) * eps * (length + beta)
            else:
                energy += 2 * (width + 4) * eps * (length + beta) ** 2
            values.append(np.sqrt(energy) + beyond)
        found.append((values[0], min(values)))
    return np.array(found)[:, 0], np.array(found)[:, 1]


@pytest.mark.parametrize(
    ("solver", "k", "regularisation"),
    [
        *(("affine", k, strength) for k in (1, 2, 5, 100) for strength in (0.0, 1e-3, 0.3)),
        *(("ridge", 1, strength) for strength in (0.0, 0.1)),
        *(("omp", k, 0.3) for k in (1, 3)),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_bounds_are_those_of_the_formula(
    solver: str, k: int, regularisation: float, offset: float
) -> None:
    points = torch.randn(600, 7) + offset
    clusters = reassign(Clusters.of(points[:40]), Clusters.of(points[40:]))
    bounds, means = formula(clusters, solver, k, regularisation)
    certificate = certified(clusters, solver, k, regularisation)
    rounding = 1 + 3e-4  # with a margin for it the other way, too
    for found, wanted in ((certificate.bounds.numpy(), bounds), (certificate.means.numpy(), means)):
        assert bool((wanted <= found).all())
        assert bool((found <= wanted * rounding).all())
    mean = float((means * clusters.count.numpy()).sum() / 600)
    assert bounds.max() <= certificate.largest <= bounds.max() * rounding
    assert mean <= certificate.mean <= mean * rounding
    assert certificate.patches == 600
    assert torch.equal(certificate.counts, clusters.count)


def test_a_histogram_counts_each_patch_at_the_bound_of_its_atom() -> None:
    bounds, counts = torch.tensor([0.0, 0.5, 1.0, 1.25, 4.0]), torch.tensor([1, 2, 4, 8, 16])
    certificate = ScaleCertificate(31, 4.0, 1.0, bounds, bounds, counts)
    found, edges = certificate.histogram(4)
    assert found.tolist() == [7, 8, 0, 16]
    assert edges.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [len(part) for part in certificate.histogram()] == [20, 21]
    assert certificate.histogram(1)[0].tolist() == [31]


@pytest.mark.parametrize(("solver", "k"), [("affine", 2), ("affine", 3), ("omp", 1), ("omp", 2)])
def test_the_bound_is_attained_across_what_the_atoms_span(solver: str, k: int) -> None:
    """A patch straight above an atom is no better rebuilt by any other."""
    atoms = torch.cat((torch.randn(6, 3) + 5, torch.zeros(6, 1)), 1).double()
    points = atoms[2] + torch.tensor([[0.0, 0.0, 0.0, 0.25]])
    clusters = reassign(Clusters.of(atoms), Clusters.of(points))
    certificate = certified(clusters, solver, k)
    assert float(certificate.bounds[2]) == pytest.approx(0.25, rel=1e-3)
    assert float(certificate.means[2]) == pytest.approx(0.25 / 2**0.5, rel=1e-3)
    assert residuals(points, atoms, solver, k, 0.0).tolist() == pytest.approx([0.25])


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_pursuit_far_from_the_origin_is_certified_too(offset: float, k: int, seed: int) -> None:
    """In 32 bits, products of nearly parallel vectors do not tell the nearest apart."""
    points = (0.1 * torch.randn(5, 12) + offset).repeat_interleave(200, 0)
    points += 1e-3 * torch.randn(points.shape, generator=torch.Generator().manual_seed(seed))
    clusters = reassign(Clusters.of(points[::200]), Clusters.of(points))
    found, certificate = (
        residuals(points, clusters.atoms, "omp", k, 0.0),
        certified(clusters, "omp", k),
    )
    assert float(found.max()) <= certificate.largest
    assert float(found.mean()) <= certificate.mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("width", [12, 100])
@pytest.mark.parametrize(
    ("solver", "k", "regularisation"),
    [
        ("ridge", 1, 0.0),
        ("ridge", 1, 1e-14),
        ("affine", 1, 0.0),
        ("affine", 5, 0.0),
        ("affine", 5, 1e-3),
    ],
)
def test_what_rounding_leaves_of_the_atoms_themselves_is_certified_too(
    solver: str,
    k: int,
    regularisation: float,
    width: int,
    apart: float,
    offset: float,
    dtype: torch.dtype,
) -> None:
    """Pairs of atoms that products of 32 bits mistake for each other; directions that ridge has to
    take for none.
    """
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        one, shift = torch.randn(2, 40, width, generator=generator, dtype=dtype)
        bank = torch.cat((one, one + apart * shift)) + offset
        found = residuals(bank, bank, solver, k, regularisation)
        certificate = certified(Clusters.of(bank), solver, k, regularisation)
        assert float(found.max()) <= certificate.largest
        assert float(found.mean()) <= certificate.mean
        precision = torch.finfo(dtype).eps
        rounding = (
            2 * width * precision + 1e-5 if solver == "ridge" else 40 * (width * precision) ** 0.5
        )
        most = (80 * regularisation) ** 0.5 + rounding  # and not much above it
        assert certificate.largest <= most * float(bank.norm(dim=1).max())


def test_scales_add_up() -> None:
    one, other = (
        ScaleCertificate(patches, *sums, *3 * [torch.ones(1)])
        for patches, *sums in ((3, 2, 1), (7, 5, 4))
    )
    certificate = Certificate((one, other), (True, True), (0.25, 1.0))
    assert (certificate.patches, certificate.largest, certificate.mean) == (10, 7, 5)
    assert certificate.largest_score == 5.5
    assert Certificate((one, other), (True, False), (1.0, 1.0)).largest == 2


def test_bounds_in_another_unit_hold_there() -> None:
    certificate = certified(stream(torch.randn(500, 4), 20), "affine", 3, 1e-3)
    other = certificate.over(0.125)
    assert other.largest >= certificate.largest / 0.125
    assert other.mean >= certificate.mean / 0.125
    assert torch.equal(other.bounds, certificate.bounds * 8)
    assert torch.equal(other.means, certificate.means * 8)
    assert other.patches == certificate.patches


def test_a_bank_of_all_patches_rebuilds_each_of_them() -> None:
    certificate = certified(Clusters.of(torch.randn(40, 6)), "affine", 5, 0.0)
    assert certificate.largest == 0.0
    counts, edges = certificate.histogram(4)
    assert counts.tolist() == [40, 0, 0, 0]
    assert len(edges) == 5
    with pytest.raises(ValueError, match="bins"):
        certificate.histogram(0)


def test_it_says_nothing_false_of_a_bank_smaller_than_the_support() -> None:
    points = torch.randn(500, 4)
    clusters = stream(points, 3)
    found = residuals(points, clusters.atoms, "affine", 10, 1e-3)
    assert float(found.max()) <= certified(clusters, "affine", 10, 1e-3).largest
