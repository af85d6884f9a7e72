"""The packed nets of kernels.cpu_net against dense torch: each kind of stage by itself, on ugly sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparselottery.kernels import cpu, cpu_net, cpu_stages
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
    stage = cpu_stages.Conv(geometry, pattern.crow_indices, pattern.col_indices, values, scale, shift, True, pool)
    x = torch.randn(4, channels, *size)
    top, bottom, left, right = sides
    weight = weight.view(filters, channels // groups, *kernel).double()
    padded = F.pad(x.double(), (left, right, top, bottom))
    y = F.conv2d(padded, weight, None, stride, 0, dilation, groups) * scale[:, None, None] + shift[:, None, None]
    net = cpu_net.Net([stage], tuple(x.shape[1:]), threads)
    for batch in (1, 2, 4):
        close(net(x[:batch]), F.max_pool2d(y.relu(), pool)[:batch])


PACKED = {
    "net": lambda stages, threads: cpu_net.Net(stages, (stages[0].in_features,), threads),
    "rows": cpu_net.Rows,
    "chain": cpu_net.Chain,
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(("features", "rows"), [(1, 1), (50, 3), (70000, 70), (33, 130)])
def test_linear(kind, features, rows, threads, poison):
    """70,000 features: column numbers that 16 bits do not hold."""
    pattern, weight, values = sparse(rows, features, min(0.5, 200 / features))
    bias = torch.randn(rows)
    stage = cpu_stages.Linear(features, pattern.crow_indices, pattern.col_indices, values, bias)
    packed = PACKED[kind]([stage], threads)
    for batch in (1, 5, 40, 129):
        x = torch.randn(batch, features)
        close(packed(x), x.double() @ weight.double().t() + bias)


@pytest.mark.parametrize("features", [30, 65535, 65536])
def test_columns_of_every_place(features):
    """One entry a row, at columns whose numbers differ in every bit: none is read at the place of another."""
    columns = torch.tensor([c for c in (0, 1, 2**8 - 1, 2**8, 2**15, 2**16 - 2, 2**16 - 1) if c < features] * 3)
    values, counts = torch.randn(len(columns)), torch.arange(len(columns) + 1, dtype=torch.int32)
    stage = cpu_stages.Linear(features, counts, columns.to(torch.int32), values, None)
    x = torch.randn(1, features)
    assert torch.equal(PACKED["net"]([stage], 1)(x), values * x[:, columns])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", PACKED)
def test_what_is_not_finite_stays_in_its_row(kind, threads):
    """In its sample, and there in the rows that have a weight for it: padding and ReLU pass nothing on."""
    pattern, weight, values = sparse(37, 50, 0.1)
    stage = cpu_stages.Linear(50, pattern.crow_indices, pattern.col_indices, values, None, True)
    x = torch.randn(67, 50)
    x[2, 7], x[40, 49], x[66, 0] = float("inf"), float("nan"), -float("inf")
    second = cpu_stages.Linear(37, *_identity(37), torch.ones(37), None)
    got = PACKED[kind]([stage, second], threads)(x)
    want = (x.nan_to_num(0, 0, 0).double() @ weight.double().t()).relu()
    for sample, column in ((2, 7), (40, 49), (66, 0)):
        touched = weight[:, column] != 0
        assert touched.any()
        close(got[sample, ~touched], want[sample, ~touched])
        assert torch.equal(got[sample, touched].isfinite(), weight[touched, column] * x[sample, column] < 0)
        want[sample] = got[sample] = 0
    close(got, want)


def _identity(size: int):
    return torch.arange(size + 1, dtype=torch.int32), torch.arange(size, dtype=torch.int32)


def test_mean_and_nan_in_a_pooling():
    pattern, _, values = sparse(3, 2, 1.0)
    indices = pattern.crow_indices, pattern.col_indices
    conv = cpu_stages.Conv(Geometry(2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1), *indices, values, None, None, False, 2)
    x = torch.randn(1, 2, 4, 6)
    x[0, 0, 1, 1] = float("nan")
    y = cpu_net.Net([conv], (2, 4, 6), 1)(x)
    assert y[0, 0].isnan().sum() == 1
    assert y[0, 0, 0, 0].isnan()
    mean = cpu_net.Net([conv, cpu_stages.Mean()], (2, 4, 6), 2)(x.nan_to_num())
    close(mean, cpu_net.Net([conv], (2, 4, 6), 1)(x.nan_to_num()).double().mean((2, 3)))


def test_stages_that_do_not_fit():
    pattern, _, values = sparse(3, 8, 0.5)
    linear = cpu_stages.Linear(8, pattern.crow_indices, pattern.col_indices, values, None)
    geometry = Geometry(2, 2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    conv = cpu_stages.Conv(geometry, pattern.crow_indices, pattern.col_indices, values, None, None, pool=2)
    for stages, shape, expected in (
        ([linear], (9,), r"shape \(\*, 8\), got \(N, 9\)"),
        ([linear, cpu_stages.Mean()], (8,), r"shape \(N, C, H, W\), got \(N, 3\)"),
        ([linear, conv], (8,), r"shape \(N, 2, H, W\) or \(2, H, W\), got \(N, 3\)"),
        ([conv], (2, 1, 9), r"an image that the kernel fits into, got \(N, 2, 1, 9\) for"),
        ([conv], (2, 2, 9), r"an image that the windows of the pooling, 2 x 2, fit into .*, got \(N, 2, 2, 9\) for"),
    ):
        with pytest.raises(ValueError, match=f"^x: expected {expected}"):
            cpu_net.Net(stages, shape, 1)


def test_a_plan_for_inference_alone_is_smaller():
    pattern, _, _ = sparse(300, 400, 0.1)
    indices = pattern.crow_indices, pattern.col_indices
    assert 2 * cpu.plan(*indices, 400, backward=False).numel() < cpu.plan(*indices, 400).numel()
    geometry = Geometry(40, 2, 5, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    assert 2 * cpu.conv_plan(*indices, geometry, backward=False).numel() < cpu.conv_plan(*indices, geometry).numel()
