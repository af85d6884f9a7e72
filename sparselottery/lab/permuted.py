"""A mask carried to another net: hidden units of two trained nets are matched by what they respond to.

Nets are the same function when hidden units change places, so a mask found from one initialisation fits another only
in the other's order of units (arXiv 2505.05143). Sizes: U units (channels of a convolution), N images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..convert import prunable
from ..masks import Masks

Orders = dict[str, Tensor]  # by weight: of each unit of one net the unit of the other that it is matched with, (U,)


def matched(net: nn.Module, other: nn.Module, images: Tensor) -> Orders:
    """Of each hidden layer of `net` the units of `other`, so that activations correlate most (Hungarian algorithm).

    Raises ValueError unless the net is a Sequential of layers that follow one another.
    """
    ours, theirs = (activations(each, images) for each in (net, other))
    orders = {}
    for name in list(ours)[:-1]:
        correlations = _standard(ours[name]) @ _standard(theirs[name]).T
        orders[name] = torch.from_numpy(linear_sum_assignment(correlations.cpu().numpy(), maximize=True)[1])
    return orders


def carried(masks: Mapping[str, Tensor], orders: Orders, net: nn.Module) -> Masks:
    """The masks of the other net for `net`, whose units are matched: rows and columns change places."""
    found, before = dict(masks), None
    for name in prunable(net):
        order = orders.get(name)
        if name in masks:
            mask = masks[name] if order is None else masks[name][order]
            if before is not None:  # a unit is as many columns as it has pixels or taps
                mask = mask.view(len(mask), len(before), -1)[:, before].view_as(mask)
            found[name] = mask
        before = order
    return found


@torch.no_grad()
def activations(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each layer gives, after its ReLU: (U, N * pixels), by its weight's name."""
    if type(net) is not nn.Sequential or any(len(list(each.children())) for each in net):
        raise ValueError("permuted: expected a net whose layers follow one another, got one with branches")
    weights, found, last, x = prunable(net), {}, None, images
    training = net.training
    net.eval()
    for name, module in net.named_children():
        x = module(x)
        if f"{name}.weight" in weights:
            last = f"{name}.weight"
        if f"{name}.weight" in weights or isinstance(module, nn.ReLU):
            found[last] = x.transpose(0, 1).flatten(1)
    net.train(training)
    return found


def _standard(x: Tensor) -> Tensor:
    """Of each row mean 0 and norm 1, or 0 if it never changes."""
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
