"""The functions of `reference` as Triton kernels; Triton itself is imported with the first of them.

    linear, conv2d        the functions: chains of layers, convolutions
    csr                   single surviving weights, on activations in batch-minor layout
    block                 blocks of (R, C) surviving weights, on tensor cores
    layout                activations between row-major and batch-minor
    launch, device        starting kernels; what a GPU can do
    audit                 compiling all of them for GPUs that are not here

A plan is int32 metadata made once per pattern. It says for which blocks: (1, 1) is CSR.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Geometry
from .device import capability

DEVICES = ("cuda",)  # torch device types whose tensors the kernels take; AMD's are "cuda" too
TENSOR_CORES = (8, 0)  # CUDA's least compute capability for blocks and for bf16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_FUNCTIONS = {
    "linear": ("chain_forward", "chain_backward", "saved_features", "plan"),
    "conv2d": ("conv_forward", "conv_backward", "conv_plan"),
}
_HOME = {name: module for module, names in _FUNCTIONS.items() for name in names}


class Plan(NamedTuple):
    """What `plan` or `conv_plan` made for blocks of (R, C)."""

    words: Tensor
    block: tuple[int, int]


@cache
def available() -> bool:
    return find_spec("triton") is not None


def status() -> str:
    if not available():
        return "torch reference: Triton is not installed (pip install 'sparselottery[gpu]')"
    if not torch.cuda.is_available():
        return f"Triton {_triton_version()}, but torch sees no GPU here"
    lacks = too_old(torch.device("cuda", torch.cuda.current_device()))
    note = f" (bf16 on the torch reference and no blocks: {lacks})" if lacks else ""
    return f"Triton {_triton_version()}, {torch.cuda.get_device_name()}{note}"


def too_old(device: torch.device) -> str | None:
    """Why a GPU has no kernels for blocks, nor for bf16; None if it is new enough."""
    found, needed = (".".join(map(str, each)) for each in (capability(device), TENSOR_CORES))
    return f"expected compute capability {needed}, got {found}" if capability(device) < TENSOR_CORES else None


def runs_on(device: torch.device) -> bool:
    """Are these kernels the ones for tensors of a device?"""
    return device.type in DEVICES and available()


def supports(dtype: torch.dtype, plans: Sequence[Plan]) -> bool:
    """Can the kernels run on this dtype and on these plans, where they are?"""
    if dtype not in DTYPES or not all(plan.words.numel() for plan in plans):
        return False
    plain = dtype != torch.bfloat16 and all(plan.block == (1, 1) for plan in plans)
    return plain or capability(plans[0].words.device) >= TENSOR_CORES


def takes_block(block: tuple[int, int], device: torch.device, geometry: Geometry | None = None) -> bool:
    """Has a device a kernel for blocks (R, C) > (1, 1) of a linear layer, or of a convolution of this geometry?"""
    return import_module(".block", __name__).takes(block, device, geometry)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _triton_version() -> str:
    return metadata.version("triton")
