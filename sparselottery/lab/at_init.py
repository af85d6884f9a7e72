"""Masks before training: how important each weight of a net is by SNIP, GraSP and SynFlow.

Scores are dicts like those of masks: {"fc1.weight": tensor of the weight's shape}, for every layer that `convert` can
mask; the lowest are to go first (`scores.by_score`). The net is dense and is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import prunable
from ..links import links
from ..masks import Masks, Pool, prune_pools, to_counts
from ..scores import by_score

Scores = dict[str, Tensor]
TEMPERATURE = 200.0  # of the softmax in GraSP, as in its authors' code
STEPS = 100  # prunings of SynFlow


def snip(model: nn.Module, x: Tensor, y: Tensor) -> Scores:
    """|g * w|: how much the loss changes, to first order, without the weight (Lee et al. 2019, eq. 5).

    x: (N, *shape), y: (N,) int64, a batch; g is the gradient of its cross-entropy, in training mode.
    """
    model, weights = _copy(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights.values())
    return {name: (g * w).abs().detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp(model: nn.Module, x: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Scores:
    """w * Hg: how much of the squared gradient norm goes, to first order and up to a factor 2, with the weight.

    Wang et al. 2020, eq. 8, have the negative of it and prune what is highest there. g and H are the gradient and the
    Hessian, in these weights, of the cross-entropy of the batch x (N, *shape), y (N,) int64, the logits divided by
    `temperature`.
    """
    model, weights = _copy(model)
    loss = F.cross_entropy(model(x) / temperature, y)
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(flow, weights.values())
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), products, strict=True)}


def synaptic_flow(model: nn.Module, shape: Sequence[int], masks: Mapping[str, Tensor]) -> Scores:
    """|w| * dR/d|w|, R the sum of the outputs for an input of ones, with |w| in place of w (Tanaka et al. 2020, eq. 1).

    shape: of one input, without the batch. masks: as of `prune`; what they prune counts as zero. All parameters and
    buffers are taken as absolute values, in evaluation mode and float64, which deep nets need.
    """
    model, weights = _copy(model)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.abs_()
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask.to(weights[name].device), 0)
    ones = torch.ones(1, *shape, dtype=torch.float64, device=next(iter(weights.values())).device)
    gradients = torch.autograd.grad(model(ones).sum(), weights.values())
    return {name: (w * g).detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def synflow(
    model: nn.Module,
    shape: Sequence[int],
    masks: Mapping[str, Tensor],
    chosen: Sequence[Pool],
    like: Mapping[str, Tensor],
    steps: int = STEPS,
) -> Masks:
    """`masks` pruned by `synaptic_flow`, anew after each step, until each pool has as many survivors as in `like`.

    After step i of `steps` a share d ** (i / steps) of each pool is left, d being the last one (Tanaka et al. 2020,
    Algorithm 1). No layer loses its last weight as long as the others leave it a share of the flow.
    """
    pruned, linked = dict(masks), links(model)
    for step in range(1, steps + 1):
        # Of the survivors now, the share that taken as often as there are steps to go leads to the end.
        now = [
            pool._replace(fraction=1 - (1 - pool.fraction) ** (1 / (steps - step + 1)))
            for pool in to_counts(pruned, chosen, like)
        ]
        flow = synaptic_flow(model, shape, pruned)
        pruned = prune_pools(pruned, now, by_score(flow.__getitem__, pruned), linked)
    return pruned


def _copy(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy in training mode, and the parameters that are its maskable weights."""
    copied = copy.deepcopy(model).train()
    weights = {name: copied.get_parameter(name).requires_grad_() for name in prunable(copied)}
    return copied, weights
