"""The paper's nets (Fig. 2). Gaussian Glorot weights, zero biases (section 2, footnote 1).

Sizes: N images, C channels, H x W pixels. Each net draws from torch's global generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]
CIFAR10: Shape = (3, 32, 32)


def lenet_300_100(in_features: int = 784, classes: int = 10, hidden: tuple[int, ...] = (300, 100)) -> nn.Sequential:
    """Lenet-300-100: ``fc1 relu1 fc2 relu2 fc3``, with as many hidden layers as ``hidden`` has widths.

    Maps (N, in_features) to logits (N, classes).
    """
    return nn.Sequential(_linears(in_features, hidden, classes))


def conv_net(
    widths: Sequence[int],
    shape: Shape = CIFAR10,
    classes: int = 10,
    hidden: tuple[int, ...] = (256, 256),
    dropout: float = 0.0,
) -> nn.Sequential:
    """Conv-2, -4, -6: for each of ``widths`` two 3x3 convolutions and a 2x2 max-pool, then linear layers.

    ``conv1 conv_relu1 conv2 conv_relu2 pool1 ... flatten fc1 relu1 fc2 relu2 fc3``. With ``dropout``, the share of
    activations that is dropped in training (section 4 has 0.5, and not where), a ``pool_dropout1`` follows each pool
    and a ``dropout1`` each ReLU of a linear layer.
    Maps (N, *shape), shape (C, H, W), to logits (N, classes).
    """
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, channels_out in enumerate(widths, start=1):
        for j in (2 * i - 1, 2 * i):
            layers[f"conv{j}"] = _glorot(nn.Conv2d(channels, channels_out, 3, padding=1))
            layers[f"conv_relu{j}"] = nn.ReLU()
            channels = channels_out
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        if dropout:
            layers[f"pool_dropout{i}"] = nn.Dropout(dropout)
        height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers.update(_linears(channels * height * width, hidden, classes, dropout))
    return nn.Sequential(layers)


def resnet_18(shape: Shape = CIFAR10, classes: int = 10, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """What the paper calls Resnet-18, the 20-layer CIFAR net.

    ``conv norm relu block1 ... block9 average flatten fc``, with three `Block` of each of ``widths``.
    Maps (N, *shape), shape (C, H, W), to logits (N, classes).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = _conv(shape[0], widths[0], 3)
    layers["norm"] = nn.BatchNorm2d(widths[0])
    layers["relu"] = nn.ReLU()
    channels = widths[0]
    for i, width in enumerate(width for width in widths for _ in range(3)):
        layers[f"block{i + 1}"] = Block(channels, width, stride=1 if i % 3 or i == 0 else 2)
        channels = width
    return nn.Sequential(layers | _head(channels, classes))


class Block(nn.Module):
    """``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``, the convolutions 3x3.

    ``shortcut`` is the identity or, where the shape changes, a 1x1 convolution and its norm.
    Maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if (in_channels, stride) != (out_channels, 1):
            projection = _conv(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def vgg_19(
    shape: Shape = CIFAR10, classes: int = 10, widths: tuple[int, ...] = (64, 128, 256, 512, 512)
) -> nn.Sequential:
    """VGG-19 for CIFAR: 2, 2, 4, 4, 4 convolutions of ``widths`` with batchnorm, a 2x2 max-pool between, ``fc``.

    Maps (N, *shape), shape (C, H, W), to logits (N, classes).
    """
    channels, number = shape[0], 0
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, repeats) in enumerate(zip(widths, (2, 2, 4, 4, 4), strict=True)):
        if i:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        for _ in range(repeats):
            number += 1
            layers[f"conv{number}"] = _conv(channels, width, 3)
            layers[f"norm{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
    return nn.Sequential(layers | _head(channels, classes))


def _lenet_of(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    return lenet_300_100(*shape, classes)


# Each takes the shape of an image and the number of classes; the `DROPOUT_MODELS` take `dropout`, too.
MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "lenet-300-100": _lenet_of,
    "conv-2": partial(conv_net, (64,)),
    "conv-4": partial(conv_net, (64, 128)),
    "conv-6": partial(conv_net, (64, 128, 256)),
    "resnet-18": resnet_18,
    "vgg-19": vgg_19,
}
DROPOUT_MODELS = ("conv-2", "conv-4", "conv-6")


def build(name: str, shape: tuple[int, ...], classes: int, dropout: float = 0.0) -> nn.Sequential:
    """The net called ``name``, one of `MODELS`, for images of ``shape``: (features,) for Lenet, else (C, H, W).

    ``dropout``: in [0, 1), of Conv-2, -4 and -6; see `conv_net`.
    Raises ValueError for another name, an image of the wrong number of dimensions, and dropout in another net.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    expected = ("features",) if name == "lenet-300-100" else ("channels", "height", "width")
    if len(shape) != len(expected):
        raise ValueError(f"{name}: expected images of shape ({', '.join(expected)}), got {shape}")
    if dropout and name not in DROPOUT_MODELS:
        raise ValueError(
            f"dropout: expected 0 or one of the nets {', '.join(DROPOUT_MODELS)}, got {dropout} and {name}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a value in [0, 1), got {dropout}")
    return MODELS[name](shape, classes, **({"dropout": dropout} if dropout else {}))


def _linears(
    in_features: int, hidden: Sequence[int], classes: int, dropout: float = 0.0
) -> OrderedDict[str, nn.Module]:
    """``fc1 relu1 fc2 relu2 ...``, the last one without a ReLU; with dropout, after each ReLU a ``dropout1 ...``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width_in, width_out) in enumerate(pairwise((in_features, *hidden, classes)), start=1):
        layers[f"fc{i}"] = _glorot(nn.Linear(width_in, width_out))
        if i <= len(hidden):
            layers[f"relu{i}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
    return layers


def _head(channels: int, classes: int) -> OrderedDict[str, nn.Module]:
    """The mean over all pixels, then one linear layer."""
    fc = _glorot(nn.Linear(channels, classes))
    return OrderedDict(average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Of the same height and width at stride 1. No bias: a batchnorm follows."""
    return _glorot(nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False))


def _glorot(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.xavier_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
