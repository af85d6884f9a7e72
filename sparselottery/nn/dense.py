"""The dense weight that a dense or compact execution multiplies: one buffer, written to only when values change."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..kernels import cpu_pattern, native
from ..pattern import MAX_INT32


def smallest(positions: Tensor, size: int) -> Tensor:
    """Positions in a tensor of `size` elements: int32 where these hold them, 4 bytes a value to keep and to read."""
    return positions.to(torch.int32) if size <= MAX_INT32 else positions


def scatter(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new weight with the values (nnz,) at the positions and zeros elsewhere; differentiable by any transform."""
    return values.new_zeros(math.prod(shape)).scatter(0, positions, values).view(shape)


class _State(NamedTuple):
    """What a buffer holds: the values as they were at `address` in `version`."""

    weight: Tensor
    version: int | None  # None: unknown
    address: int
    memory: Tensor  # at the address: while it is referenced no other values can get there
    stream: int | None  # on which the weight is up to date; None: the values may have changed unnoticed


class DenseWeight:
    """Gives the weight of `shape` that has `values` at positions, zeros elsewhere, from a buffer that it keeps.

    Nothing but values is ever written, and the zeros stay. In training every forward writes them; without gradients
    none does, unless the values changed since the last. The version counter of the buffer moves when the values did:
    a backward that needs an older weight raises, as it does for nn.Linear.

    A change shows as another version or another address. Changes through `values.data` in place, or by replays of a
    CUDA graph that the layer is no part of, do not show; `doubt` makes the next forward write. In shared memory other
    processes may change them: there every forward writes.
    Threads may share it: one after another looks for a change and writes, and what they write is the same.
    """

    def __init__(self, values: nn.Parameter, shape: tuple[int, ...]) -> None:
        self._values, self._shape = values, shape
        self._state: _State | None = None
        self._bits: tuple[Tensor, Tensor] | None = None  # positions, and their bits
        self._captured = False
        self._one_at_a_time = threading.RLock()

    def __reduce__(self) -> tuple:
        return DenseWeight, (self._values, self._shape)  # a copy has no buffer yet

    def follow(self, values: nn.Parameter) -> None:
        """The layer was moved or loaded: a buffer of another device or dtype is dropped."""
        self._values = values
        self.doubt()
        if self._state is not None and not _alike(self._state.weight, values):
            self._state = None

    def take_over(self, other: DenseWeight) -> None:
        """The buffer of another for the same values, which stood elsewhere: it is cleared, if it is of this shape."""
        if other._state is not None and other._shape == self._shape and _alike(other._state.weight, self._values):
            other.doubt()
            with torch.no_grad():
                weight = other._state.weight.zero_()
            self._state = _State(weight, None, 0, weight, None)

    def doubt(self) -> None:
        """The values may have changed unnoticed."""
        if self._state is not None:
            self._state = self._state._replace(stream=None)

    def __call__(self, values: Tensor, positions: Tensor) -> Tensor:
        """The weight for values (nnz,) at positions (nnz,), differentiable in the values.

        It is a new tensor for values that are not the layer's parameter, which other tensors replace in
        functional_call, parametrisations and replicas, and wherever somebody traces or transforms.
        """
        if values is not self._values or not _plainly(values):
            return scatter(values, positions, self._shape)
        with self._one_at_a_time:
            return self._written(values, positions)

    def _written(self, values: Tensor, positions: Tensor) -> Tensor:
        capturing = _capturing(values)
        state = self._state
        if state is None or not _alike(state.weight, values):
            if capturing:  # memory of the graph is not for later calls
                return scatter(values, positions, self._shape)
            with torch.inference_mode(False):
                weight = torch.zeros(self._shape, dtype=values.dtype, device=values.device)
            state = _State(weight, None, 0, weight, None)
        version = None if values.is_inference() else values._version
        same = version is not None and (version, values.data_ptr()) == (state.version, state.address)
        stream = _stream(values)
        learning = values.requires_grad and torch.is_grad_enabled()
        if capturing:  # a replay must see the values of its time, unless they are frozen
            written = state.stream is not None and not values.requires_grad  # on any stream: a capture waits for all
        else:
            written = state.stream == stream and not learning and not values.untyped_storage().is_shared()
        if same and written:
            return state.weight
        if not same:
            increment_version(state.weight)
        if learning:
            weight = _Write.apply(values, state.weight, positions, self._bits_of(positions))
        else:
            weight = state.weight
            _write(values, weight, positions, self._bits_of(positions))
        if capturing:  # nothing is written yet, and replays will write unseen
            self._captured, version = True, None
        up_to_date = None if learning or self._captured else stream
        self._state = _State(state.weight, version, values.data_ptr(), values.detach(), up_to_date)
        return weight

    def _bits_of(self, positions: Tensor) -> Tensor | None:
        """For native code; made once."""
        if not (native.available() and positions.is_cpu and positions.dtype == torch.int32):
            return None
        if self._bits is None or self._bits[0] is not positions:
            self._bits = positions, cpu_pattern.bits(positions, math.prod(self._shape))
        return self._bits[1]


class _Write(torch.autograd.Function):
    """values (nnz,) -> the buffer with these at the positions; its gradient is gathered there."""

    @staticmethod
    def forward(ctx, values, weight, positions, bits):
        ctx.save_for_backward(positions)
        ctx.bits = bits
        _write(values, weight, positions, bits)
        return weight.detach()  # shares the version counter of the buffer; a view of it would cost two passes backward

    @staticmethod
    def backward(ctx, gweight):
        (positions,) = ctx.saved_tensors  # raises if the layer has moved to others
        return _gathered(gweight.reshape(-1), positions, ctx.bits), None, None, None


def _gathered(gweight: Tensor, positions: Tensor, bits: Tensor | None) -> Tensor:
    if bits is not None and _is_plain(gweight) and not (torch.is_grad_enabled() and gweight.requires_grad):
        return cpu_pattern.gathered(gweight, positions, bits)
    return gweight.index_select(0, positions)


def _write(values: Tensor, weight: Tensor, positions: Tensor, bits: Tensor | None) -> None:
    """values (nnz,) -> the weight, in place, at the positions in it when flattened; not counted as a version."""
    if bits is not None and _is_plain(values.detach()):
        cpu_pattern.scatter(values, positions, bits, weight)
    else:
        weight.data.view(-1).scatter_(0, positions, values.detach())


def _is_plain(tensor: Tensor) -> bool:
    """Can native code read it, which takes a third of the time of torch's operators?"""
    ordinary = tensor.is_cpu and native.LIBRARY.is_ordinary(tensor, native.ORDINARY)
    return ordinary and tensor.is_contiguous() and tensor.element_size() in (2, 4, 8)


def _capturing(values: Tensor) -> bool:
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def _stream(values: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(values.get_device()) if values.is_cuda else 0


def _alike(weight: Tensor, values: Tensor) -> bool:
    return weight.dtype == values.dtype and weight.device == values.device


def _plainly(values: Tensor) -> bool:
    """Is this a parameter with memory of its own, in a call that nobody traces or transforms?"""
    return not (traced() or type(values) is not nn.Parameter or values.is_meta)


def traced() -> bool:
    """Does somebody trace or transform this call?"""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
