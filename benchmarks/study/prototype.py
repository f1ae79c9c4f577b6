"""Sgfr's bank and score with ideas under study that the product does not have, or not yet."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.bank import Bank
from anomalib_sgfr.core import self_expression
from anomalib_sgfr.core.cover import centred
from anomalib_sgfr.core.sampling import WORKING_SIZE, SubspaceSampler
from anomalib_sgfr.core.search import nearest, search_index
from anomalib_sgfr.core.selection import farthest_first

__all__ = ["Nominal", "PrototypeBank", "channel_scaling", "combined", "image_scores"]

_ROUNDS = 4  # of adding or dropping atoms
_RESIDUAL_SAMPLE = 131_072  # patches among which the worst rebuilt are looked for


class PrototypeBank(Bank):
    """The product's bank, with ideas under study that it does not have.

    Args:
        arguments (dict[str, Any]): As in :data:`benchmarks.study.variants.DEFAULTS`.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments["solver"], arguments["num_atoms"], arguments["regularisation"])
        self.arguments = arguments
        self.weight: Tensor | None = None  # (d,), scales residuals
        self.nominal: Tensor | None = None  # (M,), mean nominal residual length around each atom

    @torch.no_grad()
    def learn(self, nominal: Tensor) -> None:
        """Learn what the ideas need from nominal patches ``(n, d)``."""
        if self.arguments["residual_scaling"] == "spread":
            spread = self._express(nominal).residual.std(0)
            self.weight = spread.mean() / spread.clamp_min(1e-6 * spread.mean())
        if self.arguments["local_normalisation"]:
            expression = self._express(nominal)
            length = self._weighted_length(expression.residual)
            prior, weight = length.mean(), 5.0  # atoms that few patches use take the overall mean
            total = torch.full((len(self.atoms),), float(prior) * weight)
            count = torch.full((len(self.atoms),), weight)
            flat = expression.support.reshape(-1)
            total.index_add_(0, flat, length.repeat_interleave(expression.support.shape[1]))
            count.index_add_(0, flat, torch.ones(len(flat)))
            self.nominal = total / count / prior

    def residuals(self, patches: Tensor) -> Tensor:
        """As the product's, or by an idea under study."""
        if self.nominal is None and self.weight is None:
            return super().residuals(patches)
        lengths = []
        for chunk in patches.split(1024):
            expression = self._express(chunk)
            length = self._weighted_length(expression.residual)
            lengths.append(length if self.nominal is None else length / self.nominal[expression.support].mean(1))
        return torch.cat(lengths)

    def _express(self, patches: Tensor) -> self_expression.Expression:
        return self_expression.affine(patches, self.atoms, self.num_atoms, self.regularisation)

    def _weighted_length(self, residual: Tensor) -> Tensor:
        return (residual if self.weight is None else residual * self.weight).norm(dim=1)


def combined(residuals: Sequence[Tensor], means: Sequence[float], rule: str) -> list[Tensor]:
    """Residuals of each scale, so changed that the product's sum over scales follows a rule.

    Args:
        residuals (Sequence[Tensor]): Of each scale, shape ``(B, 1, h, w)``.
        means (Sequence[float]): What they average to on nominal images.
        rule (str): ``"sum"``, the product's; ``"equal"``, sum of each divided by its mean; ``"squares"``, root of the
            sum of their squares on the finest grid.

    Returns:
        list[Tensor]: What to sum.
    """
    if rule == "equal":
        overall = sum(means) / len(means)
        return [part * (overall / mean) for part, mean in zip(residuals, means, strict=True)]
    if rule == "squares":
        size = residuals[0].shape[-2:]
        aligned = [functional.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in residuals]
        return [torch.stack(aligned).square().sum(0).sqrt()]
    return list(residuals)


def image_scores(maps: NDArray[np.float32], rule: str) -> NDArray[np.float64]:
    """Image scores by a rule over the map."""
    flat = maps.reshape(len(maps), -1)
    if rule == "max":
        return flat.max(1).astype(np.float64)
    number = max(1, round(flat.shape[1] * float(rule.removeprefix("top ").removesuffix("%")) / 100))
    return np.partition(flat, -number, 1)[:, -number:].mean(1, dtype=np.float64)


def channel_scaling(first: Tensor, rule: str) -> Tensor:
    """Factor for each channel, shape ``(d,)``, from the patches of the first batch, ``(n, d)``."""
    if rule == "spread":
        spread = first.std(0)
        return spread.mean() / spread.clamp_min(1e-6 * spread.mean())
    return torch.ones(first.shape[1])


class Nominal:
    """The training patches of one scale of a fit, and the banks that samplers make of them.

    Args:
        batches (list[Tensor]): Patches as the fit sees them, each ``(n, d)``.
        seed (int): Of what is drawn at random.
    """

    def __init__(self, batches: list[Tensor], seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.farthest = torch.empty(0, dtype=torch.int64)  # patches, farthest first: as many as were needed so far
        self.streams: dict[int, SubspaceSampler] = {}  # by the atoms they thin to

    @functools.cached_property
    def every(self) -> Tensor:
        """All patches at once, shape ``(N, d)``."""
        return torch.cat(self.batches)

    def bank(self, arguments: dict[str, Any]) -> Tensor:
        """A bank, by the ``sampler`` of ``arguments``.

        ``stream`` is the product's; ``unmoved`` the same without moving atoms to the mean of what they stand for,
        ``narrow`` without choosing a small bank from more atoms than it will have. The others hold all patches at
        once: ``random``; ``whole``, k-center; ``residual``, k-center for the first half, then rounds that add what is
        rebuilt worst; ``pruned``, k-center of twice as many, of which rounds drop those that others rebuild best.
        """
        size = arguments["bank_size"]
        generator = torch.Generator().manual_seed(self.seed)
        if arguments["sampler"] in ("stream", "unmoved", "narrow"):
            cover, _ = self._stream(size if arguments["sampler"] == "narrow" else max(size, WORKING_SIZE)).learnt(size)
            return cover.atoms if arguments["sampler"] == "unmoved" else centred(cover).atoms
        if arguments["sampler"] == "random":
            return self.every[torch.randperm(len(self.every), generator=generator)[:size]]
        if arguments["sampler"] == "whole":
            return self._centers(size)
        if arguments["sampler"] == "pruned":
            return _prune(self._centers(2 * size), size, arguments)
        bank = self._centers(-(-size // 2))
        sample = self.every[torch.randperm(len(self.every), generator=generator)[:_RESIDUAL_SAMPLE]]
        for left in range(_ROUNDS, 0, -1):
            length = _residual_length(sample, bank, arguments)
            wanted = (size - len(bank)) // left
            worst = sample[length.topk(min(len(sample), 4 * wanted)).indices]
            bank = torch.cat((bank, worst[farthest_first(worst, wanted)[0]])) if wanted else bank
        return bank

    def _stream(self, size: int) -> SubspaceSampler:
        """The product's sampler after all batches; smaller banks are chosen from the same atoms."""
        if size not in self.streams:
            sampler = SubspaceSampler(size, working_size=size)
            for batch in self.batches:
                sampler.observe(batch)
            self.streams[size] = sampler
        return self.streams[size]

    def _centers(self, size: int) -> Tensor:
        if len(self.farthest) < size:  # a smaller k-center is the beginning of a larger one
            start = self.farthest if len(self.farthest) else None
            self.farthest = farthest_first(self.every, size, start)[0]
        return self.every[self.farthest[:size]]


def _residual_length(patches: Tensor, bank: Tensor, arguments: dict[str, Any]) -> Tensor:
    steps = (arguments["num_atoms"], arguments["regularisation"])
    return torch.cat([self_expression.affine_distance(chunk, bank, *steps) for chunk in patches.split(4096)])


def _prune(bank: Tensor, size: int, arguments: dict[str, Any]) -> Tensor:
    """Drop atoms down to ``size``, in each round those that the nearest others rebuild best."""
    k = arguments["num_atoms"]
    for left in range(2 * _ROUNDS, 0, -1):
        drop = (len(bank) - size) // left
        if drop <= 0:
            continue
        near = nearest(bank, search_index(bank), k + 1)
        own = near == torch.arange(len(bank))[:, None]
        own[:, -1] |= ~own.any(1)  # a twin may hide an atom from its own list
        others = near[~own].reshape(len(bank), k)
        offsets = bank[others] - bank[:, None]
        gram = offsets @ offsets.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram / scale[:, None, None] + max(arguments["regularisation"], 1e-6) * torch.eye(k)
        weights = torch.linalg.solve(gram, torch.ones(len(bank), k, 1))
        length = (weights / weights.sum(1, keepdim=True) * offsets).sum(1).norm(dim=1)
        bank = bank[length.topk(len(bank) - drop).indices.sort().values]
    return bank
