"""Permutations folded into the layers on both sides: hidden units in the order in which masks have whole blocks."""

from __future__ import annotations

from torch import nn

from .convert import converted_with, dense_state, load_dense_state, masked_layers, masks_of
from .grids import connected, orders_in
from .links import links
from .orders import Permuted, permuted_block_of


def fold(model: nn.Module) -> nn.Module:
    """A copy of a converted model that computes the same, its hidden units in the order of the blocks of its masks.

    Masks of permuted blocks (`prune` with `permute`) then have these blocks as they are where the units of one layer
    are the inputs of the next in an nn.Sequential (`links`): no kernel gathers what another has written. What stays
    permuted are the inputs of the first layer of such a chain, and what the blocks of two layers want otherwise.
    Sums are of the same terms in another order: equal up to rounding.
    """
    layers = masked_layers(model)
    blocks = {name: permuted_block_of(layer.pattern, layer.shape)[0] for name, layer in layers.items()}
    joined = [link for link in links(model) if link.outputs in layers and link.inputs in layers]
    state, masks, orders = dense_state(model), masks_of(model), {}
    for names in connected(list(layers), joined):
        grains = {name: Permuted(*blocks[name]) for name in names}
        orders |= zip(names, orders_in(masks, grains, joined)[1], strict=True)
    for outputs, inputs, between in joined:
        units = orders[outputs].rows
        for name, entry in state.items():
            module, _, _ = name.rpartition(".")
            if name == inputs:
                state[name], masks[name] = entry[:, units], masks[name][:, units]
            elif (module in between or module == outputs.rpartition(".")[0]) and entry.shape[:1] == units.shape:
                state[name] = entry[units]
        masks[outputs] = masks[outputs][units]
    folded = converted_with(model, masks, state)
    load_dense_state(folded, state)
    return folded
