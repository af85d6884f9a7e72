"""The native library of csrc/: which one this processor gets, memory for it, and calls of it.

One shared library per instruction-set level is built by setup.py; the best one that this processor runs is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
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

Fact = tuple[Any, str | None, Any]


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


def call(x: Any, bound: tuple | None) -> Tensor | None:
    """One native call (facts, shape, threads, function, address, shape of y, owner of the address) on x.

    None if x is no ordinary contiguous fp32 tensor on the CPU of this shape, torch has another number of threads or a
    fact no longer holds.
    """
    return None if bound is None else LIBRARY.bound(x, ORDINARY, bound)


def unchanged(facts: tuple[Fact, ...]) -> bool:
    """Do all facts (object, name, value) still hold?

    (dict, name, value): the value has that name; `...`: nothing has. (dict, None, number): it has so many entries.
    (dict, None, tuple): these are its values, in order. (object, None, type): it is of the type.
    (tensor, None, number): that is its version. Values are compared by identity.
    """
    return all(map(_holds, facts)) if LIBRARY is None else LIBRARY.unchanged(facts)


def _holds(fact: Fact) -> bool:
    of, name, value = fact
    if isinstance(value, type) and name is None:
        return type(of) is value
    if not isinstance(of, dict):
        return of._version == value
    if isinstance(value, tuple) and name is None:
        found = list(of.values())
        return len(found) == len(value) and all(map(operator.is_, found, value))
    return len(of) == value if name is None else of.get(name, ...) is value


def versions(tensors: Iterable[Tensor]) -> tuple[Fact, ...]:
    """The facts of what they hold now."""
    return tuple((tensor, None, tensor._version) for tensor in tensors)


def empty(
    *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
):
    """A tensor on the CPU for native code to fill, whatever dtype and device are the defaults of the process."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)


def take(build: Callable[..., Any], *args: int) -> Tensor:
    """The words of a native plan builder as an int32 tensor, in the builder's memory."""
    return torch.frombuffer(build(*args), dtype=torch.int32)
