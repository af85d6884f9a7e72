"""Finished masks put into blocks: blocks in which much survived are filled up, and what survived elsewhere goes.

After "Coarsening the Granularity" (Chen et al., arXiv 2202.04736), which refills and regroups tickets of single
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arrange import Sought, find_orders
from .grids import Links, Rows, block_sums, check_smaller, connected, mask_of, orders_in
from .masks import Granularity, Masks, granularities
from .n_of_m import NofM
from .orders import Order, Permuted
from .pieces import count
from .ticket import Ticket


class Regrouped(NamedTuple):
    """The masks, and a row for each layer that has blocks now.

    layer: its name. block: (R, C). before, after: share of its weights that survive. held: share of the survivors
    before that are in the blocks.
    """

    masks: Masks
    report: list[dict[str, Any]]


def regroup(
    masks: Mapping[str, Tensor] | Ticket,
    granularity: Granularity,
    *,
    refill: float = 1.0,
    permute: bool = True,
    links: Links = (),
) -> Regrouped:
    """Masks of whole blocks (R, C), those that hold the most survivors, with `refill` times as many weights as before.

    Examples:
        >>> masks = {"weight": torch.rand(64, 64) < 0.1}
        >>> regrouped = regroup(masks, (16, 1), refill=2.0)
        >>> regrouped.masks["weight"].shape
        torch.Size([64, 64])

    The number of weights is rounded to whole blocks, at least one of each layer. Blocks are of the masks as they are,
    of transformers' Conv1D inputs x outputs. Masks are no subsets of those given: what comes back is not in a ticket,
    whose pruned weights are zeros. Initial weights for all are in the run's theta:
    `Ticket.load("RUN/theta.safetensors").pruned(regrouped.masks, recipe)`.

    granularity: as given to `prune`; what is (1, 1) stays as it is. permute: blocks are those of permuted weights.
    links: `links(model)`, for orders that layers have in common. Raises ValueError for N:M, "rows", blocks of which a
    layer is no more than one, and `refill` <= 0.
    """
    masks = masks.masks if isinstance(masks, Ticket) else masks
    if not refill > 0:
        raise ValueError(f"refill: expected a positive number, got {refill}")
    grains = granularities(masks, granularity, permute)
    if of_rows := [name for name, grain in grains.items() if isinstance(grain, (NofM, Rows))]:
        raise ValueError(f"granularity: expected blocks, got {grains[of_rows[0]]} for {of_rows[0]!r}")
    blocks = {name: grain.block if permute and grain != (1, 1) else grain for name, grain in grains.items()}
    blocks = {name: block for name, block in blocks.items() if block != (1, 1) and masks[name].numel()}
    for name, block in blocks.items():
        check_smaller(name, masks[name].shape, block)
    sizes = {name: block_sums(torch.ones_like(masks[name]), block) for name, block in blocks.items()}
    kept = {}
    for name, size in sizes.items():
        wanted = refill * count(masks[name]) / masks[name].numel()
        kept[name] = min(max(1, round(wanted * size.numel())), size.numel())
    orders = _orders(masks, blocks, kept, links) if permute else {}
    regrouped, report = {name: mask.clone() for name, mask in masks.items()}, []
    for name, block in blocks.items():
        mask = masks[name]
        order = orders.get(name) or Order(*(torch.arange(side, device=mask.device) for side in mask.shape[:2]))
        share = block_sums(order.permuted(mask), block) / sizes[name]
        best = _best(share, sizes[name], refill * count(mask))
        grid = torch.zeros_like(share, dtype=torch.bool)
        grid.view(-1)[best] = True
        regrouped[name] = order.restored(mask_of(grid, block, mask.shape))
        before, after, both = count(mask), count(regrouped[name]), count(mask & regrouped[name])
        row = {"layer": name, "block": block, "before": before / mask.numel(), "after": after / mask.numel()}
        report.append(row | {"held": both / before if before else 1.0})
    return Regrouped(regrouped, report)


def _best(share: Tensor, sizes: Tensor, wanted: float) -> Tensor:
    """The indices of the blocks with the highest shares, as many as have about that many weights: at least one."""
    best = share.flatten().sort(descending=True, stable=True).indices
    weights = sizes.flatten()[best].cumsum(0)
    return best[: int((weights.double() - wanted).abs().argmin()) + 1]


def _orders(
    masks: Mapping[str, Tensor], blocks: Mapping[str, tuple[int, int]], kept: Mapping[str, int], links: Links
) -> dict[str, Order]:
    orders, whole = {}, {name: torch.ones_like(masks[name]) for name in blocks}
    for names in connected(list(blocks), links):
        axes, start = orders_in(whole, {name: Permuted(*blocks[name]) for name in names}, links)
        layers = [Sought(masks[name].float(), whole[name], blocks[name], kept[name], ahead=False) for name in names]
        orders |= zip(names, find_orders(layers, axes, start), strict=True)
    return orders
