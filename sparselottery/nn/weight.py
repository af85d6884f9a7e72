"""`layer.weight`: a stand-in for the dense weight, which is made where it is used and written back at the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..pattern import Pattern, matrix_shape
from .dense import traced


class Weight(Tensor):
    """The dense weight of a layer that holds only its `values`, or a view of it; made by `WeightedLayer.weight`.

    It knows shape, strides, dtype, device and requires_grad. Every function of torch that takes one gets a dense tensor
    in its place, made for this call of the values that the layer then has, and differentiable in them. What the call
    writes in place is written to the values at the mask, and dropped elsewhere. Results that share the dense tensor's
    memory are such objects again, all others are plain tensors.
    """

    _layer: WeightedLayer
    _held: Tensor | None  # what stands at the mask; None: the layer's values
    _view: bool  # a result that shares memory, or a gradient
    _detached: bool

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SPECIAL and isinstance(args[0], Weight):
            return _SPECIAL[func](*args, **kwargs)
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Called for functions that know nothing of __torch_function__, those of C++ extensions."""
        return _on_dense(func, args, kwargs or {})

    def _values(self) -> Tensor:
        if self._held is not None:
            return self._held
        return self._layer.values.detach() if self._detached else self._layer.values


class WeightedLayer(nn.Module):
    """The half of a layer of `shape` with `values` at `crow_indices` and `col_indices` that is like one with a weight.

    `frozen` layers refuse to be written.
    """

    frozen: ClassVar[bool] = False

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.crow_indices, self.col_indices, matrix_shape(self.shape))

    @property
    def weight(self) -> Tensor:
        """The dense weight, zeros where pruned: a `Weight`, or where somebody traces or transforms, a plain tensor.

        Reading its shape, dtype or device makes nothing. Used, it is made anew, differentiable in `values`. Written in
        place or assigned to, it is written to `values` at the mask, which optimisers then see. Gradients, hooks and
        optimisers are of `values`, as it is the parameter.
        Assigning raises TypeError or ValueError if what is given is not a tensor of its shape, dtype and device.
        """
        values = self.values
        if traced() or type(values) not in (Tensor, nn.Parameter) or values.is_meta:
            return self.pattern.scatter(values).view(self.shape)
        return _made(self, self.shape, _contiguous_strides(self.shape), 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a Parameter beside the values
            _assign(self, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise AttributeError("weight: expected to stay, as it is what `values` are at the mask; cannot be deleted")
        super().__delattr__(name)


def plain(tensor: Tensor) -> Tensor:
    """The dense tensor that a `Weight` stands for, made once; any other as it is."""
    return _Use(tensor).dense if isinstance(tensor, Weight) else tensor


class _Use:
    """A dense tensor for one call: a view of `base`, the whole weight flattened, new and nobody's view."""

    def __init__(self, weight: Weight) -> None:
        self.weight, values, shape = weight, weight._values(), weight._layer.shape
        if torch.is_inference_mode_enabled():  # writes are seen by versions, which tensors made in it do not have
            with torch.inference_mode(False), torch.no_grad():
                self._make(values, shape)
        else:
            self._make(values, shape)
        self.storage = self.base.untyped_storage()._cdata
        self.history, self.version = self.base.grad_fn, self.base._version

    def _make(self, values: Tensor, shape: tuple[int, ...]) -> None:
        weight = self.weight
        self.positions = weight._layer.pattern.positions()
        if len(values) != len(self.positions):
            raise RuntimeError("weight: expected to be used before another mask was loaded; read layer.weight anew")
        self.base = values.new_zeros(math.prod(shape)).scatter(0, self.positions, values)
        with torch._C.DisableTorchFunctionSubclass():
            size, stride, offset = weight.size(), weight.stride(), weight.storage_offset()
        whole = tuple(size) == tuple(shape) and stride == _contiguous_strides(shape)
        self.dense = self.base.view(shape) if whole else self.base.as_strided(size, stride, offset)

    def write_back(self) -> None:
        if self.base._version == self.version:
            return
        weight = self.weight
        if self.base.grad_fn is not self.history:  # written in grad mode: torch says so of leaves
            what = "a view of a leaf" if weight._view else "a leaf"
            raise RuntimeError(f"{what} Variable that requires grad is being used in an in-place operation.")
        _refuse_frozen(weight._layer)
        with torch.no_grad():
            weight._values().copy_(self.base.detach().index_select(0, self.positions))

    def shares(self, result: Tensor) -> bool:
        return (
            type(result) is Tensor
            and result.layout is torch.strided
            and result.dtype == self.base.dtype
            and result.device == self.base.device
            and result.untyped_storage()._cdata == self.storage
        )

    def view(self, result: Tensor) -> Tensor:
        """For a result that shares memory with `base`."""
        if result is self.dense:
            return self.weight
        weight = self.weight
        geometry = result.size(), result.stride(), result.storage_offset()
        return _made(weight._layer, *geometry, held=weight._held, view=True, detached=not result.requires_grad)


def _on_dense(func: Callable, args: tuple, kwargs: dict) -> Any:
    """func with dense tensors in place of weights, their writes and the views it returns."""
    uses: dict[int, _Use] = {}

    def dense(weight: Weight) -> Tensor:
        if id(weight) not in uses:
            uses[id(weight)] = _Use(weight)
        return uses[id(weight)].dense

    def returned(result: Tensor) -> Tensor:
        use = next((use for use in uses.values() if use.shares(result)), None)
        return result if use is None else use.view(result)

    result = func(*tree_map_only(Weight, dense, args), **tree_map_only(Weight, dense, kwargs))
    for use in uses.values():
        use.write_back()
    return result if traced() else tree_map_only(Tensor, returned, result)


def _made(
    layer: WeightedLayer,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    held: Tensor | None = None,
    view: bool = False,
    detached: bool = False,
) -> Weight:
    """A `Weight` of that geometry; in grad mode it has the values as its history, for functions of C++."""

    def make(values: Tensor) -> Weight:
        options = {"dtype": values.dtype, "device": values.device}
        weight = Tensor._make_wrapper_subclass(Weight, size, stride, offset, **options)
        weight._layer, weight._held, weight._view, weight._detached = layer, held, view, detached
        weight._is_param = not view  # an nn.Parameter to isinstance, as a dense layer's weight is
        return weight

    values = layer.values if held is None else held
    attached = held is None and not detached and values.requires_grad and torch.is_grad_enabled()
    return _Attach.apply(values, make) if attached else make(values)


class _Attach(torch.autograd.Function):
    """values -> a `Weight`; its gradient is that of the values."""

    @staticmethod
    def forward(ctx, values, make):
        ctx.weight = make
        return make(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gweight):
        with torch.enable_grad():
            weight = ctx.weight(gweight)
            values = weight._layer.values.detach().requires_grad_()
            weight._held = values
            dense = _Use(weight).dense
        return torch.autograd.grad(dense, values, gweight)[0], None


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


def _refuse_frozen(layer: WeightedLayer) -> None:
    if layer.frozen:
        raise RuntimeError(
            "weight: expected to be read only, as the layer is frozen and kernels have packed its values"
        )


def _assign(layer: WeightedLayer, value: Any) -> None:
    """layer.weight = value: the values at the mask."""
    if isinstance(value, Weight) and value._layer is layer and not value._view:
        return  # layer.weight *= 2 writes in place, then assigns
    _refuse_frozen(layer)
    if not isinstance(value, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(value).__name__}")
    if isinstance(value, Weight) and value._layer is not layer:
        raise TypeError("weight: expected a tensor, got the weight of another layer: assign its clone()")
    if value.requires_grad and not isinstance(value, (nn.Parameter, Weight)):
        raise TypeError("weight: expected a Parameter or a tensor without gradient: see torch.func.functional_call")
    values = layer.values
    if value.dtype != values.dtype:
        raise TypeError(f"weight: expected dtype {values.dtype}, got {value.dtype}")
    if tuple(value.shape) != tuple(layer.shape) or value.device != values.device:
        expected, got = (f"{tuple(t)} on {d}" for t, d in ((layer.shape, values.device), (value.shape, value.device)))
        raise ValueError(f"weight: expected shape {expected}, got {got}")
    with torch.no_grad():
        values.copy_(layer.pattern.gather(value.detach().flatten(1)))
    if isinstance(value, nn.Parameter):
        values.requires_grad_(value.requires_grad)


def _set_requires_grad(weight: Weight, requires_grad: bool = True) -> Weight:
    if weight._view:
        raise RuntimeError(
            "requires_grad: expected a tensor of its own, got a view of a masked layer's weight: clone()"
        )
    if requires_grad:
        _refuse_frozen(weight._layer)
    weight._layer.values.requires_grad_(requires_grad)
    return weight


def _get_grad(weight: Weight) -> Tensor | None:
    """A view of the gradient of the values, zeros where pruned."""
    grad = None if weight._view else weight._layer.values.grad
    if grad is None:
        return None
    shape = weight._layer.shape
    return _made(weight._layer, shape, _contiguous_strides(shape), 0, held=grad, view=True, detached=True)


def _set_grad(weight: Weight, grad: Tensor | None) -> None:
    layer = weight._layer
    layer.values.grad = None if grad is None else layer.pattern.gather(plain(grad).detach().flatten(1))


def _of_copy(func: Callable) -> Callable:
    """For pickle and deepcopy, which take leaves only: an ordinary tensor."""

    def call(weight: Weight, *args: Any) -> Any:
        return func(plain(weight).detach().clone().requires_grad_(_requires_grad(weight)), *args)

    return call


def _read_only(func: Callable) -> Callable:
    """For NumPy arrays, whose writes nobody sees."""

    def call(weight: Weight, *args: Any, **kwargs: Any) -> Any:
        array = func(plain(weight), *args, **kwargs)
        array.flags.writeable = False
        return array

    return call


def _refused(what: str, instead: str) -> Callable:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{what}: not of a masked layer's weight, which is made anew at each use; {instead}")

    return call


def _requires_grad(weight: Weight) -> bool:
    return weight._values().requires_grad


_SPECIAL: dict[Callable, Callable] = {
    Tensor.requires_grad.__get__: lambda weight, *_: _requires_grad(weight),
    Tensor.requires_grad.__set__: _set_requires_grad,
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.is_leaf.__get__: lambda weight, *_: not _requires_grad(weight),
    Tensor.grad.__get__: lambda weight, *_: _get_grad(weight),
    Tensor.grad.__set__: _set_grad,
    Tensor.data.__set__: lambda weight, value: _assign(weight._layer, value),
    Tensor.__deepcopy__: _of_copy(Tensor.__deepcopy__),
    Tensor.__reduce_ex__: _of_copy(Tensor.__reduce_ex__),
    Tensor.numpy: _read_only(Tensor.numpy),
    Tensor.__array__: _read_only(Tensor.__array__),
    **{
        getattr(Tensor, name): _refused(name, f"call layer.values.{name}")
        for name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "share_memory_", "data_ptr")
    },
    **{
        getattr(Tensor, name): _refused(name, "its shape is the layer's")
        for name in ("set_", "resize_", "resize_as_")
    },
}  # fmt: skip

_METADATA = {
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
