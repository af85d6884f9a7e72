"""Random layers and nets with their masks, and inputs of any layout in memory."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSITIES = (0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)
BATCHES = (0, 1, 1, 2, 3, 15, 16, 17, 31, 60, 128, 300)
WORK = 2**22  # multiplications of a layer, at most


class Case(NamedTuple):
    """A dense model with zeros where it is pruned, its masks, and an input (N, ...)."""

    model: nn.Sequential
    masks: dict[str, Tensor]
    x: Tensor
    exact: bool  # entries are integers


def drawn(draw: random.Random) -> Case:
    dtype = draw.choice(DTYPES)
    make = draw.choice([_linear, _conv, _chain, _conv_net, _conv_net])
    model, shape, work = make(draw)
    batch = draw.choice([*BATCHES, draw.randrange(301)])
    batch = min(batch, max(1, WORK // max(1, work)))
    gated = len(model) > 1
    masks = {}
    for name, module in model.named_children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            masks[f"{name}.weight"] = mask = _mask(draw, module.weight.shape)
            with torch.no_grad():
                if gated:
                    for parameter in module.parameters():
                        parameter.copy_(torch.randint(-1, 2, parameter.shape))
                module.weight[~mask] = 0
        elif isinstance(module, nn.BatchNorm2d):
            _integers_of(module)
    entries = (lambda *s: torch.randint(-2, 3, s).double()) if gated else (lambda *s: torch.randn(*s).double())
    x = _laid_out(draw, entries(batch, *shape).to(dtype))
    normalises = any(isinstance(module, nn.BatchNorm2d) for module in model)
    return Case(model.to(dtype).train(gated and not normalises and draw.random() < 0.5), masks, x, gated)


def _integers_of(norm: nn.BatchNorm2d) -> None:
    """A scale and a shift without roundings."""
    with torch.no_grad():
        norm.running_mean.copy_(torch.randint(-2, 3, norm.running_mean.shape))
        norm.running_var.fill_(1)
        norm.weight.copy_(torch.randint(-1, 3, norm.weight.shape))
        norm.bias.copy_(torch.randint(-2, 3, norm.bias.shape))


def _size(draw: random.Random, most: int) -> int:
    """Mostly small, or just beside a multiple of 16."""
    kind = draw.randrange(3)
    if kind == 0:
        return draw.randrange(1, min(most, 9) + 1)
    if kind == 1:
        return draw.randrange(1, most + 1)
    return max(1, min(most, 16 * draw.randrange(1, 20) + draw.randrange(-1, 2)))


def _linear(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...], int]:
    rows, columns = _size(draw, 1000), _size(draw, 1000)
    shape = draw.choice([(), (), (3,), (2, 5)])
    return nn.Sequential(nn.Linear(columns, rows, bias=draw.random() < 0.7)), (*shape, columns), rows * columns


def _chain(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...], int]:
    widths = [_size(draw, 300) for _ in range(draw.randrange(3, 6))]
    modules: list[nn.Module] = []
    for pair in pairwise(widths):
        modules += [nn.Linear(*pair, bias=draw.random() < 0.7)]
        modules += [nn.ReLU()] * (draw.random() < 0.9) + [nn.Identity()] * (draw.random() < 0.1)
    return nn.Sequential(*modules), (widths[0],), max(a * b for a, b in pairwise(widths))


def _one_conv(draw: random.Random, channels: int, side: tuple[int, int]) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A convolution that such an image has room for, and the size of its outputs."""
    divisors = [groups for groups in range(1, channels + 1) if channels % groups == 0]
    while True:
        groups = draw.choice([1, 1, 1, draw.choice(divisors)])
        kernel = draw.choice([(1, 1), (3, 3), (3, 3), (5, 5), (draw.randrange(1, 6), draw.randrange(1, 6))])
        dilation = draw.choice([(1, 1), (1, 1), (2, 1), (2, 3)])
        stride = draw.choice([(1, 1), (1, 1), (2, 2), (2, 1), (3, 2)])
        padding = draw.choice([0, 0, 1, 2, (1, 2), (0, 3), "valid", "same"])
        mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
        filters = groups * draw.randrange(1, 1 + max(1, 40 // groups))
        arguments = kernel, 1 if padding == "same" else stride, padding, dilation, groups, draw.random() < 0.7, mode
        conv = nn.Conv2d(channels, filters, *arguments)
        try:
            return conv, tuple(conv(torch.zeros(1, channels, *side)).shape[2:])
        except RuntimeError:  # an image that is too small
            continue


def _conv(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...], int]:
    channels, side = _size(draw, 40), (_size(draw, 40), _size(draw, 40))
    conv, out = _one_conv(draw, channels, side)
    return nn.Sequential(conv), (channels, *side), conv.weight.numel() * out[0] * out[1]


def _conv_net(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...], int]:
    shape = channels, *side = draw.randrange(1, 9), draw.randrange(1, 25), draw.randrange(1, 25)
    modules: list[nn.Module] = []
    work, side = 1, tuple(side)
    for _ in range(draw.randrange(1, 4)):
        conv, side = _one_conv(draw, channels, side)
        work, channels = max(work, conv.weight.numel() * side[0] * side[1]), conv.out_channels
        modules.append(conv)
        modules += [nn.BatchNorm2d(channels, eps=0.0)] * (draw.random() < 0.3) + [nn.ReLU()] * (draw.random() < 0.8)
        size = draw.choice([2, 2, 3, draw.randrange(1, 6)])
        if min(side) >= size and draw.random() < 0.5:
            modules.append(nn.MaxPool2d(size))
            side = side[0] // size, side[1] // size
    if draw.random() < 0.6:
        modules += [nn.Flatten(), nn.Linear(channels * side[0] * side[1], draw.randrange(1, 30))]
    return nn.Sequential(*modules, nn.Identity()), shape, work


def _mask(draw: random.Random, shape: torch.Size) -> Tensor:
    mask = torch.rand(shape) < draw.choice(DENSITIES)
    rows = mask.flatten(1)
    for value in (False, True):
        if draw.random() < 0.25:
            rows[torch.rand(len(rows)) < draw.choice([0.1, 0.5])] = value
        if draw.random() < 0.15:
            rows[:, torch.rand(rows.shape[1]) < draw.choice([0.1, 0.5])] = value
    if draw.random() < 0.1:
        mask = torch.zeros_like(mask)
        mask[-1].flatten()[-1:] = True
    return mask


def _laid_out(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers, otherwise in memory; between them, where there is room, what must not be read.

    That is NaN, or a large number where torch itself multiplies what it finds there by zero (bfloat16, AMX).
    """
    gap = 2.0**100 if x.dtype == torch.bfloat16 else torch.nan
    kind = draw.choice(["contiguous"] * 2 + ["transposed", "packed", "sliced", "spaced", "channels last", "unaligned"])
    if kind == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind in ("transposed", "packed") and x.dim() > 1:
        room = torch.full((*x.shape[1:], len(x) + (kind == "packed") * draw.randrange(1, 40)), gap, dtype=x.dtype)
        return room[..., : len(x)].movedim(-1, 0).copy_(x)
    if kind == "sliced":
        return torch.stack([x, torch.full_like(x, gap)], 1)[:, 0]
    if kind == "spaced":
        return torch.stack([x, torch.full_like(x, gap)], -1)[..., 0]
    if kind == "unaligned":
        room = torch.full((x.numel() + 1,), gap, dtype=x.dtype)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)
    return x
