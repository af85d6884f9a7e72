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

from ..device import assumed
from ..launch import Launch
from .sass import Code, read_gcn, read_sass

# Triton is imported late: without it this module still says that it is missing.


class Target(NamedTuple):
    """A GPU for which to compile: Triton's GPUTarget, and what `device` would say of it."""

    backend: str
    arch: int | str
    warp_size: int
    capability: tuple[int, int]
    shared: int  # bytes a program may have
    tensor_cores: str  # the opcode of sass.TENSOR_CORES that multiplies large tiles

    @property
    def wide(self) -> int:
        """Bits of the loads of a thread by which tiles should come. AMD has twice the threads."""
        return 64 if self.backend == "hip" else 128


TARGETS = {  # sm_89 is as sm_86: the same limits, and the same code
    "sm_80": Target("cuda", 80, 32, (8, 0), 163 << 10, "HMMA"),
    "sm_86": Target("cuda", 86, 32, (8, 6), 99 << 10, "HMMA"),
    "sm_90": Target("cuda", 90, 32, (9, 0), 227 << 10, "HGMMA"),
    "sm_100": Target("cuda", 100, 32, (10, 0), 227 << 10, "UTCHMMA"),
    "sm_120": Target("cuda", 120, 32, (12, 0), 99 << 10, "HMMA"),
    "gfx942": Target("hip", "gfx942", 64, (9, 4), 64 << 10, "v_mfma"),
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


def triton_version() -> tuple[int, int]:
    """(3, 9) of Triton 3.9.0."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


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
    """Within it launches are made for a target and compiled for it; no code comes from an earlier process."""
    from triton.runtime.driver import driver

    cache_before, driver_before = os.environ.get("TRITON_CACHE_DIR"), driver._active  # None: not looked for yet
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        driver.set_active(_Driver(target))
        try:
            with assumed(target.capability, target.shared):
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
    plain = {each.name for each in getattr(launch.kernel, "params", ()) if each.do_not_specialize}
    kinds = tuple(
        (name, each if name.isupper() else type(each) if name in plain else _kind(each))
        for name, each in sorted(launch.arguments.items())
    )
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
