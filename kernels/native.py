"""The native library of csrc/: which one this processor gets, memory for it, and calls of it.

One shared library per instruction-set level is built by setup.py; the best one that this processor runs is loaded.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .abi import TABLE

# What torch calls the processor's capability -> the levels of setup.py that run on it, best first.
LEVELS = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}

HALF = (torch.bfloat16, torch.float16)  # computed in fp32

DONE, TOO_LARGE, NO_PLAN = range(3)  # Outcome in csrc/plan.h


def load(path: Path) -> ctypes.CDLL:
    """The native library at `path`. Raises OSError if it does not load, or is of another version of these sources."""
    library = ctypes.CDLL(str(path))
    for source, expected in TABLE.items():
        try:
            found = tuple((ctypes.c_int64 * len(expected)).in_dll(library, f"sparselottery_abi_{source}"))
        except ValueError:  # there is no such symbol
            found = None
        if found != expected:
            raise OSError(f"built from another version of {source}.cpp: rebuild it, `pip install .` again")
    library.sparselottery_plan.restype = ctypes.c_int64
    library.sparselottery_workspace.argtypes = [ctypes.c_int64]
    library.sparselottery_workspace.restype = ctypes.c_void_p
    library.sparselottery_conv_plan.restype = ctypes.c_int64
    for name in ("net", "rows", "chain_infer"):
        function = getattr(library, f"sparselottery_{name}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
    library.sparselottery_unpack.argtypes = [
        ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    library.sparselottery_unpack.restype = None
    library.sparselottery_train.argtypes = [ctypes.c_void_p]
    library.sparselottery_train.restype = None
    for name in ("chain_forward", "chain_backward", "conv_forward", "conv_backward"):
        function = getattr(library, f"sparselottery_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int64
    return library


def _best() -> tuple[ctypes.CDLL | None, str]:
    """The library for this processor, and in words which one it is or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    folder = Path(__file__).resolve().parent
    for level in LEVELS.get(capability, ("base",)):
        for path in sorted(folder.glob(f"_native_{level}.*")):
            try:
                return load(path), f"native, {level} (processor: {capability})"
            except OSError as error:
                return None, f"torch reference: {path.name} does not load ({error})"
    return None, "torch reference: no native library was built (was there a C++ compiler at install time?)"


LIBRARY, _STATUS = _best()
VECTOR_BYTES = ctypes.c_int64.in_dll(LIBRARY, "sparselottery_vector_bytes").value if LIBRARY else 16


def available() -> bool:
    return LIBRARY is not None


def status() -> str:
    return _STATUS


def call(function: Callable[[int], int | None], args: list[int]) -> int | None:
    """Calls a function of csrc/ with its arguments, all fields 8 bytes: DONE, TOO_LARGE, or None of some.

    Raises ValueError for a plan that is not of these tensors.
    """
    block = array("q", args)
    outcome = function(block.buffer_info()[0])
    if outcome == NO_PLAN:
        raise ValueError("plan: expected one that was compiled for these indices and values, got another or none")
    return outcome


def empty(
    *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
):
    """A tensor on the CPU for native code to fill, whatever dtype and device are the defaults of the process."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)


def take(build: Callable[..., int], *args: object) -> Tensor:
    """The words that a native plan builder leaves, as an int32 tensor in the builder's memory."""
    words = ctypes.POINTER(ctypes.c_int32)()
    count = build(*args, ctypes.byref(words))
    if count < 0:
        raise MemoryError("no memory for the plan")
    memory = (ctypes.c_int32 * count).from_address(ctypes.addressof(words.contents))
    # With the tensor's storage; not at exit, where some tensors still live.
    weakref.finalize(memory, LIBRARY.sparselottery_free, words).atexit = False
    return torch.frombuffer(memory, dtype=torch.int32)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
