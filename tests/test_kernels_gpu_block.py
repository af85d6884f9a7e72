"""Block kernels on a GPU or, without one, in Triton's interpreter: entries are small integers, results exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from canaries import Canaries
from convs import geometry

from sparselottery import Pattern
from sparselottery.kernels import reference

triton = pytest.importorskip("triton")
from sparselottery.kernels.gpu import Plan, block  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter gets bf16 dots wrong
BLOCKS = [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8), (128, 1), (64, 1), (32, 1), (16, 1)]


def integers(*shape: int) -> torch.Tensor:
    """Of which sums are exact, in bf16 too."""
    return torch.randint(-1, 2, shape).float()


def block_mask(out_features: int, in_features: int, shape, density: float = 0.4) -> torch.Tensor:
    """Of whole blocks, but where the border cuts them."""
    (R, C), O, I = shape, out_features, in_features  # noqa: E741
    blocks = torch.rand(-(-O // R), -(-I // C)) < density
    return blocks.repeat_interleave(R, 0).repeat_interleave(C, 1)[:O, :I].contiguous()


class Problem:
    """A linear layer and its results, on DEVICE, between canaries."""

    def __init__(self, mask, shape, batch, dtype=torch.float32, minor=(), bias=True, gate=True):
        self.canaries, self.shape, self.minor, self.dtype = Canaries(DEVICE), shape, minor, dtype
        self.batch, (self.outs, self.ins) = batch, mask.shape
        self.ld = reference.leading_dim(batch)
        pattern, weight = Pattern.from_mask(mask), integers(*mask.shape)
        self.dense = weight.double() * mask
        x, gy, gate_x = integers(batch, self.ins), integers(batch, self.outs), integers(batch, self.ins)
        self.truth = {"x": x.double(), "gy": gy.double(), "gate": gate_x.double(), "mask": mask}
        self.crow, self.col = self.keep(pattern.crow_indices), self.keep(pattern.col_indices)
        self.values = self.keep(weight[mask].to(dtype))
        self.bias = self.keep(integers(self.outs).to(dtype)) if bias else None
        self.x, self.gy = self.activation("x", x), self.activation("gy", gy)
        self.gate = self.activation("gate", gate_x) if gate else None
        words = block.plan.build(pattern.crow_indices, pattern.col_indices, self.ins, shape)
        self.plan = Plan(self.keep(words), shape)

    def keep(self, tensor):
        return self.canaries.copy(tensor)

    def activation(self, name, tensor):
        tensor = tensor.to(self.dtype)
        return self.canaries.rows(tensor, self.ld) if name in self.minor else self.keep(tensor)

    def empty(self, name, features):
        if name in self.minor:
            return self.canaries.empty_rows(self.batch, features, self.ld, dtype=self.dtype)
        return self.canaries.empty(self.batch, features, dtype=self.dtype)

    def check(self, relu=False):
        y, gx = self.empty("y", self.outs), self.empty("gx", self.ins)
        block.forward(self.x, self.values, self.bias, self.crow, self.col, self.plan, y, relu)
        block.grad_x(self.gy, self.values, self.crow, self.col, self.plan, gx, self.gate)
        gvalues = block.grad_values(self.gy, self.x, self.crow, self.col, self.plan)
        x, gy, gate, mask = self.truth.values()
        expected = F.linear(x, self.dense, None if self.bias is None else self.bias.cpu().double())
        assert_same(y, torch.relu(expected) if relu else expected, self.dtype)
        expected = gy @ self.dense
        assert_same(gx, expected if self.gate is None else expected * (gate > 0), self.dtype)
        assert_same(gvalues, (gy.t() @ x)[mask], self.dtype)
        self.canaries.check()
        for rows in (y, gx):
            assert_padding_is_zero(rows)


def assert_same(got, expected, dtype):
    assert got.dtype == dtype
    assert torch.equal(got.cpu().double(), expected)


def assert_padding_is_zero(x):
    """Of batch-minor rows, what whole vectors read."""
    if x.stride(0) == 1 and x.stride(1) >= 16:
        rows = x.as_strided((x.shape[1], -(-x.shape[0] // 16) * 16), (x.stride(1), 1), x.storage_offset())
        assert not rows[:, x.shape[0] :].any()


def reads(shape) -> tuple[str, ...]:
    """Which activations are batch-minor in the tests that do not care: those that must be."""
    return ("x",) if shape[1] == 1 else ()


@pytest.mark.gpu_core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_whole_blocks(shape, dtype):
    Problem(block_mask(128, 192, shape), shape, 64, dtype, reads(shape)).check()


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_borders_cut_blocks(shape):
    mask = block_mask(shape[0] + 5, 3 * shape[1] + 70, shape, 0.6)
    Problem(mask, shape, 17, minor=reads(shape)).check(relu=True)


@pytest.mark.parametrize("batch", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (16, 1)], ids=str)
def test_batches(shape, batch):
    Problem(block_mask(64, 64, shape), shape, batch, torch.float16, reads(shape)).check()


@pytest.mark.parametrize(
    "minor", [("x",), ("y",), ("gy", "x"), ("gx", "gate"), ("x", "y", "gy", "gx", "gate")], ids=str
)
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (32, 1)], ids=str)
@pytest.mark.parametrize("batch", [48, 21])
def test_layouts(shape, minor, batch):
    Problem(block_mask(64, 128, shape), shape, batch, minor=(*minor, *reads(shape))).check(relu=True)


@pytest.mark.parametrize("shape", [(64, 64), (8, 8), (64, 1)], ids=str)
def test_without_bias_and_gate(shape):
    Problem(block_mask(64, 64, shape), shape, 16, minor=reads(shape), bias=False, gate=False).check()


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (16, 1)], ids=str)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(shape, density):
    Problem(block_mask(70, 80, shape, density), shape, 16, minor=reads(shape)).check()


@pytest.mark.parametrize("shape", [(32, 32), (16, 16), (32, 1)], ids=str)
def test_empty_rows_and_columns_of_blocks(shape):
    mask = block_mask(128, 160, shape, 0.7)
    mask[:32], mask[96:], mask[:, 32:64] = False, False, False
    Problem(mask, shape, 16, minor=reads(shape)).check()


def test_rows_of_unequal_length():
    mask = torch.zeros(64, 640, dtype=torch.bool)
    mask[:16], mask[16:32, 16:32], mask[48:, 32:] = True, True, True
    Problem(mask, (16, 16), 16).check()


def test_nan_stays_in_its_rows():
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[:16, :16], mask[16:, 16:] = True, True
    problem = Problem(mask, (16, 16), 16, gate=False)
    problem.x[:, 0] = torch.nan
    y = problem.empty("y", 32)
    block.forward(problem.x, problem.values, None, problem.crow, problem.col, problem.plan, y)
    assert y[:, 16:].isfinite().all()


def test_relu_keeps_nan():
    problem = Problem(torch.ones(16, 16, dtype=torch.bool), (16, 16), 16)
    problem.x[3] = torch.nan
    y = problem.empty("y", 16)
    block.forward(problem.x, problem.values, None, problem.crow, problem.col, problem.plan, y, True)
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()


@pytest.mark.parametrize("shape", [(16, 16), (16, 1)], ids=str)
def test_gradients_keep_nan_but_where_the_relu_is_shut(shape):
    problem = Problem(torch.ones(16, 16, dtype=torch.bool), shape, 16, minor=reads(shape))
    problem.gy[3], problem.gate[:8], problem.gate[8:] = torch.nan, 1, 0
    problem.gate[2, 5] = torch.nan  # of a ReLU's result: a gradient passes, as in torch
    problem.gy[2], problem.values[:] = 1, 1
    gx, args = problem.empty("gx", 16), (problem.crow, problem.col, problem.plan)
    block.grad_x(problem.gy, problem.values, *args, gx, problem.gate)
    assert gx[3].isnan().all()
    assert (gx[2] == 16).all()
    assert not gx[8:].any()
    assert gx[:3].isfinite().all()
    assert block.grad_values(problem.gy, problem.x, *args).isnan().all()


def test_columns_need_batch_minor_activations():
    problem = Problem(block_mask(32, 32, (16, 1)), (16, 1), 16)
    with pytest.raises(ValueError, match=r"expected strides \(1, ld\)"):
        block.forward(problem.x, problem.values, None, problem.crow, problem.col, problem.plan, problem.empty("y", 32))


@pytest.mark.gpu_core
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    torch.manual_seed(1)
    mask, shape = block_mask(64, 256, (32, 32), 0.5), (32, 32)
    problem = Problem(mask, shape, 32, dtype, bias=False)
    problem.x.copy_(torch.randn(32, 256))
    problem.values.copy_(torch.randn(len(problem.values)))
    y, weight = problem.empty("y", 64), torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, problem.values.cpu())
    block.forward(problem.x, problem.values, None, problem.crow, problem.col, problem.plan, y)
    truth, theirs = (F.linear(problem.x.cpu().to(d), weight.to(d)).double() for d in (torch.float64, dtype))
    error, budget = ((got.cpu().double() - truth).abs().max() for got in (y, theirs))
    assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max()


# Convolutions


def conv_mask(filters, of, shape, density=0.5):
    """Of whole blocks of filters x channels at one tap: (O, C, kernel_h, kernel_w)."""
    (R, C), taps = shape, (of.kernel_h, of.kernel_w)
    blocks = torch.rand(-(-filters // R), -(-of.channels // C), *taps) < density
    return blocks.repeat_interleave(R, 0).repeat_interleave(C, 1)[:filters, : of.channels].contiguous()


def check_conv(of, filters, size, shape, batch=2, dtype=torch.float32, density=0.5, relu=False, bias=True):
    canaries, last = Canaries(DEVICE), torch.channels_last
    mask = conv_mask(filters, of, shape, density)
    pattern, weight = Pattern.from_mask(mask.flatten(1)), integers(*mask.shape) * mask
    x = integers(batch, of.channels, *size).double().requires_grad_()
    gy = integers(batch, filters, *of.output_size(*size)).double()
    dense, offset = weight.double().requires_grad_(), integers(filters)
    padded = F.pad(x, (of.left, of.right, of.top, of.bottom))
    steps = {"stride": (of.stride_h, of.stride_w), "dilation": (of.dilation_h, of.dilation_w)}
    expected = F.conv2d(padded, dense, offset.double() if bias else None, **steps)
    gx_expected, gweight = torch.autograd.grad(expected, [x, dense], gy)

    crow, col = canaries.copy(pattern.crow_indices), canaries.copy(pattern.col_indices)
    values, offset = (canaries.copy(t.to(dtype)) for t in (weight[mask], offset))
    images = [canaries.copy(t.detach().to(dtype).contiguous(memory_format=last)) for t in (x, gy)]
    plan = Plan(
        canaries.copy(block.plan.build(pattern.crow_indices, pattern.col_indices, of.columns, shape, of)), shape
    )
    y, gx = (canaries.empty(*t.shape, dtype=dtype, memory_format=last) for t in (gy, x))
    block.conv_forward(images[0], values, offset if bias else None, crow, col, plan, of, y, relu)
    block.conv_grad_x(images[1], values, crow, col, plan, of, gx)
    gvalues = block.conv_grad_values(images[1], images[0], crow, col, plan, of)
    assert_same(y, torch.relu(expected.detach()) if relu else expected.detach(), dtype)
    assert_same(gx, gx_expected, dtype)
    assert_same(gvalues, gweight[mask], dtype)
    canaries.check()


@pytest.mark.gpu_core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_conv(side, dtype):
    check_conv(geometry(64, sides=(1, 1, 1, 1)), 64, (5, 6), (side, side), dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": (1, 1)},
        {"kernel": (1, 1), "stride": (2, 2)},
        {"stride": (2, 2), "sides": (1, 1, 1, 1)},
        {"stride": (1, 2), "sides": (0, 2, 1, 0)},
        {"stride": (3, 1), "dilation": (2, 1), "sides": (2, 0, 0, 1)},
        {"dilation": (1, 2), "sides": (0, 0, 2, 2)},
        {"kernel": (2, 4), "stride": (2, 3), "dilation": (2, 1), "sides": (3, 1, 0, 4)},
    ],
    ids=str,
)
def test_conv_geometries(options):
    check_conv(geometry(32, **options), 32, (7, 8), (16, 16), relu=True)


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_conv_borders_cut_blocks(side):
    check_conv(geometry(side + 5, (2, 2), sides=(1, 0, 0, 0)), side + 3, (4, 3), (side, side))


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_conv_densities(density):
    check_conv(geometry(48, sides=(1, 1, 1, 1)), 48, (4, 4), (16, 16), density=density, bias=False)


def test_conv_pixels_of_many_images():
    check_conv(geometry(16, (2, 2), sides=(0, 1, 0, 1)), 16, (3, 5), (16, 16), batch=11)
