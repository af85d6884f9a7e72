"""Chains of sparse layers and their true results: what the tests of kernels, ops and layers share.

Entries are small integers, so that every sum is exact in fp32 and any order of summation gives the same bits: results
are compared for equality. Gaussian entries, for accuracy in a dtype, are compared with what PyTorch achieves in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparselottery import Pattern
from sparselottery.kernels import cpu, native

EXACT_IN_FP32 = 2**24


@dataclass(frozen=True)
class Chain:
    """Layers y = x Wᵀ + b with a ReLU between them, and the gradient gy of the last y."""

    x: Tensor
    gy: Tensor
    masks: list[Tensor]
    values: list[Tensor]
    biases: list[Tensor | None]

    def to(self, dtype: torch.dtype) -> Chain:
        values, biases = [v.to(dtype) for v in self.values], [None if b is None else b.to(dtype) for b in self.biases]
        return replace(self, x=self.x.to(dtype), gy=self.gy.to(dtype), values=values, biases=biases)

    @property
    def patterns(self) -> list[Pattern]:
        return [Pattern.from_mask(mask) for mask in self.masks]

    def indices(self, tile: tuple[int, int] | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """crow_indices, col_indices and plans, as the kernels take them."""
        crow_indices, col_indices = [p.crow_indices for p in self.patterns], [p.col_indices for p in self.patterns]
        plans = [cpu.plan(p.crow_indices, p.col_indices, p.shape[1], tile) for p in self.patterns]
        return crow_indices, col_indices, plans


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


def make(batch: int, widths: list[int], density: float = 0.1, entries=integers, bias: bool = True) -> Chain:
    """A fp32 chain of len(widths) - 1 layers, widths[0] the inputs, at random masks."""
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    return of_masks(batch, [torch.rand(shape) < density for shape in shapes], entries, bias)


def of_masks(batch: int, masks: list[Tensor], entries=integers, bias: bool = True) -> Chain:
    values = [entries(int(mask.sum())) for mask in masks]
    biases = [entries(len(mask)) if bias else None for mask in masks]
    return Chain(entries(batch, masks[0].shape[1]), entries(batch, len(masks[-1])), masks, values, biases)


def dense(chain: Chain) -> dict[str, Tensor]:
    """y and all gradients by dense torch ops and autograd, in the dtype of the chain."""
    x = chain.x.clone().requires_grad_()
    weights = [torch.zeros(m.shape, dtype=x.dtype).masked_scatter(m, v) for m, v in _pairs(chain)]
    biases = [x.new_zeros(len(m)) if b is None else b.clone() for m, b in zip(chain.masks, chain.biases, strict=True)]
    params = [p.requires_grad_() for p in (*weights, *biases)]
    y = x
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = linear(torch.relu(y) if layer else y, weight, bias)
    gx, *grads = torch.autograd.grad(y, [x, *params], chain.gy)
    gweights, gbiases = grads[: len(weights)], grads[len(weights) :]
    gvalues = [g[m] for g, m in zip(gweights, chain.masks, strict=True)]
    return _named(y.detach(), gx, gvalues, gbiases)


def truth(chain: Chain) -> dict[str, Tensor]:
    """`dense` in fp64."""
    return dense(chain.to(torch.float64))


def run(backend, chain: Chain, tile=None, batch_minor=False) -> dict[str, Tensor]:
    """y and all gradients by a backend of `kernels`."""
    indices = chain.indices(tile)
    y, saved = backend.chain_forward(chain.x, chain.values, chain.biases, *indices, batch_minor, True)
    needs = [True] * len(chain.values)
    return _named(y, *backend.chain_backward(chain.gy, chain.x, saved, chain.values, *indices, True, needs, needs))


def assert_exact(got: dict[str, Tensor], chain: Chain) -> None:
    """Equal to the truth, to the bit, or to what it is rounded to; an empty result is one that was not asked for."""
    ones = replace(chain, x=chain.x.abs(), gy=chain.gy.abs(), values=[v.abs() for v in chain.values],
                   biases=[None if b is None else b.abs() for b in chain.biases])  # fmt: skip
    largest = max((float(t.abs().max()) for t in truth(ones).values() if t.numel()), default=0)
    assert largest < EXACT_IN_FP32, "the test itself: partial sums are not exact in fp32"
    for name, expected in truth(chain).items():
        if name in got:
            assert torch.equal(got[name], expected.to(got[name].dtype)), name


def assert_accurate(got: dict[str, Tensor], chain: Chain) -> None:
    """At most twice as far from the truth as dense PyTorch in the same dtype, and a few roundings."""
    theirs = dense(chain)
    for name, expected in truth(chain).items():
        assert got[name].dtype == theirs[name].dtype
        assert_close(got[name], theirs[name], expected)


def assert_close(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    if truth.numel():
        slack = 16 * torch.finfo(ours.dtype).eps * float(truth.abs().max())
        error, budget = (float((t.double() - truth).abs().max()) for t in (ours, theirs))
        assert error <= 2 * budget + slack


def _pairs(chain: Chain):
    return zip(chain.masks, chain.values, strict=True)


def _named(y, gx, gvalues, gbiases) -> dict[str, Tensor]:
    named = {"y": y, "gx": gx}
    named |= {f"gvalues {layer}": g for layer, g in enumerate(gvalues)}
    return named | {f"gbias {layer}": g for layer, g in enumerate(gbiases)}


def spy(monkeypatch, name, call):
    """Native calls of this name, if there are any, are call(function, *arguments) from now on."""
    if native.LIBRARY is not None:
        function = getattr(native.LIBRARY, name)
        library = SimpleNamespace(**{**vars(native.LIBRARY), name: partial(call, function)})
        monkeypatch.setattr(native, "LIBRARY", library)


def noted(notes, note, result):
    """The result of a native call, with a note of it if the call was made."""
    if result is not None:
        notes.append(note)
    return result
