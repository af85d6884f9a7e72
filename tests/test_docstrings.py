"""Each public name that docs/api.md shows has an example in its docstring, which gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import sparselottery
from sparselottery.nn import registry

API = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text()
SHOWN = re.compile(r"^::: (\S+)((?:\n +.*)*)", flags=re.MULTILINE)
MEMBER = re.compile(r"- (\w+)")


def resolved(path: str) -> object:
    module, _, name = path.rpartition(".")
    if hasattr(importlib.import_module(module), name):  # a function before the module of its name
        return getattr(importlib.import_module(module), name)
    return importlib.import_module(path)


def defined_in(module: ModuleType) -> list[str]:
    own = [name for name, each in vars(module).items() if getattr(each, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_") and callable(vars(module)[name])]


def public() -> dict[str, object]:
    """All names of the package, and those that the page shows, each object once."""
    found = {name: getattr(sparselottery, name) for name in sparselottery.__all__}
    for path, options in SHOWN.findall(API):
        shown = resolved(path)
        if isinstance(shown, ModuleType):
            found |= {name: getattr(shown, name) for name in MEMBER.findall(options) or defined_in(shown)}
        else:
            found[path.rpartition(".")[2]] = shown
    return found


PUBLIC = public()


def test_the_page_names_what_the_package_offers():
    assert {"convert", "MaskedEmbedding", "MaskUpdater", "rigl", "erk", "taylor"} <= PUBLIC.keys()
    missing = [name for name in sparselottery.__all__ if f".{name}\n" not in API]
    assert missing == []


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_give_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    torch.manual_seed(0)
    names = {each: getattr(sparselottery, each) for each in sparselottery.__all__} | {"torch": torch, "nn": nn}
    module = vars(inspect.getmodule(PUBLIC[name]))
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), module | names, name, None, None)
    assert test.examples, f"{name}: its docstring has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert said == [], "".join(said)
