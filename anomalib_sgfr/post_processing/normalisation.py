"""What raw scores and maps are reported as, between zero and one, and back."""

from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from torch import Tensor

__all__ = ["ReportingScale"]


class ReportingScale(PostProcessor):
    """anomalib's, but for its scale.

    Scores and maps are reported as ``s^2 / (s^2 + t^2)``, with ``t`` the threshold: 0.5 there. A
    larger raw score is never reported as smaller. In 32 bits one that is 5% larger is reported as
    larger up to 1,000 times ``t``, one that is 1% larger up to 500 times; from 6,000 times on all
    are 1.

    Args:
        **kwargs (Any): As anomalib's post-processor takes them.

    Attributes:
        power (float): Of the score in what is reported; 1 for a checkpoint of version 0.2.
        linear (bool): Whether to scale as anomalib does: for a checkpoint of anomalib's own
            post-processor.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.power = 2.0
        self.linear = False

    @property
    def label_threshold(self) -> float:
        """The raw score above which an image is labelled anomalous: the threshold, moved by the
        sensitivity.
        """
        return self._unreported(
            self.image_threshold, self.image_max - self.image_min, 1.0 - self.image_sensitivity
        )

    @property
    def mask_threshold(self) -> float:
        """The value of the raw map above which a pixel is anomalous."""
        return self._unreported(
            self.pixel_threshold, self.pixel_max - self.pixel_min, 1.0 - self.pixel_sensitivity
        )

    def raw(self, score: float) -> float:
        """The raw score that is reported as ``score``, between zero and one."""
        if not (self.linear or self.enable_normalization):
            return score
        return self._unreported(self.image_threshold, self.image_max - self.image_min, score)

    def reported(self, score: float) -> float:
        """What a raw score is reported as; the other way round than :meth:`raw`."""
        if not (self.linear or self.enable_normalization) or bool(self.image_threshold.isnan()):
            return score
        raw = torch.tensor(score, dtype=torch.float32, device=self.image_threshold.device)
        scaled = self._normalize(raw, self.image_min, self.image_max, self.image_threshold)
        return score if scaled is None else float(scaled)

    def threshold_at(self, score: float) -> float:
        """The threshold, chosen anew, above which what is now reported as more than ``score`` is
        anomalous.

        Also with another sensitivity than 0.5, which moves the threshold that labels are given by;
        and where there is no threshold yet, so that scores are reported raw.
        """
        raw = score if bool(self.image_threshold.isnan()) else self.raw(score)
        moved = self._odds(1.0 - self.image_sensitivity)
        return (
            raw / moved if 0.0 < moved < torch.inf else raw
        )  # at the ends of sensitivity all or none are anomalous

    def _unreported(self, threshold: Tensor, span: Tensor, score: float) -> float:
        if self.linear:
            return float(threshold) + (score - 0.5) * float(span)
        return float(threshold) * self._odds(score)

    def _normalize(  # type: ignore[override]  # anomalib's is static, and called on the object
        self, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor
    ) -> Tensor | None:
        if preds is None or self.linear:
            scaled: Tensor | None = super()._normalize(preds, norm_min, norm_max, threshold)
            return scaled
        # where all nominal scores are zero, so may be the threshold; shares overflow in no
        # precision
        bound = threshold.clamp_min(torch.finfo(threshold.dtype).tiny)
        share, rest = preds / (preds + bound), bound / (preds + bound)
        if self.power != 1.0:
            share = share**self.power / (share**self.power + rest**self.power)
        # rounding must not put a score on the other side of 0.5 than the raw score is of the
        # threshold
        above = share.clamp_min(0.5 + torch.finfo(share.dtype).eps)
        return torch.where(preds > threshold, above, share.clamp_max(0.5))

    @property
    def normalized_image_threshold(self) -> Tensor:
        """The threshold in what is reported, moved by the sensitivity."""
        return self._reported(self.image_threshold, self.image_sensitivity)

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """The threshold of pixels in what is reported, moved by the sensitivity."""
        return self._reported(self.pixel_threshold, self.pixel_sensitivity)

    def _reported(self, threshold: Tensor, sensitivity: float) -> Tensor:
        if self.enable_normalization or self.linear:
            return torch.tensor(1.0 - sensitivity, dtype=torch.float32)
        return threshold * self._odds(1.0 - sensitivity)

    def _odds(self, score: float) -> float:
        """The raw score over the threshold that is reported as ``score``."""
        return (score / (1.0 - score)) ** (1.0 / self.power) if score < 1.0 else torch.inf
