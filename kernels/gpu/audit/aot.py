"""What a launch compiles to, for a GPU that need not be here.

Triton's own path for launches does it, up to where a GPU would load the code: what is specialised, and on what, is as
in a real launch. Only the driver, whom Triton asks for the GPU, is ours.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..launch import Launch
from .sass import Code, read_gcn, read_sass

# Triton is imported late: without it this module still says that it is missing.


class Target(NamedTuple):
    """A GPU for which to compile: Triton's GPUTarget, and the shared memory a program may have there."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}


class Compiled(NamedTuple):
    code: Code
    shared: int  # bytes a program


class _Driver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*target[:3])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0


def missing() -> str | None:
    """Why nothing can be compiled in this process; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if triton.knobs.runtime.interpret:
        return "expected TRITON_INTERPRET to be unset, got Triton's interpreter, which compiles nothing"
    return None


@cache
def missing_for(target: Target) -> str | None:
    """Why this Triton cannot compile for a target, or what it compiles not be read; None if both can."""
    from triton.compiler import make_backend

    try:
        make_backend(_Driver(target).target)
        if target.backend == "cuda":
            _cuobjdump()
    except (RuntimeError, AttributeError, OSError) as error:
        return str(error) or repr(error)
    return None


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it `compile_launch` compiles for a target, and nothing comes from a cache of an earlier process."""
    from triton.runtime.driver import driver

    cache_before, driver_before = os.environ.get("TRITON_CACHE_DIR"), driver._active  # None: not looked for yet
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        driver.set_active(_Driver(target))
        try:
            yield
        finally:
            driver.set_active(driver_before)
            os.environ.pop("TRITON_CACHE_DIR")
            if cache_before is not None:
                os.environ["TRITON_CACHE_DIR"] = cache_before


def compile_launch(launch: Launch) -> Compiled:
    """The machine code of a launch, for the target of `compiling_for`. Raises what Triton raises."""
    compiled = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    assembly = compiled.asm.get("amdgcn")
    code = read_gcn(assembly) if assembly is not None else read_sass(_disassembled(compiled.asm["cubin"]))
    return Compiled(code, compiled.metadata.shared)


def specialisation(launch: Launch) -> Hashable:
    """Launches of equal specialisation compile to the same code, whatever the target."""
    kinds = tuple((name, each if name.isupper() else _kind(each)) for name, each in sorted(launch.arguments.items()))
    return launch.kernel, kinds, tuple(sorted(launch.options.items()))


def _kind(arg: Any) -> Hashable:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0, arg.untyped_storage().nbytes() < 2**31
    if isinstance(arg, int) and not isinstance(arg, bool):
        return int, arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    return type(arg), None if isinstance(arg, float) else arg


def _cuobjdump() -> str:
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.check_output(
            [_cuobjdump(), "-sass", "-res-usage", path], text=True, stderr=subprocess.DEVNULL
        )
