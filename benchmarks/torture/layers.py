"""Random layers and nets: their outputs and gradients against fp64 masked dense.

The error may be twice PyTorch's own in that dtype, and some roundings of the terms that were added up: a sum can be as
small as it likes, and PyTorch's exact by luck. Where a ReLU or a pooling decides what a gradient is, entries are small
integers and sums exact, so that nobody decides otherwise; where sums would not be exact, outputs alone are compared.
Memory that nobody writes holds NaN.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sparselottery import Ticket, convert, load_sparse
from sparselottery.nn import MaskedLayer

from .nets import DTYPES, Case, drawn

CASES = 10_000
ROUNDINGS = 16
SUMS = {dtype: torch.finfo(max(dtype, torch.float32, key=lambda d: d.itemsize)).eps for dtype in DTYPES}  # added in


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
        with _sound_convolutions(case):
            compare(draw, case, ours, folder)
    except Exception as error:
        error.add_note(said)
        raise


@contextlib.contextmanager
def _sound_convolutions(case: Case) -> Iterator[None]:
    """Without oneDNN's of 16 bits or with kernels smaller than the stride: they spoil the heap (torch 2.13)."""
    half, mkldnn = case.x.dtype in (torch.bfloat16, torch.float16), torch.backends.mkldnn
    convolutions = [module for module in case.model if isinstance(module, nn.Conv2d)]
    skips = any(size < step for c in convolutions for size, step in zip(c.kernel_size, c.stride, strict=True))
    before = mkldnn.enabled
    mkldnn.enabled = before and not (skips or (half and convolutions))
    try:
        yield
    finally:
        mkldnn.enabled = before


def compare(draw: random.Random, case: Case, ours: nn.Module, folder: Path) -> None:
    gated = any(isinstance(module, nn.ReLU | nn.MaxPool2d) for module in case.model)
    truth = copy.deepcopy(case.model).double()
    wide = case.x.double()
    with torch.no_grad():
        exact = case.exact and len(case.x) and _largest(truth, wide) <= 1 / torch.finfo(case.x.dtype).eps
    x, gy_of = case.x.detach().requires_grad_(), _gradients_of(draw, case.exact)
    y, t = ours(x), truth(wide.requires_grad_())
    theirs, their_x = _their(case, x)
    gy = gy_of(t)
    rounded = _rounded(truth, wide, gy) if len(truth) == 1 else None
    of_y = rounded and rounded[0]
    close("y", y, theirs, t, of_y)
    if exact or not gated:
        grads = torch.autograd.grad(y, [x, *_parameters(ours)], gy.to(y.dtype), allow_unused=True)
        wanted = torch.autograd.grad(t, [wide, *_dense_parameters(truth)], gy, allow_unused=True)
        got = torch.autograd.grad(theirs, [their_x, *_dense_parameters(case.model)], gy.to(y.dtype), allow_unused=True)
        masks = [None, *(case.masks.get(name) for name, _ in case.model.named_parameters())]
        for i, (mine, other, true, mask) in enumerate(zip(grads, got, wanted, masks, strict=True)):
            if mask is not None:
                other, true = other[mask], true[mask]
            terms = rounded and rounded[i + 1]
            close(f"gradient {i}", mine, other, true, terms if mask is None or terms is None else terms[mask])
    if not case.model.training:
        with torch.no_grad():
            close("y without gradients", ours(x), theirs, t, of_y)
        if draw.random() < 0.5:
            frozen_too(draw, case, ours, folder, t, theirs, of_y)


def frozen_too(
    draw: random.Random, case: Case, ours: nn.Module, folder: Path, t: Tensor, theirs: Tensor, of_y: Tensor | None
) -> None:
    Ticket.from_model(ours).save(folder / "net")
    net = load_sparse(folder / "net", example_input=case.x if draw.random() < 0.2 else None)
    close("y frozen", net(case.x), theirs, t, of_y)
    torch.set_num_threads(draw.randrange(1, 5))
    count = draw.randrange(len(case.x) + 1)
    part = None if of_y is None else of_y[:count]
    close("y of a smaller batch, frozen", net(case.x[:count]), theirs[:count], t[:count], part)
    close("y frozen, once more", net(case.x), theirs, t, of_y)


def close(what: str, ours: Tensor, theirs: Tensor, truth: Tensor, rounded: Tensor | None = None) -> None:
    """At most twice as far from the truth as PyTorch in the same dtype, and some roundings of `rounded`.

    rounded: None for those of the largest entry.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} instead of {theirs.dtype}"
    if not truth.numel():
        return
    ours, theirs, truth = (tensor.detach() for tensor in (ours, theirs, truth))
    finite = theirs.isfinite()  # fp16 overflows
    error, budget = ((tensor.double() - truth)[finite].abs() for tensor in (ours, theirs))
    limit = 2 * float(budget.max()) if budget.numel() else 0.0
    limit += ROUNDINGS * torch.finfo(ours.dtype).eps * float(truth.abs().max())
    limit = torch.full_like(error, limit) if rounded is None else limit + SUMS[ours.dtype] * rounded[finite]
    wrong = ~(error <= limit)
    if wrong.any():
        worst = f"up to {error[wrong].max():.3g}, there within {limit[wrong][error[wrong].argmax()]:.3g}"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} too far from the truth, {worst}")


def _rounded(layer: nn.Sequential, x: Tensor, gy: Tensor) -> list[Tensor]:
    """What epsilon is multiplied with: of y and all gradients of one layer, |terms| times roundings.

    These are a few, and the root of how many terms there are, as each addition rounds up or down.
    """
    found = []
    for of in (Tensor.abs, lambda tensor: tensor.sign().abs()):
        made = copy.deepcopy(layer)
        for parameter in made.parameters():
            parameter.data = of(parameter.data)
        with torch.enable_grad():
            first = of(x.detach()).requires_grad_()
            y = made(first)
        found.append([y.detach(), *torch.autograd.grad(y, [first, *made.parameters()], of(gy))])
    return [sizes * (ROUNDINGS + counts.sqrt()) for sizes, counts in zip(*found, strict=True)]


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
