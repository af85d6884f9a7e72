"""Masks of whole blocks, for tests: how they are made, and what they are."""

from __future__ import annotations

import torch
from torch import Tensor


def blocky(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0, density: float = 0.3) -> Tensor:
    """A bool mask (O, C, ...) of whole blocks, some of which survive."""
    grid_shape = [-(-size // step) for size, step in zip(shape[:2], block, strict=True)]
    grid = torch.rand(*grid_shape, *shape[2:], generator=torch.Generator().manual_seed(seed)) < density
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def is_blocky(mask: Tensor, block: tuple[int, int]) -> bool:
    """The definition, block by block."""
    parts = (part.flatten(0, 1) for rows in mask.split(block[0], 0) for part in rows.split(block[1], 1))
    return all(torch.equal(part.all(0), part.any(0)) for part in parts if part.numel())
