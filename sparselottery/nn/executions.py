"""The executions of masked layers, an object each: whether a layer has it, and what the layer keeps for it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import nn

from .. import ops
from ..orders import is_natural, permuted_pattern
from ..pattern import BLOCKS
from .compact import live_indices, live_shape


class Measured(NamedTuple):
    """Median milliseconds of each execution that a layer has, by `choose_execution`, with backward if `training`.

    input_shape is the layer's; the times are those of the whole native call that the layer can be part of. `timed` is
    "called", or "replayed" from CUDA graphs, and then says which execution was called none the less, and why.
    """

    ms: dict[str, float]
    input_shape: tuple[int, ...]
    training: bool
    timed: str = "called"

    def __str__(self) -> str:
        times = ", ".join(f"{execution} {each:.3g} ms" for execution, each in self.ms.items())
        how = ["training" if self.training else "inference", *([] if self.timed == "called" else [self.timed])]
        return f"measured: {times} for {self.input_shape}, {', '.join(how)}"


class Execution:
    """A way in which the forward of a masked layer runs."""

    name: ClassVar[str]
    native: ClassVar[bool] = False  # on our kernels; the others are PyTorch's dense operators

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        """Why it is not possible for a layer where this is now; None if it is."""
        raise NotImplementedError

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        """Sets what the layer's forward needs. The layer holds nothing of another execution but its plan."""
        raise NotImplementedError


class Sparse(Execution):
    name, native = "sparse", True

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        return "nothing is pruned" if layer._whole else layer.lacks.get("sparse")

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        layer._use_plan((1, 1))


def _blocks_taken(layer: nn.Module) -> tuple[tuple[int, int], ...] | str:
    """The blocks that there are kernels for, of such a layer on its device; or why there are none."""
    if layer._whole:
        return "nothing is pruned"
    if "block" in layer.lacks:
        return layer.lacks["block"]
    device = layer.values.device
    if taken := ops.blocks_taken(device, layer.geometry):
        return taken
    lacks = ops.too_old(device)
    return f"there are no kernels for blocks of such a layer on {device.type}" + (f": {lacks}" if lacks else "")


class Block(Execution):
    name, native = "block", True

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        taken = _blocks_taken(layer)
        if isinstance(taken, str):
            return taken
        if layer._find_block() == (1, 1):
            return "its mask does not consist of whole blocks"
        if layer._find_block() not in taken:
            return f"there are no kernels for its blocks, {layer._find_block()}, on {layer.values.device.type}"
        return None

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        layer._use_plan(layer._find_block())


class Permuted(Execution):
    name = "permuted"

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        taken = _blocks_taken(layer)
        if isinstance(taken, str):
            return taken
        if layer.groups > 1:
            return "its channels are in groups"
        plain, (block, order) = layer._find_block(), layer._find_order()
        if order is None:
            return "its mask has no whole blocks in any order of its rows and columns"
        if plain in BLOCKS[: BLOCKS.index(block) + 1]:
            return f"its mask has whole blocks {plain} as it is"
        return (
            None if block in taken else f"there are no kernels for its blocks, {block}, on {layer.values.device.type}"
        )

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        block, order = layer._find_order()
        pattern, layer._positions = permuted_pattern(layer.pattern, layer.shape, order)
        layer._crow_indices, layer._col_indices = pattern.indices
        layer._rows, layer._columns = (None if is_natural(each) else each for each in order)
        layer._use_plan(block, pattern)


class Compact(Execution):
    name = "compact"

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        if layer._whole:
            return "nothing is pruned"
        if "compact" in layer.lacks:
            return layer.lacks["compact"]
        if layer.crow_indices.is_meta:
            return "its indices have no data"
        if layer.groups > 1:
            return "its channels are in groups"
        if live_shape(layer.pattern, layer.shape) == layer.shape:
            return "every row and every column has survivors"
        return None

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        layer._rows, layer._columns, positions = live_indices(layer.pattern, layer.shape)
        layer._use_dense_weight(positions, (len(layer._rows), len(layer._columns), *layer.shape[2:]))


class Dense(Execution):
    name = "dense"

    @staticmethod
    def why_not(layer: nn.Module) -> str | None:
        return None

    @staticmethod
    def prepare(layer: nn.Module) -> None:
        if not layer._whole:  # else the values are the weight
            layer._use_dense_weight(layer.pattern.positions(), layer.shape)


BY_NAME = {execution.name: execution for execution in (Sparse, Block, Permuted, Compact, Dense)}
EXECUTIONS = tuple(BY_NAME)
NATIVE = tuple(name for name, execution in BY_NAME.items() if execution.native)


def of(layer: nn.Module, wish: str | None) -> type[Execution]:
    """What a layer for which `wish` is set runs by: that if possible, else blocks, "sparse" or "dense"."""
    if layer._whole:
        return Dense
    if wish and BY_NAME[wish].why_not(layer) is None:
        return BY_NAME[wish]
    if ops.blocks_taken(layer.values.device, layer.geometry):
        for blocked in (Block, Permuted):
            if blocked.why_not(layer) is None:
                return blocked
    return Dense if "sparse" in layer.lacks else Sparse
