"""Which weights of a model go: `prune`, once. `lottery` does so in rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .convert import masks_of, prunable
from .links import Link, links
from .masks import Granularity, Masks, Pool, as_mask, check, pools, prune_pools
from .orders import Permuted
from .oriented import Views, fitted, tell_of_small
from .scores import Scores, at_random, by_given, by_magnitude
from .survey import survey
from .weight_decay import SparseLotteryWarning

METHODS = ("magnitude", "random")


def prune(
    model: nn.Module,
    fraction: float,
    masks: Mapping[str, Tensor] | None = None,
    *,
    method: str = "magnitude",
    scores: Scores | Callable[[nn.Module], Scores] | None = None,
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    output_fraction: float | None = None,
    ignore: Sequence[str] = (),
    granularity: Granularity = (1, 1),
    permute: bool = False,
    generator: torch.Generator | None = None,
) -> Masks:
    """Masks with `fraction` of the surviving weights gone; the model and the given masks are left as they are.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> {name: int(mask.sum()) for name, mask in prune(model, 0.9).items()}
        {'0.weight': 205, '2.weight': 32}

    Exactly round(fraction * survivors) weights, or blocks of them, go, per layer or over all of them; ties are broken
    by index, and a weight that is pruned stays pruned. Biases are never pruned. Give the result to `convert`.

    Args:
        fraction: in [0, 1), of the weights that survive now, not of all of them.
        masks: what survives now, bool tensors keyed by parameter name ("fc1.weight"); layers not named are whole.
            None: the masks that the model was converted with; all True if it was not.
        method: "magnitude" removes the smallest |w|, of blocks the smallest mean |w|, "random" any.
        scores: what takes the place of |w|, by layer: the lowest goes. A tensor of the weight's shape, or (n,) of the
            survivors by index; or a function that makes them of the model: `sparselottery.saliency` has some.
        scope: "layer" takes `fraction` of each layer, "global" of all layers together, or if their granularity differs,
            of all with the same one; rows compete with rows of as many weights.
        rates: fractions of single layers, by name or fnmatch pattern (the first that matches counts). Such a layer
            is pruned on its own in either scope.
        output_fraction: the rate of the last layer; the paper takes half of `fraction` (App. G.4).
        ignore: names or patterns of layers to leave as they are.
        granularity: (R, C) removes whole blocks of R rows x C columns, outputs x inputs of the layer however its weight
            holds them, of a convolution R filters x C channels at one tap, of experts in each one's matrix; the border
            of the weight may cut blocks off. "N:M" leaves N of each M weights that follow each other in a row, of a
            convolution at consecutive channels: `fraction` says the same. "rows" removes whole units, or filters, but
            never the last one of a layer: `export.dead.remove_dead` makes a smaller net of the ticket. A mapping gives
            it by name or pattern as `rates` does; layers not named are (1, 1), single weights. The output layer is
            usually left so, and "rows" for all leaves it whole unless `output_fraction` or `rates` say otherwise: its
            units are the model's outputs. That is the last layer in module order: if yours is another, give its name to
            `ignore`.
        permute: blocks (R, C) are those of each weight with its rows and columns in another order, looked for anew each
            time so that those kept hold the most (see `orders`). It takes seconds for 4096 x 4096, and is a property of
            the mask: nothing but that is to be kept. Layers that follow each other (`links`) share the order of the
            units between them, and weights of units that lead nowhere count as the lowest.
        generator: for "random"; None uses torch's.
    Returns a mask for every weight that `convert` can mask, in module order, embeddings among them; of a weight that
    several layers share one. Warns (`SparseLotteryWarning`), once for a model, if these are less than nine tenths of
    all weights of two dimensions or more, and says why; of whole layers so small that the fraction of them rounds to
    nothing; and of layers that had survivors and have none now.
    Raises ValueError or TypeError for a model without such layers, weights without a shape (lazy ones), without data or
    not finite, a fraction outside [0, 1), an unknown method, scope, name or pattern, a granularity that is not two
    positive ints, "rows" or "N:M", blocks of which a layer to be pruned is no more than one, "rows" of an embedding,
    whose rows are words, a mask that is not boolean, not of its weight's shape or, in a layer to be pruned, not of
    whole blocks, scores of another shape, not finite or missing, a fraction that does not leave N:M, and `permute`
    without blocks.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    found = survey(model)
    weights = prunable(model, found)
    if lazy := [each.name for each in found.weights if is_lazy(each.parameter)]:
        raise ValueError(f"model: expected weights with a shape, got the lazy {lazy[0]!r}: call the model once first")
    if without := [name for name, weight in weights.items() if weight.is_meta]:
        raise ValueError(f"model: expected weights with data, got those of {without[0]!r} on the meta device")
    masks = complete(weights, masks_of(model) if masks is None else masks)
    how = {"scope": scope, "rates": rates, "output_fraction": output_fraction, "ignore": ignore}
    chosen = pools(list(weights), fraction, **how, granularity=granularity, permute=permute)
    views = Views(found, chosen)
    seen = views.seen(masks)
    chosen = fitted(chosen, seen)
    if scores is not None:
        if method != "magnitude":
            raise ValueError(f"scores: expected none with method {method!r}, which does not read them")
        score = by_given(views.of_scores(scores(model) if callable(scores) else scores, masks), seen)
    else:
        score = at_random(seen, generator) if method == "random" else by_magnitude(views.seen(weights), seen)
    found.tell(model, stacklevel=2)
    tell_of_small(chosen, seen, stacklevel=2)
    pruned = views.restored(prune_pools(seen, chosen, score, links_for(model, chosen)))
    tell_of_emptied(masks, pruned, stacklevel=2)
    return pruned


def tell_of_emptied(before: Masks, pruned: Masks, stacklevel: int) -> None:
    """Warn (`SparseLotteryWarning`) of masks that have no survivors any more."""
    if emptied := [name for name, mask in pruned.items() if not mask.any() and before[name].any()]:
        warnings.warn(
            f"no weight is left of {', '.join(emptied)}: what comes out of such a layer no longer depends on its "
            "input. scope='layer' prunes each layer on its own, `rates` gives single ones another fraction, and "
            "`ignore` leaves them whole",
            SparseLotteryWarning,
            stacklevel=stacklevel + 1,
        )


def complete(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """A mask for every weight: the given one, else all True."""
    if not weights:
        raise ValueError("model: expected at least one layer that can be masked, got none: explain(model) says why")
    check(masks, weights)
    whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return whole | {name: as_mask(name, mask).to(weights[name].device) for name, mask in masks.items()}


def links_for(model: nn.Module, chosen: Sequence[Pool]) -> list[Link]:
    """Those that pruning asks for: of blocks in an order of their own."""
    return links(model) if any(isinstance(pool.block, Permuted) for pool in chosen) else []
