"""The native library of csrc/: which one this processor gets, memory for it, and calls of it.

One shared library per instruction-set level is built by setup.py; the best one that this processor runs is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .abi import TABLE

# What torch calls the processor's capability -> the levels of setup.py that run on it, best first.
LEVELS = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}

HALF = (torch.bfloat16, torch.float16)  # computed in fp32

_KEY = {name: torch._C.DispatchKeySet(key).raw_repr() for name, key in torch._C.DispatchKey.__members__.items()}
DENSE = _KEY["Dense"]  # the tensor has memory; with the others its memory does not hold what it shows
KINDS = DENSE | sum(
    _KEY[name]
    for name in ("Negative", "Conjugate", "ZeroTensor", "Functionalize", "NestedTensor", "FuncTorchBatched",
                 "FuncTorchGradWrapper")
)  # fmt: skip
_OBSERVERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
)
# What csrc/python.h asks where nobody observes a call: the type of x, its dispatch keys, and functions that return
# nothing true. As `ops.in_torch` and `ops.untraced` do, in a third of their time.
ORDINARY = (Tensor, torch._C._dispatch_keys, KINDS, DENSE, forward_ad, _OBSERVERS)

DONE, TOO_LARGE = range(2)  # Outcome in csrc/plan.h; the third is raised


def load(path: Path) -> ModuleType:
    """The native library at `path`: the module of csrc/python.cpp.

    Raises ImportError if it does not load, or is of another version of these sources.
    """
    spec = spec_from_file_location("_native", path, loader=ExtensionFileLoader("_native", str(path)))
    library = module_from_spec(spec)
    spec.loader.exec_module(library)
    for source, expected in TABLE.items():
        if library.abi(source, len(expected)) != expected:
            raise ImportError(f"built from another version of {source}.cpp: rebuild it, `pip install .` again")
    return library


def _best() -> tuple[ModuleType | None, str]:
    """The library for this processor, and in words which one it is or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    folder = Path(__file__).resolve().parent
    for level in LEVELS.get(capability, ("base",)):
        for path in sorted(folder.glob(f"_native_{level}.*")):
            try:
                return load(path), f"native, {level} (processor: {capability})"
            except ImportError as error:
                return None, f"torch reference: {path.name} does not load ({error})"
    return None, "torch reference: no native library was built (it takes a C++ compiler and Python's headers)"


LIBRARY, _STATUS = _best()
VECTOR_BYTES = LIBRARY.VECTOR_BYTES if LIBRARY else 16


def available() -> bool:
    return LIBRARY is not None


def status() -> str:
    return _STATUS


def have_versions(tensors: list[Tensor], versions: list[int] | None) -> bool:
    """Are these the versions of the tensors now? None: of none."""
    if versions is None or LIBRARY is None:
        return [tensor._version for tensor in tensors] == versions
    return LIBRARY.have_versions(tensors, versions)


def empty(
    *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
):
    """A tensor on the CPU for native code to fill, whatever dtype and device are the defaults of the process."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)


def take(build: Callable[..., Any], *args: int) -> Tensor:
    """The words of a native plan builder as an int32 tensor, in the builder's memory."""
    return torch.frombuffer(build(*args), dtype=torch.int32)
