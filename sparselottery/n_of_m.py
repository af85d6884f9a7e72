"""N:M masks: of each M weights in a row of a layer at most N survive ("2:4" is what sparse tensor cores multiply).

A row's M weights are at consecutive columns, of a convolution at consecutive channels of one tap. Groups begin at
multiples of M; the border may cut the last one off, and N weights of it survive too where it has as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NofM:
    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @classmethod
    def read(cls, what: str, text: str) -> NofM:
        """ValueError for what is not "N:M" with 1 <= N < M."""
        kept, _, group = text.partition(":")
        if not (kept.isdecimal() and group.isdecimal() and 1 <= int(kept) < int(group)):
            raise ValueError(f"{what}: expected (rows, columns), 'rows' or 'N:M' with 1 <= N < M, got {text!r}")
        return cls(int(kept), int(group))


def n_of_m(mask: Tensor, scores: Tensor, pattern: NofM) -> Tensor:
    """A new mask with at most N survivors in each group of M: of those of `mask` the ones with the highest scores.

    mask: bool (O, C, ...). scores: (n,) of its survivors, by index; among equal ones the first by index goes.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    importance = torch.full(mask.shape, -torch.inf, dtype=dtype, device=mask.device)
    importance = importance.masked_scatter_(mask, scores.to(dtype))
    columns = mask.shape[1]
    padding = [0, 0] * (mask.dim() - 2) + [0, -columns % pattern.group]
    grouped = F.pad(importance, padding, value=-torch.inf).unflatten(1, (-1, pattern.group))
    order = grouped.argsort(dim=2, stable=True)  # what does not survive is first
    kept = torch.zeros_like(grouped, dtype=torch.bool)
    kept.scatter_(2, order[:, :, -pattern.kept :], True)
    return kept.flatten(1, 2)[:, :columns] & mask


def fraction_of(mask: Tensor, pattern: NofM) -> float:
    """The share that goes of the fullest group; of one that is whole if the border cuts off all."""
    whole = mask[:, : mask.shape[1] // pattern.group * pattern.group]
    most = int(whole.unflatten(1, (-1, pattern.group)).sum(2).max()) if whole.numel() else pattern.group
    return 1 - pattern.kept / max(most, pattern.kept)
