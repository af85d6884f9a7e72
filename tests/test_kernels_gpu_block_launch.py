"""How block kernels are launched: grids and shapes. Nothing is multiplied, and no memory is written."""

from __future__ import annotations

import pytest
import torch
from convs import geometry

from sparselottery import Pattern

triton = pytest.importorskip("triton")
from sparselottery.kernels.gpu import Plan, block  # noqa: E402
from sparselottery.kernels.gpu.launch import recorded  # noqa: E402

GRID_LIMIT = 65535  # of CUDA, for grid y and z


def huge(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of any shape, of one number in memory."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def planned(mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, of=None):
    """(values, indices, plan) of a layer."""
    pattern = Pattern.from_mask(mask.flatten(1))
    indices = pattern.crow_indices, pattern.col_indices
    words = block.plan(*indices, pattern.shape[1], shape, of)
    return torch.zeros(pattern.nnz, dtype=dtype), indices, Plan(words, shape)


def full(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def linear_launches(batch: int, mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16):
    """Of a layer forward and backward."""
    values, indices, plan = planned(mask, shape, dtype)
    x, y = (huge(batch, features, dtype=dtype) for features in reversed(mask.shape))
    with recorded() as launches:
        block.forward(x, values, None, *indices, plan, y)
        block.grad_x(y, values, *indices, plan, x)
        block.grad_values(y, x, *indices, plan)
    return launches


def conv_launches(
    batch: int, size: int, mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
):
    """Of a convolution with padding, forward and backward."""
    of = geometry(mask.shape[1], sides=(1, 1, 1, 1))
    values, indices, plan = planned(mask, shape, dtype, of)
    x, y = (huge(batch, channels, size, size, dtype=dtype) for channels in reversed(mask.shape[:2]))
    with recorded() as launches:
        block.conv_forward(x, values, None, *indices, plan, of, y)
        block.conv_grad_x(y, values, *indices, plan, of, x)
        block.conv_grad_values(y, x, *indices, plan, of)
    return launches


@pytest.mark.parametrize(
    "launches",
    [
        lambda: linear_launches(2**24, full(64, 64), (64, 64)),
        lambda: linear_launches(2**24, full(512, 8), (8, 8)),
        lambda: conv_launches(256, 224, full(64, 64, 3, 3), (64, 64)),
    ],
    ids=["samples", "samples and rows", "images"],
)
def test_grids_are_within_the_limits_of_cuda(launches):
    """The first dimension may have 2**31 - 1 programs, the others far fewer."""
    grids = [launch.grid for launch in launches()]
    assert max(grid[0] for grid in grids) > GRID_LIMIT
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= GRID_LIMIT for grid in grids)
