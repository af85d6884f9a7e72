"""Whole models: dense to masked and back, by parameter name.

Masks are keyed by the name that the weight has in the dense model ("fc1.weight"), whatever the model is now.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .copying import copied
from .execution import choose_execution
from .maskable import MASKED, TORCH_PRUNED, unmaskable
from .masks import as_mask
from .nn import MaskedLayer, MaskedSequential, keep_from_fast_path
from .nn.weight import plain
from .weight_decay import SparseLotteryWarning, known_optimizers

IGNORED = "_ddp_params_and_buffers_to_ignore"  # of a model: what DistributedDataParallel never sends


def convert(model: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor | tuple | None = None) -> nn.Module:
    """A copy of `model` that stores and multiplies only the surviving weights.

    `model` and the random state are left as they are.
    masks: bool tensors or NumPy arrays keyed by parameter name, each of its weight's shape. Each named nn.Linear or
    nn.Conv2d (or, in a converted model, MaskedLinear or MaskedConv2d) becomes a MaskedLinear or MaskedConv2d of its
    weights at the mask, with its forward and backward hooks; layers not named stay as they are. Each nn.Sequential
    with masked layers in it becomes a MaskedSequential. DistributedDataParallel(converted) sends no indices of the
    survivors, which every process must have of the same masks; of a module that holds the converted one it does at each
    call, unless given `broadcast_buffers=False`.
    example_input: a tensor, or a tuple of the model's positional arguments, like those it will be given: every masked
    layer then runs in the way that a measurement finds fastest (`choose_execution`). None: sparse, or by blocks.
    Warns (`SparseLotteryWarning`) where an optimiser trains masked layers that are masked anew in the copy: it goes on
    with those of `model`. `set_masks` gives them other masks in place.
    Raises ValueError if a name is not the weight of such a layer, a layer cannot be masked (it shares a parameter, or
    is parametrized or pruned by torch's own utilities) or a mask has the wrong shape, TypeError if a mask is not
    boolean.
    """
    _warn_of_optimizers(model, masks)
    converted = converted_with(model, masks, {})
    if example_input is not None:
        choose_execution(converted, example_input)
    return converted


def _warn_of_optimizers(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    held = {layer.values for name, layer in masked_layers(model).items() if name in masks}
    if held and known_optimizers(lambda each: any(held & set(group["params"]) for group in each.param_groups)):
        warnings.warn(
            "an optimiser holds the parameters of the model that is given to convert, and will not train the copy that "
            "it returns: set_masks(model, masks, optimizer) gives the model other masks in place",
            SparseLotteryWarning,
            stacklevel=3,
        )


def converted_with(model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> nn.Module:
    """As `convert`, with other weights, by name, in the masked layers: of the same shapes, not checked."""
    refused = unmaskable(model)
    layers = {_weight_name(name): module for name, module in _layers(model)}
    masks = {name: as_mask(name, mask) for name, mask in masks.items()}
    for name, mask in masks.items():
        if why := refused.get(name.rpartition(".")[0]):
            raise ValueError(f"masks[{name!r}]: expected a layer that can be masked, got one that cannot: {why}")
        if name not in layers:
            raise ValueError(f"masks: expected names among {list(layers)}, got {name!r}")
        shape = _weight_shape(layers[name])
        if tuple(mask.shape) != shape:
            raise ValueError(f"masks[{name!r}]: expected shape {shape}, got {tuple(mask.shape)}")
    replaced = {}
    for name, mask in masks.items():
        module = layers[name]
        dense = module.to_dense() if isinstance(module, MaskedLayer) else module
        replaced[module] = MASKED[type(dense)].from_dense(dense, mask, weights.get(name))
    return _rebuild(model, replaced)


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a converted model with plain nn layers again, zeros where pruned; `model` is left as it is."""
    return _rebuild(model, {m: m.to_dense() for m in model.modules() if isinstance(m, MaskedLayer)})


def dense_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict of the dense model, as copies: zeros where a converted model has pruned."""
    with torch.no_grad():
        return {
            name: plain(entry.weight) if isinstance(entry, MaskedLayer) else copy_of(entry)
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
        if (expects := expected[name].shape) != (got := state[name].shape):
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
    done = set()
    for name, entry in model.state_dict().items():
        parts = name.split(".")
        layer = next((path for n in range(len(parts)) if (path := ".".join(parts[:n])) in masked), None)
        if layer is None:
            yield name, entry
        elif layer not in done:
            done.add(layer)
            yield _weight_name(layer), masked[layer]
            if masked[layer].bias is not None:
                yield _weight_name(layer).removesuffix("weight") + "bias", masked[layer].bias


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The bool masks of all masked layers, keyed by weight name."""
    return {name: layer.mask for name, layer in masked_layers(model).items()}


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """All masked layers, keyed by weight name."""
    return {_weight_name(name): module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The dense weights (detached) of all layers that are masked or can be, by name, in module order.

    Raises ValueError for a layer that torch.nn.utils.prune has pruned: its mask would be lost.
    """
    if pruned := [name for name, why in unmaskable(model).items() if why == TORCH_PRUNED]:
        raise ValueError(f"model: expected ordinary layers, got {pruned[0]!r}: {TORCH_PRUNED}")
    return {_weight_name(name): plain(module.weight).detach() for name, module in _layers(model)}


def _weight_name(module_name: str) -> str:
    return f"{module_name}.weight" if module_name else "weight"


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    return layer.shape if isinstance(layer, MaskedLayer) else tuple(layer.weight.shape)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All that can be masked or is."""
    refused = unmaskable(model)
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer) or (type(module) in MASKED and name not in refused):
            yield name, module


def _rebuild(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy with some modules replaced (shared ones stay shared) and the Sequential classes to match."""
    buffers = {id(each): each.clone() for each in model.buffers() if _irregular(each)}  # deepcopy may refuse them
    model = copied(model, replaced, buffers)
    for module in model.modules():
        if type(module) in (nn.Sequential, MaskedSequential):
            masked = any(isinstance(child, MaskedLayer) for child in module)
            module.__class__ = MaskedSequential if masked else nn.Sequential
    keep_from_fast_path(model)
    indices = [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, MaskedLayer)
        for buffer in module._buffers
    ]
    if indices:
        setattr(model, IGNORED, list(dict.fromkeys([*getattr(model, IGNORED, ()), *indices])))
    return model
