"""Masks of N:M that move: as many survivors in each group of M."""

from __future__ import annotations

import copy

import pytest
import torch
from moving import X, adamw, masked_net, random_masks, reference, sgd, train, whole_net

from sparselottery import dynamic, prune, set_masks
from sparselottery.convert import dense_state, masked_layers, masks_of
from sparselottery.dynamic import gradients

EVEN = {"distribution": "uniform"}
METHODS = {
    "gmp": lambda m, o, d, **how: dynamic.gmp(m, o, d, end=8, every=2, **how),
    "set": lambda m, o, d, **how: dynamic.set_training(m, o, d, end=8, every=2, **EVEN, **how),
    "rigl": lambda m, o, d, **how: dynamic.rigl(m, o, d, end=8, every=2, **EVEN, **how),
    "topk": lambda m, o, d, **how: dynamic.topk(m, o, d, end=6, **how),
    "dsd": lambda m, o, d, **how: dynamic.dsd(m, o, d, 2, 6, **how),
}


def groups(dense, size=4):
    """Of each row and tap the groups of channels, as lists."""
    flat = dense.flatten(2) if dense.dim() > 2 else dense[..., None]
    return [[group.tolist() for group in row[:, tap].split(size)] for row in flat for tap in range(row.shape[1])]


def counts(mask):
    return [[sum(group) for group in row] for row in groups(mask)]


def most(mask, kept):
    return [[min(kept, len(group)) for group in row] for row in groups(mask)]


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_groups_have_equally_many_survivors(method, pattern):
    kept, moved = int(pattern[0]), 0
    model = whole_net()
    optimizer = adamw(model.parameters())
    updater = method(model, optimizer, kept / 4, granularity=pattern)
    for step in range(1, 10):
        train(model, optimizer)
        before, masks = dense_state(model), masks_of(model)
        updater.step()
        share = round(updater.density(step) * 4)
        for name, mask in masks_of(model).items():
            if step >= 8 or method is not METHODS["gmp"] or step % 2 == 0:
                assert counts(mask) == most(mask, share), (step, name)
            stays = mask & masks[name]
            moved += not torch.equal(mask, masks[name])
            assert torch.equal(dense_state(model)[name][stays], before[name][stays])
            assert not dense_state(model)[name][mask & ~masks[name]].any()
    assert moved >= 2
    torch.testing.assert_close(model(X), reference(model)(X))


def expected(weight, gradient, mask, kept, dropped):
    """By loops: the smallest survivors go, and in their groups the largest gradients come."""
    alive = mask.flatten().nonzero().squeeze(1).tolist()
    gone = sorted(alive, key=lambda at: (abs(float(weight.flatten()[at])), at))[:dropped]
    after = mask.clone()
    after.view(-1)[gone] = False
    flat, score = after.flatten(2) if after.dim() > 2 else after[..., None], gradient.abs()
    score = score.flatten(2) if score.dim() > 2 else score[..., None]
    for row, scores in zip(flat, score, strict=True):
        for begin in range(0, row.shape[0], 4):
            for tap in range(row.shape[1]):
                channels = range(begin, min(begin + 4, row.shape[0]))
                free = sorted((c for c in channels if not row[c, tap]), key=lambda c: (-float(scores[c, tap]), c))
                for c in free[: min(kept, len(channels)) - sum(bool(row[c, tap]) for c in channels)]:
                    row[c, tap] = True
    return after


@pytest.mark.parametrize("strip", [1, 100, 2**20])
def test_the_smallest_go_and_the_largest_gradients_of_their_groups_come(strip, monkeypatch):
    monkeypatch.setattr(gradients, "STRIP", strip)
    masks = prune(whole_net(), 0.75, granularity="1:4")
    model = masked_net(masks)
    optimizer = sgd(model.parameters())
    updater = dynamic.rigl(model, optimizer, 0.25, end=4, granularity="1:4", **EVEN)
    updater.every, updater.drop_fraction = 1, dynamic.constant(0.4)
    updater._look_ahead()
    dense = reference(model)
    (dense(X) - X.mean()).square().mean().backward()
    train(model, optimizer)
    weights = dense_state(model)
    assert updater.step()
    for name, mask in masks_of(model).items():
        dropped = round(0.4 * int(masks[name].sum()))
        after = expected(weights[name], dense.get_parameter(name).grad, masks[name], 1, dropped)
        assert torch.equal(mask, after), name
        assert not torch.equal(mask, masks[name])


def test_training_goes_on_from_a_checkpoint_in_the_same_bits():
    def start():
        model = masked_net(prune(whole_net(), 0.5, granularity="2:4"))
        optimizer = adamw(model.parameters())
        return model, optimizer, dynamic.set_training(model, optimizer, 0.5, end=9, every=2, granularity="2:4", **EVEN)

    model, optimizer, updater = start()
    for step in range(8):
        if step == 3:
            kept = copy.deepcopy([each.state_dict() for each in (model, optimizer, updater)])
        train(model, optimizer)
        updater.step()
    other = start()
    for each, state in zip(other, kept, strict=True):
        each.load_state_dict(state)
    for _ in range(5):
        train(*other[:2])
        other[2].step()
    for one, another in zip(model.state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(one, another)


def test_masks_that_another_hand_has_moved_are_led_back():
    model = masked_net(prune(whole_net(), 0.5, granularity="2:4"))
    optimizer = sgd(model.parameters())
    updater = dynamic.set_training(model, optimizer, 0.5, end=9, every=2, granularity="2:4", **EVEN)
    set_masks(model, random_masks(3), optimizer)
    for _ in range(2):
        train(model, optimizer)
        updater.step()
    assert all(counts(mask) == most(mask, 2) for mask in masks_of(model).values())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"grow": "momentum"}, r"grow: expected random or gradient with blocks, as 2:4"),
        ({"grow": "gradient", "candidates": 2.0}, r"candidates: expected None with 2:4"),
        ({"distribution": "global"}, r"granularity: expected the same blocks of all layers that compete"),
        ({"density": dynamic.constant(0.25)}, r"density: expected at least that of 2:4 for 0.weight.* got 0.25"),
        ({"masks": random_masks(3)}, r"expected 0.weight to have a mask with equally many survivors in each 4 weights"),
    ],
)
def test_what_cannot_be_is_refused(how, message):
    model = masked_net(how.pop("masks")) if "masks" in how else whole_net()
    how = {"density": dynamic.constant(0.5), "granularity": "2:4"} | how
    with pytest.raises(ValueError, match=message):
        dynamic.MaskUpdater(model, sgd(model.parameters()), **how)


def test_other_layers_may_be_of_single_weights():
    model = whole_net()
    optimizer = sgd(model.parameters())
    updater = dynamic.gmp(model, optimizer, 0.5, end=4, every=2, granularity={"3.*": "2:4"})
    for _ in range(4):
        train(model, optimizer)
        updater.step()
    masks = masks_of(model)
    assert counts(masks["3.weight"]) == most(masks["3.weight"], 2)
    assert [int(masks[name].sum()) for name in ("0.weight", "5.weight")] == [27, 18]
    assert [layer.density for layer in masked_layers(model).values()] == pytest.approx([0.5, 0.5, 18 / 35])
