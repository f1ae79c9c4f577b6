"""One process of a fit without the rest of it: ``python uniting.py OUT RANK WORLD``; leaves what it
ended with.

Each process samples its own images, of 4 x 7 patches whose embedding says where they are, and all
unite.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.patch_grid import origins
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState
from anomalib_sgfr.torch_model import FittedState
from anomalib_sgfr.training.distributed import unite
from anomalib_sgfr.training.fit import build_banks, build_samplers

GRID = (4, 7)


def patches(image: int, scale: int) -> Tensor:
    """Embeddings of an image's patches: number of the image, row, column, and noise; of a scale."""
    generator = torch.Generator().manual_seed(100 * image + scale)
    places = origins(torch.tensor([image]), GRID)[:, :3].float()
    return torch.cat((10.0 * places, torch.rand(len(places), 2, generator=generator)), 1)


def observe(samplers: list[SubspaceSampler], images: dict[int, int]) -> None:
    """Let samplers see images, by the number that the process gives them."""
    for number, image in images.items():
        for scale, sampler in enumerate(samplers):
            sampler.observe(patches(image, scale), origins(torch.tensor([number]), GRID))


def main(out: Path, rank: int, world: int) -> None:
    """Fit to six images, then update with two more; every process knows the earlier bank."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=world
    )
    banks = [MemoryBank(num_atoms=1, regularisation=0.0) for _ in range(2)]
    samplers = build_samplers(banks, [60, 60], 4.0, update=False, global_rank=rank)
    seen = dict(enumerate(range(rank, 6, world)))
    observe(samplers, seen)
    first = build_banks(samplers, {number: f"image {image}" for number, image in seen.items()})
    for bank, state in zip(banks, first.states, strict=True):
        bank.set(*state)
    samplers = build_samplers(banks, [60, 60], 4.0, update=True, global_rank=rank)
    new = {
        len(first.images) + number: image for number, image in enumerate(range(6 + rank, 8, world))
    }
    observe(samplers, new)
    known = dict(enumerate(first.images)) | {
        number: f"image {image}" for number, image in new.items()
    }
    second = build_banks(samplers, known, FittedState([bank.state for bank in banks], first.images))
    # two atoms of each process, half a unit from the other's, in a bank large enough for all
    close = Clusters.of(torch.tensor([[0.0, 0.5 * rank], [9.0, 0.5 * rank]]))
    apart = unite(FittedState([MemoryBankState(close, threshold=3.0 - rank)], []), [60])
    samplers = build_samplers(banks[:1], [60], 1.0, update=False, global_rank=rank)
    samplers[0].observe(close.atoms)
    within = build_banks(samplers, {})
    torch.save(
        [
            {
                "images": fitted_state.images,
                "thresholds": [state.threshold for state in fitted_state.states],
                "covers": [state.clusters._asdict() for state in fitted_state.states],
            }
            for fitted_state in (first, second, apart, within)
        ],
        out / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
