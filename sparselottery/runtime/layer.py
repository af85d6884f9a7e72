"""A frozen masked layer: survivors in CSR, packed for a kernel when one first asks for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..kernels import cpu, cpu_net, cpu_stages, native
from ..kernels.reference import Geometry, Norm
from ..nn import MaskedConv2d, MaskedLayer, MaskedLinear, geometry_of, has_own_forward, masked_type_of, with_forward_of
from ..nn.carried import carry, pass_on
from ..nn.dense import scatter
from ..nn.weight import WeightedLayer
from ..pattern import Pattern, matrix_shape
from ..random_state import random_state_kept
from .alike import together

FEW_WEIGHTS = 2**20  # of a linear layer: up to here each thread streams all of them, for its own samples
FEW_IMAGES = 16  # below: image by image; from here on the batch has lanes enough for kernels that share each weight


class Cache:
    """What is made of layers once for a key, by whichever thread comes first, and read by all until the layers change.

    It is dropped when `LIMIT` others came later: so the memory of a net does not grow with the sizes of its inputs, and
    sizes that come again and again stay.
    """

    LIMIT = 16

    def __init__(self, layers: Iterable[FrozenLayer]) -> None:
        self._layers, self._lock, self._made = list(layers), threading.Lock(), OrderedDict()
        self.facts: tuple[native.Fact, ...] | None = None  # of the layers' tensors that all of it is made of

    def is_current(self) -> bool:
        return self.facts is not None and native.unchanged(self.facts)

    def _refresh(self) -> None:
        """Forgets what was made of other tensors. Raises ValueError if those of now are not valid."""
        with self._lock:
            if not self.is_current():
                for layer in self._layers:
                    layer.check()
                self._made = OrderedDict()
                self.facts = native.versions(tensor for layer in self._layers for tensor in layer.watched())

    def __call__(self, key: object, make: Callable[[], Any]) -> Any:
        if not self.is_current():
            self._refresh()
        try:
            self._made.move_to_end(key)
            return self._made[key]
        except KeyError:  # never made, or dropped between the two
            return self._make(key, make)

    def _make(self, key: object, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._made:
                return self._made[key]
            made = self._made[key] = make()
            if len(self._made) > self.LIMIT:
                self._made.popitem(last=False)
            return made

    def __reduce__(self) -> tuple:
        return Cache, (self._layers,)  # a copy makes its own


class FrozenLayer(WeightedLayer):
    """What a dense layer computes, of the survivors of its weight alone.

    It has the dense layer's attributes, `weight` among them. `values`, `crow_indices`, `col_indices` and `bias` are
    buffers, and not to be changed but by `load_state_dict`.
    """

    frozen = True

    def __new__(cls, dense: nn.Module | None = None, *_: Any) -> FrozenLayer:
        """Of a class with the forward of the dense layer's, if that has its own; no dense one: a copy."""
        kind = cls if dense is None else with_forward_of(type(dense), masked_type_of(dense)[0].dense_type, cls)
        return super().__new__(kind)

    def __init__(self, dense: nn.Module, pattern: Pattern, values: Tensor, bias: Tensor | None) -> None:
        """dense: for its arguments alone; it may be on the meta device. pattern: of its weight as a matrix."""
        super().__init__()
        self._kind = masked_type_of(dense)[0]
        self.transposed, shape = self._kind.transposed, tuple(dense.weight.shape)
        if self.transposed:
            pattern, order = pattern.transposed()
            values, shape = values[order], shape[::-1]
        self.shape, self.density = shape, pattern.density
        arguments = self._kind._arguments_of(dense)
        like = self._kind(**arguments, device="meta", mask=_no_mask(self.dense_shape))
        self._like = (like,)  # no child of this module
        for name in (*self._kind.arguments, "in_features", "out_features"):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))
        self.geometry: Geometry | None = geometry_of(dense) if self._kind is MaskedConv2d else None
        for name, tensor in (("values", values), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.register_buffer("crow_indices", pattern.crow_indices)
        self.register_buffer("col_indices", pattern.col_indices)
        self._made = Cache([self])
        self._settle(changed=True)
        for layer in (like, self):
            carry(dense, layer, self._kind._dense_like(dense))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As that of the dense layer; where somebody traces or transforms, by torch's own operators."""
        if is_traced(input) and not _is_counted(input):
            return self._in_torch(input, *args, **kwargs)
        if not self.is_native or not runs_native(input) or input.dim() == 0:
            return self._made("masked", self._masked)(input, *args, **kwargs)
        if self.geometry is None:
            packed = chain_of([self], self._made, input.shape)
            return packed(input.reshape(-1, self.in_features).contiguous()).view(*input.shape[:-1], -1)
        return self._made("masked", self._masked)(input) if input.dim() != 4 else self.convolve(input)

    def _in_torch(self, x: Tensor | fx.Proxy, *args: Any, **kwargs: Any) -> Tensor | fx.Proxy:
        """With a dense weight that is made anew: what a tracer sees is not for later calls. For torch.fx one module."""
        if isinstance(x, fx.Proxy):
            return ops.as_one_module(self, x, *args, **kwargs)
        with ops.unrecorded():
            positions = self.pattern.positions()
        weight = scatter(self.values, positions, self.shape)
        return self._like[0].multiply(weight, self.bias, x, *args, **kwargs)

    @property
    def is_measurable(self) -> bool:
        """By calls on random numbers?"""
        return self._kind.measurable and not has_own_forward(self)

    @property
    def is_native(self) -> bool:
        """Do our kernels for frozen nets take it: linear or a 2-D convolution padded by zeros, fp32 on the CPU?"""
        linear = issubclass(self._kind, MaskedLinear)
        taken = linear or (self._kind is MaskedConv2d and self.padding_mode == "zeros")
        return taken and native.available() and self.values.is_cpu and self.values.dtype == torch.float32

    def stage(self, relu: bool = False, pool: int = 1, norm: nn.BatchNorm2d | None = None) -> cpu_stages.Stage:
        """The layer and what follows it."""
        indices = *self._validated(), self.values
        if self.geometry is None:
            return cpu_stages.Linear(self.in_features, *indices, self.bias, relu)
        scale, shift = None, self.bias
        if norm is not None:
            scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
            shift = shift if self.bias is None else shift + self.bias * scale
        return cpu_stages.Conv(self.geometry, *indices, scale, shift, relu, pool)

    def convolve(self, x: Tensor, relu: bool = False, pool: int = 1, norm: nn.BatchNorm2d | None = None) -> Tensor:
        """max_pool?(relu?(norm?(layer(x)))), each weight read once for many images."""
        cpu_stages.check_images(self.geometry, pool, *x.shape)
        indices = self.crow_indices, self.col_indices
        plan = self._made("plan", lambda: cpu.conv_plan(*self._validated(), self.geometry, backward=False))
        statistics = norm and Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        args = x, self.values, self.bias, *indices, plan, self.geometry, relu, pool, statistics
        with torch.no_grad():
            return cpu.conv_forward(*args)[0]

    def to_dense(self) -> nn.Module:
        """The dense layer, its weight with zeros where nothing survived."""
        return self._masked().to_dense().requires_grad_(False)

    def _masked(self) -> MaskedLayer:
        with random_state_kept():
            arguments = self._kind._arguments_of(self) | {"device": self.values.device, "dtype": self.values.dtype}
            masked = self._kind(**arguments, mask=_no_mask(self.dense_shape))
        pass_on(self, masked)
        masked.load_state_dict(self.state_dict())
        return masked.requires_grad_(False).eval()

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        with torch.inference_mode(False):  # whose tensors have no versions
            super()._apply(fn, recurse)
        for name, tensor in before.items():
            _replaced(tensor, self._buffers[name])
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_buffers", {}).get(name)
        super().__setattr__(name, value)
        _replaced(before, value)

    def _indices_changed(self) -> None:
        self.density = self._valid_pattern(matrix_shape(self.shape), self.values.numel()).density
        self._settle(changed=True)

    def _settle(self, changed: bool) -> None:
        self._remember("crow_indices", "col_indices")

    def _validated(self) -> tuple[Tensor, Tensor]:
        """The indices for what packs them: checked again, as writes through `data` show no version."""
        pattern = self._valid_pattern(matrix_shape(self.shape), self.values.numel())
        return pattern.crow_indices, pattern.col_indices

    def watched(self) -> list[Tensor]:
        """What kernels read or have packed."""
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.is_inference():  # has no version
                with torch.inference_mode(False):
                    self._buffers[name] = tensor.clone()
        return [tensor for tensor in self._buffers.values() if tensor is not None]

    def extra_repr(self) -> str:
        arguments = self._kind._arguments_of(self)
        return "".join(f"{name}={value!r}, " for name, value in arguments.items()) + f"density={self.density:.4g}"


def _replaced(tensor: Tensor | None, by: Any) -> None:
    """Shows whoever has packed a tensor that the layer has another in its place."""
    if tensor is not None and tensor is not by and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def chain_of(layers: list[FrozenLayer], made: Cache, shape: torch.Size) -> cpu_net.Net | cpu_net.Rows | cpu_net.Chain:
    """The packed chain for x of a shape (*, features): sparse dot products for one sample, for more of them lanes.

    Threads that share out samples stay in their own caches, as do torch's own operations before and after; those that
    share out weights move each activation between cores, which takes many weights to pay.
    """
    threads, last, features = torch.get_num_threads(), len(layers) - 1, layers[0].in_features
    if shape[-1] != features:
        raise ValueError(f"x: expected shape (*, {features}), got {tuple(shape)}")

    def pack() -> cpu_net.Net | cpu_net.Rows | cpu_net.Chain:
        stages = [layer.stage(relu=i < last) for i, layer in enumerate(layers)]
        if kind is cpu_net.Net:
            return cpu_net.Net(stages, (features,), threads)
        return kind(together(stages), threads)

    few = max(len(layer.values) for layer in layers) <= FEW_WEIGHTS
    kind = cpu_net.Net if shape.numel() == features else cpu_net.Rows if few else cpu_net.Chain
    return made((kind, threads), pack)


def is_traced(x: Tensor | fx.Proxy) -> bool:
    """Does somebody compile, trace or transform this call? What is made in it is then not for later ones."""
    return torch.compiler.is_compiling() or ops.in_torch(x) or torch._C._len_torch_dispatch_stack() > 0


def _is_counted(x: Tensor | fx.Proxy) -> bool:
    """Is the counting of FLOPs all that is done to this call? What counters know are the ops of masked layers."""
    return not (torch.compiler.is_compiling() or ops.in_torch(x)) and ops.are_counted()


def runs_native(x: Tensor) -> bool:
    """Is x an ordinary fp32 tensor on the CPU that nothing traces?"""
    if torch.compiler.is_compiling() or native.LIBRARY is None or not native.LIBRARY.is_ordinary(x, native.ORDINARY):
        return False
    return x.is_cpu and x.dtype is torch.float32 and x.numel() > 0


def _no_mask(shape: tuple[int, ...]) -> Tensor:
    """A mask of a weight in which nothing survives, in a byte of memory."""
    return torch.zeros(1, dtype=torch.bool, device="cpu").expand(shape)
