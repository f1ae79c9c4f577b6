"""Linear algebra of the solvers, projections and devices.

Nuisance attribute projection (Solomonoff et al., ICASSP 2005) removes a small subspace along which
embeddings move with a domain shift. SPARC (arXiv 2608.18585) does so for anomaly detection, from a
few nominal images of the new domain.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "KeepsDtype",
    "float64_device",
    "in_blocks",
    "middle",
    "pivot_tolerance",
    "principal_directions",
    "projected_out",
    "require_finite",
    "ridge_spectrum",
    "row_argmin",
    "safe_reciprocal",
    "spd_inverse",
]


_WITHOUT_DOUBLES = {"mps"}


def float64_device(device: torch.device) -> torch.device:
    """Device for ``float64`` values of a tensor: its own, or the CPU if that has no ``float64``."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLES else device


class KeepsDtype(nn.Module):
    """Mixin of modules that ``half``, ``to(dtype)`` and the like move, but do not cast.

    Atoms are searched in 32 bits and their statistics kept in 64; in 16 they would be others.
    ``float64`` values stay on the CPU where a device has none.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Move, and undo a cast: PyTorch has no public hook for it."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64:
                device = fn(tensor.new_empty(0, dtype=torch.float32)).device
                if float64_device(device) != device:
                    return tensor.to(float64_device(device))
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, *args, **kwargs)


_FAR = 1e4  # times the squared spread of most points: an outlier
_SAMPLED = 64  # points that estimate the spread
# values of a product at once: a CPU's cache, a GPU's memory
_PRODUCT_VALUES, _ON_GPU = 2**19, 2**23
_FEW = 16  # values: faster to fetch from a GPU than to test there


def spd_inverse(matrix: Tensor) -> Tensor:
    """Generalised inverse of small symmetric positive semi-definite matrices.

    Gauss-Jordan elimination with diagonal pivoting, unrolled over ``k``, on the matrix scaled to a
    unit diagonal. A pivot within rounding marks a row that depends on earlier ones; its row and
    column of the result are zero. ``matrix @ result @ matrix`` is the matrix.

    Args:
        matrix (Tensor): Shape ``(N, k, k)``, ``float32`` or ``float64``.

    Returns:
        Tensor: Of the same shape and dtype.
    """
    k = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = safe_reciprocal(diagonal.clamp_min(0.0).sqrt(), torch.zeros_like(diagonal))
    eye = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    work = torch.cat((scaled, eye.expand_as(matrix)), 2)  # (N, k, 2k)
    waiting = torch.ones_like(diagonal)
    keep = torch.zeros_like(diagonal)
    tolerance = torch.full_like(diagonal[:, :1], pivot_tolerance(matrix.dtype))
    for _ in range(k):
        remaining = torch.where(waiting > 0, work[:, :, :k].diagonal(dim1=1, dim2=2), -1.0)
        pivot, index = remaining.max(1, keepdim=True)  # (N, 1)
        chosen = eye[index.squeeze(1)]  # (N, k), one-hot
        row = (chosen.unsqueeze(1) @ work).squeeze(1) * safe_reciprocal(pivot, tolerance)
        column = (work[:, :, :k] @ chosen.unsqueeze(2)).squeeze(2)
        # unchanged where the row was dropped
        work = work - (column - chosen).unsqueeze(2) * row.unsqueeze(1)
        waiting = waiting - chosen
        keep = keep + chosen * (pivot > tolerance)
    keep = keep * scale
    return work[:, :, k:] * keep[:, :, None] * keep[:, None, :]


def in_blocks(points: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Split points so that a product with each part fits a CPU's cache, or a GPU's memory.

    Args:
        points (Tensor): Shape ``(n, ...)``.
        columns (int): Columns of the product.

    Returns:
        tuple[Tensor, ...]: Parts of ``points``, which share its memory; at least one.
    """
    values = _ON_GPU if points.is_cuda else _PRODUCT_VALUES
    return points.split(max(1, values // max(1, columns)))


def row_argmin(values: Tensor) -> Tensor:
    """Column of each row's smallest value; on a CPU the first of equal ones.

    Args:
        values (Tensor): Shape ``(n, m)``, ``float32`` or ``float64``, without NaN.

    Returns:
        Tensor: Shape ``(n,)``, ``int64``.
    """
    if values.device.type == "cpu":  # PyTorch's takes longer than the matrix product before it
        return torch.from_numpy(values.numpy().argmin(1))
    return values.argmin(1)


def middle(points: Tensor) -> Tensor:
    """Point to expand squared distances about: the mean, or the median if outliers are far.

    Args:
        points (Tensor): Shape ``(n, d)``.

    Returns:
        Tensor: Shape ``(d,)``.
    """
    mean = points.mean(0)
    if not len(points) or points.is_meta:
        return mean
    some = points[:: max(1, len(points) // _SAMPLED)]
    median = _median(some)
    spread = _median((some - median).square().sum(1))
    return torch.where((mean - median).square().sum() > _FAR * spread, median, mean)


def _median(values: Tensor) -> Tensor:
    """Median along the first axis, by an operation that exports."""
    return values.topk((len(values) + 1) // 2, dim=0, largest=False, sorted=False).values.amax(0)


def ridge_spectrum(bank: Tensor, regularisation: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Singular value decomposition of a bank, and the share of each axis that ridge keeps.

    Null directions of the bank keep nothing, also without regularisation.

    Args:
        bank (Tensor): Shape ``(M, d)``.
        regularisation (float): As :func:`~anomalib_sgfr.core.self_expression.ridge_operator` takes
            it.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: Left vectors ``(M, r)``, singular values ``(r,)``,
        axes ``(r, d)`` and shares ``(r,)`` between zero and one, with ``r = min(M, d)``;
        ``float64``.
    """
    doubles = bank.to(float64_device(bank.device)).double()
    left, singular, axes = torch.linalg.svd(doubles, full_matrices=False)
    energy = singular.square()
    alpha = regularisation * energy.sum() / bank.shape[1]
    cutoff = energy.amax() * torch.finfo(torch.float64).eps * max(bank.shape)
    kept = torch.where(
        energy > cutoff, energy / (energy + alpha).clamp_min(torch.finfo(torch.float64).tiny), 0.0
    )
    return left, singular, axes, kept


def safe_reciprocal(value: Tensor, floor: Tensor) -> Tensor:
    """``1 / value`` where it exceeds ``floor``, zero elsewhere, without a division by zero.

    Args:
        value (Tensor): Any shape.
        floor (Tensor): At least zero, of a shape that broadcasts with it.
    """
    usable = value > floor
    return torch.where(
        usable, 1.0 / torch.where(usable, value, torch.ones_like(value)), torch.zeros_like(value)
    )


def pivot_tolerance(dtype: torch.dtype) -> float:
    """Relative size below which a pivot is rounding error."""
    return 32.0 * torch.finfo(dtype).eps


def require_finite(values: Tensor, name: str) -> None:
    """Refuse NaN and infinite values, unless a graph is being compiled or captured.

    Args:
        values (Tensor): Any shape; on a GPU this waits for it.
        name (str): Name of the values in the message.

    Raises:
        ValueError: If one is not finite.
    """
    if (
        values.is_meta
        or torch.compiler.is_compiling()
        or (values.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    few = values.numel() <= _FEW
    if not (
        all(map(math.isfinite, values.flatten().tolist())) if few else torch.isfinite(values).all()
    ):
        msg = f"{name} holds NaN or infinite values; check the images and the backbone's weights."
        raise ValueError(msg)


def principal_directions(moment: Tensor, number: int) -> Tensor:
    """Principal directions of a second moment.

    Args:
        moment (Tensor): Sum of outer products of vectors with themselves, shape ``(d, d)``,
            ``float64``.
        number (int): Number of directions.

    Returns:
        Tensor: Orthonormal rows, shape ``(n, d)``, the largest first; fewer than ``number`` if the
            vectors span less.

    Raises:
        ValueError: If ``number`` is below one or more than half of ``d``, which would leave too
            little to compare.
    """
    width = len(moment)
    if not 1 <= number <= width // 2:
        msg = (
            f"directions must lie between 1 and {width // 2}, half of the {width} values of a"
            f" patch, got {number}."
        )
        raise ValueError(msg)
    strength, vectors = torch.linalg.eigh(moment)
    rounding = width * torch.finfo(moment.dtype).eps * strength[-1].clamp_min(0.0)
    chosen = strength[-number:] > rounding
    return vectors[:, -number:].T[chosen].flip(0)


def projected_out(embedding: Tensor, directions: Tensor) -> Tensor:
    """Project embeddings onto the complement of some directions.

    Args:
        embedding (Tensor): Shape ``(B, d, h, w)`` or ``(N, d)``.
        directions (Tensor): Orthonormal rows, shape ``(n, d)``; may be empty.
    """
    if not len(directions):
        return embedding
    directions = directions.to(embedding)
    if embedding.ndim == 2:  # noqa: PLR2004
        return embedding - embedding @ directions.T @ directions
    along = functional.conv2d(embedding, directions[:, :, None, None])
    return embedding - functional.conv2d(along, directions.T[:, :, None, None])
