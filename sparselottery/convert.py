"""Whole models: dense to masked and back, by parameter name.

Masks are keyed by the name that the weight has in the dense model ("fc1.weight"), whatever the model is now.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calls import ExampleInput
from .copying import copied
from .execution import choose_execution
from .masks import as_mask, by_name
from .nn import (
    MaskedLayer,
    MaskedSequential,
    OpenedModule,
    as_module,
    keep_from_fast_path,
    masked_type_of,
    opened_type_of,
)
from .nn.carried import own_buffers
from .nn.weight import plain
from .pretrained import saved_sparse
from .survey import TORCH_PRUNED, Survey, Use, survey
from .weight_decay import SparseLotteryWarning, known_optimizers

IGNORED = "_ddp_params_and_buffers_to_ignore"  # of a model: what DistributedDataParallel never sends


def convert(model: nn.Module, masks: Mapping[str, Tensor], example_input: ExampleInput | None = None) -> nn.Module:
    """A copy of `model` that stores and multiplies only the surviving weights.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparse = convert(model, prune(model, 0.9))
        >>> [layer.nnz for layer in sparse if isinstance(layer, MaskedLinear)]
        [205, 32]

    `model` and the random state are left as they are.
    masks: bool tensors or NumPy arrays keyed by parameter name, each of its weight's shape. Each layer so named (or, in
    a converted model, masked layer) becomes a masked one of its weights at the mask, with its forward and backward
    hooks and what was set on it (`layer.scale = 3`); layers not named stay as they are. Layers that share a weight get
    one mask, by its first name, and share its survivors. Each nn.Sequential with masked layers in it becomes a
    MaskedSequential, an nn.MultiheadAttention with a named weight a MaskedMultiheadAttention. `explain` says which
    layers can be masked, and `register` adds to them.
    DistributedDataParallel(converted) sends no indices of the survivors, which every process must have of the same
    masks; of a module that holds the converted one it does at each call, unless given `broadcast_buffers=False`.
    example_input: a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments, like those
    it will be given: every masked layer then runs in the way that a measurement finds fastest (`choose_execution`).
    None: sparse, or by blocks.
    Warns (`SparseLotteryWarning`) where an optimiser trains masked layers that are masked anew in the copy: it goes on
    with those of `model`; `set_masks` gives them other masks in place. Warns, once for a model, where more than a tenth
    of its weights cannot be masked.
    Raises ValueError if a name is not the weight of such a layer, a layer cannot be masked (something else uses its
    weight too, or it is parametrized or pruned by torch's own utilities) or a mask has the wrong shape, TypeError if a
    mask is not boolean.
    """
    found = survey(model)
    _warn_of_optimizers(found, masks)
    converted = converted_with(model, masks, {}, found)
    found.tell(model, stacklevel=2)
    if example_input is not None:
        choose_execution(converted, example_input)
    return converted


def _warn_of_optimizers(found: Survey, masks: Mapping[str, Tensor]) -> None:
    weights = [found.maskable[name] for name in by_name(masks) if name in found.maskable]
    held = {weight.parameter for weight in weights if isinstance(weight.layer, MaskedLayer)}
    if held and known_optimizers(lambda each: any(held & set(group["params"]) for group in each.param_groups)):
        warnings.warn(
            "an optimiser holds the parameters of the model that is given to convert, and will not train the copy that "
            "it returns: set_masks(model, masks, optimizer) gives the model other masks in place",
            SparseLotteryWarning,
            stacklevel=3,
        )


def converted_with(
    model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], found: Survey | None = None
) -> nn.Module:
    """As `convert`, with other weights, by name, in the masked layers: of the same shapes, not checked."""
    found = survey(model) if found is None else found
    masks = {name: as_mask(name, mask) for name, mask in by_name(masks).items()}
    for name, mask in masks.items():
        if name not in found.maskable:
            raise ValueError(_no_weight(name, found))
        if tuple(mask.shape) != (shape := found.maskable[name].shape):
            raise ValueError(f"masks[{name!r}]: expected shape {shape}, got {tuple(mask.shape)}")
    replaced: dict[nn.Module, nn.Module] = {}
    opened: dict[nn.Module, OpenedModule] = {}
    for name, mask in masks.items():
        weight, first = found.maskable[name], None
        for use in weight.uses:
            dense = use.layer.to_dense() if isinstance(use.layer, MaskedLayer) else use.layer
            kind = type(use.layer) if dense is not use.layer else masked_type_of(dense)[0]
            layer = kind.from_dense(dense, mask, weights.get(name))
            if first is None:
                first = layer
            else:
                layer.share(first)
            if use.parent is None:
                replaced[use.layer] = layer
            else:
                _open(use, layer, opened)
    return _rebuild(model, replaced | opened)


def _no_weight(name: str, found: Survey) -> str:
    """Why there is no mask for this name."""
    if name in found.tied:
        return f"masks[{name!r}]: expected {found.tied[name]!r}, the first name of this weight"
    layer, _, part = name.rpartition(".")
    within = (each for each in found.refused if part == "weight" and layer and each.startswith(f"{layer}."))
    refused = name if name in found.refused else next(within, None)  # perhaps under another name
    if refused is None:
        return f"masks: expected names among {list(found.maskable)}, got {name!r}"
    why = found.refused[refused]
    return f"masks[{name!r}]: expected a layer that can be masked, got one that cannot: {why}"


def _open(use: Use, layer: MaskedLayer, opened: dict[nn.Module, OpenedModule]) -> None:
    """Puts a masked layer into the opened module that takes the place of `use.parent`."""
    parent = use.parent
    if parent not in opened:
        opened[parent] = copy.deepcopy(opened_type_of(parent).of(parent))
    opened[parent]._modules[use.child] = layer


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a converted model with the dense layers again, zeros where pruned; `model` is left as it is.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 10))
        >>> to_dense(convert(model, prune(model, 0.9)))[0]
        Linear(in_features=64, out_features=10, bias=True)

    A layer that was of a subclass is of it again, and has what was set on it.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    weights: dict[Tensor, nn.Parameter] = {}  # by the values that layers may share
    for module in as_module(model).modules():
        if isinstance(module, OpenedModule):
            replaced[module] = module.closed()
        elif isinstance(module, MaskedLayer):
            dense = replaced[module] = module.to_dense()
            dense.weight = weights.setdefault(module.values, dense.weight)
    return _rebuild(model, replaced)


def dense_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict of the dense model, as copies: zeros where a converted model has pruned."""
    with torch.no_grad():
        return {
            name: plain(entry.weight).contiguous() if isinstance(entry, MaskedLayer) else copy_of(entry)
            for name, entry in dense_entries(model)
        }


def load_dense_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a `dense_state` in place: a masked layer takes the values at its mask.

    Raises ValueError, with nothing changed, if names or shapes differ from those of the model.
    """
    expected = dict(dense_entries(model))
    if expected.keys() != state.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise ValueError(f"state: expected the names of the model; missing {missing}, unexpected {extra}")
    replaced = {name: entry for name, entry in state.items() if not (_copies(entry) and _copies(expected[name]))}
    for name in expected.keys() - replaced.keys():
        entry, got = expected[name], state[name].shape
        if (expects := entry.dense_shape if isinstance(entry, MaskedLayer) else entry.shape) != got:
            raise ValueError(f"state[{name!r}]: expected shape {tuple(expects)}, got {tuple(got)}")
    replaced = {name: copy_of(entry) for name, entry in replaced.items()}
    for name, entry in replaced.items():
        path, _, buffer = name.rpartition(".")
        if isinstance(entry, Tensor) and buffer in (buffers := model.get_submodule(path)._buffers):
            buffers[buffer] = entry.to(buffers[buffer].device)
    model.load_state_dict({**state, **replaced})


def copy_of(entry: Any) -> Any:
    """A copy of a state_dict's entry: a tensor, contiguous, or what a module's `get_extra_state` returned."""
    if not isinstance(entry, Tensor):
        return copy.deepcopy(entry)
    entry = entry.detach()
    if _irregular(entry):
        return entry.clone()
    return entry.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _irregular(entry: Any) -> bool:
    """Is it a tensor that is sparse, nested or quantised?"""
    return isinstance(entry, Tensor) and (entry.is_nested or entry.is_quantized or entry.layout != torch.strided)


def _copies(entry: Any) -> bool:
    """Can torch copy any tensor of the shape into this entry? Not into a sparse one, nor twice to one address."""
    if isinstance(entry, MaskedLayer):
        return True
    if not isinstance(entry, Tensor) or _irregular(entry):
        return False
    return not any(size > 1 and stride == 0 for size, stride in zip(entry.shape, entry.stride(), strict=True))


def dense_entries(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The entries of the dense model's state_dict, in order, not copied; a masked layer itself for its weight."""
    masked = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, MaskedLayer)}
    names, done = dense_names(model), set()
    for name, entry in model.state_dict().items():
        parts = name.split(".")
        layer = next((path for n in range(len(parts)) if (path := ".".join(parts[:n])) in masked), None)
        if layer is None:
            yield names.get(name, name), entry
        elif layer not in done:
            done.add(layer)
            for part, held in (("weight", masked[layer]), ("bias", masked[layer].bias)):
                if held is not None:
                    name = f"{layer}.{part}" if layer else part
                    yield names.get(name, name), held


def dense_names(model: nn.Module) -> dict[str, str]:
    """Of parameters in opened modules, the names in the dense model."""
    modules = model.named_modules(remove_duplicate=False)
    opened = [_names_in(prefix, module) for prefix, module in modules if isinstance(module, OpenedModule)]
    return {ours: name for names in opened for ours, name in names.items()}


def _names_in(prefix: str, module: OpenedModule) -> dict[str, str]:
    before = f"{prefix}." if prefix else ""
    return {before + ours: before + name for ours, name in module.dense_names.items()}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The bool masks of all masked layers, keyed by weight name; of layers that share their values, the first."""
    return {name: layer.mask for name, layer in masked_weights(model).items()}


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """All masked layers, keyed by weight name."""
    names, found = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MaskedLayer):
            found.setdefault(module, _weight_name(name))
        elif isinstance(module, OpenedModule):
            names |= _names_in(name, module)
    return {names.get(name, name): layer for layer, name in found.items()}


def masked_weights(model: nn.Module) -> dict[str, MaskedLayer]:
    """The same, of layers that share their values the first alone."""
    first: dict[Tensor, tuple[str, MaskedLayer]] = {}
    for name, layer in masked_layers(model).items():
        first.setdefault(layer.values, (name, layer))
    return dict(first.values())


def tied(model: nn.Module) -> dict[str, str]:
    """The other names of the weights of a converted model that several layers share, with the first name."""
    weights = masked_weights(model)
    first = {id(layer.values): name for name, layer in weights.items()}
    layers = ((name, layer) for name, layer in dense_entries(model) if isinstance(layer, MaskedLayer))
    return {name: first[id(layer.values)] for name, layer in layers if name not in weights}


def prunable(model: nn.Module, found: Survey | None = None) -> dict[str, Tensor]:
    """The dense weights (detached) of all layers that are masked or can be, by name, in module order.

    Raises ValueError for a layer that torch.nn.utils.prune has pruned: its mask would be lost.
    """
    found = survey(model) if found is None else found
    if pruned := [name for name, why in found.refused.items() if why == TORCH_PRUNED]:
        layer = pruned[0].rpartition(".")[0]
        raise ValueError(f"model: expected ordinary layers, got {layer!r}: {TORCH_PRUNED}")
    weights = ((name, each.layer, each.parameter) for name, each in found.maskable.items())
    return {
        name: (plain(layer.weight) if isinstance(layer, MaskedLayer) else parameter).detach()
        for name, layer, parameter in weights
    }


def _weight_name(module_name: str) -> str:
    return f"{module_name}.weight" if module_name else "weight"


def _rebuild(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy with some modules replaced (shared ones stay shared) and the Sequential classes to match."""
    tensors: dict[int, Tensor] = {id(each): each.clone() for each in model.buffers() if _irregular(each)}  # no deepcopy
    held = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    for old, new in replaced.items():
        bias = old._parameters.get("bias")
        if bias is not None and held[id(bias)] > 1:  # whoever shares it goes on sharing it
            new.bias = tensors.setdefault(id(bias), new.bias)
    model = copied(model, replaced, tensors)
    for module in model.modules():
        if type(module) in (nn.Sequential, MaskedSequential):
            masked = any(isinstance(child, MaskedLayer) for child in module)
            module.__class__ = MaskedSequential if masked else nn.Sequential
    keep_from_fast_path(model)
    saved_sparse(model)
    indices = [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, MaskedLayer)
        for buffer in module._buffers.keys() - own_buffers(module).keys()
    ]
    if indices:
        setattr(model, IGNORED, list(dict.fromkeys([*getattr(model, IGNORED, ()), *indices])))
    return model
