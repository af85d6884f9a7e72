"""The SDDMM by whole tiles against an fp64 truth, and when it is chosen; in Triton's interpreter without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from chains import assert_accurate, make
from gpus import DEVICE, run_chain

from sparselottery.kernels.gpu.csr import tiles
from sparselottery.kernels.gpu.csr.plan import heaviest_first
from sparselottery.kernels.gpu.device import assumed
from sparselottery.kernels.gpu.launch import overridden, shapes
from sparselottery.kernels.reference import leading_dim
from sparselottery.pattern import Pattern

pytestmark = pytest.mark.usefixtures("poison")
FAST_DTYPES = [torch.float32, torch.float16]  # bf16 products are wrong in the interpreter


def rows(features, batch, dtype):
    """Random batch-minor rows; what lies beyond the last vector of samples is NaN."""
    ld = leading_dim(batch) + 16
    found = torch.full((features, ld), math.nan, dtype=dtype, device=DEVICE)
    found[:, : -(-batch // 16) * 16] = 0
    found[:, :batch] = torch.randn(features, batch, dtype=dtype)
    return found


def result(mask, batch, dtype, **shape):
    pattern = Pattern.from_mask(mask.to(DEVICE))
    gy, x = rows(mask.shape[0], batch, dtype), rows(mask.shape[1], batch, dtype)
    order = heaviest_first(pattern.crow_indices).int()
    with overridden("sddmm_tiles", **shape):
        got = tiles.sddmm_tiles(gy, x, pattern.crow_indices, pattern.col_indices, order, batch)
    truth = (gy[:, :batch].double() @ x[:, :batch].double().t())[mask.to(DEVICE)]
    return got, truth


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize(("outputs", "inputs", "batch"), [(3, 5, 1), (130, 70, 40), (128, 64, 64), (1, 300, 17)])
def test_equals_the_truth(outputs, inputs, batch, dtype):
    got, truth = result(torch.rand(outputs, inputs) < 0.3, batch, dtype)
    assert got.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps * math.sqrt(batch)
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(density):
    mask = torch.full((140, 66), bool(density))
    got, truth = result(mask, 20, torch.float32)
    assert got.shape == truth.shape == (mask.sum(),)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_parts_of_the_samples_are_summed():
    mask = torch.rand(20, 30) < 0.5
    torch.manual_seed(1)
    whole, _ = result(mask, 90, torch.float32, splits=1, bm=32)
    torch.manual_seed(1)
    parts, truth = result(mask, 90, torch.float32, splits=3, bm=32)
    torch.testing.assert_close(parts.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_row_and_column():
    mask = torch.ones(4, 6, dtype=torch.bool)
    pattern = Pattern.from_mask(mask.to(DEVICE))
    gy, x = rows(4, 20, torch.float32), rows(6, 20, torch.float32)
    gy[1, 3], x[2, 5] = math.nan, math.inf
    order = torch.arange(4, dtype=torch.int32, device=DEVICE)
    got = tiles.sddmm_tiles(gy, x, pattern.crow_indices, pattern.col_indices, order, 20).view(4, 6).cpu()
    bad = torch.zeros(4, 6, dtype=torch.bool)
    bad[1], bad[:, 2] = True, True
    assert torch.equal(~got.isfinite(), bad)


@pytest.mark.parametrize(
    ("capability", "dtype", "density", "batch", "chosen"),
    [
        ((9, 0), torch.float32, 0.1, 256, True),
        ((9, 0), torch.float32, 0.1, 255, False),
        ((9, 0), torch.float32, 0.02, 256, False),
        ((8, 0), torch.float32, 0.1, 256, False),
        ((9, 4), torch.float32, 0.1, 256, False),
        ((8, 0), torch.bfloat16, 0.1, 256, True),
        ((7, 5), torch.float16, 0.1, 256, False),
    ],
)
def test_who_takes_tiles(capability, dtype, density, batch, chosen):
    x = torch.empty(batch, 1000, dtype=dtype)
    with assumed(capability, 99 << 10):
        assert tiles.pays(x, int(density * 1000 * 500), 500) == chosen


@pytest.mark.gpu_core
def test_a_chain_trains_by_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "SAMPLES", 16)
    chain = make(40, [70, 130, 9], 0.3, entries=torch.randn)
    with shapes() as used:
        assert_accurate(run_chain(chain), chain)
    assert "sddmm_tiles" in used
