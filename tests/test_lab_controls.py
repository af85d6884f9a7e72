from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from sparselottery import prune
from sparselottery.convert import convert, dense_state
from sparselottery.grids import block_sums, grid_of, order_in, orders_in
from sparselottery.lab.controls import CONTROLS, MASK_ONLY, Control, Round, reinit
from sparselottery.lab.models import conv_net, lenet_300_100
from sparselottery.links import links
from sparselottery.orders import Permuted
from sparselottery.ticket import Ticket

lenet = partial(lenet_300_100, 40, 10, hidden=(48, 20))
conv = partial(conv_net, (6,), (3, 8, 8), 4, (16, 8))
LAYERWISE = {"fraction": 0.5, "output_fraction": 0.25}
GLOBAL = {"fraction": 0.5, "scope": "global", "rates": {"fc*": 0.0}}
BLOCKS = {"fraction": 0.5, "granularity": {"fc1.weight": (4, 4), "fc2.weight": (4, 4)}}


@pytest.fixture(autouse=True)
def _one_thread(_reproducible):
    """Threads would only wait for each other on nets this small."""
    torch.set_num_threads(1)


def a_round(factory=lenet, pruning=LAYERWISE, shape=(40,), number=2) -> Round:
    """Round 2 of a ladder, with noise for its trainings."""
    generator = torch.Generator().manual_seed(99)
    model = reinit(factory, 0)
    theta = dense_state(model)
    masks = {name: torch.ones_like(mask) for name, mask in prune(model, 0).items()}

    def trained(masks):
        weights = {
            name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in theta.items()
        }
        return Ticket(weights, masks, {"seed": 7})

    rounds = [trained(masks)]
    for _ in range(number):
        masks = prune(rounds[-1].apply(factory()), masks=masks, **pruning)
        rounds.append(trained(masks))
    images = torch.randn(30, *shape, generator=generator)
    labels = torch.arange(30) % model[-1].out_features
    whole = rounds[0].masks
    first = Ticket(theta, whole, {"seed": 7})
    return Round(number, first, rounds[0], rounds[-2], masks, factory, images, labels, pruning, noise)


def noise(net, stop) -> None:
    """In place of training."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))


def start(name: str, of: Round, seed: int = 0) -> Ticket:
    return CONTROLS[name].start(of, torch.Generator().manual_seed(seed))


def counts(masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def same_masks(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(mask, b[name]) for name, mask in a.items())


NETS = {
    "layerwise": partial(a_round, lenet, LAYERWISE, (40,)),
    "global": partial(a_round, conv, GLOBAL, (3, 8, 8)),
    "blocks": partial(a_round, lenet, BLOCKS, (40,)),
}
NEW_WEIGHTS = {"reinit", "signs", "survivors", "noise-0.5", "noise-1", "noise-2", "noise-3", "pruned"}
SAME_MASK = NEW_WEIGHTS | {"reset", "order"}
THETAS_WEIGHTS = set(CONTROLS) - NEW_WEIGHTS - {"permuted"}


@pytest.fixture(params=NETS)
def of(request) -> Round:
    return NETS[request.param]()


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_has_as_many_weights_and_trains(of, name):
    ticket = start(name, of)
    assert ticket.nnz == sum(counts(of.masks).values()) < sum(mask.numel() for mask in of.masks.values())
    assert same_masks(ticket.masks, of.masks) == (name in SAME_MASK)
    never_pruned = [key for key, mask in of.masks.items() if mask.all()]
    assert all(ticket.masks[key].all() for key in never_pruned)
    assert ticket.recipe == of.theta.recipe
    assert convert(ticket.apply(of.factory()), ticket.masks)(of.images).shape == (30, of.factory()[-1].out_features)


@pytest.mark.parametrize("name", CONTROLS)
def test_only_random_controls_depend_on_the_draw(of, name):
    state = torch.get_rng_state()
    first, again, other = start(name, of), start(name, of), start(name, of, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.same(again)
    control: Control = CONTROLS[name]
    assert first.same(other) == (not control.random or control.reorders)


@pytest.mark.parametrize("name", CONTROLS)
def test_nothing_of_the_round_is_changed(of, name):
    def kept():
        tickets = (of.theta, of.dense, of.previous)
        return [tensor.clone() for each in tickets for part in (each.weights, each.masks) for tensor in part.values()]

    before, masks = kept(), {key: mask.clone() for key, mask in of.masks.items()}
    ticket = start(name, of)
    for tensor in ticket.weights.values():  # a control that aliases theta drifts with its training
        tensor.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))
    assert same_masks(masks, of.masks)


@pytest.mark.parametrize("name", sorted(THETAS_WEIGHTS))
def test_other_masks_and_resets_keep_the_first_weights(of, name):
    ticket = start(name, of)
    for key, tensor in of.theta.weights.items():
        expected = tensor.masked_fill(~ticket.masks[key], 0) if key in ticket.masks else tensor
        assert torch.equal(ticket.weights[key], expected)


def test_reinit_has_new_weights_of_the_nets_distribution(of):
    ticket = start("reinit", of)
    for name, mask in of.masks.items():
        new, old = ticket.weights[name][mask], of.theta.weights[name][mask]
        assert not (new == old).any()
        if len(new) > 300:
            assert new.std().item() == pytest.approx(of.theta.weights[name].std().item(), rel=0.2)


def test_signs_are_kept_and_magnitudes_redrawn(of):
    ticket, redrawn = start("signs", of), start("reinit", of)
    for name, tensor in of.theta.weights.items():
        if name in of.masks:
            new, old = ticket.weights[name][of.masks[name]], tensor[of.masks[name]]
            assert torch.equal(new.sign(), old.sign())
            assert torch.equal(new.abs(), redrawn.weights[name][of.masks[name]].abs())
        else:
            assert torch.equal(ticket.weights[name], tensor)


def test_rearranged_masks_keep_their_counts_and_lose_their_places(of):
    ticket, other = start("rearranged", of), start("rearranged", of, seed=1)
    assert counts(ticket.masks) == counts(of.masks)
    for name, mask in of.masks.items():
        moved = ticket.masks[name]
        if mask.all():
            assert moved.all()
            continue
        expected = mask.float().mean().item() * int(mask.sum())  # hits of places by chance
        assert abs(int((moved & mask).sum()) - expected) < 0.3 * int(mask.sum())
        assert not torch.equal(moved, other.masks[name])


def test_permuted_blocks_stay_permuted_blocks():
    grains = {name: Permuted(*block) for name, block in BLOCKS["granularity"].items()}
    of = a_round(pruning={"fraction": 0.5, "granularity": grains})
    assert not order_in(of.masks, "fc1.weight", Permuted(4, 4)).is_natural
    for name in ("rearranged", "one-shot", "random", "magnitude", "snip", "grasp", "synflow"):
        masks = start(name, of).masks
        left = [
            sum(int(grid_of(each, layer, grain).sum()) for layer, grain in grains.items()) for each in (masks, of.masks)
        ]
        assert left[0] == left[1]


@pytest.mark.parametrize("name", ["one-shot", "random", "magnitude", "snip", "grasp", "synflow"])
def test_layers_that_follow_each_other_share_an_order(name):
    grains = {name: Permuted(*block) for name, block in BLOCKS["granularity"].items()}
    masks = start(name, a_round(pruning={"fraction": 0.5, "granularity": grains}, number=1)).masks
    axes, orders = orders_in(masks, grains, links(lenet()))
    assert axes[1][1] == axes[0][0]
    assert not orders[0].is_natural


def test_blocks_stay_blocks():
    of = NETS["blocks"]()
    for name in ("rearranged", "one-shot", "random", "magnitude", "snip", "grasp", "synflow"):
        masks = start(name, of).masks
        for layer, block in BLOCKS["granularity"].items():
            sums = block_sums(masks[layer], block)
            assert ((sums == 0) | (sums == block_sums(torch.ones_like(masks[layer]), block))).all()


def test_survivors_draws_from_the_survivors_of_the_layer(of):
    ticket = start("survivors", of)
    for name, mask in of.masks.items():
        own, drawn = of.theta.weights[name][mask], ticket.weights[name][mask]
        assert set(drawn.tolist()) <= set(own.tolist())
        assert not torch.equal(drawn, own)
        assert len(set(drawn.tolist())) < len(own)  # with replacement
    assert torch.equal(ticket.weights["fc1.bias"], of.theta.weights["fc1.bias"])


@pytest.mark.parametrize("sigmas", [0.5, 1, 2, 3])
def test_noise_has_its_share_of_the_layers_deviation(sigmas):
    of = NETS["layerwise"]()
    ticket = start(f"noise-{sigmas}", of)
    noise = (ticket.weights["fc1.weight"] - of.theta.weights["fc1.weight"])[of.masks["fc1.weight"]]
    sigma = of.theta.weights["fc1.weight"].std().item()
    assert noise.std().item() == pytest.approx(sigmas * sigma, rel=0.12)
    assert abs(noise.mean().item()) < 0.3 * sigmas * sigma


@pytest.mark.parametrize(("name", "source"), [("one-shot", "dense"), ("magnitude", "theta")])
def test_one_shot_is_by_the_trained_magnitudes_and_magnitude_by_the_initial(name, source):
    of = NETS["layerwise"]()
    masks = start(name, of).masks
    assert counts(masks) == counts(of.masks)
    for layer, mask in masks.items():
        magnitudes = getattr(of, source).weights[layer].abs()
        assert magnitudes[mask].min() >= magnitudes[~mask].max()


def test_a_global_ladder_is_compared_globally():
    of = NETS["global"]()
    convs = [name for name in of.masks if name.startswith("conv")]
    for name in ("one-shot", "magnitude"):
        ticket = start(name, of)
        weights = (of.dense if name == "one-shot" else of.theta).weights
        kept = torch.cat([weights[layer][ticket.masks[layer]].abs() for layer in convs])
        gone = torch.cat([weights[layer][~ticket.masks[layer]].abs() for layer in convs])
        assert kept.min() >= gone.max()


def test_random_is_independent_of_magnitudes():
    of = NETS["layerwise"]()
    mask = start("random", of).masks["fc1.weight"]
    assert counts(start("random", of).masks) == counts(of.masks)
    magnitudes = of.theta.weights["fc1.weight"].abs()
    assert magnitudes[mask].mean().item() == pytest.approx(magnitudes[~mask].mean().item(), rel=0.15)


def test_pruned_is_the_trained_net_at_the_new_mask():
    of = NETS["layerwise"]()
    ticket = start("pruned", of)
    assert not CONTROLS["pruned"].trains
    for name, tensor in of.previous.weights.items():
        expected = tensor.masked_fill(~of.masks[name], 0) if name in of.masks else tensor
        assert torch.equal(ticket.weights[name], expected)
    with pytest.raises(ValueError, match="expected a round that prunes, got round 0"):
        start("pruned", of._replace(number=0, previous=None))


def test_a_ladder_that_began_with_masks_stays_in_them():
    of = NETS["layerwise"]()
    began = prune(of.theta.apply(lenet()), 0.3, masks=of.theta.masks)
    began = {name: mask | of.masks[name] for name, mask in began.items()}
    of = of._replace(theta=replace(of.theta, masks=began))
    for name in set(CONTROLS) - {"rearranged", "permuted"}:
        assert all(not (mask & ~began[layer]).any() for layer, mask in start(name, of).masks.items()), name


def test_reinit_is_of_its_seed_and_touches_no_generator():
    state = torch.get_rng_state()
    first, same, other = reinit(lenet, 1), reinit(lenet, 1), reinit(lenet, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.fc1.weight, same.fc1.weight)
    assert not (first.fc1.weight == other.fc1.weight).any()


@pytest.mark.parametrize("name", ["one-shot", "pruned"])
def test_a_round_of_which_the_mask_alone_was_kept_has_no_trained_weights(name):
    whole = a_round()
    bare = [
        Ticket(each.weights, each.masks, {**each.recipe, MASK_ONLY: True}) for each in (whole.dense, whole.previous)
    ]
    with pytest.raises(ValueError, match="expected the trained weights of a round, got its mask alone"):
        start(name, whole._replace(dense=bare[0], previous=bare[1]))
