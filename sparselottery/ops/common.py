"""What the ops share: their library, their errors, their casts and their way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from ..kernels import gpu
from ..kernels.native import DENSE, KINDS
from ..kernels.reference import Geometry
from ..pattern import BLOCKS

Block = tuple[int, int]  # (R, C): all of its weights survive or none

LIBRARY = torch.library.Library("sparselottery", "DEF")


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError for what is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def misfit(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Exception:
    """The error for a tensor that is not of this dtype, the one of x, or not of this shape."""
    if tensor.dtype != dtype:
        return TypeError(f"{name}: expected {dtype}, the dtype of x, got {tensor.dtype}")
    return ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def misplaced(x: Tensor, values: Tensor) -> Exception:
    """The error for an x that is not where the layer is."""
    return ValueError(f"x: expected a tensor on {values.device}, where the values are, got one on {x.device}")


def check_layout(x: Tensor) -> None:
    """Raise TypeError for an x that is no tensor, or nested or sparse: no kernel of ours reads it."""
    check_tensor("x", x)
    if x.is_nested or x.layout is not torch.strided:
        got = "a nested one" if x.is_nested else f"one of {x.layout}"
        use = "torch.nested.to_padded_tensor(x, 0.0)" if x.is_nested else "x.to_dense()"
        raise TypeError(f"x: expected a dense tensor, got {got}: use {use}")


def autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast to `dtype` makes of an argument."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def operands(
    x: Tensor, values: Tensor, bias: Tensor | None, col_indices: Tensor, outputs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, values and bias of a convolution, as autocast has them; TypeError or ValueError for those that do not fit."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values, bias = autocast(x, dtype), autocast(values, dtype), autocast(bias, dtype)
    if x.dtype != values.dtype:
        raise TypeError(f"x: expected {values.dtype}, the dtype of the values, got {x.dtype}")
    if values.is_cpu != x.is_cpu:
        raise misplaced(x, values)
    if values.shape != col_indices.shape:
        raise misfit("values", values, x.dtype, col_indices.shape)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (outputs,)):
        raise misfit("bias", bias, x.dtype, (outputs,))
    return x, values, bias


def blocks_taken(device: torch.device, geometry: Geometry | None = None) -> tuple[Block, ...]:
    """Those of `BLOCKS` for which a device has kernels: of a linear layer, or of a convolution of this geometry."""
    return tuple(block for block in BLOCKS if gpu.takes_block(block, device, geometry)) if gpu.runs_on(device) else ()


def too_old(device: torch.device) -> str | None:
    """Why a GPU has no kernels for blocks at all; None where that is not the reason."""
    return gpu.too_old(device) if gpu.runs_on(device) else None


def is_wrapped(x: Tensor) -> bool:
    """Is x a tensor of torch's own that has no memory, or shows something else than its memory holds?"""
    return type(x) is Tensor and torch._C._dispatch_keys(x).raw_repr() & KINDS != DENSE


def untraced(x: Tensor) -> bool:
    """Is x an ordinary tensor that nothing observes? Then the dispatcher, 10 us a call, would change nothing."""
    plain = type(x) is Tensor and (x.is_cpu or x.is_cuda) and not is_wrapped(x)
    return plain and not torch._C._len_torch_dispatch_stack()


def is_ordinary(x: Tensor) -> bool:
    """Is a call on x one that nobody compiles, casts, transforms or observes?"""
    busy = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or in_torch(x)
    return not busy and untraced(x)


def on_gpu(x: Tensor) -> bool:
    """Are the GPU's kernels the ones for x?"""
    return (not x.is_cpu or "cpu" in gpu.DEVICES) and gpu.runs_on(x.device)  # the interpreter's are on the CPU


def in_torch(x: Tensor | fx.Proxy) -> bool:
    """Must a call on x be torch's own operators? For functorch, forward-mode derivatives, torch.jit and torch.fx."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or isinstance(x, fx.Proxy)
    )


def gradients_by_torch(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], gy: Tensor
) -> list[Tensor | None]:
    """Of compute(*inputs), by torch's operators: None where not needed, and differentiable where grad mode says so."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # of aliases: it stops here, wherever inputs come from and whatever is shared
        inputs = [None if each is None else each.view_as(each) for each in inputs]
        y = compute(*inputs)
    needed = [each for each, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, needed, gy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def as_one_module(module: torch.nn.Module, x: fx.Proxy, *args: object, **kwargs: object) -> fx.Proxy:
    """The call of the module as a node of the graph that torch.fx records, as layers of torch.nn are."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *args), kwargs)


@contextmanager
def unrecorded() -> Iterator[None]:
    """For torch.jit.trace what is computed here is a constant."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)
