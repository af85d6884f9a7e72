from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery.lab.models import MODELS, Block, build, conv_net, lenet_300_100, resnet_18, vgg_19


def test_is_the_papers_net():
    model = lenet_300_100()
    assert list(dict(model.named_children())) == ["fc1", "relu1", "fc2", "relu2", "fc3"]
    assert sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear)) == 266_200
    assert model(torch.zeros(2, 784)).shape == (2, 10)


def test_other_widths():
    model = lenet_300_100(5, 3, hidden=(7,))
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 5), (7,), (3, 7), (3,)]
    assert list(dict(model.named_children())) == ["fc1", "relu1", "fc2"]


def test_gaussian_glorot_weights_and_zero_biases():
    torch.manual_seed(0)
    model = lenet_300_100()
    for layer in (model.fc1, model.fc2):
        std = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.weight.abs().max() > 3 * std  # not uniform
        assert not layer.bias.any()


CIFAR10 = (3, 32, 32)
HEAD = 256 * 256 + 256 * 10  # the last two linear layers of a Conv-N
RESNET_CONVS = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
RESNET_SHORTCUTS = 16 * 32 + 32 * 64
RESNET_NORMS = 7 * 16 + 6 * 32 + 6 * 64 + 32 + 64  # channels, those of the shortcuts last
VGG_WIDTHS = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8


@pytest.mark.parametrize(
    ("name", "convs", "linears", "biases", "paper"),
    [
        ("conv-2", 9 * (3 * 64 + 64**2), 64 * 16**2 * 256 + HEAD, 2 * 64 + 522, 4_300_992),
        ("conv-4", 9 * (3 * 64 + 64**2 + 64 * 128 + 128**2), 128 * 8**2 * 256 + HEAD, 2 * 192 + 522, 2_425_024),
        (
            "conv-6",
            9 * (3 * 64 + 64**2 + 64 * 128 + 128**2 + 128 * 256 + 256**2),
            256 * 4**2 * 256 + HEAD,
            2 * 448 + 522,
            2_261_184,  # by its own description; the table has 1.7M
        ),
    ],
)
def test_the_papers_conv_nets(name, convs, linears, biases, paper):
    model = build(name, CIFAR10, 10)
    assert weights(model, nn.Conv2d) == convs
    assert weights(model, nn.Linear) == linears
    assert parameters(model) == convs + linears + biases
    assert convs + linears == paper
    assert model(torch.zeros(2, *CIFAR10)).shape == (2, 10)


def test_the_papers_resnet():
    model = build("resnet-18", CIFAR10, 10)
    assert weights(model, nn.Conv2d) == RESNET_CONVS + RESNET_SHORTCUTS
    assert round(weights(model, nn.Conv2d), -3) == 270_000
    assert (RESNET_SHORTCUTS, weights(model, nn.Linear)) == (2560, 640)
    assert parameters(model) == RESNET_CONVS + RESNET_SHORTCUTS + 640 + 10 + 2 * RESNET_NORMS
    # The paper's 274K counts what batchnorm keeps, means and variances, besides what is trained.
    kept = sum(buffer.numel() for buffer in model.buffers() if buffer.dim())
    assert kept == 2 * RESNET_NORMS
    assert round(parameters(model) + kept, -3) == 274_000
    assert len([module for module in model.modules() if isinstance(module, nn.Conv2d)]) == 19 + 2
    assert model(torch.zeros(2, *CIFAR10)).shape == (2, 10)


def test_the_papers_vgg():
    model = build("vgg-19", CIFAR10, 10)
    convs = 9 * sum(a * b for a, b in pairwise([3, *VGG_WIDTHS]))
    assert weights(model, nn.Conv2d) == convs == 20_018_880
    assert weights(model, nn.Linear) == 5120
    assert parameters(model) == convs + 5120 + 10 + 2 * sum(VGG_WIDTHS)
    assert round(parameters(model), -5) == 20_000_000
    assert model(torch.zeros(2, *CIFAR10)).shape == (2, 10)


def weights(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, kind))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_resnet_halves_the_image_twice():
    model = resnet_18(widths=(2, 4, 8))
    shapes = []
    for layer in model:
        if isinstance(layer, Block):
            layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(2, *CIFAR10))
    assert shapes == [(2, 32, 32)] * 3 + [(4, 16, 16)] * 3 + [(8, 8, 8)] * 3
    assert [isinstance(layer.shortcut, nn.Identity) for layer in model if isinstance(layer, Block)] == (
        [True, True, True, False, True, True, False, True, True]
    )


@pytest.mark.parametrize(("channels_out", "stride"), [(4, 1), (6, 2)])
def test_a_block_adds_its_input(channels_out, stride):
    block = Block(4, channels_out, stride).eval()
    x = torch.randn(2, 4, 8, 8)
    hidden = F.relu(block.norm1(F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    residual = block.norm2(F.conv2d(hidden, block.conv2.weight, padding=1))
    shortcut = x if stride == 1 else block.shortcut.norm(F.conv2d(x, block.shortcut.conv.weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(residual + shortcut))


def test_other_images_and_classes():
    assert conv_net((2, 3), shape=(1, 12, 8), classes=4, hidden=(5,))(torch.zeros(2, 1, 12, 8)).shape == (2, 4)
    assert resnet_18((1, 16, 16), 3, widths=(2, 2, 2))(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
    assert vgg_19((1, 16, 16), 3, widths=(2, 2, 2, 2, 2))(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("make", [resnet_18, vgg_19, partial(conv_net, (64, 128))])
def test_convolutions_are_gaussian_glorot_too(make):
    torch.manual_seed(0)
    model = make()
    for layer in [module for module in model.modules() if isinstance(module, nn.Conv2d)][1:4]:
        std = (2 / (9 * (layer.in_channels + layer.out_channels))) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)
        assert layer.weight.abs().max() > 3 * std
        assert layer.bias is None or not layer.bias.any()


def test_build_takes_what_the_net_takes():
    assert parameters(build("lenet-300-100", (784,), 10)) == parameters(lenet_300_100())
    with pytest.raises(ValueError, match=rf"'lenet'.*{', '.join(MODELS)}"):
        build("lenet", (784,), 10)
    with pytest.raises(ValueError, match=r"lenet-300-100: expected images of shape \(features\), got \(3, 32, 32\)"):
        build("lenet-300-100", CIFAR10, 10)
    with pytest.raises(ValueError, match=r"conv-2: expected .*\(channels, height, width\), got \(784,\)"):
        build("conv-2", (784,), 10)


def test_dropout_after_pools_and_hidden_units():
    shape = (3, 8, 8)
    model = build("conv-4", shape, 10, dropout=0.5)
    names = [name for name, module in model.named_children() if isinstance(module, nn.Dropout)]
    assert names == ["pool_dropout1", "pool_dropout2", "dropout1", "dropout2"]
    order = list(dict(model.named_children()))
    after = [order[order.index(name) - 1] for name in names]
    assert after == ["pool1", "pool2", "relu1", "relu2"]
    assert {module.p for module in model if isinstance(module, nn.Dropout)} == {0.5}
    assert list(model.state_dict()) == list(build("conv-4", shape, 10).state_dict())
    x = torch.randn(2, *shape)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    with pytest.raises(ValueError, match=r"dropout: expected 0 or one of the nets conv-2.*vgg-19"):
        build("vgg-19", CIFAR10, 10, dropout=0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        build("conv-2", shape, 10, dropout=1)


def test_lenets_first_weights_are_those_of_the_committed_runs():
    torch.manual_seed(0)
    layer = nn.Linear(784, 300)
    nn.init.xavier_normal_(layer.weight)
    torch.manual_seed(0)
    assert torch.equal(lenet_300_100().fc1.weight, layer.weight)
