"""The house rules: which module may import which, how long a file may be, who prints, what may not be named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# A module imports from the lines above its own only. A new module gets a place here.
LAYERS = [
    {"started", "kernels", "pieces", "timing", "graphs", "random_state", "ranks", "calls", "copying"},
    {"lowest", "n_of_m", "pattern"},
    {"orders"},
    {"arrange", "grids"},
    {"masks"},
    {"scores"},
    {"ops", "info"},
    {"nn"},
    {"architecture", "execution", "storable", "weight_decay"},
    {"contents", "huggingface"},
    {"pretrained"},
    {"survey"},
    {"convert", "explain", "files", "links"},
    {"entries", "fold", "hub", "oriented"},
    {"moves", "pruning", "saliency", "ticket"},
    {"regroup", "runs"},
    {"dynamic", "export", "interop", "lottery", "runtime"},
    {"bench_model", "callbacks"},
    {"__init__"},
    {"lab"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
OPTIONAL = {
    "PIL",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "peft",
    "pooch",
    "pytest",
    "ray",
    "rich",
    "sklearn",
    "transformers",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxscript",
}  # of the extras


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


MODULES = [path for path in sources("sparselottery") if "kernels" not in path.parts] + sources("kernels")


def owner(path: Path) -> str:
    """The name in LAYERS of a source file: "masks" for sparselottery/masks.py, "nn" for sparselottery/nn/conv.py."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else parts[1].removesuffix(".py")


def own_imports(source: str, package: tuple[str, ...]) -> set[str]:
    """The names in LAYERS that `source` imports, in a module of `package` (() is sparselottery, ("lab",) its lab)."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("sparselottery", *package)[: len(package) + 2 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            dotted = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found.update(name[1:] or ("__init__",) for name in dotted if name[0] == "sparselottery")
    return {name[0] if name[0] in LAYER else "__init__" for name in found}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import torch", (), set()),
        ("import sparselottery.nn", (), {"nn"}),
        ("import sparselottery", (), {"__init__"}),
        ("from sparselottery import convert, prune", (), {"convert", "__init__"}),
        ("from sparselottery.lab import data", (), {"lab"}),
        ("from . import ops", (), {"ops"}),
        ("from . import __version__", (), {"__init__"}),
        ("from .kernels import cpu", (), {"kernels"}),
        ("from . import data", ("lab",), {"lab"}),
        ("from ..convert import convert", ("lab",), {"convert"}),
        ("from .. import masks", ("lab",), {"masks"}),
        ("from .base import MaskedLayer", ("nn",), {"nn"}),
        ("def late():\n    from .lab.data import load", (), {"lab"}),
    ],
)
def test_own_imports(source, package, expected):
    assert own_imports(source, package) == expected


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    name = owner(path)
    package = path.relative_to(ROOT if name == "kernels" else ROOT / "sparselottery").parts[:-1]
    imported = own_imports(path.read_text(), package) - ({name} if package else set())
    upwards = {other for other in imported if LAYER[other] >= LAYER[name]}
    assert not upwards, f"{name} may not import {sorted(upwards)}"


def test_every_module_is_checked():
    assert {owner(path) for path in MODULES} == set(LAYER)


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_alone(path):
    outside = r"\." * (len(path.relative_to(ROOT / "kernels").parts) + 1)
    assert not re.search(rf"^\s*(from|import)\s+(sparselottery|{outside})", path.read_text(), re.MULTILINE)


def test_import_needs_no_extra():
    code = f"import sys, sparselottery; print(sorted({OPTIONAL} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_only_the_cli_prints():
    printing = {
        "audit" if path.parent.name == "audit" else owner(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"audit", "cli"}


def tracked() -> list[Path]:
    """The files of the repository: in a commit, or not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_files_are_short():
    code = [path for path in tracked() if path.suffix in {".py", ".cpp", ".h"}]
    assert ROOT / "setup.py" in code
    long = {str(path.relative_to(ROOT)): count for path in code if (count := len(_lines(path))) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}"


def test_no_paths_of_this_machine():
    here = {re.escape(f"{folder}/") for folder in (ROOT.parent, Path.home()) if folder != Path(folder.root)}
    paths = re.compile("|".join([r"/(?:home|Users)/\w", *sorted(here)]))
    assert paths.search(f"{ROOT}/setup.py") or ROOT.parent == Path(ROOT.root)
    leaks = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(_lines(path), start=1)
        if paths.search(line)
    }
    assert not leaks


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()
