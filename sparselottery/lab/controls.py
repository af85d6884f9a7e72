"""What a ticket is compared with: the same mask on other initial weights, other masks on the same, and more.

Each control is a pure function from what the ladder has found by a round to the initial weights and masks of one
further training; `CONTROLS` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convert import dense_state
from ..links import links
from ..masks import Masks, Pool, Score, granularities, pools, prune_pools, rearrange, to_counts
from ..scores import at_random, by_magnitude, by_score
from ..ticket import Ticket
from . import at_init, permuted

MASK_ONLY = "mask_only"  # in the recipe of a round whose trained weights were not kept: it has those of theta


class Round(NamedTuple):
    """What a control may use of a round of the ladder."""

    number: int
    theta: Ticket  # the weights that the ladder resets to, theta_k, with the masks that it began with
    dense: Ticket  # round 0's trained weights
    previous: Ticket | None  # the trained weights and masks of the round before; None in round 0
    masks: Masks  # the ticket's of this round
    factory: Callable[[], nn.Module]  # a new net of the experiment; draws its weights from torch's global generator
    images: Tensor  # (N, *shape), a batch of the training data, on the device of the net
    labels: Tensor  # (N,) int64
    pruning: Mapping[str, Any]  # how the ladder prunes: keyword arguments of `prune`
    fit: Callable[[nn.Module, int | None], object]  # trains a net of its own as the ladder does, to a step or the last
    rewind_step: int = 0


class Control(NamedTuple):
    """One comparison, and how it is to be run.

    ``start(round, generator)`` gives the weights and masks of its training; all that it draws comes from `generator`.
    """

    start: Callable[[Round, torch.Generator], Ticket]
    text: str  # one line
    random: bool = False  # other draws give other results
    trains: bool = True  # else it is only evaluated
    keeps: bool = False  # its trained weights are kept
    reorders: bool = False  # its training takes the data in another order


def reinit(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``factory()`` under ``seed``: other weights of the same distribution (section 2). torch's own RNG is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def _ticket(of: Round, weights: Mapping[str, Tensor] | None = None, masks: Masks | None = None) -> Ticket:
    """theta at the round's masks, but for what is given."""
    weights = of.theta.weights if weights is None else weights
    return Ticket(dict(weights), of.masks if masks is None else masks, of.theta.recipe, of.theta.architecture)


def _reset(of: Round, generator: torch.Generator) -> Ticket:
    return _ticket(of)


def _reinit(of: Round, generator: torch.Generator) -> Ticket:
    seed = int(torch.randint(2**62, (), generator=generator))
    return _ticket(of, dense_state(reinit(of.factory, seed)))


def _signs(of: Round, generator: torch.Generator) -> Ticket:
    """Magnitudes of masked layers are those of another init, signs the first ones."""
    weights, other = dict(of.theta.weights), _reinit(of, generator).weights
    for name in of.masks:
        weights[name] = other[name].abs().copysign(weights[name])
    return _ticket(of, weights)


def _survivors(of: Round, generator: torch.Generator) -> Ticket:
    """Each survivor is given the initial value of a survivor of its layer, drawn with replacement."""
    weights = dict(of.theta.weights)
    for name, mask in of.masks.items():
        values = weights[name][mask]
        if len(values):
            drawn = values[torch.randint(len(values), values.shape, generator=generator)]
            weights[name] = weights[name].masked_scatter(mask, drawn)
    return _ticket(of, weights)


def _noise(sigmas: float, of: Round, generator: torch.Generator) -> Ticket:
    """The deviation of the noise is `sigmas` times that of the layer's initial weights, pruned ones included."""
    weights = dict(of.theta.weights)
    for name, start in of.theta.masks.items():
        weight = weights[name]
        weights[name] = weight + sigmas * weight[start].std() * torch.randn(weight.shape, generator=generator)
    return _ticket(of, weights)


def _permuted(of: Round, generator: torch.Generator) -> Ticket:
    """The other net is trained once, dense, so that its units can be matched with those of round 0."""
    seed = int(torch.randint(2**62, (), generator=generator))
    start, trained, first = (reinit(of.factory, seed) for _ in range(3))
    if of.rewind_step:
        of.fit(start, of.rewind_step)
    weights = dense_state(start)
    of.fit(trained, None)
    first.load_state_dict(_trained(of.dense))
    orders = permuted.matched(trained, first, of.images)
    return _ticket(of, weights, permuted.carried(of.masks, orders, trained))


def _rearranged(of: Round, generator: torch.Generator) -> Ticket:
    return _ticket(of, masks=rearrange(of.masks, generator, of.pruning.get("granularity", (1, 1))))


def _pruned(of: Round, generator: torch.Generator) -> Ticket:
    if of.previous is None:
        raise ValueError("pruned: expected a round that prunes, got round 0")
    return _ticket(of, _trained(of.previous))


def _trained(ticket: Ticket) -> dict[str, Tensor]:
    if ticket.recipe.get(MASK_ONLY):
        raise ValueError("expected the trained weights of a round, got its mask alone: the weights were not kept")
    return ticket.weights


def _chosen(of: Round) -> list[Pool]:
    """Who competes with whom when the ladder prunes; layers that it never prunes are left out."""
    return [pool for pool in pools(list(of.theta.masks), **of.pruning) if pool.fraction]


def _masked_by(of: Round, score: Score, chosen: list[Pool] | None = None) -> Ticket:
    """theta at the masks with this score and as many survivors, in one pruning; chosen: None, as the ladder prunes."""
    start = of.theta.masks
    counted = to_counts(start, _chosen(of) if chosen is None else chosen, of.masks)
    return _ticket(of, masks=prune_pools(start, counted, score, links(_net(of))))


def _one_shot(of: Round, generator: torch.Generator) -> Ticket:
    return _masked_by(of, by_magnitude(_trained(of.dense), of.theta.masks))


def _magnitude(of: Round, generator: torch.Generator) -> Ticket:
    return _masked_by(of, by_magnitude(of.theta.weights, of.theta.masks))


def _random(of: Round, generator: torch.Generator) -> Ticket:
    return _masked_by(of, at_random(of.theta.masks, generator))


def _net(of: Round) -> nn.Module:
    """A dense net with the weights of theta."""
    net = reinit(of.factory, 0)
    net.load_state_dict(of.theta.weights)
    return net


def _together(of: Round) -> list[Pool]:
    """The layers that the ladder prunes compete with each other; where blocks are pruned, those of the same size."""
    pruned = {name for pool in _chosen(of) for name in pool.names}
    blocks = granularities(of.theta.masks, of.pruning.get("granularity", (1, 1)))
    blocks = {name: block for name, block in blocks.items() if name in pruned}
    return pools(list(blocks), 0.0, scope="global", granularity=blocks)


def _scored(scores: Callable[[nn.Module, Tensor, Tensor], at_init.Scores], of: Round, _: torch.Generator) -> Ticket:
    found = scores(_net(of), of.images, of.labels)
    return _masked_by(of, by_score(found.__getitem__, of.theta.masks), _together(of))


def _synflow(of: Round, generator: torch.Generator) -> Ticket:
    shape = tuple(of.images.shape[1:])
    return _ticket(of, masks=at_init.synflow(_net(of), shape, of.theta.masks, _together(of), of.masks))


CONTROLS: dict[str, Control] = {
    "reinit": Control(_reinit, "the ticket's mask, other initial weights (section 2)", random=True),
    "rearranged": Control(_rearranged, "the mask rearranged within each layer (App. E)", random=True),
    "signs": Control(
        _signs, "the ticket's mask and signs, other magnitudes (Zhou et al. 2019, arXiv 1905.01067)", random=True
    ),
    "permuted": Control(
        _permuted,
        "other initial weights, the mask in the order of their units (arXiv 2505.05143); trains that net first",
        random=True,
    ),
    "survivors": Control(
        _survivors, "initial weights drawn from those of the layer's survivors (App. F.3)", random=True
    ),
    **{
        f"noise-{sigmas:g}": Control(
            partial(_noise, sigmas),
            f"initial weights plus noise of {sigmas:g} sigma of the layer (App. F.7)",
            random=True,
        )
        for sigmas in (0.5, 1, 2, 3)
    },
    "one-shot": Control(_one_shot, "the dense net pruned at once to as many weights, then reset"),
    "pruned": Control(_pruned, "the pruned net as it is before the reset, not trained", trains=False),
    "reset": Control(_reset, "survivors reset, of a ladder that does not (App. B)"),
    "order": Control(_reset, "the ticket, the data in another order", random=True, keeps=True, reorders=True),
    "random": Control(_random, "any weights pruned at initialisation", random=True),
    "magnitude": Control(_magnitude, "the smallest weights pruned at initialisation (App. F.4)"),
    "snip": Control(partial(_scored, at_init.snip), "pruned at initialisation by SNIP (Lee et al. 2019)"),
    "grasp": Control(partial(_scored, at_init.grasp), "pruned at initialisation by GraSP (Wang et al. 2020)"),
    "synflow": Control(_synflow, "pruned at initialisation by SynFlow (Tanaka et al. 2020)"),
}
