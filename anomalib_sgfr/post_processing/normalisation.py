"""Score normalisation: raw scores and maps to values between zero and one, and back."""

import math
from typing import NamedTuple

import torch
from anomalib.post_processing import PostProcessor
from torch import Tensor

__all__ = ["ScoreNormaliser"]


class ScoreNormaliser(NamedTuple):
    """Normalisation of raw scores and maps to values between zero and one.

    With the threshold ``t`` a raw score ``s`` becomes ``s^2 / (s^2 + t^2)``: 0.5 at the threshold.
    The order of scores is kept. In 32 bits a score that is 5% larger stays larger up to 1,000 times
    ``t``, one that is 1% larger up to 500 times; from 6,000 times on all are 1.

    Attributes:
        power (float): Exponent of the score; 1 for a checkpoint of version 0.2.
        linear (bool): Whether to normalise as anomalib does: for a checkpoint of its own
            post-processor.
    """

    power: float = 2.0
    linear: bool = False

    def normalise(self, raw: Tensor, least: Tensor, most: Tensor, threshold: Tensor) -> Tensor:
        """Normalised scores or maps.

        Args:
            raw (Tensor): Raw ones, any shape.
            least (Tensor): Smallest raw value, a scalar; only used by the linear form.
            most (Tensor): Largest raw value, a scalar; only used by the linear form.
            threshold (Tensor): Raw threshold, a scalar.

        Returns:
            Tensor: Of the same shape.
        """
        if self.linear:
            scaled: Tensor = PostProcessor._normalize(raw, least, most, threshold)  # type: ignore[assignment]  # noqa: SLF001  # anomalib's
            return scaled
        # the threshold may be zero where all nominal scores are; shares overflow in no precision
        bound = threshold.clamp_min(torch.finfo(threshold.dtype).tiny)
        share, rest = raw / (raw + bound), bound / (raw + bound)
        if self.power != 1.0:
            share = share**self.power / (share**self.power + rest**self.power)
        # rounding must not put a score on the other side of 0.5 than the raw score is of the
        # threshold
        above = share.clamp_min(0.5 + torch.finfo(share.dtype).eps)
        return torch.where(raw > threshold, above, share.clamp_max(0.5))

    def raw(self, normalised: float, span: float, threshold: float) -> float:
        """Raw score of a normalised one; ``span`` is the range of raw scores of the linear form."""
        if self.linear:
            return threshold + (normalised - 0.5) * span
        return threshold * self.ratio(normalised)

    def ratio(self, normalised: float) -> float:
        """Ratio of the raw score of a normalised one to the threshold."""
        return (
            (normalised / (1.0 - normalised)) ** (1.0 / self.power) if normalised < 1 else math.inf
        )
