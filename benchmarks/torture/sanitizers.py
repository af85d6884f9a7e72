"""The native library under a sanitizer, and the environment of a Python that loads it. Linux, with g++."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sparselottery.kernels import native

from .campaign import ROOT

HERE = Path(__file__).resolve().parent
LIBRARY = "native_sanitized.so"
LEVELS = {"AVX512": ("-march=x86-64-v4", 64), "AVX2": ("-march=x86-64-v3", 32)}
FLAGS = ["-O1", "-g", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-fno-omit-frame-pointer"]
ADDRESSES = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREADS = ["-fsanitize=thread"]


def of_addresses(folder: Path) -> dict[str, str]:
    """Builds the library with AddressSanitizer and UndefinedBehaviorSanitizer; the environment."""
    _build(folder, ADDRESSES, [])
    # libstdc++ as well, or the sanitizer misses the exceptions of libraries that Python loads later.
    return {
        "LD_PRELOAD": f"{_of_compiler('libasan.so')} {_of_compiler('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }


def of_threads(folder: Path) -> dict[str, str]:
    """Builds the library with ThreadSanitizer and an OpenMP of our own, whose barriers it sees; the environment.

    Code without instrumentation, Python's and torch's, is not judged: how its threads wait is not seen either.
    """
    _build(folder, THREADS, [HERE / "openmp.cpp"])
    return {
        "LD_PRELOAD": _of_compiler("libtsan.so"),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
    }


def use(folder: Path) -> None:
    """Let all native calls of this process go to the library that was built there, if one was."""
    path = folder / LIBRARY
    if path.exists():
        native.LIBRARY = native.load(path)


def _build(folder: Path, sanitizer: list[str], further: list[Path]) -> None:
    flag, vector_bytes = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("-O1", 16))
    flags = [*FLAGS, *sanitizer, flag, f"-DVECTOR_BYTES={vector_bytes}", f"-I{sysconfig.get_path('include')}"]
    sources = [*sorted((ROOT / "kernels" / "csrc").glob("*.cpp")), *further]
    objects = [str(folder / f"{source.name}.o") for source in sources]

    def compiled(pair: tuple[Path, str]) -> None:
        subprocess.run(["g++", *flags, "-c", str(pair[0]), "-o", pair[1]], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, zip(sources, objects, strict=True)))
    openmp = [] if further else ["-fopenmp"]
    subprocess.run(["g++", "-shared", *sanitizer, *openmp, *objects, "-o", str(folder / LIBRARY)], check=True)


def _of_compiler(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
