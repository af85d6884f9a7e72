"""The packed nets of kernels.cpu_net against dense torch: each kind of stage by itself, on ugly sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparselottery.kernels import cpu, cpu_net
from sparselottery.kernels.reference import Geometry
from sparselottery.pattern import Pattern

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no native library")

# channels, filters, kernel, stride, padding (top, bottom, left, right), dilation, groups, image
CONVS = {
    "3x3": (5, 7, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, (9, 11)),
    "1x1": (8, 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, (2, 2)),
    "strides": (4, 6, (3, 2), (2, 3), (1, 0, 2, 1), (1, 1), 1, (13, 10)),
    "dilation": (4, 6, (3, 3), (1, 1), (2, 2, 3, 3), (2, 3), 1, (8, 16)),
    "strides and dilation": (2, 3, (2, 3), (3, 2), (0, 4, 1, 2), (4, 1), 1, (15, 9)),
    "groups": (6, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3, (5, 5)),
    "padding beyond the image": (2, 2, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 1, (2, 2)),
    "wide": (2, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, (3, 200)),
}


def sparse(rows: int, columns: int, density: float):
    mask = torch.rand(rows, columns) < density
    mask[rows // 2] = False  # an empty row
    pattern, weight = Pattern.from_mask(mask), torch.randn(rows, columns) * mask
    return pattern, weight, pattern.gather(weight)


def close(got, want):
    assert got.shape == want.shape
    assert float((got - want).norm()) <= 1e-6 * float(want.norm()) + 1e-12


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name, threads, pool, poison):
    channels, filters, kernel, stride, sides, dilation, groups, size = CONVS[name]
    geometry = Geometry(channels, *kernel, *stride, *sides, *dilation, groups)
    if min(geometry.output_size(*size)) < pool:
        pytest.skip("the windows do not fit")
    pattern, weight, values = sparse(filters, geometry.columns, 0.4)
    scale, shift = torch.randn(filters), torch.randn(filters)
    stage = cpu_net.Conv(geometry, pattern.crow_indices, pattern.col_indices, values, scale, shift, True, pool)
    x = torch.randn(4, channels, *size)
    top, bottom, left, right = sides
    weight = weight.view(filters, channels // groups, *kernel).double()
    padded = F.pad(x.double(), (left, right, top, bottom))
    y = F.conv2d(padded, weight, None, stride, 0, dilation, groups) * scale[:, None, None] + shift[:, None, None]
    net = cpu_net.Net([stage], tuple(x.shape[1:]), threads)
    for batch in (1, 2, 4):
        close(net(x[:batch]), F.max_pool2d(y.relu(), pool)[:batch])


@pytest.mark.parametrize("kind", ["net", "rows", "chain"])
@pytest.mark.parametrize(("features", "rows"), [(1, 1), (50, 3), (70000, 70), (33, 130)])
def test_linear(kind, features, rows, poison):
    """70,000 features: column numbers that 16 bits do not hold."""
    pattern, weight, values = sparse(rows, features, min(0.5, 200 / features))
    bias = torch.randn(rows)
    stage = cpu_net.Linear(features, pattern.crow_indices, pattern.col_indices, values, bias)
    make = {"net": lambda: cpu_net.Net([stage], (features,), 2), "rows": lambda: cpu_net.Rows([stage], 2)}
    packed = make.get(kind, lambda: cpu_net.Chain([stage], 2))()
    for batch in (1, 5, 40):
        x = torch.randn(batch, features)
        close(packed(x), x.double() @ weight.double().t() + bias)


def test_mean_and_nan_in_a_pooling():
    pattern, _, values = sparse(3, 2, 1.0)
    conv = cpu_net.Conv(Geometry(2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1), pattern.crow_indices, pattern.col_indices, values,
                        None, None, False, 2)  # fmt: skip
    x = torch.randn(1, 2, 4, 6)
    x[0, 0, 1, 1] = float("nan")
    y = cpu_net.Net([conv], (2, 4, 6), 1)(x)
    assert y[0, 0].isnan().sum() == 1
    assert y[0, 0, 0, 0].isnan()
    mean = cpu_net.Net([conv, cpu_net.Mean()], (2, 4, 6), 2)(x.nan_to_num())
    close(mean, cpu_net.Net([conv], (2, 4, 6), 1)(x.nan_to_num()).double().mean((2, 3)))


def test_stages_that_do_not_fit():
    pattern, _, values = sparse(3, 8, 0.5)
    linear = cpu_net.Linear(8, pattern.crow_indices, pattern.col_indices, values, None)
    with pytest.raises(ValueError, match="expected 8 features"):
        cpu_net.Net([linear], (9,), 1)
    with pytest.raises(ValueError, match="expected an input for Mean"):
        cpu_net.Net([linear, cpu_net.Mean()], (8,), 1)


def test_a_plan_for_inference_alone_is_smaller():
    pattern, _, _ = sparse(300, 400, 0.1)
    indices = pattern.crow_indices, pattern.col_indices
    assert 2 * cpu.plan(*indices, 400, backward=False).numel() < cpu.plan(*indices, 400).numel()
    geometry = Geometry(40, 2, 5, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    assert 2 * cpu.conv_plan(*indices, geometry, backward=False).numel() < cpu.conv_plan(*indices, geometry).numel()
