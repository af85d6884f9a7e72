"""What the masked layers share: values and their pattern, the dense layer's arguments, a choice of execution."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version

from .. import ops
from ..kernels.reference import Geometry
from ..pattern import Pattern, matrix_shape
from .carried import carry, give_back, own_buffers, register_buffers
from .dense import scatter
from .executed import ExecutedLayer
from .own_forward import with_forward_of

_ALIVE: WeakValueDictionary[int, MaskedLayer] = WeakValueDictionary()  # by id


def layers_alive() -> list[MaskedLayer]:
    """All masked layers of the process."""
    return [layer for ref in _ALIVE.valuerefs() if (layer := ref()) is not None]  # others may come meanwhile


class Survivors(NamedTuple):
    """A mask with the dense weight that the survivors are copied from: to a constructor, in place of a mask alone."""

    mask: Tensor
    weight: Tensor


class MaskedLayer(ExecutedLayer):
    """A layer over a mask, in which only the surviving entries of its weight (O, ...) exist.

    `values` (nnz,) is the parameter, in CSR order of the weight as a matrix (O, I), I all its other dimensions;
    `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers. Gradients and optimiser state are nnz-sized too.

    A subclass sets the attributes named in `arguments`, which are those of the dense layer, then calls `_build`.
    """

    dense_type: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]  # of both constructors, next to bias, device and dtype
    chooses_bias: ClassVar[bool] = True  # do the constructors have an argument for it?
    geometry: Geometry | None = None  # of a convolution
    groups: int = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> MaskedLayer:
        layer = super().__new__(cls)  # copies and what is unpickled pass here, too
        _ALIVE[id(layer)] = layer
        return layer

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, ...) of the weight as the layer multiplies it: of the dense weight, but of a `transposed` layer."""
        raise NotImplementedError

    @property
    def biases(self) -> int:
        """Of the outputs."""
        return self.shape[0]

    @classmethod
    def why_not(cls, dense: nn.Module) -> str | None:
        """Why a layer of the dense type with its arguments cannot be masked; None if it can."""
        return None

    def _build(self, mask: Tensor | Survivors | None, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Registers and initialises everything that is held in tensors; of `Survivors`, all but the bias."""
        mask, weight = mask if isinstance(mask, Survivors) else (mask, None)
        if isinstance(bias, Tensor):
            raise TypeError("bias: expected a bool, got a tensor; a mask is given by keyword")
        device = torch.get_default_device() if device is None else torch.device(device)
        if mask is None:
            mask = torch.ones(self.dense_shape, dtype=torch.bool, device="cpu" if device.type == "meta" else device)
        if tuple(mask.shape) != self.dense_shape:
            raise ValueError(f"mask: expected shape {self.dense_shape}, got {tuple(mask.shape)}")
        mask = self.as_matrix(mask if device.type == "meta" else mask.to(device))
        if weight is None or device.type == "meta":
            pattern = Pattern.from_mask(mask)
            values = torch.empty(pattern.nnz, device=device, dtype=dtype)
        else:
            pattern, values = Pattern.of_survivors(mask, self.as_matrix(weight.to(device)))
            values = values.to(dtype)
        self.register_buffer("crow_indices", pattern.crow_indices.to(device))
        self.register_buffer("col_indices", pattern.col_indices.to(device))
        self._build_execution()
        self.values = nn.Parameter(values)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.biases, device=device, dtype=dtype))
        if weight is None:
            self.reset_parameters()
        self._prepare()

    def reset_parameters(self) -> None:
        """Initialise as the dense layer does (by the inputs of an output, not by the survivors)."""
        _, fan_in = matrix_shape(self.shape)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0
        for parameter in (self.values, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_dense(cls, dense: nn.Module, mask: Tensor, weight: Tensor | None = None) -> MaskedLayer:
        """The survivors of a layer of `dense_type`: copies of its weights at `mask`, and of its bias.

        It has the attributes too that the dense layer was given beside those of its type.

        mask: bool, of the weight's shape. Raises TypeError or ValueError if it is not.
        weight: another of that shape, in place of the layer's own; dtype, device and requires_grad stay the layer's.
        """
        given, weight = weight, dense.weight
        arguments = cls._arguments_of(dense) | {"device": weight.device, "dtype": weight.dtype}
        kind = with_forward_of(type(dense), cls.dense_type, cls)
        layer = kind(**arguments, mask=Survivors(mask, weight if given is None else given))
        layer.values.requires_grad_(weight.requires_grad)
        carry(dense, layer, cls._dense_like(dense))
        return _with_bias_and_mode(layer, dense)

    def to_dense(self) -> nn.Module:
        """The dense layer with zeros where nothing survived; parameters are copies.

        It is of the subclass, and has the attributes, of the dense layer that this one was made `from_dense`.
        """
        values = self.values
        dense = give_back(self, self._dense_like(self)).to(values.dtype).to_empty(device=values.device)
        register_buffers(dense, own_buffers(self))
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        dense.weight.requires_grad_(values.requires_grad)
        return _with_bias_and_mode(dense, self)

    @property
    def mask(self) -> Tensor:
        """Bool, of the weight's shape, True where a weight survives."""
        return self.from_matrix(self.pattern.mask())

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict[str, Any]:
        """Those of a layer, masked or dense, for either constructor."""
        arguments = {name: getattr(layer, name) for name in cls.arguments}
        return arguments | ({"bias": layer.bias is not None} if cls.chooses_bias else {})

    @classmethod
    def _dense_like(cls, layer: nn.Module) -> nn.Module:
        """A new dense layer of the arguments of a layer, on the meta device."""
        with torch.device("meta"):
            return cls.dense_type(**cls._arguments_of(layer))

    def by_mask(self, values: Tensor) -> Tensor:
        """What there is an element a value of (nnz,), in the order of `mask`."""
        return values[self.pattern.transposed()[1]] if self.transposed else values

    def share(self, other: MaskedLayer) -> None:
        """Take the parameter and the indices of another layer with the same mask: from now on they train as one."""
        self.values = other.values
        self.take(other.pattern)
        self._follow_values()

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        return self.pattern.density

    def _in_torch(self, x: Tensor | fx.Proxy, *args: Any, **kwargs: Any) -> Tensor | fx.Proxy:
        """forward where `ops.in_torch`: for torch.fx one module, for all others the dense layer, made of the values."""
        if isinstance(x, fx.Proxy):
            return ops.as_one_module(self, x, *args, **kwargs)
        with ops.unrecorded():
            positions = self.pattern.positions()
        return self.multiply(scatter(self.values, positions, self.shape), self.bias, x, *args, **kwargs)

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The dense layer's forward with this weight of `shape` and this bias."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            "torch.jit.script: expected a model without masked layers, got one with them: script to_dense(model), "
            "or use torch.jit.trace or torch.export"
        )

    def train(self, mode: bool = True) -> MaskedLayer:
        if self._dense is not None:
            self._dense.doubt()  # what trained or loaded the values may not have shown
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        """Module.to and the like; on another type of device other kernels run, by another plan."""
        before = self.crow_indices.device.type
        with torch.inference_mode(False):  # whose tensors have no versions
            super()._apply(fn, recurse)
        if self.crow_indices.is_meta:
            self._forget()
        elif not self._is_known():
            if before != self.crow_indices.device.type:
                self._forget()
            with suppress(ValueError):  # of buffers that nobody has written yet: the next call raises it
                self.check()
        self._follow_values()
        return self

    def _indices_changed(self) -> None:
        pattern, device = self._valid_pattern(matrix_shape(self.shape), self.nnz), self.values.device
        changed = not self._same_as_known()
        self.crow_indices, self.col_indices = (
            indices.to(device).contiguous() for indices in (pattern.crow_indices, pattern.col_indices)
        )
        self._settle(changed)

    def take(self, pattern: Pattern) -> None:
        """Follow another pattern on the same device, valid and of as many survivors as `values` now has.

        The execution stays the one that was set or measured, where it is possible.
        """
        if self._positions is not None:
            increment_version(self._positions)  # no backward may gather gradients there any more
        self._buffers.update(zip(("crow_indices", "col_indices"), pattern.indices, strict=True))
        dense = self._dense
        self._prepare_anew(changed=False)
        if dense is not None and self._dense is not None:
            self._dense.take_over(dense)

    def _settle(self, changed: bool) -> None:
        made = self._known[2:]
        if changed or not all(self._buffers[name] is each and each._version == version for name, each, version in made):
            self._prepare_anew(changed)
        else:
            self._remember(*(name for name, *_ in self._known))

    def extra_repr(self) -> str:
        arguments = "".join(f"{name}={getattr(self, name)!r}, " for name in self.arguments)
        bias = f"bias={self.bias is not None}, " if self.chooses_bias else ""
        return f"{arguments}{bias}density={self.density:.4g}, nnz={self.nnz}, execution={self.execution}"


def _with_bias_and_mode(layer: nn.Module, source: nn.Module) -> nn.Module:
    """``layer`` with a copy of the bias of ``source``, trained or frozen as there, in its mode."""
    if (bias := getattr(source, "bias", None)) is not None:
        with torch.no_grad():
            layer.bias.copy_(bias)
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(source.training)
