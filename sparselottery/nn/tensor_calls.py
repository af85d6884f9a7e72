"""What a `Weight` does with some functions of torch, all others of which it leaves to a dense tensor."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

# Answered by the object itself, which has a shape but no memory.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes")),
    *(
        getattr(Tensor, name).__get__
        for name in dir(Tensor)
        if name.startswith("is_") and name != "is_leaf" and type(getattr(Tensor, name)) is type(Tensor.is_leaf)
    ),
    *(getattr(Tensor, name) for name in (
        "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_contiguous", "storage_offset",
        "is_floating_point", "is_complex", "is_signed", "get_device", "__len__", "__hash__",
    )),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}  # fmt: skip


def _refused(what: str, instead: str) -> Callable:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{what}: not of a masked layer's weight, which is made anew at each use; {instead}")

    return call


REFUSED = {
    getattr(Tensor, name): _refused(name, instead)
    for names, instead in (
        (("register_hook", "register_post_accumulate_grad_hook", "retain_grad"), "ask layer.values, the parameter"),
        (("share_memory_", "data_ptr", "storage", "untyped_storage"), "ask layer.values, which has memory"),
        (("set_", "resize_", "resize_as_"), "its shape is the layer's"),
    )
    for name in names
}


def is_called_by(module: str, depth: int) -> bool:
    """Is the function so many frames above the caller's one of this module of torch.nn?"""
    return sys._getframe(depth + 1).f_globals.get("__name__") == f"torch.nn.{module}"


def holder_of(parameter: nn.Parameter) -> nn.Module | None:
    """A module whose parameter it is: looked for among all objects, which takes some 20 ms."""
    for module in (each for each in gc.get_objects() if issubclass(type(each), nn.Module)):
        if any(own is parameter for own in vars(module).get("_parameters", {}).values()):
            return module
    return None


def of_copy(func: Callable) -> Callable:
    """For pickle and deepcopy, which take leaves only: an ordinary tensor."""

    def call(weight: Tensor, *args: Any) -> Any:
        return func(weight.detach().clone().requires_grad_(weight.requires_grad), *args)

    return call


def read_only(func: Callable, plain: Callable[[Tensor], Tensor]) -> Callable:
    """For NumPy arrays, whose writes nobody sees."""

    def call(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        array = func(plain(weight), *args, **kwargs)
        array.flags.writeable = False
        return array

    return call
