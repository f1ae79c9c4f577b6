"""The threshold of largest F1 score of any number of values, in memory that does not grow with it."""

import torch
from torch import Tensor

from anomalib_sgfr.core.processes import summed

__all__ = ["StreamingF1Threshold"]

# A bin is the 2^9 numbers that share exponent and the first 14 bits of the fraction of a 32-bit float.
_DROPPED, _FRACTION = 9, 14
_LOWEST, _OCTAVES = -32, 64
_BINS = _OCTAVES << _FRACTION
_FIRST = (127 + _LOWEST) << _FRACTION


class StreamingF1Threshold:
    """Threshold that parts values of two classes at the largest F1 score, from counts in fixed bins.

    The bins' edges are a factor of at most ``1 + 2**-14`` (0.006%) apart, from ``2**-32`` to ``2**32``; smaller values
    are in the first bin, larger ones and NaN in the last. Counts take 16 MiB, from the first :meth:`update` to
    :meth:`reset`.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, values: Tensor, positive: Tensor) -> None:
        """Count values.

        Args:
            values (Tensor): Any shape, floating point.
            positive (Tensor): Whether each is of the class above the threshold; of the same number of elements.

        Raises:
            ValueError: If the numbers of elements differ.
        """
        if values.numel() != positive.numel():
            msg = f"positive must have as many elements as values, {values.numel()}, got {positive.numel()}."
            raise ValueError(msg)
        flat = values.detach().flatten().float()
        bins = ((flat.view(torch.int32) >> _DROPPED) - _FIRST).clamp(0, _BINS - 1).long()
        counts = torch.bincount(bins + _BINS * positive.flatten().bool(), minlength=2 * _BINS).view(2, _BINS)
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)

    def compute(self, device: torch.device | None = None) -> float | None:
        """The threshold, from what all processes have counted. A collective: every process calls it.

        Args:
            device (torch.device | None): One that the process group communicates on.

        Returns:
            float | None: The lower edge of a bin, the lowest if several are as good, the same in all processes;
            ``None`` unless there are values of both classes.
        """
        own = torch.zeros(2, _BINS, dtype=torch.int64) if self._counts is None else self._counts
        counts = summed(own.to(device))
        used = counts.sum(0).nonzero().flatten()
        negatives, positives = counts[:, used].flip(1).cumsum(1).flip(1).double()  # in each bin and above
        if not used.numel() or not float(negatives[0]) or not float(positives[0]):
            return None
        f1 = 2.0 * positives / (positives + negatives + positives[0])
        best = int(used[int((f1 == f1.max()).nonzero()[0])])
        return 0.0 if best == 0 else float(_edge(best))

    def reset(self) -> None:
        """Forget all values."""
        self._counts = None


def _edge(number: int) -> Tensor:
    """Smallest number in a bin."""
    return torch.tensor((number + _FIRST) << _DROPPED, dtype=torch.int32).view(torch.float32)
