"""Covers: what atoms stand for, through absorbing, settling, merging and moving."""

import pytest
import torch

from anomalib_sgfr.core.clusters import (
    Clusters,
    assign,
    merge,
    reassign,
    recentred,
    renumber_images,
    shift_images,
    squares_about,
)
from anomalib_sgfr.core.patch_grid import origins
from anomalib_sgfr.core.sampler import SubspaceSampler
from tests.conftest import coverage, distances


def test_looking_at_the_commonest_atoms_first_changes_no_rule() -> None:
    """Whatever is looked at first, an embedding becomes an atom if and only if it is far from every
    atom.
    """
    generator = torch.Generator().manual_seed(1)
    atoms = torch.rand(1500, 3, generator=generator)
    points = torch.rand(800, 3, generator=generator) * 1.2
    clusters = Clusters.of(atoms)._replace(count=torch.randint(1, 50, (1500,), generator=generator))
    after = assign(clusters, points, 0.08)
    novel = after.atoms[1500:]
    assert torch.equal(after.atoms[:1500], atoms)
    far = distances(points, atoms) > 0.08
    assert len(novel) > 20
    assert {tuple(row) for row in novel.tolist()} <= {tuple(row) for row in points[far].tolist()}
    assert float(distances(points, after.atoms).max()) <= 0.08 * (1 + 1e-6)
    assert float(torch.cdist(novel, novel).fill_diagonal_(1.0).min()) > 0.08 * (1 - 1e-6)
    assert int(after.count.sum()) == int(clusters.count.sum()) + 800
    assert float(distances(novel, atoms).diff().max()) <= 1e-6, (
        "the farthest from all atoms come first"
    )


@pytest.mark.parametrize("size", [1, 7, 60, 400])
@pytest.mark.parametrize("working_size", [1, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atoms_move_to_the_mean_of_what_they_stand_for(
    size: int, working_size: int, dtype: torch.dtype
) -> None:
    points = torch.randn(3000, 6, dtype=dtype) * torch.rand(3000, 1, dtype=dtype) + 2
    scale_clusters = []
    for part in points.split(1500):  # as two processes see them
        sampler = SubspaceSampler(bank_size=size, working_size=working_size)
        for batch in part.split(130):
            sampler.observe(batch)
        scale_clusters.append(sampler.fitted_state(sampler.working_size)[0])
    clusters, _ = merge(scale_clusters, size)
    moved = recentred(clusters)
    # whatever was thinned, retired and merged: nothing is lost on the way
    torch.testing.assert_close(
        (moved.atoms * moved.count[:, None]).sum(0), points.sum(0), rtol=1e-4, atol=0.0
    )
    assert torch.equal(moved.count, clusters.count)
    for seen in (clusters, moved):  # nor of their squares, about whatever point
        about = squares_about(seen, torch.full_like(seen.offset, 3.0) - seen.atoms)
        torch.testing.assert_close(
            about.sum(), (points.double() - 3.0).square().sum(), rtol=1e-5, atol=0.0
        )
    found = distances(points, moved.atoms)
    assert float(found.max()) <= float(moved.radius.max()) * (1 + 1e-5)
    assert float(found.square().sum()) <= float(moved.squares.sum()) * (1 + 1e-5)
    if size < 400:
        assert float(found.square().mean()) < float(
            distances(points, clusters.atoms).square().mean()
        )


def test_a_move_is_the_mean_and_its_bounds_hold_atom_by_atom() -> None:
    points = torch.randn(900, 4)
    index = torch.cdist(points[20:].double(), points[:20].double()).argmin(1)
    clusters = reassign(Clusters.of(points[:20]), Clusters.of(points[20:]))
    moved = recentred(clusters)
    owner = torch.cat((torch.arange(20), index))
    for atom in range(20):
        own = points[owner == atom].double()
        torch.testing.assert_close(moved.atoms[atom].double(), own.mean(0), rtol=1e-4, atol=1e-5)
        found = (own - moved.atoms[atom]).norm(dim=1)
        assert float(found.max()) <= float(moved.radius[atom]) * (1 + 1e-5)
        assert float(found.square().sum()) <= float(moved.squares[atom]) * (1 + 1e-5)
    torch.testing.assert_close(recentred(moved).atoms, moved.atoms)  # they are there


def test_squares_about_a_point_are_bounded_where_the_offset_is_not_known() -> None:
    points = torch.randn(40, 6, dtype=torch.float64)
    clusters = reassign(Clusters.of(points[:1]), Clusters.of(points[1:]))
    shift = torch.randn(1, 6, dtype=torch.float64) * 3
    found = float((points - points[:1] - shift).square().sum())
    assert float(squares_about(clusters, shift)) == pytest.approx(found)
    unknown = clusters._replace(offset=torch.full_like(clusters.offset, torch.nan))
    most = (float((points - points[:1]).square().sum()) ** 0.5 + float(shift.norm()) * 40**0.5) ** 2
    assert found < float(squares_about(unknown, shift)) == pytest.approx(most)
    one = torch.full((1, 6), 2.0, dtype=torch.float64)
    alone = Clusters.of(points[:1])._replace(
        offset=torch.full((1, 6), torch.nan, dtype=torch.float64)
    )
    assert float(squares_about(alone, one)) == pytest.approx(24.0)


def test_an_unknown_offset_stays_unknown_and_the_bounds_hold() -> None:
    points = torch.randn(600, 4)
    clusters = reassign(Clusters.of(points[:30]), Clusters.of(points[30:]))
    unknown = clusters._replace(offset=torch.full_like(clusters.offset, torch.nan))
    merged = reassign(unknown.rows(slice(5)), unknown.rows(slice(5, None)))
    assert int(merged.count.sum()) == 600
    assert bool(merged.offset.isnan().all())
    found = distances(points, merged.atoms)
    assert float(found.square().sum()) <= float(merged.squares.sum()) * (1 + 1e-5)
    assert float(found.max()) <= float(merged.radius.max()) * (1 + 1e-5)


def test_rounding_far_from_the_origin_is_certified_too() -> None:
    points = (1e4 + torch.randn(5, 3)).repeat(400, 1)  # five places, seen again and again
    sampler = SubspaceSampler(bank_size=5)
    for batch in points.split(100):
        sampler.observe(batch)
    moved = recentred(sampler.clusters())
    found = torch.cdist(points.double(), moved.atoms.double()).amin(1)
    assert float(found.max()) <= float(moved.radius.max())
    assert float(found.square().sum()) <= float(moved.squares.sum())
    assert float(moved.radius.max()) < 0.1


def test_the_mean_of_two_is_half_way_and_certified_so() -> None:
    clusters = Clusters.of(torch.tensor([[0.0, 0.0]]))
    moved = recentred(reassign(clusters, Clusters.of(torch.tensor([[3.0, 4.0]]))))
    assert moved.atoms.tolist() == [[1.5, 2.0]]
    assert float(moved.radius) == pytest.approx(2.5, rel=1e-3)
    assert float(moved.squares) == pytest.approx(12.5, rel=1e-5)
    alone = recentred(clusters)
    assert (float(alone.radius), float(alone.squares)) == (0.0, 0.0)
    assert torch.equal(alone.atoms, clusters.atoms)


@pytest.mark.parametrize("limit", [0.0, 0.4, 0.6])
def test_atoms_move_only_as_far_as_the_limit_lets_them(limit: float) -> None:
    points = torch.randn(2000, 2)
    sampler = SubspaceSampler(bank_size=60)
    sampler.observe(points)
    clusters = sampler.clusters()
    moved = recentred(clusters, limit)
    within = clusters.radius <= limit
    assert bool((moved.radius[within] <= limit * (1 + 1e-6)).all())
    assert torch.equal(moved.atoms[~within], clusters.atoms[~within])
    assert bool(within.any())
    assert bool((~within).any()) or limit == 0.6
    assert coverage(points, moved.atoms) <= float(moved.radius.max()) * (1 + 1e-5)


def test_merged_covers_keep_the_certificate_in_any_order() -> None:
    points = torch.randn(4000, 5)
    scale_clusters: list[Clusters] = []
    for part in points.split(1000):
        sampler = SubspaceSampler(bank_size=80, working_size=1)
        for batch in part.split(200):
            sampler.observe(batch)
        scale_clusters.append(sampler.clusters())
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged, _ = merge([scale_clusters[index] for index in order], 80)
        found = distances(points, merged.atoms)
        assert len(merged.atoms) == 80
        assert int(merged.count.sum()) == 4000
        assert float(found.max()) <= float(merged.radius.max()) * (1 + 1e-5)
        assert float(found.square().sum()) <= float(merged.squares.sum()) * (1 + 1e-5)


def test_a_bank_of_many_covers_is_better_for_more_atoms_in_each() -> None:
    points = torch.randn(4000, 5)
    samplers = [SubspaceSampler(bank_size=40, working_size=400) for _ in range(4)]
    for sampler, part in zip(samplers, points.split(1000), strict=True):
        sampler.observe(part)
    bound = {}
    for size in (None, 400):
        scale_clusters = [sampler.fitted_state(size)[0] for sampler in samplers]
        assert {len(clusters.atoms) for clusters in scale_clusters} == {size or 40}
        merged, _ = merge(scale_clusters, 40)
        assert coverage(points, merged.atoms) <= float(merged.radius.max()) * (1 + 1e-5)
        bound[size] = float(merged.radius.max())
    assert bound[400] < bound[None]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("size", [400, 12])
def test_several_processes_keep_the_tolerance_or_say_that_they_do_not(
    processes: int, size: int
) -> None:
    points = torch.rand(600, 2, dtype=torch.float64)
    parts = []
    for number in range(processes):
        sampler = SubspaceSampler(400, tolerance=0.1)
        for batch in points[number::processes].split(50):
            sampler.observe(batch)
        clusters, threshold = sampler.fitted_state()
        assert threshold == 0.1
        parts.append(clusters)
    merged, said = merge(parts, size, 0.1)
    assert len(merged.atoms) <= size
    assert coverage(points, merged.atoms) <= float(merged.radius.max()) + 1e-9
    if size == 400:
        assert float(merged.radius.max()) <= 0.1
    else:
        assert said > 0.1
    if said <= 0.1:
        assert coverage(points, merged.atoms) <= 0.1


def test_two_processes_that_overlap_by_half() -> None:
    one, other = SubspaceSampler(10, tolerance=1.0), SubspaceSampler(10, tolerance=1.0)
    one.observe(torch.tensor([[0.0]]))
    for value in (0.9, 1.8):
        other.observe(torch.tensor([[value]]))
    merged, said = merge([one.clusters(), other.clusters()], 10, 1.0)
    assert float(merged.radius.max()) <= 1.0
    assert said <= 1.0
    merged, said = merge([one.clusters(), other.clusters()], 1, 1.0)
    assert said == pytest.approx(1.8)


def stream(
    seed: int, images: int = 12, grid: tuple[int, int] = (5, 7)
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings of images, and where each was seen."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(grid[0] * grid[1], 4, generator=generator),
            origins(torch.tensor([number]), grid),
        )
        for number in range(images)
    ]


def holds(clusters: Clusters, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether each atom is the embedding seen where it says."""
    seen = torch.stack([embeddings.reshape(5, 7, 4) for embeddings, _ in batches])
    return torch.equal(clusters.atoms, seen[tuple(clusters.origin[:, :3].T)])


@pytest.mark.parametrize("bank_size", [3, 20, 400])
def test_an_atom_is_the_patch_it_says(bank_size: int) -> None:
    batches = stream(0)
    sampler = SubspaceSampler(bank_size, working_size=1)
    for embeddings, origin in batches:
        sampler.observe(embeddings, origin)
    clusters = sampler.clusters()
    assert holds(clusters, batches)
    assert set(clusters.origin[:, 0].tolist()) <= sampler.images()


def test_merging_keeps_origins_apart() -> None:
    scale_clusters, both = [], []
    for seed in (0, 1):
        sampler, batches = SubspaceSampler(30, working_size=1), stream(seed)
        for embeddings, origin in batches:
            sampler.observe(embeddings, origin)
        scale_clusters.append(shift_images(sampler.clusters(), len(both)))
        both += batches
    clusters, _ = merge(scale_clusters, 40)
    assert holds(clusters, both)
    assert clusters.origin[:, 0].max() >= 12


def test_numbers_close_up_and_name_the_same_images() -> None:
    clusters = Clusters.of(
        torch.randn(4, 2),
        torch.tensor([[7, 0, 1, 9, 8], [3, 2, 2, 9, 8], [-1] * 5, [7, 5, 5, 6, 7]]),
    )
    coarse = Clusters.of(torch.randn(2, 3), torch.tensor([[4, 0, 0, 2, 2], [7, 1, 1, 2, 2]]))
    (renamed, other), images = renumber_images(
        [clusters, coarse], {3: "three", 4: "four", 5: "five", 7: "seven"}
    )
    assert images == ["three", "four", "seven"]
    assert other.origin.tolist() == [[1, 0, 0, 2, 2], [2, 1, 1, 2, 2]]
    assert renamed.origin.tolist() == [[2, 0, 1, 9, 8], [0, 2, 2, 9, 8], [-1] * 5, [2, 5, 5, 6, 7]]
    assert shift_images(renamed, 10).origin[:, 0].tolist() == [12, 10, -1, 12]


def test_an_origin_of_the_wrong_shape_is_refused() -> None:
    sampler = SubspaceSampler(5)
    with pytest.raises(ValueError, match=r"origin must have shape \(6, 5\), got \(6, 2\)"):
        sampler.observe(torch.randn(6, 2), torch.zeros(6, 2, dtype=torch.int64))
    assert sampler.patches_seen_ == 0


def test_an_image_that_two_processes_knew_is_listed_once() -> None:
    clusters = Clusters.of(
        torch.randn(3, 2), torch.tensor([[0, 0, 1, 6, 6], [1, 2, 2, 6, 6], [2, 5, 5, 6, 6]])
    )
    (renamed,), images = renumber_images([clusters], {0: "old", 1: "new", 2: "old"})
    assert images == ["old", "new"]
    assert renamed.origin[:, 0].tolist() == [0, 1, 0]
