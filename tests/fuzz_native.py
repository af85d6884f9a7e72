"""Hostile files against the native library built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/fuzz_native.py [COUNT]

Builds the library for this processor in a temporary folder, loads COUNT altered files of each kind (2000) in a process
of its own and runs what loads. Exits with 1 after a finding of the sanitizers, or a crash. Linux, with g++.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"AVX512": ("-march=x86-64-v4", 64), "AVX2": ("-march=x86-64-v3", 32)}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
OPTIONS = "detect_leaks=0:abort_on_error=0:exitcode=1:allocator_may_return_null=1"


def build(folder: Path) -> Path:
    import torch

    flag, vector_bytes = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("-O1", 16))
    library = folder / "native_sanitized.so"
    sources = sorted(map(str, (ROOT / "kernels" / "csrc").glob("*.cpp")))
    flags = ["-O1", "-g", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi", flag]
    subprocess.run(
        ["g++", *flags, *SANITIZE, f"-DVECTOR_BYTES={vector_bytes}", *sources, "-o", str(library)], check=True
    )
    return library


def fuzz_files(library: str, count: int) -> None:
    """What the process under the sanitizers does."""
    import fuzz
    import torch

    from sparselottery.kernels import native
    from sparselottery.runtime import load_sparse

    native.LIBRARY = native.load(Path(library))
    original, x, loaded, ran = fuzz.ticket(), torch.randn(5, 2, 4, 4), 0, 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "file"
        original.save(path)
        whole = path.read_bytes()
        expected = original.apply()(x)
        for kind in (fuzz.altered_bytes, fuzz.altered_contents):
            generator = random.Random(0)
            for _ in range(count):
                path.write_bytes(kind(whole, generator))
                try:
                    found = type(original).load(path)
                except ValueError:
                    continue
                loaded += 1
                if found.architecture != original.architecture or found.shapes != original.shapes:
                    continue
                try:
                    y, frozen = found.apply()(x), load_sparse(path)(x)
                except (RuntimeError, TypeError):  # tensors of other dtypes
                    continue
                ran += 1
                assert kind is fuzz.altered_contents or y.equal(expected)
                assert y.dtype == frozen.dtype
    sys.stdout.write(f"{2 * count} altered files: {loaded} loaded, {ran} ran on the sanitized library; no finding\n")


def _library_of_compiler(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "--inside":
        fuzz_files(sys.argv[2], int(sys.argv[3]))
        return 0
    count = sys.argv[1] if len(sys.argv) > 1 else "2000"
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        # libstdc++ as well, or the sanitizer misses the exceptions of libraries that Python loads later.
        preloaded = " ".join(_library_of_compiler(name) for name in ("libasan.so", "libstdc++.so"))
        environment = {
            **os.environ,
            "LD_PRELOAD": preloaded,
            "ASAN_OPTIONS": OPTIONS,
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "2", "PYTHONMALLOC": "malloc"}
        command = [sys.executable, __file__, "--inside", str(library), count]
        return subprocess.run(command, env=environment, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
