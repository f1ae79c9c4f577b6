"""Subspace sampling: a memory bank of a stream of embeddings, in one pass and bounded memory.

It is an incremental k-center selection, after Charikar et al. (STOC 1997). An embedding becomes an
atom if it lies farther from every atom than a threshold. When there are too many atoms, greedy
k-center prunes them, and the distance at which it stopped becomes the threshold, which never falls.
The bank is chosen at the end from more atoms than it will have: one pruning of many atoms loses
less than many prunings of few.

A pruned atom keeps its statistics until the end, when they go to the nearest atom of the bank in
one step, because every step adds its length to the bounds.

Greedy k-center takes points at the edge, noise included. At the end of a fit each atom therefore
moves to the mean of its members (:func:`~anomalib_sgfr.core.clusters.recentred`).
"""

import copy

import torch
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters, assign, prune, reassign
from anomalib_sgfr.core.linear_algebra import float64_device
from anomalib_sgfr.core.patch_grid import ORIGIN

__all__ = ["LARGEST", "WORKING_SIZE", "SubspaceSampler"]

LARGEST = 1e15  # values of an embedding; larger ones cannot be squared and summed
WORKING_SIZE = 3500  # fewest atoms that a smaller bank is chosen from
_TOGETHER = 2048  # embeddings of small batches that are processed at once
_PRUNED = 4  # times the working size: pruned atoms held at most


class SubspaceSampler:
    """Sampler of a memory bank from a stream: ``observe`` batches, then read ``bank``.

    Between calls it holds at most ``6 * max(bank_size, working_size)`` embeddings, a third of them
    atoms and the others pruned, and up to 2,048 embeddings of small batches. The result depends on
    the order of the stream alone. Reading the bank changes nothing.

    Args:
        bank_size (int): Largest number of atoms in the bank.
        tolerance (float): Euclidean distance within which an embedding needs no atom of its own.
            The bank stays smaller than ``bank_size`` if that suffices. In 32 bits, distances are
            exact to a thousandth of an embedding's distance from the centre; the clusters' radius
            accounts for it. Defaults to ``0.0``.
        working_size (int): Number of atoms to prune to during the stream, if larger than
            ``bank_size``. Defaults to ``3500``.

    Attributes:
        patches_seen_ (int): Number of embeddings observed.
        threshold_ (float): Distance above which an embedding becomes an atom.

    Examples:
        >>> from anomalib_sgfr import SubspaceSampler
        >>> sampler = SubspaceSampler(bank_size=2)
        >>> sampler.observe(torch.tensor([[0.0], [1.0], [9.0], [10.0], [0.5]]))
        >>> sampler.bank().flatten().tolist()
        [0.0, 10.0]

    Raises:
        ValueError: If ``bank_size`` is below one or ``tolerance`` is negative or not finite.
    """

    def __init__(
        self, bank_size: int, tolerance: float = 0.0, working_size: int = WORKING_SIZE
    ) -> None:
        if bank_size < 1:
            msg = f"bank_size must be at least 1, got {bank_size}."
            raise ValueError(msg)
        if not 0.0 <= tolerance < float("inf"):
            msg = f"tolerance must be a finite distance of at least 0, got {tolerance}."
            raise ValueError(msg)
        self.bank_size = bank_size
        self.tolerance = tolerance
        self.working_size = max(bank_size, working_size)
        self.patches_seen_ = 0
        self.threshold_ = tolerance
        self._clusters: Clusters | None = None
        self._pruned: Clusters | None = None
        self._waiting: list[Clusters] = []  # batches that are too small

    def resume(self, clusters: Clusters, threshold: float) -> None:
        """Continue from an earlier bank.

        Args:
            clusters (Clusters): Atoms and statistics of the bank.
            threshold (float): ``threshold_`` of the sampler that made it.
        """
        self._clusters = Clusters(*(part.clone() for part in clusters))
        self.threshold_ = max(threshold, self.tolerance)
        self.patches_seen_ = int(clusters.count.sum())

    @property
    def atoms_held(self) -> int:
        """Number of atoms now, at most twice ``working_size``."""
        return 0 if self._clusters is None else len(self._clusters.atoms)

    @torch.no_grad()
    def observe(self, embeddings: Tensor, origin: Tensor | None = None) -> None:
        """Sample a batch of nominal embeddings.

        Args:
            embeddings (Tensor): Shape ``(n, d)``, floating point, of one width, dtype and device
                over the stream; half precisions become ``float32``.
            origin (Tensor | None): Patches they come from, as in
                :class:`~anomalib_sgfr.core.clusters.Clusters`; shape ``(n, 5)``, ``int32``.

        Raises:
            ValueError: If the batch is no such matrix or holds NaN or infinite values; the state is
                unchanged then.
        """
        held = [*self._waiting, *([] if self._clusters is None else [self._clusters])]
        width = held[0].atoms.shape[1] if held else None
        if embeddings.ndim != 2 or (width is not None and embeddings.shape[1] != width):  # noqa: PLR2004
            msg = f"embeddings must have shape (n, {width or 'd'}), got {tuple(embeddings.shape)}."
            raise ValueError(msg)
        if origin is not None and origin.shape != (len(embeddings), ORIGIN):
            msg = (
                f"origin must have shape ({len(embeddings)}, {ORIGIN}), got {tuple(origin.shape)}."
            )
            raise ValueError(msg)
        if not embeddings.is_floating_point():
            msg = f"embeddings must be floating point, got {embeddings.dtype}."
            raise ValueError(msg)
        embeddings = embeddings.to(float64_device(embeddings.device))
        origin = None if origin is None else origin.to(embeddings.device)
        if embeddings.dtype not in {torch.float32, torch.float64}:
            embeddings = embeddings.float()
        if embeddings.numel() and not embeddings.abs().amax() < LARGEST:  # of NaN, NaN
            msg = (
                f"embeddings hold NaN or infinite values, or some of {LARGEST:g} and more; check"
                " the images and the backbone's weights."
            )
            raise ValueError(msg)
        if len(embeddings) == 0:
            return
        self.patches_seen_ += embeddings.shape[0]
        waiting = sum(len(part.atoms) for part in self._waiting) + len(embeddings)
        if waiting < min(_TOGETHER, self.working_size):
            origin = None if origin is None else origin.clone()  # the caller may reuse its memory
            self._waiting.append(Clusters.of(embeddings.clone(), origin))
        else:
            self._waiting.append(Clusters.of(embeddings, origin))
            self._process_waiting()

    def _process_waiting(self) -> None:
        """Sample the batches that wait."""
        if not self._waiting:
            return
        parts = zip(*self._waiting, strict=True)
        batch = self._waiting[0] if len(self._waiting) == 1 else Clusters(*map(torch.cat, parts))
        self._waiting = []
        if self._clusters is None:
            self._prune(batch, 2 * self.working_size, self.tolerance)
        else:
            self._clusters = assign(self._clusters, batch.atoms, self.threshold_, batch.origin)
            if len(self._clusters.atoms) > 2 * self.working_size:
                self._prune(self._clusters, self.working_size)

    def _prune(self, clusters: Clusters, size: int, tolerance: float = 0.0) -> None:
        # a tolerance suits clusters of one member alone: distances would add up
        self._clusters, dropped, radius = prune(clusters, size, tolerance)
        self.threshold_ = max(self.threshold_, radius)
        pruned = dropped if self._pruned is None else self._pruned.joined(dropped)
        if len(pruned.atoms) > _PRUNED * self.working_size:
            self._clusters, pruned = reassign(self._clusters, pruned), pruned.rows(slice(0))
        self._pruned = pruned

    def bank(self) -> Tensor:
        """Atoms of the bank.

        Returns:
            Tensor: Distinct atoms, shape ``(M, d)`` with ``1 <= M <= bank_size``.

        Raises:
            ValueError: If no embedding was observed.
        """
        return self.clusters().atoms

    def images(self) -> set[int]:
        """Numbers of the images that the embeddings held now come from."""
        parts = (self._clusters, self._pruned, *self._waiting)
        held = [part.origin[:, 0] for part in parts if part is not None]
        return set(torch.cat(held).unique().tolist()) if held else set()

    def clusters(self) -> Clusters:
        """Atoms and statistics of the bank; raises as :meth:`bank`."""
        return self.fitted_state()[0]

    @torch.no_grad()
    def fitted_state(self, size: int | None = None) -> tuple[Clusters, float]:
        """Clusters of the bank and their threshold; raises as :meth:`bank`.

        Args:
            size (int | None): Largest number of atoms; ``None`` for ``bank_size``. More serve where
                banks are to be merged, by :func:`~anomalib_sgfr.core.clusters.merge`.

        Returns:
            tuple[Clusters, float]: Atoms with statistics, and the distance above which an embedding
            would become an atom.
        """
        if self._waiting:
            now = copy.copy(self)
            now._process_waiting()  # noqa: SLF001  # of this class
            return now.fitted_state(size)
        if self._clusters is None:
            msg = "no nominal embedding was observed: the training set is empty."
            raise ValueError(msg)
        kept, dropped, radius = prune(self._clusters, size or self.bank_size)
        others = dropped if self._pruned is None else self._pruned.joined(dropped)
        return reassign(kept, others), max(self.threshold_, radius)
