"""Modules whose numbers keep their types when a model is cast to half precision.

The small linear algebra beneath the solvers, where rank may be lacking and a dense routine may not
export.

Directions that embeddings move along when only the light or the camera changes, and embeddings
without them.

Nuisance attribute projection (Solomonoff et al., ICASSP 2005): what changes between pictures of
good parts, and is no defect, spans a small subspace, which is projected out of all that is
compared. SPARC (arXiv 2608.18585) does so for anomaly detection, from a few good images of the new
condition.
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
    """Where 64 bits of floating point are worked with, for what is on a device: there, or on the
    CPU if it has none.
    """
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLES else device


class KeepsDtype(nn.Module):
    """Mixin: ``half``, ``bfloat16``, ``to(dtype)`` and the like move the module to a device, but
    cast nothing.

    What atoms stand for is counted in 64 bits and searched in 32; the same in 16 would be another
    bank. Where a device has no 64 bits of floating point, these stay on the CPU.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """PyTorch's one gate for moves and casts: there is no public one for a module of its own."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64:
                device = fn(tensor.new_empty(0, dtype=torch.float32)).device
                if float64_device(device) != device:
                    return tensor.to(float64_device(device))
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, *args, **kwargs)


_FAR = 1e4  # times the squared spread of most points
_SAMPLED = 64  # points that tell it
# values of a product at once: those that a processor's cache takes; a card has the memory, and
# counts launches
_PRODUCT_VALUES, _ON_CARD = 2**19, 2**23
_FEW = 16  # values: fetched as they are, sooner than a card has looked at them


def spd_inverse(matrix: Tensor) -> Tensor:
    """Invert small symmetric positive semi-definite matrices ``(N, k, k)``, dropping dependent
    rows.

    Gauss-Jordan with diagonal pivoting, unrolled over ``k``, on the matrix scaled to a unit
    diagonal. A pivot that rounding alone explains marks a row that depends on those before it; its
    row and column in the result are zero (a
    generalised inverse: ``matrix @ result @ matrix`` is the matrix).

    Args:
        matrix (Tensor): Shape ``(N, k, k)``, ``float32`` or ``float64``.

    Returns:
        Tensor: Of the same shape and dtype.
    """
    k = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = safe_reciprocal(diagonal.clamp_min(0.0).sqrt(), torch.zeros_like(diagonal))
    eye = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
    work = torch.cat(
        (matrix * scale[:, :, None] * scale[:, None, :], eye.expand_as(matrix)), 2
    )  # (N, k, 2k)
    waiting = torch.ones_like(diagonal)
    keep = torch.zeros_like(diagonal)
    tolerance = torch.full_like(diagonal[:, :1], pivot_tolerance(matrix.dtype))
    for _ in range(k):
        remaining = torch.where(waiting > 0, work[:, :, :k].diagonal(dim1=1, dim2=2), -1.0)
        pivot, index = remaining.max(1, keepdim=True)  # (N, 1)
        chosen = eye[index.squeeze(1)]  # (N, k), one-hot
        row = (chosen.unsqueeze(1) @ work).squeeze(1) * safe_reciprocal(pivot, tolerance)
        column = (work[:, :, :k] @ chosen.unsqueeze(2)).squeeze(2)
        work = work - (column - chosen).unsqueeze(2) * row.unsqueeze(
            1
        )  # unchanged where the row was dropped
        waiting = waiting - chosen
        keep = keep + chosen * (pivot > tolerance)
    keep = keep * scale
    return work[:, :, k:] * keep[:, :, None] * keep[:, None, :]


def in_blocks(points: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Points by as many rows as are worth multiplying at once: what becomes of a product is read
    again right after.

    Args:
        points (Tensor): Shape ``(n, ...)``.
        columns (int): Of the product.

    Returns:
        tuple[Tensor, ...]: Parts of ``points``, which share its memory; at least one.
    """
    return points.split(
        max(1, (_ON_CARD if points.is_cuda else _PRODUCT_VALUES) // max(1, columns))
    )


def row_argmin(values: Tensor) -> Tensor:
    """Where in its row each row's least value is; of equal ones, on a CPU the first.

    Args:
        values (Tensor): Shape ``(n, m)``, ``float32`` or ``float64``, without NaN.

    Returns:
        Tensor: Shape ``(n,)``, ``int64``.
    """
    if (
        values.device.type == "cpu"
    ):  # by SIMD; PyTorch's own takes longer than the matrix product before it
        return torch.from_numpy(values.numpy().argmin(1))
    return values.argmin(1)


def middle(points: Tensor) -> Tensor:
    """A point to expand squared distances about: the mean, or the median where far outliers take
    the mean along.

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
    """Along the first axis; an exported graph knows ``topk``."""
    return values.topk((len(values) + 1) // 2, dim=0, largest=False, sorted=False).values.amax(0)


def ridge_spectrum(bank: Tensor, regularisation: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Singular value decomposition of a bank in float64, and the share of each axis that ridge
    reconstruction keeps.

    Null directions of the bank keep nothing, also without regularisation.

    Args:
        bank (Tensor): Shape ``(M, d)``.
        regularisation (float): As :func:`~anomalib_sgfr.core.self_expression.ridge_operator` takes
            it.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: Left vectors ``(M, r)``, singular values ``(r,)``,
        axes ``(r, d)``, and the shares ``(r,)``, between zero and one, with ``r`` the lesser of
        ``M`` and ``d``; on the CPU, if the bank's device has no float64.
    """
    left, singular, axes = torch.linalg.svd(
        bank.to(float64_device(bank.device)).double(), full_matrices=False
    )
    energy = singular.square()
    alpha = regularisation * energy.sum() / bank.shape[1]
    cutoff = energy.amax() * torch.finfo(torch.float64).eps * max(bank.shape)
    kept = torch.where(
        energy > cutoff, energy / (energy + alpha).clamp_min(torch.finfo(torch.float64).tiny), 0.0
    )
    return left, singular, axes, kept


def safe_reciprocal(value: Tensor, floor: Tensor) -> Tensor:
    """``1 / value`` where it exceeds ``floor``, zero elsewhere, without a division by zero on
    either branch.

    Args:
        value (Tensor): Any shape.
        floor (Tensor): At least zero, of a shape that broadcasts with it.

    Returns:
        Tensor: Of their common shape.
    """
    usable = value > floor
    return torch.where(
        usable, 1.0 / torch.where(usable, value, torch.ones_like(value)), torch.zeros_like(value)
    )


def pivot_tolerance(dtype: torch.dtype) -> float:
    """Relative size below which a pivot is rounding error."""
    return 32.0 * torch.finfo(dtype).eps


def require_finite(values: Tensor, name: str) -> None:
    """Refuse NaN and infinite values, where it is possible to look: not in a graph that is being
    made.

    Args:
        values (Tensor): Any shape; a graphics card has to be waited for.
        name (str): What to call them.

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
    """Directions of the largest second moment.

    Args:
        moment (Tensor): Sum of the outer products of some vectors with themselves, shape ``(d,
            d)``, ``float64``.
        number (int): How many.

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
    chosen = strength[-number:] > width * torch.finfo(moment.dtype).eps * strength[-1].clamp_min(
        0.0
    )
    return vectors[:, -number:].T[chosen].flip(0)


def projected_out(embedding: Tensor, directions: Tensor) -> Tensor:
    """Embeddings without what lies along some directions.

    Args:
        embedding (Tensor): Shape ``(B, d, h, w)``, or ``(N, d)``.
        directions (Tensor): Orthonormal rows, shape ``(n, d)``; none leave the embedding as it is.

    Returns:
        Tensor: Of the same shape.
    """
    if not len(directions):
        return embedding
    directions = directions.to(embedding)
    if embedding.ndim == 2:  # noqa: PLR2004
        return embedding - embedding @ directions.T @ directions
    along = functional.conv2d(embedding, directions[:, :, None, None])
    return embedding - functional.conv2d(along, directions.T[:, :, None, None])
