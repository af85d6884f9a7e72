"""Permutations folded into the layers on both sides: hidden units in the order in which masks have whole blocks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .calls import ExampleInput, arguments, outputs
from .convert import converted_with, dense_state, load_dense_state, masked_weights, masks_of
from .grids import connected, orders_in
from .links import LINEAR, Link, links
from .orders import Permuted, is_natural, permuted_block_of
from .random_state import random_state_kept

HALVES = (torch.float16, torch.bfloat16)


def fold(model: nn.Module, example_input: ExampleInput | None = None) -> nn.Module:
    """A copy of a converted model that computes the same, its hidden units in the order of the blocks of its masks.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparse = convert(model, prune(model, 0.5, granularity=(4, 2), permute=True))
        >>> x = torch.randn(5, 64)
        >>> torch.allclose(fold(sparse, x)(x), sparse(x), atol=1e-5)
        True

    Masks of permuted blocks (`prune` with `permute`) then have these blocks as they are where the units of some layers
    are the inputs of others (`links`), through residual additions too: no kernel gathers what another has written. What
    stays permuted are the inputs of the first layer of a chain, and what the blocks of two layers want otherwise.
    Sums are of the same terms in another order: equal up to rounding.

    example_input: a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments: both models
    are called with it, in evaluation mode. None: what `links` presumes is taken for true. A forward that torch.fx
    cannot trace, and that reads what is between children of a child, would read units in another order.
    Raises ValueError if the two differ on the example beyond rounding; and without one if a BatchNorm1d or a PReLU of
    several parameters follows a linear layer whose units are moved: of inputs (N, C, L) it normalises C, and not units.
    """
    layers = masked_weights(model)
    joined = links(model)
    names = [name for name in layers if any(name in link.outputs + link.inputs for link in joined)]
    grains = {name: Permuted(*permuted_block_of(layers[name].pattern, layers[name].shape)[0]) for name in names}
    state, masks, orders = dense_state(model), masks_of(model), {}
    for together in connected(names, joined):
        found = orders_in(masks, {name: grains[name] for name in together}, joined)[1]
        orders |= zip(together, found, strict=True)
    for link in joined:
        found = [orders[name].rows for name in link.outputs if name in orders]
        found += [orders[name].columns for name in link.inputs if name in orders]
        if not found or is_natural(units := found[0]):
            continue
        if example_input is None:
            _check_clear(model, link)
        modules = {*link.between, *map(_module, link.outputs)}
        for name, entry in state.items():
            if _module(name) in modules and entry.shape[:1] == units.shape:
                state[name] = entry[units]
        for name in link.inputs:
            state[name] = state[name][:, units]
        masks |= {name: masks[name][units] for name in link.outputs if name in masks}
        masks |= {name: masks[name][:, units] for name in link.inputs if name in masks}
    folded = converted_with(model, masks, state)
    load_dense_state(folded, state)
    if example_input is not None:
        _check_same(model, folded, example_input)
    return folded


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _check_clear(model: nn.Module, link: Link) -> None:
    """Raise ValueError if it depends on the input whether what is between two layers is of the units."""
    if not any(type(model.get_submodule(_module(name))) in LINEAR for name in link.outputs):
        return
    for name in link.between:
        module = model.get_submodule(name)
        if any(entry.numel() > 1 for entry in module.state_dict().values()):
            kind = type(module).__name__
            raise ValueError(
                f"example_input: expected one, as {kind} {name!r} follows a linear layer: it is of the layer's units "
                "only where the input has two dimensions"
            )


def _check_same(model: nn.Module, folded: nn.Module, example_input: ExampleInput) -> None:
    """Raise ValueError unless both return the same of the example, up to rounding."""
    for before, after in zip(*(_returned(each, example_input) for each in (model, folded)), strict=True):
        finite = before[before.isfinite()]
        inexact = before.is_floating_point() or before.is_complex()
        least = torch.finfo(before.dtype).eps ** 0.5 if inexact else 0.0  # of the largest output
        bound = least * float(finite.abs().max()) if len(finite) and inexact else 0.0
        if before.shape != after.shape or not torch.allclose(before, after, rtol=0, atol=bound, equal_nan=True):
            raise ValueError(
                "model: expected its children to be called as a whole, on inputs of which linear layers' units are "
                "dimension 1 where a norm follows; folded it returns something else of the example"
            )


def _returned(model: nn.Module, example_input: ExampleInput) -> list[Tensor]:
    """In fp32 where it has 16 bits, whose rounding would hide what differs."""
    model, given = copy.deepcopy(model).eval(), arguments(example_input).map(torch.clone)
    if any(parameter.dtype in HALVES for parameter in model.parameters()):
        model, given = model.float(), given.map(lambda each: each.float() if each.dtype in HALVES else each)
    with torch.no_grad(), random_state_kept():
        return outputs(given(model))
