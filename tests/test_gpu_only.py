"""What only a GPU can show: CUDA graphs, the same bits again, sizes that no other machine holds, NaN in compiled code.

Without one, what can be is run on tiny layers in Triton's interpreter.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import blocky
from gpus import DEVICE
from torch import nn

from benchmarks.gpu.problems import precision
from sparselottery import MaskedConv2d, MaskedLinear, convert, prune, to_dense
from sparselottery.export import to_semi_structured
from sparselottery.kernels import gpu
from sparselottery.kernels.gpu import launch
from sparselottery.lab.training import stepper

pytestmark = [pytest.mark.gpu_core, pytest.mark.usefixtures("_on_gpu")]
GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def _on_gpu(monkeypatch):
    """CPU tensors take the GPU's kernels where there is no GPU; nobody multiplies in TF32."""
    monkeypatch.setattr(gpu, "DEVICES", (DEVICE,))
    with precision("fp32"):
        yield


def linear(inputs, outputs, block, dtype=torch.float32):
    mask = blocky((outputs, inputs), block, 1, 0.4).to(DEVICE)
    return MaskedLinear(inputs, outputs, mask=mask, device=DEVICE, dtype=dtype)


def chain():
    masked = nn.Sequential(linear(32, 48, (16, 16)), nn.ReLU(), linear(48, 10, (1, 1)))
    return convert(to_dense(masked), {f"{i}.weight": masked[i].mask for i in (0, 2)})


def conv(channels, filters, block, dtype=torch.float32):
    mask = blocky((filters, channels, 3, 3), block, 1, 0.4).to(DEVICE)
    return MaskedConv2d(channels, filters, 3, padding=1, mask=mask, device=DEVICE, dtype=dtype)


def rows(*size, dtype=torch.float32):
    return torch.randn(*size, device=DEVICE, dtype=dtype)


def images(*size, dtype=torch.float32):
    return rows(*size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def forward_backward(layer, x, gy):
    """y and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], gy)]


BF16 = torch.bfloat16 if GPU else torch.float16  # whose products the interpreter multiplies right
SINGLES = (1000, 500, 700) if GPU else (18, 8, 12)  # samples, inputs, outputs
LAYERS = {
    "linear 1x1 fp32": lambda: (linear(*SINGLES[1:], (1, 1)), rows(*SINGLES[:2])),
    "linear 1x1 bf16": lambda: (linear(*SINGLES[1:], (1, 1), BF16), rows(*SINGLES[:2], dtype=BF16)),
    "linear 1x1 x1 bf16": lambda: (linear(*SINGLES[1:], (1, 1), BF16), rows(1, SINGLES[1], dtype=BF16)),
    "linear 1x1 x33 bf16": lambda: (linear(*SINGLES[1:], (1, 1), BF16), rows(33, SINGLES[1], dtype=BF16)),
    "linear 16x16 fp32": lambda: (linear(48, 64, (16, 16)), rows(50, 48)),
    "linear 32x32 bf16": lambda: (linear(96, 64, (32, 32), BF16), rows(50, 96, dtype=BF16)),
    "linear 64x1 bf16": lambda: (linear(40, 128, (64, 1), BF16), rows(50, 40, dtype=BF16)),
    "chain 16x16 1x1 fp32": lambda: (chain(), rows(20, 32)),
    "conv 1x1 fp32": lambda: (conv(2, 4, (1, 1)), images(20, 2, 2, 3)),
    "conv 16x16 fp32": lambda: (conv(16, 32, (16, 16)), images(2, 16, 3, 4)),
    "conv 32x32 bf16": lambda: (conv(32, 32, (32, 32), BF16), images(2, 32, 3, 3, dtype=BF16)),
}


def made(name):
    layer, x = LAYERS[name]()
    return layer, x, torch.randn_like(layer(x))


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_step_gives_the_same_bits(name):
    layer, x, gy = made(name)
    expected = forward_backward(layer, x, gy)
    assert len(expected) == 2 + len(list(layer.parameters()))
    assert all(t.isfinite().all() and t.any() for t in expected)
    for _ in range(3 if GPU else 1):
        assert_same_bits(forward_backward(layer, x, gy), expected)


@needs_gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_gives_the_same_bits(name):
    layer, x, gy = made(name)
    expected = forward_backward(layer, x, gy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(layer, x, gy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_backward(layer, x, gy)
    for _ in range(2):
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        assert_same_bits(got, expected)


def trained(model, x, labels):
    """The parameters after some steps, from the fourth on replays of a graph on a GPU."""
    own = copy.deepcopy(model)
    step = stepper(own, 1e-2)
    for _ in range(8 if GPU else 2):
        step(x, labels)
    return [parameter.detach() for parameter in own.parameters()]


def test_training_again_gives_the_same_bits():
    dense = nn.Sequential(
        nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    ).to(DEVICE)
    blocks = {"0.weight": (16, 16), "3.weight": (16, 16), "5.weight": (1, 1)}
    weights = dict(dense.named_parameters())
    masks = {name: blocky(weights[name].shape, block, 2, 0.5).to(DEVICE) for name, block in blocks.items()}
    model = convert(dense, masks)
    assert [layer.execution for layer in model.modules() if hasattr(layer, "mask")] == ["block", "block", "sparse"]
    x, labels = images(3, 16, 4, 4), torch.randint(5, (3,), device=DEVICE)
    expected = trained(model, x, labels)
    assert not any(map(torch.equal, expected, model.parameters()))
    assert_same_bits(trained(model, x, labels), expected)


# A batch or images so large that a grid's y or z, of at most 65,535 programs, does not hold their tiles of up to 256.
MANY = 65_536 * 256 + 1
LARGE = {
    "linear 1x1": lambda: (linear(16, 16, (1, 1)), rows(MANY if GPU else 20, 16)),
    "linear 16x16": lambda: (linear(16, 16, (16, 16)), rows(MANY if GPU else 20, 16)),
    "conv 1x1": lambda: (conv(2, 3, (1, 1)), images(2, 2, *((264, 256) if GPU else (2, 3)))),
    "conv 16x16": lambda: (conv(16, 16, (16, 16)), images(65, 16, 512, 512) if GPU else images(1, 16, 3, 2)),
}


def assert_close(layer, x, tolerance):
    """Every result is that of the dense layer, within that part of its norm."""
    dense, gy = to_dense(layer), torch.randn_like(layer(x))
    got, expected = forward_backward(layer, x, gy), forward_backward(dense, x, gy)
    expected[2] = expected[2][layer.mask]
    for name, ours, theirs in zip(("y", "gx", "gvalues", "gbias"), got, expected, strict=True):
        norm = torch.linalg.vector_norm(theirs, dtype=torch.float32)
        error = torch.linalg.vector_norm(ours.sub_(theirs), dtype=torch.float32)
        assert error <= tolerance * norm, name  # fails for NaN, too


@pytest.mark.parametrize("name", LARGE)
def test_more_tiles_than_a_grid_has_rows(name):
    layer, x = LARGE[name]()
    assert not GPU or x.numel() // x.shape[1] > 65_535
    assert_close(layer, x, 1e-3)


@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=str)
def test_more_elements_than_an_int32_counts(block):
    if GPU and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    batch, features = (2**20, 2100) if GPU else (20, 21)
    layer, x = linear(features, 32, block, BF16), rows(batch, features, dtype=BF16)
    assert not GPU or x.numel() > 2**31
    assert_close(layer, x, 2e-2)


@needs_gpu
@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_relu_keeps_nan(kind, block):
    make, x = (linear, rows(40, 64)) if kind == "linear" else (conv, images(3, 64, 4, 4))
    x[1] = torch.nan
    one_by_one = nn.Sequential(make(64, 64, block), nn.ReLU(), make(64, 64, block))
    fused = convert(to_dense(one_by_one), {f"{i}.weight": one_by_one[i].mask for i in (0, 2)})
    y = fused(x)
    assert torch.equal(y.isnan(), one_by_one(x).isnan())
    assert y[1].isnan().any()
    assert y[0].isfinite().all()


def test_blocks_run_where_there_are_tensor_cores():
    layer = linear(64, 64, (16, 16))
    capable = not GPU or torch.cuda.get_device_capability() >= (8, 0)
    assert layer.execution == ("block" if capable else "sparse")
    assert_close(layer, rows(20, 64), 1e-4)


def test_launch_shapes_are_seen_in_a_backward_of_this_thread():
    """Without it a tuning run would vary nothing on a GPU: autograd runs a backward there in threads of its own."""
    layer, x = linear(32, 32, (16, 16)), rows(20, 32).requires_grad_()
    y = layer(x)
    with torch.autograd.set_multithreading_enabled(False), launch.recorded() as launches:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert launches


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_two_of_four_by_sparse_tensor_cores(dtype):
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96)).to(dtype)
    net = convert(net, prune(net, 0.5, granularity="2:4")).to(DEVICE)
    fast, x = to_semi_structured(net), rows(64, 128, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=2e-2, atol=2e-2)
