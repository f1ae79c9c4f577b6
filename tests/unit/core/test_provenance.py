"""Every atom knows the image and the place it was seen at."""

import pytest
import torch

from anomalib_sgfr.core.clusters import Clusters, merge, renumber_images, shift_images
from anomalib_sgfr.core.patch_grid import origins
from anomalib_sgfr.core.sampler import SubspaceSampler


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
