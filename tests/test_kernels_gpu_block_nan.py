"""NaN through chains of blocks and convolutions: a net that diverges shows it."""

from __future__ import annotations

import pytest
import torch
from convs import geometry
from gpus import DEVICE

from sparselottery import Pattern

triton = pytest.importorskip("triton")
from sparselottery.kernels import gpu  # noqa: E402
from sparselottery.kernels.gpu import Plan, block  # noqa: E402


@pytest.mark.parametrize("blocks", [[(16, 16), (16, 16)], [(16, 1), (16, 16)], [(16, 16), (16, 1)]], ids=str)
def test_chains_keep_nan(blocks):
    pattern = Pattern.from_mask(torch.ones(16, 16, dtype=torch.bool))
    crow, col = pattern.crow_indices.to(DEVICE), pattern.col_indices.to(DEVICE)
    plans = [gpu.plan(crow, col, 16, shape) for shape in blocks]
    x, values = torch.ones(16, 16, device=DEVICE), [torch.ones(256, device=DEVICE)] * 2
    x[3, 2] = torch.nan
    y, saved = gpu.chain_forward(x, values, [None, None], [crow] * 2, [col] * 2, plans, False, True)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 16
    needs = True, [True] * 2, [False] * 2
    _, gvalues, _ = gpu.chain_backward(torch.ones_like(y), x, saved, values, [crow] * 2, [col] * 2, plans, *needs)
    assert gvalues[1].isnan().all()


def test_conv_keeps_nan():
    of = geometry(16, (1, 1))
    pattern = Pattern.from_mask(torch.ones(16, 16, dtype=torch.bool))
    indices = [each.to(DEVICE) for each in (pattern.crow_indices, pattern.col_indices)]
    plan = Plan(block.plan.build(*indices, 16, (16, 16), of), (16, 16))
    x, y, gx = (torch.ones(2, 16, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last) for _ in range(3))
    x[1, 4, 2, 0] = torch.nan
    values = torch.ones(256, device=DEVICE)
    block.conv_forward(x, values, None, *indices, plan, of, y, True)
    block.conv_grad_x(x, values, *indices, plan, of, gx)
    for got in (y, gx):
        assert got[1, :, 2, 0].isnan().all()
        assert got.isnan().sum() == 16
    assert block.conv_grad_values(y, x, *indices, plan, of).isnan().all()
