"""Masks that were made elsewhere, as `convert` takes them: bool tensors keyed by weight name.

A dict of bool tensors from anywhere is taken by `convert` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .masks import Masks
from .pattern import matrix_shape
from .survey import survey


def masks_from_torch_prune(source: nn.Module | Mapping[str, Tensor]) -> Masks:
    """The masks of all weights that torch.nn.utils.prune has pruned.

    Examples:
        >>> from torch.nn.utils.prune import l1_unstructured, remove
        >>> model = nn.Sequential(l1_unstructured(nn.Linear(8, 4), "weight", 0.5))
        >>> masks = masks_from_torch_prune(model)
        >>> layer = remove(model[0], "weight")
        >>> convert(model, masks)[0].nnz
        16

    source: a model or its state_dict, with "fc1.weight_orig" and "fc1.weight_mask" in it.
    `convert` refuses such layers, as they would lose their masks; so, for each, then
    `torch.nn.utils.prune.remove(layer, "weight")`, and `convert(model, masks)`.
    Raises ValueError if something other than a weight is pruned too, or nothing is.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    pruned = [name.removesuffix("_mask") for name in state if name.endswith("_mask")]
    pruned = [name for name in pruned if f"{name}_orig" in state]
    if not pruned:
        raise ValueError("source: expected a model that torch.nn.utils.prune has pruned, found no weight_mask in it")
    for name in pruned:
        if name.rpartition(".")[2] != "weight":
            raise ValueError(f"{name}: expected only weights to be pruned; only those have masks here")
    return {name: state[f"{name}_mask"].bool() for name in pruned}


def masks_from_zeros(source: nn.Module | Mapping[str, Tensor], names: Sequence[str] | None = None) -> Masks:
    """False where a weight is exactly zero: for dense checkpoints that keep no masks. Never done unless asked for.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> with torch.no_grad():
        ...     weight = model[0].weight.fill_(1.0)[0].zero_()
        >>> convert(model, masks_from_zeros(model))[0].nnz
        24

    A survivor that happens to be zero is lost: prefer masks where there are any.
    source: a dense model, or a state_dict with `names` to look at.
    names: only these weights; None: of a model, all those that contain a zero and that `convert` can mask.
    Raises ValueError for a state_dict without names or a name that is not there.
    """
    if isinstance(source, nn.Module):
        found = survey(source)
        weights = {name: parameter.detach() for name, parameter in source.named_parameters()}
        if names is None:
            names = [name for name in found.maskable if not bool(weights[name].all())]
    elif names is None:
        raise ValueError("names: expected the weights to look at in a state_dict, got None")
    else:
        weights = source
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"names: expected some of {list(weights)}, got {missing}")
    return {name: weights[name] != 0 for name in names}


def masks_from_scipy(matrices: Mapping[str, Any], model: nn.Module | None = None) -> Masks:
    """True where a scipy sparse matrix or array stores an entry, a zero too.

    Examples:
        >>> from scipy.sparse import csr_array
        >>> masks_from_scipy({"fc.weight": csr_array([[0, 2], [3, 0]])})
        {'fc.weight': tensor([[False,  True],
                [ True, False]])}

    matrices: of weights (O, ...) as matrices (O, I), by weight name.
    model: that the masks are for, which gives their shapes; None: all are matrices.
    Raises ValueError for a name that the model lacks or a matrix of another shape, TypeError for what is not sparse.
    """
    masks, shapes = {}, None if model is None else {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, matrix in matrices.items():
        if not hasattr(matrix, "tocoo"):
            raise TypeError(f"matrices[{name!r}]: expected a scipy sparse matrix, got {type(matrix).__name__}")
        if shapes is not None and name not in shapes:
            raise ValueError(f"matrices: expected names among {list(shapes)}, got {name!r}")
        shape = tuple(matrix.shape) if shapes is None else shapes[name]
        if tuple(matrix.shape) != matrix_shape(shape):
            raise ValueError(f"matrices[{name!r}]: expected shape {matrix_shape(shape)}, got {tuple(matrix.shape)}")
        entries = matrix.tocoo()
        stored = np.zeros(matrix.shape, dtype=bool)
        stored[entries.row, entries.col] = True
        masks[name] = torch.from_numpy(stored).view(shape)
    return masks
