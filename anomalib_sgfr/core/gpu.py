"""GPU kernels in Triton: each does in one launch what takes PyTorch dozens.

A reconstruction is many short steps: on a GPU their launches, and the distances written and read
again, take most of the time. Here they stay in registers. The kernels compute what
:mod:`~anomalib_sgfr.core.self_expression` and :mod:`~anomalib_sgfr.core.k_center` describe, in
PyTorch, which runs instead where a kernel cannot run or fails a small test.
"""

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

from anomalib_sgfr.core.linear_algebra import middle
from anomalib_sgfr.core.neighbours import Index, search_index
from anomalib_sgfr.core.self_expression import affine_distance

__all__ = [
    "affine_lengths",
    "binomial",
    "columns_of",
    "farthest_points",
    "fits",
    "separated_points",
    "serve",
    "staged_nearest",
]


# atoms whose least distance stands for them all: those of the same number modulo this
_GROUPS = 512
_POINTS = 16  # rebuilt by one program: the least that the matrix units take
_MOST_ATOMS = 7  # of a support: with the next, eight, whose products are a cube in registers
_MOST_CANDIDATES = 256  # members of the best groups
_TILE = 8192  # values in registers at once
_STEP = 16  # values of a product's two sides in shared memory at once
_FEW, _MANY = {"num_warps": 8, "num_stages": 2}, {"num_warps": 4, "num_stages": 1}
# programs that keep a GPU busy: from there on, more of them at once are faster than each
_BUSY = 1024
_ROWS, _ATOMS = 32, 128  # of the sampler's search
_CHOSEN_AMONG = 512  # points, at most, of which a greedy choice is made
_PLACES = 256  # averaged by one program


def fits(num_atoms: int, bank_size: int) -> bool:
    """Whether the support and the groups of a bank fit the registers of :func:`affine_lengths`.

    Args:
        num_atoms (int): Size ``k`` of the support.
        bank_size (int): Atoms ``M`` of the bank.
    """
    return (
        num_atoms <= _MOST_ATOMS
        and num_atoms < bank_size
        and _candidates(num_atoms, bank_size) <= _MOST_CANDIDATES
    )


def _candidates(num_atoms: int, bank_size: int) -> int:
    return (num_atoms + 1) * -(-bank_size // _GROUPS)


def columns_of(index: Index) -> Tensor:
    """Atoms of a bank as columns, which :func:`affine_lengths` reads together.

    Args:
        index (Index): Of the bank.

    Returns:
        Tensor: Shape ``(d + 1, g)``, where ``g`` is a multiple of 512.
    """
    return functional.pad(index.atoms.T, (0, -len(index.atoms) % _GROUPS)).contiguous()


def affine_lengths(
    embedding: Tensor,
    index: Index,
    columns: Tensor,
    bank_size: int,
    num_atoms: int,
    regularisation: float,
    unit: Tensor,
) -> Tensor:
    """Residual lengths of embedding maps by the affine solver, in one launch.

    The nearest atoms are looked for with products of 32-bit accuracy (three of TF32), and ordered
    by their distances as they are.

    Args:
        embedding (Tensor): Shape ``(B, d, h, w)``, on a GPU.
        index (Index): Of the bank, ``float32``.
        columns (Tensor): The same by :func:`columns_of`.
        bank_size (int): Atoms ``M`` of the bank; see :func:`fits`.
        num_atoms (int): Size of the support.
        regularisation (float): Strength of the penalty, at least 1e-4.
        unit (Tensor): Of the lengths, a scalar, ``float32``.

    Returns:
        Tensor: Shape ``(B, 1, h, w)``, ``float32``; not finite where an embedding is not.
    """
    step = _as_operator if torch.compiler.is_compiling() else _launch_affine_lengths
    return step(embedding, *index, columns, bank_size, num_atoms, regularisation, unit)


def _launch_affine_lengths(
    embedding: Tensor,
    atoms: Tensor,
    centre: Tensor,
    columns: Tensor,
    bank_size: int,
    num_atoms: int,
    regularisation: float,
    unit: Tensor,
) -> Tensor:
    batch, width = embedding.shape[:2]
    points = embedding.flatten(2)
    number = points.shape[2]
    found = embedding.new_empty((batch, 1, *embedding.shape[2:]), dtype=torch.float32)
    programs = -(-batch * number // _POINTS)
    candidates = _power_of_2(max(16, _candidates(num_atoms, bank_size)))
    _launch(
        "affine_lengths",
        programs,
        points,
        columns,
        atoms,
        centre,
        unit,
        found,
        batch * number,
        number,
        bank_size,
        -(-bank_size // _GROUPS),
        width,
        *points.stride(),
        regularisation,
        K=num_atoms,
        POINTS=_POINTS,
        GROUPS=_GROUPS,
        CANDIDATES=candidates,
        SUPPORT=8,
        STEP=_STEP,
        SHORT=_TILE // (_POINTS * candidates),
        **(_MANY if programs >= _BUSY else _FEW),
    )
    return found


# Of which a compiler knows no more than what comes out.
_as_operator = library.custom_op(
    "anomalib_sgfr::affine_lengths", _launch_affine_lengths, mutates_args=()
)


@_as_operator.register_fake
def _(embedding: Tensor, atoms: Tensor, *_: Any) -> Tensor:  # noqa: ANN401
    del atoms
    return embedding.new_empty((embedding.shape[0], 1, *embedding.shape[2:]), dtype=torch.float32)


def binomial(feature: Tensor) -> Tensor:
    """Binomial average as :func:`~anomalib_sgfr.features.embedding.pool`, in one launch.

    Args:
        feature (Tensor): Shape ``(B, C, h, w)``, on a GPU.

    Returns:
        Tensor: Of the same shape and dtype, contiguous.
    """
    found = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
    batch, channels, height, width = feature.shape
    blocks = -(-height * width // _PLACES)
    if found.numel():  # of no program there is no launch
        _launch(
            "binomial",
            batch * channels * blocks,
            feature,
            found,
            blocks,
            channels,
            height,
            width,
            *feature.stride(),
            PLACES=_PLACES,
        )
    return found


def farthest_points(
    left: Tensor, mutual: Tensor, same: Tensor, most: int, outside: float | Tensor, tolerance: float
) -> Tensor:
    """Greedy choice of :func:`~anomalib_sgfr.core.k_center.k_center_greedy` among few points.

    Args:
        left (Tensor): Squared distance of each from the nearest point taken, ``(n,)``, falling.
        mutual (Tensor): Squared distances of all from each other, ``(n, n)``.
        same (Tensor): Squared distance at which two are the same point, ``(n,)``.
        most (int): Points to take.
        outside (float | Tensor): Largest of all other points: whoever is nearer is not the farthest
            of all any more.
        tolerance (float): Distance at which to stop, but for the first.

    Returns:
        Tensor: Those taken, in order, and -1 after them; shape ``(n,)``, ``int64``.
    """
    taken = torch.full((len(left),), -1, dtype=torch.int64, device=left.device)
    outside = torch.as_tensor(outside, dtype=left.dtype, device=left.device)
    _launch(
        "farthest_points",
        1,
        left,
        mutual,
        same,
        outside,
        taken,
        len(left),
        most,
        tolerance**2,
        SIZE=_among(left),
        num_warps=1,
    )
    return taken


def staged_nearest(
    points: Tensor, atoms: Tensor, first: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """Nearest atoms by stages: among some atoms, then among as many more, and so on.

    Args:
        points (Tensor): Shape ``(n, d)``, on a GPU.
        atoms (Tensor): Shape ``(M, d)``, ``float32`` as they are.
        first (int): Atoms to compare with first; afterwards as many as before, together. ``M``
            for all at once.
        threshold (float): Euclidean distance within which a point is compared with no more atoms.

    Returns:
        tuple[Tensor, Tensor]: Row of the atom of each point, the nearest of those compared
        last up to the rounding of products, ``int64``; and the squared distance, without that, of
        the nearest of all that were compared. Both of shape ``(n,)``.
    """
    index = torch.empty(len(points), dtype=torch.int64, device=points.device)
    least = torch.empty(len(points), dtype=points.dtype, device=points.device)
    if not len(points):
        return index, least
    centre = middle(atoms)
    about_centre = atoms - centre
    columns = torch.cat((about_centre, about_centre.square().sum(1, keepdim=True)), 1)
    columns = functional.pad(columns.T, (0, -len(atoms) % _ATOMS)).contiguous()
    _launch(
        "staged_nearest",
        -(-len(points) // _ROWS),
        points.contiguous(),
        columns,
        atoms.contiguous(),
        centre,
        index,
        least,
        len(points),
        len(atoms),
        columns.shape[1],
        first,
        threshold**2,
        points.shape[1],
        ROWS=_ROWS,
        ATOMS=_ATOMS,
        STEP=_STEP,
        num_warps=4,
        num_stages=2,
    )
    return index, least


def separated_points(mutual: Tensor, distance: float) -> Tensor:
    """Which of a few hundred points are farther from each that was kept before them.

    Args:
        mutual (Tensor): Squared distances of all from each other, ``(n, n)``.
        distance (float): Euclidean.

    Returns:
        Tensor: A mask, ``(n,)``, ``bool``.
    """
    kept = torch.empty(len(mutual), dtype=torch.int8, device=mutual.device)
    if not len(mutual):  # of no program there is no launch
        return kept.bool()
    _launch(
        "separated_points",
        1,
        mutual,
        kept,
        len(mutual),
        distance**2,
        SIZE=_among(mutual),
        num_warps=4,
    )
    return kept.bool()


def _among(points: Tensor) -> int:
    """Size of a program for so many points: the same for usual numbers, to compile once."""
    return max(_CHOSEN_AMONG, _power_of_2(len(points)))


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _launch(name: str, number: int, first: Tensor, *arguments: Any, **constants: Any) -> None:  # noqa: ANN401
    """Run so many programs of a kernel, on the device of its first argument."""
    from anomalib_sgfr.core import triton_kernels as programs  # Triton takes its time to import

    with torch.cuda.device_of(first):  # Triton launches on the current one
        getattr(programs, name)[(number,)](first, *arguments, **constants)


def serve(tensor: Tensor) -> bool:
    """Whether kernels work on such a tensor: on a GPU with Triton, and not of 64 bits."""
    return (tensor.is_cuda or _is_interpreted()) and tensor.dtype != torch.float64 and _usable()


def _usable() -> bool:
    return _tried()


# All that `torch.compiler.assume_constant_result` does, but for the import of a compiler: two
# seconds.
vars(_usable)["_dynamo_marked_constant"] = True


@functools.cache
def _tried() -> bool:
    if find_spec("triton") is None or not (torch.cuda.is_available() or _is_interpreted()):
        return False
    try:
        right = _are_right(torch.device("cpu" if _is_interpreted() else "cuda"))
        reason = "" if right else "what it computes is wrong"
    # of drivers, compilers and Triton; whatever it is, there is another way
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}"
    if reason:
        message = (
            "Triton's kernels cannot be used, and Sgfr is slower on a graphics card without them:"
            f" {reason}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return not reason


def _are_right(device: torch.device) -> bool:
    """Whether each kernel answers one small question as PyTorch does."""
    points = torch.linspace(0.0, 9.0, 40, device=device).sin().reshape(20, 2) * 3.0
    mutual = (points[:, None] - points).square().sum(2)
    row, squared = staged_nearest(points[10:], points[:10], 10, 0.0)
    right = torch.equal(row, mutual[10:, :10].argmin(1)) and torch.allclose(
        squared, mutual[10:, :10].amin(1)
    )

    alive = torch.ones(20, dtype=torch.bool)
    for place in range(20):
        alive[place + 1 :] &= ~(alive[place] & (mutual[place, place + 1 :].cpu() <= 1.0))
    right &= torch.equal(separated_points(mutual, 1.0).cpu(), alive)

    left, order = mutual[0].sort(descending=True)
    among = mutual[order][:, order].contiguous()
    taken = farthest_points(left, among, torch.zeros_like(left), 3, left[-1], 0.0)
    expected = [0]
    for _ in range(2):
        left = torch.minimum(left, mutual[order[expected[-1]], order])
        expected.append(int(left.argmax()))
    right &= taken.tolist() == expected + [-1] * 17

    bank, embedding = points[:8], points[8:].T.reshape(1, 2, 3, 4).contiguous()
    averaged = embedding
    for padding in (1, 1, 0, 0):
        averaged = functional.avg_pool2d(averaged, 2, stride=1, padding=padding)
    right &= torch.allclose(binomial(embedding), averaged, rtol=1e-4, atol=1e-5)
    index, unit = search_index(bank), points.new_full((), 2.0)
    found = affine_lengths(embedding, index, columns_of(index), 8, 5, 0.5, unit)
    return right and torch.allclose(
        2.0 * found.flatten(), affine_distance(points[8:], bank, 5, 0.5), rtol=1e-4, atol=1e-5
    )


def _is_interpreted() -> bool:
    """Whether Triton runs on the CPU, slowly: how the kernels are tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"
