"""What the masked layers share: values and their pattern, the dense layer's arguments, checkpoints of both kinds."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..pattern import Pattern, matrix_shape

EXECUTIONS = ("sparse", "dense")


class Measured(NamedTuple):
    """Median milliseconds of a layer's two executions, by `choose_execution`, with backward if `training`.

    input_shape is the layer's; the times are those of the whole native call that the layer is part of when sparse.
    """

    sparse_ms: float
    dense_ms: float
    input_shape: tuple[int, ...]
    training: bool


class MaskedLayer(nn.Module):
    """A layer over a fixed mask, in which only the surviving entries of its weight (O, ...) exist.

    `values` (nnz,) is the parameter, in CSR order of the weight as a matrix (O, I), I all its other dimensions;
    `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers. Gradients and optimiser state are nnz-sized too.

    `measured` is what its present `execution` was chosen by, or None: not part of the state_dict, gone when another
    pattern is loaded or an execution set.

    A subclass sets the attributes named in `arguments`, which are those of the dense layer, then calls `_build`.
    """

    dense_type: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]  # of both constructors, next to bias, device and dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        raise NotImplementedError

    def _compile(self, pattern: Pattern) -> Tensor:
        """The native kernels' plan for a pattern of this layer."""
        raise NotImplementedError

    def _build(self, mask: Tensor | None, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Registers and initialises everything that is held in tensors."""
        if mask is None:
            mask = torch.ones(self.shape, dtype=torch.bool, device=device)
        if tuple(mask.shape) != self.shape:
            raise ValueError(f"mask: expected shape {self.shape}, got {tuple(mask.shape)}")
        pattern = Pattern.from_mask(mask.to(device).flatten(1))
        self.register_buffer("crow_indices", pattern.crow_indices)
        self.register_buffer("col_indices", pattern.col_indices)
        self.register_buffer("plan", self._compile(pattern), persistent=False)
        self.register_buffer("_positions", None, persistent=False)
        self._execution: str | None = None  # not chosen
        self.measured: Measured | None = None
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.shape[0], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the dense layer does (by the inputs of an output, not by the survivors)."""
        _, fan_in = matrix_shape(self.shape)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0
        for parameter in (self.values, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_dense(cls, dense: nn.Module, mask: Tensor) -> MaskedLayer:
        """The survivors of an nn.Linear or nn.Conv2d: copies of its weights at `mask`, and of its bias.

        mask: bool, of the weight's shape. Raises TypeError or ValueError if it is not.
        """
        weight, has_bias = dense.weight, dense.bias is not None
        arguments = {name: getattr(dense, name) for name in cls.arguments}
        layer = cls(**arguments, mask=mask, bias=has_bias, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(layer.pattern.gather(weight.flatten(1)))
            if has_bias:
                layer.bias.copy_(dense.bias)
        layer.values.requires_grad_(weight.requires_grad)
        if has_bias:
            layer.bias.requires_grad_(dense.bias.requires_grad)
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """The nn.Linear or nn.Conv2d with zeros where nothing survived; parameters are copies."""
        values, has_bias = self.values, self.bias is not None
        arguments = {name: getattr(self, name) for name in self.arguments}
        arguments |= {"bias": has_bias, "device": values.device, "dtype": values.dtype}
        dense = nn.utils.skip_init(self.dense_type, **arguments)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if has_bias:
                dense.bias.copy_(self.bias)
        dense.weight.requires_grad_(values.requires_grad)
        if has_bias:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.crow_indices, self.col_indices, matrix_shape(self.shape))

    @property
    def weight(self) -> Tensor:
        """Dense copy, zeros where pruned; differentiable in `values`."""
        return self.pattern.scatter(self.values).view(self.shape)

    @property
    def mask(self) -> Tensor:
        """Bool, of the weight's shape, True where a weight survives."""
        return self.pattern.mask().view(self.shape)

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        return self.pattern.density

    @property
    def execution(self) -> str:
        """How forward runs: "sparse", or "dense" if set so: `values` are scattered into a dense weight, for PyTorch.

        A layer with nothing pruned is "dense" whatever was set, its `values` being the dense weight as it stands.
        It is not in the state_dict, and a `convert` that masks the layer anew forgets it. Raises ValueError if set to
        anything else.
        """
        return "dense" if self._whole else self._execution or EXECUTIONS[0]

    @execution.setter
    def execution(self, execution: str) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution: expected one of {EXECUTIONS}, got {execution!r}")
        self._execution, self.measured = execution, None
        self._locate()

    @property
    def why(self) -> str:
        """Why the `execution` is what it is."""
        if self._whole:
            return "nothing is pruned"
        if self.measured is None:
            return "set by hand" if self._execution else "not measured"
        sparse_ms, dense_ms, shape, training = self.measured
        mode = "training" if training else "inference"
        return f"measured: sparse {sparse_ms:.3g} ms, dense {dense_ms:.3g} ms for {shape}, {mode}"

    @property
    def _whole(self) -> bool:
        return self.nnz == math.prod(self.shape)

    def _locate(self) -> None:
        """Finds the values' positions, for a dense execution."""
        self._positions = self.pattern.positions() if self._execution == "dense" else None

    def _dense_weight(self) -> Tensor:
        """`weight` for a dense execution: a view of `values` if nothing is pruned."""
        if self._whole:
            return self.values.view(self.shape)
        return self.values.new_zeros(math.prod(self.shape)).scatter(0, self._positions, self.values).view(self.shape)

    def _apply(self, fn, recurse=True):
        """Module.to and the like; a layer that arrives on the CPU gets the plan that it had no use for elsewhere."""
        super()._apply(fn, recurse)
        if self.plan.numel() == 0:
            self.plan = self._compile(self.pattern)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads values with their indices (which may differ from ours), or a dense `weight`, read at our mask."""
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self.shape:
                errors.append(f"size mismatch for {prefix}weight: expected {self.shape}, got {tuple(dense.shape)}")
                return
            state_dict[prefix + "values"] = self.pattern.gather(dense.flatten(1))
            state_dict |= {prefix + "crow_indices": self.crow_indices, prefix + "col_indices": self.col_indices}
        elif names := [name for name in ("values", "crow_indices", "col_indices") if prefix + name in state_dict]:
            if len(names) < 3:
                errors.append(f"{prefix}: expected values, crow_indices and col_indices together, got {names}")
                return
            try:
                if state_dict[prefix + "values"].shape != state_dict[prefix + "col_indices"].shape:
                    raise ValueError("values: expected as many as col_indices")
                indices = (state_dict[prefix + name] for name in ("crow_indices", "col_indices"))
                self._adopt(Pattern(*indices, self.pattern.shape))
            except ValueError as error:
                errors.append(f"{prefix}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _adopt(self, pattern: Pattern) -> None:
        """Take over another pattern of the same shape; values are resized, their content is the caller's to set."""
        device = self.values.device
        pattern = Pattern(pattern.crow_indices.to(device), pattern.col_indices.to(device), pattern.shape).validate()
        before = self.crow_indices, self.col_indices
        self.crow_indices, self.col_indices = pattern.crow_indices.clone(), pattern.col_indices.clone()
        if self.measured and not all(map(torch.equal, before, (self.crow_indices, self.col_indices))):
            self._execution = self.measured = None
        self.plan = self._compile(pattern)
        if self.nnz != pattern.nnz:
            self.values.data, self.values.grad = self.values.new_empty(pattern.nnz), None
        self._locate()

    def extra_repr(self) -> str:
        arguments = "".join(f"{name}={getattr(self, name)!r}, " for name in self.arguments)
        return (
            f"{arguments}bias={self.bias is not None}, density={self.density:.4g}, nnz={self.nnz}, "
            f"execution={self.execution}"
        )
