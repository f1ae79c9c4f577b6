"""The solvers against numpy's and scikit-learn's, over dtype, shape and degenerate input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, orthogonal_mp
from torch import Tensor

from anomalib_sgfr.core.neighbours import nearest, search_index
from anomalib_sgfr.core.self_expression import (
    Expression,
    affine,
    affine_distance,
    left_out_distance,
    omp,
    ridge,
    ridge_code,
    ridge_operator,
)

SHAPES = [
    (40, 60, 12, 1),
    (40, 60, 12, 5),
    (25, 300, 64, 10),
    (30, 500, 152, 5),
    (1, 20, 8, 3),
    (16, 100, 32, 20),
]


def data(
    targets: int, atoms: int, width: int, seed: int = 0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Float64 targets and bank; an offset mimics the common mean of post-activation features."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(targets, width, generator=generator, dtype=torch.float64)
    bank = torch.randn(atoms, width, generator=generator, dtype=torch.float64)
    return target + offset, bank + offset


def score(expression: Expression) -> NDArray[np.float64]:
    return expression.residual.double().norm(dim=1).numpy()


def exact_neighbours(target: Tensor, bank: Tensor, k: int) -> Tensor:
    return (target[:, None] - bank[None]).norm(dim=2).topk(min(k, len(bank)), largest=False).indices


def affine_oracle(
    target: Tensor, bank: Tensor, k: int, regularisation: float
) -> tuple[NDArray, NDArray]:
    """Equality-constrained least squares by elimination, numpy's lstsq on the augmented system."""
    residuals, codes = [], []
    for x, rows in zip(target.numpy(), exact_neighbours(target, bank, k + 1), strict=True):
        squared = np.sum((x - bank[rows].numpy()) ** 2, 1)
        atoms, inner = bank[rows[:k]].numpy(), squared[:k]
        size = len(atoms)
        outer = squared[k] if len(squared) > k else np.inf
        with np.errstate(invalid="ignore"):
            weight = (outer - inner[0]) / (outer - inner) if np.isfinite(outer) else np.ones(size)
        augmented = np.hstack([atoms, np.diag(np.sqrt(regularisation * inner.mean() * weight))])
        padded = np.concatenate([x, np.zeros(size)])
        tail = np.linalg.lstsq((augmented[1:] - augmented[0]).T, padded - augmented[0], rcond=None)[
            0
        ]
        code = np.concatenate([[1 - tail.sum()], tail])
        residuals.append(x - code @ atoms)
        codes.append(code)
    return np.array(residuals), np.array(codes)


@pytest.mark.parametrize("regularisation", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("targets", "atoms", "width", "k"), SHAPES)
def test_affine_is_constrained_least_squares(
    targets: int, atoms: int, width: int, k: int, offset: float, regularisation: float
) -> None:
    target, bank = data(targets, atoms, width, offset=offset)
    residual, code = affine_oracle(target, bank, k, regularisation)

    result = affine(target, bank, k, regularisation)
    np.testing.assert_allclose(result.residual.numpy(), residual, atol=1e-9)
    np.testing.assert_allclose(result.code.numpy(), code, atol=1e-6)

    single = affine(target.float(), bank.float(), k, regularisation)
    np.testing.assert_allclose(score(single), np.linalg.norm(residual, axis=1), rtol=1e-4)
    length = affine_distance(target, bank, k, regularisation)
    np.testing.assert_allclose(length.numpy(), np.linalg.norm(residual, axis=1), atol=1e-9)
    length = affine_distance(target.float(), bank.float(), k, regularisation)
    np.testing.assert_allclose(
        length.double().numpy(), np.linalg.norm(residual, axis=1), rtol=1e-4, atol=3e-4
    )


@pytest.mark.parametrize(
    ("atoms", "k"), [(1, 1), (5, 5), (7, 7), (8, 1), (9, 8), (9, 9), (31, 30), (500, 6), (500, 40)]
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_nearest_are_the_nearest(atoms: int, k: int, offset: float) -> None:
    target, bank = data(70, atoms, 9, offset=offset)
    assert torch.equal(nearest(target, search_index(bank), k), exact_neighbours(target, bank, k))


@pytest.mark.parametrize(
    ("k", "atoms", "width", "most"),
    [(2, 30, 6, 0.02), (3, 30, 6, 0.02), (5, 30, 6, 0.01), (5, 300, 24, 0.002)],
)
def test_the_residual_hardly_jumps_where_atoms_change_places(
    k: int, atoms: int, width: int, most: float
) -> None:
    """On ways from one point to another, at each place where the support changes, found by
    bisection.
    """
    jumps: dict[float, list[float]] = {0.0: [], 1e-3: [], 1e-2: []}
    for seed in range(6):
        ends, bank = data(2, atoms, width, seed)

        def at(share: Tensor, ends: Tensor = ends) -> Tensor:
            return ends[0] + share[:, None] * (ends[1] - ends[0])

        def support(share: Tensor, bank: Tensor = bank) -> Tensor:
            return affine(at(share), bank, k).support.sort(1).values

        way = torch.linspace(0, 1, 2001, dtype=torch.float64)
        before = support(way)
        change = (before[1:] != before[:-1]).any(1).nonzero().flatten()
        low, high = way[change], way[change + 1]
        for _ in range(30):
            middle = (low + high) / 2
            beyond = (support(middle) != before[change]).any(1)
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        nearest = torch.cdist(at(low), bank).amin(1)
        for regularisation in jumps:
            one, other = (
                affine_distance(at(share), bank, k, regularisation) for share in (low, high)
            )
            jumps[regularisation] += ((one - other).abs() / nearest).tolist()
            if regularisation:  # nor does 32 bits' own choice make it jump
                single = affine_distance(at(low).float(), bank.float(), k, regularisation)
                torch.testing.assert_close(single.double(), one, rtol=2 * most, atol=0.0)
    assert len(jumps[0.0]) > 10
    assert max(jumps[0.0]) > 0.1
    assert max(jumps[1e-3]) <= most
    assert max(jumps[1e-2]) <= most / 5


@pytest.mark.parametrize("seed", range(3))
def test_where_all_neighbours_are_equally_far_the_limit_depends_on_the_way_there(seed: int) -> None:
    """The one place where the residual jumps: it stays below the distance to the nearest atom, as
    everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    centre = torch.randn(8, generator=generator, dtype=torch.float64)
    bank = centre + corners / corners.norm(dim=1, keepdim=True)  # k + 1 of them at distance one
    around = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    apart = []
    for step in (1e-2, 1e-5):
        length = affine_distance(
            centre + step * around / around.norm(dim=1, keepdim=True), bank, 5, 0.01
        )
        apart.append(float(length.max() - length.min()))
        assert float(length.max()) <= (1.0 + step) * (1 + 0.01)
    assert apart[1] > 0.02  # however near
    # with a sixth atom a little farther than the five, there is one limit
    bank[5] = centre + 1.1 * (bank[5] - centre)
    length = affine_distance(
        centre + 1e-5 * around / around.norm(dim=1, keepdim=True), bank, 5, 0.01
    )
    assert float(length.max() - length.min()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 2e14, 9e14])
@pytest.mark.parametrize("atoms", [5, 9, 17])
def test_what_fills_a_group_is_farther_than_any_atom(
    atoms: int, size: float, dtype: torch.dtype
) -> None:
    """Up to the largest values that a sampler takes."""
    target, bank = (
        size * torch.nn.functional.normalize(part, dim=1) for part in data(50, atoms, 100)
    )
    for values in (bank, -bank):  # beside each other, and on the other side
        expected = exact_neighbours(target, values, atoms).sort(1).values
        found = nearest(target.to(dtype), search_index(values.to(dtype)), atoms).sort(1).values
        assert torch.equal(found, expected)
        length = affine_distance(target.to(dtype), values.to(dtype), 4, 1e-3).double()
        torch.testing.assert_close(
            length, affine_distance(target, values, 4, 1e-3), rtol=1e-3, atol=0.0
        )


@pytest.mark.parametrize(("targets", "atoms", "width", "k"), SHAPES)
def test_omp_is_scikit_learns(targets: int, atoms: int, width: int, k: int) -> None:
    target, bank = data(targets, atoms, width)
    bank *= torch.linspace(0.1, 5.0, atoms, dtype=torch.float64)[:, None]  # length must not matter
    unit = (bank / bank.norm(dim=1, keepdim=True)).numpy()
    code = orthogonal_mp(unit.T, target.numpy().T, n_nonzero_coefs=k).reshape(atoms, targets)
    residual = target.numpy() - code.T @ unit

    result = omp(target, bank, k)
    np.testing.assert_allclose(result.residual.numpy(), residual, atol=1e-9)
    for row, support in enumerate(result.support.tolist()):
        assert set(support) == set(np.flatnonzero(code[:, row]))
    single = omp(target.float(), bank.float(), k)
    np.testing.assert_allclose(score(single), np.linalg.norm(residual, axis=1), rtol=1e-4)


@pytest.mark.parametrize("regularisation", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("atoms", "width"), [(60, 12), (300, 64), (10, 40), (1, 5)])
def test_ridge_is_scikit_learns(atoms: int, width: int, regularisation: float) -> None:
    target, bank = data(20, atoms, width)
    alpha = regularisation * float(bank.square().sum()) / width
    oracle = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(
        bank.T.numpy(), target.T.numpy()
    )
    residual = target.numpy() - oracle.coef_ @ bank.numpy()

    np.testing.assert_allclose(
        ridge(target, ridge_operator(bank, regularisation)).numpy(), residual, atol=1e-9
    )
    single = ridge(target.float(), ridge_operator(bank.float(), regularisation))
    np.testing.assert_allclose(
        single.double().norm(dim=1).numpy(), np.linalg.norm(residual, axis=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("regularisation", [0.0, 0.1])
def test_affine_with_one_atom_is_the_nearest_neighbour(regularisation: float) -> None:
    """PatchCore's patch score is the special case k = 1."""
    target, bank = data(200, 500, 30, offset=2.0)
    neighbour = torch.cdist(target, bank).amin(1).numpy()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        result = affine(target.to(dtype), bank.to(dtype), 1, regularisation)
        np.testing.assert_allclose(score(result), neighbour, rtol=tolerance)
        assert (result.code == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["affine", "omp"])
def test_code_and_residual_add_up_to_the_target(solver: str, dtype: torch.dtype) -> None:
    target, bank = (tensor.to(dtype) for tensor in data(30, 80, 24))
    result = affine(target, bank, 6, 1e-3) if solver == "affine" else omp(target, bank, 6)
    assert result.residual.dtype == dtype
    assert result.support.shape == result.code.shape == (30, 6)
    assert all(len(set(row)) == 6 for row in result.support.tolist())
    rebuilt = (result.code[:, None].double() @ bank[result.support].double()).squeeze(
        1
    ) + result.residual.double()
    np.testing.assert_allclose(
        rebuilt.numpy(), target.double().numpy(), atol=50 * torch.finfo(dtype).eps
    )
    if solver == "affine":
        np.testing.assert_allclose(
            result.code.double().sum(1).numpy(), 1.0, atol=20 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
class TestDegenerate:
    """The mathematically right limit, never NaN."""

    def test_duplicate_atoms_add_nothing(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(20, 3, 10))
        plain = affine(target, bank, 3)
        doubled = affine(target, bank.repeat_interleave(3, 0), 9)
        np.testing.assert_allclose(score(doubled), score(plain), rtol=1e-5)
        np.testing.assert_allclose(
            score(omp(target, bank.repeat(3, 1), 9)), score(omp(target, bank, 3)), rtol=1e-5
        )

    def test_a_bank_of_one_repeated_atom_is_that_atom(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(20, 1, 10))
        distance = (target - bank).double().norm(dim=1).numpy()
        for regularisation in (0.0, 0.1):
            np.testing.assert_allclose(
                score(affine(target, bank.repeat(7, 1), 5, regularisation)), distance, rtol=1e-5
            )
            length = affine_distance(target, bank.repeat(7, 1), 5, regularisation)
            np.testing.assert_allclose(length.double().numpy(), distance, rtol=1e-5)

    @pytest.mark.parametrize("regularisation", [0.0, 1e-4, 0.1, 10.0])
    @pytest.mark.parametrize("k", [2, 3, 4, 5, 9])
    @pytest.mark.parametrize("equal", [2, 4, 9])
    def test_a_target_at_several_equal_atoms(
        self, dtype: torch.dtype, equal: int, k: int, regularisation: float
    ) -> None:
        _, bank = (tensor.to(dtype) for tensor in data(1, 9, 6))
        bank[:equal] = bank[0]
        shift = torch.tensor([0.0, 1e-30, 1e-12, 1e-3], dtype=dtype)[:, None]
        target = bank[:1] + shift * torch.ones(6, dtype=dtype)
        whole = affine(target, bank, k, regularisation).residual.norm(dim=1)
        length = affine_distance(target, bank, k, regularisation)
        assert torch.isfinite(length).all()
        torch.testing.assert_close(
            length, whole, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-8
        )
        if k <= equal or not regularisation:  # nothing else is used
            assert bool((length <= (target - bank[0]).norm(dim=1) * (1 + 1e-3)).all())
            assert whole[0] == length[0] == 0.0

    def test_zero_targets_and_zero_atoms(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(5, 9, 6))
        zeros = torch.zeros_like(bank)
        length = target.double().norm(dim=1).numpy()
        for result in (
            affine(target, zeros, 4),
            affine(target, zeros, 4, 0.1),
            omp(target, zeros, 4),
        ):
            np.testing.assert_allclose(score(result), length, rtol=1e-6)
            assert torch.isfinite(result.code).all()
        np.testing.assert_allclose(
            affine_distance(target, zeros, 4, 0.1).double().numpy(), length, rtol=1e-6
        )
        assert affine_distance(zeros, zeros, 4, 0.1).tolist() == [0.0] * len(zeros)
        np.testing.assert_allclose(
            ridge(target, ridge_operator(zeros, 0.1)).numpy(), target.numpy(), atol=1e-6
        )
        assert score(omp(torch.zeros_like(target), bank, 4)).max() == 0
        mixed = torch.cat((bank, zeros))
        np.testing.assert_allclose(
            score(omp(target, mixed, 4)), score(omp(target, bank, 4)), rtol=1e-5
        )

    @pytest.mark.parametrize("width", [2, 4, 7])
    def test_more_atoms_than_dimensions_rebuild_everything(
        self, dtype: torch.dtype, width: int
    ) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(50, 40, width))
        limit = 1e-4 if dtype == torch.float32 else 1e-9
        assert score(affine(target, bank, 2 * width + 3)).max() < limit
        assert score(omp(target, bank, 2 * width + 3)).max() < limit
        assert ridge(target, ridge_operator(bank, 0.0)).abs().max() < limit

    def test_support_larger_than_the_bank_is_the_bank(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(10, 4, 20))
        assert affine(target, bank, 50).support.shape == (10, 4)
        np.testing.assert_allclose(score(affine(target, bank, 50)), score(affine(target, bank, 4)))
        np.testing.assert_allclose(score(omp(target, bank, 50)), score(omp(target, bank, 4)))

    @pytest.mark.parametrize(("atoms", "width"), [(4, 20), (9, 5)])
    def test_distances_take_the_same_support(
        self, dtype: torch.dtype, atoms: int, width: int
    ) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(10, atoms, width))
        tolerance = {"rtol": 1e-3, "atol": 3e-3 if dtype == torch.float32 else 1e-9}
        for k in (1, 2, 3, 4, 50):
            for regularisation in (0.0, 1e-2, 0.1, 3.0):
                whole = affine(target, bank, k, regularisation).residual.norm(dim=1)
                torch.testing.assert_close(
                    affine_distance(target, bank, k, regularisation), whole, **tolerance
                )
                at_hand = affine_distance(target, bank, k, regularisation, search_index(bank))
                torch.testing.assert_close(at_hand, whole, **tolerance)
            torch.testing.assert_close(
                affine_distance(target, bank, k),
                affine(target, bank, k).residual.norm(dim=1),
                **tolerance,
            )

    def test_an_atom_of_the_bank_is_rebuilt_exactly(self, dtype: torch.dtype) -> None:
        _, bank = (tensor.to(dtype) for tensor in data(1, 50, 30, offset=2.0))
        assert score(affine(bank, bank, 5)).max() < 1e-4
        assert score(affine(bank, bank, 1)).max() < 1e-4
        assert score(omp(bank, bank, 1)).max() < 1e-4

    def test_a_single_patch_and_a_single_atom(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(1, 1, 5))
        np.testing.assert_allclose(
            score(affine(target, bank, 3)), (target - bank).double().norm().numpy(), rtol=1e-6
        )
        assert omp(target, bank, 3).residual.shape == (1, 5)

    def test_no_patch_at_all(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(0, 6, 5))
        assert affine(target, bank, 3).residual.shape == (0, 5)
        assert affine_distance(target, bank, 3, 0.1).shape == (0,)
        assert omp(target, bank, 3).residual.shape == (0, 5)

    def test_scale_does_not_matter(self, dtype: torch.dtype) -> None:
        target, bank = (tensor.to(dtype) for tensor in data(20, 40, 16))
        for factor in (1e-6, 1e6):
            scaled = affine(target * factor, bank * factor, 5, 1e-3)
            np.testing.assert_allclose(
                score(scaled), factor * score(affine(target, bank, 5, 1e-3)), rtol=1e-4
            )
            length = affine_distance(target * factor, bank * factor, 5, 1e-3) / factor
            torch.testing.assert_close(
                length, affine_distance(target, bank, 5, 1e-3), rtol=1e-4, atol=0
            )


def test_nearly_dependent_atoms_in_float32() -> None:
    """Directions a hundredth apart: the refinement step keeps float32 at the optimum."""
    target, bank = data(50, 4, 40)
    bank = torch.cat((bank, bank + 1e-2 * torch.randn(4, 40, dtype=torch.float64)))
    residual, _ = affine_oracle(target, bank, 8, 0.0)
    np.testing.assert_allclose(
        score(affine(target.float(), bank.float(), 8)), np.linalg.norm(residual, axis=1), rtol=1e-4
    )


def test_ridge_without_penalty_is_the_projector_on_what_the_bank_does_not_span() -> None:
    _, bank = data(1, 3, 8)
    operator = ridge_operator(bank, 0.0)
    np.testing.assert_allclose((bank @ operator).numpy(), 0.0, atol=1e-10)
    np.testing.assert_allclose((operator @ operator).numpy(), operator.numpy(), atol=1e-10)
    assert round(float(operator.trace()), 6) == 5


_NOT_FINITE = [float("nan"), float("inf")]


@pytest.mark.parametrize("value", _NOT_FINITE)
def test_a_bank_that_is_not_finite_is_refused(value: float) -> None:
    target, bank = data(4, 6, 3)
    bank[1, 1] = value
    for solve in (affine, omp, lambda *tensors: affine_distance(*tensors, 0.1)):
        with pytest.raises(ValueError, match="bank holds NaN"):
            solve(target, bank, 2)
    for of_ridge in (ridge_operator, lambda bank, strength: ridge_code(target, bank, strength)):
        with pytest.raises(ValueError, match="bank holds NaN"):
            of_ridge(bank, 0.1)


@pytest.mark.parametrize("value", _NOT_FINITE)
@pytest.mark.parametrize("atoms", [2, 6, 8])
def test_of_a_target_that_is_not_finite_nothing_finite_is_left(value: float, atoms: int) -> None:
    target, bank = data(4, atoms, 3)
    spoilt = target.clone()
    spoilt[1, 1] = value
    solvers: list[Callable[[Tensor], Tensor]] = [
        lambda target: affine(target, bank, 1).residual.norm(dim=1),
        lambda target: affine(target, bank, 2).residual.norm(dim=1),
        lambda target: affine_distance(target, bank, 2, 0.1),
        lambda target: omp(target, bank, 2).residual.norm(dim=1),
        lambda target: ridge(target, ridge_operator(bank, 0.1)).norm(dim=1),
    ]
    for solve in solvers:
        found = solve(spoilt)
        assert torch.isfinite(found).tolist() == [True, False, True, True]
        torch.testing.assert_close(found[[0, 2, 3]], solve(target)[[0, 2, 3]])


@pytest.mark.parametrize(
    ("target", "bank", "arguments", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(0, 3), {}, "at least one atom"),
        (torch.zeros(2, 3), torch.zeros(4, 5), {}, "of one width"),
        (torch.zeros(3), torch.zeros(4, 3), {}, "must be matrices"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), {}, "floating-point dtype"),
        (torch.zeros(2, 3).long(), torch.zeros(4, 3).long(), {}, "floating-point dtype"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"num_atoms": 0}, "num_atoms must be at least 1"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"regularisation": -1.0}, "regularisation"),
        (torch.zeros(2, 3), torch.zeros(4, 3), {"regularisation": float("nan")}, "regularisation"),
    ],
)
def test_bad_arguments_are_named(
    target: Tensor, bank: Tensor, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        affine(target, bank, **{"num_atoms": 2, **arguments})


@pytest.mark.parametrize(("atoms", "width"), [(30, 12), (5, 12), (1, 3)])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.5])
def test_ridge_coefficients_leave_the_residual_and_are_scikit_learns(
    atoms: int, width: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, width, dtype=torch.float64, generator=generator)
    bank = torch.randn(atoms, width, dtype=torch.float64, generator=generator)
    bank[-1] = bank[0]  # a duplicate
    code = ridge_code(target, bank, strength)
    torch.testing.assert_close(
        target - code @ bank, ridge(target, ridge_operator(bank, strength)), atol=1e-9, rtol=0
    )
    if strength:
        alpha = strength * float(bank.square().sum()) / width
        expected = (
            Ridge(alpha=alpha, fit_intercept=False).fit(bank.T.numpy(), target.T.numpy()).coef_
        )
    else:
        expected = np.linalg.lstsq(bank.T.numpy(), target.T.numpy(), rcond=None)[
            0
        ].T  # of least length
    np.testing.assert_allclose(code.numpy(), expected.reshape(code.shape), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("number", "k"), [(40, 5), (6, 5), (7, 5), (5, 5), (2, 5), (30, 1), (2, 1), (1, 3)]
)
def test_what_the_others_leave_of_each_atom(number: int, k: int, dtype: torch.dtype) -> None:
    bank = torch.randn(number, 8, dtype=dtype)
    found = left_out_distance(bank, k, 0.01)
    assert found.dtype == dtype
    if number == 1:
        assert found.tolist() == [0.0]
        return
    for row in range(number):
        others = bank[torch.arange(number) != row]
        expected = affine(bank[row : row + 1].double(), others.double(), k, 0.01).residual.norm()
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-3)


def test_a_copy_of_an_atom_stands_for_it() -> None:
    bank = torch.randn(9, 4).repeat(12, 1)  # more copies than are looked at
    assert float(left_out_distance(bank, 5, 1e-3).max()) < 1e-3
    assert float(left_out_distance(torch.zeros(4, 3), 5, 1e-3).max()) == 0.0


def test_many_atoms_are_left_out_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.randn(100, 6)
    whole = left_out_distance(bank, 4, 1e-3)
    monkeypatch.setattr("anomalib_sgfr.core.self_expression._ROWS", 7)
    torch.testing.assert_close(left_out_distance(bank, 4, 1e-3), whole)
    with pytest.raises(ValueError, match="num_atoms must be at least 1"):
        left_out_distance(bank, 0)
