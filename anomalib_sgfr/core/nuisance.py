"""Directions that embeddings move along when only the light or the camera changes, and embeddings without them.

Nuisance attribute projection (Solomonoff et al., ICASSP 2005): what changes between pictures of good parts, and is no
defect, spans a small subspace, which is projected out of all that is compared. SPARC (arXiv 2608.18585) does so for
anomaly detection, from a few good images of the new condition.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["principal_directions", "projected_out"]


def principal_directions(moment: Tensor, number: int) -> Tensor:
    """Directions of the largest second moment.

    Args:
        moment (Tensor): Sum of the outer products of some vectors with themselves, shape ``(d, d)``, ``float64``.
        number (int): How many.

    Returns:
        Tensor: Orthonormal rows, shape ``(n, d)``, the largest first; fewer than ``number`` if the vectors span less.

    Raises:
        ValueError: If ``number`` is below one or more than half of ``d``, which would leave too little to compare.
    """
    width = len(moment)
    if not 1 <= number <= width // 2:
        msg = f"directions must lie between 1 and {width // 2}, half of the {width} values of a patch, got {number}."
        raise ValueError(msg)
    strength, vectors = torch.linalg.eigh(moment)
    chosen = strength[-number:] > width * torch.finfo(moment.dtype).eps * strength[-1].clamp_min(0.0)
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
