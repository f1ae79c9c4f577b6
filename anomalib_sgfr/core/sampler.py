"""Subspace sampling: a small bank that covers a stream of nominal embeddings, in one pass and
bounded memory.

A farthest-first (k-center) selection kept up to date over a stream, in the spirit of the
incremental k-center of Charikar et al. (STOC 1997): an embedding becomes an atom only if it lies
farther from every atom than the threshold, the farthest of a batch first; when there are too many
atoms, they are thinned, again farthest first, and the distance at which the thinning stopped
becomes the new threshold. The threshold never falls. A small bank is chosen in the end from more
atoms than it will have: one thinning of many loses less than many thinnings of few.

What is thinned out retires with its account of what it stands for, which goes to the nearest atom
of the bank in the end: in one step, because every step adds its length to the bound.

Farthest-first takes what lies at the edge, noise included. In the end each atom therefore moves to
the mean of what it stands for (:func:`~anomalib_sgfr.core.clusters.recentred`).
"""

import copy

import torch
from torch import Tensor

from anomalib_sgfr.core.clusters import Clusters, assign, prune, reassign
from anomalib_sgfr.core.linear_algebra import float64_device
from anomalib_sgfr.core.patch_grid import ORIGIN

__all__ = ["LARGEST", "WORKING_SIZE", "SubspaceSampler"]

LARGEST = 1e15  # of an embedding's values: larger ones cannot be squared and summed

WORKING_SIZE = 3500  # atoms that a smaller bank is chosen from, at least
_TOGETHER = (
    2048  # embeddings of small batches: each step has costs that do not depend on their number
)
_RETIRED = 4  # times the atoms in use, before their accounts go to atoms in use after all


class SubspaceSampler:
    """Streaming learner of a bank: ``observe`` batches, then read ``bank``.

    Holds at most ``6 * max(bank_size, working_size)`` embeddings between calls, whatever the length
    of the stream: a third as atoms, the others retired; and batches that are small, until they are
    worth the while together. Deterministic for a given order of the stream; reading the bank
    changes nothing.

    Args:
        bank_size (int): Largest number of atoms in the bank.
        tolerance (float): Distance (Euclidean, embedding units) within which an embedding needs no
            atom of its own: the bank stays smaller than ``bank_size`` when all that was seen lies
            within it. 32 bits tell embeddings apart that differ by a thousandth of their length
            from the centre: a smaller tolerance is exceeded by up to that much, and the radius of
            the cover says so. Defaults to ``0.0``.
        working_size (int): Atoms to thin to while the stream lasts, if that is more than
            ``bank_size``. Defaults to ``3500``.

    Attributes:
        patches_seen_ (int): Embeddings observed so far.
        threshold_ (float): Distance above which an embedding becomes an atom now.

    Example:
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
        """Go on from a bank learnt before, instead of from nothing.

        Args:
            clusters (Clusters): The bank, with what its atoms stand for.
            threshold (float): ``threshold_`` of the sampler that learnt it.
        """
        self._clusters = Clusters(*(part.clone() for part in clusters))
        self.threshold_ = max(threshold, self.tolerance)
        self.patches_seen_ = int(clusters.count.sum())

    @property
    def atoms_held(self) -> int:
        """Atoms now: up to twice ``working_size``, before the last thinning."""
        return 0 if self._clusters is None else len(self._clusters.atoms)

    @torch.no_grad()
    def observe(self, embeddings: Tensor, origin: Tensor | None = None) -> None:
        """Take a batch of nominal embeddings into account.

        Args:
            embeddings (Tensor): Shape ``(n, d)``, floating point, of one width, dtype and device
                over the stream; half precisions are kept as ``float32``.
            origin (Tensor | None): Where each was seen, as in :class:`Clusters`; shape ``(n, 5)``,
                ``int32``.

        Raises:
            ValueError: If the batch is not such a matrix or holds NaN or infinite values. The state
                is unchanged then.
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
        if waiting < min(
            _TOGETHER, self.working_size
        ):  # kept as they are: the caller may use their memory again
            self._waiting.append(
                Clusters.of(embeddings.clone(), None if origin is None else origin.clone())
            )
        else:
            self._waiting.append(Clusters.of(embeddings, origin))
            self._take_in()

    def _take_in(self) -> None:
        """Take in what waits."""
        if not self._waiting:
            return
        batch = self._waiting[0] if len(self._waiting) == 1 else _joined(self._waiting)
        self._waiting = []
        if self._clusters is None:
            self._prune(batch, 2 * self.working_size, self.tolerance)
        else:
            self._clusters = assign(self._clusters, batch.atoms, self.threshold_, batch.origin)
            if len(self._clusters.atoms) > 2 * self.working_size:
                self._prune(self._clusters, self.working_size)

    def _prune(self, clusters: Clusters, size: int, tolerance: float = 0.0) -> None:
        # only what stands for itself alone may go for being within the tolerance: distances would
        # add up
        self._clusters, dropped, radius = prune(clusters, size, tolerance)
        self.threshold_ = max(self.threshold_, radius)
        pruned = dropped if self._pruned is None else self._pruned.joined(dropped)
        if len(pruned.atoms) > _RETIRED * self.working_size:
            self._clusters, pruned = reassign(self._clusters, pruned), pruned.rows(slice(0))
        self._pruned = pruned

    def bank(self) -> Tensor:
        """The bank learnt so far.

        Returns:
            Tensor: Atoms, shape ``(M, d)`` with ``1 <= M <= bank_size``; exact duplicates are
                dropped.

        Raises:
            ValueError: If no embedding was observed.
        """
        return self.clusters().atoms

    def images(self) -> set[int]:
        """Numbers of the images that atoms held now come from."""
        held = [
            part.origin[:, 0]
            for part in (self._clusters, self._pruned, *self._waiting)
            if part is not None
        ]
        return set(torch.cat(held).unique().tolist()) if held else set()

    def clusters(self) -> Clusters:
        """The bank learnt so far, with what its atoms stand for; raises as :meth:`bank`."""
        return self.fitted_state()[0]

    @torch.no_grad()
    def fitted_state(self, size: int | None = None) -> tuple[Clusters, float]:
        """The bank learnt so far, with what its atoms stand for; raises as :meth:`bank`.

        Args:
            size (int | None): Largest number of atoms; ``bank_size`` if ``None``. More are worth
                having where a bank is yet to be made of several covers, by
                :func:`~anomalib_sgfr.core.clusters.merge`.

        Returns:
            tuple[Clusters, float]: The cover, and the distance above which an embedding would need
                an atom of its own.
        """
        if self._waiting:
            now = copy.copy(self)
            now._take_in()  # noqa: SLF001  # of this class
            return now.fitted_state(size)
        if self._clusters is None:
            msg = "no nominal embedding was observed: the training set is empty."
            raise ValueError(msg)
        kept, dropped, radius = prune(self._clusters, size or self.bank_size)
        others = dropped if self._pruned is None else self._pruned.joined(dropped)
        return reassign(kept, others), max(self.threshold_, radius)


def _joined(batches: list[Clusters]) -> Clusters:
    return Clusters(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
