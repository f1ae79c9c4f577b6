"""Subspace sampling: a small bank that covers a stream of nominal embeddings, in one pass and bounded memory.

A farthest-first (k-center) selection kept up to date over a stream, in the spirit of the incremental k-center of
Charikar et al. (STOC 1997): an embedding is a candidate only if it lies farther from every atom than the threshold;
when the store is full it is thinned, farthest first, to ``bank_size`` atoms, and the distance at which the thinning
stopped becomes the new threshold. The threshold never falls.
"""

import torch
from torch import Tensor

__all__ = ["SubspaceSampler", "farthest_first"]


def farthest_first(points: Tensor, size: int) -> tuple[Tensor, float]:
    """Greedy k-center: starting from the first point, repeatedly take the point farthest from those taken.

    A 2-approximation of the smallest covering radius (Gonzalez 1985). Costs ``size`` matrix-vector products.

    Args:
        points (Tensor): Candidates, shape ``(n, d)``, floating point.
        size (int): Number of points to take, at least one. Exact duplicates of taken points are never taken, so fewer
            come back if fewer are distinct.

    Returns:
        tuple[Tensor, float]: Indices of the taken points in the order taken (``int64``, at most ``size``), and the
        covering radius: the Euclidean distance to its nearest taken point of the point least well covered.

    Raises:
        ValueError: If ``points`` is empty or ``size`` is below one.
    """
    if size < 1 or points.ndim != 2 or points.shape[0] == 0:  # noqa: PLR2004
        msg = f"farthest_first needs a non-empty (n, d) matrix and size >= 1, got {tuple(points.shape)} and {size}."
        raise ValueError(msg)
    centred = points - points.mean(0)
    length = centred.square().sum(1)
    # rounding of the expansion below; closer than this is the same point
    same = 8.0 * torch.finfo(points.dtype).eps * length.amax()
    distance = torch.full_like(length, torch.inf)
    taken: list[int] = []
    index = 0
    while True:
        taken.append(index)
        to_index = torch.addmv(length + length[index], centred, centred[index], alpha=-2.0)
        torch.minimum(distance, to_index, out=distance)
        distance[index] = 0.0
        farthest = distance.argmax()
        if len(taken) == size or distance[farthest] <= same:
            break
        index = int(farthest)
    radius = float(distance[farthest].clamp_min(0.0).sqrt())
    return torch.tensor(taken, device=points.device), radius


class SubspaceSampler:
    """Streaming learner of a bank: ``observe`` batches, then read ``bank``.

    Holds at most ``2 * bank_size`` embeddings between calls, whatever the length of the stream, and is deterministic
    for a given order of the stream.

    Args:
        bank_size (int): Largest number of atoms in the bank.

    Attributes:
        patches_seen_ (int): Embeddings observed so far.
        threshold_ (float): Distance (Euclidean, embedding units) above which an embedding is a candidate atom.

    Raises:
        ValueError: If ``bank_size`` is below one.
    """

    def __init__(self, bank_size: int) -> None:
        if bank_size < 1:
            msg = f"bank_size must be at least 1, got {bank_size}."
            raise ValueError(msg)
        self.bank_size = bank_size
        self.patches_seen_ = 0
        self.threshold_ = 0.0
        self._store: Tensor | None = None

    @property
    def atoms_held(self) -> int:
        """Embeddings in store now, candidates included."""
        return 0 if self._store is None else self._store.shape[0]

    @torch.no_grad()
    def observe(self, embeddings: Tensor) -> None:
        """Take a batch of nominal embeddings into account.

        Args:
            embeddings (Tensor): Shape ``(n, d)``, floating point, of one width, dtype and device over the stream.

        Raises:
            ValueError: If the batch is not such a matrix or holds NaN or infinite values. The state is unchanged then.
        """
        if embeddings.ndim != 2 or (self._store is not None and embeddings.shape[1] != self._store.shape[1]):  # noqa: PLR2004
            width = "d" if self._store is None else self._store.shape[1]
            msg = f"embeddings must have shape (n, {width}), got {tuple(embeddings.shape)}."
            raise ValueError(msg)
        if not torch.isfinite(embeddings).all():
            msg = "embeddings hold NaN or infinite values; check the images and the backbone's weights."
            raise ValueError(msg)
        for block in embeddings.split(self.bank_size):
            self._observe_block(block)
        self.patches_seen_ += embeddings.shape[0]

    def _observe_block(self, block: Tensor) -> None:
        if self._store is None:
            self._store = block.clone()
        else:
            novel = block[_distance(block, self._store) > self.threshold_]
            self._store = torch.cat((self._store, novel))
        # store <= 2 * bank_size before a block and a block <= bank_size: at most 3 * bank_size at once
        if self._store.shape[0] > 2 * self.bank_size:
            self._thin()

    def _thin(self) -> None:
        if self._store is None:
            return
        taken, radius = farthest_first(self._store, self.bank_size)
        self._store = self._store[taken]
        self.threshold_ = max(self.threshold_, radius)

    def bank(self) -> Tensor:
        """The bank learnt so far.

        Returns:
            Tensor: Atoms, shape ``(M, d)`` with ``1 <= M <= bank_size``; exact duplicates are dropped.

        Raises:
            ValueError: If no embedding was observed.
        """
        if self._store is None or self._store.shape[0] == 0:
            msg = "no nominal embedding was observed: the training set is empty."
            raise ValueError(msg)
        self._thin()
        return self._store.clone()


def _distance(points: Tensor, atoms: Tensor) -> Tensor:
    """Euclidean distance from each point to its nearest atom, shape ``(n,)``."""
    centre = atoms.mean(0)
    points, atoms = points - centre, atoms - centre
    nearest = torch.addmm(atoms.square().sum(1), points, atoms.T, alpha=-2.0).amin(1)
    return (nearest + points.square().sum(1)).clamp_min(0.0).sqrt()
