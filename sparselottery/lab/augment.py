"""The augmentation of the paper's deep nets (App. I): random horizontal flips and crops of the padded image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 4  # zero pixels on each side
OFFSETS = 2 * PAD + 1  # places of the crop, along each axis
MOVES = 2 * OFFSETS * OFFSETS  # all that can happen to an image


def random_moves(count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 in [0, MOVES): for each image, one flip and crop, all equally likely."""
    return torch.randint(MOVES, (count,), generator=generator)


def flip_and_crop(x: Tensor, moves: Tensor) -> Tensor:
    """Images (N, C, H, W), each padded with PAD zeros, cropped to H x W again, then flipped or not, as ``moves`` say.

    moves: (N,) int64 in [0, MOVES), each (flip * OFFSETS + top) * OFFSETS + left: the crop begins at row ``top`` and
    column ``left`` of the padded image.
    Raises ValueError if ``x`` has no four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"expected images (N, C, H, W) to flip and crop, got shape {tuple(x.shape)}")
    count, channels, height, width = x.shape
    flip, top, left = moves // OFFSETS**2, moves // OFFSETS % OFFSETS, moves % OFFSETS
    rows = torch.arange(height, device=moves.device) + top[:, None]  # (N, H), of the padded image
    columns = torch.arange(width, device=moves.device)
    columns = torch.where(flip.bool()[:, None], columns.flip(0), columns) + left[:, None]  # (N, W)
    pixels = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]  # (N, H, W)
    index = pixels.view(count, 1, -1).expand(-1, channels, -1)
    return F.pad(x, (PAD,) * 4).flatten(2).gather(2, index).view_as(x)
