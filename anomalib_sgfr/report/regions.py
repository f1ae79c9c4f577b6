"""The per-region overlap of a run, by anomalib's own metric, while memory suffices."""

import torch
from anomalib.metrics.aupro import _AUPRO
from torch import Tensor

from anomalib_sgfr.report.statistics import Curve, thinned

__all__ = ["RegionOverlap"]

_PIXELS = 2**26  # kept: 256 MiB of maps, a thousand of 256 x 256


class RegionOverlap:
    """Gathers maps and masks, and gives the curve of how much of each defect is found at how many false pixels."""

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._pixels = 0
        self.left_out = 0

    def add(self, maps: Tensor | None, masks: Tensor | None) -> None:
        """Keep those of a batch, shape ``(B, 1, H, W)`` or ``(B, H, W)``, where there are masks."""
        if maps is None or masks is None:
            return
        scores, truth = (part.detach().reshape(len(part), *part.shape[-2:]).cpu() for part in (maps, masks))
        if scores.shape != truth.shape or self._pixels + scores.numel() > _PIXELS:
            self.left_out += len(scores)
            return
        if self._maps and self._maps[0].shape[1:] != scores.shape[1:]:
            self.left_out += len(scores)
            return
        self._pixels += scores.numel()
        self._maps.append(scores.float())
        self._masks.append(truth > 0)

    def curve(self) -> tuple[Curve | None, str]:
        """The curve up to 30% false pixels and the area under it as a share; and what it leaves out, or why not.

        Returns:
            tuple[Curve | None, str]: ``None`` where no defect is marked.
        """
        if not any(bool(mask.any()) for mask in self._masks):
            return None, "No mask marks a defect, so there is no per-region overlap."
        metric = _AUPRO()
        metric.update(torch.cat(self._maps), torch.cat(self._masks).int())
        false_pixels, overlap = metric._compute()  # noqa: SLF001  # what its own figure is drawn from
        area = float(metric.compute())
        note = f"{self.left_out} images are left out of it: it takes those that fit in memory." if self.left_out else ""
        return thinned(false_pixels.cpu().numpy(), overlap.cpu().numpy(), area), note
