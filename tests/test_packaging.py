"""What is in the sdist and the wheel, and that they install, with a compiler and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_native_*")
USE = """
import torch, sparselottery
from sparselottery.info import info
layer = sparselottery.MaskedLinear(3, 2, mask=torch.tensor([[True, False, True], [False, False, False]]))
assert torch.equal(layer(torch.eye(3)), layer.weight.t() + layer.bias)
print(sparselottery.__file__)
print(info()["cpu"])
"""

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: Path, folder: Path, **environment: str) -> Path:
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")
    run(*pip, "--wheel-dir", folder, source, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> str:
    """Install a wheel into a folder of its own and use it from there; returns what `info` says of the CPU."""
    site = folder / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=folder)
    where, cpu = run("-c", USE, cwd=folder, PYTHONPATH=str(site)).splitlines()
    assert Path(where).is_relative_to(site)
    return cpu


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", build, folder, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, which must therefore be complete; one level, as three take minutes."""
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"), SPARSELOTTERY_LEVELS="base")


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.name for path in (ROOT / "kernels/csrc").iterdir()}
    assert sources
    assert {Path(name).name for name in names if "/csrc/" in name} == sources
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not any(Path(name).name.startswith("_native_") for name in names)


def test_wheel_installs_only_sparselottery(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert tops == {"sparselottery", f"sparselottery-{version}.dist-info"}
    patterns = ("sparselottery/*.py", "sparselottery/[!k]*/*.py", "sparselottery/[!k]*/*/*.py", "kernels/*.py")
    for module in (path for pattern in patterns for path in ROOT.glob(pattern)):
        path = module.relative_to(ROOT)
        assert str(path if path.parts[0] == "sparselottery" else Path("sparselottery") / path) in names


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_wheel_runs_native_code(wheel, tmp_path):
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if "/_native_" in name]
    assert libraries
    assert all(name.startswith("sparselottery/kernels/_native_") for name in libraries)
    assert use(wheel, tmp_path).startswith("native, base")


def test_without_a_compiler(sdist, tmp_path):
    missing = str(tmp_path / "no-such-compiler")
    plain = wheel_of(sdist, tmp_path, CC=missing, CXX=missing)
    assert not any("/_native_" in name for name in zipfile.ZipFile(plain).namelist())
    cpu = use(plain, tmp_path)
    assert cpu.startswith("torch reference")
    assert "compiler" in cpu


def test_a_level_that_is_asked_for_must_compile(sdist, tmp_path):
    missing = str(tmp_path / "no-such-compiler")
    with pytest.raises(AssertionError, match="no-such-compiler"):
        wheel_of(sdist, tmp_path, CC=missing, CXX=missing, SPARSELOTTERY_LEVELS="all")


def test_a_script_beside_a_clone_imports_the_library(tmp_path):
    """The clone's folder has the package's name, and a script finds its neighbours first."""
    (tmp_path / "sparselottery").mkdir()
    script = tmp_path / "script.py"
    script.write_text("from sparselottery import prune")
    run(script, cwd=tmp_path, PYTHONPATH="")
