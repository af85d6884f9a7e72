"""Builds the native CPU library, once per instruction-set level; everything else is in pyproject.toml.

Each level is an *optional* extension: where it does not compile, the install succeeds and plain torch runs instead.
Levels that SPARSELOTTERY_LEVELS asks for are not optional.
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Level -> (flags, bytes per vector). The vector length is the level's own: wider than the registers is 12 times slower.
LEVELS = {"base": ([], 16)}
if sysconfig.get_platform().endswith(("x86_64", "amd64")):  # of the target, where that is another machine
    LEVELS["avx2"] = (["-march=x86-64-v3"], 32)
    LEVELS["avx512"] = (["-march=x86-64-v4", "-mprefer-vector-width=512"], 64)

# Levels that must compile: "avx512" builds that one alone, "all" each of them.
WANTED = os.environ.get("SPARSELOTTERY_LEVELS", "")

CSRC = Path("kernels/csrc")


def openmp() -> tuple[list[str], list[str]]:
    """What the compiler and the linker are told, for threads.

    Apple's clang takes -fopenmp from its preprocessor alone and has no omp.h: Homebrew's libomp has. It is not linked,
    as two OpenMP runtimes end a process: what is undefined, as all of Python is, is found in the one that torch brings
    and has loaded. Without omp.h, one thread. Nobody has run this on a Mac.
    """
    if sys.platform != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    for folder in ("/opt/homebrew/opt/libomp/include", "/usr/local/opt/libomp/include"):
        if Path(folder, "omp.h").exists():
            return ["-Xpreprocessor", "-fopenmp", f"-I{folder}"], []
    return [], []


OPENMP = openmp()


def extension(level: str) -> Extension:
    flags, vector_bytes = LEVELS[level]
    return Extension(
        f"sparselottery.kernels._native_{level}",
        sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
        depends=sorted(str(path) for path in CSRC.glob("*.h")),
        define_macros=[("VECTOR_BYTES", str(vector_bytes))],
        extra_compile_args=["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-Wno-psabi", *flags, *OPENMP[0]],
        extra_link_args=OPENMP[1],
        language="c++",
        optional=not WANTED,
    )


class ParallelBuild(build_ext):
    """Compiles all files of all levels at once; objects of each level apart, as they come from the same sources."""

    def build_extensions(self) -> None:
        compile_files = self.compiler.compile
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:

            def compile_each(sources: list[str], **options: object) -> list[str]:
                objects = pool.map(lambda source: compile_files([source], **options), sources)
                return [name for names in objects for name in names]

            self.compiler.compile = compile_each
            self.parallel = len(self.extensions)  # threads that but wait for their files
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)


levels = list(LEVELS) if WANTED in ("", "all") else WANTED.split(",")
setup(ext_modules=[extension(level) for level in levels], cmdclass={"build_ext": ParallelBuild})
