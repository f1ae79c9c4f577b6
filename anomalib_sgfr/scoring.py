"""What the banks of all scales cannot rebuild, together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from anomalib_sgfr.bank import Bank
from anomalib_sgfr.core import self_expression
from anomalib_sgfr.core.loops import in_chunks, mapped

__all__ = ["residual_maps"]


def residual_maps(banks: Sequence[Bank], embeddings: Sequence[Tensor]) -> list[Tensor]:
    """What each bank cannot rebuild of its embedding maps, in units of its ``nominal``.

    Codes are solved for all scales at once where they can: the steps are many, and each is short for one scale.

    Args:
        banks (Sequence[Bank]): One a scale.
        embeddings (Sequence[Tensor]): Of each scale, shape ``(B, d, h, w)``.

    Returns:
        list[Tensor]: Of each scale, shape ``(B, 1, h, w)``, ``float32``; not finite where an embedding is not.
    """
    with torch.autocast(embeddings[0].device.type, enabled=False):  # half precision would blur small residuals
        if all(bank.has_kernel(part) for bank, part in zip(banks, embeddings, strict=True)):
            return [bank.by_kernel(part) for bank, part in zip(banks, embeddings, strict=True)]
        if _alike(banks):
            products = [bank.products(part) for bank, part in zip(banks, embeddings, strict=True)]
            found = _solved(products, banks[0].num_atoms, banks[0].regularisation)
        else:
            found = [bank.lengths(part) for bank, part in zip(banks, embeddings, strict=True)]
    shapes = [(part.shape[0], 1, *part.shape[2:]) for part in embeddings]
    return [part.reshape(shape) / bank.nominal for part, shape, bank in zip(found, shapes, banks, strict=True)]


def _alike(banks: Sequence[Bank]) -> bool:
    """Whether the codes of all banks solve the same equations."""
    same = len({(bank.num_atoms, bank.regularisation) for bank in banks}) == 1
    return same and all(bank.by_products and len(bank.stored) > bank.num_atoms for bank in banks)


def _solved(products: Sequence[Tensor], num_atoms: int, regularisation: float) -> list[Tensor]:
    """Lengths of each scale, shape ``(B, h * w)``, from :meth:`Bank.products`."""

    def solve(part: Tensor) -> Tensor:
        return self_expression.length_of_products(part, num_atoms, regularisation)

    together = torch.cat(list(products), 1)  # (B, n, k', k')
    if torch.compiler.is_exporting():
        lengths = mapped(solve, together)
    else:
        lengths = in_chunks(solve, together.flatten(0, 1), 4 * (num_atoms + 1) ** 2).unflatten(0, together.shape[:2])
    return list(lengths.split([part.shape[1] for part in products], 1))
