"""Self-expressive reconstruction: rebuild target vectors from a bank of nominal ones.

Pure functions, tensors in and tensors out. A target ``x`` (d) is written as a combination ``B_S'
c`` of a few rows (the support ``S``) of the bank ``B`` (M x d); what is left, ``r = x - B_S' c``,
is the residual, and its length the anomaly score of the patch. Each solver is built of matmul,
top-k, gather and elementwise steps, unrolled over the small support, so that it exports to ONNX and
OpenVINO, and calls no dense linear-algebra routine at inference.

Degenerate input has its mathematical limit: duplicate or linearly dependent atoms add nothing to
the span (their coefficient is zero), an all-zero atom is never a direction, and a support larger
than the bank is the whole bank. What is left of a target that is not finite is not finite either;
nothing is checked before (a GPU would have to wait for that). A bank is checked once, when
it is prepared for the search.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.core.linear_algebra import (
    pivot_tolerance,
    require_finite,
    ridge_spectrum,
    safe_reciprocal,
    spd_inverse,
)
from anomalib_sgfr.core.neighbours import Index, nearest, search_index

__all__ = [
    "Expression",
    "affine",
    "affine_distance",
    "affine_products",
    "by_products",
    "check_arguments",
    "left_out_distance",
    "length_of_products",
    "nominal_residual",
    "omp",
    "ridge",
    "ridge_code",
    "ridge_operator",
]


_TIE = 1e-6  # relative difference of squared distances that rounding may turn round
# regularisation from which float32 solves the normal equations as they are
_WELL_CONDITIONED = 1e-4
_ROWS = 1024


class Expression(NamedTuple):
    """How each target was rebuilt.

    Attributes:
        residual (Tensor): What could not be rebuilt, shape ``(N, d)``.
        support (Tensor): Rows of the bank that were used, shape ``(N, k)``, ``int64``.
        code (Tensor): Their coefficients, shape ``(N, k)``; ``target = code @ bank[support] +
            residual``.
    """

    residual: Tensor
    support: Tensor
    code: Tensor


def affine(target: Tensor, bank: Tensor, num_atoms: int, regularisation: float = 0.0) -> Expression:
    r"""Rebuild each target in the affine hull of its nearest atoms.

    Locality-constrained linear coding (Wang et al., CVPR 2010, eq. 3): over the ``k`` nearest
    atoms, at distances :math:`D_1 \le \dots \le D_k`,

    .. math::
        \min_c \|x - B_S^\top c\|^2 + \lambda s \sum_{j \le k} w_j c_j^2 \quad\text{s.t.}\quad
        1^\top c = 1, \qquad w_j = \frac{D_{k+1}^2 - D_1^2}{D_{k+1}^2 - D_j^2},

    with ``s`` the mean of the :math:`D_j^2`, so that ``regularisation`` has no unit. An atom that
    is hardly nearer than the nearest one left out gets hardly any coefficient, so that the residual
    hardly jumps where two atoms change places, whichever of them rounding takes. What is left of a
    jump comes from the largest weight that arithmetic allows, at a difference of :math:`10^{-6}
    D_{k+1}^2`. Where all :math:`k + 1` nearest atoms are equally far, a set of measure zero, the
    residual has no single limit. :math:`w_1 = 1`, and all are where the support is the whole bank.
    With ``num_atoms=1`` the residual is the vector to the Euclidean nearest neighbour.

    The problem is solved in the coordinates of the nearest atom by semi-normal equations with one
    step of refinement (Bjorck 1987), which keeps float32 close to the least-squares optimum without
    a QR factorisation. Without regularisation, a direction within about 0.002 rad of the span of
    the others counts as dependent in float32 (5e-8 in float64).

    Args:
        target (Tensor): Vectors to rebuild, shape ``(N, d)``, floating point.
        bank (Tensor): Nominal vectors, shape ``(M, d)``, same dtype.
        num_atoms (int): Size ``k`` of the support; the whole bank if larger than ``M``.
        regularisation (float): ``lambda`` above, at least zero. Defaults to ``0.0``.

    Returns:
        Expression: Residuals ``(N, d)``, support ``(N, k)`` from nearest to farthest, and
            coefficients that sum to one.

    Raises:
        ValueError: If shapes or dtypes disagree, the bank is empty or not finite, or an argument is
            out of range.
    """
    _check(target, bank, num_atoms=num_atoms, regularisation=regularisation)
    target_, bank_ = _working(target), _working(bank)
    k = min(num_atoms, bank.shape[0])
    found = nearest(target_, search_index(bank_), min(k + 1, bank.shape[0]))
    # nothing is nearest to NaN, not even an atom that fills a group
    found = found.clamp_max(bank.shape[0] - 1)
    support = found[:, :k]
    atoms = bank_[support]  # (N, k, d)
    offset = target_ - atoms[:, 0]  # (N, d), from the nearest atom
    if k == 1:
        return Expression(
            offset.to(target.dtype), support, torch.ones_like(offset[:, :1]).to(target.dtype)
        )

    directions = atoms[:, 1:] - atoms[:, :1]  # (N, k-1, d) span the hull
    # (N, k+1), or (N, k) if that is the bank
    squared = (target_.unsqueeze(1) - bank_[found]).square().sum(2)
    penalty = regularisation * squared[:, :k].mean(1, keepdim=True) * _weights(squared.T, k).T

    # In these coordinates c = (1 - sum(z), z): the penalty on c becomes diag(p_2, ..., p_k) + p_1 1
    # 1' on z.
    gram = directions @ directions.transpose(1, 2)
    inverse = spd_inverse(gram + torch.diag_embed(penalty[:, 1:]) + penalty[:, :1, None])

    code = torch.zeros_like(inverse[:, 0])
    residual = offset
    for _ in range(2):  # the solution, then its refinement against what it left over
        first = 1.0 - code.sum(1, keepdim=True)
        gradient = (
            (directions @ residual.unsqueeze(2)).squeeze(2)
            + penalty[:, :1] * first
            - penalty[:, 1:] * code
        )
        code = code + (inverse @ gradient.unsqueeze(2)).squeeze(2)
        residual = offset - (code.unsqueeze(1) @ directions).squeeze(1)
    code = torch.cat((1.0 - code.sum(1, keepdim=True), code), 1)
    return Expression(residual.to(target.dtype), support, code.to(target.dtype))


def affine_distance(
    target: Tensor,
    bank: Tensor,
    num_atoms: int,
    regularisation: float = 0.0,
    index: Index | None = None,
) -> Tensor:
    """Length of the residual that :func:`affine` leaves, for less: without the residual itself.

    With ``G`` the products of the offsets from target to atoms and ``p`` the penalties, the code is
    ``c = y / sum(y)``, where ``y`` solves ``(G + diag(p)) y = 1``, and the squared length is ``c' G
    c``. It has an absolute error of about 3e-4 of the distance to the atoms in float32.

    Args:
        target (Tensor): As for :func:`affine`; so for ``bank``, ``num_atoms`` and
            ``regularisation``.
        bank (Tensor): Nominal vectors.
        num_atoms (int): Size of the support.
        regularisation (float): Strength of the penalty. Below 1e-4 the equations may be singular,
            and the length of :func:`affine`'s residual is returned.
        index (Index | None): Of the bank, if it is at hand.

    Returns:
        Tensor: Lengths, shape ``(N,)``.

    Raises:
        ValueError: As :func:`affine`.
    """
    if not by_products(num_atoms, regularisation):
        return affine(target, bank, num_atoms, regularisation).residual.norm(dim=1)
    products = affine_products(target, bank, num_atoms, index)
    return length_of_products(products, min(num_atoms, bank.shape[0]), regularisation).to(
        target.dtype
    )


def by_products(num_atoms: int, regularisation: float) -> bool:
    """Whether :func:`affine_distance` is :func:`length_of_products` of :func:`affine_products`."""
    return regularisation >= _WELL_CONDITIONED and num_atoms > 1


def affine_products(
    target: Tensor, bank: Tensor, num_atoms: int, index: Index | None = None
) -> Tensor:
    """Products of the offsets from each target to its nearest atoms, for :func:`affine_distance`.

    Args:
        target (Tensor): As for :func:`affine`; so for ``bank`` and ``num_atoms``.
        bank (Tensor): Nominal vectors.
        num_atoms (int): Size ``k`` of the support.
        index (Index | None): Of the bank, if it is at hand.

    Returns:
        Tensor: Shape ``(N, k', k')``, of ``k' = k + 1`` atoms, or of all if there are no more;
        ``float32``, or ``float64`` of such targets.

    Raises:
        ValueError: As :func:`affine`.
    """
    _check(target, bank, num_atoms=num_atoms)
    target_, bank_ = _working(target), _working(bank)
    index = search_index(bank_) if index is None else index
    return _products(target_, index, nearest(target_, index, min(num_atoms + 1, bank.shape[0])))


def left_out_distance(bank: Tensor, num_atoms: int, regularisation: float = 0.0) -> Tensor:
    """Leave-one-out residual of each atom: :func:`affine_distance` without the atom itself.

    Args:
        bank (Tensor): Nominal vectors, shape ``(M, d)``, floating point.
        num_atoms (int): Size of the support; all others if there are no more.
        regularisation (float): Strength of the penalty; 1e-4 if it is less.

    Returns:
        Tensor: Lengths, shape ``(M,)``. Zero for an atom that has no other beside it.

    Raises:
        ValueError: As :func:`affine`.
    """
    _check(bank, bank, num_atoms=num_atoms, regularisation=regularisation)
    bank_ = _working(bank)
    others = bank.shape[0] - 1
    if others == 0:
        return torch.zeros_like(bank[:, 0])
    index = search_index(bank_)
    found = []
    for rows in torch.arange(len(bank_), device=bank.device).split(_ROWS):
        support = nearest(bank_[rows], index, min(num_atoms + 2, others + 1))
        own = support == rows[:, None]
        own[:, -1] |= ~own.any(1)  # copies of the atom may have crowded it out
        support = support[~own].reshape(len(rows), -1)
        k = min(num_atoms, others)
        products = _products(bank_[rows], index, support)
        found.append(length_of_products(products, k, max(regularisation, _WELL_CONDITIONED)))
    return torch.cat(found).to(bank.dtype)


def _products(target: Tensor, index: Index, support: Tensor) -> Tensor:
    """Products of the offsets from targets to atoms."""
    negative = functional.pad(index.centre - target, (0, 1))
    # the squared length beside each atom is masked, not cut off, which would make an exported graph
    # hold the bank twice
    mask = functional.pad(torch.ones_like(index.centre), (0, 1))
    offsets = (index.atoms[support] + negative.unsqueeze(1)) * mask  # (N, k+1, d+1)
    return offsets @ offsets.transpose(1, 2)


def length_of_products(products: Tensor, k: int, regularisation: float) -> Tensor:
    """Length of the residuals, from the products of the offsets to the nearest atoms.

    Targets of several banks may be put one after the other: the steps are many, and short for a
        few.

    Args:
        products (Tensor): As :func:`affine_products` gives them, shape ``(N, k', k')``.
        k (int): Size of the support, ``k' - 1``; or ``k'`` where the bank has no more atoms.
        regularisation (float): Strength of the penalty, at least 1e-4.

    Returns:
        Tensor: Lengths, shape ``(N,)``, of the products' dtype.
    """
    gram = products.permute(1, 2, 0)  # (k', k', N): steps along N are long
    squared = torch.stack([gram[row, row] for row in range(len(gram))])
    scale = squared[:k].mean(0).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram[:k, :k] / scale
    # of distances as they are: where all k are zero, the next would be infinite in their scale;
    # no weight is below one, but where rounding mistook the nearest
    penalty = regularisation * _weights(squared, k).clamp_min(0.5)

    eye = torch.eye(k, dtype=gram.dtype, device=gram.device)[:, :, None]
    work = torch.cat((gram + eye * penalty, torch.ones_like(gram[:, :1])), 1)  # (k, k+1, N)
    for step in range(k):  # Gauss-Jordan; no pivot is smaller than the penalty
        row = work[step, 1:] / work[step, :1]
        work = work[:, 1:] - (work[:, :1] - eye[:, step : step + 1]) * row
    code = work[:, 0] / work[:, 0].sum(0)
    length = (code * (gram * code).sum(1)).sum(0)
    return (length.clamp_min(0.0) * scale).sqrt()


def _weights(squared: Tensor, k: int) -> Tensor:
    """Weights ``(k, N)`` from squared distances ``(k + 1, N)``, or ``(k, N)`` of a whole bank."""
    if len(squared) == k:
        return torch.ones_like(squared)
    gap = (squared[k] - squared[:k]).clamp_min(_TIE * squared[k] + torch.finfo(squared.dtype).tiny)
    return gap[0] / gap


def omp(target: Tensor, bank: Tensor, num_atoms: int) -> Expression:
    """Rebuild each target by orthogonal matching pursuit.

    Greedy support, largest correlation between unit-length atoms and the residual, least squares on
    the support by progressive orthogonalisation (Rubinstein et al. 2008; Lubonja et al., arXiv
    2407.06434), so no system is solved. An atom is taken at most once. Costs ``k`` products of ``N
    x d`` with ``d x M``.

    Args:
        target (Tensor): Vectors to rebuild, shape ``(N, d)``, floating point.
        bank (Tensor): Nominal vectors of any length, shape ``(M, d)``, same dtype.
        num_atoms (int): Size ``k`` of the support; the whole bank if larger than ``M``.

    Returns:
        Expression: Residuals ``(N, d)``, support ``(N, k)`` in the order chosen, and coefficients
        ``(N, k)``. An atom that adds nothing to the span (duplicate, zero, or past the dimension)
        has coefficient zero.

    Raises:
        ValueError: If shapes or dtypes disagree, the bank is empty or not finite, or an argument is
            out of range.
    """
    _check(target, bank, num_atoms=num_atoms)
    require_finite(bank, "bank")
    target_, bank_ = _working(target), _working(bank)
    k = min(num_atoms, bank.shape[0])
    tolerance = pivot_tolerance(bank_.dtype)
    length = bank_.norm(dim=1)  # (M,)
    unit = bank_ * safe_reciprocal(length, torch.zeros_like(length))[:, None]
    order = torch.arange(bank.shape[0], device=bank.device)

    residual = target_
    # (N, M), where an atom was taken; zeros to begin with would swell an exported graph
    barred: Tensor | None = None
    support: list[Tensor] = []
    basis: list[Tensor] = []
    # q_j as a combination of the first j+1 chosen unit atoms, each (N, k)
    combinations: list[Tensor] = []
    eye = torch.eye(k, dtype=target_.dtype, device=target_.device)
    code = torch.zeros_like(target_[:, :1]).repeat(1, k)
    for step in range(k):
        correlation = (residual @ unit.T).abs()  # at least zero, so that a barred atom never wins
        free = correlation if barred is None else torch.where(barred, -1.0, correlation)
        chosen = free.argmax(1)
        taken = order == chosen[:, None]
        barred = taken if barred is None else barred | taken
        support.append(chosen)

        direction = unit[chosen]
        combination = eye[step].expand_as(code)
        for _ in range(2):  # Gram-Schmidt twice is enough
            for previous, its_combination in zip(basis, combinations, strict=True):
                share = (direction * previous).sum(1, keepdim=True)
                direction = direction - share * previous
                combination = combination - share * its_combination
        norm = direction.norm(dim=1, keepdim=True)
        scale = safe_reciprocal(norm, torch.full_like(norm, tolerance))
        basis.append(direction * scale)
        combinations.append(combination * scale)
        share = (residual * basis[-1]).sum(1, keepdim=True)
        residual = residual - share * basis[-1]
        code = code + share * combinations[-1]
    index = torch.stack(support, 1)
    # back from unit atoms to the bank's own
    code = code * safe_reciprocal(length, torch.zeros_like(length))[index]
    return Expression(residual.to(target.dtype), index, code.to(target.dtype))


def ridge_operator(bank: Tensor, regularisation: float) -> Tensor:
    r"""Residual operator of collaborative (ridge) reconstruction over the whole bank.

    With :math:`c = \arg\min \|x - B^\top c\|^2 + \alpha\|c\|^2`, the residual is :math:`R x` with
    :math:`R = \alpha (B^\top B + \alpha I)^{-1}`, one symmetric ``d x d`` matrix that replaces the
    bank at inference (Han & Yan, arXiv 2401.09443). ``alpha = regularisation * ||B||_F^2 / d``, so
    that ``regularisation`` has no unit.

    Args:
        bank (Tensor): Nominal vectors, shape ``(M, d)``, floating point.
        regularisation (float): At least zero. At zero the limit is the projector on what the bank
            does not span.

    Returns:
        Tensor: ``R``, shape ``(d, d)``, dtype of the bank. Computed in float64.

    Raises:
        ValueError: If the bank is empty or not finite, or ``regularisation`` is negative.
    """
    _check(bank, bank, regularisation=regularisation)
    require_finite(bank, "bank")
    _, _, axes, kept = ridge_spectrum(bank, regularisation)
    operator = (
        torch.eye(bank.shape[1], dtype=torch.float64, device=axes.device) - (axes.T * kept) @ axes
    )
    return operator.to(bank)


def ridge(target: Tensor, operator: Tensor) -> Tensor:
    """Residual of each target under a precomputed :func:`ridge_operator`.

    Args:
        target (Tensor): Vectors to rebuild, shape ``(N, d)``.
        operator (Tensor): Symmetric matrix of shape ``(d, d)``, same dtype.

    Returns:
        Tensor: Residuals, shape ``(N, d)``.

    Raises:
        ValueError: If shapes or dtypes disagree.
    """
    _check(target, operator)
    return (_working(target) @ _working(operator)).to(target.dtype)


def ridge_code(target: Tensor, bank: Tensor, regularisation: float) -> Tensor:
    """Coefficients of collaborative (ridge) reconstruction; :func:`ridge` gives its residual.

    Args:
        target (Tensor): Vectors to rebuild, shape ``(N, d)``.
        bank (Tensor): Nominal vectors, shape ``(M, d)``, same dtype.
        regularisation (float): As :func:`ridge_operator` takes it; at zero the coefficients of
            least length.

    Returns:
        Tensor: Shape ``(N, M)``. Computed in float64.

    Raises:
        ValueError: As :func:`ridge_operator`, or if shapes or dtypes disagree.
    """
    _check(target, bank, regularisation=regularisation)
    require_finite(bank, "bank")
    left, singular, axes, kept = ridge_spectrum(bank, regularisation)
    gain = safe_reciprocal(singular, torch.zeros_like(singular)) * kept
    return ((target.to(axes.device).double() @ axes.T * gain) @ left.T).to(target)


def check_arguments(num_atoms: int, regularisation: float) -> None:
    """Validate what is the same for all targets.

    Args:
        num_atoms (int): Size of the support.
        regularisation (float): Strength of a penalty.

    Raises:
        ValueError: If one is out of range; the message names it.
    """
    if num_atoms < 1:
        msg = f"num_atoms must be at least 1, got {num_atoms}."
        raise ValueError(msg)
    if not 0.0 <= regularisation < float("inf"):
        msg = f"regularisation must be a finite number of at least 0, got {regularisation}."
        raise ValueError(msg)


def _working(tensor: Tensor) -> Tensor:
    """Half precisions are computed in float32."""
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def _check(target: Tensor, bank: Tensor, num_atoms: int = 1, regularisation: float = 0.0) -> None:
    """Validate arguments; ``target`` and ``bank`` must be matrices of one dtype and width."""
    check_arguments(num_atoms, regularisation)
    if target.ndim != 2 or bank.ndim != 2 or target.shape[1] != bank.shape[1]:  # noqa: PLR2004
        msg = (
            f"target and bank must be matrices of one width, got {tuple(target.shape)} and"
            f" {tuple(bank.shape)}."
        )
        raise ValueError(msg)
    if bank.shape[0] == 0 or bank.shape[1] == 0:
        msg = (
            "bank must hold at least one atom of at least one dimension, got shape"
            f" {tuple(bank.shape)}."
        )
        raise ValueError(msg)
    if target.dtype != bank.dtype or not target.is_floating_point():
        msg = (
            f"target and bank must share a floating-point dtype, got {target.dtype} and"
            f" {bank.dtype}."
        )
        raise ValueError(msg)


_LEAST_SHARE = 1e-3  # of the atoms' length


def nominal_residual(atoms: Tensor, num_atoms: int, regularisation: float) -> float:
    """Mean residual of a nominal patch that is no atom, which makes scales comparable.

    The mean over the atoms of what the others leave of each, by the ``"affine"`` solver: known when
    the fit ends, without another pass, and as fair to one training image as to a thousand.

    Args:
        atoms (Tensor): Shape ``(M, d)``.
        num_atoms (int): Size of the support.
        regularisation (float): As the solver takes it.

    Returns:
        float: At least a thousandth of the atoms' own length, which is the measure where there is
        no other; of atoms that are all zero, one.
    """
    length = float(atoms.double().square().sum(1).mean().sqrt())
    found = float(left_out_distance(atoms, num_atoms, regularisation).double().mean())
    return max(found or length, _LEAST_SHARE * length) or 1.0
