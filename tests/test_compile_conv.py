"""The registered ops of the convolution under torch.library.opcheck, torch.compile and torch.export."""

from __future__ import annotations

import warnings

import pytest
import torch
from convs import FORMATS, geometry, make
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential


def layer(in_channels, out_channels, **options):
    shape = (out_channels, in_channels // options.get("groups", 1), 3, 3)
    return MaskedConv2d(in_channels, out_channels, 3, mask=torch.rand(shape) < 0.5, **options)


def dense(module):
    module.execution = "dense"
    return module


def gradients(model, x):
    """y, gx (None where not wanted) and the gradients of all parameters."""
    y = model(x)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


MODELS = {
    "one layer": lambda: layer(4, 6, padding=1),
    "no bias": lambda: layer(4, 6, bias=False, groups=2),
    "padding that is not by zeros": lambda: layer(4, 6, padding="same", padding_mode="circular"),
    "fused": lambda: MaskedSequential(layer(4, 6), nn.ReLU(), layer(6, 5, stride=2), nn.ReLU()),
    "then linear": lambda: MaskedSequential(
        layer(4, 6), nn.ReLU(), nn.Flatten(), MaskedLinear(252, 8, mask=torch.rand(8, 252) < 0.3), nn.Tanh()
    ),
    "executed densely": lambda: MaskedSequential(dense(layer(4, 6)), nn.ReLU(), layer(6, 5)),
    "frozen values": lambda: layer(4, 6).requires_grad_(False),
    "bfloat16": lambda: layer(4, 6, padding=1).bfloat16(),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_whole(name, need_x, memory_format):
    if name == "frozen values" and not need_x:
        pytest.skip("nothing to differentiate")
    model = MODELS[name]()
    x = torch.randn(3, 4, 8, 9, dtype=next(model.parameters()).dtype).to(memory_format=FORMATS[memory_format])
    x.requires_grad_(need_x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, theirs in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_compiles_once_for_all_sizes():
    model, compiles = layer(4, 6, padding=1), []

    def counting(graph, _inputs):
        compiles.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 8, 9), (17, 5, 6), (3, 20, 31)):
        x = torch.randn(batch, 4, height, width)
        assert torch.equal(compiled(x), model(x))
    assert len(compiles) == 1


def test_compiles_with_inductor():
    model = MaskedSequential(layer(4, 6), nn.ReLU(), layer(6, 5), nn.BatchNorm2d(5), nn.Tanh(), layer(5, 4))
    x = torch.randn(3, 4, 12, 9)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        got = gradients(torch.compile(model, fullgraph=True), x)
    for ours, theirs in zip(got, gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["one layer", "no bias", "fused", "then linear", "executed densely"])
def test_exports_with_a_dynamic_batch(name):
    model = MODELS[name]().eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    exported = torch.export.export(model, (torch.randn(5, 4, 8, 9),), dynamic_shapes=shapes).module()
    for batch in (2, 5, 16, 33):
        x = torch.randn(batch, 4, 8, 9)
        torch.testing.assert_close(exported(x), model(x))


def test_exports_with_images_of_any_size():
    model = MODELS["one layer"]().eval()
    shapes = ({2: torch.export.Dim("height", min=4, max=4096), 3: torch.export.Dim("width", min=4, max=4096)},)
    exported = torch.export.export(model, (torch.randn(5, 4, 8, 9),), dynamic_shapes=shapes).module()
    for height, width in ((4, 4), (31, 7)):
        x = torch.randn(5, 4, height, width)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 1), (True, 2)])
@pytest.mark.parametrize("shape", [geometry(4, sides=(0, 1, 1, 2), stride=(1, 2), groups=2), geometry(1, (6, 8))])
def test_opcheck(shape, relu, pool, bias, dtype, memory_format):
    conv = make(shape, 2, batch=17, bias=bias, relu=relu, pool=pool, memory_format=memory_format).to(dtype)
    forward, backward = torch.ops.sparselottery.conv2d.default, torch.ops.sparselottery.conv2d_backward.default
    x, values, *rest = conv.leaves()
    indices, settings = (*conv.indices(), (1, 1)), (conv.geometry, relu, pool)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if dtype == torch.float32 and bias:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (x, values, *(rest or [None]), *indices, *settings), test_utils=tests)
    y, winners = forward(conv.x, conv.values, conv.bias, *indices, *settings)
    y = y if relu else y.new_empty(0)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (conv.gy, conv.x, y, winners, conv.values, *indices, *settings, *needs)
        torch.library.opcheck(backward, arguments, test_utils=tests[:2])
