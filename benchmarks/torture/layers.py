"""Random layers and nets: their outputs and gradients against fp64 masked dense.

The error may be twice PyTorch's own in that dtype, and a few roundings. Where a ReLU or a pooling decides what a
gradient is, entries are small integers and sums exact, so that nobody decides otherwise; where sums would not be exact,
outputs alone are compared. Memory that nobody writes holds NaN.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparselottery import Ticket, convert, load_sparse
from sparselottery.nn import MaskedLayer

CASES = 10_000
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSITIES = (0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)
BATCHES = (0, 1, 1, 2, 3, 15, 16, 17, 31, 60, 128, 300)
WORK = 2**22  # multiplications of a layer, at most
ROUNDINGS = 16


class Case(NamedTuple):
    """A dense model with zeros where it is pruned, its masks, and an input (N, ...)."""

    model: nn.Sequential
    masks: dict[str, Tensor]
    x: Tensor
    exact: bool  # entries are integers


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    torch.use_deterministic_algorithms(True)  # which poisons unwritten memory
    try:
        yield lambda draw: attempt(draw, folder)
    finally:
        torch.use_deterministic_algorithms(False)


def attempt(draw: random.Random, folder: Path) -> None:
    torch.manual_seed(draw.randrange(2**32))
    case = drawn(draw)
    said = f"{case.model}, x {tuple(case.x.shape)} {case.x.dtype} of strides {case.x.stride()}"
    threads = draw.randrange(1, 5)
    torch.set_num_threads(threads)
    ours = convert(case.model, case.masks)
    layers = [layer for layer in ours.modules() if isinstance(layer, MaskedLayer)]
    for layer in layers:
        if draw.random() < 0.3:
            layer.execution = draw.choice(layer.executions)
    said += f", threads {threads}, {[(layer.execution, round(layer.density, 3)) for layer in layers]}"
    try:
        compare(draw, case, ours, folder)
    except Exception as error:
        error.add_note(said)
        raise


def compare(draw: random.Random, case: Case, ours: nn.Module, folder: Path) -> None:
    gated = any(isinstance(module, nn.ReLU | nn.MaxPool2d) for module in case.model)
    truth = copy.deepcopy(case.model).double()
    wide = case.x.double()
    with torch.no_grad():
        exact = case.exact and len(case.x) and _largest(truth, wide) <= 1 / torch.finfo(case.x.dtype).eps
    x, gy_of = case.x.detach().requires_grad_(), _gradients_of(draw, case.exact)
    y, t = ours(x), truth(wide.requires_grad_())
    theirs, their_x = _their(case, x)
    close("y", y, theirs, t)
    gy = gy_of(t)
    if exact or not gated:
        grads = torch.autograd.grad(y, [x, *_parameters(ours)], gy.to(y.dtype), allow_unused=True)
        wanted = torch.autograd.grad(t, [wide, *_dense_parameters(truth)], gy, allow_unused=True)
        got = torch.autograd.grad(theirs, [their_x, *_dense_parameters(case.model)], gy.to(y.dtype), allow_unused=True)
        masks = [None, *(case.masks.get(name) for name, _ in case.model.named_parameters())]
        for i, (mine, other, true, mask) in enumerate(zip(grads, got, wanted, masks, strict=True)):
            if mask is not None:
                other, true = other[mask], true[mask]
            close(f"gradient {i}", mine, other, true)
    if not case.model.training:
        with torch.no_grad():
            close("y without gradients", ours(x), theirs, t)
        if draw.random() < 0.5:
            frozen_too(draw, case, ours, folder, t, theirs)


def frozen_too(draw: random.Random, case: Case, ours: nn.Module, folder: Path, t: Tensor, theirs: Tensor) -> None:
    Ticket.from_model(ours).save(folder / "net")
    net = load_sparse(folder / "net", example_input=case.x if draw.random() < 0.2 else None)
    close("y frozen", net(case.x), theirs, t)
    torch.set_num_threads(draw.randrange(1, 5))
    count = draw.randrange(len(case.x) + 1)
    close("y of a smaller batch, frozen", net(case.x[:count]), theirs[:count], t[:count])
    close("y frozen, once more", net(case.x), theirs, t)


def close(what: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice as far from the truth as PyTorch in the same dtype, and a few roundings."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} instead of {theirs.dtype}"
    if not truth.numel():
        return
    ours, theirs, truth = (tensor.detach() for tensor in (ours, theirs, truth))
    finite = theirs.isfinite()  # fp16 overflows
    error, budget = ((tensor.double() - truth)[finite].abs() for tensor in (ours, theirs))
    limit = 2 * float(budget.max()) if budget.numel() else 0.0
    limit += ROUNDINGS * torch.finfo(ours.dtype).eps * float(truth.abs().max())
    wrong = ~(error <= limit)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} beyond {limit:.3g}, up to {error.max():.3g}"


def _their(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of masked dense in the dtype: y, and the input that it is of."""
    their_x = x.detach().clone().requires_grad_()
    return case.model(their_x), their_x


def _largest(model: nn.Sequential, x: Tensor) -> float:
    """What no partial sum exceeds, of nets of integers, forward and backward: a net of sizes that adds up all."""
    sizes = copy.deepcopy(model)
    for tensor in sizes.parameters():
        tensor.abs_()
    for module in sizes:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.abs_().neg_()
    with torch.enable_grad():
        y = first = x.abs().requires_grad_()
        outputs = [y]
        for module in sizes:
            if isinstance(module, nn.MaxPool2d):
                module = nn.AvgPool2d(module.kernel_size, divisor_override=1)
            if not isinstance(module, nn.ReLU):
                y = module(y)
                outputs.append(y)
        gradients = torch.autograd.grad(y, [first, *sizes.parameters()], 3 * torch.ones_like(y), allow_unused=True)
    return max(float(t.detach().abs().max()) for t in (*outputs, *gradients) if t is not None and t.numel())


def _gradients_of(draw: random.Random, exact: bool) -> Callable[[Tensor], Tensor]:
    kind = draw.randrange(4)

    def gradient(y: Tensor) -> Tensor:
        like = y if kind else y[:1].expand_as(y) if len(y) else y
        made = torch.randint(-1, 2, like.shape).double() if exact else torch.randn(like.shape, dtype=torch.float64)
        made = made if kind else made[:1].expand_as(y) if len(y) else made
        return made.transpose(0, 1).contiguous().transpose(0, 1) if kind == 1 else made

    return gradient


def _parameters(model: nn.Module) -> list[Tensor]:
    """Of a converted model, in the order of the dense one's."""
    found = []
    for module in model:
        names = ("values", "bias") if isinstance(module, MaskedLayer) else ("weight", "bias")
        found += [p for name in names if isinstance(p := getattr(module, name, None), nn.Parameter)]
    return found


def _dense_parameters(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


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
    """The same numbers, otherwise in memory; NaN between them where there is room."""
    kind = draw.choice(["contiguous"] * 2 + ["transposed", "packed", "sliced", "spaced", "channels last", "unaligned"])
    if kind == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind in ("transposed", "packed") and x.dim() > 1:
        room = torch.full((*x.shape[1:], len(x) + (kind == "packed") * draw.randrange(1, 40)), torch.nan, dtype=x.dtype)
        return room[..., : len(x)].movedim(-1, 0).copy_(x)
    if kind == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
    if kind == "spaced":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if kind == "unaligned":
        room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)
    return x
