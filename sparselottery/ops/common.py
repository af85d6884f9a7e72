"""What the ops share: their library, their errors, their casts and their way past the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import gpu
from ..kernels.reference import Geometry

Block = tuple[int, int]  # (R, C): all of its weights survive or none

LIBRARY = torch.library.Library("sparselottery", "DEF")


def misfit(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Exception:
    """The error for a tensor that is not of this dtype, the one of x, or not of this shape."""
    if tensor.dtype != dtype:
        return TypeError(f"{name}: expected {dtype}, the dtype of x, got {tensor.dtype}")
    return ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def misplaced(x: Tensor, values: Tensor) -> Exception:
    """The error for an x that is not where the layer is."""
    return ValueError(f"x: expected a tensor on {values.device}, where the values are, got one on {x.device}")


def autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast to `dtype` makes of an argument."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def takes_block(block: Block, device: torch.device, geometry: Geometry | None = None) -> bool:
    """Are there kernels for blocks > (1, 1) on a device: of a linear layer, or of a convolution of this geometry?"""
    return gpu.runs_on(device) and gpu.takes_block(block, device, geometry)


def too_old(device: torch.device) -> str | None:
    """Why a GPU has no kernels for blocks at all; None where that is not the reason."""
    return gpu.too_old(device) if gpu.runs_on(device) else None


def untraced(x: Tensor) -> bool:
    """Is x an ordinary tensor that nothing observes? Then the dispatcher, 10 us a call, would change nothing."""
    return type(x) is Tensor and (x.is_cpu or x.is_cuda) and not torch._C._len_torch_dispatch_stack()
