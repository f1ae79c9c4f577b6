"""Patches of rejected defects raise residuals of patches alike, and lower none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.defect_bank import (
    GAIN,
    DefectBank,
    DefectPatches,
    defect_index,
    nearest_distance,
    raised,
    resemblance,
)
from anomalib_sgfr.memory_bank import MemoryBank, MemoryBankState, residual_maps

LENGTHS = st.floats(0.0, 1e6, width=32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches_of(atoms: Tensor, limit: float) -> DefectPatches:
    origin = torch.zeros(len(atoms), 5, dtype=torch.int32)
    return DefectPatches(atoms, torch.full((len(atoms),), limit), origin)


def bank_with(defects: Tensor | None, limit: float = 0.0) -> MemoryBank:
    bank = MemoryBank()
    bank.set(random(40, 6).double())
    if defects is not None:
        bank.defects.set(patches_of(defects, limit), torch.device("cpu"))
    return bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("patches", "atoms", "width"), [(1, 1, 1), (50, 7, 3), (9, 300, 40)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_nearest_distance_is_that_of_all_pairs(
    dtype: torch.dtype, patches: int, atoms: int, width: int, offset: float
) -> None:
    x, a = (random(n, width, seed=n).to(dtype) + offset for n in (patches, atoms))
    expected = torch.cdist(x.double(), a.double()).amin(1)
    found = nearest_distance(x, defect_index(a))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_the_nearest_distance_of_no_number_is_no_number() -> None:
    x = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert nearest_distance(x, defect_index(random(3, 2))).isnan().tolist() == [False, True]


@given(LENGTHS, LENGTHS, st.floats(0, 10))
def test_no_residual_is_lowered_and_none_raised_beyond_the_gain(
    residual: float, distance: float, gain: float
) -> None:
    r, d = torch.tensor([residual, distance], dtype=torch.float64)
    found = float(raised(r, d, gain))
    assert residual <= found <= residual * (1.0 + gain) * (1.0 + 1e-12)


def test_residuals_are_raised_by_how_far_the_resemblance_exceeds_the_limit() -> None:
    distance = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    residual = torch.tensor([1.0, math.e**0.5, math.e**0.75, math.e**3, 2.0])
    assert resemblance(residual, distance)[:4].tolist() == pytest.approx([0.0, 0.5, 0.75, 3.0])
    share = raised(residual, math.exp(0.5) * distance, 2.0) / residual
    assert share.tolist() == pytest.approx([1.0, 1.0, 1.5, 3.0, 3.0])
    assert torch.equal(raised(residual, torch.full_like(distance, math.inf), 2.0), residual)
    assert raised(torch.tensor(math.nan), torch.tensor(1.0)).isnan()


def test_each_patch_of_a_defect_has_a_limit_of_its_own() -> None:
    atoms, limits = random(20, 5).double(), random(20, seed=1).double()
    x = random(30, 5, seed=2).double()
    expected = (torch.cdist(x, atoms) * limits.exp()).amin(1)
    torch.testing.assert_close(nearest_distance(x, defect_index(atoms, limits)), expected)


def test_a_bank_raises_patches_near_its_defects_alone() -> None:
    defect = 5.0 + random(3, 6, seed=3)
    plain, taught = bank_with(None), bank_with(defect, limit=1.0)
    near, far = defect + 0.01, random(16, 6, seed=4)
    embedding = torch.cat((near, far, far[:1]))[:20].T.reshape(1, 6, 4, 5)
    (before,), (after,) = (residual_maps([bank], [embedding]) for bank in (plain, taught))
    assert torch.allclose(after.flatten()[:3], (1.0 + GAIN) * before.flatten()[:3])
    assert torch.equal(after.flatten()[3:], before.flatten()[3:])


def test_a_state_carries_the_defects() -> None:
    taught = bank_with(random(3, 6, seed=3), limit=0.25)
    other = MemoryBank()
    other.set(*taught.state)
    assert torch.equal(other.defects.stored, taught.defects.stored)
    assert torch.equal(other.defects.limits, torch.full((3,), 0.25))
    half = taught.subset(torch.arange(40) < 20)
    assert torch.equal(half.defects.stored, taught.defects.stored)
    restored = MemoryBank()
    restored.load_state_dict(taught.state_dict())
    assert torch.equal(restored.defects.stored, taught.defects.stored)
    assert MemoryBankState(*bank_with(None).state).defects is None


def test_a_bank_keeps_the_gain_that_it_was_made_with() -> None:
    bank = MemoryBank()
    bank.set(random(40, 6).double())
    patches = patches_of(5.0 + random(3, 6, seed=3), 1.0)
    bank.defects.set(patches._replace(gain=0.5), torch.device("cpu"))
    state = bank.state_dict()
    near = (patches.atoms + 0.01).T.reshape(1, 6, 1, 3)
    other = MemoryBank()
    other.load_state_dict(state)
    for each, gain in ((bank, 0.5), (other, 0.5)):
        (before,), (after,) = (residual_maps([one], [near]) for one in (bank_with(None), each))
        assert torch.allclose(after, (1.0 + gain) * before)
        assert each.defects.state.joined(patches).gain == gain
        assert each.certificate().largest <= 1.5 * bank_with(None).certificate().largest
    earlier = {name: value for name, value in state.items() if not name.endswith("gain")}
    other.load_state_dict(earlier)
    assert other.defects.state.gain == 2.0


def test_a_state_dict_without_defects_is_read() -> None:
    taught = bank_with(random(3, 6, seed=3))
    earlier = {
        name: value for name, value in bank_with(None).state_dict().items() if "defects" not in name
    }
    taught.load_state_dict(earlier)
    assert taught.defects.size == 0


@pytest.mark.parametrize("limit", [-3.0, 0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_certificate_bounds_raised_residuals(limit: float, seed: int) -> None:
    atoms = random(30, 4, seed=seed).double()
    own = torch.randint(30, (500,), generator=torch.Generator().manual_seed(seed))
    patches = atoms[own] + 0.3 * random(500, 4, seed=seed + 10).double()
    # what each atom stands for
    away = (patches[:, None] - atoms).norm(dim=2)
    nearest = away.argmin(1)
    distance = away.amin(1)
    empty = Clusters.of(atoms)
    clusters = empty._replace(
        radius=torch.zeros(30, dtype=torch.float64).scatter_reduce(0, nearest, distance, "amax"),
        count=torch.bincount(nearest, minlength=30),
        squares=torch.zeros(30, dtype=torch.float64).index_add(0, nearest, distance.square()),
    )
    bank = MemoryBank()
    bank.set(clusters)
    defects = atoms[:2].float() + 0.4
    plain = bank.certificate()
    bank.defects.set(patches_of(defects, limit), torch.device("cpu"))
    found = bank.certificate()
    (residuals,) = residual_maps([bank], [patches.float().T.reshape(1, 4, 20, 25)])
    assert float(residuals.amax()) <= found.largest
    assert float(residuals.mean()) <= found.mean
    assert torch.all(residuals.flatten() <= found.bounds[nearest].float())
    assert torch.all(found.bounds >= plain.bounds)
    assert found.largest <= (1.0 + GAIN) * plain.largest * (1.0 + 1e-9)


def test_an_empty_defect_bank_has_no_state() -> None:
    bank = DefectBank()
    assert bank.size == 0
    assert bank.state is None
