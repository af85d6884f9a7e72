"""What the masked layers share: values and their pattern, the dense layer's arguments, checkpoints of both kinds."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.reference import Geometry
from ..pattern import BLOCKS, Pattern, block_of, matrix_shape
from .compact import live_indices, live_shape

EXECUTIONS = ("sparse", "block", "compact", "dense")
NATIVE = ("sparse", "block")  # on our kernels; the others are PyTorch's dense operators


class Measured(NamedTuple):
    """Median milliseconds of each execution that a layer has, by `choose_execution`, with backward if `training`.

    input_shape is the layer's; the times are those of the whole native call that the layer can be part of.
    """

    ms: dict[str, float]
    input_shape: tuple[int, ...]
    training: bool


class MaskedLayer(nn.Module):
    """A layer over a fixed mask, in which only the surviving entries of its weight (O, ...) exist.

    `values` (nnz,) is the parameter, in CSR order of the weight as a matrix (O, I), I all its other dimensions;
    `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers. Gradients and optimiser state are nnz-sized too.

    `measured` is what its present `execution` was chosen by, or None: not part of the state_dict, gone when another
    pattern is loaded, an execution set or the layer moved to another type of device. `block` is (R, C) of the blocks
    that the present execution multiplies, (1, 1) if it is none of blocks.

    A subclass sets the attributes named in `arguments`, which are those of the dense layer, then calls `_build`.
    """

    dense_type: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]  # of both constructors, next to bias, device and dtype
    geometry: Geometry | None = None  # of a convolution
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        raise NotImplementedError

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        """The native kernels' plan for a pattern of this layer and blocks of it."""
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
        self.register_buffer("plan", self._no_plan(), persistent=False)
        for name in ("_positions", "_rows", "_columns"):
            self.register_buffer(name, None, persistent=False)
        self._execution: str | None = None  # not chosen
        self.measured: Measured | None = None
        self._mask_block: tuple[int, int] | None = None  # not looked for
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.shape[0], device=device, dtype=dtype))
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
    def from_dense(cls, dense: nn.Module, mask: Tensor) -> MaskedLayer:
        """The survivors of an nn.Linear or nn.Conv2d: copies of its weights at `mask`, and of its bias.

        mask: bool, of the weight's shape. Raises TypeError or ValueError if it is not.
        """
        weight = dense.weight
        arguments = {name: getattr(dense, name) for name in cls.arguments}
        arguments |= {"bias": dense.bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer = cls(**arguments, mask=mask)
        with torch.no_grad():
            layer.values.copy_(layer.pattern.gather(weight.flatten(1)))
        layer.values.requires_grad_(weight.requires_grad)
        return _with_bias_and_mode(layer, dense)

    def to_dense(self) -> nn.Module:
        """The nn.Linear or nn.Conv2d with zeros where nothing survived; parameters are copies."""
        values = self.values
        arguments = {name: getattr(self, name) for name in self.arguments}
        arguments |= {"bias": self.bias is not None, "device": values.device, "dtype": values.dtype}
        dense = nn.utils.skip_init(self.dense_type, **arguments)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        dense.weight.requires_grad_(values.requires_grad)
        return _with_bias_and_mode(dense, self)

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
        """How forward runs: one of `executions`.

        "sparse": by kernels for single weights. "block": by kernels for whole blocks of them, on tensor cores.
        "dense": by PyTorch, the values scattered into a dense weight. "compact": so, without its rows and columns in
        which nothing survived. A layer with nothing pruned is "dense", its values being the dense weight as it stands.
        Not set, or set to None, it is "block" where possible, else "sparse"; so it is where what was set is not
        possible, after a move or a load. It is not in the state_dict, and a `convert` that masks the layer anew forgets
        it. Raises ValueError if set to anything else, or to what is not possible here, and says why.
        """
        return self._present

    @execution.setter
    def execution(self, execution: str | None) -> None:
        if execution not in (*EXECUTIONS, None):
            raise ValueError(f"execution: expected one of {EXECUTIONS}, got {execution!r}")
        if execution and (why := self._why_not(execution)):
            raise ValueError(f"execution: expected one of {self.executions}, got {execution!r}: {why}")
        self._execution, self.measured = execution, None
        self._prepare()

    @property
    def executions(self) -> tuple[str, ...]:
        """Those that are possible for this layer on its device."""
        return tuple(execution for execution in EXECUTIONS if self._why_not(execution) is None)

    @property
    def why(self) -> str:
        """Why the `execution` is what it is."""
        if self._whole:
            return "nothing is pruned"
        if self.measured is not None:
            ms, shape, training = self.measured
            times = ", ".join(f"{execution} {each:.3g} ms" for execution, each in ms.items())
            return f"measured: {times} for {shape}, {'training' if training else 'inference'}"
        if self._execution is None:
            return "not measured"
        refused = self._why_not(self._execution)
        return "set by hand" if refused is None else f"not {self._execution}, as was set: {refused}"

    @property
    def _whole(self) -> bool:
        return self.nnz == math.prod(self.shape)

    def _why_not(self, execution: str) -> str | None:
        """Why an execution is not possible here; None if it is."""
        if self._whole and execution != "dense":
            return "nothing is pruned"
        if execution == "compact" and self.groups > 1:
            return "its channels are in groups"
        if execution == "compact" and live_shape(self.pattern, self.shape) == self.shape:
            return "every row and every column has survivors"
        if execution == "block":
            device = self.values.device
            taken = [block for block in BLOCKS if ops.takes_block(block, device, self.geometry)]
            if not taken:
                return f"there are no kernels for blocks of such a layer on {device.type}"
            if self._find_block() == (1, 1):
                return "its mask does not consist of whole blocks"
            if self._find_block() not in taken:
                return f"there are no kernels for its blocks, {self._find_block()}, on {device.type}"
        return None

    def _find_block(self) -> tuple[int, int]:
        """(R, C) of the blocks that the mask consists of: looked for once, and only where there are kernels for any."""
        if self._mask_block is None:
            self._mask_block = block_of(self.pattern, self.shape)
        return self._mask_block

    def _no_plan(self) -> Tensor:
        return self.crow_indices.new_empty(0)

    def _prepare(self) -> None:
        """Decides how forward runs, makes what that needs and drops the rest; keeps a plan that still is the right one.

        May synchronise with the device, so that forward never has to.
        """
        if self._whole:
            self._present = "dense"
        elif self._execution and self._why_not(self._execution) is None:
            self._present = self._execution
        else:
            self._present = "block" if self._why_not("block") is None else "sparse"
        block = self._find_block() if self._present == "block" else (1, 1)
        if self._present not in NATIVE:
            self.plan = self._no_plan()
        elif not self.plan.numel() or block != self.block:
            self.plan = self._compile(self.pattern, block)
        self.block = block
        self._rows = self._columns = self._positions = None
        if self._present == "compact":
            self._rows, self._columns, self._positions = live_indices(self.pattern, self.shape)
        elif self._present == "dense" and not self._whole:
            self._positions = self.pattern.positions()

    def _dense_weight(self) -> Tensor:
        """`weight` for a dense execution, its live part for a compact one: a view of `values` if nothing is pruned."""
        if self._whole:
            return self.values.view(self.shape)
        shape = self.shape if self._rows is None else (len(self._rows), len(self._columns), *self.shape[2:])
        return self.values.new_zeros(math.prod(shape)).scatter(0, self._positions, self.values).view(shape)

    def _apply(self, fn, recurse=True):
        """Module.to and the like; on another type of device other kernels run, by another plan."""
        before = self.crow_indices.device.type
        super()._apply(fn, recurse)
        if "meta" not in (types := {before, self.crow_indices.device.type}) and len(types) > 1:
            self._prepare_anew(changed=True)
        return self

    def _prepare_anew(self, changed: bool) -> None:
        """Forgets what was made of the last pattern or type of device; if that `changed`, what was measured as well."""
        if changed and self.measured:
            self._execution = self.measured = None
        self.plan, self._mask_block = self._no_plan(), None
        self._prepare()

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
        if self.nnz != pattern.nnz:
            self.values.data, self.values.grad = self.values.new_empty(pattern.nnz), None
        self._prepare_anew(changed=not all(map(torch.equal, before, (self.crow_indices, self.col_indices))))

    def extra_repr(self) -> str:
        arguments = "".join(f"{name}={getattr(self, name)!r}, " for name in self.arguments)
        return (
            f"{arguments}bias={self.bias is not None}, density={self.density:.4g}, nnz={self.nnz}, "
            f"execution={self.execution}"
        )


def _with_bias_and_mode(layer: nn.Module, source: nn.Module) -> nn.Module:
    """``layer`` with a copy of the bias of ``source``, trained or frozen as there, in its mode."""
    if source.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(source.bias)
        layer.bias.requires_grad_(source.bias.requires_grad)
    return layer.train(source.training)
