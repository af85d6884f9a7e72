"""How a masked layer's forward runs: the choice of an execution, and what the layer keeps for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..orders import Order, permuted_block_of
from ..pattern import Pattern, block_of
from .carried import MADE
from .checkpoint import CheckpointedLayer
from .dense import DenseWeight, smallest
from .executions import BY_NAME, EXECUTIONS, Measured, of

GATHERS = {"_columns": "gathers its input", "_rows": "puts its output back"}  # what is not folded into other layers


class ExecutedLayer(CheckpointedLayer):
    """The half of a masked layer that decides how forward runs, once for each pattern and type of device.

    `measured` is what its present `execution` was chosen by, or None: not part of the state_dict, gone when another
    pattern is loaded, an execution set or the layer moved to another type of device. `block` is (R, C) of the blocks
    that the present execution multiplies, (1, 1) if it is none of blocks.
    """

    lacks: ClassVar[Mapping[str, str]] = {}  # executions that such layers do not have, and why
    measurable: ClassVar[bool] = True  # by calls on random numbers
    _dense: DenseWeight | None

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        """The native kernels' plan for a pattern of this layer and blocks of it."""
        raise NotImplementedError

    def _build_execution(self) -> None:
        """Once the indices and values are there."""
        self.register_buffer("plan", self._no_plan(), persistent=False)
        for name in MADE[1:]:
            self.register_buffer(name, None, persistent=False)
        self._execution: str | None = None  # not chosen
        self.measured: Measured | None = None
        self.block = (1, 1)
        self._mask_block: tuple[int, int] | None = None  # not looked for
        self._mask_order: tuple[tuple[int, int], Order | None] | None = None

    @property
    def execution(self) -> str:
        """How forward runs: one of `executions`.

        "sparse": by kernels for single weights. "block": by kernels for whole blocks of them, on tensor cores.
        "permuted": so, where the mask has whole blocks only in another order of its rows and columns; the input is
        gathered in that order, and the output put back.
        "dense": by PyTorch, the values scattered into a dense weight. "compact": so, without its rows and columns in
        which nothing survived. A layer with nothing pruned is "dense", its values being the dense weight as it stands.
        Not set, or set to None, it is the first of "block", "permuted", "sparse" and "dense" that is possible; so it is
        where what was set is not possible, after a move or a load, or at another mask. It is not in the state_dict, and
        a `convert` that masks the layer anew forgets it. Raises ValueError if set to anything else, or to what is not
        possible here, and says why.
        """
        return self._present

    @execution.setter
    def execution(self, execution: str | None) -> None:
        self.set_execution(execution)

    def set_execution(self, execution: str | None, measured: Measured | None = None) -> None:
        """Set `execution`, and `measured` to what it was chosen by."""
        if execution not in (*EXECUTIONS, None):
            raise ValueError(f"execution: expected one of {EXECUTIONS}, got {execution!r}")
        self.check()
        if execution and (why := BY_NAME[execution].why_not(self)):
            raise ValueError(f"execution: expected one of {self.executions}, got {execution!r}: {why}")
        self._execution, self.measured = execution, measured
        self._prepare()

    @property
    def executions(self) -> tuple[str, ...]:
        """Those that are possible for this layer on its device."""
        return tuple(name for name, execution in BY_NAME.items() if execution.why_not(self) is None)

    @property
    def why(self) -> str:
        """Why the `execution` is what it is."""
        gathers = " and ".join(text for name, text in GATHERS.items() if self._buffers[name] is not None)
        return f"{self._why}; it {gathers}" if self._present == "permuted" else self._why

    @property
    def _why(self) -> str:
        if self._whole:
            return "nothing is pruned"
        if self.measured is not None and self._execution == self._present:
            return str(self.measured)
        if self._execution is None:
            return self.lacks.get("sparse", "not measured")
        refused = BY_NAME[self._execution].why_not(self)
        return "set by hand" if refused is None else f"not {self._execution}, as was set: {refused}"

    @property
    def _whole(self) -> bool:
        return self.nnz == math.prod(self.shape)

    def _find_block(self) -> tuple[int, int]:
        """(R, C) of the blocks that the mask consists of: looked for once, and only where there are kernels for any."""
        if self._mask_block is None:
            self._mask_block = block_of(self.pattern, self.shape)
        return self._mask_block

    def _find_order(self) -> tuple[tuple[int, int], Order | None]:
        """(R, C) of the blocks that the mask consists of in some order, and the order: looked for as `_find_block`."""
        if self._mask_order is None:
            self._mask_order = permuted_block_of(self.pattern, self.shape)
        return self._mask_order

    def _permuted_operands(self) -> tuple[Tensor | None, ...]:
        """In the order of the blocks: values, bias, crow_indices, col_indices, plan."""
        bias = self.bias if self.bias is None or self._rows is None else self.bias.index_select(0, self._rows)
        return self.values.index_select(0, self._positions), bias, self._crow_indices, self._col_indices, self.plan

    def _no_plan(self) -> Tensor:
        return self.crow_indices.new_empty(0)

    def _prepare(self) -> None:
        """Decides how forward runs, makes what that needs and drops the rest; keeps a plan that still is the right one.

        May synchronise with the device, so that forward never has to.
        """
        execution = of(self, self._execution)
        vars(self).update(_present=execution.name, _dense=None)  # nn.Module's way takes ten times as long
        self._buffers.update(dict.fromkeys(MADE[1:]))
        if not execution.native:
            self.plan, self.block = self._no_plan(), (1, 1)
        execution.prepare(self)
        self._remember("crow_indices", "col_indices", *[name for name in MADE if self._buffers[name] is not None])

    def _use_plan(self, block: tuple[int, int], pattern: Pattern | None = None) -> None:
        """For kernels that multiply blocks (R, C) of this pattern, None: the layer's."""
        if block != self.block or not self.plan.numel():
            self._buffers["plan"], vars(self)["block"] = self._compile(pattern or self.pattern, block), block

    def _use_dense_weight(self, positions: Tensor, shape: tuple[int, ...]) -> None:
        """For PyTorch's operators: a weight of this shape with the values at these positions of it, flattened."""
        self._positions = smallest(positions, math.prod(shape))
        self._dense = DenseWeight(self.values, shape)

    def _dense_weight(self) -> Tensor:
        """`weight` for a dense execution, its live part for a compact one: a view of `values` if nothing is pruned."""
        return self.values.view(self.shape) if self._dense is None else self._dense(self.values, self._positions)

    def _follow_values(self) -> None:
        if self._dense is not None:
            self._dense.follow(self.values)

    def _prepare_anew(self, changed: bool) -> None:
        """Forgets what was made of the last pattern or type of device; if that `changed`, what was measured as well.

        Raises ValueError where all buffers were written to in place, and what is made of the indices now is not what
        was written: so an average of all buffers shows, even if the indices that it has rounded are some pattern's. Or
        where the indices of a copy are others than before: so an average shows that got those of a model whose masks
        have moved, but values of both.
        """
        known, before, digest = self._known, dict(self._buffers), self._digest
        if changed and self.measured:
            self._execution = self.measured = None
        vars(self).update(block=None, _mask_block=None, _mask_order=None)  # of no plan
        self._prepare()
        written = [before[name] is each and each._version != version for name, each, version in known]
        if all(written) and not all(_equal(before[name], self._buffers[name]) for name, *_ in known[2:]):
            why = self._unlike("plan: expected that of the indices, got another")
        elif all(written[:2]) and digest != self._digest:
            why = (
                "values: expected an average of one pattern, got a model's whose masks have moved: before "
                "average.update_parameters(model), set_masks(average.module, masks) as the model's"
            )
        else:
            return
        vars(self).update(_known=known, _digest=digest)  # so the next call is refused, too
        self._buffers.update(before)
        raise ValueError(why)


def _equal(written: Tensor, made: Tensor | None) -> bool:
    """Up to numbers that fp32 rounds: an average of equal ones, which leaves the indices as they are, changes those."""
    if made is None or made.shape != written.shape:
        return False
    exact = made.abs() < 2**24
    return torch.equal(written[exact], made[exact])
