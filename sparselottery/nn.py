"""Layers that store and multiply only the surviving weights."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .pattern import Pattern


class MaskedLinear(nn.Module):
    """nn.Linear over a fixed mask: y = x Wᵀ + b, where only the surviving weights of W exist.

    `values` (nnz,) is the parameter, in CSR order; `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers.
    Gradients and optimiser state are nnz-sized too. `weight` is a dense copy for reading.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        mask: bool (out_features, in_features), True where a weight survives; None keeps all of them.
    Raises TypeError or ValueError if the mask is not boolean or not of that shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Tensor | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if mask is None:
            mask = torch.ones(out_features, in_features, dtype=torch.bool, device=device)
        if mask.shape != (out_features, in_features):
            raise ValueError(f"mask: expected shape {(out_features, in_features)}, got {tuple(mask.shape)}")
        pattern = Pattern.from_mask(mask.to(device))
        self.register_buffer("crow_indices", pattern.crow_indices)
        self.register_buffer("col_indices", pattern.col_indices)
        self.register_buffer("plan", ops.compile_plan(pattern), persistent=False)
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.Linear does (by in_features, not by the survivors)."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
        for parameter in (self.values, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor) -> MaskedLinear:
        """The survivors of an nn.Linear: copies of its weights at `mask`, and of its bias."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, mask, linear.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            layer.values.copy_(layer.pattern.gather(weight))
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.values.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with zeros where nothing survived; parameters are copies."""
        linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None,
            device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight: (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.crow_indices, self.col_indices, self.shape)

    @property
    def weight(self) -> Tensor:
        """Dense (O, I) copy, zeros where pruned; differentiable in `values`."""
        return self.pattern.scatter(self.values)

    @property
    def mask(self) -> Tensor:
        """Bool (O, I), True where a weight survives."""
        return self.pattern.mask()

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        return self.pattern.density

    @property
    def execution(self) -> str:
        """How forward runs: "sparse", or "dense" where nothing is pruned and `values` is the dense weight as it stands.

        Sparse kernels are no slower than nn.Linear at any lower density, for batches (benchmarks/results/linear.csv); a
        single sample through a nearly dense layer is (batch1.csv).
        """
        return "dense" if self.nnz == self.out_features * self.in_features else "sparse"

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        if self.execution == "dense":
            return F.linear(x, self.values.view(self.shape), self.bias)
        return run_chain(x, [self])

    def _apply(self, fn, recurse=True):
        """Module.to and the like; a layer that arrives on the CPU gets the plan that it had no use for elsewhere."""
        super()._apply(fn, recurse)
        if self.plan.numel() == 0:
            self.plan = ops.compile_plan(self.pattern)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads values with their indices (which may differ from ours), or a dense `weight`, read at our mask."""
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self.shape:
                errors.append(f"size mismatch for {prefix}weight: expected {self.shape}, got {tuple(dense.shape)}")
                return
            state_dict[prefix + "values"] = self.pattern.gather(dense)
            state_dict |= {prefix + "crow_indices": self.crow_indices, prefix + "col_indices": self.col_indices}
        elif names := [name for name in ("values", "crow_indices", "col_indices") if prefix + name in state_dict]:
            if len(names) < 3:
                errors.append(f"{prefix}: expected values, crow_indices and col_indices together, got {names}")
                return
            try:
                if state_dict[prefix + "values"].shape != state_dict[prefix + "col_indices"].shape:
                    raise ValueError("values: expected as many as col_indices")
                self._adopt(Pattern(*(state_dict[prefix + k] for k in ("crow_indices", "col_indices")), self.shape))
            except ValueError as error:
                errors.append(f"{prefix}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _adopt(self, pattern: Pattern) -> None:
        """Take over another pattern of the same shape; values are resized, their content is the caller's to set."""
        device = self.values.device
        pattern = Pattern(pattern.crow_indices.to(device), pattern.col_indices.to(device), pattern.shape).validate()
        self.crow_indices, self.col_indices = pattern.crow_indices.clone(), pattern.col_indices.clone()
        self.plan = ops.compile_plan(pattern)
        if self.nnz != pattern.nnz:
            self.values.data, self.values.grad = self.values.new_empty(pattern.nnz), None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={self.density:.4g}, nnz={self.nnz}, execution={self.execution}"
        )


def run_chain(x: Tensor, layers: list[MaskedLinear], batch_minor: bool = False) -> Tensor:
    """layers[-1](... relu(layers[0](x))) in one native call: (*, I) -> (*, O).

    The result is batch-minor, strides (1, ld), if asked for or if x is; else contiguous.
    """
    first, last = layers[0], layers[-1]
    if x.shape[-1:] != (first.in_features,):
        raise ValueError(f"x: expected shape (*, {first.in_features}), got {tuple(x.shape)}")
    for before, after in pairwise(layers):
        if before.out_features != after.in_features:
            raise ValueError(f"layers: expected {before.out_features} in_features, got {after.in_features}")
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    y = ops.chain(
        rows,
        [layer.values for layer in layers],
        [layer.bias for layer in layers],
        [layer.crow_indices for layer in layers],
        [layer.col_indices for layer in layers],
        [layer.plan for layer in layers],
        batch_minor,
    )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], last.out_features)


# Between two masked layers these keep the strides of their input, so it may stay batch-minor.
_KEEPS_STRIDES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Dropout, nn.Identity,
)  # fmt: skip


class MaskedSequential(nn.Sequential):
    """nn.Sequential in which each run MaskedLinear, ReLU, MaskedLinear, ... is one native call, forward and backward.

    Where only elementwise modules stand before the next masked layer, activations stay batch-minor. The children keep
    their names, so the state_dict is that of an nn.Sequential. Children with hooks are called as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        children, start = list(self._modules.values()), 0
        while start < len(children):
            stop = _run_end(children, start)
            if stop > start:
                x = run_chain(x, children[start:stop:2], _stays_batch_minor(children, stop))
            else:
                x = children[start](x)
                stop = start + 1
            start = stop
        return x


def _run_end(children: list[nn.Module], start: int) -> int:
    """One past the end of the longest run MaskedLinear (ReLU MaskedLinear)* at `start`; `start` if there is none."""
    if not _sparse(children[start]) or nn.modules.module._has_any_global_hook():
        return start
    stop = start + 1
    while stop + 1 < len(children) and _plain(children[stop], nn.ReLU) and _sparse(children[stop + 1]):
        stop += 2
    return stop


def _stays_batch_minor(children: list[nn.Module], start: int) -> bool:
    """Is a masked layer the next reader of children[start - 1]'s output, with only elementwise modules before it?"""
    if torch.compiler.is_exporting():  # the strides would pin down the batch size
        return False
    for child in children[start:]:
        if _sparse(child):
            return True
        if type(child) not in _KEEPS_STRIDES:
            return False
    return False


def _sparse(module: nn.Module) -> bool:
    return _plain(module, MaskedLinear) and module.execution == "sparse"


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
