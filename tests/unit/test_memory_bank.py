"""The bank of one scale: its precision, and what it certifies of it."""

import copy

import pytest
import torch

from anomalib_sgfr.core.clusters import Clusters, reassign, recentred
from anomalib_sgfr.core.patch_grid import to_patches
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.core.self_expression import affine, nominal_residual
from anomalib_sgfr.memory_bank import MemoryBank, residual_maps


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e4, 1e9])
def test_sixteen_bits_keep_three_digits_at_any_size(size: float) -> None:
    atoms = size * torch.randn(50, 8)
    bank = MemoryBank()
    bank.set(atoms)
    assert bank.stored.dtype == torch.float16
    assert bank.atoms.dtype == torch.float32
    assert float((bank.atoms - atoms).abs().max()) <= 2.0**-11 * float(atoms.abs().max())
    assert 2**14 <= float(bank.stored.float().abs().max()) <= 2**15
    once = bank.atoms
    bank.set(bank.clusters)  # what is representable stays bit for bit
    assert torch.equal(bank.atoms, once)
    assert float(bank.radius.max()) <= 2.0**-10 * float(atoms.norm(dim=1).max())


def test_zeros_are_a_bank_too() -> None:
    bank = MemoryBank()
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
    bank = MemoryBank(solver, num_atoms=1, regularisation=0.0)
    bank.set(recentred(sampler.clusters()))
    nearest = torch.cdist(points.double(), bank.atoms.double()).amin(1)
    certificate, unit = bank.certificate(), float(bank.residual_scale)
    assert float(nearest.max()) <= certificate.largest * unit
    assert float(nearest.mean()) <= certificate.mean * unit
    if shift:  # what is stored is not what was learnt, and the bounds know
        exact = copy.deepcopy(sampler).clusters()
        assert certificate.largest * unit > float(recentred(exact).radius.max())


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_residuals_are_measured_by_what_atoms_leave_of_each_other(solver: str) -> None:
    atoms = torch.randn(60, 4)
    bank = MemoryBank(solver, num_atoms=3, regularisation=0.01)
    bank.set(atoms)
    left_out = []
    for row in range(60):
        others = torch.arange(60) != row
        left_out.append(
            float(affine(bank.atoms[row : row + 1], bank.atoms[others], 3, 0.01).residual.norm())
        )
    assert float(bank.residual_scale) == pytest.approx(sum(left_out) / 60, rel=1e-3)
    patches = torch.randn(2, 4, 3, 5)
    found = residual_maps([bank], [patches])[0]
    torch.testing.assert_close(
        found.flatten() * bank.residual_scale, bank.residuals(to_patches(patches))
    )
    # kept: by a state dict, a state, and when atoms are left out
    restored, again = (MemoryBank(solver, num_atoms=3, regularisation=0.01) for _ in range(2))
    restored.load_state_dict(bank.state_dict())
    again.set(*bank.state._replace(clusters=bank.clusters.rows(slice(0, 30))))
    for other in (restored, again, bank.subset(torch.arange(60) < 9), copy.deepcopy(bank)):
        assert torch.equal(other.residual_scale, bank.residual_scale)


@pytest.mark.parametrize(
    ("atoms", "nominal"),
    [
        (torch.zeros(3, 4), 1.0),
        (torch.zeros(1, 4), 1.0),
        (torch.full((1, 4), 2.0), 4.0),  # one atom, or all alike: their length
        (torch.full((9, 4), 2.0), 4.0),
        (torch.tensor([[1e3, 0.0], [1e3, 1e-2]]), 1.0),  # hardly different beside their length
    ],
)
def test_where_atoms_leave_nothing_of_each_other_their_length_is_the_measure(
    atoms: torch.Tensor, nominal: float
) -> None:
    assert nominal_residual(atoms, 5, 1e-3) == pytest.approx(nominal)
    bank = MemoryBank()
    bank.set(atoms)
    assert torch.isfinite(residual_maps([bank], [torch.randn(1, atoms.shape[1], 2, 2)])[0]).all()


def test_bounds_hold_atom_by_atom() -> None:
    points = 100 + torch.randn(500, 5)
    clusters = reassign(Clusters.of(points[:20]), Clusters.of(points[20:]))
    owner = torch.cat(
        (torch.arange(20), torch.cdist(points[20:].double(), points[:20].double()).argmin(1))
    )
    bank = MemoryBank()
    bank.set(recentred(clusters))
    for atom in range(20):
        found = (points[owner == atom] - bank.atoms[atom]).double().norm(dim=1)
        assert float(found.max()) <= float(bank.radius[atom]) * (1 + 1e-6)
        assert float(found.square().sum()) <= float(bank.squares[atom]) * (1 + 1e-6)


def test_some_atoms_to_score_with() -> None:
    bank = MemoryBank(num_atoms=3)
    atoms, patches = torch.randn(40, 6), torch.randn(25, 6)
    bank.set(atoms)
    fewer = MemoryBank(num_atoms=3)
    fewer.set(bank.atoms[:10])
    whole = bank.residuals(patches)
    torch.testing.assert_close(
        bank.subset(torch.arange(40) < 10).residuals(patches), fewer.residuals(patches)
    )
    none = bank.subset(torch.zeros(40, dtype=torch.bool))  # none chosen: all of them
    assert torch.equal(none.residuals(patches), whole)
    assert torch.equal(bank.residuals(patches), whole)


def fitted_state(solver: str = "affine", **arguments: object) -> MemoryBank:
    bank = MemoryBank(solver, num_atoms=3, **arguments)  # type: ignore[arg-type]
    bank.set(
        reassign(Clusters.of(torch.randn(40, 6)), Clusters.of(torch.randn(300, 6))), threshold=0.3
    )
    return bank


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_what_follows_from_the_atoms_is_never_stored_and_always_of_the_arguments(
    solver: str,
) -> None:
    stored, other = (
        fitted_state(solver, regularisation=0.01),
        MemoryBank(solver, num_atoms=2, regularisation=0.3),
    )
    assert set(stored.state_dict()) == {
        *(
            "stored",
            "unit",
            "radius",
            "count",
            "squares",
            "origin",
            "threshold",
            "thumbnails",
            "nominal",
        ),
        "nuisance",
    }
    other.load_state_dict(stored.state_dict())
    patches = torch.randn(25, 6)
    expected = MemoryBank(solver, num_atoms=2, regularisation=0.3)
    expected.set(stored.atoms)
    assert torch.equal(other.residuals(patches), expected.residuals(patches))
    assert other.state.threshold == 0.3
    if solver != "omp":  # which has no penalty
        assert other.certificate().largest > stored.certificate().largest
        assert torch.equal(other.residual_scale, stored.residual_scale)
    for copied in (copy.deepcopy(other), other.subset(torch.ones(40, dtype=torch.bool))):
        assert torch.equal(copied.residuals(patches), expected.residuals(patches))


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_a_state_of_another_solver_is_taken_up(solver: str) -> None:
    for other in {"affine", "omp", "ridge"} - {solver}:
        bank = MemoryBank(other, num_atoms=3)
        bank.load_state_dict(fitted_state(solver).state_dict())
        fresh = MemoryBank(other, num_atoms=3)
        fresh.set(bank.atoms)
        patches = torch.randn(9, 6)
        assert torch.equal(bank.residuals(patches), fresh.residuals(patches))


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts_leave_a_bank_alone(solver: str, cast: str) -> None:
    bank = fitted_state(solver)
    patches = torch.randn(25, 6)
    before, expected = (
        {name: tensor.clone() for name, tensor in bank.named_buffers()},
        bank.residuals(patches),
    )
    assert (bank.to(torch.bfloat16) if cast == "to" else getattr(bank, cast)()) is bank
    for name, tensor in bank.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(bank.residuals(patches), expected)
    moved_away = bank.to("meta")
    assert {tensor.device.type for tensor in moved_away.buffers()} == {"meta"}


def test_a_bank_shares_nothing_with_where_its_atoms_came_from() -> None:
    one, other = fitted_state(), MemoryBank()
    other.set(*one.state._replace(thumbnails=torch.ones(40, 24, 24, 3, dtype=torch.uint8)))
    for bank, source in ((other, one), (one, other)):
        again = MemoryBank()
        again.set(*bank.state)
        kept = {name: tensor.clone() for name, tensor in again.named_buffers()}
        for part in bank.state.clusters:
            part.zero_()
        for tensor in (*source.buffers(), *bank.buffers()):
            tensor.zero_()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in again.named_buffers())
        one.set(*again.state)
        other.set(*again.state)


def test_what_is_read_of_a_bank_stays_as_it_was() -> None:
    """Whatever the bank becomes: a state dict is loaded into the memory that is there."""
    bank = fitted_state()
    bank.set(
        *bank.state._replace(
            thumbnails=torch.ones(40, 24, 24, 3, dtype=torch.uint8), nuisance=torch.ones(1, 6)
        )
    )
    state, fewer, patches = bank.state, bank.subset(torch.arange(40) < 20), torch.randn(9, 6)
    expected, nominal = fewer.residuals(patches), fewer.residual_scale.clone()
    again = MemoryBank(num_atoms=3)
    again.set(*state)
    kept = {name: tensor.clone() for name, tensor in bank.named_buffers()}
    other = fitted_state()
    other.set(
        *other.state._replace(
            clusters=other.clusters._replace(atoms=9 * other.clusters.atoms), residual_scale=7.0
        )
    )
    other.thumbnails = torch.zeros(40, 24, 24, 3, dtype=torch.uint8)
    other.nuisance = torch.zeros(1, 6)
    bank.load_state_dict(other.state_dict())
    again.set(*state)
    for name, tensor in again.named_buffers():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)
    assert torch.equal(fewer.residuals(patches), expected)
    assert torch.equal(fewer.residual_scale, nominal)


def test_rows_of_a_state_carry_all_of_it() -> None:
    numbers = torch.arange(40, dtype=torch.uint8)
    state = fitted_state().state._replace(
        thumbnails=numbers[:, None, None, None].expand(-1, 24, 24, 3)
    )
    rows = torch.tensor([7, 3, 30])
    fewer = state.rows(rows)
    assert fewer.threshold == state.threshold
    assert fewer.thumbnails is not None
    assert fewer.thumbnails[:, 0, 0, 0].tolist() == [7, 3, 30]
    for name, part in state.clusters._asdict().items():
        torch.testing.assert_close(
            getattr(fewer.clusters, name), part[rows], rtol=0, atol=0, equal_nan=True
        )


def test_an_all_zero_bank_where_denormals_are_flushed() -> None:
    bank = MemoryBank()
    try:
        torch.set_flush_denormal(True)  # PyTorch's own
        bank.set(torch.zeros(3, 4))
        assert torch.equal(bank.atoms, torch.zeros(3, 4))
        assert float(bank.unit) > 0
    finally:
        torch.set_flush_denormal(False)
