"""Threshold with the largest F1 score of the pixels of a validation set."""

import torch
from torch import Tensor

from anomalib_sgfr.core.processes import summed

__all__ = ["StreamingF1Threshold"]

# A bin holds the 2^9 32-bit numbers that share exponent and the first 14 bits of the fraction.
_DROPPED_BITS, _FRACTION_BITS = 9, 14
_LOWEST, _OCTAVES = -32, 64
_BINS = _OCTAVES << _FRACTION_BITS
_FIRST = (127 + _LOWEST) << _FRACTION_BITS


class StreamingF1Threshold:
    """Threshold with the largest F1 score of any number of values, from counts in fixed bins.

    The bins' edges are a factor of at most ``1 + 2**-14`` (0.006%) apart, from ``2**-32`` to
    ``2**32``; smaller values are in the first bin, larger ones and NaN in the last. Counts take 16
    MiB, from the first :meth:`update` to :meth:`reset`.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, values: Tensor, positive: Tensor) -> None:
        """Count values.

        Args:
            values (Tensor): Any shape, floating point.
            positive (Tensor): Whether each is of the class above the threshold; of the same number
                of elements.

        Raises:
            ValueError: If the numbers of elements differ.
        """
        if values.numel() != positive.numel():
            msg = (
                f"positive must have as many elements as values, {values.numel()}, got"
                f" {positive.numel()}."
            )
            raise ValueError(msg)
        bits = values.detach().flatten().float().view(torch.int32)
        bins = ((bits >> _DROPPED_BITS) - _FIRST).clamp(0, _BINS - 1).long()
        both = torch.bincount(bins + _BINS * positive.flatten().bool(), minlength=2 * _BINS)
        counts = both.view(2, _BINS)
        self._counts = (
            counts if self._counts is None else self._counts + counts.to(self._counts.device)
        )

    def compute(self, device: torch.device | None = None) -> float | None:
        """Threshold from the counts of all processes. A collective call.

        Args:
            device (torch.device | None): One that the process group communicates on.

        Returns:
            float | None: The lower edge of a bin, the lowest if several are as good, the same in
            all processes; ``None`` unless there are values of both classes.
        """
        own = torch.zeros(2, _BINS, dtype=torch.int64) if self._counts is None else self._counts
        counts = summed(own.to(device))
        used = counts.sum(0).nonzero().flatten()
        # in each bin and above
        negatives, positives = counts[:, used].flip(1).cumsum(1).flip(1).double()
        if not used.numel() or not float(negatives[0]) or not float(positives[0]):
            return None
        f1 = 2.0 * positives / (positives + negatives + positives[0])
        best = int(used[int((f1 == f1.max()).nonzero()[0])])
        lower_edge = torch.tensor((best + _FIRST) << _DROPPED_BITS, dtype=torch.int32)
        return 0.0 if best == 0 else float(lower_edge.view(torch.float32))

    def reset(self) -> None:
        """Forget all values."""
        self._counts = None
