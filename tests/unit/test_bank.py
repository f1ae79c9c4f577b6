"""The bank of one scale: its precision, and what it certifies of it."""

import copy

import pytest
import torch

from anomalib_sgfr.bank import Bank
from anomalib_sgfr.core.cover import Cover, centred, settle
from anomalib_sgfr.core.sampling import SubspaceSampler


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e4, 1e9])
def test_sixteen_bits_keep_three_digits_at_any_size(size: float) -> None:
    atoms = size * torch.randn(50, 8)
    bank = Bank()
    bank.set(atoms)
    assert bank.stored.dtype == torch.float16
    assert bank.atoms.dtype == torch.float32
    assert float((bank.atoms - atoms).abs().max()) <= 2.0**-11 * float(atoms.abs().max())
    assert 2**14 <= float(bank.stored.float().abs().max()) <= 2**15
    once = bank.atoms
    bank.set(bank.cover)  # what is representable stays bit for bit
    assert torch.equal(bank.atoms, once)
    assert float(bank.radius.max()) <= 2.0**-10 * float(atoms.norm(dim=1).max())


def test_zeros_are_a_bank_too() -> None:
    bank = Bank()
    bank.set(torch.zeros(3, 4))
    assert torch.equal(bank.atoms, torch.zeros(3, 4))
    assert float(bank.residuals(torch.ones(2, 4))[0]) == pytest.approx(2.0)


@pytest.mark.parametrize("shift", [0.0, 1e3])  # far from the origin, 16 bits are coarse
@pytest.mark.parametrize("solver", ["affine", "omp"])
def test_the_certificate_holds_for_the_rounded_atoms(shift: float, solver: str) -> None:
    points = shift + torch.randn(3000, 6)
    sampler = SubspaceSampler(200, working_size=1)
    for batch in points.split(250):
        sampler.observe(batch)
    bank = Bank(solver, num_atoms=1, regularisation=0.0)
    bank.set(centred(sampler.cover()))
    nearest = torch.cdist(points.double(), bank.atoms.double()).amin(1)
    certificate = bank.certificate()
    assert float(nearest.max()) <= certificate.largest
    assert float(nearest.mean()) <= certificate.mean
    if shift:  # what is stored is not what was learnt, and the bounds know
        exact = copy.deepcopy(sampler).cover()
        assert certificate.largest > float(centred(exact).radius.max())


def test_bounds_hold_atom_by_atom() -> None:
    points = 100 + torch.randn(500, 5)
    cover = settle(Cover.of(points[:20]), Cover.of(points[20:]))
    owner = torch.cat((torch.arange(20), torch.cdist(points[20:].double(), points[:20].double()).argmin(1)))
    bank = Bank()
    bank.set(centred(cover))
    for atom in range(20):
        found = (points[owner == atom] - bank.atoms[atom]).double().norm(dim=1)
        assert float(found.max()) <= float(bank.radius[atom]) * (1 + 1e-6)
        assert float(found.square().sum()) <= float(bank.squares[atom]) * (1 + 1e-6)


def test_some_atoms_to_score_with() -> None:
    bank = Bank(num_atoms=3)
    atoms, patches = torch.randn(40, 6), torch.randn(25, 6)
    bank.set(atoms)
    fewer = Bank(num_atoms=3)
    fewer.set(bank.atoms[:10])
    whole = bank.residuals(patches)
    torch.testing.assert_close(bank.some(torch.arange(40) < 10).residuals(patches), fewer.residuals(patches))
    none = bank.some(torch.zeros(40, dtype=torch.bool))  # none chosen: all of them
    assert torch.equal(none.residuals(patches), whole)
    assert torch.equal(bank.residuals(patches), whole)
