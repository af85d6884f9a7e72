"""Types of the public names: all are given, and mypy --strict agrees with a user's program."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparselottery
from sparselottery import dynamic

PROGRAM = Path(__file__).resolve().parent / "typed_use.py"
NAMES = [(module, name) for module in (sparselottery, dynamic) for name in module.__all__]


def functions(value: object):
    """A function itself; of a class its public methods that are written here."""
    if inspect.isclass(value):
        for name, member in vars(value).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(member) and (not name.startswith("_") or name in ("__init__", "__call__")):
                yield member
    elif inspect.isfunction(value):
        yield value


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda each: getattr(each, "__name__", each))
def test_public_names_are_typed(module, name):
    for function in functions(getattr(module, name)):
        signature = inspect.signature(function)
        untyped = [each.name for each in signature.parameters.values() if each.annotation is each.empty]
        assert [each for each in untyped if each not in ("self", "cls")] == [], function.__qualname__
        assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install '.[test]'")
def test_a_program_is_checked(tmp_path):
    program = tmp_path / PROGRAM.name
    program.write_text(PROGRAM.read_text())  # beside nothing of ours: it finds the package as a user's would
    check = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", program.name]
    path = {**os.environ, "MYPYPATH": str(PROGRAM.parents[1])}
    done = subprocess.run(check, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
