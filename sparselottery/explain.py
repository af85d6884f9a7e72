"""How each weight of a model is stored and executed, and why."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .nn import EXECUTIONS, MaskedLayer, Measured, as_module, count_packs
from .survey import survey


def explain(model: nn.Module) -> list[dict[str, Any]]:
    """A row for each weight of two dimensions or more, masked or dense, in module order.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> [(row["layer"], row["nnz"], row["execution"]) for row in explain(convert(model, prune(model, 0.9)))]
        [('0', 205, 'sparse'), ('2', 32, 'sparse')]

    layer: its name; of a parameter that is not its module's `weight`, the parameter's. shape, density, nnz: of the
    weight, (0, 0) and zeros of a lazy one. bytes: of values and indices. dense_bytes: of the weight if it were dense.
    execution: as of `MaskedLayer.execution`, "dense" of what is not masked.
    plan_bytes: of what the kernels made of the indices, kept beside them. flops: of the survivors forward, 2 for each
    at each row or output pixel of one sample; of nn.Linear and nn.Conv2d that were measured, else None.
    packs: how often in a training step a whole activation or gradient is rewritten for the layer's kernels, forward and
    backward (0 for a convolution, whose kernels rewrite what they read in blocks that fit a cache).
    sparse_ms, block_ms, permuted_ms, compact_ms, dense_ms: of the native call that the layer can be part of, with the
    layer executed so, as measured by `convert` with an example input; None for what was not, or is not possible.
    why: why that execution; of what is not masked "kept dense: " and the reason; where it is used too, if it is tied.
    prunable: is it masked, or can it be? What share of the model can be pruned is
    `sum(math.prod(row["shape"]) for row in rows if row["prunable"]) / sum(math.prod(row["shape"]) for row in rows)`.
    """
    packs, rows = count_packs(as_module(model)), []
    for weight in survey(model).weights:
        layer, module = weight.name.removesuffix(".weight"), weight.layer
        layer = "" if layer == "weight" else layer
        if isinstance(module, MaskedLayer):
            stored = module.values, module.crow_indices, module.col_indices
            row = _row(layer, weight.shape, stored, module.execution, module.why, packs[module], module.measured)
            row |= {"plan_bytes": module.plan.nbytes, "flops": _flops(module)}
        else:
            shape, stored = weight.shape, weight.parameter
            if is_lazy(stored):
                shape, stored = (0, 0), torch.empty(0, dtype=torch.float32, device="cpu")
            row = _row(layer, shape, (stored,), "dense", f"kept dense: {weight.why or 'no mask was given'}")
        if tied := ", ".join(use.name for use in weight.uses[1:]):
            row["why"] += f"; also {tied}"
        rows.append({**row, "prunable": weight.why is None})
    return rows


def _flops(layer: MaskedLayer) -> int | None:
    """Of one sample, of the shape that the layer was measured on."""
    shape = layer.measured.input_shape if layer.measured else ()
    if layer.dense_type is nn.Conv2d and len(shape) == 4:
        return 2 * layer.nnz * math.prod(layer.geometry.output_size(*shape[2:]))
    return 2 * layer.nnz * math.prod(shape[1:-1]) if layer.dense_type is nn.Linear and len(shape) > 1 else None


def _row(
    layer: str,
    shape: tuple[int, ...],
    stored: tuple[Tensor, ...],
    execution: str,
    why: str,
    packs: int = 0,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """stored: the weight's values, and where they are."""
    values, total = stored[0], math.prod(shape)
    return {
        "layer": layer,
        "shape": shape,
        "density": values.numel() / total if total else 0.0,
        "nnz": values.numel(),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
        "dense_bytes": total * values.element_size(),
        "execution": execution,
        "plan_bytes": 0,
        "flops": None,
        "packs": packs,
        **{f"{each}_ms": measured and measured.ms.get(each) for each in EXECUTIONS},
        "why": why,
    }
