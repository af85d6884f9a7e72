"""Layers of a subclass whose forward calls its base's and does something more, as that of a scaled embedding.

A class made on the spot takes their place: one of the masked type, with the subclass's functions, in which `super()` is
the masked type. Where they read `self.weight`, they get what stands for the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dis import get_instructions
from functools import cache, cached_property, reduce, wraps
from itertools import pairwise
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import fx, nn

# What a subclass may have of its own, and no masked layer needs.
HARMLESS = {
    "__annotations__", "__constants__", "__dict__", "__doc__", "__firstlineno__", "__init__", "__module__",
    "__parameters__", "__repr__", "__static_attributes__", "__weakref__", "extra_repr", "reset_parameters",
}  # fmt: skip
TAKEN = {"values", "crow_indices", "col_indices", "plan"}  # by each masked layer, beside what its class has
ASKING = {"isinstance", "issubclass", "type", "vars", "__class__", "_parameters", "_buffers"}  # what a module is
WRITING = {"data", "weight", "bias"}  # attributes
# Forwards that compute what their base's does, in other words.
SAME = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


def why_not_derived(kind: type[nn.Module], dense_type: type[nn.Module], masked: type[nn.Module]) -> str | None:
    """Why no masked layer computes what those of a subclass of its dense type do; None if one does."""
    classes = _between(kind, dense_type)
    own = {name for each in classes for name in vars(each)} - HARMLESS
    forwards = [vars(each)["forward"] for each in classes if _has_forward(each)]
    if altered := sorted(name for name in own - {"forward"} if hasattr(dense_type, name)):
        return f"its forward may do something else, as {altered[0]} is its own"
    if not forwards:
        return None
    if not all(any(map(_calls_base, _codes(each))) for each in forwards):
        return "its forward may do something else, as it calls no super().forward"
    if any(each.__bases__ != (base,) for each, base in pairwise([*classes, dense_type])):
        return "its forward may do something else, as it has several bases"
    taken = sorted(name for name in own - {"forward"} if hasattr(masked, name) or name in TAKEN)
    if taken:
        return f"{taken[0]} is its own, a name that masked layers need"
    if "__slots__" in own:
        return "it has slots"
    kept = [each for kind in classes for each in vars(kind).values() if isinstance(each, cached_property)]
    if any({"weight", "bias"} & {*each.func.__code__.co_names} for each in kept):
        return "it keeps what it has computed of the weight"
    for code in (code for each in classes for name, held in vars(each).items() for code in _held_codes(name, held)):
        if asked := sorted({*ASKING, *(each.__name__ for each in classes)} & {*code.co_names}):
            return f"its code asks for its class, or for the parameters, by {asked[0]}"
        if written := sorted(WRITING & {each.argval for each in get_instructions(code) if each.opname == "STORE_ATTR"}):
            return f"its code writes to {written[0]}"
    return None


def with_forward_of(kind: type[nn.Module], dense_type: type[nn.Module], masked: type[nn.Module]) -> type[nn.Module]:
    """The masked type for such a subclass: as it is, where their forward is that of the dense type."""
    masked, classes = without_own_forward(masked), _between(kind, dense_type)
    return _made(masked, classes[::-1]) if any(map(_has_forward, classes)) else masked


def has_own_forward(layer: nn.Module) -> bool:
    """Is it of a class that was made here?"""
    return hasattr(type(layer), "forward_of")


def without_own_forward(kind: type[nn.Module]) -> type[nn.Module]:
    """The masked type that such a class was made of; others as they are."""
    return next(each for each in kind.__mro__ if "forward_of" not in vars(each))


@cache
def _derived(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    own = {name: each for name, each in vars(kind).items() if name not in HARMLESS}
    if not _has_forward(kind):
        own.pop("forward", None)
    origin = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduced}
    made = type(base)(f"Masked{kind.__name__}", (base,), {**origin, "forward_of": kind, "measurable": False})
    for name, each in own.items():
        held = _rebound_in(each, kind, made)
        setattr(made, name, _as_one_module(held) if name == "forward" else held)
    return made


def _made(base: type[nn.Module], kinds: list[type[nn.Module]]) -> type[nn.Module]:
    """Of a masked type and subclasses of its dense type, each the base of the next."""
    return reduce(lambda masked, kind: _derived(kind, masked), kinds, base)


def _blank(base: type[nn.Module], kinds: list[type[nn.Module]]) -> nn.Module:
    made = _made(base, kinds)
    return made.__new__(made)


def _reduced(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For copies and pickles: the class is made again, as no module has it under a name."""
    kinds = [vars(each)["forward_of"] for each in type(self).__mro__ if "forward_of" in vars(each)]
    return _blank, (without_own_forward(type(self)), kinds[::-1]), self.__getstate__()


def _as_one_module(forward: Callable) -> Callable:
    @wraps(forward)
    def as_one(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if isinstance(each, fx.Proxy):
                path = each.tracer.path_of_module(self)
                return each.tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    return as_one


def _between(kind: type, base: type) -> list[type]:
    """The classes from a subclass to its base, without that."""
    return list(kind.__mro__[: kind.__mro__.index(base)])


def _has_forward(kind: type) -> bool:
    return "forward" in vars(kind) and f"{kind.__module__}.{kind.__qualname__}" not in SAME


def _codes(function: Any, depth: int = 3) -> Iterator[CodeType]:
    """Of a function, and of those that it decorates."""
    if isinstance(function, FunctionType) and depth:
        yield function.__code__
        for cell in function.__closure__ or ():
            yield from _codes(cell.cell_contents, depth - 1)


def _held_codes(name: str, held: Any) -> Iterator[CodeType]:
    """Of what a class has under a name, and is called with its layers."""
    if name in HARMLESS:
        return
    for each in (held.fget, held.fset, held.fdel) if isinstance(held, property) else (getattr(held, "__func__", held),):
        for code in _codes(each):
            yield code
            yield from (inner for inner in code.co_consts if isinstance(inner, CodeType))


def _rebound_in(held: Any, kind: type, made: type) -> Any:
    """What a class has, as another one has it: functions, also those of properties and class methods, as `_rebound`."""
    if isinstance(held, FunctionType):
        return _rebound(held, kind, made)
    if isinstance(held, property):
        parts = (each and _rebound_in(each, kind, made) for each in (held.fget, held.fset, held.fdel))
        return property(*parts, held.__doc__)
    if isinstance(held, (classmethod, staticmethod)):
        return type(held)(_rebound_in(held.__func__, kind, made))
    return held


def _calls_base(code: CodeType) -> bool:
    return "__class__" in code.co_freevars and {"super", "forward"} <= set(code.co_names)


def _rebound(function: FunctionType, kind: type, made: type, depth: int = 3) -> FunctionType:
    """The same function, and those that it decorates, for another class: `__class__`, of which super() is made."""
    cells = []
    for cell in function.__closure__ or ():
        held = inner = cell.cell_contents
        if isinstance(held, FunctionType) and depth > 1:
            inner = _rebound(held, kind, made, depth - 1)
        cells.append(CellType(made if held is kind else inner) if held is kind or inner is not held else cell)
    if all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True)):
        return function
    code, name = function.__code__, function.__name__
    twin = FunctionType(code, function.__globals__, name, function.__defaults__, tuple(cells))
    twin.__kwdefaults__ = function.__kwdefaults__
    vars(twin).update(vars(function))
    return twin
