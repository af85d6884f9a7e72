"""Copies of models in which layers and tensors are others, wherever the model refers to them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
_OF_TORCH = frozenset(vars(nn.Module()))  # attributes


def copied(
    model: nn.Module, layers: Mapping[nn.Module, nn.Module], tensors: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """A deep copy of the model with other layers, which get the hooks of the old ones; shared ones stay shared.

    What new layers have taken of the old ones, attribute by attribute, is copied too.

    tensors: others, by the id of the old one. Attributes, containers, partials and bound methods follow.
    Raises ValueError for a function that holds an old layer or tensor in a closure or a default, and for a weak
    reference to one: no copy could follow those.
    """
    memo: dict[int, Any] = {id(old): new for old, new in layers.items()} | (tensors or {})

    def is_old(module: nn.Module) -> bool:
        return any(each in layers or not memo.keys().isdisjoint(_ids(each)) for each in module.modules())

    for module in model.modules():
        for name, value in attributes(module):
            if isinstance(value, MethodType) and value.__self__ in layers:
                memo[id(value)] = getattr(layers[value.__self__], value.__name__)
            for held in _out_of_reach(value):
                if is_old(held) if isinstance(held, nn.Module) else id(held) in memo:
                    raise ValueError(
                        f"{type(module).__name__}.{name}: expected an attribute that copies of the model can follow, "
                        f"got a {type(value).__name__} that holds a {type(held).__name__} of it: keep that as an "
                        "attribute, or use a bound method"
                    )
    result = copy.deepcopy(model, memo)
    for old, new in layers.items():
        for hooks in HOOKS:
            setattr(new, hooks, copy.deepcopy(getattr(old, hooks), memo))
        for name in vars(new).keys() & vars(old).keys() - _OF_TORCH:
            if vars(new)[name] is vars(old)[name]:  # carried along
                vars(new)[name] = copy.deepcopy(vars(old)[name], memo)
    return result


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module's own attributes hold, also in containers, with the attribute's name; its children are not."""
    if getattr(type(module), "__getstate__", None) is _GETSTATE:  # else it copies itself
        for name, value in vars(module).items():
            if name not in _OF_TORCH:
                yield from ((name, each) for each in _within(value, set()))


def _within(value: Any, seen: set[int]) -> Iterator[Any]:
    """The value, and what it holds if it is a container."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, partial):
        parts = value.func, *value.args, *value.keywords.values()
    for part in parts:
        yield from _within(part, seen)


def _out_of_reach(value: Any) -> Iterator[Any]:
    """The modules and tensors that deepcopy does not find behind a function or a weak reference."""
    if isinstance(value, weakref.ref):
        held = [value()]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        held = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    else:
        return
    for each in _within(held, set()):
        owner = each.__self__ if isinstance(each, MethodType) else each
        if isinstance(owner, (nn.Module, Tensor)):
            yield owner


def _ids(module: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


_GETSTATE = getattr(nn.Module, "__getstate__", None)
_EMPTY = CellType()  # as of a name that is not bound yet
