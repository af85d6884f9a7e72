"""What a dense layer has beyond what its type's constructor gives it: brought along by the layer in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .own_forward import without_own_forward

# Buffers of a masked layer that are made of its indices, each by some executions.
MADE = ("plan", "_positions", "_rows", "_columns", "_crow_indices", "_col_indices")
OF_TORCH = frozenset(vars(nn.Module()))  # attributes


def carry(dense: nn.Module, layer: nn.Module, like: nn.Module) -> None:
    """Give the layer in its place the attributes of a dense one that `like`, a new one of its arguments, does not have.

    Constants of a subclass are among them, its methods are not. Buffers that no state_dict holds are copied.
    Raises ValueError for a name that the layer needs.
    """
    made, own, found, kind = vars(like), frozenset(vars(layer)), {}, without_own_forward(type(layer))
    for name, value in (_constants(type(dense), type(like)) | vars(dense)).items():
        if name in OF_TORCH or (name in made and same(value, made[name])):
            continue
        if hasattr(kind, name) or (name in own and name not in made):
            if name in made:
                continue  # of the dense type, which has another use for the name
            raise ValueError(_taken(name, dense))
        found[name] = value
    buffers = own_buffers(dense)
    for name in [name for name in buffers if hasattr(layer, name)]:
        raise ValueError(_taken(name, dense))
    _give(layer, found, type(dense), buffers)


def _taken(name: str, dense: nn.Module) -> str:
    return (
        f"{name}: expected an attribute that masked layers do not have themselves, got a {type(dense).__name__} with "
        "it: give it another name"
    )


def own_buffers(layer: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a layer, dense or masked, that no state_dict holds and no masked layer makes."""
    names = layer._non_persistent_buffers_set
    return {name: each for name, each in layer._buffers.items() if name in names and name not in MADE}


def carried(layer: nn.Module) -> dict[str, Any]:
    """What `carry` gave the layer, and what it got later."""
    own = vars(layer).get("_own", vars(layer))
    return {name: value for name, value in vars(layer).items() if name not in own and name not in _MARKS}


def give_back(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """The dense layer of the class that the layer stands for, with the attributes that it carries."""
    dense.__class__ = vars(layer).get("_dense_class", type(dense))
    for name, value in carried(layer).items():
        if not same(value, getattr(dense, name, None)):
            object.__setattr__(dense, name, value)
    return dense


def pass_on(layer: nn.Module, other: nn.Module) -> None:
    """Let another layer of the same dense one carry the same."""
    if "_own" in vars(layer):
        _give(other, carried(layer), layer._dense_class, own_buffers(layer))


def _give(
    layer: nn.Module, attributes: dict[str, Any], dense_class: type[nn.Module], buffers: dict[str, Tensor | None]
) -> None:
    own = frozenset(vars(layer)) - attributes.keys()
    vars(layer).update(attributes, _own=own, _dense_class=dense_class)
    register_buffers(layer, buffers)


def register_buffers(layer: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    for name, each in buffers.items():
        layer.register_buffer(name, each if each is None else each.clone(), persistent=False)


def same(one: Any, other: Any) -> bool:
    """Are two arguments equal, of whatever kind?"""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    try:
        return bool(one == other)
    except Exception:  # arrays and the like: nobody says
        return False


_MARKS = frozenset(("_own", "_dense_class", "_digest"))


def _constants(kind: type[nn.Module], base: type[nn.Module]) -> dict[str, Any]:
    """What a subclass has on its class beside functions and properties."""
    classes = [each for each in reversed(kind.__mro__) if issubclass(each, base) and each is not base]
    found = {name: value for each in classes for name, value in vars(each).items() if not name.startswith("__")}
    return {name: value for name, value in found.items() if not (callable(value) or hasattr(value, "__get__"))}
