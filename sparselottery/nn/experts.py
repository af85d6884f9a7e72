"""MaskedExperts: the experts of transformers' mixtures, whose matrices are one tensor, a masked one each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from .base import MaskedLayer
from .opened import OpenedModule

_TRAITS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


class Matrices(nn.Module):
    """y = x W[e]ᵀ for each of the numbers e: the dense weight (E, O, I). Or, inputs first, y = x W[e] of (E, I, O)."""

    def __init__(
        self,
        number: int,
        out_features: int,
        in_features: int,
        inputs_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.number, self.out_features, self.in_features = number, out_features, in_features
        self.inputs_first = inputs_first
        self.weight = nn.Parameter(torch.empty(_shape(self), device=device, dtype=dtype))

    def forward(self, x: Tensor, number: int, parts: Tensor | None = None) -> Tensor:
        """(N, I) -> (N, O)."""
        return _product(self, x, self.weight[number])

    def parts(self) -> Tensor:
        """As `MaskedMatrices.parts`."""
        return self.weight


def _shape(matrices: nn.Module) -> tuple[int, int, int]:
    sizes = matrices.out_features, matrices.in_features
    return matrices.number, *(reversed(sizes) if matrices.inputs_first else sizes)


def _product(matrices: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix if matrices.inputs_first else F.linear(x, matrix)


class MaskedMatrices(MaskedLayer):
    """The same over a fixed mask of the weight's shape: a pattern of its own for each matrix (O, I), by the kernels of
    linear layers."""

    dense_type = Matrices
    arguments = ("number", "out_features", "in_features", "inputs_first")
    chooses_bias = False
    lacks = dict.fromkeys(("block", "compact"), "there are kernels for single weights of several matrices only")
    measurable = False

    def __init__(
        self,
        number: int,
        out_features: int,
        in_features: int,
        inputs_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.number, self.out_features, self.in_features = number, out_features, in_features
        self.inputs_first = inputs_first
        self._cut: tuple[Any, ...] = (None, 0, [])  # indices and their version, and what is made of them
        self._build(mask, False, device, dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, O, I), or inputs first (E, I, O)."""
        return _shape(self)

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return self._no_plan()  # each matrix has one

    def _patterns(self) -> list[tuple[Pattern, Tensor, Tensor | None]]:
        """Of each matrix (O, I) pattern, plan, and which of its values are where: made once for the indices of now."""
        known, version, found = self._cut
        if known is not self.col_indices or version != known._version:
            found = []
            for positions in self.col_indices.long().split(self._counts()):
                pattern, order = Pattern.from_positions(positions, self.shape[1:]), None
                if self.inputs_first:
                    pattern, order = pattern.transposed()
                found.append((pattern, ops.compile_plan(pattern), order))
            self._cut = self.col_indices, self.col_indices._version, found
        return found

    def _counts(self) -> list[int]:
        return self.crow_indices.diff().tolist()

    def parts(self) -> Tensor | tuple[Tensor, ...]:
        """The weight, where it is dense, or else the values of each matrix: for all calls of one forward."""
        self.check()
        return self._dense_weight() if self._present == "dense" else self.values.split(self._counts())

    def forward(self, x: Tensor, number: int, parts: Tensor | tuple[Tensor, ...] | None = None) -> Tensor:
        """(N, I) -> (N, O); parts: what `parts` gave."""
        if ops.in_torch(x):
            return self._in_torch(x, number)
        parts = self.parts() if parts is None else parts
        if isinstance(parts, Tensor):
            return _product(self, x, parts[number])
        pattern, plan, order = self._patterns()[number]
        values = parts[number] if order is None else parts[number].index_select(0, order)
        return ops.chain(x, [values], [None], *([each] for each in (*pattern.indices, plan)))

    def multiply(self, weight: Tensor, bias: None, x: Tensor, number: int, parts: None = None) -> Tensor:
        return _product(self, x, weight[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cut": (None, 0, [])}  # a copy makes its own


def _weights(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class MaskedExperts(OpenedModule):
    """The experts of a mixture in transformers, in which `Matrices` hold the weights, each tensor masked or dense.

    Each expert multiplies the tokens that are routed to it: in a loop over those that have any, as the eager
    implementation of transformers does. Other implementations (grouped_mm, batched_mm) read whole dense weights.
    """

    @classmethod
    def opens(cls, module: nn.Module) -> bool:
        """Is a module experts of this kind, without norms, and on one device?"""
        if not all(trait in vars(module) for trait in _TRAITS):
            return False
        own = {name for name, each in module._parameters.items() if each is not None}
        weights = _weights(module)
        return (
            not module.has_post_expert_norm
            and not getattr(module, "_is_expert_parallel", False)
            and own == {*weights, *(f"{name}_bias" for name in weights if module.has_bias)}
            and all(module._parameters[name].dim() == 3 for name in weights)
        )

    @property
    def dense_type(self) -> type[nn.Module]:
        return self._dense_type

    @property
    def dense_names(self) -> dict[str, str]:
        return {f"{name}.weight": name for name in _weights(self)}

    def _open(self, dense: nn.Module) -> None:
        self._dense_type = type(dense)
        for name in _weights(self):
            weight = self._parameters.pop(name)
            number, *sizes = weight.shape
            with torch.device("meta"):
                matrices = Matrices(number, *(sizes[::-1] if self.is_transposed else sizes), self.is_transposed)
            matrices.weight = weight
            self._modules[name] = matrices

    def _close(self, dense: nn.Module, layers: dict[str, nn.Module]) -> None:
        for name in _weights(self):
            del dense._modules[name]
            dense.register_parameter(name, layers[name].weight)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (T, H), and of each the K experts' numbers and weights (T, K) -> (T, H)."""
        precise = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        y = torch.zeros_like(hidden_states, dtype=precise)
        up, down = (self._modules[name] for name in _weights(self))
        up_parts, down_parts = (each.parts() if hasattr(each, "parts") else None for each in (up, down))
        for number in top_k_index.unique().tolist():
            if number < up.number:  # the number after the last is nobody's
                token, place = (top_k_index == number).nonzero(as_tuple=True)
                found = self._with_bias(0, up(hidden_states[token], number, up_parts), number)
                found = self._dense_type._apply_gate(self, found) if self.has_gate else self.act_fn(found)
                found = self._with_bias(1, down(found, number, down_parts), number)
                y = y.index_add(0, token, (found * top_k_weights[token, place, None]).to(precise))
        return y.to(hidden_states.dtype)

    def _with_bias(self, part: int, y: Tensor, number: int) -> Tensor:
        return y + self._parameters[f"{_weights(self)[part]}_bias"][number] if self.has_bias else y
