from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparselottery import Ticket, convert, load_sparse, prune
from sparselottery.architecture import MAX_DEPTH, TYPES, build, describe
from sparselottery.lab.models import MODELS
from sparselottery.lab.models import build as build_net

EXAMPLES = [
    nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.5), nn.CELU(0.7), nn.SELU(), nn.GELU("tanh"), nn.SiLU(),
    nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softplus(2, 10), nn.Softsign(), nn.Hardtanh(-2, 2),
    nn.Hardsigmoid(), nn.Hardswish(), nn.Identity(), nn.Dropout(0.1), nn.Dropout1d(), nn.Dropout2d(), nn.AlphaDropout(),
    nn.Dropout3d(0.2), nn.FeatureAlphaDropout(0.2),
    nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Conv1d(2, 3, 3), nn.Embedding(5, 3, padding_idx=1),
    nn.Conv2d(2, 4, (3, 1), 2, "valid", 2, 2, False, "circular"), nn.Conv2d(2, 4, 3, padding="same"),
    nn.BatchNorm1d(3, 1e-3, None), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False),
    nn.LayerNorm((2, 3), bias=False), nn.RMSNorm(3), nn.GroupNorm(2, 4), nn.PReLU(3), nn.Softmax(1), nn.LogSoftmax(-1),
    nn.MaxPool1d(2), nn.MaxPool2d((2, 3), 1, (1, 0)), nn.AvgPool1d(2), nn.AvgPool2d(2, divisor_override=3),
    nn.AdaptiveAvgPool1d(2), nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveMaxPool2d(1), nn.Flatten(0),
    nn.Unflatten(1, (2, 3)), nn.Conv3d(2, 4, 3, 2, 1), nn.ConvTranspose1d(2, 4, 3, 2, output_padding=1, groups=2),
    nn.ConvTranspose2d(2, 4, (3, 1), 2, 1, bias=False, dilation=2), nn.ConvTranspose3d(2, 4, 3), nn.BatchNorm3d(3),
    nn.EmbeddingBag(5, 3, mode="sum", padding_idx=1, include_last_offset=True), nn.Bilinear(3, 4, 5, bias=False),
]  # fmt: skip


def shapes(model):
    return [(name, tensor.shape) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("module", EXAMPLES, ids=repr)
def test_a_module_comes_back(module):
    description = json.loads(json.dumps(describe(module)))
    again = build(description)
    assert type(again) is type(module)
    assert repr(again) == repr(module)
    assert shapes(again) == shapes(module)
    assert describe(again) == description
    assert not again.training


def test_every_type_has_an_example():
    assert {type(module) for module in EXAMPLES} == set(TYPES)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet-18"])
def test_the_nets_of_the_lab(name):
    net = build_net(name, (784,) if name == "lenet-300-100" else (3, 32, 32), 10)
    again = build(json.loads(json.dumps(describe(net))))
    assert shapes(again) == shapes(net)
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again = build(describe(net), device="cpu")
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 784) if name == "lenet-300-100" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert again(x).equal(net.eval()(x))


def test_masked_modules_are_described_as_dense():
    dense = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
    masks = {"0.weight": torch.rand(3, 2, 3, 3) < 0.5, "1.1.weight": torch.rand(3, 3) < 0.5}
    assert describe(convert(dense, masks)) == describe(dense)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv3d(2, 4, 3), torch.randn(2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(2, 4, 3, 2, 1, 1), torch.randn(2, 2, 4)),
        (nn.ConvTranspose2d(2, 4, 3, 2, 1, 1), torch.randn(2, 2, 4, 4)),
        (nn.ConvTranspose3d(2, 4, 3), torch.randn(2, 2, 4, 4, 4)),
        (nn.EmbeddingBag(9, 4, mode="sum", padding_idx=2), torch.arange(18).view(3, 6) % 9),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_file_of_such_layers_needs_no_model(tmp_path, layer, x):
    model = nn.Sequential(layer, nn.ReLU())
    sparse = convert(model, prune(model, 0.6)).eval()
    Ticket.from_model(sparse).save(tmp_path / "net.safetensors")
    torch.testing.assert_close(load_sparse(tmp_path / "net.safetensors")(x), sparse(x))


class Own(nn.Sequential):
    pass


def hooked():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda *_: None)
    return module


def with_forward():
    module = nn.ReLU()
    module.forward = lambda x: x
    return module


def with_buffer():
    module = nn.Linear(2, 2)
    module.register_buffer("more", torch.ones(1))
    return module


def nested(depth):
    module = nn.Sequential()
    for _ in range(depth):
        module = nn.Sequential(module)
    return module


@pytest.mark.parametrize(
    "model",
    [Own(), nn.Sequential(Own()), nn.ModuleList(), nn.LSTM(2, 2), hooked(), with_forward(), with_buffer(),
     nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.AdaptiveAvgPool2d((None, 2)), nested(MAX_DEPTH + 1),
     nn.ELU(float("inf"))],
)  # fmt: skip
def test_what_cannot_be_described(model):
    assert describe(model) is None


def linear(**arguments):
    return {"type": "Linear", "arguments": {"in_features": 2, "out_features": 2, "bias": True, **arguments}}


def conv(**arguments):
    node = describe(nn.Conv2d(2, 2, 3))
    return {"type": "Conv2d", "arguments": {**node["arguments"], **arguments}}


def deep(levels):
    node = linear()
    for _ in range(levels):
        node = {"type": "Sequential", "children": [["a", node]]}
    return node


@pytest.mark.parametrize(
    "node",
    [
        None, [], "Linear", 1, {}, {"type": "Linear"}, {"type": "os.system", "arguments": {}}, {"type": ["Linear"]},
        {"type": "LSTM", "arguments": {}}, {"type": "Sequential", "arguments": {}}, {"type": {}, "arguments": {}},
        {"type": "Sequential", "children": {}}, {"type": "Sequential", "children": [["a"]]},
        {"type": "Sequential", "children": [["a.b", linear()]]}, {"type": "Sequential", "children": [["", linear()]]},
        {"type": "Sequential", "children": [[1, linear()]]},
        {"type": "Sequential", "children": [["forward", linear()]]},
        {"type": "Sequential", "children": [["a", linear()], ["a", linear()]]}, {**linear(), "more": 1},
        linear(more=1), linear(device="cuda"), linear(in_features=-1), linear(in_features=2**40),
        linear(in_features=2**31 - 1, out_features=2**31 - 1), linear(in_features=float("nan")),
        linear(in_features=[2]), linear(in_features={}), linear(in_features="2"), linear(in_features=None),
        conv(groups=0), conv(stride=[0, 0]), conv(stride=None), conv(stride=False), conv(kernel_size=[3.0, 3]),
        conv(kernel_size=[]), conv(padding=[-1, -1]), conv(padding="?"), conv(padding_mode="?"),
        {"type": "GroupNorm", "arguments": {"num_groups": 0, "num_channels": 4, "eps": 1e-5, "affine": True}},
        deep(MAX_DEPTH + 2), deep(900),
    ],
)  # fmt: skip
def test_hostile_descriptions(node):
    with pytest.raises(ValueError, match="architecture: "):
        build(node)
