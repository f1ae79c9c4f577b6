"""Directions that are left out, against NumPy's singular value decomposition."""

import numpy as np
import pytest
import torch

from anomalib_sgfr.core.linear_algebra import principal_directions, projected_out


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
