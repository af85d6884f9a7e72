"""Whole blocks that go and come."""

from __future__ import annotations

import math

import pytest
import torch
from moving import X, adamw, dense_net, masked_net, random_masks, sgd, train, whole_net

from sparselottery import dynamic, prune, set_masks
from sparselottery.convert import dense_state, masked_layers, masks_of
from sparselottery.dynamic.pools import Pool
from sparselottery.masks import block_sums

BLOCK = 2, 3
METHODS = {
    "gmp": lambda m, o, **how: dynamic.gmp(m, o, 0.3, end=8, every=2, **how),
    "set": lambda m, o, **how: dynamic.set_training(m, o, 0.3, end=8, every=2, **how),
    "rigl": lambda m, o, **how: dynamic.rigl(m, o, 0.3, end=8, every=2, **how),
    "sampled": lambda m, o, **how: dynamic.rigl(m, o, 0.3, end=8, every=2, candidates=1.5, **how),
    "topk": lambda m, o, **how: dynamic.topk(m, o, 0.3, end=6, **how),
    "dsd": lambda m, o, **how: dynamic.dsd(m, o, 0.3, 2, 6, **how),
}


def sizes(mask: torch.Tensor) -> torch.Tensor:
    return block_sums(torch.ones_like(mask), BLOCK)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_masks_are_of_whole_blocks_as_many_as_the_density_says(method, distribution):
    model = whole_net()
    optimizer = adamw(model.parameters())
    updater = method(model, optimizer, granularity=BLOCK, distribution=distribution)
    moved = 0
    for step in range(1, 10):
        train(model, optimizer)
        before = dense_state(model)
        masks = masks_of(model)
        if updater.step():
            moved += any(not torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())
        grids = []
        for name, mask in masks_of(model).items():
            counts = block_sums(mask, BLOCK)
            assert bool(((counts == 0) | (counts == sizes(mask))).all()), (step, name)
            grids.append(counts > 0)
            stays = mask & masks[name]
            assert torch.equal(dense_state(model)[name][stays], before[name][stays])
        if step >= 8 and method is not METHODS["dsd"]:
            if distribution == "uniform":
                assert [int(grid.sum()) for grid in grids] == [round(0.3 * grid.numel()) for grid in grids]
            total = sum(grid.numel() for grid in grids)
            assert abs(sum(int(grid.sum()) for grid in grids) - 0.3 * total) <= len(grids) / 2
    assert moved >= 2
    torch.testing.assert_close(model(X), plain(model)(X))


def plain(model):
    net = dense_net()
    net.load_state_dict(dense_state(model))
    return net


@pytest.mark.parametrize("strip", [1, 2**20])
def test_rigl_takes_the_blocks_of_the_largest_mean_gradient(strip, monkeypatch):
    monkeypatch.setattr(dynamic.gradients, "STRIP", strip)
    model = whole_net()
    optimizer = sgd(model.parameters())
    how = {"distribution": "uniform", "granularity": BLOCK, "every": 1, "end": 5}
    updater = dynamic.rigl(model, optimizer, 0.4, **how)
    for step in range(1, 4):
        dense = plain(model)
        (dense(X) - X.mean()).square().mean().backward()
        train(model, optimizer)
        masks, weights = masks_of(model), dense_state(model)
        updater.step()
        for name, mask in masks_of(model).items():
            grid, count = block_sums(masks[name], BLOCK) > 0, sizes(mask)
            target = round(0.4 * grid.numel())
            goes = round(0.15 * (1 + math.cos(math.pi * step / 5)) * target)
            means = [block_sums(each.abs(), BLOCK) / count for each in (weights[name], dense.get_parameter(name).grad)]
            scores = torch.where(grid, means[0], -1.0).flatten()
            kept = torch.zeros(grid.numel(), dtype=torch.bool)
            kept[scores.argsort(descending=True, stable=True)[: target - goes]] = True
            scores = torch.where(kept, -1.0, means[1].flatten())
            kept[scores.argsort(descending=True, stable=True)[:goes]] = True
            assert torch.equal(block_sums(mask, BLOCK).flatten() > 0, kept), (step, name)


def test_places_of_blocks_are_those_of_their_weights():
    masks = prune(dense_net(), 0.5, granularity=BLOCK)
    pool = Pool(masked_layers(masked_net(masks)), BLOCK)
    grids = [block_sums(mask, BLOCK).flatten() for mask in masks.values()]
    assert pool.total == sum(map(len, grids))
    assert torch.equal(pool.places(), torch.cat(grids).nonzero().squeeze(1))
    assert pool.count == len(pool.places())
    for name, pattern in pool.patterns(pool.places()).items():
        assert torch.equal(pattern.mask().view(masks[name].shape), masks[name])


def test_layers_may_have_other_blocks_and_none():
    model = whole_net()
    optimizer = sgd(model.parameters())
    dynamic.set_training(model, optimizer, 0.4, end=4, distribution="uniform", granularity={"3.weight": (7, 4)})
    masks = masks_of(model)
    assert bool((masks["3.weight"] == masks["3.weight"][:1]).all())
    assert not bool((masks["5.weight"] == masks["5.weight"][:1]).all())


def test_what_has_no_blocks_is_refused():
    model = whole_net()
    optimizer = sgd(model.parameters())
    with pytest.raises(ValueError, match=r"expected blocks \(rows, columns\) or N:M, got rows"):
        dynamic.gmp(model, optimizer, 0.5, end=4, granularity="rows")
    with pytest.raises(ValueError, match="grow: expected random or gradient with blocks"):
        dynamic.rigl(model, optimizer, 0.5, end=4, granularity=BLOCK, grow="momentum")
    with pytest.raises(ValueError, match="granularity: expected the same blocks of all layers that compete"):
        dynamic.gmp(model, optimizer, 0.5, end=4, granularity={"3.weight": BLOCK}, distribution="global")
    set_masks(model, random_masks(0), optimizer)
    with pytest.raises(ValueError, match=r"granularity: expected 0\.weight to have a mask of whole 2x3 blocks"):
        dynamic.gmp(model, optimizer, 0.3, end=4, granularity=BLOCK)
