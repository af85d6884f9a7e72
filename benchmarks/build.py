"""How long `pip install .` builds: `python -m benchmarks.build` writes build.csv, a row for each number of compilers.

Each builds the wheel of a fresh copy of the sources, its native library at all levels, with this environment's
setuptools, so that nothing is fetched. files: that the compiler is called for, each once a level.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from time import perf_counter

from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent
BUILT = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_native_*")
PIP = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir")


def measure(parallel: int) -> dict[str, object]:
    """A row. Raises RuntimeError where the wheel holds no native library."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT), symlinks=True)
        (source / "setup.cfg").write_text(f"[build_ext]\nparallel = {parallel}\n")
        began = perf_counter()
        subprocess.run([*PIP, "--wheel-dir", folder, source], check=True)
        seconds = perf_counter() - began
        names = zipfile.ZipFile(next(Path(folder).glob("*.whl"))).namelist()
    levels = sum(Path(name).name.startswith("_native_") for name in names)
    if not levels:
        raise RuntimeError("expected a wheel with native libraries, got one without: does the compiler run?")
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    files = levels * len(list((ROOT / "kernels/csrc").glob("*.cpp")))
    row = {"what": "wheel", "compiler": compiler, "levels": levels, "files": files, "impl": results.OURS}
    return row | {"compilers": parallel, "seconds": f"{seconds:.3g}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "build.csv")
    args = parser.parse_args()
    measured = []
    for parallel in dict.fromkeys((os.cpu_count() or 1, 1)):
        measured.append(measure(parallel))
        print(" ".join(f"{key}={value}" for key, value in measured[-1].items()), flush=True)
    results.write(args.out, measured)


if __name__ == "__main__":
    main()
