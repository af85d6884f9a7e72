"""`layer.weight`: a stand-in for the dense weight, which is made where it is used and written back at the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..ops import unrecorded
from ..pattern import Pattern, matrix_shape
from .dense import scatter, traced
from .indices import IndexedLayer
from .tensor_calls import METADATA, REFUSED, holder_of, is_called_by, of_copy, read_only


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
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SPECIAL and isinstance(args[0], Weight):
            return _SPECIAL[func](*args, **kwargs)
        if func is torch.autograd.grad and any(isinstance(each, Weight) for each in args[1]):
            raise RuntimeError("torch.autograd.grad: expected layer.values, got what is made of them, its weight")
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Called for functions that know nothing of __torch_function__, those of C++ extensions."""
        return _on_dense(func, args, kwargs or {}, func._schema.is_mutable)  # no version moves here

    def _values(self) -> Tensor:
        return self._layer.values if self._held is None else self._held


class WeightedLayer(IndexedLayer):
    """The half of a layer of `shape` with `values` at `crow_indices` and `col_indices` that is like one with a weight.

    `frozen` layers refuse to be written. Of a `transposed` one the dense weight is (I, O), its matrix transposed.
    """

    frozen: ClassVar[bool] = False
    transposed: bool = False

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the dense weight and its mask."""
        return tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)

    def as_matrix(self, dense: Tensor) -> Tensor:
        """A dense weight, or its mask, as the matrix (O, I) that the pattern is of."""
        return dense.t() if self.transposed else dense.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.t() if self.transposed else matrix.view(self.shape)

    def _dense_strides(self) -> tuple[int, ...]:
        """Of the dense weight, where its matrix is contiguous."""
        return (1, self.shape[1]) if self.transposed else _contiguous_strides(self.shape)

    @property
    def pattern(self) -> Pattern:
        indices = self._buffers["crow_indices"], self._buffers["col_indices"]  # in a third of nn.Module's time
        return Pattern(*indices, matrix_shape(self.shape))

    @property
    def weight(self) -> Tensor:
        """The dense weight, zeros where pruned: a `Weight`, or where somebody traces or transforms, a plain tensor.

        Reading its shape, dtype or device makes nothing. Used, it is made anew, differentiable in `values`. Written in
        place or assigned to, it is written to `values` at the mask, which optimisers then see. Gradients, hooks and
        optimisers are of `values`, as it is the parameter.
        Assigning raises TypeError or ValueError if what is given is not a tensor of its shape, dtype and device.
        """
        values = self.values
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state():
            with unrecorded():
                positions = self.pattern.positions()
            return self.from_matrix(scatter(values, positions, matrix_shape(self.shape)))
        if traced() or type(values) not in (Tensor, nn.Parameter) or values.is_meta:
            return self.from_matrix(self.pattern.scatter(values))
        return _made(self, self.dense_shape, self._dense_strides(), 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would register a Parameter beside the values
            _assign(self, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise AttributeError("weight: expected to stay, as it is what `values` are at the mask; cannot be deleted")
        if name == "values" and is_called_by("utils.parametrize", 1):  # it fails after this, the parameter gone
            raise TypeError("torch.nn.utils.parametrize: expected a name other than 'values', which a ModuleDict has; "
                            "torch.nn.utils.prune and forward pre-hooks can change the values")  # fmt: skip
        super().__delattr__(name)


def is_of(layer: WeightedLayer, tensor: Tensor) -> bool:
    """Is it the layer's own weight, and not a view or a gradient of it?"""
    return isinstance(tensor, Weight) and tensor._layer is layer and not tensor._view


def plain(tensor: Tensor) -> Tensor:
    """The dense tensor that a `Weight` stands for, made once; any other as it is."""
    return _Base(tensor).dense(tensor) if isinstance(tensor, Weight) else tensor


class _Base:
    """The whole weight for one call, flattened: new, and no view, so that its version and history tell of writes."""

    def __init__(self, weight: Weight) -> None:
        self.layer, self.values = weight._layer, weight._values()
        self.layer.check()
        if torch.is_inference_mode_enabled():  # what is made in it has no version
            with torch.inference_mode(False), torch.no_grad():
                self._make()
        else:
            self._make()
        self.storage = self.flat.untyped_storage()._cdata
        self.history, self.version = self.flat.grad_fn, self.flat._version
        self.given: dict[int, tuple[Weight, Tensor]] = {}  # by id of the tensor

    def _make(self) -> None:
        self.positions = self.layer.pattern.positions()
        self.flat = self.values.new_zeros(math.prod(self.layer.shape)).scatter(0, self.positions, self.values)

    def dense(self, weight: Weight) -> Tensor:
        """What the weight stands for, in this memory."""
        with torch._C.DisableTorchFunctionSubclass():
            geometry = tuple(weight.size()), weight.stride(), weight.storage_offset()
        shape = tuple(self.layer.shape)
        flat = self.flat.detach() if weight._detached else self.flat
        whole = geometry == (shape, _contiguous_strides(shape), 0)
        dense = flat.view(shape) if whole else flat.as_strided(*geometry)
        self.given[id(dense)] = weight, dense
        return dense

    def write_back(self) -> None:
        if self.flat.grad_fn is not self.history:  # written in grad mode: torch says so of leaves
            view = any(weight._view for weight, _ in self.given.values())
            what = "a view of a leaf" if view else "a leaf"
            raise RuntimeError(f"{what} Variable that requires grad is being used in an in-place operation.")
        _refuse_frozen(self.layer)
        with torch.no_grad():
            self.values.copy_(self.flat.detach().index_select(0, self.positions))

    def shares(self, result: Tensor) -> bool:
        return (
            type(result) is Tensor
            and result.layout is torch.strided
            and (result.dtype, result.device) == (self.flat.dtype, self.flat.device)
            and result.untyped_storage()._cdata == self.storage
        )

    def weight(self, result: Tensor) -> Weight:
        """What stands for a result in this memory."""
        if id(result) in self.given:
            return self.given[id(result)][0]
        held = next(weight._held for weight, _ in self.given.values())
        geometry = result.size(), result.stride(), result.storage_offset()
        return _made(self.layer, *geometry, held=held, view=True, detached=not result.requires_grad)


def _on_dense(func: Callable, args: tuple, kwargs: dict, writes: bool = False) -> Any:
    """func with dense tensors in place of weights, their writes and the views it returns. writes: even if not seen."""
    bases: dict[tuple[int, int], _Base] = {}

    def dense(weight: Weight) -> Tensor:
        key = id(weight._layer), id(weight._held)
        if key not in bases:
            bases[key] = _Base(weight)
        return bases[key].dense(weight)

    def returned(result: Tensor) -> Tensor:
        base = next((base for base in bases.values() if base.shares(result)), None)
        return result if base is None else base.weight(result)

    result = func(*tree_map_only(Weight, dense, args), **tree_map_only(Weight, dense, kwargs))
    for base in bases.values():
        if writes or base.flat._version != base.version:
            base.write_back()
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
            dense = _Base(weight).dense(weight)
        return torch.autograd.grad(dense, values, gweight)[0], None


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


def _refuse_frozen(layer: WeightedLayer) -> None:
    if layer.frozen:
        raise RuntimeError("weight: expected to be read only, as its layer is frozen and kernels have packed it")


def _assign(layer: WeightedLayer, value: Any) -> None:
    """layer.weight = value: the values at the mask."""
    if is_of(layer, value):
        return  # layer.weight *= 2 writes in place, then assigns
    _refuse_frozen(layer)
    if not isinstance(value, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(value).__name__}")
    if isinstance(value, Weight) and value._layer is not layer:
        if is_of(value._layer, value) and value._layer.values is layer.values:
            return  # tied already
        raise TypeError("weight: expected a tensor, got the weight of another layer: assign its clone()")
    if is_called_by("utils._named_member_accessor", 2):  # takes no assignment of a `weight` back
        raise TypeError("torch.func.functional_call: expected values of a masked layer, got its weight")
    if value.requires_grad and not isinstance(value, (nn.Parameter, Weight)):
        raise TypeError("weight: expected a Parameter or a tensor without gradient: see torch.func.functional_call")
    values = layer.values
    if value.dtype != values.dtype:
        raise TypeError(f"weight: expected dtype {values.dtype}, got {value.dtype}")
    if tuple(value.shape) != layer.dense_shape or value.device != values.device:
        pairs = (layer.dense_shape, values.device), (value.shape, value.device)
        expected, got = (f"{tuple(shape)} on {device}" for shape, device in pairs)
        raise ValueError(f"weight: expected shape {expected}, got {got}")
    if isinstance(value, nn.Parameter) and not isinstance(value, Weight) and (holder := holder_of(value)) is not None:
        raise TypeError(f"weight: expected a tensor of its own, got the parameter of a {type(holder).__name__}, which "
                        "a masked layer cannot share: assign its detach(), or tie them, then convert")  # fmt: skip
    with torch.no_grad():
        values.copy_(layer.pattern.gather(layer.as_matrix(value.detach())))
    if isinstance(value, nn.Parameter):
        values.requires_grad_(value.requires_grad)


def _set_data(weight: Weight, value: Tensor) -> None:
    if not weight._view:
        _assign(weight._layer, value)
    elif value.shape != weight.shape:
        raise ValueError(f"data: expected shape {tuple(weight.shape)}, got {tuple(value.shape)}")
    else:
        weight.detach().copy_(value)


def _refuse_view(weight: Weight, what: str) -> None:
    if weight._view:
        raise RuntimeError(f"{what}: expected a tensor with memory, got a view of a masked layer's weight: clone() it")


def _set_requires_grad(weight: Weight, requires_grad: bool = True) -> Weight:
    _refuse_view(weight, "requires_grad")
    if requires_grad:
        _refuse_frozen(weight._layer)
    weight._layer.values.requires_grad_(requires_grad)
    return weight


def _get_grad(weight: Weight) -> Tensor | None:
    """A view of the gradient of the values, zeros where pruned."""
    grad = None if weight._view else weight._layer.values.grad
    if grad is None:
        return None
    layer = weight._layer
    return _made(layer, layer.dense_shape, layer._dense_strides(), 0, held=grad, view=True, detached=True)


def _set_grad(weight: Weight, grad: Tensor | None) -> None:
    layer = weight._layer
    _refuse_view(weight, "grad")
    layer.values.grad = None if grad is None else layer.pattern.gather(layer.as_matrix(plain(grad).detach()))


def _get_grad_fn(weight: Weight, *args: Any) -> Any:
    if is_called_by("modules.module", 2):  # register_parameter asks for it
        raise TypeError("weight: expected to stay with its masked layer, got to be a parameter of a module: assign its "
                        "detach().clone(), or tie the layers, then convert; prune by sparselottery.prune")  # fmt: skip
    return _on_dense(Tensor.grad_fn.__get__, (weight, *args), {})


def _requires_grad(weight: Weight) -> bool:
    return weight._values().requires_grad and not weight._detached


_SPECIAL: dict[Callable, Callable] = {
    **REFUSED,
    Tensor.requires_grad.__get__: lambda weight, *_: _requires_grad(weight),
    Tensor.requires_grad.__set__: _set_requires_grad,
    Tensor.requires_grad_: _set_requires_grad,
    Tensor.is_leaf.__get__: lambda weight, *_: not _requires_grad(weight),
    Tensor.grad.__get__: lambda weight, *_: _get_grad(weight),
    Tensor.grad_fn.__get__: _get_grad_fn,
    Tensor.grad.__set__: _set_grad,
    Tensor.data.__set__: _set_data,
    Tensor.__deepcopy__: of_copy(Tensor.__deepcopy__),
    Tensor.__reduce_ex__: of_copy(Tensor.__reduce_ex__),
    Tensor.numpy: read_only(Tensor.numpy, plain),
    Tensor.__array__: read_only(Tensor.__array__, plain),
}
