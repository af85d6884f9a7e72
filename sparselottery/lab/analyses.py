"""What the papers looked at in tickets (arXiv 1803.03635 App. F; 1912.05671): pure functions, tensors in, numbers out.

Sizes: O outputs (filters), I inputs (channels), B bins, P points. A mask is bool (O, I, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ticket import Ticket


class Distribution(NamedTuple):
    """Histograms of a layer's initial weights: edges (B + 1,) float64, counts (B,) int64 of all and of survivors."""

    edges: Tensor
    initial: Tensor
    survivors: Tensor


class Movement(NamedTuple):
    """|trained - initial| of one layer's weights, 1-D: of those that the next pruning keeps, and takes."""

    kept: Tensor
    pruned: Tensor


class Degrees(NamedTuple):
    """Connections left: (O,) int64 that go into each output unit, (I,) int64 that come out of each input unit."""

    into: Tensor
    out_of: Tensor


class Overlap(NamedTuple):
    """Jaccard index |a and b| / |a or b| of two masks, and the one of random masks as dense as they are."""

    jaccard: float
    expected: float


class Line(NamedTuple):
    """Loss and accuracy on the straight line between two nets, at each of P shares of the way."""

    shares: list[float]
    losses: list[float]
    accuracies: list[float]


def early_stop(curves: Mapping[str, Sequence[float]]) -> tuple[int, float]:
    """The iteration of minimum validation loss, the first of several, and the test accuracy there (section 2).

    ``curves``: lists ``iteration``, ``val_loss``, ``test_accuracy``, of one length. Raises ValueError if they are not.
    """
    iterations, losses, accuracies = (curves[key] for key in ("iteration", "val_loss", "test_accuracy"))
    if not len(iterations) == len(losses) == len(accuracies) > 0:
        raise ValueError(f"curves: expected lists of one length, got {[len(iterations), len(losses), len(accuracies)]}")
    best = min(range(len(losses)), key=losses.__getitem__)
    return int(iterations[best]), float(accuracies[best])


def distributions(theta: Ticket, masks: Mapping[str, Tensor], bins: int = 40) -> dict[str, Distribution]:
    """Where in each layer's initial weights the survivors lie (App. F.3).

    theta: the initial weights and the masks that the experiment began with; its pruned weights are not counted.
    The bins are equal and symmetric about 0, up to the layer's largest |weight|.
    """
    found = {}
    for name, mask in masks.items():
        weight = theta.weights[name].double()
        edge = float(weight.abs().max()) or 1.0
        counts = [
            torch.histc(weight[chosen], bins, -edge, edge).long() if chosen.any() else torch.zeros(bins).long()
            for chosen in (theta.masks[name], mask)
        ]
        found[name] = Distribution(torch.linspace(-edge, edge, bins + 1, dtype=torch.float64), *counts)
    return found


def movement(start: Mapping[str, Tensor], trained: Ticket, next_masks: Mapping[str, Tensor]) -> dict[str, Movement]:
    """How far training moved the weights that the next pruning keeps, and those that it takes (App. F.2).

    start: the weights that the training of ``trained`` began with. next_masks: subsets of the masks of ``trained``.
    Raises ValueError for one that is not.
    """
    found = {}
    for name, kept in next_masks.items():
        mask = trained.masks[name]
        if bool((kept & ~mask).any()):
            raise ValueError(f"next_masks[{name!r}]: expected a subset of the mask before it")
        distance = (trained.weights[name] - start[name]).abs()
        found[name] = Movement(distance[kept], distance[mask & ~kept])
    return found


def degrees(mask: Tensor) -> Degrees:
    """Of a mask's units (App. F.6); a convolution's taps are added up."""
    flat = mask.flatten(2) if mask.dim() > 2 else mask[:, :, None]
    return Degrees(flat.sum((1, 2)), flat.sum((0, 2)))


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """How alike two tickets' masks are, layer by layer.

    Random masks of densities p and q share p q of a layer's weights and cover p + q - p q of them; the ratio is what is
    expected. Two empty masks are alike.
    """
    found = {}
    for name, mask in a.items():
        both, either = int((mask & b[name]).sum()), int((mask | b[name]).sum())
        p, q = float(mask.double().mean()), float(b[name].double().mean())
        found[name] = Overlap(both / either if either else 1.0, p * q / (p + q - p * q) if either else 1.0)
    return found


def between(a: Ticket, b: Ticket, share: float) -> Ticket:
    """The net at ``share`` of the straight way from ``a`` to ``b``: all weights, biases and floating-point buffers.

    Raises ValueError if their masks differ.
    """
    if a.masks.keys() != b.masks.keys() or not all(torch.equal(mask, b.masks[name]) for name, mask in a.masks.items()):
        raise ValueError("expected two tickets with the same masks")
    weights = {
        name: torch.lerp(weight, b.weights[name], share) if weight.is_floating_point() else weight
        for name, weight in a.weights.items()
    }
    return Ticket(weights, a.masks, a.recipe, a.architecture)


def connectivity(
    a: Ticket, b: Ticket, model: nn.Module, evaluate: Callable[[nn.Module], tuple[float, float]], points: int = 11
) -> Line:
    """``evaluate(net)``, loss and accuracy, at ``points`` equal steps on the way from ``a`` to ``b`` (1912.05671).

    model: any dense net of their architecture; its weights are left alone. Raises ValueError if the masks differ.
    """
    shares = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    net, outcomes = deepcopy(model), []
    for share in shares:
        net.load_state_dict(between(a, b, share).weights)
        outcomes.append(evaluate(net))
    return Line(shares, [loss for loss, _ in outcomes], [accuracy for _, accuracy in outcomes])


def instability(errors: Sequence[float]) -> float:
    """The largest error on a line less the mean error of its two ends (1912.05671, section 2): 0 if they are connected.

    Raises ValueError for fewer than two errors.
    """
    if len(errors) < 2:
        raise ValueError(f"expected the errors of at least the two ends, got {len(errors)}")
    return max(errors) - (errors[0] + errors[-1]) / 2
