"""Sparse or dense: each masked layer is timed both ways, on an input like the one that its model gives it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .nn import MaskedLayer, MaskedSequential, Measured, native_runs
from .random_state import random_state_kept
from .timing import interleaved_ms

MARGIN = 0.97  # dense is chosen below this share of sparse's time: noise alone changes nothing
BURSTS, BURST_MS, LIMIT_MS = 7, 2.0, 200.0  # the limit is for each layer

_CACHE: dict[tuple, list[float]] = {}  # what `_times` found, in this process


def choose_execution(model: nn.Module, example_input: Tensor | tuple) -> None:
    """Set every masked layer of `model` to the execution that is faster on this machine, and its `measured`.

    A copy of the model is run once on `example_input`, a tensor or a tuple of the positional arguments, to see what
    each masked layer is given at its first call. Then each layer is timed on such an input, sparse and dense in turns:
    forward and backward if the model is in training mode, with the gradients that its training takes, else forward.
    It is timed alone or, where a MaskedSequential makes one native call of it and others (a chain of linear layers, a
    convolution with its ReLU and pooling), in that call, the others sparse: a dense layer would break it up. Dense is
    chosen where it is over 3 % faster. That takes 0.3 s a layer at most if single calls are shorter than 30 ms, and
    nothing for calls like earlier ones of the process.

    What masked layers with other elementwise modules between them save by leaving activations batch-minor is not
    measured. Layers that the run does not call, or calls on no numbers, are left as they are. So is everything else:
    random state, buffers, gradients.
    Raises TypeError if `example_input` is neither a tensor nor a tuple, and whatever the model raises on it.
    """
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(f"example_input: expected a tensor or a tuple, got {type(example_input).__name__}")
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    with random_state_kept(), torch.set_grad_enabled(model.training):
        work = copy.deepcopy(model)
        layers = {
            twin: layer
            for layer, twin in zip(model.modules(), work.modules(), strict=True)
            if isinstance(layer, MaskedLayer) and layer.density < 1
        }
        for twin in layers:
            twin.execution = "sparse"
        inputs = _first_inputs(work, list(layers), args)
        left = dict(inputs)
        for run in (*native_runs(work), *([twin] for twin in inputs)):
            timed = [twin for twin in dict.fromkeys(run) if twin in left]
            if not timed or run[0] not in inputs:
                continue
            sparse_ms, *dense_ms = _times(run, timed, inputs[run[0]])
            for twin, ms in zip(timed, dense_ms, strict=True):
                layer = layers[twin]
                layer.execution = "dense" if ms < MARGIN * sparse_ms else "sparse"
                layer.measured = Measured(sparse_ms, ms, left.pop(twin).shape, model.training)


class _Like(NamedTuple):
    """Of a tensor, all that its values do not decide."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> _Like:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad)

    def random(self) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        numbers = torch.randn(span, dtype=self.dtype, device=self.device)
        return numbers.as_strided(self.shape, self.strides).requires_grad_(self.requires_grad)


def _first_inputs(model: nn.Module, layers: list[MaskedLayer], args: tuple) -> dict[MaskedLayer, _Like]:
    """What the layers get at their first calls, in the order of these; without those that get no numbers."""
    found: dict[MaskedLayer, _Like] = {}

    def note(layer: MaskedLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(layer, _Like.of(*args, *kwargs.values()))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model(*map(_fresh, args))
    for handle in handles:
        handle.remove()
    return {layer: like for layer, like in found.items() if all(like.shape)}


def _fresh(arg: Any) -> Any:
    """A copy, for a model that may write to its arguments."""
    return arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else copy.deepcopy(arg)


def _times(run: list[nn.Module], layers: list[MaskedLayer], like: _Like) -> list[float]:
    """Milliseconds of a call of the run as it is, then with each of its layers dense."""
    kind = like.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    modules = [(repr(module), *((p.dtype, p.requires_grad) for p in module.parameters())) for module in run]
    places = tuple(map(run.index, layers))
    key = (*modules, places, like, torch.is_grad_enabled(), autocast, torch.get_num_threads())
    if key not in _CACHE:
        x = like.random()
        calls = [_call(run, x)]
        for layer in layers:
            dense = copy.deepcopy(layer)
            dense.execution = "dense"
            calls.append(_call([dense if module is layer else module for module in run], x))
        _CACHE[key] = interleaved_ms(*calls, bursts=BURSTS, burst_ms=BURST_MS, limit_ms=LIMIT_MS * len(layers))
    return _CACHE[key]


def _call(run: list[nn.Module], x: Tensor) -> Callable[[], None]:
    """A call of the run on x, with what gradients training takes of it."""
    forward = run[0].forward if len(run) == 1 else MaskedSequential(*run)  # a single layer: past its hooks
    parameters = dict.fromkeys(p for module in run for p in module.parameters())
    needed = [t for t in (x, *parameters) if t.requires_grad and torch.is_grad_enabled()]
    gy = torch.ones_like(forward(x))

    def call() -> None:
        y = forward(x)
        if needed:
            torch.autograd.grad(y, needed, gy)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call
