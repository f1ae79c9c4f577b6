"""The streaming sampler: bounded, deterministic, covering."""

import pytest
import torch
from torch import Tensor

from anomalib_sgfr.core import linear_algebra
from anomalib_sgfr.core import sampler as sampling
from anomalib_sgfr.core.certificate import ScaleCertificate, certify
from anomalib_sgfr.core.clusters import Clusters, recentred
from anomalib_sgfr.core.k_center import k_center_greedy
from anomalib_sgfr.core.sampler import WORKING_SIZE, SubspaceSampler
from anomalib_sgfr.core.solvers import SOLVERS
from anomalib_sgfr.memory_bank import MemoryBank
from tests.conftest import coverage, distances


def clustered(per_cluster: int = 400, number: int = 8, width: int = 6, seed: int = 0) -> Tensor:
    """Tight clusters, far apart, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(number, width, generator=generator)
    points = (
        centres[:, None] + 0.01 * torch.randn(number, per_cluster, width, generator=generator)
    ).flatten(0, 1)
    return points[torch.randperm(len(points), generator=generator)]


def test_a_short_stream_is_kept_whole() -> None:
    points = torch.randn(30, 4)
    sampler = SubspaceSampler(bank_size=50)
    for batch in points.split(7):
        sampler.observe(batch)
    bank = sampler.bank()
    assert sampler.patches_seen_ == 30
    assert sorted(bank.tolist()) == sorted(points.tolist())


def test_every_cluster_of_the_stream_is_covered() -> None:
    points = clustered()
    sampler = SubspaceSampler(bank_size=16, working_size=1)
    for batch in points.split(100):
        sampler.observe(batch)
    assert coverage(points, sampler.bank()) < 0.2  # clusters are tens apart, and 0.1 wide


def test_coverage_is_close_to_that_of_the_whole_data() -> None:
    """One pass loses little against farthest-first over all data at once."""
    points = torch.randn(6000, 4)
    sampler = SubspaceSampler(bank_size=100, working_size=1)
    for batch in points.split(500):
        sampler.observe(batch)
    whole = coverage(points, points[k_center_greedy(points, 100)[0]])
    assert coverage(points, sampler.bank()) < 1.5 * whole


def test_a_small_bank_is_chosen_from_more_atoms() -> None:
    """While all atoms are held, it is the farthest-first selection of the whole stream; later,
    better than without.
    """
    points = torch.randn(6000, 4, generator=torch.Generator().manual_seed(5))
    covered = []
    for working_size in (1, 1000, 6000):
        sampler = SubspaceSampler(30, working_size=working_size)
        for batch in points.split(500):
            sampler.observe(batch)
            assert sampler.atoms_held <= 2 * max(30, working_size)
        covered.append(coverage(points, sampler.bank()))
    assert covered[2] == coverage(points, points[k_center_greedy(points, 30)[0]])
    assert covered[1] < covered[0]


def test_reading_the_bank_changes_nothing_that_follows() -> None:
    banks = []
    for reads in (False, True):
        sampler = SubspaceSampler(40, working_size=100)
        for batch in clustered(seed=4).split(90):
            sampler.observe(batch)
            if reads:
                clusters, threshold = sampler.fitted_state()
                assert len(clusters.atoms) <= 40
                assert threshold >= sampler.threshold_
        banks.append(sampler.bank())
    assert torch.equal(*banks)


@pytest.mark.parametrize("batch", [1, 37, 1000, 5000])
def test_memory_is_bounded_by_the_bank_not_the_stream(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SubspaceSampler(bank_size=50, working_size=1)
    thinned: list[int] = []
    prune = sampling.prune
    monkeypatch.setattr(
        sampling,
        "prune",
        lambda clusters, *rest: (thinned.append(len(clusters.atoms)), prune(clusters, *rest))[1],
    )
    for part in torch.randn(5000, 3).split(batch):
        sampler.observe(part)
        assert sampler.atoms_held <= 100
    assert max(thinned) <= 100 + 50 + batch  # small batches are taken in together
    assert len(sampler.bank()) == 50


def test_every_embedding_is_accounted_for_however_many_atoms_retire() -> None:
    """A stream that wanders off retires more atoms than are remembered."""
    sampler = SubspaceSampler(bank_size=10, working_size=1)
    batches = [torch.randn(60, 3) * 1.5**step for step in range(12)]
    held = 0
    for batch in batches:
        sampler.observe(batch)
        assert sampler._pruned is not None
        held = max(held, sampler.atoms_held + len(sampler._pruned.atoms))
    points = torch.cat(batches)
    for _ in range(2):  # reading settles nothing for good
        clusters = sampler.clusters()
        found = distances(points, clusters.atoms)
        assert int(clusters.count.sum()) == len(points)
        assert float(found.max()) <= float(clusters.radius.max()) * (1 + 1e-5)
        assert float(found.square().sum()) <= float(clusters.squares.sum()) * (1 + 1e-5)
    assert held <= 60


def test_the_same_stream_gives_the_same_bank() -> None:
    banks = []
    for _ in range(2):
        sampler = SubspaceSampler(bank_size=64, working_size=1)
        for batch in clustered(seed=3).split(128):
            sampler.observe(batch)
        banks.append(sampler.bank())
    assert torch.equal(*banks)


def test_threshold_never_falls() -> None:
    sampler = SubspaceSampler(bank_size=20, working_size=1)
    thresholds = []
    for batch in torch.randn(3000, 3).split(100):
        sampler.observe(batch)
        thresholds.append(sampler.threshold_)
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] > 0


def test_duplicates_take_no_place() -> None:
    sampler = SubspaceSampler(bank_size=10)
    for _ in range(20):
        sampler.observe(torch.arange(12.0).reshape(4, 3))
    assert len(sampler.bank()) == 4


@pytest.mark.parametrize("bank_size", [3, 12])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "working_size", [6, 15, WORKING_SIZE]
)  # nothing waits, some batches, or all of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neither_reading_nor_feeding_shares_the_store(
    bank_size: int, resumed: bool, working_size: int, dtype: torch.dtype
) -> None:
    batches, origin = torch.randn(4, 6, 2), torch.arange(30, dtype=torch.int32).reshape(6, 5)
    sampler = SubspaceSampler(bank_size, working_size=working_size)
    given = [*batches.to(dtype), origin.clone()]
    if resumed:
        clusters = Clusters(*(part.clone() for part in Clusters.of(batches[3], origin)))
        sampler.resume(clusters, 0.1)
        given += list(clusters)
    for batch in given[:4]:
        sampler.observe(batch, given[4])
    assert bool(sampler._waiting) == (working_size > 6)
    before = Clusters(*(part.clone() for part in sampler.clusters()))
    for part in (*given, sampler.bank(), *sampler.fitted_state(6)[0], *sampler.clusters()):
        part.fill_(77)
    for part, kept in zip(sampler.clusters(), before, strict=True):
        assert torch.equal(part, kept)


def test_a_buffer_that_every_batch_reuses_is_learnt_from_as_it_was() -> None:
    points = torch.randn(900, 3)
    buffer, sampler = torch.empty(30, 3), SubspaceSampler(40)
    for batch in points.split(30):
        sampler.observe(buffer.copy_(batch))
    assert coverage(points, sampler.bank()) <= nearest_certificate(sampler).largest < 3.0


def test_a_bad_batch_is_refused_and_changes_nothing() -> None:
    sampler = SubspaceSampler(bank_size=5)
    sampler.observe(torch.randn(5, 2))
    before = sampler.bank()
    bad = torch.randn(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        sampler.observe(bad)
    with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
        sampler.observe(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"shape \(n, 2\), got \(2,\)"):
        sampler.observe(torch.randn(2))
    with pytest.raises(ValueError, match="must be floating point"):
        sampler.observe(torch.ones(3, 2, dtype=torch.int64))
    assert torch.equal(sampler.bank(), before)
    assert sampler.patches_seen_ == 5


def test_arguments_have_the_defaults_they_say() -> None:
    sampler = SubspaceSampler(7)
    assert (sampler.bank_size, sampler.working_size, sampler.tolerance) == (7, WORKING_SIZE, 0.0)
    assert WORKING_SIZE == 3500
    assert (sampler.patches_seen_, sampler.threshold_, sampler.atoms_held) == (0, 0.0, 0)
    assert SubspaceSampler(9, working_size=2).working_size == 9
    assert sampler.images() == set()


def test_resuming_goes_on_with_what_was_seen() -> None:
    sampler = SubspaceSampler(5, tolerance=0.5)
    clusters = Clusters.of(torch.arange(6.0).reshape(3, 2))._replace(count=torch.tensor([4, 5, 6]))
    for threshold in (0.25, 0.75):
        sampler.resume(clusters, threshold)
        assert (sampler.patches_seen_, sampler.atoms_held) == (15, 3)
        assert sampler.threshold_ == max(threshold, 0.5)
    sampler.observe(torch.tensor([[0.7, 1.0], [0.0, 2.0]]))
    assert sorted(sampler.clusters().count.tolist()) == [1, 5, 5, 6]
    assert sampler.patches_seen_ == 17


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="bank_size must be at least 1, got 0"):
        SubspaceSampler(bank_size=0)
    with pytest.raises(ValueError, match="training set is empty"):
        SubspaceSampler(bank_size=3).bank()
    with pytest.raises(ValueError, match="tolerance must be"):
        SubspaceSampler(bank_size=3, tolerance=-1.0)


def nearest_certificate(sampler: SubspaceSampler) -> ScaleCertificate:
    """Certificate for the distance from the nearest atom."""
    clusters = sampler.clusters()
    return certify(clusters, SOLVERS["affine"](1, 0.0).bound(clusters))


@pytest.mark.parametrize("size", [1, 7, 60, 400, 1100])
@pytest.mark.parametrize("width", [2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("working_size", [1, 500])
def test_the_certificate_bounds_a_brute_force_recomputation(
    size: int, width: int, dtype: torch.dtype, working_size: int
) -> None:
    points = torch.randn(3000, width, dtype=dtype) * torch.rand(3000, 1, dtype=dtype) + 2
    sampler = SubspaceSampler(bank_size=size, working_size=working_size)
    for batch in points.split(130):
        sampler.observe(batch)
    certificate, found = nearest_certificate(sampler), distances(points, sampler.bank())
    assert certificate.patches == 3000 == int(certificate.counts.sum())
    assert float(found.max()) <= certificate.largest < 4 * float(found.max()) + 1e-6
    assert (
        float(found.mean()) <= certificate.mean < 1.5 * float(found.mean()) + 1e-6
    )  # the root of a mean of squares
    # the distribution is bounded too: no fewer distances lie below a value than bounds do
    bounds = certificate.bounds.repeat_interleave(certificate.counts).double()
    for quantile in (0.25, 0.5, 0.9):
        assert float(found.quantile(quantile)) <= float(bounds.quantile(quantile)) + 1e-6


def test_a_stream_that_fits_has_a_certificate_of_zero() -> None:
    sampler = SubspaceSampler(bank_size=50)
    sampler.observe(torch.randn(50, 3))
    assert nearest_certificate(sampler).largest == 0.0


def test_within_the_tolerance_no_more_atoms_are_taken() -> None:
    points = torch.rand(4000, 2)
    sampler = SubspaceSampler(bank_size=500, tolerance=0.25, working_size=1)
    for batch in points.split(100):
        sampler.observe(batch)
    bank = sampler.bank()
    assert 4 <= len(bank) < 40
    assert coverage(points, bank) <= nearest_certificate(sampler).largest <= 0.25 * (1 + 1e-3)


@pytest.mark.parametrize("share", [1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
def test_a_tolerance_is_kept_but_for_rounding_and_the_radius_says_what_holds(share: float) -> None:
    """Points nearer than 32 bits can tell, a thousandth of their length, are one point."""
    centres = torch.randn(50, 6)
    length = float((centres - centres.mean(0)).norm(dim=1).max())
    tolerance = share * length
    points = (centres[:, None] + 0.3 * tolerance * torch.randn(50, 20, 6)).flatten(0, 1)[
        torch.randperm(1000)
    ]
    sampler = SubspaceSampler(1000, tolerance=tolerance)
    for batch in points.split(100):
        sampler.observe(batch)
    clusters, threshold = sampler.fitted_state()
    bank = MemoryBank(num_atoms=1, regularisation=0.0)
    bank.set(recentred(clusters, tolerance), threshold)
    worst = []
    for atoms, radius in ((clusters.atoms, clusters.radius), (bank.atoms, bank.radius)):
        exact = torch.cdist(
            points.double(), atoms.double(), compute_mode="donot_use_mm_for_euclid_dist"
        ).amin(1)
        worst.append(float(exact.max()))
        assert worst[-1] <= float(radius.max()) * (1 + 1e-4)
    assert worst[0] <= (tolerance**2 + 1e-6 * length**2) ** 0.5
    assert worst[1] <= (tolerance**2 + 4e-6 * length**2) ** 0.5  # in 16 bits
    assert (worst[0] > tolerance) == (share < 3e-3)
    assert 50 <= len(clusters.atoms) < 1000


def test_blocks_do_not_change_what_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(900, 4, dtype=torch.float64)

    def learn() -> tuple[Clusters, float]:
        sampler = SubspaceSampler(60, working_size=200)
        for batch in points.split(150):
            sampler.observe(batch)
        return sampler.fitted_state()

    clusters, threshold = learn()
    monkeypatch.setattr(
        linear_algebra, "_PRODUCT_VALUES", 1000
    )  # a few rows, and of the last block fewer
    again, its_threshold = learn()
    torch.testing.assert_close(list(again), list(clusters), equal_nan=True)
    assert its_threshold == pytest.approx(threshold)
