"""Functions of the user that options name: found, checked and called, their errors shown as theirs."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..calls import ExampleInput, arguments


def is_own(model: str | None) -> bool:
    """Is it a function that makes a net, and not the name of one of the paper's?"""
    return model is not None and ":" in model


def load(option: str, text: str) -> Any:
    """What ``MODULE:NAME`` names, imported from the current folder or from where Python looks.

    Raises ValueError if there is none; an error of the module itself is shown with its traceback.
    """
    module, _, name = text.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not all(map(str.isidentifier, parts)) or module.endswith(".py"):
        raise ValueError(f"{option}: expected MODULE:NAME, as in mynet:make for make of mynet.py, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            where = f"neither in {os.getcwd()} nor installed"
            raise ValueError(f"{option}: found no module {error.name!r}, {where}") from None
        raise ValueError(f"{option}: {module} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise _theirs(f"{option}: importing {module}", error) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [
                each for each, value in vars(found).items() if not each.startswith("_") and not inspect.ismodule(value)
            ]
            raise ValueError(f"{option}: expected one of {', '.join(public)} in {module}, got {name!r}")
        found = getattr(found, part)
    return found


def load_net(name: str) -> nn.Module:
    """A new net by the function of this name."""
    make = load("--model", name)
    if not callable(make) or isinstance(make, nn.Module):
        raise ValueError(f"--model: expected a function that returns a new net, got {type(make).__name__} {name}")
    check_call(f"--model: expected {name} to take no arguments", make)
    with blamed(name):
        model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {name} to return an nn.Module, got {type(model).__name__}")
    return model


def load_example(text: str) -> ExampleInput:
    """The example input of this name: itself, or what a function of no arguments returns."""
    example = load("--example", text)
    if callable(example):
        check_call(f"--example: expected {text} to take no arguments", example)
        with blamed(text):
            example = example()
    try:
        arguments(example)
    except TypeError as error:
        raise ValueError(f"--example: {text}: {error}") from None
    return example


def check_example(model: nn.Module, example: ExampleInput, name: str) -> None:
    """Raise ValueError if a net cannot be called with the example of this name: a copy of it is, once."""
    given, net = arguments(example), type(model).__name__
    check_call(f"--example: expected {name} to be what {net} takes", model.forward, *given.args, **given.kwargs)
    with blamed(f"{net} on {name}"), torch.no_grad():
        given.map(torch.clone)(copy.deepcopy(model).eval())


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """An error in the user's own code is shown with its traceback, and ends the command as errors do."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what it prints
        raise
    except Exception as error:
        raise _theirs(name, error) from error


def _theirs(what: str, error: Exception) -> ValueError:
    traceback.print_exception(error)
    return ValueError(f"{what} raised {type(error).__name__}: {error}")


def check_call(expected: str, function: Callable, *args: Any, **kwargs: Any) -> None:
    """Raise ValueError, beginning with ``expected``, if the function cannot be called so."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{expected}: {error}") from None
    except ValueError:  # a built-in one has no signature
        return
