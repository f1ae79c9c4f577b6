"""The small linear algebra against numpy's, where rank may be lacking."""

import numpy as np
import pytest
import torch

from anomalib_sgfr.core.linear_algebra import (
    KeepsDtype,
    in_blocks,
    middle,
    principal_directions,
    projected_out,
    require_finite,
    ridge_spectrum,
    row_argmin,
    safe_reciprocal,
    spd_inverse,
)


def gram(rank: int, size: int, dtype: torch.dtype = torch.float64, number: int = 7) -> torch.Tensor:
    """Positive semi-definite matrices ``(number, size, size)`` of a given rank, their rows of very
    different length.
    """
    generator = torch.Generator().manual_seed(size + rank)
    factor = torch.randn(number, size, rank, generator=generator, dtype=torch.float64)
    factor = factor * torch.logspace(-3, 3, size, dtype=torch.float64)[:, None]
    return (factor @ factor.mT).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_inverse_of_a_regular_matrix_is_numpys(
    size: int, dtype: torch.dtype, tolerance: float
) -> None:
    matrix = gram(size + 6, size, dtype)
    scale = matrix.double().diagonal(dim1=1, dim2=2).sqrt()
    scale = scale[:, :, None] * scale[:, None, :]  # compared in the units of each row
    wanted = np.linalg.inv(matrix.double().numpy()) * scale.numpy()
    assert np.allclose(
        (spd_inverse(matrix).double() * scale).numpy(), wanted, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_inverse_of_a_singular_matrix_is_a_generalised_one_with_idle_rows(rank: int) -> None:
    matrix = gram(rank, 5) if rank else torch.zeros(7, 5, 5, dtype=torch.float64)
    inverse = spd_inverse(matrix)
    assert ((inverse.abs().sum(2) > 0).sum(1) == rank).all()
    scale = matrix.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-100)
    scale = scale[:, :, None] * scale[:, None, :]
    assert torch.allclose(matrix @ inverse @ matrix / scale, matrix / scale, rtol=0, atol=1e-9)


def test_a_repeated_row_is_dropped_once() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    inverse = spd_inverse((points @ points.T)[None])[0]
    assert sorted((inverse.abs().sum(1) > 0).tolist()) == [False, True, True]
    assert inverse.diagonal().sort().values.tolist() == [0.0, 0.25, 1.0]


def test_reciprocal_of_what_is_too_small_is_zero() -> None:
    value = torch.tensor([0.0, 1e-3, 4.0])
    assert safe_reciprocal(value, torch.full_like(value, 1e-2)).tolist() == [0.0, 0.0, 0.25]


def test_shares_of_a_spectrum_are_ridge_regressions() -> None:
    bank = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    _, singular, axes, kept = ridge_spectrum(bank, 0.1)
    b = bank.double().numpy()
    alpha = 0.1 * np.square(b).sum() / 6
    projector = b.T @ b @ np.linalg.inv(b.T @ b + alpha * np.eye(6))
    assert np.allclose(((axes.T * kept) @ axes).numpy(), projector)
    assert np.allclose(singular.numpy(), np.linalg.svd(b, compute_uv=False))


def test_null_directions_keep_nothing_without_regularisation() -> None:
    kept = ridge_spectrum(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), 0.0)[3]
    assert kept.tolist() == [1.0, 0.0]


def test_directions_that_rounding_makes_are_null() -> None:
    """Their energy is judged by the longer side of the bank, as ranks are."""
    for energy, wanted in ((1e-15, [1.0, 0.0]), (1e-13, [1.0, 1.0])):  # 20 rows: 4.4e-15
        bank = torch.zeros(20, 2, dtype=torch.float64)
        bank[0, 0], bank[1, 1] = 3.0, 3.0 * energy**0.5
        assert ridge_spectrum(bank, 0.0)[3].tolist() == wanted
        assert ridge_spectrum(bank.T, 0.0)[3].tolist() == wanted


@pytest.mark.parametrize("number", [1, 2, 7, 64, 65, 1000])
def test_the_middle_is_the_mean_unless_outliers_take_it_along(number: int) -> None:
    points = torch.randn(number, 5, dtype=torch.float64) + 3.0
    torch.testing.assert_close(middle(points), points.mean(0))
    if number < 7:
        return
    points[3] = 1e12
    found = middle(points)
    some = points[:: max(1, number // 64)]
    torch.testing.assert_close(
        found, some.sort(0).values[(len(some) + 1) // 2 - 1]
    )  # the lower median of some
    assert (found - 3.0).abs().max() < 2.0


def test_the_middle_of_groups_is_their_mean() -> None:
    """A spread that most points share is no outlier's."""
    points = torch.randn(100, 2)
    points[40:] += 50.0
    torch.testing.assert_close(middle(points), points.mean(0))
    # the median squared spread is 140 or so: ten thousand times that is what a mean may be off
    near, far = 30.0 + 10.0 * torch.randn(1000, 2), 30.0 + 10.0 * torch.randn(1000, 2)
    near[0], far[0] = 7.5e5, 1e6
    torch.testing.assert_close(middle(near), near.mean(0))
    assert (middle(far) - 30.0).abs().max() < 5.0
    assert middle(torch.empty(0, 3)).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7)])
def test_the_least_in_a_row_is_the_first_of_equal_ones(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for each in (values, values.T.contiguous().T):
        found = row_argmin(each)
        assert found.dtype == torch.int64
        assert found.tolist() == [row.index(min(row)) for row in values.tolist()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    require_finite(torch.zeros(0), "nothing")
    with pytest.raises(ValueError, match="atoms holds NaN or infinite values"):
        require_finite(torch.tensor([0.0, value]), "atoms")
    require_finite(torch.ones(5, 20), "many")
    with pytest.raises(ValueError, match="many holds NaN"):
        require_finite(torch.ones(5, 20).index_fill(1, torch.tensor([7]), value), "many")


def test_blocks_hold_what_fits_and_at_least_a_row() -> None:
    points = torch.randn(1000, 3)
    for columns, rows in ((2**19 // 300, 300), (2**30, 1), (0, 1000)):
        parts = in_blocks(points, columns)
        assert len(parts) == -(-1000 // rows)
        assert {len(part) for part in parts[:-1]} <= {rows}
        assert torch.equal(torch.cat(parts), points)
        assert parts[0].data_ptr() == points.data_ptr()
    assert [len(part) for part in in_blocks(points[:0], 5)] == [0]


class Module(KeepsDtype):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("single", torch.rand(3))
        self.register_buffer("count", torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_change_neither_type_nor_digits(dtype: torch.dtype) -> None:
    module = Module()
    before = module.single.clone()
    assert module.to(dtype) is module
    assert module.single.dtype == torch.float32
    assert torch.equal(module.single, before)
    assert module.count.dtype == torch.int64


def test_a_move_that_casts_too_only_moves() -> None:
    for move in (("meta",), ("meta", torch.float16)):
        module = Module().to(*move)
        assert (module.single.device.type, module.single.dtype) == ("meta", torch.float32)
        assert (module.count.device.type, module.count.dtype) == ("meta", torch.int64)


def moment_of(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double().T @ vectors.double()


@pytest.mark.parametrize("number", [1, 3, 6])
def test_the_directions_are_the_first_right_singular_vectors(number: int) -> None:
    vectors = torch.randn(200, 12) * torch.linspace(3.0, 0.1, 12)
    found = principal_directions(moment_of(vectors), number)
    _, _, right = np.linalg.svd(vectors.double().numpy(), full_matrices=False)
    np.testing.assert_allclose((found @ found.T).numpy(), np.eye(number), atol=1e-12)
    np.testing.assert_allclose(np.abs((found.numpy() * right[:number]).sum(1)), 1.0, atol=1e-9)


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 1), (2, 2), (5, 4)])
def test_there_are_no_more_directions_than_the_vectors_span(rank: int, expected: int) -> None:
    vectors = torch.randn(50, rank) @ torch.randn(rank, 10)
    assert principal_directions(moment_of(vectors), 4).shape == (expected, 10)


@pytest.mark.parametrize("number", [0, 6, 100])
def test_too_many_or_too_few_directions_are_refused(number: int) -> None:
    with pytest.raises(
        ValueError, match=f"between 1 and 5, half of the 11 values of a patch, got {number}"
    ):
        principal_directions(torch.eye(11, dtype=torch.float64), number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_is_left_along_the_directions_and_all_across_them(dtype: torch.dtype) -> None:
    directions = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64)).Q.T
    embedding = torch.randn(3, 7, 4, 5).to(dtype)
    found = projected_out(embedding, directions)
    assert found.dtype == dtype
    along = torch.eye(7, dtype=torch.float64) - directions.T @ directions
    expected = torch.einsum("bchw,cd->bdhw", embedding.double(), along)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    flat = projected_out(embedding.permute(0, 2, 3, 1).reshape(-1, 7), directions)
    torch.testing.assert_close(
        flat.reshape(3, 4, 5, 7).permute(0, 3, 1, 2), found, atol=tolerance, rtol=tolerance
    )
    assert projected_out(embedding, directions[:0]) is embedding
