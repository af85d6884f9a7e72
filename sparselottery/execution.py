"""Sparse, compact or dense: each masked layer is timed in every way, on an input like the one its model gives it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import Arguments, ExampleInput, arguments
from .graphs import WARM_UP, BrokenCaptureError, captured, on_another_stream
from .nn import MaskedLayer, MaskedSequential, Measured, native_runs
from .nn.compact import live_shape
from .random_state import random_state_kept
from .timing import interleaved_ms

MARGIN = 0.97  # another execution is chosen below this share of the time: noise alone changes nothing
BURSTS, BURST_MS, LIMIT_MS = 7, 2.0, 200.0  # the limit is for each execution that a layer has besides its default

REPLAYED_ON = ("cuda",)  # types of devices

_CACHE: dict[tuple, list[tuple[dict[str, float], str]]] = {}  # what `_times` found, in this process


def choose_execution(model: nn.Module, example_input: ExampleInput) -> None:
    """Set every masked layer of `model` to the execution that is fastest on its device, and its `measured`.

    A copy of the model is run once on `example_input` (a tensor, a tuple of the positional arguments or a dict of the
    keyword arguments) to see what each masked layer is given at its first call. Then each layer is timed on such an
    input, in all of its `executions` in turns: forward and backward if the model is in training mode, with the
    gradients that its training takes, else forward. On a GPU replays of CUDA graphs are timed: the Python of a call
    would outlast the kernels of a small layer.
    What cannot be captured is called instead, and `why` says so. The layer is timed alone or, where a MaskedSequential
    makes one native call of it and others (a chain of linear layers, a convolution with its ReLU and pooling), in that
    call, the others in their default execution, the one of a layer for which none is set: a dense layer would break it
    up.
    A layer keeps its default unless another execution is over 3 % faster; then it gets the fastest, or "dense" if that
    is within 3 % of it. This takes 0.3 s at most for each execution but the default, if single calls are shorter than
    30 ms, and nothing for calls like earlier ones of the process.

    What masked layers with other elementwise modules between them save by leaving activations batch-minor is not
    measured. Layers that the run does not call, or calls on no numbers, are left as they are. So is everything else:
    random state, buffers, gradients.
    Raises TypeError if `example_input` is none of these, whatever the model raises on it, and
    BrokenCaptureError (graphs.py) if a capture that failed took the device from this process.
    """
    given = arguments(example_input)
    with random_state_kept(), torch.set_grad_enabled(model.training):
        work = copy.deepcopy(model)
        layers = {
            twin: layer
            for layer, twin in zip(model.modules(), work.modules(), strict=True)
            if isinstance(layer, MaskedLayer) and layer.density < 1 and layer.measurable
        }
        for twin in layers:
            twin.execution = None
        inputs = _first_inputs(work, list(layers), given)
        left = dict(inputs)
        for run in (*native_runs(work), *([twin] for twin in inputs)):
            timed = [twin for twin in dict.fromkeys(run) if twin in left]
            if not timed or run[0] not in inputs:
                continue
            for twin, (ms, how) in zip(timed, _times(run, timed, inputs[run[0]]), strict=True):
                measured = Measured(ms, left.pop(twin).shape, model.training, how)
                layers[twin].set_execution(_fastest(ms, twin.execution), measured)


def _fastest(ms: dict[str, float], default: str) -> str:
    """The best of those that are clearly faster than the default, dense if it is about as fast; else the default."""
    faster = {execution: each for execution, each in ms.items() if each < MARGIN * ms[default]}
    best = min(faster, key=faster.__getitem__, default=default)
    return "dense" if ms[best] >= MARGIN * faster.get("dense", math.inf) else best


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


def _first_inputs(model: nn.Module, layers: list[MaskedLayer], given: Arguments) -> dict[MaskedLayer, _Like]:
    """What the layers get at their first calls, in the order of these; without those that get no numbers."""
    found: dict[MaskedLayer, _Like] = {}

    def note(layer: MaskedLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        x, *_ = *args, *kwargs.values()
        found.setdefault(layer, _Like.of(x))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    given.map(_fresh)(model)
    for handle in handles:
        handle.remove()
    return {layer: like for layer, like in found.items() if all(like.shape)}


def _fresh(tensor: Tensor) -> Tensor:
    """A copy, for a model that may write to its arguments."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _times(run: list[nn.Module], layers: list[MaskedLayer], like: _Like) -> list[tuple[dict[str, float], str]]:
    """Milliseconds of a call of the run with each of these layers in each of its executions, and how it was timed."""
    kind = like.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    modules = [(repr(module), *((p.dtype, p.requires_grad) for p in module.parameters())) for module in run]
    masked = [module for module in run if isinstance(module, MaskedLayer)]
    masks = [(layer.executions, layer.block, live_shape(layer.pattern, layer.shape)) for layer in masked]
    places = tuple(map(run.index, layers))
    precisions = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    settings = torch.is_grad_enabled(), autocast, torch.get_num_threads(), *precisions
    key = (*modules, *masks, places, like, *settings)
    if key not in _CACHE:
        x = like.random()
        others = [(layer, each) for layer in layers for each in layer.executions if each != layer.execution]
        calls = [_call(run, x)]
        for layer, execution in others:
            twin = copy.deepcopy(layer)
            twin.execution = execution
            calls.append(_call([twin if module is layer else module for module in run], x))
        refusals = [""] * len(calls)
        if replayed := kind in REPLAYED_ON:
            calls, refusals = zip(*(_replayed(call, like.device) for call in calls), strict=True)
        limits = {"bursts": BURSTS, "burst_ms": BURST_MS, "limit_ms": LIMIT_MS * len(others)}
        if kind == "cuda":
            limits["synchronize"] = partial(torch.cuda.synchronize, like.device)
        default_ms, *others_ms = interleaved_ms(*calls, **limits)
        found = dict(zip(others, zip(others_ms, refusals[1:], strict=True), strict=True))
        _CACHE[key] = []
        for layer in layers:
            each = {name: found.get((layer, name), (default_ms, refusals[0])) for name in layer.executions}
            refused = [f"; {name} called: {why}" for name, (_, why) in each.items() if why]
            how = "replayed" + "".join(refused) if replayed else "called"
            _CACHE[key].append(({name: ms for name, (ms, _) in each.items()}, how))
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

    return call


def _replayed(call: Callable[[], None], device: torch.device) -> tuple[Callable[[], object], str]:
    """The call as replays of a CUDA graph of it; or as it is, and why it cannot be captured."""
    for _ in range(WARM_UP):
        on_another_stream(call, device)
    try:
        return captured(call, device), ""
    except BrokenCaptureError:  # nothing can be called any more
        raise
    except RuntimeError as error:  # of CUDA, or of an operator that waits for the device
        return call, str(error).partition("\n")[0]
