"""What residuals are measured by."""

from torch import Tensor

from anomalib_sgfr.core.self_expression import left_out_distance

__all__ = ["nominal_residual"]

_LEAST_SHARE = 1e-3  # of the atoms' length


def nominal_residual(atoms: Tensor, num_atoms: int, regularisation: float) -> float:
    """Length that scales of different embeddings are made alike by: what atoms leave of a nominal patch not among them.

    The mean over the atoms of what the others leave of each, by the ``"affine"`` solver: known when the fit ends,
    without another pass, and as fair to one training image as to a thousand.

    Args:
        atoms (Tensor): Shape ``(M, d)``.
        num_atoms (int): Size of the support.
        regularisation (float): As the solver takes it.

    Returns:
        float: At least a thousandth of the atoms' own length, which is the measure where there is no other; of atoms
        that are all zero, one.
    """
    length = float(atoms.double().square().sum(1).mean().sqrt())
    found = float(left_out_distance(atoms, num_atoms, regularisation).double().mean()) if len(atoms) > 1 else 0.0
    if found == 0.0:
        found = length
    return max(found, _LEAST_SHARE * length) or 1.0
